package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

// eurekaWorld is one Eureka, regbridge reading it as "e", and an xDS client.
type eurekaWorld struct {
	*world
	eureka *harness.Eureka
	client *reader
	leave  []func() // ends the heartbeats of applications
}

// inEureka is the host of an application.
func inEureka(app string) string { return strings.ToLower(app) + ".eureka" }

// TestEureka follows applications, among them real ones, through their lives, and the server through its failures.
func TestEureka(t *testing.T) {
	t.Parallel()
	w := &eurekaWorld{world: newWorld(t)}
	w.eureka = harness.StartEureka(t, harness.EurekaOptions{User: "reader", Password: "pw-of-the-reader"})
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"eureka.yaml": mcpBridge("eureka", fmt.Sprintf(
		"{type: eureka, name: e, domain: %s, refreshInterval: %v, guard: {settle: 15s, hold: 20m}, authSecretName: eureka}",
		w.eureka.Address, interval))}})
	w.client = startReader(t, w.bridge.XDS)
	t.Run("a wrong password is no empty registry", w.testWrongPassword)
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})
	t.Run("instances", w.testInstances)
	t.Run("real application", w.testRealApplication)
	t.Run("measured", w.measure)
	t.Run("frozen", w.testFrozen)
	t.Run("back with its clients", w.testBack)
	t.Run("back without anything", w.testBackEmpty)
	for _, page := range []string{"/debug/registries", "/debug/configz", "/metrics"} {
		if body, err := w.bridge.Get(page); err != nil || strings.Contains(body, "pw-of-the-reader") || strings.Contains(body, "not-the-password") {
			t.Errorf("%s shows a password: %v", page, err)
		}
	}
	if strings.Contains(w.bridge.Log(), "pw-of-the-reader") || strings.Contains(w.bridge.Log(), "not-the-password") {
		t.Error("the log shows a password")
	}
}

func (w *eurekaWorld) login(password string) {
	w.bridge.WriteSecret("prod", "eureka", map[string]string{"eurekaUsername": "reader", "eurekaPassword": password})
}

// keepAlive registers instances, and again where the server does not know them any more.
func (w *eurekaWorld) keepAlive(instances ...harness.EurekaInstance) (stop func()) {
	stop = w.eureka.KeepAlive(time.Second, instances...)
	w.leave = append(w.leave, stop)
	return stop
}

func inApp(app, id, ip string) harness.EurekaInstance {
	return harness.EurekaInstance{App: app, ID: id, IP: ip, Port: 80}
}

func (w *eurekaWorld) testWrongPassword(t *testing.T) {
	w.keepAlive(inApp("WEB", "w1", "10.1.0.1"), inApp("WEB", "w2", "10.1.0.2"))
	w.inState(t, "e", "blocked")
	w.login("not-the-password")
	harness.Eventually(t, patience, func() error {
		s, err := w.status("e")
		if err == nil && (s.State != "failing" || !strings.Contains(s.LastError, "401")) {
			err = fmt.Errorf("a refused login shows as %+v", s)
		}
		return err
	})
	w.login("pw-of-the-reader")
	w.client.has(t, inEureka("web"), "10.1.0.1:80", "10.1.0.2:80")
	w.inState(t, "e", "synced")
	stay := w.client.keep(inEureka("web"))
	w.login("not-the-password")
	w.inState(t, "e", "failing")
	harness.Always(t, 3*time.Second, func() error { return w.client.check(inEureka("web"), "10.1.0.1:80", "10.1.0.2:80") })
	w.login("pw-of-the-reader")
	w.inState(t, "e", "synced")
	stay(t)
}

func (w *eurekaWorld) testInstances(t *testing.T) {
	host := inEureka("inst")
	first := inApp("INST", "i1", "10.2.0.1")
	first.Metadata = map[string]string{"version": "v1", "zone": "z1", "weight": "0.5"}
	second := inApp("INST", "i2", "10.2.0.2")
	w.eureka.Register(first, second)
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.2:80=10")
	label := func(want string) {
		t.Helper()
		harness.Eventually(t, patience, func() error {
			for _, e := range w.client.service(host).GetEndpoints() {
				if e.Address == "10.2.0.1" {
					if e.Labels["version"] != want || e.Locality != "/z1" {
						return fmt.Errorf("the instance has the labels %v and the locality %q", e.Labels, e.Locality)
					}
					return nil
				}
			}
			return errors.New("the instance is not there")
		})
	}
	label("v1")
	w.eureka.PutMetadata(first, "version", "v2")
	label("v2")
	w.eureka.SetStatus(first, "OUT_OF_SERVICE")
	w.client.has(t, host, "10.2.0.2:80")
	w.eureka.SetStatus(second, "DOWN")
	w.client.has(t, host) // the service is still there, and answers 503
	s, err := w.status("e")
	if err != nil {
		t.Fatal(err)
	}
	reasons := map[string]string{}
	for _, l := range s.LeftOutInstances {
		reasons[l.Address] = l.Reason
	}
	if reasons["10.2.0.1"] != "disabled" || reasons["10.2.0.2"] != "unhealthy" {
		t.Errorf("left out are %+v", s.LeftOutInstances)
	}
	w.eureka.DeleteStatus(second, "UP")
	w.eureka.DeleteStatus(first, "UP")
	w.client.has(t, host, "10.2.0.1:80=5", "10.2.0.2:80=10")

	secure := inApp("SECURE", "s1", "10.2.1.1")
	secure.PortDisabled, secure.SecurePort = true, 8443
	w.keepAlive(secure)
	w.client.has(t, inEureka("secure"), "10.2.1.1:8443")

	w.eureka.Deregister(first)
	w.client.has(t, host, "10.2.0.2:80")
	w.eureka.Deregister(second) // and with it the application
	w.client.has(t, host)
	third := inApp("INST", "i3", "10.2.0.3")
	w.eureka.Register(third)
	w.client.has(t, host, "10.2.0.3:80")
	w.eureka.Deregister(third)
	w.client.has(t, host)
}

// testRealApplication starts, stops and kills a Spring application, under requests.
func (w *eurekaWorld) testRealApplication(t *testing.T) {
	host := inEureka("shop")
	start := func(id, lease string) *harness.EurekaClient {
		w.lastIP = max(w.lastIP, 1) + 1
		return harness.StartEurekaClient(t, w.eureka.URL, harness.EurekaClientOptions{
			App: "shop", InstanceID: id, IP: fmt.Sprintf("127.0.0.%d", w.lastIP), Port: w.port,
			User: "reader", Password: "pw-of-the-reader", Metadata: map[string]string{"version": "v1"},
			Properties: map[string]string{"eureka.instance.lease-expiration-duration-in-seconds": lease},
		})
	}
	one, two := start("one", "60"), start("two", "3") // the first one lives on, also where it is late
	w.client.has(t, host, one.Address, two.Address)
	harness.Eventually(t, patience, func() error { return w.answers(host, "one", "two") })
	stay := w.client.keepThese(map[string][]string{host: {one.Address}})

	override := harness.EurekaInstance{App: "SHOP", ID: "two"}
	w.eureka.SetStatus(override, "OUT_OF_SERVICE") // the heartbeats go on
	w.client.has(t, host, one.Address)
	harness.Eventually(t, patience, func() error { return w.answers(host, "one") })
	w.eureka.DeleteStatus(override, "UP")
	w.client.has(t, host, one.Address, two.Address)
	one.SetMetadata(map[string]string{"version": "v2"})
	harness.Eventually(t, patience, func() error {
		for _, e := range w.client.service(host).GetEndpoints() {
			if e.Labels["version"] == "v2" {
				return nil
			}
		}
		return errors.New("no endpoint has the new label")
	})
	two.SetStatus("DOWN") // by itself
	w.client.has(t, host, one.Address)
	two.SetStatus("UP")
	w.client.has(t, host, one.Address, two.Address)

	if err := two.Stop(); err != nil {
		t.Log(err) // the JVM ends with the signal's status
	}
	w.client.has(t, host, one.Address)
	two.Restart()
	w.client.has(t, host, one.Address, two.Address)
	two.Kill()
	began := time.Now()
	w.client.has(t, host, one.Address)
	t.Logf("measured: an application is killed to the client knows, leases of 3 s: %v", time.Since(began).Round(time.Millisecond))
	two.Restart()
	w.client.has(t, host, one.Address, two.Address)
	harness.Eventually(t, patience, func() error { return w.answers(host, "one", "two") })
	stay(t)
	two.Kill()
	if err := one.Stop(); err != nil {
		t.Log(err)
	}
	w.client.has(t, host)
	w.serves503(t, host)
}

// measure takes the time from a registration to the client.
func (w *eurekaWorld) measure(t *testing.T) {
	var more, less []time.Duration
	third := inApp("WEB", "w3", "10.1.0.3")
	for range 4 {
		w.eureka.Register(third)
		more = append(more, w.client.has(t, inEureka("web"), "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"))
		w.eureka.Deregister(third)
		less = append(less, w.client.has(t, inEureka("web"), "10.1.0.1:80", "10.1.0.2:80"))
	}
	measured(t, "a new instance to the client, refresh interval 1 s", more)
	measured(t, "an instance less to the client, refresh interval 1 s", less)
}

func (w *eurekaWorld) testFrozen(t *testing.T) {
	stay := w.client.keep(inEureka("web"))
	w.eureka.Pause()
	w.inState(t, "e", "failing")
	w.eureka.Resume()
	w.inState(t, "e", "synced")
	harness.Always(t, 2*time.Second, func() error { return w.client.check(inEureka("web"), "10.1.0.1:80", "10.1.0.2:80") })
	stay(t)
}

// testBack kills the server under applications that live on. Alone, it begins with an empty list; they register again.
func (w *eurekaWorld) testBack(t *testing.T) {
	var instances []harness.EurekaInstance
	var many []string
	for n := range 12 { // a mass loss begins at 10
		instances = append(instances, inApp("MANY", fmt.Sprintf("m%d", n+1), fmt.Sprintf("10.5.0.%d", n+1)))
		many = append(many, fmt.Sprintf("10.5.0.%d:80", n+1))
	}
	w.keepAlive(instances...)
	w.client.has(t, inEureka("many"), many...)
	check := func() error {
		return errors.Join(w.client.check(inEureka("web"), "10.1.0.1:80", "10.1.0.2:80"), w.client.check(inEureka("many"), many...))
	}
	stay := w.client.keep(inEureka("web"), inEureka("many"))
	w.eureka.Kill()
	w.inState(t, "e", "failing")
	w.eureka.Restart()
	w.inState(t, "e", "synced")
	w.holds(t, "e", 0)
	harness.Always(t, 16*time.Second, check) // past settle
	stay(t)
	third := inApp("WEB", "w3", "10.1.0.3")
	w.eureka.Register(third)
	w.client.has(t, inEureka("web"), "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80")
	w.eureka.Deregister(third)
	w.client.has(t, inEureka("web"), "10.1.0.1:80", "10.1.0.2:80")
}

// testBackEmpty restarts the server when all applications are gone: all is kept until a user says otherwise.
func (w *eurekaWorld) testBackEmpty(t *testing.T) {
	stay := w.client.keep(inEureka("web"))
	w.eureka.Kill()
	for _, end := range w.leave {
		end()
	}
	w.eureka.Restart()
	w.inState(t, "e", "synced")
	w.holds(t, "e", 15)                              // 2 of web, 12 of many, 1 of secure
	harness.Always(t, 17*time.Second, func() error { // past settle: held as a mass loss
		return w.client.check(inEureka("web"), "10.1.0.1:80", "10.1.0.2:80")
	})
	stay(t)
	if stdout, stderr, err := w.bridge.Run("release", "e", "--admin-address", w.bridge.Admin); err != nil ||
		!strings.Contains(stdout, "15 endpoints released") {
		t.Fatalf("regbridge release: %q, %q, %v", stdout, stderr, err)
	}
	w.client.has(t, inEureka("web"))
}

// TestEurekaPeers reads two servers that are peers. One is killed, and comes back as a peer does: without the instances
// that are not UP, and without those whose heartbeats have not come yet.
func TestEurekaPeers(t *testing.T) {
	t.Parallel()
	w := &eurekaWorld{world: newWorld(t)}
	peers := harness.StartEurekaPeers(t, harness.EurekaOptions{})
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"eureka.yaml": mcpBridge("eureka", fmt.Sprintf(
		"{type: eureka, name: e, domain: '%s, %s', refreshInterval: %v, guard: {settle: 15s, hold: 20m}}",
		peers[0].Address, peers[1].Address, interval))}})
	w.client = startReader(t, w.bridge.XDS)
	host := inEureka("shop")
	app := harness.StartEurekaClient(t, peers[1].URL+","+peers[0].URL, harness.EurekaClientOptions{App: "shop", InstanceID: "one"})
	two, three := inApp("SHOP", "two", "10.6.0.2"), inApp("SHOP", "three", "10.6.0.3")
	for _, peer := range peers { // an application turns to the other server when one is away
		peer.KeepAlive(time.Second, two, three)
	}
	w.client.has(t, host, app.Address, "10.6.0.2:80", "10.6.0.3:80")
	w.inState(t, "e", "synced")
	stay := w.client.keep(host)
	for i, peer := range peers {
		other := peers[1-i]
		peer.Kill()
		harness.Always(t, 4*interval, func() error { return w.client.check(host, app.Address, "10.6.0.2:80", "10.6.0.3:80") })
		w.inState(t, "e", "synced") // by the other one
		peer.Restart()
		harness.Always(t, 4*interval, func() error { return w.client.check(host, app.Address, "10.6.0.2:80", "10.6.0.3:80") })
		harness.Eventually(t, patience, func() error { return sameApps(peer, other) })
	}
	stay(t)
	// What one is told, the other one says.
	peers[1].SetStatus(three, "OUT_OF_SERVICE")
	w.client.has(t, host, app.Address, "10.6.0.2:80")
}

// sameApps returns nil if both servers list the same.
func sameApps(a, b *harness.Eureka) error {
	ofA, err := a.Apps()
	if err != nil {
		return err
	}
	ofB, err := b.Apps()
	if err != nil {
		return err
	}
	if x, y := fmt.Sprint(ofA), fmt.Sprint(ofB); x != y {
		return fmt.Errorf("one server lists %s, the other one %s", x, y)
	}
	return nil
}

// TestEurekaTLS reads a Eureka that wants a client certificate.
func TestEurekaTLS(t *testing.T) {
	t.Parallel()
	ca := harness.NewCA(t, "eureka")
	e := harness.StartEureka(t, harness.EurekaOptions{TLS: ca, ClientCertificates: true})
	files := t.TempDir()
	ca.WriteFiles(t, files, "regbridge")
	w := newWorld(t)
	entry := func(tls string) string {
		return mcpBridge("eureka", fmt.Sprintf("{type: eureka, name: e, domain: %s, refreshInterval: %v%s}", e.Address, interval, tls))
	}
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"eureka.yaml": entry(
		fmt.Sprintf(", tls: {caFile: %[1]s/ca.crt, certFile: %[1]s/tls.crt, keyFile: %[1]s/tls.key}", files))}})
	client := startReader(t, w.bridge.XDS)
	e.Register(inApp("SHOP", "one", "10.7.0.1"))
	client.has(t, inEureka("shop"), "10.7.0.1:80")
	stay := client.keep(inEureka("shop"))
	w.bridge.WriteConfig("eureka.yaml", entry(fmt.Sprintf(", tls: {caFile: %s/ca.crt}", files))) // no certificate of ours
	w.inState(t, "e", "failing")
	harness.Always(t, 3*time.Second, func() error { return client.check(inEureka("shop"), "10.7.0.1:80") })
	stay(t)
}
