package eureka

import (
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) { registrytest.Main(m) }

const (
	goodUser     = "mesh-reader"
	goodPassword = "s3cret: of the tests"

	// limit is how long a test waits for what must happen.
	limit = 15 * time.Second
)

// fake is an Eureka server, as Spring Cloud's was seen to answer: /apps, and /apps/delta with each instance's last change
// within some time, a counter of the deltas that it made, and the count of everything.
type fake struct {
	t *testing.T

	mu       sync.Mutex
	path     string
	user     string // with goodPassword; empty lets everybody in
	apps     map[string]map[string]*fakeInstance
	queue    []fakeChange
	version  int
	changed  bool // since the last delta was made
	clock    int64
	noDelta  int               // the status of the answer to /apps/delta, if not 0
	status   map[string]int    // of answers, by path
	bodies   map[string]string // of answers, by path
	cookie   bool
	location string // of a redirect
	raw      func(w http.ResponseWriter, r *http.Request) bool

	hanging bool
	hangAt  int
	hung    chan struct{}
	seen    []*http.Request

	address string
	tls     *tls.Config
	server  *httptest.Server
}

type fakeInstance struct {
	ip                         string
	port                       uint32
	status                     string
	metadata                   map[string]string
	registered, updated, dirty int64
	action                     string
}

type fakeChange struct {
	app, id string
	state   *fakeInstance
}

func newFake(t *testing.T) *fake {
	t.Helper()
	f := &fake{
		t: t, path: "/eureka", apps: map[string]map[string]*fakeInstance{}, status: map[string]int{}, bodies: map[string]string{},
		clock: 1_795_455_589_000,
	}
	f.start()
	t.Cleanup(f.stop)
	return f
}

func newTLSFake(t *testing.T) *fake {
	t.Helper()
	f := newFake(t)
	f.stop()
	f.tls = &tls.Config{MinVersion: tls.VersionTLS12}
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
	for deadline := time.Now().Add(limit); ; {
		l, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", cmp.Or(f.address, "127.0.0.1:0"))
		if err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.server = &httptest.Server{Listener: l, Config: &http.Server{
		Handler: f, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}}
	if f.tls != nil {
		f.server.TLS = f.tls.Clone()
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	f.address = l.Addr().String()
}

func (f *fake) stop() {
	if f.server == nil {
		return
	}
	f.server.CloseClientConnections()
	f.server.Config.Close()
	f.server.Close()
	f.server = nil
}

// edit changes the fake.
func (f *fake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// requests are the paths that were asked for, without that of the API.
func (f *fake) requests() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]string, len(f.seen))
	for n, r := range f.seen {
		out[n] = strings.TrimPrefix(r.URL.Path, f.path)
	}
	return out
}

// take returns the requests since it was last called.
func (f *fake) take() []string {
	out := f.requests()
	f.edit(func() { f.seen = nil })
	return out
}

func (f *fake) now() int64 {
	f.clock++
	return f.clock
}

// change states one instance, with the lock held: a new one is registered.
func (f *fake) change(app, id string, edit func(*fakeInstance)) {
	i := &fakeInstance{status: statusUp, port: 8080, ip: "10.0.0.1", registered: f.now(), dirty: f.now(), action: "ADDED"}
	if old := f.apps[app][id]; old != nil {
		*i = *old
		i.action, i.dirty = "MODIFIED", f.now()
	}
	edit(i)
	i.updated = f.now()
	if f.apps[app] == nil {
		f.apps[app] = map[string]*fakeInstance{}
	}
	f.apps[app][id] = i
	f.queue = append(f.queue, fakeChange{app, id, i})
	f.changed = true
}

// remove removes one instance, with the lock held, and says so in the delta.
func (f *fake) remove(app, id string) {
	gone := *f.apps[app][id]
	gone.action, gone.updated = "DELETED", f.now()
	f.queue = append(f.queue, fakeChange{app, id, &gone})
	f.changed = true
	f.lose(app, id)
}

// lose removes one instance, with the lock held, and says nothing.
func (f *fake) lose(app, id string) {
	if delete(f.apps[app], id); len(f.apps[app]) == 0 {
		delete(f.apps, app)
	}
	f.changed = true
}

// register lets instances register, each named by its address.
func (f *fake) register(app string, ips ...string) {
	f.edit(func() {
		for _, ip := range ips {
			f.change(app, ip, func(i *fakeInstance) { i.ip = ip })
		}
	})
}

func (f *fake) deregister(app, id string) { f.edit(func() { f.remove(app, id) }) }

// reborn makes the fake what it is after a restart without an outage that anybody saw: those who have registered again are
// new to it. With the lock held.
func (f *fake) reborn(kept func(app string, i *fakeInstance) bool) {
	old := f.apps
	f.apps, f.queue, f.version, f.changed = map[string]map[string]*fakeInstance{}, nil, 0, true
	for app, instances := range old {
		for id, i := range instances {
			if kept(app, i) {
				f.change(app, id, func(again *fakeInstance) {
					registered := again.registered
					*again = *i
					again.registered, again.action = registered, "ADDED"
				})
			}
		}
	}
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // only then is it noticed that the client goes away
	f.mu.Lock()
	f.seen = append(f.seen, r)
	hang := f.hanging
	if f.hung != nil {
		if f.hangAt--; f.hangAt == 0 {
			hang = true
			close(f.hung)
			f.hung = nil
		}
	}
	raw := f.raw
	f.mu.Unlock()
	if hang {
		<-r.Context().Done()
	}
	if raw != nil && raw(w, r) {
		return
	}
	f.mu.Lock()
	code, body := f.answer(r)
	cookie, location := f.cookie, f.location
	f.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if cookie {
		http.SetCookie(w, &http.Cookie{Name: "JSESSIONID", Value: "1"})
	}
	if location != "" {
		w.Header().Set("Location", location)
	}
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		w.WriteHeader(code)
		z := gzip.NewWriter(w)
		_, _ = z.Write(body)
		z.Close()
		return
	}
	w.WriteHeader(code)
	_, _ = w.Write(body)
}

// answer gives what the server answers, with the lock held.
func (f *fake) answer(r *http.Request) (int, []byte) {
	failure := func(code int) (int, []byte) {
		return code, encode(map[string]any{
			"timestamp": "2026-11-23T17:39:50.366+00:00", "status": code, "error": http.StatusText(code), "path": r.URL.Path,
		})
	}
	if user, password, _ := r.BasicAuth(); f.user != "" && (user != f.user || password != goodPassword) {
		return failure(http.StatusUnauthorized)
	}
	path := strings.TrimPrefix(r.URL.Path, f.path)
	if code := f.status[path]; code != 0 {
		return failure(code)
	}
	if body, ok := f.bodies[path]; ok {
		return http.StatusOK, []byte(body)
	}
	switch {
	case !strings.HasPrefix(r.URL.Path, f.path) || path != "/apps" && path != "/apps/delta":
		return failure(http.StatusNotFound)
	case r.Header.Get("Accept") != "application/json":
		return http.StatusOK, []byte("<applications></applications>")
	case path == "/apps":
		return http.StatusOK, f.encode(1, func(yield func(app, id string, i *fakeInstance)) {
			for app, instances := range f.apps {
				for id, i := range instances {
					yield(app, id, i)
				}
			}
		})
	case f.noDelta != 0:
		return failure(f.noDelta)
	}
	if f.changed || f.version == 0 {
		f.version++
		f.changed = false
	}
	return http.StatusOK, f.encode(f.version, func(yield func(app, id string, i *fakeInstance)) {
		last := map[[2]string]*fakeInstance{}
		for _, c := range f.queue {
			last[[2]string{c.app, c.id}] = c.state
		}
		for key, i := range last {
			yield(key[0], key[1], i)
		}
	})
}

func (f *fake) hash() string {
	counts := map[string]int{}
	for _, instances := range f.apps {
		for _, i := range instances {
			counts[i.status]++
		}
	}
	hash := ""
	for _, status := range slices.Sorted(maps.Keys(counts)) {
		hash += fmt.Sprintf("%s_%d_", status, counts[status])
	}
	return hash
}

// encode writes an answer. Its order is another one each time.
func (f *fake) encode(version int, each func(func(app, id string, i *fakeInstance))) []byte {
	byApp := map[string][]any{}
	each(func(app, id string, i *fakeInstance) {
		metadata := i.metadata
		if len(metadata) == 0 {
			metadata = map[string]string{"@class": "java.util.Collections$EmptyMap"}
		}
		byApp[app] = append(byApp[app], map[string]any{
			"instanceId": id, "hostName": "host-" + id, "app": app, "ipAddr": i.ip, "status": i.status, "overriddenStatus": "UNKNOWN",
			"port":       map[string]any{"$": i.port, "@enabled": "true"},
			"securePort": map[string]any{"$": 443, "@enabled": "false"}, "countryId": 1,
			"dataCenterInfo": map[string]any{"@class": "com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo", "name": "MyOwn"},
			"leaseInfo": map[string]any{
				"renewalIntervalInSecs": 30, "durationInSecs": 90, "registrationTimestamp": i.registered,
				"lastRenewalTimestamp": f.clock, "evictionTimestamp": 0, "serviceUpTimestamp": i.registered,
			},
			"metadata": metadata, "homePageUrl": "http://" + i.ip + ":8080/", "vipAddress": strings.ToLower(app),
			"isCoordinatingDiscoveryServer": "false", "lastUpdatedTimestamp": strconv.FormatInt(i.updated, 10),
			"lastDirtyTimestamp": strconv.FormatInt(i.dirty, 10), "actionType": i.action,
		})
	})
	apps := []any{}
	for app, instances := range byApp {
		apps = append(apps, map[string]any{"name": app, "instance": instances})
	}
	return encode(map[string]any{"applications": map[string]any{
		"versions__delta": strconv.Itoa(version), "apps__hashcode": f.hash(), "application": apps,
	}})
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func (f *fake) entry() registry.Entry {
	return registry.Entry{Type: "eureka", Name: "fake", Domain: f.address}
}

func (f *fake) backend() registrytest.Backend {
	f.edit(func() { f.user, f.cookie = goodUser, true })
	e := f.entry()
	e.AuthSecretName = "eureka-login"
	app := strings.ToUpper
	return registrytest.Backend{
		Entry:       e,
		Credentials: registry.Credentials{"eurekaUsername": goodUser, "eurekaPassword": goodPassword},
		ID:          app,
		Fact: func(i registry.Instance) registry.Instance {
			i.Metadata = labels.FromMap(withWeight(i))
			return i
		},
		Set: func(service string, instances ...registry.Instance) {
			f.edit(func() {
				kept := map[string]bool{}
				for _, want := range instances {
					kept[want.Address] = true
					f.change(app(service), want.Address, func(i *fakeInstance) {
						i.ip, i.port, i.status, i.metadata = want.Address, want.Port, statusUp, withWeight(want)
						switch {
						case want.Disabled:
							i.status = statusOutOfService
						case want.Unhealthy:
							i.status = "DOWN"
						}
					})
				}
				for id := range f.apps[app(service)] {
					if !kept[id] {
						f.remove(app(service), id)
					}
				}
			})
		},
		Remove: func(service string) {
			f.edit(func() {
				for id := range f.apps[app(service)] {
					f.remove(app(service), id)
				}
			})
		},
		Stop: f.stop,
		Restart: func() {
			f.edit(func() { f.reborn(func(string, *fakeInstance) bool { return true }) })
			f.start()
		},
		Wipe: func() {
			f.stop()
			f.edit(func() { f.reborn(func(string, *fakeInstance) bool { return false }) })
			f.start()
		},
		Refuse: func(on bool) {
			f.edit(func() {
				if f.user = goodUser; on {
					f.user = "another"
				}
			})
		},
		Hang: func(on bool) { f.edit(func() { f.hanging = on }) },
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.edit(func() { f.hangAt, f.hung = n, hung })
			return hung
		},
		Requests: func() int { return len(f.requests()) },
		EntryAt: func(hostport string) registry.Entry {
			e := f.entry()
			e.Domain = hostport
			return e
		},
	}
}

// withWeight is the metadata of an instance, which has its weight if that is not the default.
func withWeight(i registry.Instance) map[string]string {
	m := i.Metadata.Map()
	if i.Weight != 1 {
		if m == nil {
			m = map[string]string{}
		}
		m["weight"] = strconv.FormatFloat(i.Weight, 'g', -1, 64)
	}
	return m
}
