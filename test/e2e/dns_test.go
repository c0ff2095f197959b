package e2e

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

// TestDNSAndStatic has services of a name server and of lists.
func TestDNSAndStatic(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := &named{world: w}
	for n := range 3 {
		d.upstreams = append(d.upstreams, w.upstream(t, fmt.Sprintf("dns-%d", n+1)))
	}
	d.odd = harness.StartUpstream(t, harness.UpstreamOptions{Name: "other port", IP: "127.0.0.100"})
	d.local = harness.StartUpstream(t, harness.UpstreamOptions{Name: "localhost"})
	w.dns = harness.StartCoreDNS(t, harness.CoreDNSOptions{Zones: map[string]string{
		"a.test":    d.a(0, 1),
		"srv.test":  d.srv(0),
		"gone.test": "web A 127.0.0.2",
	}})
	resolve := func(name, domain string) string {
		return fmt.Sprintf("{type: dns, name: %s, domain: %q, port: %d, dnsMode: resolve, dnsServers: [%q], "+
			"refreshInterval: 1s, guard: {settle: 2s, hold: 3s}}", name, domain, w.port, w.dns.Address)
	}
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{
		"dns.yaml": mcpBridge("dns",
			resolve("a", "web.a.test"), resolve("srv", "_http._tcp.srv.test"), resolve("gone", "web.gone.test"),
			fmt.Sprintf("{type: dns, name: proxies, domain: %q, port: %d}", fmt.Sprintf("localhost:%d", d.local.Port), w.port)),
		"first.yaml":  mcpBridge("first", w.staticEntry("shared", d.upstreams[0])),
		"second.yaml": mcpBridge("second", w.staticEntry("shared", d.upstreams[1], d.upstreams[0])),
	}})
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})

	t.Run("A records", d.testA)
	t.Run("SRV records", d.testSRV)
	t.Run("name that is gone", d.testGone)
	t.Run("name server killed", d.testKilled)
	t.Run("names that the proxies resolve", d.testPassthrough)
	t.Run("two registries with one host", d.testMerge)
	t.Run("edited static entry", d.testEditStatic)
	t.Run("broken and missing configuration", d.testBrokenConfig)
}

type named struct {
	*world
	upstreams  []*harness.Upstream
	odd, local *harness.Upstream
}

// a is a zone in which web has the addresses of these upstreams.
func (d *named) a(which ...int) string {
	var zone string
	for _, i := range which {
		zone += "web A " + d.upstreams[i].IP + "\n"
	}
	return zone
}

// srv is a zone in which _http._tcp names these upstreams.
func (d *named) srv(which ...int) string {
	var zone string
	for _, i := range which {
		u := d.upstreams[i]
		zone += fmt.Sprintf("_http._tcp SRV 0 10 %d host%d\nhost%d A %s\n", u.Port, i, i, u.IP)
	}
	return zone
}

func (d *named) testA(t *testing.T) {
	u := d.upstreams
	d.serves(t, "a.dns", u[0], u[1])
	flow := d.traffic(t, "a.dns")
	d.dns.SetZone("a.test", d.a(1, 2))
	began := time.Now()
	d.serves(t, "a.dns", u[1], u[2])
	t.Logf("measured: zone change, with a TTL of 1 s, to traffic: %v", time.Since(began).Round(time.Millisecond))
	flow.end(t)
}

func (d *named) testSRV(t *testing.T) {
	u := d.upstreams
	d.serves(t, "srv.dns", u[0])
	// Port and weight are the record's.
	zone := d.srv(0) + fmt.Sprintf("_http._tcp SRV 0 30 %d odd\nodd A %s\n", d.odd.Port, d.odd.IP)
	d.dns.SetZone("srv.test", zone)
	d.serves(t, "srv.dns", u[0], d.odd)
	got := map[string]int{}
	for range 200 {
		name, err := d.ask("srv.dns")
		if err != nil {
			t.Fatal(err)
		}
		got[name]++
	}
	if n := got[d.odd.Name]; n < 140 || n > 160 {
		t.Errorf("with the weights 10 and 30 the answers are %v", got)
	}
	d.dns.SetZone("srv.test", d.srv(1))
	d.serves(t, "srv.dns", u[1])
}

func (d *named) testGone(t *testing.T) {
	d.serves(t, "gone.dns", d.upstreams[0])
	d.dns.SetZone("gone.test", "")
	began := time.Now()
	d.serves503(t, "gone.dns")
	t.Logf("measured: NXDOMAIN, with a TTL of 1 s, to 503: %v", time.Since(began).Round(time.Millisecond))
	d.dns.SetZone("gone.test", "web A "+d.upstreams[2].IP)
	d.serves(t, "gone.dns", d.upstreams[2])
}

func (d *named) testKilled(t *testing.T) {
	flow := d.traffic(t, "a.dns")
	d.dns.Kill()
	d.inState(t, "a", "failing")
	harness.Always(t, 3*time.Second, func() error { return d.has("a.dns", d.upstreams[1].Address(), d.upstreams[2].Address()) })
	flow.end(t)
	d.dns.Restart()
	d.dns.SetZone("a.test", d.a(0))
	d.inState(t, "a", "synced")
	d.serves(t, "a.dns", d.upstreams[0]) // what is missing after a gap waits for settle, and goes then
}

func (d *named) testPassthrough(t *testing.T) {
	harness.Eventually(t, patience, func() error {
		name, err := d.ask("proxies.dns")
		if err == nil && name != d.local.Name {
			err = fmt.Errorf("%s answers", name)
		}
		return err
	})
	services, err := d.istiod.Registryz()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(services, func(s harness.IstioService) bool { return s.Hostname == "proxies.dns" })
	if i < 0 || services[i].Resolution != 1 {
		t.Errorf("istiod has %+v, want DNS resolution", services)
	}
	if err := d.has("proxies.dns", net.JoinHostPort("localhost", fmt.Sprint(d.local.Port))); err != nil {
		t.Error(err)
	}
}

// testMerge takes one of two registries away that have the same host.
func (d *named) testMerge(t *testing.T) {
	u := d.upstreams
	const host = "shared.static"
	d.serves(t, host, u[0], u[1])
	configs, err := d.istiod.Configz()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(slices.DeleteFunc(configs, func(c harness.IstioConfig) bool { return c.Metadata.Name != host })); n != 1 {
		t.Errorf("istiod has %d resources for %s", n, host)
	}
	flow := d.traffic(t, host)
	d.bridge.RemoveConfig("second.yaml")
	d.serves(t, host, u[0])
	d.bridge.WriteConfig("second.yaml", mcpBridge("second", d.staticEntry("shared", u[2])))
	d.serves(t, host, u[0], u[2])
	d.bridge.RemoveConfig("first.yaml") // the one that came first
	d.serves(t, host, u[2])
	flow.end(t)
	d.bridge.RemoveConfig("second.yaml")
	harness.Eventually(t, patience, func() error {
		hosts, err := d.hosts()
		if err == nil && slices.Contains(hosts, host) {
			err = errors.New("the service of a deleted entry is still there")
		}
		return err
	})
}

func (d *named) testEditStatic(t *testing.T) {
	u := d.upstreams
	const host = "edited.static"
	d.bridge.WriteConfig("edited.yaml", mcpBridge("edited", d.staticEntry("edited", u[0])))
	d.serves(t, host, u[0])
	flow := d.traffic(t, host)
	for _, now := range [][]*harness.Upstream{{u[1]}, {u[1], u[2]}, {u[0]}} { // another domain is another source
		d.bridge.WriteConfig("edited.yaml", mcpBridge("edited", d.staticEntry("edited", now...)))
		d.serves(t, host, now...)
	}
	flow.end(t)
}

// testBrokenConfig breaks files, and takes the folder away: what was last good stays.
func (d *named) testBrokenConfig(t *testing.T) {
	u := d.upstreams
	const host = "edited.static"
	flow := d.traffic(t, host)
	kept := func() error { return errors.Join(d.has(host, u[0].Address()), d.has("gone.dns", u[2].Address())) }
	for _, content := range []string{
		"", // as between an editor's truncation and its writing
		"{",
		mcpBridge("edited", "{type: static, name: edited, port: 77777, domain: 127.0.0.9}"),
		mcpBridge("edited", "{type: nosuch, name: edited, domain: 127.0.0.9}", d.staticEntry("edited", u[0])),
	} {
		d.bridge.WriteConfig("edited.yaml", content)
		harness.Always(t, 700*time.Millisecond, kept)
	}
	away := d.bridge.ConfigDir + ".away"
	if err := os.Rename(d.bridge.ConfigDir, away); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patience, func() error {
		var page struct{ Error string }
		if err := d.bridge.JSON("/debug/problems", &page); err != nil {
			return err
		}
		if page.Error == "" {
			return errors.New("the missing folder is not told")
		}
		return nil
	})
	harness.Always(t, 2*time.Second, kept)
	if err := os.Rename(away, d.bridge.ConfigDir); err != nil {
		t.Fatal(err)
	}
	// A good entry beside bad ones is served.
	d.bridge.WriteConfig("edited.yaml", mcpBridge("edited",
		"{type: nosuch, name: x}", d.staticEntry("edited", u[1]), "{type: static, name: y}"))
	d.serves(t, host, u[1])
	flow.end(t)
}
