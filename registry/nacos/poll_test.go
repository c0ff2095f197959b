package nacos

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestHTTPConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHastyHTTP,
		Interval: 100 * time.Millisecond,
		Start:    func(t *testing.T) registrytest.Backend { return newHTTPFake(t).backend() },
	})
}

// TestHTTPConformanceOfNacos3 is against what a 3.x server answers to the same requests, over TLS.
func TestHTTPConformanceOfNacos3(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHastyHTTP,
		Interval: 100 * time.Millisecond,
		Start: func(t *testing.T) registrytest.Backend {
			f := newTLSHTTPFake(t)
			f.edit(func() { f.version = "3.1.0" })
			b := f.backend()
			b.ClientTLS = f.trust()
			return b
		},
		Skip: map[string]string{
			"one call hangs": "takes long, and 1.4.1 has shown it",
			"1000 services":  "takes long, and 1.4.1 has shown it",
		},
	})
}

func TestDisabled(t *testing.T) {
	f := newHTTPFake(t)
	off := up("10.0.0.2")
	f.put("order", up("10.0.0.1"), off)
	r := runHTTP(t, f.entry(), f.env())
	r.loaded()
	off.Enabled = false
	f.put("order", up("10.0.0.1"), off)
	r.wait("the instance to go", func(s registrytest.State) bool {
		instances := s.Services["DEFAULT_GROUP@@order"].Instances
		return len(instances) == 1 && instances[0].Address == "10.0.0.1"
	})
}

func TestNamespaceGroupsAndNames(t *testing.T) {
	f := newHTTPFake(t)
	f.edit(func() {
		f.tenant = "d8ac64f3"
		for _, k := range []key{
			{"my_group", "svc_a"}, {"OTHER", "b"}, {"UNREAD", "c"}, {"my_group", "consumers:com.acme.Order:1.0:"},
			{"my_group", "providers:com.acme.Order:1.0:"},
		} {
			f.services[k] = []host{up("10.0.0.1")}
		}
	})
	e := f.entry()
	e.NacosNamespaceId, e.NacosNamespace, e.NacosGroups = "d8ac64f3", "team_x", []string{"my_group", " OTHER", "my_group"}
	s := runHTTP(t, e, f.env()).loaded()
	got := map[string]string{}
	for id, service := range s.Services {
		got[id] = service.Host
	}
	want := map[string]string{
		"my_group@@svc_a":                         "svc_a.my-group.team-x.nacos",
		"my_group@@providers:com.acme.Order:1.0:": "providers:com.acme.Order:1.0:.my-group.team-x.nacos",
		"OTHER@@b": "b.OTHER.team-x.nacos",
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestNewServiceBeforeItsListing(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(20)
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = time.Second })
	n := len(r.loaded().Events)
	f.put("a-new-one", up("10.9.9.9"))
	const id = "DEFAULT_GROUP@@a-new-one"
	s := r.wait("a listing of the new service", func(s registrytest.State) bool {
		return slices.ContainsFunc(s.Events[n:], func(e registrytest.Event) bool { return e.Kind == registrytest.Synced && slices.Contains(e.IDs, id) })
	})
	for _, e := range s.Events[n:] {
		if slices.Contains(e.IDs, id) {
			if e.Kind != registrytest.Put {
				t.Errorf("the first that is told of a new service is %s, though it is listed only once it has been read", e.Kind)
			}
			break
		}
	}
}

// TestRestartBetweenRounds: the interval is long, so only the watch can see that the server was away.
func TestRestartBetweenRounds(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(3)
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = 10 * time.Minute })
	n := len(r.loaded().Events)
	f.stop()
	r.wait("the gap", func(s registrytest.State) bool { return s.Gap != nil })
	f.edit(func() { delete(f.services, key{"DEFAULT_GROUP", "service-0001"}) }) // its provider has not come back yet
	f.start()
	s := r.wait("the next sync", func(s registrytest.State) bool { return s.Gap == nil })
	if since(s, n, registrytest.Fail) == 0 {
		t.Error("a restarted server was believed without a gap")
	}
}

func TestServicesThatDoNotAnswer(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(30)
	var silent []string
	for i := 10; i < 15; i++ { // next to each other
		silent = append(silent, fmt.Sprintf("DEFAULT_GROUP@@service-%04d", i))
	}
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.timeout = time.Second })
	n := len(r.loaded().Events)
	f.edit(func() {
		for _, id := range silent {
			f.silent[id] = true
		}
	})
	f.put("service-0020", up("10.9.9.9"))
	s := r.wait("five gaps of services, and the change of another", func(s registrytest.State) bool {
		return len(s.Gaps) == 5 && s.Services["DEFAULT_GROUP@@service-0020"].Instances[0].Address == "10.9.9.9"
	})
	if got := slices.Sorted(maps.Keys(s.Gaps)); !slices.Equal(got, silent) {
		t.Errorf("gaps of %v", got)
	}
	for _, e := range s.Events[n:] {
		if e.Kind == registrytest.Fail && len(e.IDs) == 0 {
			t.Errorf("the whole registry is in a gap: %v", e.Err)
		}
	}
	if len(s.Services) != 30 {
		t.Errorf("%d services are left", len(s.Services))
	}
	f.edit(func() { clear(f.silent) })
	r.wait("the end of all gaps", func(s registrytest.State) bool { return len(s.Gaps) == 0 })
}

// TestNoServiceAnswers: the list is answered, but nothing else, by a server that is half dead.
func TestNoServiceAnswers(t *testing.T) {
	for name, breakIt := range map[string]func(*httpFake){
		"silent": func(f *httpFake) {
			for k := range f.services {
				f.silent[k.id()] = true
			}
		},
		"starting":          func(f *httpFake) { f.status[instancePath] = http.StatusServiceUnavailable },
		"bad gateway":       func(f *httpFake) { f.status[instancePath] = http.StatusBadGateway },
		"too many requests": func(f *httpFake) { f.status[instancePath] = http.StatusTooManyRequests },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newHTTPFake(t)
			f.fill(40)
			r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.timeout = 200 * time.Millisecond })
			n := len(r.loaded().Events)
			f.edit(func() { breakIt(f) })
			s := r.wait("the gap", func(s registrytest.State) bool { return s.Gap != nil })
			unchanged(t, s, n, "while nothing was answered")
			if len(s.Gaps) > maxFailures+concurrency {
				t.Errorf("%d services were tried", len(s.Gaps))
			}
		})
	}
}

// TestServerStarts: 503 is no answer about a service, and nobody asks 500 times a second for the end of it.
func TestServerStarts(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(100)
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = 500 * time.Millisecond })
	n := len(r.loaded().Events)
	f.edit(func() {
		f.seen = nil
		for _, path := range []string{listPath, instancePath} {
			f.status[path], f.bodies[path] = 503, "server is STARTING now, please try again later!"
		}
	})
	s := r.wait("three gaps", func(s registrytest.State) bool { return s.Gap != nil && since(s, n, registrytest.Fail) >= 3 })
	unchanged(t, s, n, "while the server started")
	if !strings.Contains(s.Gap.Error(), "STARTING") {
		t.Errorf("the error does not say what the server said: %v", s.Gap)
	}
	f.edit(func() {
		if n := len(f.seen); n > 40 {
			t.Errorf("%d requests to a server that starts", n)
		}
		clear(f.status)
		clear(f.bodies)
	})
	r.wait("the end of the gap", func(s registrytest.State) bool { return s.Gap == nil && s.Loaded })
}

func TestBadAnswers(t *testing.T) {
	const page = "<html><body>Sign in as mesh-reader</body></html>"
	for name, bad := range map[string]struct {
		path   string
		code   int
		body   string
		reason string // in the error
	}{
		"list: HTML":               {listPath, 200, page, "not what it should be"},
		"list: half a JSON":        {listPath, 200, `{"count":2,"doms":["service-0000","ser`, "unexpected end"},
		"list: another object":     {listPath, 200, `{"code":403,"message":"no"}`, "without the number of services"},
		"list: null":               {listPath, 200, `null`, "without the number of services"},
		"list: empty":              {listPath, 200, ` `, "unexpected end"},
		"list: half a list":        {listPath, 200, `{"count":3,"doms":["service-0000"]}`, "contradicts itself"},
		"list: 500":                {listPath, 500, `{"message":"java.lang.NullPointerException"}`, "NullPointerException"},
		"list: 404":                {listPath, 404, page, "answered 404"},
		"list: redirect":           {listPath, 302, page, "redirect"},
		"instances: HTML":          {instancePath, 200, page, "not what it should be"},
		"instances: half a JSON":   {instancePath, 200, `{"hosts":[`, "unexpected end"},
		"instances: none at all":   {instancePath, 200, `{"name":"DEFAULT_GROUP@@service-0000"}`, "without instances"},
		"instances: null":          {instancePath, 200, `{"hosts":null}`, "without instances"},
		"instances: of another":    {instancePath, 200, `{"name":"DEFAULT_GROUP@@other","hosts":[]}`, "about another service"},
		"instances: 500":           {instancePath, 500, "caused: boom", "boom"},
		"instances: redirect":      {instancePath, 307, page, "redirect"},
		"instances: no such thing": {instancePath, 404, "dom not found", "dom not found"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newHTTPFake(t)
			f.fill(2)
			r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = 50 * time.Millisecond })
			n := len(r.loaded().Events)
			f.edit(func() {
				f.bodies[bad.path] = bad.body
				f.headers["Location"] = "http://" + f.address + "/elsewhere"
				if bad.code != 200 {
					f.status[bad.path] = bad.code
				}
			})
			s := r.wait("a gap", func(s registrytest.State) bool {
				if bad.path == listPath {
					return s.Gap != nil
				}
				return len(s.Gaps) == 2
			})
			unchanged(t, s, n, "bad answers")
			for _, e := range s.Events[n:] {
				switch {
				case e.Kind != registrytest.Fail:
				case !strings.Contains(e.Err.Error(), bad.reason):
					t.Errorf("%v, which does not say %q", e.Err, bad.reason)
				case strings.Contains(e.Err.Error(), "<html"):
					t.Errorf("a page of HTML in the error: %v", e.Err)
				case bad.path == instancePath && len(e.IDs) == 0:
					t.Errorf("the whole registry is in a gap: %v", e.Err)
				}
			}
			f.edit(func() {
				if f.count("/elsewhere", "") > 0 {
					t.Error("a redirect was followed")
				}
				clear(f.status)
				clear(f.bodies)
			})
			r.wait("the end of the gap", func(s registrytest.State) bool { return s.Gap == nil && len(s.Gaps) == 0 })
		})
	}
}

// endless is an answer without an end.
type endless struct{}

func (endless) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

func (endless) Close() error { return nil }

func (e endless) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: e, Request: r}, nil
}

func TestEndlessAnswer(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	env := f.env()
	env.Credentials = func() (registry.Credentials, error) { return nil, nil }
	a := f.api(f.settings(env))
	a.timeout, a.http.Transport, a.secret = time.Minute, endless{}, ""
	err := a.get(t.Context(), "list", key{}, "/v1/ns/service/list", url.Values{}, nil)
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("got %v", err)
	}
}

// TestRate: a big registry is not read faster than the limit.
func TestRate(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(2000)
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = time.Minute })
	if s := r.loaded(); len(s.Services) != 2000 {
		t.Fatalf("%d services", len(s.Services))
	}
	f.edit(func() {
		if n := f.count(instancePath, ""); n != 2000 {
			t.Errorf("%d requests for 2,000 services", n)
		}
		if n := busiest(f.seen, 500*time.Millisecond); n > maxRate/2+25 {
			t.Errorf("%d requests in half a second", n)
		}
	})
}

// TestRequestsAtOnce: some, of a server that takes its time, but few.
func TestRequestsAtOnce(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(80)
	f.edit(func() { f.delay = 100 * time.Millisecond })
	runHTTP(t, f.entry(), f.env()).loaded()
	f.edit(func() {
		if f.most < concurrency/4 || f.most > concurrency/2 {
			t.Errorf("%d requests at once", f.most)
		}
	})
}

// TestRounds: when nothing changes each service is asked for once per interval, without haste, and nothing new is told.
func TestRounds(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(50)
	f.put("service-0007", up("10.0.0.1"), up("10.0.0.2"), up("10.0.0.3"))
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.interval = time.Second })
	before := len(r.loaded().Events)
	began := time.Now()
	f.edit(func() { f.seen = nil })
	r.wait("two more listings", func(s registrytest.State) bool { return since(s, before, registrytest.Synced) == 2 })
	took := time.Since(began)
	unchanged(t, r.State(), before, "while nothing happened")
	f.edit(func() {
		lists := 0
		for _, q := range f.seen {
			if q.path == listPath && q.size != "1" {
				lists++
			}
		}
		if lists > 3 {
			t.Errorf("%d listings in %v", lists, took)
		}
		for k := range f.services {
			if n := f.count(instancePath, k.id()); n > 3 {
				t.Errorf("%d requests for %s in %v", n, k.id(), took)
			}
		}
		if n := busiest(f.seen, 100*time.Millisecond); n > 25 {
			t.Errorf("%d requests in 100 ms, of 50 in 0.8 s", n)
		}
	})
}

// busiest is the greatest number of requests in any span of that length.
func busiest(seen []seenRequest, span time.Duration) int {
	most, first := 0, 0
	for i, r := range seen {
		for r.at.Sub(seen[first].at) > span {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// TestBudgetIsShared: entries that read one server do not ask more of it at once than one server is asked, and a login does
// not wait for a part of the budget that waits for the login.
func TestBudgetIsShared(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(50)
	f.edit(func() { f.auth, f.delay = true, 10*time.Millisecond })
	env := f.env()
	var runs []*running
	for range 4 {
		runs = append(runs, runHTTP(t, f.entry(), env))
	}
	for _, r := range runs {
		r.loaded()
	}
	f.edit(func() {
		if f.most > concurrency {
			t.Errorf("%d requests at once", f.most)
		}
	})
	f.edit(func() { clear(f.tokens) }) // all log in again at once
	var before []int
	for _, r := range runs {
		before = append(before, len(r.State().Events))
	}
	for i, r := range runs {
		r.wait("more listings", func(s registrytest.State) bool { return since(s, before[i], registrytest.Synced) > 2 && s.Gap == nil })
	}
}

func TestFailover(t *testing.T) {
	t.Parallel()
	a, b := newHTTPFake(t), newHTTPFake(t)
	a.fill(3)
	b.fill(3)
	e := a.entry()
	e.Domain += "," + b.address
	r := runHTTP(t, e, a.env())
	n := len(r.loaded().Events)
	first, second := a, b
	a.edit(func() {
		if len(a.seen) == 0 {
			first, second = b, a
		}
	})
	second.edit(func() {
		if len(second.seen) > 0 {
			t.Error("both servers are asked")
		}
	})
	first.stop()
	s := r.wait("a sync at the other server", func(s registrytest.State) bool {
		return since(s, n, registrytest.Fail) > 0 && s.Gap == nil
	})
	unchanged(t, s, n, "failover")
	n = len(s.Events)
	// It stays where it is, also when the first one is back.
	first.edit(func() { first.seen = nil })
	first.start()
	s = r.wait("more listings", func(s registrytest.State) bool { return since(s, n, registrytest.Synced) > 5 })
	if since(s, n, registrytest.Fail) > 0 {
		t.Error("a gap without a reason")
	}
	first.edit(func() {
		if len(first.seen) > 0 {
			t.Error("it went back to the first server")
		}
	})
}

// TestBlackHole: a server that takes no connection, and says nothing, holds up neither the end of Run nor another server.
func TestBlackHole(t *testing.T) {
	hole, f := blackHole(t), newHTTPFake(t)
	f.fill(1)
	e := f.entry()
	e.Domain = hole + "," + hole + "," + f.address
	r := runHTTP(t, e, f.env(), func(s *settings) { s.timeout = time.Second })
	r.loaded()

	alone := f.entry()
	alone.Domain = hole
	r = runHTTP(t, alone, f.env(), func(s *settings) { s.timeout = 500 * time.Millisecond })
	s := r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	if s.Synced || !strings.Contains(s.Gap.Error(), hole) {
		t.Errorf("synced %v, gap %v", s.Synced, s.Gap)
	}
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > time.Second {
		t.Errorf("it took %v to end", took)
	}
	buf := make([]byte, 1<<20)
	for deadline := time.Now().Add(time.Second); strings.Contains(string(buf[:runtime.Stack(buf, true)]), "net.(*Dialer).DialContext"); {
		if time.Now().After(deadline) {
			t.Fatal("connections are still tried once Run has returned")
		}
	}
}

// blackHole is an address at which connections are never accepted.
func blackHole(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
	for range 10 { // until its queue is full
		c, err := net.DialTimeout("tcp", address, 100*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Skip("connections are accepted although nobody does that")
	return ""
}

// TestNoTLSAtTheServer: the handshake is never answered.
func TestNoTLSAtTheServer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f := newTLSHTTPFake(t)
	e, env := f.entry(), f.env()
	e.Domain = l.Addr().String()
	trust := f.trust()
	env.ClientTLS = tlsOf(trust)
	r := runHTTP(t, e, env, func(s *settings) { s.timeout = 300 * time.Millisecond })
	r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	r.stop()
	accepted := 0
	for {
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(100 * time.Millisecond))
		c, err := l.Accept()
		if err != nil {
			break
		}
		accepted++
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(limit))
		if _, err := io.Copy(io.Discard, c); err != nil { // until the other side closes it
			t.Errorf("a connection stayed: %v", err)
		}
	}
	if accepted == 0 {
		t.Error("there was no connection")
	}
}

func TestCertificateOfAnother(t *testing.T) {
	f, other := newTLSHTTPFake(t), newTLSHTTPFake(t)
	env := f.env()
	trust := other.trust()
	trust.ServerName = "nacos.example.org"
	env.ClientTLS = tlsOf(trust)
	r := runHTTP(t, f.entry(), env)
	s := r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	if s.Synced {
		t.Error("a server with another's certificate was read")
	}
	f.edit(func() {
		if len(f.seen) > 0 {
			t.Error("it was sent a request")
		}
	})
}

func TestNoConnectionStays(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(*httpFake){
		"at rest":             func(*httpFake) {},
		"in a request":        func(f *httpFake) { f.hanging = true },
		"in an answer":        func(f *httpFake) { f.delay = time.Second },
		"without any answers": func(f *httpFake) { f.status[listPath] = 500 },
	} {
		t.Run(name, func(t *testing.T) {
			f := newHTTPFake(t)
			f.fill(20)
			directory := newDirectory(t)
			directory.list(f.address)
			e := f.entry()
			e.NacosAddressServer = directory.server.URL
			r := runHTTP(t, e, f.env())
			r.loaded()
			n := 0
			f.edit(func() {
				edit(f)
				n = len(f.seen)
			})
			f.await("another request", func() bool { return len(f.seen) > n })
			r.stop()
			f.await("the end of all connections", func() bool { return len(f.conns) == 0 })
			f.await("the end of the connections to the address server", func() bool { return directory.conns.Load() == 0 })
		})
	}
}

// TestNoProxy: a proxy of the environment is asked neither for a server nor for the address server.
func TestNoProxy(t *testing.T) {
	hits := func() string {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: limit}
		resp, err := client.Get(os.Getenv("HTTP_PROXY") + "/registrytest-hits")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status, err)
		}
		return string(b)
	}
	before := hits()
	f := newHTTPFake(t)
	e := f.entry()
	e.Domain, e.NacosAddressServer = "nacos.invalid", "directory.invalid"
	r := runHTTP(t, e, f.env())
	r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	e.Domain = ""
	r = runHTTP(t, e, f.env())
	r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	if after := hits(); after != before {
		t.Errorf("the proxy had %s requests before, and %s after", before, after)
	}
}

// TestMetadata: all of it becomes labels, whatever the protocol.
func TestMetadata(t *testing.T) {
	f := newHTTPFake(t)
	h := up("10.0.0.1")
	h.Metadata, h.ClusterName = map[string]string{"a": "1", "version": "v2"}, "c1"
	f.put("order", h)
	s := runHTTP(t, f.entry(), f.env()).loaded()
	got := s.Services["DEFAULT_GROUP@@order"].Instances[0]
	if want := labels.FromMap(map[string]string{"a": "1", "version": "v2", "nacos.cluster": "c1"}); got.Metadata != want {
		t.Errorf("got %v", got.Metadata.Map())
	}
}
