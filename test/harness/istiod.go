package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/regbridge/regbridge/test/servers"
)

// IstiodOptions says what istiod to start.
type IstiodOptions struct {
	// Sources are the MCP-over-xDS servers to read from. They must listen already: istiod ends at once otherwise, and is
	// not ready before each has answered every type.
	Sources []MCPSource
	// Mesh is the whole mesh configuration, in place of Sources and AutoMTLS.
	Mesh string
	// AutoMTLS leaves automatic mutual TLS on, as Istio's default is. Then Envoy waits for certificates, which this
	// istiod does not issue, for each cluster without a DestinationRule that says otherwise.
	AutoMTLS bool
	// Env is further environment. Without PILOT_DEBOUNCE_AFTER changes go out after 10 ms, not Istio's 100.
	Env []string
	// AllowRejects lets Envoys refuse what istiod sends them. Otherwise that fails the test at its end.
	AllowRejects bool
}

// MCPSource is one element of configSources in istiod's mesh configuration.
type MCPSource struct {
	// Address is host:port.
	Address string
	// CA is the PEM certificate of the CA that signed the server's; empty means plaintext.
	CA string
	// SNI is the server name to ask for and to verify with TLS.
	SNI string
}

// Istiod is one istiod without Kubernetes.
type Istiod struct {
	*Process
	// HTTP, GRPC and Monitoring are host:port of the debug pages, of plaintext xDS and of the metrics. They stay the same
	// over restarts.
	HTTP, GRPC, Monitoring string
}

// StartIstiod starts an istiod and waits until it is ready.
func StartIstiod(tb testing.TB, o IstiodOptions) *Istiod {
	tb.Helper()
	program := servers.Need(tb, servers.Istiod)
	d := &Istiod{}
	d.Process = start(tb, "istiod", func(p *Process) (command, error) {
		mesh, err := render(servers.Istiod, "mesh.yaml.tmpl", p.dir, o)
		if err != nil {
			return command{}, err
		}
		if o.Mesh != "" {
			write(tb, mesh, o.Mesh)
		}
		ports, err := freePorts(tb.Context(), 3)
		if err != nil {
			return command{}, err
		}
		d.HTTP, d.GRPC, d.Monitoring = loopback(ports[0]), loopback(ports[1]), loopback(ports[2])
		return command{
			program: program,
			args:    []string{"-meshConfig", mesh, "-httpAddr", d.HTTP, "-grpcAddr", d.GRPC, "-monitoringAddr", d.Monitoring},
			// The first two keep out what only Istio's own proxy has.
			env: append([]string{
				"PILOT_ENABLE_METADATA_EXCHANGE=false", "PILOT_ENABLE_ALPN_FILTER=false", "PILOT_DEBOUNCE_AFTER=10ms",
			}, o.Env...),
			ready: func(ctx context.Context) error {
				_, err := getOK(ctx, "http://"+d.HTTP+"/ready")
				return err
			},
		}, err
	})
	if !o.AllowRejects {
		tb.Cleanup(func() {
			for _, line := range d.Rejects() {
				tb.Errorf("an Envoy refused what istiod made: %s", line)
			}
		})
	}
	return d
}

// Rejects are the lines of the log in which an Envoy refused a response. An acknowledged response proves little; a
// refused one is always wrong.
func (d *Istiod) Rejects() []string {
	var lines []string
	for line := range strings.Lines(d.Log()) {
		if strings.Contains(line, "ACK ERROR") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// IstioConfig is one resource that istiod accepted.
type IstioConfig struct {
	Kind     string
	Metadata struct {
		Name, Namespace   string
		ResourceVersion   string
		CreationTimestamp string
		Labels            map[string]string
		Annotations       map[string]string
	}
	Spec json.RawMessage
}

// Configz is what istiod accepted, all kinds.
func (d *Istiod) Configz() ([]IstioConfig, error) {
	var all []IstioConfig
	err := d.JSON("/debug/configz", &all)
	return all, err
}

// IstioService is one service that istiod knows.
type IstioService struct {
	Hostname       string
	DefaultAddress string
	Resolution     int // 0 is static ("client-side load balancing"), 1 is DNS
	MeshExternal   bool
	Ports          []IstioPort
	Attributes     struct {
		Name, Namespace string
		ServiceRegistry string
		Labels          map[string]string
	}
}

// IstioPort is one port of a service.
type IstioPort struct {
	Name     string
	Port     int
	Protocol string
}

// Registryz lists the services that istiod knows.
func (d *Istiod) Registryz() ([]IstioService, error) {
	var all []IstioService
	err := d.JSON("/debug/registryz", &all)
	return all, err
}

// IstioEndpoint is one endpoint that istiod knows.
type IstioEndpoint struct {
	Addresses       []string
	EndpointPort    int
	ServicePortName string
	LbWeight        int
	TLSMode         string
	Locality        struct{ Label string }
	Labels          map[string]string
	Namespace       string
	HealthStatus    int
}

// Endpoints lists the endpoints of each host that istiod knows, of all namespaces and shards. A host without endpoints
// may be there or not.
func (d *Istiod) Endpoints() (map[string][]IstioEndpoint, error) {
	var all map[string]map[string]struct {
		Shards map[string][]IstioEndpoint
	}
	if err := d.JSON("/debug/endpointShardz", &all); err != nil {
		return nil, err
	}
	hosts := map[string][]IstioEndpoint{}
	for host, namespaces := range all {
		hosts[host] = nil
		for _, service := range namespaces {
			for _, shard := range service.Shards {
				hosts[host] = append(hosts[host], shard...)
			}
		}
	}
	return hosts, nil
}

// IstioSync is how far one proxy is.
type IstioSync struct {
	Proxy     string
	ProxyType string `json:"proxy_type"`
	// Resources are by type URL.
	Resources map[string]struct{ Sent, Acked, SentTime string }
}

// Syncz lists the proxies that are connected, with what they were sent.
func (d *Istiod) Syncz() ([]IstioSync, error) {
	var all []IstioSync
	err := d.JSON("/debug/syncz", &all)
	return all, err
}

// JSON decodes one of istiod's debug pages; /debug/list names them all.
func (d *Istiod) JSON(path string, out any) error {
	return getJSON(d.tb.Context(), "http://"+d.HTTP+path, out)
}

// Metric is the sum over one of istiod's metrics, such as pilot_xds_pushes, or over its series that have all the labels
// (`type="cds"`). It is 0 where there is no such series yet.
func (d *Istiod) Metric(name string, labels ...string) (float64, error) {
	return metric(d.tb.Context(), "http://"+d.Monitoring+"/metrics", name, labels)
}

func metric(ctx context.Context, url, name string, labels []string) (float64, error) {
	page, err := getOK(ctx, url)
	if err != nil {
		return 0, err
	}
	sum, err := sumOf(page, name, labels)
	if err != nil {
		return 0, fmt.Errorf("GET %s: %w", url, err)
	}
	return sum, nil
}

// sumOf adds up the series of a page of metrics that have this name and these labels.
func sumOf(page, name string, labels []string) (float64, error) {
	var sum float64
	lines := bufio.NewScanner(strings.NewReader(page))
	lines.Buffer(nil, 1<<20)
next:
	for lines.Scan() {
		series, value := cutLast(lines.Text(), " ")
		if rest, ok := strings.CutPrefix(series, name); !ok || rest != "" && rest[0] != '{' {
			continue
		}
		for _, label := range labels {
			if !strings.Contains(series, "{"+label) && !strings.Contains(series, ","+label) {
				continue next
			}
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, fmt.Errorf("%q is not a metric: %w", lines.Text(), err)
		}
		sum += v
	}
	return sum, lines.Err()
}

// cutLast splits s at the last sep; without one all of it is before.
func cutLast(s, sep string) (before, after string) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i+len(sep):]
}
