package registry

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// An Entry is one element of spec.registries of a McpBridge. Its JSON form has all fields of Higress's McpBridge
// (networking.higress.io/v1), and ours, which are optional. Each field carries in the tag `edit` what a change of it
// means (see Fingerprint).
type Entry struct {
	// Type is the kind of registry: one of the names in package registry/builtin.
	Type string `json:"type" edit:"source"`
	// Name distinguishes registries of one type; for static and dns it is the first part of the host name.
	Name string `json:"name" edit:"source"`
	// Domain is the registry's server or servers: a comma list of host, host:port or [v6]:port; blanks are allowed. For
	// static it lists endpoints, for dns the names to resolve. For zookeeper the list may end in a chroot (a path), as its
	// connect strings do.
	Domain string `json:"domain,omitempty" edit:"source"`
	// Port is the default port of the servers in Domain; for static and dns the service port.
	Port uint32 `json:"port,omitempty" edit:"source"`

	// NacosAddressServer is the base URL of an address server that lists the Nacos servers.
	NacosAddressServer string `json:"nacosAddressServer,omitempty" edit:"source"`
	// NacosAccessKey and NacosSecretKey sign requests to Alibaba Cloud's Nacos.
	NacosAccessKey string `json:"nacosAccessKey,omitempty" edit:"identity"`
	NacosSecretKey Secret `json:"nacosSecretKey,omitempty" edit:"identity"`
	// NacosNamespaceId is the tenant to read; empty means public.
	NacosNamespaceId string `json:"nacosNamespaceId,omitempty" edit:"source"` //nolint:revive // the name of Higress
	// NacosNamespace replaces the tenant in host names.
	NacosNamespace string `json:"nacosNamespace,omitempty" edit:"source"`
	// NacosGroups are the groups to read.
	NacosGroups []string `json:"nacosGroups,omitempty" edit:"source"`
	// NacosRefreshInterval is the period of listing services.
	NacosRefreshInterval Interval `json:"nacosRefreshInterval,omitempty" edit:"run"`
	// NacosTimeout bounds one request, in milliseconds.
	NacosTimeout int64 `json:"nacosTimeout,omitempty" edit:"run"`

	// ConsulNamespace is the namespace to read (Consul Enterprise).
	ConsulNamespace string `json:"consulNamespace,omitempty" edit:"source"`
	// ConsulPartition is the admin partition to read (Consul Enterprise).
	ConsulPartition string `json:"consulPartition,omitempty" edit:"source"`
	// ConsulDatacenter is the data centre to read, and part of the host names.
	ConsulDatacenter string `json:"consulDatacenter,omitempty" edit:"source"`
	// ConsulDataCenter is the spelling of ConsulDatacenter in Higress's documentation.
	ConsulDataCenter string `json:"consulDataCenter,omitempty" edit:"source"`
	// ConsulServiceTag selects instances that carry this tag.
	ConsulServiceTag string `json:"consulServiceTag,omitempty" edit:"source"`
	// ConsulRefreshInterval is the longest time without a fresh answer.
	ConsulRefreshInterval Interval `json:"consulRefreshInterval,omitempty" edit:"run"`
	// ConsulPassingOnly set to false publishes instances with warnings too; the default is true.
	ConsulPassingOnly *bool `json:"consulPassingOnly,omitempty" edit:"source"`

	// ZkServicesPath lists further root paths of Spring Cloud services.
	ZkServicesPath []string `json:"zkServicesPath,omitempty" edit:"source"`

	// EurekaContextPath is the path of the servers' API; empty means /eureka.
	EurekaContextPath string `json:"eurekaContextPath,omitempty" edit:"source"`
	// EurekaSecure chooses between the two ports of an instance: "auto" (the secure one only where the other is
	// disabled; the default), "always" or "never".
	EurekaSecure string `json:"eurekaSecure,omitempty" edit:"run"`
	// EurekaPreferHostName publishes the instances' host names in place of their IP addresses.
	EurekaPreferHostName bool `json:"eurekaPreferHostName,omitempty" edit:"run"`

	// DNSMode is "passthrough" (the proxies resolve; the default) or "resolve" (regbridge resolves).
	DNSMode string `json:"dnsMode,omitempty" edit:"source"`
	// DNSServers are the servers to ask in mode resolve: host or host:port; empty means those of /etc/resolv.conf.
	DNSServers []string `json:"dnsServers,omitempty" edit:"identity"`

	// AuthSecretName names the Secret, in the McpBridge's namespace, with the credentials.
	AuthSecretName string `json:"authSecretName,omitempty" edit:"identity"`
	// Protocol is the protocol of services whose instances name none.
	Protocol string `json:"protocol,omitempty" edit:"assemble"`
	// SNI is the server name for HTTPS and GRPCS services of static and dns.
	SNI string `json:"sni,omitempty" edit:"run"`
	// ProxyName names an element of spec.proxies.
	ProxyName string `json:"proxyName,omitempty" edit:"assemble"`
	// EcdhCurves are the TLS curves offered upstream together with ProxyName.
	EcdhCurves []string `json:"ecdhCurves,omitempty" edit:"assemble"`
	// VPort fixes service ports.
	VPort *VPort `json:"vport,omitempty" edit:"assemble"`

	// MCPServerExportDomains, MCPServerBaseURL and EnableMCPServer turn Model Context Protocol servers of Nacos 3 into
	// routes.
	MCPServerExportDomains []string `json:"mcpServerExportDomains,omitempty" edit:"assemble"`
	MCPServerBaseURL       string   `json:"mcpServerBaseUrl,omitempty" edit:"assemble"`
	EnableMCPServer        *bool    `json:"enableMCPServer,omitempty" edit:"assemble"`
	// EnableScopeMCPServers, AllowMCPServers and Metadata are accepted and ignored, as Higress does.
	EnableScopeMCPServers *bool                                   `json:"enableScopeMcpServers,omitempty" edit:"assemble"`
	AllowMCPServers       []string                                `json:"allowMcpServers,omitempty" edit:"assemble"`
	Metadata              map[string]map[string]map[string]string `json:"metadata,omitempty" edit:"assemble"`

	// RefreshInterval is the period of polling, or the longest time without a fresh answer where the registry pushes.
	// It goes before the interval of the registry's type. The default is 30 s.
	RefreshInterval Interval `json:"refreshInterval,omitempty" edit:"run"`
	// TLS is how to reach the registry itself.
	TLS *TLS `json:"tls,omitempty" edit:"identity"`
	// Guard sets how long an unexplained absence is held.
	Guard *Guard `json:"guard,omitempty" edit:"assemble"`
}

// Interval returns the effective refresh interval: that of the entry, else that of its type, else the default.
func (e Entry) Interval() time.Duration {
	return cmp.Or(time.Duration(e.RefreshInterval), time.Duration(e.NacosRefreshInterval),
		time.Duration(e.ConsulRefreshInterval), DefaultRefreshInterval)
}

// VPort fixes the port under which services are published, whatever ports their instances have.
type VPort struct {
	// Default is the port of services that Services does not name; 0 means the instances' port.
	Default uint32 `json:"default,omitempty"`
	// Services gives single services a port.
	Services []VPortService `json:"services,omitempty"`
}

// VPortService fixes the port of one service.
type VPortService struct {
	// Name is the full host name, compared without case.
	Name string `json:"name"`
	// Value is the port, 1 to 65535.
	Value uint32 `json:"value"`
}

// TLS is how to reach a registry by TLS. Files are read again when they change.
type TLS struct {
	// Enabled false turns TLS off without deleting the rest; unset means on.
	Enabled *bool `json:"enabled,omitempty"`
	// CAFile, CertFile and KeyFile are PEM files: the CA that signed the server, and our client certificate.
	CAFile   string `json:"caFile,omitempty"`
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	// SecretName names a Secret with the keys ca.crt, tls.crt and tls.key, in place of files. Each key is optional.
	SecretName string `json:"secretName,omitempty"`
	// ServerName is what the server's certificate must be valid for; empty means the server's host.
	ServerName string `json:"serverName,omitempty"`
	// InsecureSkipVerify accepts any certificate.
	InsecureSkipVerify bool `json:"insecureSkipVerify,omitempty"`
}

// On reports whether the registry is reached by TLS.
func (t *TLS) On() bool { return t != nil && (t.Enabled == nil || *t.Enabled) }

// Guard sets how long endpoints are kept that a registry stopped listing without saying why.
type Guard struct {
	// Settle is the time after a gap in which absence is no evidence; default 60 s.
	Settle Interval `json:"settle,omitempty"`
	// Hold is the time for which the loss of more than half of a registry's endpoints is held back; default 5 min.
	Hold Interval `json:"hold,omitempty"`
	// Off believes every absence at once.
	Off bool `json:"off,omitempty"`
}

// Interval is a duration that Higress writes as a number of nanoseconds or, from its Console, of seconds: a number
// below 10^6 counts seconds, any other nanoseconds. A string is a Go duration ("30s") or such a number. 0 is unset.
type Interval time.Duration

// Or returns the interval, or d where it is unset.
func (i Interval) Or(d time.Duration) time.Duration {
	if i == 0 {
		return d
	}
	return time.Duration(i)
}

// MarshalJSON writes a Go duration, which UnmarshalJSON reads back as the same.
func (i Interval) MarshalJSON() ([]byte, error) { return json.Marshal(time.Duration(i).String()) }

// UnmarshalJSON reads all forms.
func (i *Interval) UnmarshalJSON(b []byte) error {
	text := string(bytes.TrimSpace(b))
	if text == "null" {
		return nil
	}
	if strings.HasPrefix(text, `"`) {
		if err := json.Unmarshal(b, &text); err != nil {
			return err
		}
		text = strings.TrimSpace(text)
	}
	if text == "" {
		*i = 0
		return nil
	}
	d, err := parseInterval(text)
	if err != nil {
		return err
	}
	*i = Interval(d)
	return nil
}

func parseInterval(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if n, nerr := strconv.ParseFloat(text, 64); nerr == nil { // also 0, which is a Go duration too, and 3e10
		switch {
		case n < 0 || n > math.MaxInt64/2 || n != math.Trunc(n):
			return 0, fmt.Errorf("interval %s: write a whole number of seconds, or a duration such as 30s", text)
		case n < 1e6:
			return time.Duration(n) * time.Second, nil
		default:
			return time.Duration(n), nil
		}
	}
	if err != nil {
		return 0, fmt.Errorf("interval %q: write a duration such as 30s, or a number of seconds", text)
	}
	if d < 0 {
		return 0, fmt.Errorf("interval %q is negative", text)
	}
	return d, nil
}

// A Secret is a text that is never printed. In JSON it is written as it is, since a configuration must survive that.
type Secret string

// String hides the text.
func (s Secret) String() string { return "***" }

// GoString hides the text.
func (s Secret) GoString() string { return "***" }

// Reveal returns the text.
func (s Secret) Reveal() string { return string(s) }

// A FieldError is a problem with one field of an Entry.
type FieldError struct {
	// Path is the field's path within the entry, in JSON names: "port", "vport.services[1].value".
	Path string
	// Err tells what is wrong and what to do about it.
	Err error
	// Partial says that only a part of the field is bad, and the rest is used.
	Partial bool
}

func (e *FieldError) Error() string { return e.Path + ": " + e.Err.Error() }

func (e *FieldError) Unwrap() error { return e.Err }

// Fieldf returns a FieldError.
func Fieldf(path, format string, args ...any) error {
	return &FieldError{Path: path, Err: fmt.Errorf(format, args...)}
}

// FieldErrors returns the FieldErrors that err joins or wraps.
func FieldErrors(err error) []*FieldError {
	var out []*FieldError
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			out = append(out, FieldErrors(e)...)
		}
		return out
	}
	if fe, ok := errors.AsType[*FieldError](err); ok {
		out = append(out, fe)
	}
	return out
}
