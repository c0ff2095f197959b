package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

// TestOutages ends, freezes and restarts one part after the other, while requests go on.
func TestOutages(t *testing.T) {
	t.Parallel()
	w := consulWorld(t, harness.ConsulOptions{Keep: true}, "")
	o := &outages{world: w}
	o.one, o.two = w.start(t, "web", "web-1"), w.start(t, "web", "web-2")
	o.static = w.upstream(t, "static-1")
	w.bridge.WriteConfig("static.yaml", mcpBridge("static", w.staticEntry("static", o.static)))
	w.serves(t, inConsul("web"), o.one, o.two)
	w.serves(t, "static.static", o.static)

	t.Run("consul killed and back", o.testConsulKilled)
	t.Run("consul frozen", o.testConsulFrozen)
	t.Run("regbridge restarted", o.testBridgeRestarted)
	t.Run("regbridge killed", o.testBridgeKilled)
	t.Run("regbridge restarted while consul is down", o.testBridgeRestartedAlone)
	t.Run("regbridge stopped", o.testBridgeStopped)
	t.Run("istiod restarted", o.testIstiodRestarted)
	t.Run("envoy restarted", o.testEnvoyRestarted)
}

// outages is a world with two instances of "web" in Consul and one static service.
type outages struct {
	*world
	one, two, static *harness.Upstream
	extra            int
}

// staticEntry is an entry whose endpoints are these upstreams.
func (w *world) staticEntry(name string, upstreams ...*harness.Upstream) string {
	return fmt.Sprintf("{type: static, name: %s, port: %d, domain: %q}", name, w.port, strings.Join(addresses(upstreams), ","))
}

// unchanged returns nil if istiod has the endpoints that it had at the start.
func (o *outages) unchanged() error {
	return errors.Join(o.has(inConsul("web"), o.one.Address(), o.two.Address()), o.has("static.static", o.static.Address()))
}

// works checks that a change in Consul reaches the mesh and that it was the only one.
func (o *outages) works(t *testing.T) {
	t.Helper()
	o.extra++
	u := o.start(t, "web", fmt.Sprintf("web-extra-%d", o.extra))
	o.serves(t, inConsul("web"), o.one, o.two, u)
	o.consul.Deregister(u.Name)
	o.serves(t, inConsul("web"), o.one, o.two)
	u.Stop()
}

func (o *outages) testConsulKilled(t *testing.T) {
	flow := o.traffic(t, inConsul("web"))
	o.consul.Kill()
	o.inState(t, "c", "failing")
	harness.Always(t, 2*time.Second, o.unchanged)
	o.consul.Restart(false)
	back := time.Now()
	o.inState(t, "c", "synced")
	t.Logf("measured: consul is back to regbridge has read it: %v", time.Since(back).Round(time.Millisecond))
	o.works(t)
	harness.Always(t, 3*time.Second, o.unchanged) // past settle
	o.holds(t, "c", 0)
	flow.end(t)
}

func (o *outages) testConsulFrozen(t *testing.T) {
	flow := o.traffic(t, inConsul("web"))
	o.consul.Pause()
	// The other registry goes on meanwhile.
	other := o.upstream(t, "static-2")
	o.bridge.WriteConfig("static.yaml", mcpBridge("static", o.staticEntry("static", o.static, other)))
	o.serves(t, "static.static", o.static, other)
	o.inState(t, "c", "failing")
	o.bridge.WriteConfig("static.yaml", mcpBridge("static", o.staticEntry("static", o.static)))
	o.serves(t, "static.static", o.static)
	if s, err := o.status("static"); err != nil || s.State != "synced" {
		t.Errorf("the static registry is %+v, %v", s, err)
	}
	harness.Always(t, time.Second, o.unchanged)
	o.consul.Resume()
	o.inState(t, "c", "synced")
	o.works(t)
	flow.end(t)
}

// taken is what a restart of regbridge must not change at istiod.
type taken struct {
	versions map[string]string // resourceVersion by kind and name
	nonces   map[string]string // of what the proxy was sent last, by type
	pushes   map[string]float64
}

func (w *world) taken(t *testing.T) taken {
	t.Helper()
	got := taken{map[string]string{}, map[string]string{}, map[string]float64{}}
	configs, err := w.istiod.Configz()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range configs {
		got.versions[c.Kind+" "+c.Metadata.Name] = c.Metadata.ResourceVersion + " " + c.Metadata.CreationTimestamp
	}
	proxies, err := w.istiod.Syncz()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range proxies {
		for url, r := range p.Resources {
			got.nonces[p.Proxy+" "+url] = r.Sent
		}
	}
	for _, kind := range []string{"cds", "eds", "lds", "rds"} {
		n, err := w.istiod.Metric("pilot_xds_pushes", fmt.Sprintf("type=%q", kind))
		if err != nil {
			t.Fatal(err)
		}
		got.pushes[kind] = n
	}
	return got
}

// sameTaken fails the test where istiod took or sent something since before.
func (w *world) sameTaken(t *testing.T, before taken) {
	t.Helper()
	after := w.taken(t)
	if len(before.versions) == 0 || len(before.nonces) == 0 || before.pushes["cds"] == 0 {
		t.Fatalf("there is nothing to compare: %+v", before)
	}
	if !maps.Equal(before.versions, after.versions) {
		t.Errorf("configz changed:\n%v\n%v", before.versions, after.versions)
	}
	if !maps.Equal(before.nonces, after.nonces) {
		t.Errorf("the proxy was sent something:\n%v\n%v", before.nonces, after.nonces)
	}
	if !maps.Equal(before.pushes, after.pushes) {
		t.Errorf("istiod pushed: %v before, %v after", before.pushes, after.pushes)
	}
}

// connected waits until istiod has taken regbridge's present state on a stream that began after since.
func (w *world) connected(t *testing.T, since time.Time) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		var clients []struct {
			Node  string
			Since time.Time
			Types []struct{ TypeURL, Sent, Acked string }
		}
		if err := w.bridge.JSON("/debug/clients", &clients); err != nil {
			return err
		}
		for _, c := range clients {
			if c.Since.Before(since) || !strings.Contains(c.Node, "istiod") {
				continue
			}
			for _, typ := range c.Types {
				if strings.HasSuffix(typ.TypeURL, "/ServiceEntry") && typ.Acked != "" && typ.Acked == typ.Sent {
					return nil
				}
			}
		}
		return fmt.Errorf("istiod has not taken the services: %+v", clients)
	})
}

// settled waits until istiod has sent nothing for a while.
func (w *world) settled(t *testing.T) {
	t.Helper()
	last := w.taken(t)
	still := time.Now()
	harness.Eventually(t, patience, func() error {
		if now := w.taken(t); !maps.Equal(now.pushes, last.pushes) {
			last, still = now, time.Now()
		}
		if time.Since(still) < 500*time.Millisecond {
			return errors.New("istiod still pushes")
		}
		return nil
	})
}

func (o *outages) testBridgeRestarted(t *testing.T) {
	o.settled(t)
	before, flow := o.taken(t), o.traffic(t, inConsul("web"))
	began := time.Now()
	o.bridge.Stop()
	o.bridge.Restart()
	o.bridge.WaitReady(patience)
	ready := time.Since(began)
	o.connected(t, began)
	t.Logf("measured: restart of regbridge: ready after %v, istiod has taken its state after %v",
		ready.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	o.inState(t, "c", "synced")
	harness.Always(t, time.Second, o.unchanged)
	o.sameTaken(t, before)
	o.works(t)
	flow.end(t)
}

func (o *outages) testBridgeKilled(t *testing.T) {
	o.settled(t)
	before, flow := o.taken(t), o.traffic(t, inConsul("web"))
	began := time.Now()
	o.bridge.Restart()
	o.bridge.WaitReady(patience)
	o.connected(t, began)
	o.inState(t, "c", "synced")
	harness.Always(t, time.Second, o.unchanged)
	o.sameTaken(t, before)
	flow.end(t)
}

func (o *outages) testBridgeRestartedAlone(t *testing.T) {
	o.settled(t)
	before, flow := o.taken(t), o.traffic(t, inConsul("web"))
	o.consul.Kill()
	began := time.Now()
	o.bridge.Stop()
	o.bridge.Restart()
	o.bridge.WaitReady(patience)
	o.connected(t, began)
	harness.Always(t, 3*time.Second, o.unchanged)
	o.sameTaken(t, before)
	s, err := o.status("c")
	if err != nil || !s.Stale || s.State == "synced" || s.LastError == "" {
		t.Errorf("the registry that is down is shown as %+v, %v", s, err)
	}
	// Static entries need nobody.
	other := o.upstream(t, "static-3")
	o.bridge.WriteConfig("static.yaml", mcpBridge("static", o.staticEntry("static", o.static, other)))
	o.serves(t, "static.static", o.static, other)
	o.bridge.WriteConfig("static.yaml", mcpBridge("static", o.staticEntry("static", o.static)))
	o.serves(t, "static.static", o.static)

	o.consul.Restart(false)
	o.inState(t, "c", "synced")
	if s, err := o.status("c"); err != nil || s.Stale {
		t.Errorf("after Consul is back: %+v, %v", s, err)
	}
	harness.Always(t, 3*time.Second, o.unchanged)
	o.works(t)
	flow.end(t)
}

func (o *outages) testBridgeStopped(t *testing.T) {
	o.settled(t)
	before, flow := o.taken(t), o.traffic(t, inConsul("web"))
	o.bridge.Stop()
	harness.Always(t, 3*time.Second, o.unchanged)
	o.sameTaken(t, before)
	if status, _, err := harness.Get(t.Context(), "http://"+o.istiod.HTTP+"/ready"); err != nil || status != http.StatusOK {
		t.Errorf("istiod's /ready: %d, %v", status, err)
	}
	// What happens meanwhile is made up for.
	o.consul.Deregister(o.two.Name)
	began := time.Now()
	o.bridge.Restart()
	o.connected(t, began)
	o.serves(t, inConsul("web"), o.one)
	o.consul.Register(instance("web", o.two))
	o.serves(t, inConsul("web"), o.one, o.two)
	flow.end(t)
}

func (o *outages) testIstiodRestarted(t *testing.T) {
	before, err := o.hosts()
	if err != nil {
		t.Fatal(err)
	}
	versions, flow := o.taken(t).versions, o.traffic(t, inConsul("web"))
	began := time.Now()
	o.istiod.Restart()
	o.connected(t, began)
	if after, err := o.hosts(); err != nil || !slices.Equal(before, after) {
		t.Errorf("istiod had %v, and has %v (%v)", before, after, err)
	}
	if err := o.unchanged(); err != nil {
		t.Error(err)
	}
	if after := o.taken(t).versions; !maps.Equal(versions, after) {
		t.Errorf("configz had %v, and has %v", versions, after)
	}
	o.works(t)
	flow.end(t)
}

func (o *outages) testEnvoyRestarted(t *testing.T) {
	o.envoy.Restart()
	o.serves(t, inConsul("web"), o.one, o.two)
	o.works(t)
}

// TestConsulRestartedEmpty loses everything that was registered. Nobody has deregistered it: it is kept until somebody says
// so, or the guard's time is over.
func TestConsulRestartedEmpty(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.consul = harness.StartConsul(t, harness.ConsulOptions{})
	var upstreams []*harness.Upstream
	register := func() {
		for _, u := range upstreams {
			w.consul.Register(instance("web", u))
		}
	}
	for n := range 12 { // a mass loss begins at 10
		upstreams = append(upstreams, w.upstream(t, fmt.Sprintf("web-%d", n)))
	}
	register() // before regbridge reads: what was added in the last 10 s would make up for what is lost
	w.startBridge(t, harness.RegbridgeOptions{
		Config: map[string]string{"consul.yaml": w.consulBridge("refreshInterval: 1s, guard: {settle: 2s, hold: 3s}")},
	})
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})
	host := inConsul("web")
	w.serves(t, host, upstreams...)
	all := func() error { return w.has(host, addresses(upstreams)...) }

	t.Run("held, then expired", func(t *testing.T) {
		flow := w.traffic(t, host)
		w.consul.Restart(true)
		began := time.Now() // it listens; the gap ends later
		w.holds(t, "c", len(upstreams))
		harness.Always(t, 4*time.Second-time.Since(began), all) // settle and hold are 5 s
		flow.end(t)
		w.serves503(t, host)
		t.Logf("measured: Consul restarted empty to 503, with settle 2 s and hold 3 s: %v", time.Since(began).Round(time.Millisecond))
		w.holds(t, "c", 0)
	})
	register()
	w.serves(t, host, upstreams...)
	w.bridge.WriteConfig("consul.yaml", w.consulBridge("refreshInterval: 1s, guard: {settle: 20m, hold: 20m}"))
	t.Run("held, then registered again", func(t *testing.T) {
		flow := w.traffic(t, host)
		w.consul.Restart(true)
		w.holds(t, "c", len(upstreams))
		register()
		w.holds(t, "c", 0)
		if err := all(); err != nil {
			t.Error(err)
		}
		flow.end(t)
	})
	t.Run("held, then released", func(t *testing.T) {
		flow := w.traffic(t, host)
		w.consul.Restart(true)
		w.holds(t, "c", len(upstreams))
		w.inState(t, "c", "synced")
		harness.Always(t, 3*time.Second, all)
		flow.end(t)
		stdout, stderr, err := w.bridge.Run("release", "c", "--admin-address", w.bridge.Admin)
		if err != nil || !strings.Contains(stdout, "12 endpoints released") {
			t.Fatalf("regbridge release: %q, %q, %v", stdout, stderr, err)
		}
		w.serves503(t, host)
		w.holds(t, "c", 0)
	})
}

// TestSoakServiceGone waits until a service that was deregistered has left istiod.
func TestSoakServiceGone(t *testing.T) {
	soak(t)
	w := consulWorld(t, harness.ConsulOptions{}, "")
	host := inConsul("web")
	u := w.start(t, "web", "web-1")
	w.serves(t, host, u)
	w.consul.Deregister("web-1")
	w.serves503(t, host)
	began := time.Now()
	harness.Eventually(t, 6*time.Minute, func() error {
		hosts, err := w.hosts()
		if err == nil && slices.Contains(hosts, host) {
			err = errors.New("istiod still has the service")
		}
		return err
	})
	took := time.Since(began).Round(time.Second)
	t.Logf("measured: deregistration of a service to its removal from istiod: %v", took)
	if took < 4*time.Minute {
		t.Errorf("the service was gone after %v: a rolling restart would lose its cluster", took)
	}
	w.consul.Register(instance("web", u))
	w.serves(t, host, u)
}
