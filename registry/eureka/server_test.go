package eureka

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
	"github.com/regbridge/regbridge/test/harness"
)

// Servers keep an answer for 3 minutes, if nothing changes. One that was made while an instance registered may lack that
// instance, and stays until then: a race of theirs, which many registrations at once provoke.
var soonExpired = map[string]string{"eureka.server.response-cache-auto-expiration-in-seconds": "2"}

// realLimit is how long is waited for what a server does.
const realLimit = 30 * time.Second

// front counts and holds up what is asked of a real server.
func front(t *testing.T, e *harness.Eureka) *fake {
	t.Helper()
	target, err := url.Parse("http://" + e.Address)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
	f := newFake(t)
	f.raw = func(w http.ResponseWriter, r *http.Request) bool {
		proxy.ServeHTTP(w, r)
		return true
	}
	return f
}

// TestServerConformance runs the suite against a real server.
func TestServerConformance(t *testing.T) {
	e := harness.StartEureka(t, harness.EurekaOptions{Properties: soonExpired})
	registrytest.Run(t, registrytest.Config{
		New:     func(entry registry.Entry, env registry.Env) (registry.Registry, error) { return New(entry, env) },
		Timeout: realLimit,
		Leaks: []goleak.Option{ // the harness's connections and the restarted server. TestConformance has no such exception
			goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"),
			goleak.IgnoreAnyFunction("github.com/regbridge/regbridge/test/harness.(*Process).launch.func1"),
		},
		Start: func(t *testing.T) registrytest.Backend {
			f := front(t, e)
			content := map[string][]registry.Instance{}
			known := map[string]map[string]bool{} // what was registered, by service and id
			t.Cleanup(func() {
				for service, ids := range known {
					deregister(t, e, service, slices.Collect(maps.Keys(ids))...)
				}
			})
			set := func(service string) {
				gone := known[service]
				known[service] = map[string]bool{}
				for _, i := range content[service] {
					registerFact(e, service, i)
					delete(gone, i.Address)
					known[service][i.Address] = true
				}
				deregister(t, e, service, slices.Collect(maps.Keys(gone))...)
			}
			return registrytest.Backend{
				Entry: f.entry(), ID: strings.ToUpper,
				Fact: func(i registry.Instance) registry.Instance {
					i.Metadata = labels.FromMap(withWeight(i))
					return i
				},
				Set:    func(service string, instances ...registry.Instance) { content[service] = instances; set(service) },
				Remove: func(service string) { delete(content, service); set(service) },
				Stop:   f.stop,
				Restart: func() {
					e.Restart()
					clear(known)
					for service := range content {
						set(service)
					}
					f.start()
				},
				Wipe: func() {
					f.stop()
					clear(content)
					clear(known)
					e.Restart()
					f.start()
				},
				Requests: func() int { return len(f.requests()) },
			}
		},
	})
}

func deregister(t *testing.T, e *harness.Eureka, app string, ids ...string) {
	for _, id := range ids {
		status, body := e.Call(http.MethodDelete, "/apps/"+app+"/"+id, nil)
		if status != http.StatusOK && status != http.StatusNotFound { // it may have been restarted
			t.Fatalf("remove %s: %d %s", id, status, body)
		}
	}
}

// registerFact registers an instance that is like i. Its id is its address.
func registerFact(e *harness.Eureka, app string, i registry.Instance) {
	one := harness.EurekaInstance{App: app, ID: i.Address, IP: i.Address, Port: int(i.Port), Metadata: withWeight(i)}
	if i.Unhealthy {
		one.Status = "DOWN"
	}
	if !i.Disabled {
		_, _ = e.Call(http.MethodDelete, "/apps/"+app+"/"+i.Address+"/status?value=UP", nil) // an override, if there is one
	}
	e.Register(one)
	if i.Disabled {
		e.SetStatus(one, statusOutOfService)
	}
}

// until reads until ok, and returns what was reported meanwhile. Each reading is one request, for what has changed.
func (s *stepper) until(t *testing.T, what string, ok func(map[string]registry.Service) bool) []registrytest.Event {
	t.Helper()
	var events []registrytest.Event
	harness.Eventually(t, realLimit, func() error {
		requests, now := s.ok(t)
		if events = append(events, now...); requests != "/apps/delta" {
			t.Errorf("%s: asked for %s", what, requests)
		}
		if got := s.rec.State().Services; !ok(got) {
			return fmt.Errorf("waited in vain for %s: %v", what, got)
		}
		return nil
	})
	return events
}

func failed(events []registrytest.Event) bool {
	return slices.ContainsFunc(events, func(e registrytest.Event) bool { return e.Kind == registrytest.Fail })
}

// listed waits until the server's cached answer has these instances, by id.
func listed(t *testing.T, e *harness.Eureka, ids ...string) {
	t.Helper()
	harness.Eventually(t, realLimit, func() error {
		all, err := e.Apps()
		if err != nil {
			return err
		}
		var got []string
		for _, i := range all {
			if i.App != "EUREKA" {
				got = append(got, i.ID)
			}
		}
		if !slices.Equal(got, ids) {
			return fmt.Errorf("the server lists %v, want %v", got, ids)
		}
		return nil
	})
}

// TestServer follows a real server's changes by its deltas, and notices when it was restarted between two readings.
func TestServer(t *testing.T) {
	e := harness.StartEureka(t, harness.EurekaOptions{Properties: soonExpired})
	one := func(id string) harness.EurekaInstance {
		return harness.EurekaInstance{App: "orders", ID: id, IP: "10.0.0.1", HostName: "host-" + id, Port: 8080}
	}
	a, b, c := one("a"), one("b"), one("c")
	a.Metadata = map[string]string{"version": "v1"}
	b.Zone, b.SecurePort = "us-east-1a", 8443
	e.Register(a, b)
	listed(t, e, "a", "b")
	s := newStepper(t, front(t, e))
	if requests, _ := s.ok(t); requests != "/apps" {
		t.Errorf("the first reading asked for %s", requests)
	}
	orders := func(services map[string]registry.Service) string {
		var out []string
		for _, i := range services["ORDERS"].Instances {
			out = append(out, show(i))
		}
		return strings.Join(out, "; ")
	}
	const aUp, bUp = `10.0.0.1:8080 version="v1"`, `10.0.0.1:8080 at us-east-1/us-east-1a`
	if got := orders(s.rec.State().Services); got != aUp+"; "+bUp {
		t.Errorf("got %s", got)
	}
	for _, step := range []struct {
		what   string
		change func()
		want   string
	}{
		{"an instance more", func() { e.Register(c) }, aUp + "; " + bUp + "; 10.0.0.1:8080"},
		{"metadata", func() { e.PutMetadata(c, "k", "v") }, aUp + "; " + bUp + `; 10.0.0.1:8080 k="v"`},
		{"an override", func() { e.SetStatus(a, statusOutOfService) },
			`10.0.0.1:8080 disabled "status OUT_OF_SERVICE" version="v1"; ` + bUp + `; 10.0.0.1:8080 k="v"`},
		{"no override", func() { e.DeleteStatus(a, "UP") }, aUp + "; " + bUp + `; 10.0.0.1:8080 k="v"`},
		{"DOWN", func() { down := c; down.Status = "DOWN"; e.Register(down) }, aUp + "; " + bUp + `; 10.0.0.1:8080 unhealthy "status DOWN"`},
		{"removed", func() { e.Deregister(c) }, aUp + "; " + bUp},
		{"a lease that runs out", func() {
			short := c
			short.Lease = time.Second
			e.Register(short)
			harness.Eventually(t, realLimit, func() error { // gone again, whether a reading has seen it or not
				if status, _ := e.Call(http.MethodGet, "/apps/orders/c", nil); status != http.StatusNotFound {
					return fmt.Errorf("status %d", status)
				}
				return nil
			})
		}, aUp + "; " + bUp},
	} {
		step.change()
		events := s.until(t, step.what, func(services map[string]registry.Service) bool { return orders(services) == step.want })
		if failed(events) {
			t.Errorf("%s: reported %v", step.what, events)
		}
	}
	t.Run("a full reading with a removal", func(t *testing.T) {
		e.Register(c)
		s.until(t, "the instance", func(services map[string]registry.Service) bool { return len(services["ORDERS"].Instances) == 3 })
		e.Deregister(c)
		listed(t, e, "a", "b")
		s.fullAt = time.Now()
		if requests, events := s.ok(t); requests != "/apps /apps/delta" || failed(events) {
			t.Errorf("asked for %s, reported %v", requests, events)
		}
	})
	t.Run("the server folds an override into the status", func(t *testing.T) {
		d := one("d")
		status, body := e.Call(http.MethodPost, "/apps/orders", `{"instance":{"instanceId":"d","hostName":"d","app":"orders","ipAddr":"10.0.0.4",`+
			`"status":"UP","overriddenStatus":"OUT_OF_SERVICE","port":{"$":80,"@enabled":"true"},`+
			`"dataCenterInfo":{"@class":"com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo","name":"MyOwn"}}}`)
		if status != http.StatusNoContent {
			t.Fatalf("register: %d %s", status, body)
		}
		s.until(t, "it to be disabled", func(services map[string]registry.Service) bool { return strings.Contains(orders(services), "disabled") })
		e.Deregister(d)
		s.until(t, "it to go", func(services map[string]registry.Service) bool { return orders(services) == aUp+"; "+bUp })
	})
	t.Run("restarted, and one has registered again", func(t *testing.T) {
		e.Restart()
		e.Register(a)
		listed(t, e, "a")
		requests, events := s.ok(t)
		if events[0].Kind != registrytest.Fail || !strings.Contains(events[0].Err.Error(), "no longer lists 1 instances (ORDERS/b)") {
			t.Errorf("reported %v", events)
		}
		if requests != "/apps/delta /apps /apps/delta" || orders(s.rec.State().Services) != aUp {
			t.Errorf("asked for %s, known %v", requests, s.rec.State().Services)
		}
		e.Register(b)
		s.until(t, "the other one", func(services map[string]registry.Service) bool { return orders(services) == aUp+"; "+bUp })
	})
	t.Run("restarted, and all have registered again", func(t *testing.T) {
		e.Restart()
		e.Register(a, b)
		listed(t, e, "a", "b")
		if requests, events := s.ok(t); requests != "/apps/delta" || failed(events) {
			t.Errorf("asked for %s, reported %v", requests, events)
		}
	})
	t.Run("restarted and empty", func(t *testing.T) {
		e.Restart()
		if _, events := s.ok(t); events[0].Kind != registrytest.Fail || len(s.rec.State().Services) != 0 {
			t.Errorf("reported %v", events)
		}
	})
}

// TestServerWithoutDelta is about servers whose deltas are switched off.
func TestServerWithoutDelta(t *testing.T) {
	e := harness.StartEureka(t, harness.EurekaOptions{Properties: map[string]string{"eureka.server.disable-delta": "true"}})
	a := harness.EurekaInstance{App: "orders", ID: "a", IP: "10.0.0.1", Port: 80}
	b := harness.EurekaInstance{App: "orders", ID: "b", IP: "10.0.0.2", Port: 80}
	e.Register(a, b)
	listed(t, e, "a", "b")
	s := newStepper(t, front(t, e))
	for n, want := range []string{"/apps", "/apps/delta /apps", "/apps"} {
		if requests, events := s.ok(t); requests != want || failed(events) {
			t.Errorf("reading %d asked for %s, reported %v", n+1, requests, events)
		}
	}
	e.Deregister(b)
	listed(t, e, "a")
	if _, events := s.ok(t); failed(events) || len(s.rec.State().Services["ORDERS"].Instances) != 1 {
		t.Errorf("reported %v", events)
	}
	e.Register(b)
	listed(t, e, "a", "b")
	s.ok(t)
	e.Restart()
	e.Register(a)
	listed(t, e, "a")
	if _, events := s.ok(t); events[0].Kind != registrytest.Fail {
		t.Errorf("reported %v", events)
	}
}

// TestServerPeers is about the lie of a peer that was restarted: it lists only instances that are UP.
func TestServerPeers(t *testing.T) {
	peers := harness.StartEurekaPeers(t, harness.EurekaOptions{Properties: soonExpired})
	instances := []harness.EurekaInstance{
		{App: "orders", ID: "a", IP: "10.0.0.1", Port: 80},
		{App: "orders", ID: "b", IP: "10.0.0.2", Port: 80, Status: "DOWN"},
		{App: "orders", ID: "c", IP: "10.0.0.3", Port: 80},
	}
	peers[0].Register(instances...)
	peers[0].SetStatus(instances[2], statusOutOfService)
	for _, p := range peers {
		listed(t, p, "a", "b", "c")
	}
	t.Run("between two readings", func(t *testing.T) {
		s := newStepper(t, front(t, peers[0]))
		s.ok(t)
		peers[0].Restart()
		listed(t, peers[0], "a")
		requests, events := s.ok(t)
		if events[0].Kind != registrytest.Fail || !strings.Contains(events[0].Err.Error(), "versions__delta went back") &&
			!strings.Contains(events[0].Err.Error(), "perhaps it was restarted") {
			t.Errorf("asked for %s, reported %v", requests, events)
		}
		if got := s.rec.State().Services["ORDERS"].Instances; len(got) != 1 {
			t.Errorf("known are %v", got)
		}
		peers[1].Register(instances[1]) // as its heartbeat would
		s.until(t, "it to be told by the peer", func(services map[string]registry.Service) bool { return len(services["ORDERS"].Instances) == 2 })
	})
	t.Run("failover", func(t *testing.T) {
		listed(t, peers[1], "a", "b", "c")
		e := registry.Entry{Type: "eureka", Name: "peers", Domain: peers[1].Address + "," + peers[0].Address}
		rec := running(t, e, testEnv(nil), 500*time.Millisecond)
		count := func(n int) func(registrytest.State) bool {
			return func(s registrytest.State) bool {
				return s.Loaded && s.Gap == nil && len(s.Services["ORDERS"].Instances) == n
			}
		}
		await(t, rec, "all of the first server", count(3))
		peers[1].Kill()
		s := await(t, rec, "what the second one has", count(2))
		for _, e := range s.Events {
			if e.Kind == registrytest.Fail {
				break
			}
			if e.Kind == registrytest.Synced && len(e.Removed) > 0 {
				t.Errorf("removed before the gap: %v", e)
			}
		}
		if !failed(s.Events) {
			t.Error("the change of server is no gap")
		}
		peers[1].Process.Restart()
	})
}

// TestServerLogin is about a server that wants everything: TLS, a certificate, and a login.
func TestServerLogin(t *testing.T) {
	ca := harness.NewCA(t, "eureka")
	e := harness.StartEureka(t, harness.EurekaOptions{User: goodUser, Password: goodPassword, TLS: ca, ClientCertificates: true})
	e.Register(harness.EurekaInstance{App: "orders", ID: "a", IP: "10.0.0.1", Port: 80})
	listed(t, e, "a")
	certificate := ca.ServerTLS(t, "client").Certificates
	trust := func(certificates []tls.Certificate) func() (*tls.Config, error) {
		return func() (*tls.Config, error) {
			return &tls.Config{RootCAs: ca.Pool(), Certificates: certificates, MinVersion: tls.VersionTLS12}, nil
		}
	}
	login := registry.Credentials{"eurekaUsername": goodUser, "eurekaPassword": goodPassword}
	for name, tc := range map[string]struct {
		tls    func() (*tls.Config, error)
		secret registry.Credentials
		reason string
	}{
		"good":           {trust(certificate), login, ""},
		"wrong password": {trust(certificate), registry.Credentials{"username": goodUser, "password": "wrong"}, "refused (401): check user and password"},
		"no certificate": {trust(nil), login, "certificate"},
		"no TLS":         {func() (*tls.Config, error) { return nil, nil }, login, "answered 400"},
		"not its CA": {func() (*tls.Config, error) { return &tls.Config{MinVersion: tls.VersionTLS12}, nil }, login,
			"certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			env := testEnv(nil)
			env.ClientTLS = tc.tls
			env.Credentials = func() (registry.Credentials, error) { return tc.secret, nil }
			rec := running(t, registry.Entry{Type: "eureka", Name: "login", Domain: e.Address, AuthSecretName: "login"}, env, time.Second)
			if tc.reason == "" {
				s := await(t, rec, "the service", func(s registrytest.State) bool { return s.Loaded })
				if got := slices.Sorted(maps.Keys(s.Services)); !slices.Equal(got, []string{"ORDERS"}) || failed(s.Events) {
					t.Errorf("known are %v, %v", got, s.Events)
				}
				return
			}
			s := await(t, rec, "a failure", func(s registrytest.State) bool { return s.Gap != nil })
			if s.Synced || !strings.Contains(s.Gap.Error(), tc.reason) || strings.Contains(s.Gap.Error(), goodPassword) {
				t.Errorf("synced %v, %v", s.Synced, s.Gap)
			}
			if errors.Is(s.Gap, registry.ErrConfig) {
				t.Error("it is not tried again")
			}
		})
	}
}
