package nacos

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func tlsOf(c *tls.Config) func() (*tls.Config, error) {
	return func() (*tls.Config, error) { return c.Clone(), nil }
}

// directory is an address server.
type directory struct {
	server *httptest.Server

	mu    sync.Mutex
	code  int
	body  string
	hang  bool
	asked int
	query string
	names http.Header
	conns atomic.Int32
}

func newDirectory(t *testing.T) *directory {
	t.Helper()
	d := &directory{code: 200}
	d.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		code, body, hang := d.code, d.body, d.hang
		d.asked++
		d.query, d.names = r.URL.RawQuery, r.Header.Clone()
		d.mu.Unlock()
		switch {
		case hang:
			<-r.Context().Done()
		case r.URL.Path != "/nacos/serverlist":
			http.NotFound(w, r)
		default:
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(code)
			_, _ = w.Write([]byte(body))
		}
	}))
	d.server.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			d.conns.Add(1)
		case http.StateClosed, http.StateHijacked:
			d.conns.Add(-1)
		}
	}
	d.server.Start()
	t.Cleanup(func() {
		d.server.CloseClientConnections()
		d.server.Close()
	})
	return d
}

func (d *directory) edit(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

func (d *directory) list(servers ...string) {
	d.edit(func() { d.code, d.body = 200, strings.Join(servers, "\n")+"\n" })
}

// wait waits until it has been asked n more times.
func (d *directory) wait(t *testing.T, n int) {
	t.Helper()
	first := -1
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		now := 0
		d.edit(func() { now = d.asked })
		if first < 0 {
			first = now
		}
		switch {
		case now >= first+n:
			return
		case time.Now().After(deadline):
			t.Fatal("the address server is not asked")
		}
	}
}

func newServersOf(t *testing.T, domain, address string) *servers {
	t.Helper()
	env := registry.Env{
		ClientTLS: func() (*tls.Config, error) { return nil, nil },
		Observe:   func(string, time.Duration, error) {},
	}
	f := &httpFake{t: t}
	full := f.env()
	full.ClientTLS, full.Observe = env.ClientTLS, env.Observe
	s, err := newServers(settingsOf(t, registry.Entry{Domain: domain, NacosAddressServer: address, NacosGroups: []string{"G"}}, full))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.close)
	return s
}

func TestServersByTurns(t *testing.T) {
	s := newServersOf(t, "a, b:1,[::1]:2 ,c", "")
	var first, second []string
	for n := range 8 {
		server, left, err := s.next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if want := n%4 != 3; left != want {
			t.Errorf("turn %d: others left %v", n, left)
		}
		if n < 4 {
			first = append(first, server.String())
		} else {
			second = append(second, server.String())
		}
	}
	if !slices.Equal(first, second) {
		t.Errorf("the order changed: %v, then %v", first, second)
	}
	slices.Sort(first)
	if want := []string{"[::1]:2", "a:8848", "b:1", "c:8848"}; !slices.Equal(first, want) {
		t.Errorf("got %v", first)
	}
	// Once one has worked, all the others can be tried before there is a pause.
	for range 2 {
		_, _, _ = s.next(t.Context())
	}
	s.works()
	for n := range 4 {
		if _, left, _ := s.next(t.Context()); left != (n < 3) {
			t.Errorf("after one worked, turn %d: others left %v", n, left)
		}
	}
}

func TestAddressServerAnswers(t *testing.T) {
	const good = "127.0.0.1:18848"
	for name, c := range map[string]struct {
		code int
		body string
		want []string // nil: refused
	}{
		"one":                  {200, "10.0.0.1", []string{"10.0.0.1:8848"}},
		"lines, blanks, ports": {200, "10.0.0.1:1 10.0.0.2\r\n\n[::1]:3\tnacos-3.nacos.svc\n", []string{"10.0.0.1:1", "10.0.0.2:8848", "[::1]:3", "nacos-3.nacos.svc:8848"}},
		"empty":                {200, "", nil},
		"blank":                {200, " \n\r\n", nil},
		"HTML":                 {200, "<html>login</html>", nil},
		"half an address":      {200, "10.0.0.1:8848\n10.0.0.2:", nil},
		"JSON":                 {200, `{"servers":["10.0.0.1"]}`, nil},
		"404":                  {404, "10.0.0.1", nil},
		"500":                  {500, "10.0.0.1", nil},
		"redirect":             {302, "10.0.0.1", nil},
		"password":             {200, "10.0.0.1 nacos:hunter2@10.0.0.2", nil},
		"too long":             {200, strings.Repeat("a\n", maxDirectory/2+2), nil},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirectory(t)
			d.edit(func() { d.code, d.body = c.code, c.body })
			s := newServersOf(t, "", d.server.URL)
			server, _, err := s.next(t.Context())
			if c.want == nil {
				if err == nil {
					t.Fatalf("believed, and gave %s", server)
				}
				if !strings.Contains(err.Error(), "address server "+d.server.Listener.Addr().String()) || strings.Contains(err.Error(), "hunter2") {
					t.Errorf("the error is %v", err)
				}
				// What is configured, or was listed before, is used.
				s = newServersOf(t, good, d.server.URL)
				if server, _, err := s.next(t.Context()); err != nil || server.String() != good {
					t.Errorf("with a server in domain: %s, %v", server, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := []string{server.String()}
			for len(got) < len(c.want) {
				server, _, _ := s.next(t.Context())
				got = append(got, server.String())
			}
			if slices.Sort(got); !slices.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
			d.edit(func() {
				if d.query != "namespace=public" || d.names.Get("Request-Module") != "Naming" || d.names.Get("Authorization") != "" {
					t.Errorf("asked with %s, %v", d.query, d.names)
				}
			})
		})
	}
}

func TestParseDirectory(t *testing.T) {
	for in, want := range map[string]string{
		"http://a:8080":         "http://a:8080/nacos/serverlist",
		"https://a/":            "https://a/nacos/serverlist",
		"a:8080":                "http://a:8080/nacos/serverlist",
		"10.0.0.1":              "http://10.0.0.1/nacos/serverlist",
		"http://a/sub?x=secret": "http://a/sub/nacos/serverlist",
	} {
		u, err := parseDirectory(in)
		if err != nil || u.String() != want {
			t.Errorf("%s: %v, %v", in, u, err)
		}
	}
	for _, in := range []string{"ftp://a", "http://", "://", "http://nacos:hunter2@a", "nacos:hunter2@a", "http://nacos:hunter2%40a:x", "/path?token=hunter2"} {
		if u, err := parseDirectory(in); err == nil {
			t.Errorf("%s: accepted as %s", in, u)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error repeats the password: %v", in, err)
		}
	}
}

// TestAddressServerMoves: it stays with a server as long as that is listed, and moves when it is not.
func TestAddressServerMoves(t *testing.T) {
	t.Parallel()
	a, b, d := newHTTPFake(t), newHTTPFake(t), newDirectory(t)
	a.fill(2)
	b.fill(2)
	d.list(a.address)
	e := a.entry()
	e.Domain, e.NacosAddressServer = "", d.server.URL
	r := runHTTP(t, e, a.env())
	n := len(r.loaded().Events)
	d.list(b.address, a.address)
	d.wait(t, 3)
	b.edit(func() {
		if len(b.seen) > 0 {
			t.Error("it moved although its server is listed")
		}
	})
	if s := r.State(); since(s, n, registrytest.Fail) > 0 {
		t.Errorf("a gap without a reason: %v", s.Gap)
	}
	d.list(b.address)
	b.await("the move", func() bool { return b.count(listPath, "") > 0 })
	s := r.wait("the sync at the new server", func(s registrytest.State) bool { return since(s, n, registrytest.Fail) > 0 && s.Gap == nil })
	unchanged(t, s, n, "move")
	for _, e := range s.Events[n:] {
		if e.Kind == registrytest.Fail && !errors.Is(e.Err, errMoved) {
			t.Errorf("the gap is %v", e.Err)
		}
	}
	a.await("the end of its connections", func() bool { return len(a.conns) == 0 })
}

// TestAddressServerFails: nothing that an address server does can take anything away.
func TestAddressServerFails(t *testing.T) {
	t.Parallel()
	f, d := newHTTPFake(t), newDirectory(t)
	f.fill(2)
	d.list(f.address)
	e := f.entry()
	e.Domain, e.NacosAddressServer = "", d.server.URL
	r := runHTTP(t, e, f.env(), func(s *settings) { s.timeout = 2 * time.Second })
	n := len(r.loaded().Events)
	for name, change := range map[string]func(){
		"HTML":         func() { d.body = "<html>" },
		"words":        func() { d.body = "not found" },
		"empty":        func() { d.body = "" },
		"half":         func() { d.body = "127.0.0.1:" },
		"dead servers": func() { d.body = "127.0.0.1:1" },
		"500":          func() { d.code = 500 },
		"hanging":      func() { d.hang = true },
	} {
		d.edit(func() {
			d.code, d.body, d.hang = 200, f.address, false
			change()
		})
		d.wait(t, 2)
		if s := r.State(); since(s, n, registrytest.Fail) > 0 {
			t.Fatalf("%s: a gap: %v", name, s.Gap)
		}
	}
	d.server.CloseClientConnections()
	d.server.Close()
	s := r.wait("more listings", func(s registrytest.State) bool { return since(s, n, registrytest.Synced) > 10 })
	if since(s, n, registrytest.Fail) > 0 {
		t.Errorf("a gap: %v", s.Gap)
	}
	unchanged(t, s, n, "without an address server")
	// And when the server fails too it is found again where it was.
	f.stop()
	r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	f.start()
	s = r.wait("the end of the gap", func(s registrytest.State) bool { return s.Gap == nil })
	unchanged(t, s, n, "after an outage without an address server")
}

func TestReachable(t *testing.T) {
	f := newHTTPFake(t)
	alive, err := registry.ParseServers("", "127.0.0.1:1,"+f.address, 0)
	if err != nil {
		t.Fatal(err)
	}
	if !reachable(t.Context(), alive) || reachable(t.Context(), alive[:1]) {
		t.Error("a dead server is reachable, or a living one is not")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if reachable(ctx, alive) {
		t.Error("reachable after the end of the context")
	}
}
