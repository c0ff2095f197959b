package istio

import (
	"crypto/md5" //nolint:gosec // a name that Higress derives, not a secret
	"encoding/hex"
	"strings"
	"unicode/utf8"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
)

// The labels by which Higress's Console and users find the resources of a registry.
const (
	registryTypeLabel = "higress-registry-type"
	registryNameLabel = "higress-registry-name"
)

// Render returns the resources of one service: a ServiceEntry, and a DestinationRule where the proxies must begin TLS.
// The same service gives the same resources. Endpoints keep their order.
func (d Dialect) Render(s mcp.Service) []Object {
	host := d.Host(s.Host)
	objects := []Object{{
		Kind:      ServiceEntryKind,
		Namespace: Namespace,
		Name:      host,
		Labels:    d.resourceLabels(s),
		Spec:      d.entry(s, host),
	}}
	if rule, ok := d.rule(s, host); ok {
		objects = append(objects, rule)
	}
	return objects
}

func (d Dialect) resourceLabels(s mcp.Service) map[string]string {
	if d.higress {
		return map[string]string{
			registryTypeLabel: strings.ToValidUTF8(s.RegistryType, "-"),
			registryNameLabel: strings.ToValidUTF8(s.RegistryName, "-"),
		}
	}
	return map[string]string{
		registryTypeLabel: labelValue(s.RegistryType),
		registryNameLabel: labelValue(s.RegistryName),
	}
}

func (d Dialect) entry(s mcp.Service, host string) *networking.ServiceEntry {
	protocol := d.protocol(s.Protocol)
	e := &networking.ServiceEntry{
		Hosts:      []string{host},
		Ports:      []*networking.ServicePort{{Number: s.Port, Protocol: protocol, Name: protocol}},
		Location:   networking.ServiceEntry_MESH_INTERNAL,
		Resolution: networking.ServiceEntry_STATIC,
		Endpoints:  d.endpoints(s, protocol),
	}
	// With DNS and no endpoint istiod would have the proxies look up the host itself.
	if s.DNS && len(e.Endpoints) > 0 {
		e.Resolution = networking.ServiceEntry_DNS
	}
	if !d.higress && s.VIP.IsValid() {
		e.Addresses = []string{s.VIP.Unmap().WithZone("").String()}
	}
	return e
}

func (d Dialect) endpoints(s mcp.Service, portName string) []*networking.WorkloadEntry {
	if len(s.Endpoints) == 0 {
		return nil
	}
	// One piece of memory for all, and one map for neighbours with equal ports or labels: there may be a million.
	entries := make([]networking.WorkloadEntry, len(s.Endpoints))
	out := make([]*networking.WorkloadEntry, 0, len(s.Endpoints))
	var ports map[string]uint32
	var port uint32
	var pairs map[string]string
	var set labels.Set
	for i, in := range s.Endpoints {
		if d.EndpointError(s, in) != nil {
			continue
		}
		if in.Port != port {
			port, ports = in.Port, nil
			if port != 0 {
				ports = map[string]uint32{portName: port}
			}
		}
		if in.Labels != set {
			set, pairs = in.Labels, d.endpointLabels(in.Labels)
		}
		e := &entries[i]
		e.Address, e.Ports, e.Labels, e.Weight = in.Address, ports, pairs, in.Weight
		if !d.higress && utf8.ValidString(in.Locality) {
			e.Locality = in.Locality
		}
		out = append(out, e)
	}
	return out
}

// endpointLabels returns the pairs of set that the reader may see; nil if there are none.
func (d Dialect) endpointLabels(set labels.Set) map[string]string {
	n := 0
	for k, v := range set.All() {
		if d.passes(k, v) {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	m := make(map[string]string, n)
	for k, v := range set.All() {
		if d.passes(k, v) {
			m[k] = v
		}
	}
	return m
}

// passes reports whether a label of an endpoint is published.
func (d Dialect) passes(key, value string) bool {
	if d.higress {
		return utf8.ValidString(key) && utf8.ValidString(value)
	}
	switch key {
	case "timestamp", "pid": // Dubbo's: they differ at each start of a provider, and say nothing to a mesh
		return false
	case "istio-locality": // overrides where the endpoint runs
		return false
	}
	if prefix, _, ok := strings.Cut(key, "/"); ok && (prefix == "istio.io" || strings.HasSuffix(prefix, ".istio.io")) {
		return false // TLS mode, network, draining, canonical name: not for a registrant to say
	}
	return isLabelValue(value) && labelKeyError(key) == nil
}

// rule returns the DestinationRule that makes the proxies begin TLS.
//
// Stock: for each HTTPS and GRPCS service, since its port is told to be HTTP or GRPC, so that the proxies can route its
// requests. The server's certificate is verified by the proxy's operating system's CAs, and must be valid for the SNI;
// istiod does not demand that by itself when an SNI is set. Without an SNI the proxy sends the host name of each request
// as SNI, and verifies that. Who needs another CA writes an own DestinationRule for the host in the client's namespace:
// it goes before ours.
//
// Higress: for services that state their TLS alone, which are those of static and dns, as Higress does.
func (d Dialect) rule(s mcp.Service, host string) (Object, bool) {
	if s.Protocol != mcp.HTTPS && s.Protocol != mcp.GRPCS || d.higress && s.TLS == nil {
		return Object{}, false
	}
	tls := &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_SIMPLE}
	if s.TLS != nil && isServerName(s.TLS.SNI) {
		tls.Sni = s.TLS.SNI
	}
	o := Object{Kind: DestinationRuleKind}
	if d.higress {
		sum := md5.Sum([]byte(Namespace + "/" + host)) //nolint:gosec // see the import
		o.Namespace = d.ruleNamespace
		o.Name = "istio-autogenerated-k8s-ingress-" + hex.EncodeToString(sum[:])
	} else {
		o.Namespace, o.Name, o.Labels = Namespace, host, d.resourceLabels(s)
		tls.CaCertificates = "system" // older releases verify nothing where this is empty
		if tls.Sni != "" {
			tls.SubjectAltNames = []string{tls.Sni}
		}
	}
	o.Spec = &networking.DestinationRule{
		Host: host,
		TrafficPolicy: &networking.TrafficPolicy{
			PortLevelSettings: []*networking.TrafficPolicy_PortTrafficPolicy{{
				Port: &networking.PortSelector{Number: s.Port},
				Tls:  tls,
			}},
		},
	}
	return o, true
}

func isServerName(s string) bool { return len(s) <= maxServerName && isText(s) }
