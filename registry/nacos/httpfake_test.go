package nacos

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
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

const (
	goodUser     = "mesh-reader"
	goodPassword = "s3cret & 100%40 of the tests"
	goodAccess   = "LTAI-access-key"
	goodSecret   = "secret-key-of-the-tests"

	listPath     = "/nacos/v1/ns/service/list"
	instancePath = "/nacos/v1/ns/instance/list"

	// limit is how long a test waits for what must happen.
	limit = 15 * time.Second
)

// httpFake speaks the part of Nacos's HTTP API that the adapter uses, in the forms in which the servers 1.4.1, 2.3.2 and
// 3.1.0 were seen to answer: login, the list of a group's services with pages, a service's instances.
type httpFake struct {
	t *testing.T

	mu       sync.Mutex
	version  string
	auth     bool
	users    map[string]string // passwords by user
	denied   map[string]bool   // users that may log in, and read nothing
	keys     map[string]string // secret keys by access key
	tokens   map[string]fakeLogin
	ttl      time.Duration
	logins   map[string]int // login paths that there are, by path, and how often they were asked
	tenant   string
	services map[key][]host

	// What a real server cannot be made to do.
	status  map[string]int    // an answer's status by path
	headers map[string]string // of such answers
	bodies  map[string]string // an answer's body by path
	listing func(group string, page, size int, names []string) (doms []string, count int)
	silent  map[string]bool // ids of services that are never answered for
	delay   time.Duration   // of answers about services

	hanging bool
	hangAt  int
	hung    chan struct{}
	seen    []seenRequest
	busy    int // requests for instances under way
	most    int
	conns   map[net.Conn]bool

	address string
	tls     *tls.Config
	server  *httptest.Server
}

// fakeLogin is a login.
type fakeLogin struct {
	user string
	over time.Time
}

type seenRequest struct {
	at    time.Time
	path  string
	about string // the id of a service, or the name of a group
	size  string // of a page
	code  int    // of the answer, 0 while there is none
}

func newHTTPFake(t *testing.T) *httpFake {
	t.Helper()
	f := &httpFake{
		t: t, version: "1.4.1", tenant: "public", ttl: 5 * time.Hour,
		users: map[string]string{goodUser: goodPassword}, denied: map[string]bool{}, keys: map[string]string{goodAccess: goodSecret},
		tokens: map[string]fakeLogin{}, services: map[key][]host{},
		logins: map[string]int{"/nacos/v1/auth/login": 0, "/nacos/v1/auth/users/login": 0},
		status: map[string]int{}, headers: map[string]string{}, bodies: map[string]string{}, silent: map[string]bool{}, conns: map[net.Conn]bool{},
	}
	f.start()
	t.Cleanup(f.stop)
	return f
}

// newTLSHTTPFake is a fake that is reached by TLS.
func newTLSHTTPFake(t *testing.T) *httpFake {
	t.Helper()
	f := newHTTPFake(t)
	f.stop()
	f.tls = &tls.Config{MinVersion: tls.VersionTLS12}
	f.start()
	return f
}

// trust is the client's side of a TLS fake.
func (f *httpFake) trust() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(f.server.Certificate())
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
}

func (f *httpFake) start() {
	f.t.Helper()
	var l net.Listener
	var err error
	for deadline := time.Now().Add(limit); ; {
		l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", cmp.Or(f.address, "127.0.0.1:0"))
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.server = &httptest.Server{Listener: l, Config: &http.Server{Handler: f, ConnState: f.connState, ReadHeaderTimeout: time.Minute}}
	if f.tls != nil {
		f.server.TLS = f.tls.Clone()
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	f.address = l.Addr().String()
}

func (f *httpFake) stop() {
	if f.server == nil {
		return
	}
	f.server.CloseClientConnections()
	f.server.Config.Close()
	f.server.Close()
	f.server = nil
}

// edit changes the fake.
func (f *httpFake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// await waits until ok, which sees the fake unchanged, is true.
func (f *httpFake) await(what string, ok func() bool) {
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

func (f *httpFake) connState(c net.Conn, s http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s {
	case http.StateNew:
		f.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(f.conns, c)
	}
}

// count counts the requests for a path so far, with the lock held; about narrows it down if it is not empty.
func (f *httpFake) count(path, about string) int {
	n := 0
	for _, r := range f.seen {
		if r.path == path && (about == "" || r.about == about) {
			n++
		}
	}
	return n
}

func (f *httpFake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm() // all of the request: only then is it noticed that the client goes away
	f.mu.Lock()
	n := len(f.seen)
	about := cmp.Or(r.FormValue("serviceName"), r.FormValue("groupName"))
	f.seen = append(f.seen, seenRequest{at: time.Now(), path: r.URL.Path, about: about, size: r.FormValue("pageSize")})
	hang := f.hanging || r.URL.Path == instancePath && f.silent[about]
	if f.hung != nil {
		if f.hangAt--; f.hangAt == 0 {
			hang = true
			close(f.hung)
			f.hung = nil
		}
	}
	var delay time.Duration
	if r.URL.Path == instancePath {
		f.busy++
		f.most = max(f.most, f.busy)
		delay = f.delay
	}
	f.mu.Unlock()
	if delay > 0 {
		late := time.NewTimer(delay)
		defer late.Stop()
		select {
		case <-late.C:
		case <-r.Context().Done():
		}
	}
	if hang {
		<-r.Context().Done()
	}
	f.mu.Lock()
	code, typ, body := http.StatusOK, "application/json;charset=UTF-8", f.bodies[r.URL.Path]
	switch {
	case f.status[r.URL.Path] != 0:
		code = f.status[r.URL.Path]
		for k, v := range f.headers {
			w.Header().Set(k, v)
		}
	case body == "":
		code, typ, body = f.answer(r)
	}
	f.seen[n].code = code
	if r.URL.Path == instancePath {
		f.busy--
	}
	f.mu.Unlock()
	w.Header().Set("Content-Type", typ)
	w.WriteHeader(code)
	_, _ = w.Write([]byte(body))
}

// answer gives the answer of a server in good health, with the lock held.
func (f *httpFake) answer(r *http.Request) (code int, typ, body string) {
	const text, object = "text/plain;charset=UTF-8", "application/json;charset=UTF-8"
	path := r.URL.Path
	if _, ok := f.logins[path]; ok && r.Method == http.MethodPost {
		f.logins[path]++
		user := r.PostFormValue("username")
		if password, ok := f.users[user]; !ok || password != r.PostFormValue("password") {
			switch {
			case strings.HasPrefix(f.version, "1."):
				return http.StatusForbidden, text, "unknown user!"
			case strings.HasPrefix(f.version, "2."):
				return http.StatusForbidden, text, "user not found!"
			default:
				return http.StatusInternalServerError, object, f.refusal(500, "No message available", path)
			}
		}
		token := "token-" + strconv.Itoa(len(f.tokens)) + "-of-" + user
		f.tokens[token] = fakeLogin{user, time.Now().Add(f.ttl)}
		return http.StatusOK, object, encode(map[string]any{
			"accessToken": token, "tokenTtl": int(f.ttl.Seconds()), "globalAdmin": false, "username": user,
		})
	}
	if strings.Contains(path, "/auth/") {
		code := http.StatusNotFound
		if strings.HasPrefix(f.version, "3.") {
			code = http.StatusGone
		}
		return code, object, f.refusal(code, "no such path", path)
	}
	if message := f.refuse(r); message != "" {
		return http.StatusForbidden, object, f.refusal(403, message, path)
	}
	names := []string{}
	group := cmp.Or(r.FormValue("groupName"), "DEFAULT_GROUP")
	if cmp.Or(r.FormValue("namespaceId"), "public") == f.tenant {
		for k := range f.services {
			if k.group == group {
				names = append(names, k.name)
			}
		}
	}
	switch path {
	case listPath:
		page, err := strconv.Atoi(r.FormValue("pageNo"))
		if err != nil {
			return http.StatusBadRequest, text, "caused: Param 'pageNo' is required.;"
		}
		size, err := strconv.Atoi(r.FormValue("pageSize"))
		if err != nil {
			return http.StatusBadRequest, text, "caused: Param 'pageSize' is required.;"
		}
		slices.SortFunc(names, func(a, b string) int { return cmp.Compare(hash(a), hash(b)) })
		doms, count := pageOf(names, page, size), len(names)
		if f.listing != nil {
			doms, count = f.listing(group, page, size, names)
		}
		return http.StatusOK, object, encode(map[string]any{"doms": doms, "count": count})
	case instancePath:
		name := strings.TrimPrefix(r.FormValue("serviceName"), group+"@@")
		if name == "" {
			return http.StatusBadRequest, text, "caused: Param 'serviceName' is required.;"
		}
		var hosts []host
		if slices.Contains(names, name) {
			hosts = f.services[key{group, name}]
		}
		return http.StatusOK, object, f.list(key{group, name}, hosts, slices.Contains(names, name))
	default:
		return http.StatusNotFound, object, f.refusal(404, "no such path", path)
	}
}

// pageOf cuts a page, counted from 1, out of a list.
func pageOf(names []string, page, size int) []string {
	from := min((page-1)*size, len(names))
	return names[from:min(from+size, len(names))]
}

func hash(s string) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(s))
	return h.Sum32()
}

// refuse tells why a request is refused; empty means that it is not.
func (f *httpFake) refuse(r *http.Request) string {
	if !f.auth {
		return ""
	}
	code := func(n int, message string) string {
		if strings.HasPrefix(f.version, "3.") {
			return fmt.Sprintf("Code: %d, Message: %s", n, message)
		}
		return message
	}
	if secret := f.keys[r.FormValue("ak")]; secret != "" {
		mac := hmac.New(sha1.New, []byte(secret))
		mac.Write([]byte(r.FormValue("data")))
		at, about, _ := strings.Cut(r.FormValue("data"), "@@")
		ms, _ := strconv.ParseInt(at, 10, 64)
		age := time.Since(time.UnixMilli(ms)).Abs()
		if base64.StdEncoding.EncodeToString(mac.Sum(nil)) == r.FormValue("signature") && about == r.FormValue("serviceName") && age < time.Minute {
			return ""
		}
		return code(403, "authorization failed!")
	}
	token := cmp.Or(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), r.FormValue("accessToken"))
	if token == "" {
		switch f.version[0] {
		case '1':
			return "unknown user!"
		case '2':
			return "user not found!"
		default:
			return code(401, "User not found! Please check user exist or password is right!")
		}
	}
	login, ok := f.tokens[token]
	switch {
	case !ok || f.version[0] != '3' && time.Now().After(login.over):
		return code(401, "token invalid!")
	case time.Now().After(login.over):
		return code(401, "token expired!")
	case f.denied[login.user]:
		return code(403, "authorization failed!")
	}
	return ""
}

func (f *httpFake) refusal(status int, message, path string) string {
	return encode(map[string]any{
		"timestamp": "2026-11-23T10:00:00.000+0000", "status": status, "error": http.StatusText(status), "message": message, "path": path,
	})
}

// list is the answer about one service. Disabled instances are not in it.
func (f *httpFake) list(k key, hosts []host, known bool) string {
	answer := map[string]any{"name": k.id(), "clusters": "", "cacheMillis": 3000}
	out := []any{}
	if n := len(hosts); n > 0 { // in another order each time
		n = len(f.seen) % n
		hosts = append(slices.Clone(hosts[n:]), hosts[:n]...)
	}
	for _, h := range hosts {
		if !h.Enabled {
			continue
		}
		metadata := h.Metadata
		if metadata == nil {
			metadata = map[string]string{}
		}
		one := map[string]any{
			"ip": h.IP, "port": h.Port, "weight": h.Weight, "healthy": h.Healthy, "enabled": true, "ephemeral": true, "metadata": metadata,
			"clusterName": cmp.Or(h.ClusterName, "DEFAULT"), "serviceName": k.name,
			"instanceId": fmt.Sprintf("%s#%d#%s#%s", h.IP, h.Port, cmp.Or(h.ClusterName, "DEFAULT"), k.id()),
		}
		if f.version[0] == '1' {
			one["valid"], one["marked"] = h.Healthy, false
		} else {
			one["serviceName"], one["instanceHeartBeatInterval"], one["ipDeleteTimeout"] = k.id(), 5000, 30000
		}
		out = append(out, one)
	}
	answer["hosts"] = out
	if f.version[0] != '1' {
		answer["groupName"], answer["lastRefTime"], answer["valid"] = k.group, time.Now().UnixMilli(), true
	} else if known {
		answer["dom"], answer["lastRefTime"], answer["env"], answer["metadata"] = k.name, time.Now().UnixMilli(), "", map[string]string{}
	}
	return encode(answer)
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// fill creates n services of DEFAULT_GROUP with one instance each.
func (f *httpFake) fill(n int) {
	f.edit(func() {
		for i := range n {
			f.services[key{"DEFAULT_GROUP", fmt.Sprintf("service-%04d", i)}] = []host{
				{IP: fmt.Sprintf("10.0.%d.%d", i/250, i%250), Port: 8080, Weight: 1, Healthy: true, Enabled: true},
			}
		}
	})
}

// put makes these the instances of a service of DEFAULT_GROUP.
func (f *httpFake) put(name string, hosts ...host) {
	f.edit(func() { f.services[key{"DEFAULT_GROUP", name}] = hosts })
}

// up is an ordinary instance.
func up(ip string) host { return host{IP: ip, Port: 8080, Weight: 1, Healthy: true, Enabled: true} }

// entry is the entry that reads the fake.
func (f *httpFake) entry() registry.Entry {
	return registry.Entry{
		Type: "nacos", Name: "test", Domain: f.address, NacosGroups: []string{"DEFAULT_GROUP"}, AuthSecretName: "nacos",
		RefreshInterval: registry.Interval(100 * time.Millisecond),
	}
}

// env is what an adapter is given to read the fake.
func (f *httpFake) env() registry.Env {
	return registry.Env{
		Credentials: func() (registry.Credentials, error) {
			return registry.Credentials{"nacosUsername": goodUser, "nacosPassword": goodPassword}, nil
		},
		ClientTLS: func() (*tls.Config, error) { return nil, nil },
		Logger:    slog.New(slog.DiscardHandler),
		Observe:   func(string, time.Duration, error) {},
		Budgets:   &registry.Budgets{},
	}
}

// settings are those of an entry that reads the fake.
func (f *httpFake) settings(env registry.Env) *settings {
	f.t.Helper()
	return settingsOf(f.t, f.entry(), env)
}

func settingsOf(t *testing.T, e registry.Entry, env registry.Env) *settings {
	t.Helper()
	s, err := newSettings(e, env)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// api is the client of the fake.
func (f *httpFake) api(s *settings) *api {
	f.t.Helper()
	servers, err := registry.ParseServers("fake", f.address, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	a, err := newAPI(s, servers[0])
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(a.close)
	return a
}

// newHastyHTTP is NewHTTP, but gives up a request sooner.
func newHastyHTTP(e registry.Entry, env registry.Env) (registry.Registry, error) {
	r, err := NewHTTP(e, env)
	if s, ok := r.(*source); ok {
		s.timeout = time.Second
	}
	return r, err
}

// running is a run of the adapter.
type running struct {
	*registrytest.Recorder
	t    *testing.T
	stop func()
}

// runHTTP runs an adapter of type nacos until the test ends.
func runHTTP(t *testing.T, e registry.Entry, env registry.Env, edit ...func(*settings)) *running {
	t.Helper()
	reg, err := NewHTTP(e, env)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range edit {
		change(reg.(*source).settings)
	}
	ctx, cancel := context.WithCancel(context.Background())
	rec, done := registrytest.NewRecorder(ctx), make(chan struct{})
	go func() {
		defer close(done)
		if err := reg.Run(ctx, rec); err != nil {
			t.Errorf("Run returned %v", err)
		}
		rec.Returned()
	}()
	r := &running{Recorder: rec, t: t, stop: sync.OnceFunc(func() {
		cancel()
		<-done
		for _, v := range rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
	})}
	t.Cleanup(r.stop)
	return r
}

// wait waits for a state.
func (r *running) wait(what string, ok func(registrytest.State) bool) registrytest.State {
	r.t.Helper()
	s, got := r.Wait(limit, ok)
	if !got {
		last := s.Events[max(0, len(s.Events)-20):]
		for _, e := range last {
			r.t.Logf("%s %v %v", e.Kind, e.IDs, e.Err)
		}
		r.t.Fatalf("waited in vain for %s; gap %v, %d services", what, s.Gap, len(s.Services))
	}
	return s
}

// loaded waits until everything has been read, without a gap.
func (r *running) loaded() registrytest.State {
	r.t.Helper()
	return r.wait("the first sync", func(s registrytest.State) bool { return s.Loaded && s.Gap == nil })
}

// since counts the events of a kind after the first n.
func since(s registrytest.State, n int, kind registrytest.Kind) int {
	count := 0
	for _, e := range s.Events[min(n, len(s.Events)):] {
		if e.Kind == kind {
			count++
		}
	}
	return count
}

// unchanged checks that nothing was changed or removed after the first n events.
func unchanged(t *testing.T, s registrytest.State, n int, when string) {
	t.Helper()
	for _, e := range s.Events[n:] {
		if e.Changed || len(e.Removed) > 0 {
			t.Errorf("%s: %s %v changed what is known", when, e.Kind, e.IDs)
		}
	}
}

// backend is the fake as the suite wants it.
func (f *httpFake) backend() registrytest.Backend {
	f.edit(func() { f.auth = true })
	return registrytest.Backend{
		Entry:       f.entry(),
		Credentials: registry.Credentials{"nacosUsername": goodUser, "nacosPassword": goodPassword},
		ID:          func(service string) string { return key{"DEFAULT_GROUP", service}.id() },
		Fact: func(i registry.Instance) registry.Instance {
			i.Disabled = false // such an instance is not listed: TestDisabled
			return i
		},
		Set: func(service string, instances ...registry.Instance) {
			hosts := make([]host, len(instances))
			for n, i := range instances {
				hosts[n] = host{
					IP: i.Address, Port: int64(i.Port), Weight: weight(i.Weight), Healthy: !i.Unhealthy, Enabled: !i.Disabled, Metadata: i.Metadata.Map(),
				}
			}
			f.put(service, hosts...)
		},
		Remove:  func(service string) { f.edit(func() { delete(f.services, key{"DEFAULT_GROUP", service}) }) },
		Stop:    f.stop,
		Restart: f.start,
		Wipe: func() {
			f.stop()
			f.edit(func() { clear(f.services) })
			f.start()
		},
		Refuse: func(on bool) {
			f.edit(func() {
				f.users = map[string]string{goodUser: goodPassword}
				if on {
					f.users[goodUser] = "another"
					clear(f.tokens)
				}
			})
		},
		Hang: func(on bool) { f.edit(func() { f.hanging = on }) },
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.edit(func() { f.hangAt, f.hung = n, hung })
			return hung
		},
		Requests: func() int {
			f.mu.Lock()
			defer f.mu.Unlock()
			return len(f.seen)
		},
		EntryAt: func(hostport string) registry.Entry {
			e := f.entry()
			e.Domain = hostport
			return e
		},
	}
}

// known are the ids of what is known, sorted.
func known(s registrytest.State) []string { return slices.Sorted(maps.Keys(s.Services)) }
