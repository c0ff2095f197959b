// Package istio says what a published service looks like as Istio's resources: it turns an mcp.Service into a
// ServiceEntry and, where clients must speak TLS, a DestinationRule, checks them by the rules of who will read them, and
// wraps them as istiod wants them on the wire. All of it is pure. How the resources get to istiod is decided in package
// mcp/xds; what is published, in package bridge.
//
// There are two readers. Stock istiod validates, and drops a whole resource for a single offence: the dialect Stock
// changes names, protocols and labels where it would. Higress's fork takes nearly everything, and its users' routes hold
// the names as they are: the dialect Higress changes nothing that can be sent at all.
package istio

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/regbridge/regbridge/mcp"
)

// The kinds of resources that Render makes: an API group of Istio and a kind in it. They go with any API version.
const (
	ServiceEntryKind    = "networking.istio.io/ServiceEntry"
	DestinationRuleKind = "networking.istio.io/DestinationRule"
)

// Published returns the kinds that regbridge may serve content of. Before the first content is known, a request for one
// of them must wait, since whatever is missing in an answer is deleted.
func Published() []string { return []string{ServiceEntryKind, DestinationRuleKind} }

// Namespace is where all ServiceEntries live, and the DestinationRules of stock Istio. It is Higress's choice, which its
// fork of istiod and its Console rely on. It needs to exist nowhere.
const Namespace = "mcp"

// An Object is one resource. It is a value: nothing in it may be written, since parts of it are shared.
type Object struct {
	// Kind is one of the kinds above.
	Kind string
	// Namespace and Name identify the resource among those of its kind.
	Namespace, Name string
	// Labels are the resource's own labels.
	Labels map[string]string
	// Spec is a *ServiceEntry or a *DestinationRule of istio.io/api/networking/v1alpha3.
	Spec proto.Message
}

// A Dialect is what the reader of the resources accepts. The zero Dialect is Stock. Dialects are comparable.
type Dialect struct {
	higress bool
	// ruleNamespace is the namespace of DestinationRules.
	ruleNamespace string
}

// Stock is the dialect of an unmodified istiod.
var Stock = Dialect{} //nolint:gochecknoglobals // a constant

// Higress is the dialect of the istiod that Higress brings. DestinationRules go to namespace, which must be that of
// Higress's gateway: its istiod looks for them there.
func Higress(namespace string) Dialect { return Dialect{higress: true, ruleNamespace: namespace} }

// ParseDialect returns the dialect of a name: "istio" or "higress". higressNamespace is the argument of Higress.
func ParseDialect(name, higressNamespace string) (Dialect, error) {
	switch name {
	case "istio":
		return Stock, nil
	case "higress":
		if !isDNSLabel(higressNamespace) {
			return Dialect{}, fmt.Errorf("higress namespace %q: write the Kubernetes namespace in which Higress's gateway runs",
				higressNamespace)
		}
		return Higress(higressNamespace), nil
	default:
		return Dialect{}, fmt.Errorf("dialect %q: write istio or higress", name)
	}
}

// String returns the name that ParseDialect reads.
func (d Dialect) String() string {
	if d.higress {
		return "higress"
	}
	return "istio"
}

// NeedsVIP reports whether s needs a virtual address: stock sidecars tell TCP services on one port apart by nothing else.
func (d Dialect) NeedsVIP(s mcp.Service) bool { return !d.higress && d.protocol(s.Protocol) == "TCP" }

// protocol returns the protocol of the rendered port, which is the port's name too.
func (d Dialect) protocol(p mcp.Protocol) string {
	if d.higress {
		return string(p)
	}
	switch p {
	case mcp.HTTP, mcp.HTTP2, mcp.GRPC:
		return string(p)
	case mcp.HTTPS: // TLS is begun by the proxy: see rule
		return "HTTP"
	case mcp.GRPCS:
		return "GRPC"
	default:
		return "TCP"
	}
}

// EndpointError tells why the reader cannot take an endpoint of s: its address or port would make istiod drop the whole
// service, or Envoy all endpoints of all services. nil if it can. Render leaves such endpoints out; who publishes s names
// them with this error.
func (d Dialect) EndpointError(s mcp.Service, e mcp.Endpoint) error {
	if e.Port > maxPort {
		return fmt.Errorf("port %d is not a number from 1 to 65535", e.Port)
	}
	return d.addressError(e.Address, s.DNS)
}

func (d Dialect) addressError(address string, dns bool) error {
	switch {
	case address == "":
		return errors.New("the address is empty")
	case isIP(address):
		return nil
	case !dns || isZoned(address):
		return fmt.Errorf("address %q is not an IP address (without brackets and zone)", address)
	case d.higress && isText(address):
		return nil
	case d.higress:
		return fmt.Errorf("address %q is neither an IP address nor a host name", address)
	}
	if err := fqdnError(address); err != nil {
		return fmt.Errorf("address %q is neither an IP address nor a host name that istiod accepts: %w", address, err)
	}
	return nil
}
