package harness

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/hashicorp/consul/api"
	"github.com/miekg/dns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"
)

func TestConsul(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := StartConsul(t, ConsulOptions{ACL: true})
	t.Logf("consul ready after %v", time.Since(began))
	passing := func(service string) (n int) {
		var entries []api.ServiceEntry
		c.Call(http.MethodGet, "/v1/health/service/"+service+"?passing", nil, &entries)
		return len(entries)
	}
	reaches := func(service string, want int) {
		t.Helper()
		Eventually(t, 10*time.Second, func() error {
			if got := passing(service); got != want {
				return fmt.Errorf("%s has %d passing instances, want %d", service, got, want)
			}
			return nil
		})
	}
	web := api.AgentServiceRegistration{ID: "web-1", Name: "web", Address: "127.0.0.2", Port: 80}
	c.Register(web)
	reaches("web", 1)
	c.SetHealth("web-1", api.HealthCritical)
	reaches("web", 0)
	c.SetHealth("web-1", api.HealthPassing)
	reaches("web", 1)

	c.CreatePolicy("read", `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`)
	token, accessor := c.CreateToken("read")
	status := func(token string) int {
		t.Helper()
		header := http.Header{"X-Consul-Token": {token}}
		status, _, err := call(t.Context(), http.MethodGet, "http://"+c.Address+"/v1/catalog/services", header, nil)
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	if got := status(token); got != http.StatusOK {
		t.Errorf("a new token gets %d", got)
	}
	c.DeleteToken(accessor)
	Eventually(t, 10*time.Second, func() error {
		if got := status(token); got != http.StatusForbidden {
			return fmt.Errorf("a deleted token gets %d", got)
		}
		return nil
	})

	address := c.Address
	c.Restart(true)
	if c.Address != address || passing("web") != 0 {
		t.Errorf("restarted empty at %s (before %s) with %d instances", c.Address, address, passing("web"))
	}
	c.Register(web)
	reaches("web", 1)
	c.Deregister("web-1")
	reaches("web", 0)
}

func TestConsulKeepsItsData(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := StartConsul(t, ConsulOptions{Keep: true})
	t.Logf("consul with data ready after %v", time.Since(began))
	c.Register(api.AgentServiceRegistration{Name: "web", Port: 80})
	began = time.Now()
	c.Restart(false)
	t.Logf("consul with data ready again after %v", time.Since(began))
	listed := func() error {
		var entries []api.ServiceEntry
		c.Call(http.MethodGet, "/v1/health/service/web?passing", nil, &entries)
		if len(entries) != 1 {
			return fmt.Errorf("web has %d passing instances", len(entries))
		}
		return nil
	}
	Eventually(t, 10*time.Second, listed)
	c.Restart(true)
	if listed() == nil {
		t.Error("restarted empty, and web is still there")
	}
}

func TestCoreDNS(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := StartCoreDNS(t, CoreDNSOptions{Zones: map[string]string{
		"example.test": "www A 192.0.2.1",
		"other.test":   "www A 192.0.2.9",
	}})
	t.Logf("coredns ready after %v", time.Since(began))
	ask := func(name string) string {
		t.Helper()
		answer, err := dns.ExchangeContext(t.Context(), new(dns.Msg).SetQuestion(name, dns.TypeA), c.Address)
		if err != nil {
			t.Fatal(err)
		}
		var ips []string
		for _, rr := range answer.Answer {
			ips = append(ips, rr.(*dns.A).A.String())
		}
		return dns.RcodeToString[answer.Rcode] + " " + strings.Join(ips, ",")
	}
	expect := func(name, want string) {
		t.Helper()
		if got := ask(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	expect("www.example.test.", "NOERROR 192.0.2.1")
	expect("www.other.test.", "NOERROR 192.0.2.9")
	began = time.Now()
	c.SetZone("example.test", "www A 192.0.2.2")
	t.Logf("zone served after %v", time.Since(began))
	expect("www.example.test.", "NOERROR 192.0.2.2")
	c.SetZone("example.test", "")
	expect("www.example.test.", "NXDOMAIN ")
	c.Restart()
	expect("www.other.test.", "NOERROR 192.0.2.9")
}

// hostPort is an Envoy address.
func hostPort(ip string, port int) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: ip, PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(port)},
	}}}
}

func TestEnvoy(t *testing.T) {
	t.Parallel()
	ads := startADS(t)
	up := StartUpstream(t, UpstreamOptions{Name: "first", IP: "127.0.0.2"})
	port := FreePort(t)
	ads.set("type.googleapis.com/envoy.config.cluster.v3.Cluster", packed(t, &cluster.Cluster{
		Name: "web", ConnectTimeout: durationpb.New(time.Second),
		LoadAssignment: &endpoint.ClusterLoadAssignment{ClusterName: "web", Endpoints: []*endpoint.LocalityLbEndpoints{{
			LbEndpoints: []*endpoint.LbEndpoint{{HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{
				Address: hostPort(up.IP, up.Port),
			}}}},
		}}},
	}))
	ads.set("type.googleapis.com/envoy.config.listener.v3.Listener", packed(t, &listener.Listener{
		Name: "in", Address: hostPort("127.0.0.1", port),
		FilterChains: []*listener.FilterChain{{Filters: []*listener.Filter{{
			Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: packed(t, &hcm.HttpConnectionManager{
				StatPrefix: "in",
				HttpFilters: []*hcm.HttpFilter{{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{
					TypedConfig: packed(t, &router.Router{}),
				}}},
				RouteSpecifier: &hcm.HttpConnectionManager_RouteConfig{RouteConfig: &route.RouteConfiguration{
					VirtualHosts: []*route.VirtualHost{{Name: "web", Domains: []string{"*"}, Routes: []*route.Route{{
						Match:  &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/"}},
						Action: &route.Route_Route{Route: &route.RouteAction{ClusterSpecifier: &route.RouteAction_Cluster{Cluster: "web"}}},
					}}}},
				}},
			})},
		}}}},
	}))
	began := time.Now()
	e := StartEnvoy(t, EnvoyOptions{XDS: ads.address})
	t.Logf("envoy live after %v", time.Since(began))
	url := "http://web.test:" + strconv.Itoa(port)
	answers := func() {
		t.Helper()
		Eventually(t, 10*time.Second, func() error { return answer(e.Client(), url, "first") })
	}
	answers()

	clusters, err := e.Clusters("^web$")
	if err != nil {
		t.Fatal(err)
	}
	if hosts := clusters["web"]; len(clusters) != 1 || len(hosts) != 1 || hosts[0].Address != up.Address() ||
		hosts[0].Stats["rq_total"] != up.Requests() || hosts[0].Health != "HEALTHY" || hosts[0].Weight != 1 {
		t.Errorf("clusters: %+v, want one host %s with %d requests", clusters, up.Address(), up.Requests())
	}
	stats, err := e.Stats(`^cluster_manager\.cds\.update_`)
	if err != nil || stats["cluster_manager.cds.update_success"] < 1 || stats["cluster_manager.cds.update_rejected"] != 0 {
		t.Errorf("stats: %v, %v", stats, err)
	}
	var dump struct{ Configs []map[string]any }
	if err := e.JSON("/config_dump?resource=dynamic_active_clusters", &dump); err != nil || len(dump.Configs) != 1 {
		t.Errorf("config dump: %v, %v", dump, err)
	}
	e.Restart()
	answers()
	if err := e.Ready(); err != nil {
		t.Error(err)
	}
	if err := e.Stop(); err != nil {
		t.Error(err)
	}
}

// answer returns nil if the URL answers 200 with this body.
func answer(c *http.Client, url, want string) error {
	resp, err := c.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close() // only read
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || string(body) != want {
		return fmt.Errorf("%s: %d %s, want %s", url, resp.StatusCode, body, want)
	}
	return nil
}

func TestIstiodAndSidecar(t *testing.T) {
	t.Parallel()
	const serviceEntry = "networking.istio.io/v1/ServiceEntry"
	ads, other := startADS(t), startADS(t) // istiod may read from several sources
	first := StartUpstream(t, UpstreamOptions{Name: "first", IP: "127.0.0.2"})
	second := StartUpstream(t, UpstreamOptions{Name: "second", IP: "127.0.0.3"})
	port := FreePort(t)
	serve := func(version string, u *Upstream) {
		ads.set(serviceEntry, mcpResource(t, "mcp/web.reg", version, &networking.ServiceEntry{
			Hosts: []string{"web.reg"}, Location: networking.ServiceEntry_MESH_INTERNAL, Resolution: networking.ServiceEntry_STATIC,
			Ports:     []*networking.ServicePort{{Number: uint32(port), Name: "http", Protocol: "HTTP"}},
			Endpoints: []*networking.WorkloadEntry{{Address: u.IP, Ports: map[string]uint32{"http": uint32(u.Port)}, Weight: 3}},
		}))
	}
	serve("v1", first)
	began := time.Now()
	d := StartIstiod(t, IstiodOptions{Sources: []MCPSource{{Address: ads.address}, {Address: other.address}}})
	t.Logf("istiod ready after %v", time.Since(began))
	began = time.Now()
	e := StartSidecar(t, d, SidecarOptions{Delta: true})
	t.Logf("sidecar live after %v", time.Since(began))
	url := "http://web.reg:" + strconv.Itoa(port)
	client := e.Client()
	Eventually(t, 10*time.Second, func() error { return answer(client, url, "first") })

	configs, err := d.Configz()
	if err != nil {
		t.Fatal(err)
	}
	if len(configs) != 1 || configs[0].Kind != "ServiceEntry" || configs[0].Metadata.Name != "web.reg" ||
		configs[0].Metadata.Namespace != "mcp" || configs[0].Metadata.ResourceVersion != "v1" ||
		!strings.HasPrefix(configs[0].Metadata.CreationTimestamp, "2026-01-01T") || len(configs[0].Spec) == 0 {
		t.Errorf("configz: %+v", configs)
	}
	services, err := d.Registryz()
	if err != nil {
		t.Fatal(err)
	}
	if len(services) != 1 || services[0].Hostname != "web.reg" || services[0].Attributes.Namespace != "mcp" ||
		len(services[0].Ports) != 1 || services[0].Ports[0] != (IstioPort{"http", port, "HTTP"}) {
		t.Errorf("registryz: %+v", services)
	}
	expectEndpoint := func(u *Upstream) error {
		endpoints, err := d.Endpoints()
		if err != nil {
			return err
		}
		if e := endpoints["web.reg"]; len(e) != 1 || e[0].Addresses[0] != u.IP || e[0].EndpointPort != u.Port || e[0].LbWeight != 3 {
			return fmt.Errorf("endpoints: %+v, want %s", endpoints, u.Address())
		}
		return nil
	}
	if err := expectEndpoint(first); err != nil {
		t.Error(err)
	}
	proxies, err := d.Syncz()
	if err != nil {
		t.Fatal(err)
	}
	if len(proxies) != 1 || proxies[0].Proxy != "probe.demo" ||
		proxies[0].Resources["type.googleapis.com/envoy.config.cluster.v3.Cluster"].Acked == "" {
		t.Errorf("syncz: %+v", proxies)
	}
	pushes := func() float64 {
		n, err := d.Metric("pilot_xds_pushes", `type="eds"`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := pushes()

	serve("v2", second)
	began = time.Now()
	Eventually(t, 10*time.Second, func() error { return answer(client, url, "second") })
	t.Logf("traffic moved after %v", time.Since(began))
	if err := expectEndpoint(second); err != nil {
		t.Error(err)
	}
	if after := pushes(); after <= before {
		t.Errorf("EDS pushes: %v before and %v after a change", before, after)
	}

	began = time.Now()
	d.Restart()
	t.Logf("istiod ready again after %v", time.Since(began))
	Eventually(t, 10*time.Second, func() error {
		proxies, err := d.Syncz()
		if err == nil && len(proxies) != 1 {
			err = errors.New("the sidecar has not come back")
		}
		return err
	})
	if err := answer(client, url, "second"); err != nil {
		t.Error(err)
	}
	if err := d.Stop(); err != nil {
		t.Error(err)
	}
}

// What the sidecar cannot take must not pass unseen.
func TestIstiodRejects(t *testing.T) {
	t.Parallel()
	ads := startADS(t)
	d := StartIstiod(t, IstiodOptions{
		Sources: []MCPSource{{Address: ads.address}}, AllowRejects: true,
		Env: []string{"PILOT_ENABLE_METADATA_EXCHANGE=true", "PILOT_ENABLE_ALPN_FILTER=true"},
	})
	ads.set("networking.istio.io/v1/ServiceEntry", mcpResource(t, "mcp/web.reg", "1", &networking.ServiceEntry{
		Hosts: []string{"web.reg"}, Location: networking.ServiceEntry_MESH_INTERNAL, Resolution: networking.ServiceEntry_STATIC,
		Ports: []*networking.ServicePort{{Number: uint32(FreePort(t)), Name: "http", Protocol: "HTTP"}},
	}))
	StartSidecar(t, d, SidecarOptions{})
	Eventually(t, 10*time.Second, func() error {
		if len(d.Rejects()) == 0 {
			return errors.New("no reject in istiod's log")
		}
		return nil
	})
}

func TestIstiodSourceWithTLS(t *testing.T) {
	t.Parallel()
	ca := NewCA(t, "bridges")
	ads := startADS(t, grpc.Creds(credentials.NewTLS(ca.ServerTLS(t, "bridge.test"))))
	d := StartIstiod(t, IstiodOptions{Sources: []MCPSource{{Address: ads.address, CA: ca.PEM, SNI: "bridge.test"}}})
	var mesh struct{ ConfigSources []struct{ Address string } }
	if err := d.JSON("/debug/mesh", &mesh); err != nil || len(mesh.ConfigSources) != 1 ||
		mesh.ConfigSources[0].Address != "xds://"+ads.address {
		t.Errorf("/debug/mesh: %+v, %v", mesh, err)
	}
}
