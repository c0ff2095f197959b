package harness

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/servers"
)

// EnvoyOptions says what Envoy to start for an xDS server that speaks to it directly.
type EnvoyOptions struct {
	// ID is the node's id; empty means "test".
	ID string
	// XDS is host:port of the xDS server; its host is an IP address.
	XDS string
	// Delta picks incremental xDS; otherwise each answer is the state of the world.
	Delta bool
	// Fetch is how long Envoy waits for its first clusters, and then for its first listeners; 0 means 15 s.
	Fetch time.Duration
}

// SidecarOptions says what Envoy to start as a sidecar of istiod.
type SidecarOptions struct {
	// Name and Namespace are those of the workload; empty means "probe" and "demo".
	Name, Namespace string
	// Delta picks incremental xDS; otherwise each answer is the state of the world.
	Delta bool
	// Metadata is added to the node's.
	Metadata map[string]any
	// SDS is host:port of a server of secrets, which Envoy knows as the cluster sds-grpc; its host is an IP address. Where
	// istiod's configuration names CA certificates of the proxy's machine, Envoy asks there. Empty means none.
	SDS string
}

// Envoy is one proxy.
type Envoy struct {
	*Process
	// Admin is host:port of the admin pages; it changes with a restart.
	Admin string
}

// StartEnvoy starts an Envoy behind an xDS server and waits until it is live.
func StartEnvoy(tb testing.TB, o EnvoyOptions) *Envoy {
	tb.Helper()
	host, port, err := net.SplitHostPort(o.XDS)
	if err != nil {
		tb.Fatalf("EnvoyOptions.XDS: %v", err)
	}
	id, fetch := cmp.Or(o.ID, "test"), cmp.Or(o.Fetch, 15*time.Second)
	return startEnvoy(tb, servers.Envoy, "bootstrap.yaml.tmpl", map[string]any{
		"ID": id, "Host": host, "Port": port, "API": apiType(o.Delta), "Fetch": fmt.Sprintf("%.3fs", fetch.Seconds()), "TLS": "",
	})
}

// StartSidecar starts an Envoy as a sidecar that istiod configures, and waits until it is live. For each service that
// istiod knows it listens on 127.0.0.1 at the service's port: give services ports of FreePort, and ask through Client.
func StartSidecar(tb testing.TB, d *Istiod, o SidecarOptions) *Envoy {
	tb.Helper()
	name, ns := cmp.Or(o.Name, "probe"), cmp.Or(o.Namespace, "demo")
	meta := map[string]any{
		"NAMESPACE": ns, "ISTIO_VERSION": "1.31.0", "CLUSTER_ID": "Kubernetes", "INTERCEPTION_MODE": "NONE",
		"LABELS": map[string]string{"app": name},
	}
	maps.Copy(meta, o.Metadata)
	metaJSON, err := json.Marshal(meta)
	if err != nil {
		tb.Fatalf("SidecarOptions.Metadata: %v", err)
	}
	_, port, _ := net.SplitHostPort(d.GRPC) // made by loopback
	sdsHost, sdsPort, err := net.SplitHostPort(cmp.Or(o.SDS, ":"))
	if err != nil {
		tb.Fatalf("SidecarOptions.SDS: %v", err)
	}
	return startEnvoy(tb, servers.Istiod, "envoy.yaml.tmpl", map[string]any{
		"ID":   fmt.Sprintf("sidecar~127.0.0.1~%s.%s~%s.svc.cluster.local", name, ns, ns),
		"Meta": string(metaJSON), "API": apiType(o.Delta), "Port": port, "SDSHost": sdsHost, "SDSPort": sdsPort,
	})
}

func apiType(delta bool) string {
	if delta {
		return "DELTA_GRPC"
	}
	return "GRPC"
}

func startEnvoy(tb testing.TB, recipe servers.Server, template string, data any) *Envoy {
	tb.Helper()
	program := servers.Need(tb, servers.Envoy)
	e := &Envoy{}
	e.Process = start(tb, "envoy", func(p *Process) (command, error) {
		bootstrap, err := render(recipe, template, p.dir, data)
		if err != nil {
			return command{}, err
		}
		admin := filepath.Join(p.dir, "admin")
		return command{
			program: program,
			args: []string{
				"-c", bootstrap, "--admin-address-path", admin, "--disable-hot-restart", "--concurrency", "1",
				"-l", "warn", "--component-log-level", "config:info,upstream:info", // info alone starts with pages of versions
			},
			ready: func(ctx context.Context) error {
				address, err := os.ReadFile(admin)
				if err != nil {
					return err
				}
				e.Admin = string(address)
				_, err = getOK(ctx, "http://"+e.Admin+"/ready")
				return err
			},
		}, nil
	})
	return e
}

// Restart kills Envoy and starts it again with the same bootstrap.
func (e *Envoy) Restart() {
	e.tb.Helper()
	e.Kill()
	if err := os.Remove(filepath.Join(e.dir, "admin")); err != nil { // else the old address would be asked
		e.tb.Fatal(err)
	}
	e.Process.Restart()
}

// Ready returns nil if Envoy is live. That says nothing of single clusters and listeners.
func (e *Envoy) Ready() error {
	_, err := e.Get("/ready")
	return err
}

// Get returns an admin page.
func (e *Envoy) Get(path string) (string, error) {
	return getOK(e.tb.Context(), "http://"+e.Admin+path)
}

// JSON decodes an admin page such as /config_dump?include_eds.
func (e *Envoy) JSON(path string, out any) error {
	return getJSON(e.tb.Context(), "http://"+e.Admin+path, out)
}

// EnvoyHost is one endpoint of a cluster.
type EnvoyHost struct {
	// Address is host:port.
	Address string
	Weight  int
	// Health is the health that EDS states: "HEALTHY", "UNHEALTHY", ...
	Health       string
	Region, Zone string
	Priority     int
	// Stats are the host's counters and gauges, such as rq_total.
	Stats map[string]int64
}

// Clusters lists the endpoints of each cluster, static ones too. filter is a regular expression on the clusters' names;
// empty means all.
func (e *Envoy) Clusters(filter string) (map[string][]EnvoyHost, error) {
	var page struct {
		Clusters []struct {
			Name  string `json:"name"`
			Hosts []struct {
				Address struct {
					Socket struct {
						Address string `json:"address"`
						Port    int    `json:"port_value"`
					} `json:"socket_address"`
				} `json:"address"`
				Health struct {
					EDS string `json:"eds_health_status"`
				} `json:"health_status"`
				Weight   int `json:"weight"`
				Priority int `json:"priority"`
				Locality struct {
					Region, Zone string
				} `json:"locality"`
				Stats []struct {
					Name  string      `json:"name"`
					Value json.Number `json:"value"` // a string or absent
				} `json:"stats"`
			} `json:"host_statuses"`
		} `json:"cluster_statuses"`
	}
	if err := e.JSON("/clusters?format=json&filter="+url.QueryEscape(filter), &page); err != nil {
		return nil, err
	}
	clusters := map[string][]EnvoyHost{}
	for _, c := range page.Clusters {
		clusters[c.Name] = nil
		for _, h := range c.Hosts {
			host := EnvoyHost{
				Address: net.JoinHostPort(h.Address.Socket.Address, strconv.Itoa(h.Address.Socket.Port)),
				Weight:  h.Weight, Health: h.Health.EDS, Priority: h.Priority,
				Region: h.Locality.Region, Zone: h.Locality.Zone, Stats: map[string]int64{},
			}
			for _, s := range h.Stats {
				host.Stats[s.Name], _ = s.Value.Int64() // absent is 0
			}
			clusters[c.Name] = append(clusters[c.Name], host)
		}
	}
	return clusters, nil
}

// Stats are the counters and gauges whose names match the regular expression filter. Histograms are left out.
func (e *Envoy) Stats(filter string) (map[string]int64, error) {
	page, err := e.Get("/stats?filter=" + url.QueryEscape(filter))
	if err != nil {
		return nil, err
	}
	stats := map[string]int64{}
	lines := bufio.NewScanner(strings.NewReader(page))
	for lines.Scan() {
		name, text := cutLast(lines.Text(), ": ")
		if value, err := strconv.ParseInt(text, 10, 64); err == nil {
			stats[name] = value
		}
	}
	return stats, lines.Err()
}

// Client returns a client whose requests go to this machine, whatever the URL's host: to the listener of an Envoy with
// the URL's port. The Host header is the URL's. Connections are kept and closed at the end of the test.
func (e *Envoy) Client() *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		var d net.Dialer
		return d.DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
	}}
	e.tb.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}
