package consul

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

const goodToken = "0a1b2c3d-secret-token-of-the-tests"

const catalogPath = "/v1/catalog/services"

// fake speaks the part of Consul's HTTP API that the adapter uses, as an agent 1.15.4 was seen to: an index per service,
// one of the catalog, which a check's change leaves alone, one of all checks; blocking queries; policies; the limit of
// connections.
type fake struct {
	t *testing.T

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	index    uint64        // the newest of all
	catalog  uint64
	checks   uint64
	services map[string]*fakeService
	policies map[string]policy // by token
	contact  time.Duration     // X-Consul-LastContact
	leader   bool
	status   map[string]int     // path prefix -> status in place of an answer
	text     string             // the body of such an answer
	longest  int                // bytes of such a body
	endless  map[string]endless // path -> what is sent in place of the answer's body
	cleaning bool               // redirects paths that are not clean, as routers of old do
	parted   func(*fake)        // called once, between two requests for the catalog, whose connection then ends
	paths    map[net.Conn]string
	hanging  bool
	hangAt   int
	hung     chan struct{}
	seen     int
	waiting  int // blocking queries
	listing  int // blocking queries for the catalog
	streamed int // answers from streams
	// tokenless counts requests without a token.
	tokenless int
	bare      bool // no headers of Consul
	streams   bool // streams even what it cannot
	queries   []string
	conns     map[net.Conn]bool // whether the connection was one too many
	most      int               // connections at once
	allowed   int               // connections at once before requests are refused
	busy      int               // blocking queries at once before the catalog is refused, if above 0

	address string
	tls     *tls.Config
	server  *httptest.Server
}

// endless is a body that never ends.
type endless struct {
	first string
	more  func(n int) string // for n from 0 on
}

// to writes the body until nobody reads on, and returns how much of it was written.
func (e endless) to(w io.Writer) int {
	size, err := io.WriteString(w, e.first)
	for n := 0; err == nil; n++ {
		var more int
		more, err = io.WriteString(w, e.more(n))
		size += more
	}
	return size
}

type fakeService struct {
	index     uint64
	checks    uint64 // when a check last changed
	instances []fakeInstance
}

type fakeInstance struct {
	node string
	tags []string
	registry.Instance
	nodeAddress string
	warning     bool
	warnWeight  int
	unchecked   bool // it has no checks
}

// policy is what a token may read.
type policy struct {
	services func(name string) bool
	nodes    bool
	hidden   string // a node that it may not read though it may read others
}

var readAll = policy{services: func(string) bool { return true }, nodes: true}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{
		t: t, changed: make(chan struct{}), leader: true, allowed: 200, status: map[string]int{}, conns: map[net.Conn]bool{},
		paths:    map[net.Conn]string{},
		policies: map[string]policy{goodToken: readAll},
	}
	f.wipe()
	f.start()
	t.Cleanup(f.stop)
	return f
}

// newTLSFake is a fake that is reached by TLS.
func newTLSFake(t *testing.T) *fake {
	t.Helper()
	f := newFake(t)
	f.stop()
	f.edit(func() { f.tls = &tls.Config{MinVersion: tls.VersionTLS12} })
	f.start()
	return f
}

// trust is the client's side of a TLS fake.
func (f *fake) trust() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(f.server.Certificate())
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

func (f *fake) start() {
	f.t.Helper()
	var l net.Listener
	var err error
	for deadline := time.Now().Add(5 * time.Second); ; {
		l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", cmp.Or(f.address, "127.0.0.1:0"))
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.server = &httptest.Server{Listener: l, Config: &http.Server{Handler: f, ConnState: f.connState, ReadHeaderTimeout: time.Minute}}
	f.server.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }
	if f.tls != nil {
		f.server.TLS = f.tls.Clone()
		f.server.EnableHTTP2 = true
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	f.address = l.Addr().String()
}

type connKey struct{}

func (f *fake) stop() {
	if f.server == nil {
		return
	}
	f.server.CloseClientConnections()
	f.server.Config.Close()
	f.server.Close()
	f.server = nil
}

// wipe makes the cluster a new one, in which only the server itself is registered.
func (f *fake) wipe() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.index, f.services = 10, map[string]*fakeService{}
	f.catalog, f.checks = f.index, f.index
	f.services["consul"] = &fakeService{index: f.index, instances: []fakeInstance{{
		node: "t", nodeAddress: "127.0.0.1", Instance: registry.Instance{Port: 8300, Weight: 1},
	}}}
	f.wake()
}

func (f *fake) wake() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// edit changes settings of the fake.
func (f *fake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fake) connState(c net.Conn, s http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s {
	case http.StateNew:
		f.conns[c] = f.tls == nil && len(f.conns) >= f.allowed
		f.most = max(f.most, len(f.conns))
	case http.StateIdle:
		if f.parted != nil && f.paths[c] == catalogPath {
			_ = c.Close() // after the answer, which a reset connection may lose
			f.parted(f)
			f.parted = nil
		}
	case http.StateClosed, http.StateHijacked:
		delete(f.conns, c)
		delete(f.paths, c)
	}
}

// replace puts another agent, of another cluster with a newer index, in the place of this one: it knows one service with
// one instance. What the old one had open breaks. It is called with the lock held, as cut is.
func (f *fake) replace() {
	f.index += 1000
	f.catalog, f.checks = f.index, f.index
	for name, s := range f.services {
		f.services[name] = &fakeService{index: f.index, checks: f.index, instances: s.instances[:1]}
	}
	delete(f.services, "old")
	f.cut()
}

// cut breaks all connections.
func (f *fake) cut() {
	for c := range f.conns {
		if secured, ok := c.(*tls.Conn); ok {
			c = secured.NetConn()
		}
		_ = c.(*net.TCPConn).SetLinger(0)
		_ = c.Close()
	}
}

// set is Set of the suite.
func (f *fake) set(name string, instances ...registry.Instance) {
	list := make([]fakeInstance, len(instances))
	for i, in := range instances {
		list[i] = fakeInstance{node: "node-" + in.Address, nodeAddress: in.Address, Instance: in}
	}
	f.setInstances(name, list...)
}

func (f *fake) setInstances(name string, list ...fakeInstance) {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := f.services[name]
	if old == nil && len(list) == 0 {
		return
	}
	f.index++
	now := &fakeService{index: f.index, checks: f.index, instances: list}
	if old == nil || old.registered() != now.registered() {
		f.catalog = f.index
	}
	if old != nil && old.checked() == now.checked() {
		now.checks = old.checks
	} else {
		f.checks = f.index
	}
	if len(list) == 0 {
		delete(f.services, name)
	} else {
		f.services[name] = now
	}
	f.wake()
}

// registered is all of a service but its checks: a change of it shows in the catalog's index.
func (s *fakeService) registered() string {
	l := slices.Clone(s.instances)
	for i := range l {
		l[i].Unhealthy, l[i].Disabled, l[i].warning = false, false, false
	}
	return fmt.Sprint(l)
}

// checked is all of a service's checks: a change of it shows in the index of all checks.
func (s *fakeService) checked() string {
	var out []any
	for _, i := range s.instances {
		out = append(out, i.Address, i.Unhealthy, i.Disabled, i.warning)
	}
	return fmt.Sprint(out)
}

// dropNode removes a node with all its instances, of any services, as one change.
func (f *fake) dropNode(node string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.index++
	f.catalog = f.index
	for name, s := range f.services {
		left := slices.DeleteFunc(slices.Clone(s.instances), func(i fakeInstance) bool { return i.node == node })
		if len(left) < len(s.instances) {
			f.services[name] = &fakeService{index: f.index, checks: s.checks, instances: left}
		}
	}
	f.wake()
}

func (f *fake) remove(name string) { f.set(name) }

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.seen++
	if r.Header.Get("X-Consul-Token") == "" {
		f.tokenless++
	}
	f.queries = append(f.queries, r.URL.Path+"?"+r.URL.RawQuery)
	hang := f.hanging
	if f.hung != nil {
		if f.hangAt--; f.hangAt == 0 {
			hang = true
			close(f.hung)
			f.hung = nil
		}
	}
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	f.paths[conn] = r.URL.Path
	crowded := f.conns[conn] || f.busy > 0 && f.waiting > f.busy && r.URL.Path == catalogPath
	code, text := f.spoiled(r)
	cleaning := f.cleaning && path.Clean(r.URL.Path) != r.URL.Path
	f.mu.Unlock()
	switch {
	case hang:
		<-r.Context().Done()
	case crowded:
		w.Header().Set("Connection", "close")
		http.Error(w, "Your IP is issuing too many concurrent connections, please rate limit your calls", http.StatusTooManyRequests)
	case code != 0:
		http.Error(w, text, code)
	case cleaning:
		http.Redirect(w, r, path.Clean(r.URL.Path), http.StatusTemporaryRedirect)
	default:
		f.answer(w, r)
	}
}

// spoiled gives the status, and the text, that stand in place of the answer; 0 means that the answer is good.
func (f *fake) spoiled(r *http.Request) (code int, text string) {
	for prefix, c := range f.status {
		if strings.HasPrefix(r.URL.Path, prefix) {
			code = c
		}
	}
	return code, cmp.Or(f.text, "the test says so")
}

func (f *fake) answer(w http.ResponseWriter, r *http.Request) {
	after, _ := strconv.ParseUint(r.FormValue("index"), 10, 64)
	wait, _ := time.ParseDuration(r.FormValue("wait"))
	timeout := time.NewTimer(wait + wait/32)
	defer timeout.Stop()
	expired := after == 0
	for {
		f.mu.Lock()
		if code, text := f.spoiled(r); code != 0 { // since the query began to wait
			f.mu.Unlock()
			http.Error(w, text, code)
			return
		}
		index, body, filtered, code := f.look(r)
		if code == 0 && index <= after && !expired {
			changed := f.changed
			f.waiting++
			if r.URL.Path == catalogPath {
				f.listing++
			}
			f.mu.Unlock()
			select {
			case <-changed:
			case <-timeout.C:
				expired = true
			case <-r.Context().Done():
			}
			f.edit(func() {
				f.waiting--
				if r.URL.Path == catalogPath {
					f.listing--
				}
			})
			if r.Context().Err() != nil {
				return
			}
			continue
		}
		h := w.Header()
		h.Set("X-Consul-Default-Acl-Policy", "deny")
		if code == 0 && !f.bare {
			h.Set("X-Consul-Index", strconv.FormatUint(index, 10))
			h.Set("X-Consul-Query-Backend", "blocking-query")
			h.Set("X-Consul-Knownleader", strconv.FormatBool(f.leader))
			h.Set("X-Consul-Lastcontact", strconv.FormatInt(f.contact.Milliseconds(), 10))
			if filtered {
				h.Set("X-Consul-Results-Filtered-By-Acls", "true")
			}
			if strings.HasPrefix(r.URL.Path, "/v1/health/service/") && after > 0 && (f.streams || r.FormValue("near") == "") {
				f.streamed++
				h.Set("X-Consul-Query-Backend", "streaming")
				h.Set("X-Consul-Knownleader", "false")
				h.Del("X-Consul-Results-Filtered-By-Acls")
			}
		}
		text, instead := "", f.endless[r.URL.Path]
		if instead.more == nil {
			text = body()
		}
		f.mu.Unlock()
		if instead.more != nil {
			size := instead.to(w)
			f.edit(func() { f.longest = max(f.longest, size) })
			return
		}
		if code != 0 {
			http.Error(w, text, code)
			return
		}
		_, _ = fmt.Fprintln(w, text)
		return
	}
}

// look gives the present answer to a request, whose body is only made for whoever sends it.
func (f *fake) look(r *http.Request) (index uint64, body func() string, filtered bool, code int) {
	token := r.Header.Get("X-Consul-Token")
	p, ok := f.policies[token]
	if !ok && token != "" {
		return 0, func() string { return "ACL not found" }, false, http.StatusForbidden
	}
	if p.services == nil {
		p.services = func(string) bool { return false }
	}
	visible := func(name string, i fakeInstance) bool { return p.services(name) && p.nodes && i.node != p.hidden }
	name, isService := strings.CutPrefix(r.URL.Path, "/v1/health/service/")
	switch {
	case r.URL.Path == catalogPath:
		out := map[string][]string{}
		for n, s := range f.services {
			if !p.services(n) {
				filtered = true
				continue
			}
			out[n] = []string{}
			for _, i := range s.instances {
				out[n] = append(out[n], i.tags...)
			}
		}
		index, body = f.catalog, func() string { return encode(out) }
	case r.URL.Path == "/v1/health/state/any":
		index, body = f.checks, func() string {
			out := []map[string]any{}
			for n, s := range f.services {
				for _, i := range s.instances {
					if !visible(n, i) {
						continue
					}
					for _, c := range i.checksOf(n) {
						c["ModifyIndex"] = s.checks
						out = append(out, c)
					}
				}
			}
			return encode(out)
		}
	case isService:
		s := f.services[name]
		if s == nil {
			return max(f.catalog, f.checks), func() string { return "[]" }, false, 0
		}
		filtered = slices.ContainsFunc(s.instances, func(i fakeInstance) bool { return !visible(name, i) })
		index, body = s.index, func() string {
			out := []any{}
			for _, i := range s.instances {
				if visible(name, i) {
					out = append(out, i.entry(name))
				}
			}
			return encode(out)
		}
	default:
		return 0, func() string { return "no such path" }, false, http.StatusNotFound
	}
	return index, body, filtered && token != "", 0
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (i fakeInstance) id(name string) string {
	return name + "-" + i.Address + "-" + strconv.Itoa(int(i.Port))
}

func (i fakeInstance) checksOf(name string) []map[string]any {
	if i.unchecked {
		return []map[string]any{}
	}
	out := []map[string]any{{
		"Node": i.node, "CheckID": "serfHealth", "Name": "Serf Health Status", "Status": "passing", "ServiceID": "", "ServiceName": "",
		"Output": "Agent alive and reachable", "ServiceTags": []string{}, "Definition": map[string]any{},
	}}
	status := "passing"
	if i.warning {
		status = "warning"
	}
	if i.Unhealthy {
		status = "critical"
	}
	out = append(out, map[string]any{
		"Node": i.node, "CheckID": "service:" + i.id(name), "Name": "web", "Status": status, "ServiceID": i.id(name),
		"ServiceName": name, "Definition": map[string]any{},
	})
	if i.Disabled {
		out = append(out, map[string]any{
			"Node": i.node, "CheckID": "_service_maintenance:" + i.id(name), "Name": "Service Maintenance Mode", "Status": "critical",
			"Notes": "work", "ServiceID": i.id(name), "ServiceName": name, "Definition": map[string]any{"Interval": "0s", "Timeout": "0s"},
		})
	}
	return out
}

func (i fakeInstance) entry(name string) map[string]any {
	address := i.Address
	if address == i.nodeAddress && address == "127.0.0.1" {
		address = ""
	}
	return map[string]any{
		"Node": map[string]any{
			"ID": "", "Node": i.node, "Address": i.nodeAddress, "Datacenter": "dc1", "TaggedAddresses": nil, "Meta": nil,
		},
		"Service": map[string]any{
			"ID": i.id(name), "Service": name, "Tags": i.tags, "Address": address, "Meta": i.Metadata.Map(), "Port": i.Port,
			"Weights": map[string]int{"Passing": int(i.Weight), "Warning": i.warnWeight},
			"Proxy":   map[string]any{"Mode": "", "MeshGateway": map[string]any{}, "Expose": map[string]any{}}, "Connect": map[string]any{},
		},
		"Checks": i.checksOf(name),
	}
}

// entry is the entry that reads the fake.
func (f *fake) entry() registry.Entry {
	return registry.Entry{Type: "consul", Name: "test", Domain: f.address, AuthSecretName: "consul"}
}

// asked counts the requests for a path so far, with the lock held.
func (f *fake) asked(path string) int {
	n := 0
	for _, q := range f.queries {
		if strings.HasPrefix(q, path+"?") {
			n++
		}
	}
	return n
}

func (f *fake) requests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen
}

// backend is the fake as the suite wants it.
func (f *fake) backend() registrytest.Backend {
	return registrytest.Backend{
		Entry:       f.entry(),
		Credentials: registry.Credentials{"consulToken": goodToken},
		Own:         []string{"consul"},
		Set:         f.set,
		Remove:      f.remove,
		Stop:        f.stop,
		Restart:     f.start,
		Wipe: func() {
			f.stop()
			f.wipe()
			f.start()
		},
		Refuse: func(on bool) {
			f.edit(func() {
				f.policies = map[string]policy{goodToken: readAll}
				if on {
					f.policies = map[string]policy{}
				}
			})
		},
		Hang: func(on bool) { f.edit(func() { f.hanging = on }) },
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.edit(func() { f.hangAt, f.hung = n, hung })
			return hung
		},
		Requests: f.requests,
		EntryAt: func(hostport string) registry.Entry {
			e := f.entry()
			e.Domain = hostport
			return e
		},
	}
}

// await waits until ok, which sees the fake unchanged, is true.
func (f *fake) await(what string, ok func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(limit); ; runtime.Gosched() {
		done := false
		f.edit(func() { done = ok() })
		switch {
		case done:
			return
		case time.Now().After(deadline):
			f.t.Fatalf("waited in vain for %s", what)
		}
	}
}
