package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
	"github.com/regbridge/regbridge/test/servers"
)

// TestNacos follows services of each version of Nacos, with authentication, through their lives, and the server through
// its failures. It looks at what an xDS client ends up with, and once at istiod.
func TestNacos(t *testing.T) {
	for _, v := range []struct {
		server servers.Server
		typ    string
	}{{servers.Nacos1, "nacos"}, {servers.Nacos2, "nacos2"}, {servers.Nacos3, "nacos3"}} {
		t.Run(string(v.server), func(t *testing.T) {
			t.Parallel()
			w := startNacosWorld(t, v.server, v.typ)
			t.Run("a wrong password is no empty registry", w.testWrongPassword)
			t.Run("instances", w.testInstances)
			t.Run("a service comes and goes", w.testService)
			t.Run("health", w.testHealth)
			t.Run("istiod", w.testIstiod)
			t.Run("measured", w.measure)
			t.Run("password changed", w.testPasswordChanged)
			t.Run("frozen", w.testFrozen)
			t.Run("killed, and back with its clients", w.testBack)
			t.Run("back without anything", w.testBackEmpty)
			for _, secret := range []string{w.nacos.Password, "not-the-password"} {
				for _, page := range []string{"/debug/registries", "/debug/configz", "/metrics"} {
					if body, err := w.bridge.Get(page); err != nil || secret != "nacos" && strings.Contains(body, secret) {
						t.Errorf("%s shows a password: %v", page, err)
					}
				}
				if secret != "nacos" && strings.Contains(w.bridge.Log(), secret) {
					t.Error("the log shows a password")
				}
			}
		})
	}
}

// nacosWorld is one Nacos, regbridge reading it as "n", and an xDS client.
type nacosWorld struct {
	*world
	nacos    *harness.Nacos
	provider *harness.NacosProvider // the application
	provided map[string][]harness.NacosInstance
	client   *reader
	t        *testing.T // of the whole version
}

// interval is the refresh interval of the entry.
const interval = time.Second

func startNacosWorld(t *testing.T, server servers.Server, typ string) *nacosWorld {
	t.Helper()
	w := &nacosWorld{world: newWorld(t), t: t, provided: map[string][]harness.NacosInstance{}}
	w.nacos = harness.StartNacos(t, server, harness.NacosOptions{Auth: true})
	w.provider = w.nacos.StartProvider(harness.NacosProviderOptions{})
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"nacos.yaml": mcpBridge("nacos", fmt.Sprintf(
		"{type: %s, name: n, domain: %s, nacosGroups: [DEFAULT_GROUP, my_group], refreshInterval: %v, "+
			"guard: {settle: 15s, hold: 20m}, authSecretName: nacos}", typ, w.nacos.Address, interval))}})
	w.client = startReader(t, w.bridge.XDS)
	return w
}

// inNacos is the host of a service in the group my_group.
func inNacos(service string) string { return service + ".my-group.public.nacos" }

const nacosGroup = "my_group"

// provide makes these the instances of a service, all of the same application.
func (w *nacosWorld) provide(service string, instances ...harness.NacosInstance) {
	w.provider.Provide(nacosGroup, service, instances...)
	w.provided[service] = instances
}

func at(ip string) harness.NacosInstance { return harness.NacosInstance{IP: ip, Port: 80} }

func (w *nacosWorld) login(password string) {
	w.bridge.WriteSecret("prod", "nacos", map[string]string{"nacosUsername": w.nacos.User, "nacosPassword": password})
}

func (w *nacosWorld) testWrongPassword(t *testing.T) {
	w.provide("web", at("10.1.0.1"), at("10.1.0.2"))
	w.inState(t, "n", "blocked")
	w.login("not-the-password")
	harness.Eventually(t, patience, func() error {
		s, err := w.status("n")
		if err == nil && (s.State != "failing" || !strings.Contains(s.LastError, "refuses our credentials")) {
			err = fmt.Errorf("a refused login shows as %+v", s)
		}
		return err
	})
	w.login(w.nacos.Password)
	w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80")
	w.inState(t, "n", "synced")
	stay := w.client.keep(inNacos("web"))
	w.login("not-the-password")
	w.inState(t, "n", "failing")
	harness.Always(t, 3*time.Second, func() error { return w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	w.login(w.nacos.Password)
	w.inState(t, "n", "synced")
	stay(t)
}

func (w *nacosWorld) testInstances(t *testing.T) {
	host := inNacos("inst")
	half, none := 0.5, 0.0
	first := at("10.2.0.1")
	first.Weight, first.Cluster, first.Metadata = &half, "c1", map[string]string{"version": "v1", "zone": "z1"}
	w.provide("inst", first, at("10.2.0.2"))
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.2:80=10")
	label := func(want string) {
		t.Helper()
		harness.Eventually(t, patience, func() error {
			for _, e := range w.client.service(host).GetEndpoints() {
				if e.Address == "10.2.0.1" {
					if e.Labels["version"] != want || e.Labels["nacos.cluster"] != "c1" || e.Locality != "/z1" {
						return fmt.Errorf("the instance has the labels %v and the locality %q", e.Labels, e.Locality)
					}
					return nil
				}
			}
			return errors.New("the instance is not there")
		})
	}
	label("v1")
	first.Metadata = map[string]string{"version": "v2", "zone": "z1"}
	w.provide("inst", first, at("10.2.0.2"))
	label("v2")
	first.Weight = &none
	w.provide("inst", first, at("10.2.0.2"))
	w.client.has(t, host, "10.2.0.2:80")
	first.Weight = &half
	w.provide("inst", first, at("10.2.0.2"), at("10.2.0.3"))
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.2:80=10", "10.2.0.3:80=10")

	off := at("10.2.0.2") // in the console
	off.Service, off.Group, off.Disabled = "inst", nacosGroup, true
	w.nacos.Update(off)
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.3:80=10")
	off.Disabled = false
	w.nacos.Update(off)
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.2:80=10", "10.2.0.3:80=10")

	w.provide("inst", at("10.2.0.2"), at("10.2.0.3"))
	w.client.has(t, host, "10.2.0.2:80", "10.2.0.3:80")
	w.provide("inst", at("10.2.0.3"))
	w.client.has(t, host, "10.2.0.3:80")
	w.provide("inst")
	w.client.has(t, host) // the service is still there, and answers 503
	w.provide("inst", at("10.2.0.4"))
	w.client.has(t, host, "10.2.0.4:80")
	w.provide("inst")
	w.client.has(t, host)
}

// testService deletes a service that had an instance. It stays in the mesh, empty, for a while; regbridge no longer asks for it.
func (w *nacosWorld) testService(t *testing.T) {
	w.provide("brief", at("10.3.0.1"))
	w.client.has(t, inNacos("brief"), "10.3.0.1:80")
	subscribers := func(want int) {
		t.Helper()
		if w.nacos.Version == 1 {
			return // nobody subscribes
		}
		harness.Eventually(t, patience, func() error {
			n, err := w.nacos.Subscribers("", nacosGroup, "brief")
			if err == nil && n != want {
				err = fmt.Errorf("the server has %d subscribers, want %d", n, want)
			}
			return err
		})
	}
	subscribers(1)
	before, err := w.status("n")
	if err != nil {
		t.Fatal(err)
	}
	w.provide("brief")
	w.client.has(t, inNacos("brief"))
	w.nacos.DeleteService("", nacosGroup, "brief")
	harness.Eventually(t, patience, func() error {
		s, err := w.status("n")
		if err == nil && s.Services != before.Services-1 {
			err = fmt.Errorf("%d services are known, want %d", s.Services, before.Services-1)
		}
		return err
	})
	subscribers(0)
	w.provide("brief", at("10.3.0.2"))
	w.client.has(t, inNacos("brief"), "10.3.0.2:80")
	w.provide("brief")
	w.client.has(t, inNacos("brief"))
}

// testHealth lets an instance die without a word.
func (w *nacosWorld) testHealth(t *testing.T) {
	host := inNacos("health")
	silent := at("10.4.0.1")
	silent.Service, silent.Group, silent.Mortal = "health", nacosGroup, true
	silent.Metadata = map[string]string{
		"preserved.heart.beat.interval": "1000", "preserved.heart.beat.timeout": "3000", "preserved.ip.delete.timeout": "20000",
	}
	well := at("10.4.0.2") // 1.x takes a lone dead instance for healthy
	well.Service, well.Group = "health", nacosGroup
	var registered time.Time
	harness.Eventually(t, 2*patience, func() error { // a busy machine may miss the time for which the silent one is healthy
		err := w.client.check(host, "10.4.0.1:80", "10.4.0.2:80")
		if err != nil && time.Since(registered) > 5*time.Second {
			w.nacos.Register(silent, well)
			registered = time.Now()
		}
		return err
	})
	w.client.has(t, host, "10.4.0.2:80")
	s, err := w.status("n")
	if err != nil {
		t.Fatal(err)
	}
	unhealthy := false
	for _, l := range s.LeftOutInstances {
		unhealthy = unhealthy || l.Address == "10.4.0.1" && l.Reason == "unhealthy"
	}
	if !unhealthy {
		t.Errorf("nothing says that the instance is unhealthy: %+v", s.LeftOutInstances)
	}
	w.nacos.Deregister(well)
	// A process that is killed: Nacos 2 and 3 find its connection closed, Nacos 1 misses its signs of life.
	p := w.nacos.StartProvider(harness.NacosProviderOptions{})
	p.Provide(nacosGroup, "mortal", at("10.4.1.1"))
	w.client.has(t, inNacos("mortal"), "10.4.1.1:80")
	p.Kill()
	began := time.Now()
	harness.Eventually(t, 2*patience, func() error { return w.client.check(inNacos("mortal")) })
	t.Logf("measured: a provider is killed to the client knows: %v", time.Since(began).Round(time.Millisecond))
}

func (w *nacosWorld) testIstiod(t *testing.T) {
	w.istiod = harness.StartIstiod(t, harness.IstiodOptions{Sources: []harness.MCPSource{{Address: w.bridge.XDS}}})
	harness.Eventually(t, patience, func() error { return w.has(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	w.provide("web", at("10.1.0.1"), at("10.1.0.2"), at("10.1.0.3"))
	harness.Eventually(t, patience, func() error { return w.has(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80") })
	w.provide("web", at("10.1.0.1"), at("10.1.0.2"))
	harness.Eventually(t, patience, func() error { return w.has(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	hosts, err := w.hosts()
	if err != nil || len(hosts) < 2 {
		t.Errorf("istiod's services are %v, %v", hosts, err)
	}
}

// measure takes the time from a registration to the client.
func (w *nacosWorld) measure(t *testing.T) {
	var instances, gone []time.Duration
	for range 4 {
		w.provide("web", at("10.1.0.1"), at("10.1.0.2"), at("10.1.0.3"))
		instances = append(instances, w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"))
		w.provide("web", at("10.1.0.1"), at("10.1.0.2"))
		gone = append(gone, w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80"))
	}
	measured(t, "a new instance to the client, refresh interval 1 s", instances)
	measured(t, "an instance less to the client, refresh interval 1 s", gone)
}

func (w *nacosWorld) testPasswordChanged(t *testing.T) {
	stay := w.client.keep(inNacos("web"))
	w.nacos.SetPassword(w.nacos.User, "another-one")
	harness.Always(t, 3*interval, func() error { return w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	// Only now does regbridge log in with the old password.
	w.bridge.Stop() // which writes down what it knows
	w.bridge.Restart()
	w.client = startReader(w.t, w.bridge.XDS)
	w.inState(t, "n", "failing")
	s, err := w.status("n")
	if err != nil || !strings.Contains(s.LastError, "refuses our credentials") || !s.Stale {
		t.Errorf("a login that is no longer good shows as %+v, %v", s, err)
	}
	w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80")
	again := w.client.keep(inNacos("web"))
	harness.Always(t, 3*interval, func() error { return w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	w.login("another-one")
	w.inState(t, "n", "synced")
	again(t)
	stay(t)
	w.newProvider() // the old one has the old password
	w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80")
}

// newProvider replaces the application by one that provides the same.
func (w *nacosWorld) newProvider() {
	old := w.provider
	w.provider = w.nacos.StartProvider(harness.NacosProviderOptions{})
	for service, instances := range w.provided {
		if len(instances) > 0 {
			w.provide(service, instances...)
		}
	}
	old.Kill()
}

func (w *nacosWorld) testFrozen(t *testing.T) {
	stay := w.client.keep(inNacos("web"))
	w.nacos.Pause()
	began := time.Now()
	w.inState(t, "n", "failing")
	t.Logf("measured: the server is frozen to the registry is shown as failing: %v", time.Since(began).Round(100*time.Millisecond))
	w.nacos.Resume()
	w.inState(t, "n", "synced")
	harness.Always(t, 2*time.Second, func() error { return w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80") })
	stay(t)
}

// testBack kills the server under applications that live on: they register again when it is back.
func (w *nacosWorld) testBack(t *testing.T) {
	many := make([]harness.NacosInstance, 12) // a mass loss begins at 10
	for n := range many {
		many[n] = at(fmt.Sprintf("10.5.0.%d", n+1))
	}
	w.provide("many", many...)
	w.client.has(t, inNacos("many"), ips(many)...)
	stay := w.client.keep(inNacos("web"), inNacos("many"))
	w.nacos.Kill()
	w.inState(t, "n", "failing")
	harness.Eventually(t, patience, func() error {
		s, err := w.status("n")
		if err == nil && !s.Stale {
			err = fmt.Errorf("a registry without its server is %+v", s)
		}
		return err
	})
	w.nacos.Restart(false)
	w.inState(t, "n", "synced")
	w.holds(t, "n", 0)
	harness.Always(t, 16*time.Second, func() error { // past settle
		return errors.Join(w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80"), w.client.check(inNacos("many"), ips(many)...))
	})
	stay(t)
	// And changes arrive again.
	w.provide("web", at("10.1.0.1"), at("10.1.0.2"), at("10.1.0.3"))
	w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80")
	w.provide("web", at("10.1.0.1"), at("10.1.0.2"))
	w.client.has(t, inNacos("web"), "10.1.0.1:80", "10.1.0.2:80")
}

func ips(instances []harness.NacosInstance) []string {
	var all []string
	for _, i := range instances {
		all = append(all, i.IP+":80")
	}
	return all
}

// testBackEmpty lets the server lose everything, with all applications gone: it is kept until a user says otherwise.
func (w *nacosWorld) testBackEmpty(t *testing.T) {
	stay := w.client.keep(inNacos("web"), inNacos("many"))
	w.nacos.Kill()
	w.provider.Kill()
	w.nacos.Restart(true)
	w.login(w.nacos.Password)
	w.holds(t, "n", 14)
	w.inState(t, "n", "synced")
	harness.Always(t, 17*time.Second, func() error { // past settle: held as a mass loss
		return w.client.check(inNacos("web"), "10.1.0.1:80", "10.1.0.2:80")
	})
	stay(t)
	if stdout, stderr, err := w.bridge.Run("release", "n", "--admin-address", w.bridge.Admin); err != nil ||
		!strings.Contains(stdout, "14 endpoints released") {
		t.Fatalf("regbridge release: %q, %q, %v", stdout, stderr, err)
	}
	w.client.has(t, inNacos("web"))
	w.holds(t, "n", 0)
}
