package e2e

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/test/harness"
)

// rounds is how often a time is measured.
const rounds = 10

// TestConsul follows services of a healthy Consul through their lives. Each part has services of its own.
func TestConsul(t *testing.T) {
	w := consulWorld(t, harness.ConsulOptions{}, "")
	t.Run("arrival", w.testArrival)
	t.Run("change of metadata", w.testMetadata)
	t.Run("weights", w.testWeights)
	t.Run("one instance critical", w.testOneCritical)
	t.Run("last instance critical", w.testLastCritical)
	t.Run("one instance deregistered", w.testOneDeregistered)
	t.Run("maintenance", w.testMaintenance)
	t.Run("time to the first request of a new instance", func(t *testing.T) { w.measureInstance(t, "") })
	t.Run("time to the first request of a new service", w.measureService)
	t.Run("time to 503", w.measureGone)
	t.Run("edited entry", w.testEdit)
	t.Run("unusual names and labels", w.testNames)
	t.Run("one bad service", w.testBadService)
	t.Run("default debounce", w.testDefaultDebounce) // takes Envoy's place, so it is the last
}

func (w *world) testArrival(t *testing.T) {
	u := w.upstream(t, "arrival-1")
	r := instance("arrival", u)
	r.Meta = map[string]string{"version": "v1"}
	w.consul.Register(r)
	host := inConsul("arrival")
	w.serves(t, host, u)

	configs, err := w.istiod.Configz()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(configs, func(c harness.IstioConfig) bool { return c.Metadata.Name == host })
	if i < 0 {
		t.Fatalf("configz has no %s", host)
	}
	m := configs[i].Metadata
	if configs[i].Kind != "ServiceEntry" || m.Namespace != "mcp" || m.ResourceVersion == "" ||
		m.Labels["higress-registry-type"] != "consul" || m.Labels["higress-registry-name"] != "c" {
		t.Errorf("configz: %s %+v", configs[i].Kind, m)
	}
	services, err := w.istiod.Registryz()
	if err != nil {
		t.Fatal(err)
	}
	i = slices.IndexFunc(services, func(s harness.IstioService) bool { return s.Hostname == host })
	if i < 0 || !slices.Equal(services[i].Ports, []harness.IstioPort{{Name: "HTTP", Port: w.port, Protocol: "HTTP"}}) ||
		services[i].MeshExternal || services[i].Attributes.Namespace != "mcp" {
		t.Errorf("registryz: %+v", services)
	}
	// Consul's own service has an instance, too.
	if hosts, err := w.hosts(); err != nil || !slices.Equal(hosts, []string{host, inConsul("consul")}) {
		t.Errorf("istiod's services are %v, %v", hosts, err)
	}
}

// labels waits until istiod has an endpoint of the host with these labels, beside those that istiod gives itself.
func (w *world) labels(t *testing.T, host string, want map[string]string) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		all, err := w.istiod.Endpoints()
		if err != nil {
			return err
		}
		if len(all[host]) != 1 {
			return fmt.Errorf("%s has %d endpoints, want 1", host, len(all[host]))
		}
		got := all[host][0].Labels
		n := 0
		for k, v := range got {
			if strings.HasPrefix(k, "topology.") {
				continue
			}
			if n++; want[k] != v {
				return fmt.Errorf("%s has the labels %v, want %v", host, got, want)
			}
		}
		if n != len(want) {
			return fmt.Errorf("%s has the labels %v, want %v", host, got, want)
		}
		return nil
	})
}

func (w *world) testMetadata(t *testing.T) {
	host := inConsul("meta")
	u := w.upstream(t, "meta-1")
	r := instance("meta", u)
	for _, meta := range []map[string]string{{"version": "v1", "team": "a"}, {"version": "v2"}, nil} {
		r.Meta = meta
		w.consul.Register(r)
		w.labels(t, host, meta)
	}
	w.serves(t, host, u)
}

func (w *world) testWeights(t *testing.T) {
	host := inConsul("weights")
	var upstreams []*harness.Upstream
	shares := map[string]float64{"weights-1": 10, "weights-3": 30, "weights-6": 60} // percent
	for _, name := range []string{"weights-1", "weights-3", "weights-6"} {
		u := w.upstream(t, name)
		upstreams = append(upstreams, u)
		r := instance("weights", u)
		r.Weights = &api.AgentWeights{Passing: int(shares[name] / 10), Warning: 1}
		w.consul.Register(r)
	}
	harness.Eventually(t, patience, func() error { return w.has(host, addresses(upstreams)...) })
	w.soon(t, host, func(name string, _ error) bool { return name == "weights-6" })
	const requests = 2000
	got := map[string]int{}
	for range requests {
		name, err := w.ask(host)
		if err != nil {
			t.Fatal(err)
		}
		got[name]++
	}
	t.Logf("measured: weights 1:3:6, %d requests one after the other: %v", requests, got)
	for name, want := range shares {
		if share := 100 * float64(got[name]) / requests; math.Abs(share-want) > 5 {
			t.Errorf("%s answered %.1f %% of the requests, want %.0f", name, share, want)
		}
	}
}

func (w *world) testOneCritical(t *testing.T) {
	host := inConsul("critical")
	one, two := w.start(t, "critical", "critical-1"), w.start(t, "critical", "critical-2")
	w.serves(t, host, one, two)
	flow := w.traffic(t, host)
	for _, status := range []string{api.HealthCritical, api.HealthWarning} {
		w.consul.SetHealth("critical-1", status)
		w.serves(t, host, two)
		w.consul.SetHealth("critical-1", api.HealthPassing)
		w.serves(t, host, one, two)
	}
	flow.end(t) // both run all the time: nothing may fail, whatever Consul says of them
}

func (w *world) testLastCritical(t *testing.T) {
	host := inConsul("down")
	u := w.start(t, "down", "down-1")
	w.serves(t, host, u)
	w.consul.SetHealth("down-1", api.HealthCritical)
	w.serves503(t, host)
	w.consul.SetHealth("down-1", api.HealthPassing)
	w.serves(t, host, u)
}

func (w *world) testOneDeregistered(t *testing.T) {
	host := inConsul("leaving")
	one, two := w.start(t, "leaving", "leaving-1"), w.start(t, "leaving", "leaving-2")
	w.serves(t, host, one, two)
	flow := w.traffic(t, host)
	w.consul.Deregister("leaving-1")
	w.serves(t, host, two)
	flow.end(t)
}

func (w *world) testMaintenance(t *testing.T) {
	host := inConsul("maint")
	one, two := w.start(t, "maint", "maint-1"), w.start(t, "maint", "maint-2")
	w.serves(t, host, one, two)
	w.consul.Call("PUT", "/v1/agent/service/maintenance/maint-1?enable=true&reason=update", nil, nil)
	w.serves(t, host, two)
	w.consul.Call("PUT", "/v1/agent/service/maintenance/maint-1?enable=false", nil, nil)
	w.serves(t, host, one, two)
}

// measureInstance measures the time from the registration of a second instance to its first answer.
func (w *world) measureInstance(t *testing.T, note string) {
	host := inConsul("second")
	first, second := w.start(t, "second", "second-1"), w.upstream(t, "second-2")
	w.serves(t, host, first)
	var samples, gone []time.Duration
	for range rounds {
		pause(t, quiet)
		began := time.Now()
		w.consul.Register(instance("second", second))
		samples = append(samples, w.soon(t, host, func(name string, _ error) bool { return name == second.Name }).Sub(began))
		pause(t, quiet)
		began = time.Now()
		w.consul.Deregister(second.Name)
		gone = append(gone, w.lastAnswer(t, host, second.Name).Sub(began))
		w.serves(t, host, first)
	}
	measured(t, "registration in Consul to the first request served by the new instance"+note, samples)
	if note == "" {
		measured(t, "deregistration in Consul to the last request served by the instance", gone)
	}
}

// lastAnswer waits until name has not answered 20 times in a row, while others do, and returns when that row began.
func (w *world) lastAnswer(t *testing.T, host, name string) time.Time {
	t.Helper()
	began, row := time.Now(), 0
	w.soon(t, host, func(got string, err error) bool {
		if row++; got == name || err != nil {
			began, row = time.Now(), 0
		}
		return row == 20
	})
	return began
}

// measureService measures the time from the registration of a new service to its first answer.
func (w *world) measureService(t *testing.T) {
	u := w.upstream(t, "new-1")
	var samples []time.Duration
	for n := range rounds {
		service := "new-" + strconv.Itoa(n)
		pause(t, quiet)
		began := time.Now()
		r := instance(service, u)
		r.ID = service
		w.consul.Register(r)
		samples = append(samples, w.soon(t, inConsul(service), func(_ string, err error) bool { return err == nil }).Sub(began))
	}
	measured(t, "registration of a new service in Consul to the first request served", samples)
}

// measureGone measures the time from the deregistration, or failure, of the last instance to the first 503.
func (w *world) measureGone(t *testing.T) {
	host := inConsul("gone")
	u := w.start(t, "gone", "gone-1")
	w.serves(t, host, u)
	refused := func(_ string, err error) bool { return unavailable(err) }
	var deregistered, critical []time.Duration
	for range rounds {
		pause(t, quiet)
		began := time.Now()
		w.consul.SetHealth("gone-1", api.HealthCritical)
		critical = append(critical, w.soon(t, host, refused).Sub(began))
		w.consul.SetHealth("gone-1", api.HealthPassing)
		w.serves(t, host, u)

		pause(t, quiet)
		began = time.Now()
		w.consul.Deregister("gone-1")
		deregistered = append(deregistered, w.soon(t, host, refused).Sub(began))
		w.serves503(t, host)
		w.consul.Register(instance("gone", u))
		w.serves(t, host, u)
	}
	measured(t, "last instance critical in Consul to the first 503", critical)
	measured(t, "last instance deregistered in Consul to the first 503", deregistered)
	for _, took := range append(critical, deregistered...) {
		if took > 2*time.Second { // the refresh interval
			t.Errorf("503 came after %v", took)
		}
	}
}

// testEdit changes the entry in ways that need a new reading; the services must not be away in between.
func (w *world) testEdit(t *testing.T) {
	host := inConsul("edit")
	u := w.upstream(t, "edit-1")
	r := instance("edit", u)
	r.Tags = []string{"blue"}
	w.consul.Register(r)
	w.serves(t, host, u)
	flow := w.traffic(t, host)
	before := w.requests(t)
	defer w.bridge.WriteConfig("consul.yaml", w.consulBridge(""))
	for _, edit := range []struct {
		what, settings string
		tagged         bool // only the service with the tag is to be seen
	}{
		{"another interval", "refreshInterval: 1s, guard: {settle: 2s, hold: 3s}", false},
		{"other guard times", "refreshInterval: 1s, guard: {settle: 1s, hold: 2s}", false},
		{"another source, with a tag", "refreshInterval: 1s, guard: {settle: 1s, hold: 2s}, consulServiceTag: blue", true},
		{"an entry that cannot be used leaves what ran before", "refreshInterval: soon", true},
		{"another source, without the tag", "", false},
	} {
		w.bridge.WriteConfig("consul.yaml", w.consulBridge(edit.settings))
		harness.Eventually(t, patience, func() error {
			hosts, err := w.hosts()
			if err == nil && slices.Equal(hosts, []string{host}) != edit.tagged {
				err = fmt.Errorf("%s: istiod has %v", edit.what, hosts)
			}
			return err
		})
		harness.Always(t, time.Second, func() error { return w.has(host, u.Address()) })
	}
	w.inState(t, "c", "synced")
	flow.end(t)
	if after := w.requests(t); after <= before {
		t.Errorf("regbridge made %v requests to Consul before the edits and %v with them", before, after)
	}
}

func (w *world) requests(t *testing.T) float64 {
	t.Helper()
	n, err := w.bridge.Metric("regbridge_registry_requests_total", `type="consul"`)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// testNames registers what stock istiod would refuse as it stands.
func (w *world) testNames(t *testing.T) {
	u := w.upstream(t, "names-1")
	for _, c := range []struct {
		name, service string
		host          string // exactly, or what stands before the hash
		meta, labels  map[string]string
	}{
		{"underscores", "user_service", "user-service.dc1.consul", nil, nil},
		{"underscores at the ends", "_user_", "user-rb-", nil, nil},
		{"upper case", "UserService", "UserService.dc1.consul", nil, nil},
		{"dots", "user.v2", "user.v2.dc1.consul", nil, nil},
		{"a label that begins and ends with an underscore", "labels-1", "labels-1.dc1.consul",
			map[string]string{"_x": "1", "x_": "1", "y": "_v", "good_key": "good_value"}, map[string]string{"good_key": "good_value"}},
		{"Spring's metadata", "spring", "spring.dc1.consul",
			map[string]string{"management_context-path": "/actuator", "secure": "false", "gRPC_port": "9"},
			map[string]string{"secure": "false", "gRPC_port": "9"}},
		{"Dubbo's metadata", "dubbo", "dubbo.dc1.consul",
			map[string]string{
				"side": "provider", "methods": "greet,bye", "interface": "demo.api.Greeter", "timestamp": "1764000000000", "pid": "7",
				"dubbo_metadata": `{"a":1}`, "release": "3.3.6", "deprecated": "false",
			},
			map[string]string{
				"side": "provider", "interface": "demo.api.Greeter", "release": "3.3.6", "deprecated": "false",
			}},
		{"a long key", "keys", "keys.dc1.consul", map[string]string{strings.Repeat("k", 64): "v", "version": "v1"},
			map[string]string{"version": "v1"}},
		{"a name of 63 letters", strings.Repeat("n", 63), strings.Repeat("n", 63) + ".dc1.consul", nil, nil},
		{"a name that is too long", strings.Repeat("n", 100), strings.Repeat("n", 30), nil, nil},
		{"letters of other alphabets", "größe", "gr", nil, nil},
		{"a blank and a slash", "a b", "a", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := instance(c.service, u)
			r.ID, r.Meta = c.service, c.meta
			w.consul.Register(r)
			var host string
			harness.Eventually(t, patience, func() error {
				hosts, err := w.hosts()
				if err != nil {
					return err
				}
				i := slices.IndexFunc(hosts, func(h string) bool { // names are compared without case everywhere in a mesh
					return strings.EqualFold(h, c.host) || strings.HasPrefix(h, c.host) && strings.Contains(h, "-rb-")
				})
				if i < 0 {
					return fmt.Errorf("istiod has no %s among %v", c.host, hosts)
				}
				host = hosts[i]
				return nil
			})
			w.serves(t, host, u)
			w.labels(t, host, c.labels)
			w.consul.Deregister(c.service)
			w.serves503(t, host)
		})
	}
}

// testBadService registers instances that no proxy can reach among good ones.
func (w *world) testBadService(t *testing.T) {
	good, mixed := w.start(t, "good", "good-1"), w.start(t, "mixed", "mixed-1")
	w.serves(t, inConsul("good"), good)
	flow := w.traffic(t, inConsul("good"))
	bad := api.AgentServiceRegistration{ID: "bad-1", Name: "bad", Address: "no such_address", Port: w.port}
	w.consul.Register(bad)
	bad.ID, bad.Name = "mixed-2", "mixed"
	w.consul.Register(bad)
	noPort := api.AgentServiceRegistration{ID: "portless-1", Name: "portless", Address: "127.0.0.99"}
	w.consul.Register(noPort)
	later := w.start(t, "later", "later-1") // what comes after the bad ones
	w.serves(t, inConsul("later"), later)
	w.serves(t, inConsul("mixed"), mixed)
	w.serves(t, inConsul("good"), good)
	flow.end(t)
	w.serves503(t, inConsul("bad"))
	if hosts, err := w.hosts(); err != nil || slices.Contains(hosts, inConsul("portless")) {
		t.Errorf("a service without a port is in istiod: %v, %v", hosts, err)
	}
	s, err := w.status("c")
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, l := range s.LeftOutInstances {
		got[l.Service] += l.Reason
	}
	for service, reason := range map[string]string{"bad": "bad-address", "mixed": "bad-address", "portless": "bad-port"} {
		if !strings.Contains(got[service], reason) {
			t.Errorf("%s is left out as %q, want %s", service, got[service], reason)
		}
	}
}

// testDefaultDebounce measures with the settings that istiod has out of the box.
func (w *world) testDefaultDebounce(t *testing.T) {
	w.envoy.Kill()
	d := harness.StartIstiod(t, harness.IstiodOptions{
		Sources: []harness.MCPSource{{Address: w.bridge.XDS}}, Env: []string{"PILOT_DEBOUNCE_AFTER=100ms"},
	})
	e := harness.StartSidecar(t, d, harness.SidecarOptions{}) // state of the world, for once
	slow := *w
	slow.istiod, slow.envoy, slow.client = d, e, e.Client()
	slow.measureInstance(t, ", with istiod's default debounce of 100 ms")
}
