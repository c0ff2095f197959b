package e2e

import (
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/test/harness"
)

type registration = api.AgentServiceRegistration

// TestThousandServices has more services than an agent with its default limits allows connections.
func TestThousandServices(t *testing.T) {
	const services = 1001
	w := newWorld(t)
	w.consul = harness.StartConsul(t, harness.ConsulOptions{})
	name := func(n int) string { return fmt.Sprintf("svc-%04d", n) }
	for n := range services { // without checks, since that is quicker
		w.consul.Call(http.MethodPut, "/v1/agent/service/register",
			registration{Name: name(n), Address: fmt.Sprintf("10.1.%d.%d", n/250, n%250+1), Port: 8080}, nil)
	}
	began := time.Now()
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{
		"consul.yaml": w.consulBridge("refreshInterval: 20s"), // a change must not need to wait for it
	}})
	w.bridge.WaitReady(patience)
	t.Logf("measured: %d services of Consul read after %v, the start of regbridge included", services, time.Since(began).Round(time.Millisecond))
	w.istiod = harness.StartIstiod(t, harness.IstiodOptions{Sources: []harness.MCPSource{{Address: w.bridge.XDS}}})
	all, err := w.istiod.Endpoints()
	if err != nil {
		t.Fatal(err)
	}
	for n := range services {
		if len(all[inConsul(name(n))]) != 1 {
			t.Fatalf("istiod has %d endpoints of %s", len(all[inConsul(name(n))]), name(n))
		}
	}
	hosts, err := w.hosts()
	if err != nil || len(hosts) != services+1 { // and Consul itself
		t.Errorf("istiod has %d services (%v), want %d", len(hosts), err, services+1)
	}

	// Changes of services that have no blocking query of their own must be as prompt as others.
	samples := map[string][]time.Duration{}
	measure := func(what, host string, change func(), want ...string) {
		began := time.Now()
		change()
		w.arrives(t, host, want...)
		took := time.Since(began)
		samples[what] = append(samples[what], took)
		if took > 10*time.Second { // half of the refresh interval
			t.Errorf("%s took %v", what, took)
		}
	}
	one := func(n int, when string) {
		host, address := inConsul(name(n)), fmt.Sprintf("10.2.%d.%d", n/250, n%250+1)
		measure("changed address"+when, host, func() {
			w.consul.Register(registration{Name: name(n), Address: address, Port: 8080})
		}, address)
		measure("critical instance"+when, host, func() { w.consul.SetHealth(name(n), api.HealthCritical) })
		measure("new service"+when, inConsul("new-"+name(n)), func() {
			w.consul.Register(registration{Name: "new-" + name(n), Address: address, Port: 8080})
		}, address)
	}
	for n := services - 1; n >= services-rounds; n-- {
		one(n, ", changes in a row")
	}
	for n := range 3 {
		pause(t, 4*time.Second) // in which regbridge has looked at all services
		one(n, ", after a quiet time")
	}
	for _, what := range slices.Sorted(maps.Keys(samples)) {
		measured(t, "1,001 services, to istiod: "+what, samples[what])
	}
	if s, err := w.status("c"); err != nil || s.State != "synced" || len(s.FailedServices) > 0 {
		t.Errorf("regbridge says %+v, %v", s, err)
	}
}

// arrives waits until istiod's endpoints of a host are these addresses, at port 8080. It looks often, since the time counts.
func (w *world) arrives(t *testing.T, host string, addresses ...string) {
	t.Helper()
	want := make([]string, 0, len(addresses))
	for _, a := range addresses {
		want = append(want, net.JoinHostPort(a, "8080"))
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		err := w.has(host, want...)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// freeRow returns the first of n ports in a row that are free.
func freeRow(t testing.TB, n int) int {
	t.Helper()
	first := harness.FreePort(t)
	for last := first; last-first < n-1; {
		port := harness.FreePort(t)
		if port != last+1 {
			first = port
		}
		last = port
	}
	return first
}

// TestShards has istiod read four shards in place of the whole.
func TestShards(t *testing.T) {
	t.Parallel()
	const shards, services = 4, 60
	w := newWorld(t)
	first := freeRow(t, shards)
	u, other := w.upstream(t, "web-1"), w.upstream(t, "web-2")
	entry := func(n int, u *harness.Upstream, more string) string {
		return strings.TrimSuffix(w.staticEntry(fmt.Sprintf("svc-%d", n), u), "}") + more + "}"
	}
	var entries []string
	for n := range services - 2 {
		more := ""
		if n%3 == 0 {
			more = ", protocol: https"
		}
		entries = append(entries, entry(n, u, more))
	}
	w.startBridge(t, harness.RegbridgeOptions{
		Config: map[string]string{
			"many.yaml": mcpBridge("many", entries...), "one.yaml": mcpBridge("one", entry(services-2, u, "")),
			"two.yaml": mcpBridge("two", entry(services-1, u, "")),
		},
		Args: []string{"--xds-shards", fmt.Sprintf("%d@127.0.0.1:%d", shards, first)},
	})
	sources := func(ports ...int) (all []harness.MCPSource) {
		for _, p := range ports {
			all = append(all, harness.MCPSource{Address: "127.0.0.1:" + strconv.Itoa(p)})
		}
		return all
	}
	// Without certificates Envoy could not warm up the HTTPS services.
	w.startMesh(t, harness.IstiodOptions{Sources: sources(first, first+1, first+2, first+3)},
		harness.SidecarOptions{Delta: true, SDS: startSDS(t, harness.NewCA(t, "none"))})
	whole := *w
	whole.istiod = harness.StartIstiod(t, harness.IstiodOptions{Sources: []harness.MCPSource{{Address: w.bridge.XDS}}})
	same := func() error {
		a, b := w.taken(t).versions, whole.taken(t).versions
		if len(a) != len(b) {
			return fmt.Errorf("istiod has %d resources of the shards, and %d of the whole", len(a), len(b))
		}
		for name, version := range b {
			if a[name] != version {
				return fmt.Errorf("%s has version %q in a shard, and %s in the whole", name, a[name], version)
			}
		}
		return nil
	}
	harness.Eventually(t, patience, same)
	if hosts, err := w.hosts(); err != nil || len(hosts) != services {
		t.Fatalf("istiod has %d services (%v), want %d", len(hosts), err, services)
	}
	changed := fmt.Sprintf("svc-%d.static", services-2)
	w.serves(t, changed, u)
	flow := w.traffic(t, changed)
	w.bridge.WriteConfig("one.yaml", mcpBridge("one", entry(services-2, other, "")))
	w.serves(t, changed, other)
	flow.end(t)
	w.bridge.RemoveConfig("two.yaml")
	harness.Eventually(t, patience, func() error {
		hosts, err := w.hosts()
		if err == nil && len(hosts) != services-1 {
			err = fmt.Errorf("istiod has %d services", len(hosts))
		}
		return err
	})
	harness.Eventually(t, patience, same)
}
