package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
	"github.com/regbridge/regbridge/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a bridge whose registries say what the test wants, with its admin pages.
type world struct {
	t       *testing.T
	admin   *Admin
	handler http.Handler
	// sinks are those of the registries that run, by type/name.
	sinks map[string]registry.Sink
	cache *xds.Cache
}

// scripted is a registry that only hands its sink out.
type scripted struct {
	name string
	told chan<- sinkOf
}

type sinkOf struct {
	name string
	sink registry.Sink
}

// Run implements registry.Registry.
func (s scripted) Run(ctx context.Context, sink registry.Sink) error {
	s.told <- sinkOf{s.name, sink}
	<-ctx.Done()
	return nil
}

// given is a source that says one thing.
type given struct{ config bridge.Config }

// Run implements bridge.Source.
func (g given) Run(ctx context.Context, apply func(bridge.Config)) error {
	apply(g.config)
	<-ctx.Done()
	return nil
}

type secrets struct{}

// Get implements bridge.Secrets.
func (secrets) Get(string, string) (registry.Credentials, error) {
	return registry.Credentials{"password": theSecret}, nil
}

const theSecret = "hunter2-and-more"

// entries makes a configuration of "type/name"s.
func entries(names ...string) bridge.Config {
	c := bridge.Config{Read: true}
	for _, n := range names {
		typ, name, _ := strings.Cut(n, "/")
		c.Registries = append(c.Registries, bridge.RegistryConfig{
			Key:    bridge.Key{Namespace: "default", Bridge: "main", Type: typ, Name: name},
			Entry:  registry.Entry{Type: typ, Name: name, AuthSecretName: "login", NacosSecretKey: theSecret},
			Origin: "bridge.yaml:1", Path: "spec.registries[0]",
		})
	}
	return c
}

// newWorld starts a bridge. Tests call it in a bubble of synctest, or wait for what they need.
func newWorld(t *testing.T, c bridge.Config, change ...func(*Options)) *world {
	t.Helper()
	return newWorldOf(t, bridge.IstioRenderer{Dialect: istio.Stock}, c, change...)
}

func newWorldOf(t *testing.T, renderer bridge.Renderer, c bridge.Config, change ...func(*Options)) *world {
	t.Helper()
	told := make(chan sinkOf, len(c.Registries))
	types := map[string]bridge.Constructor{}
	for _, typ := range []string{"consul", "dns", "static"} {
		types[typ] = func(e registry.Entry, _ registry.Env) (registry.Registry, error) {
			return scripted{e.Type + "/" + e.Name, told}, nil
		}
	}
	metrics := prometheus.NewRegistry()
	log := slog.New(slog.DiscardHandler)
	w := &world{t: t, sinks: map[string]registry.Sink{}}
	w.cache = xds.NewCache(xds.Options{Published: istio.Published(), Logger: log, Registerer: metrics})
	b, err := bridge.New(bridge.Options{
		Types: types, Source: given{c}, Secrets: secrets{}, Mesh: w.cache, Renderer: renderer,
		FirstAnswerDeadline: time.Minute, Logger: log, Registerer: metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("the bridge ended with: %v", err)
		}
	})
	opts := Options{Bridge: b, Cache: w.cache, Gatherer: metrics, Version: "v1.2.3"}
	for _, f := range change {
		f(&opts)
	}
	w.admin = New(opts)
	w.handler = w.admin.Handler()
	for _, rc := range c.Registries {
		if rc.Err == nil {
			s := <-told
			w.sinks[s.name] = s.sink
		}
	}
	return w
}

func (w *world) do(method, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer := httptest.NewRecorder()
	w.handler.ServeHTTP(answer, r)
	return answer
}

// get returns the body of a page that must be there.
func (w *world) get(path string) string {
	w.t.Helper()
	answer := w.do(http.MethodGet, path)
	if answer.Code != http.StatusOK {
		w.t.Fatalf("GET %s: %d %s", path, answer.Code, answer.Body)
	}
	return answer.Body.String()
}

func (w *world) decode(path string, into any) {
	w.t.Helper()
	if err := json.Unmarshal([]byte(w.get(path)), into); err != nil {
		w.t.Fatalf("GET %s: %v", path, err)
	}
}

// want compares an answer's status, and looks for a text in its body.
func want(t *testing.T, answer *httptest.ResponseRecorder, status int, text string) {
	t.Helper()
	if answer.Code != status || !strings.Contains(answer.Body.String(), text) {
		t.Errorf("got %d %q, want %d with %q", answer.Code, answer.Body, status, text)
	}
}

func instance(address string, port uint32) registry.Instance {
	return registry.Instance{Address: address, Port: port, Weight: 1}
}

// fill makes registries say all that the pages have to show.
func (w *world) fill() {
	version := func(v string) labels.Set { return labels.FromMap(map[string]string{"version": v, "team": "a&b"}) }
	consul := w.sinks["consul/main"]
	order := registry.Service{ID: "order", Host: "Order_Service.consul", Instances: []registry.Instance{
		{Address: "10.0.0.5", Port: 8080, Weight: 3, Metadata: version("v1"), Locality: registry.Locality{Region: "r1", Zone: "z1"}},
		{Address: "10.0.0.6", Port: 8081, Weight: 1, Metadata: version("v2")},
		{Address: "10.0.0.7", Port: 8080, Weight: 1, Unhealthy: true, Reason: "check web is critical"},
	}}
	consul.Put(order)
	consul.Put(registry.Service{ID: "empty", Host: "empty.consul", Port: 80})
	named := instance("node-1.example.com", 9000)
	consul.Put(registry.Service{ID: "named", Host: "named.consul", Instances: []registry.Instance{named}})
	db := instance("10.0.0.9", 5432)
	db.Protocol = "tcp"
	consul.Put(registry.Service{ID: "db", Host: "db.consul", Instances: []registry.Instance{db}})
	consul.Synced([]string{"order", "empty", "named", "db"})
	dns := w.sinks["dns/shop"]
	shop := instance("shop.example.com", 443)
	shop.Protocol = "https"
	dns.Put(registry.Service{ID: "shop", Host: "shop.dns", Port: 443, TLS: &registry.ClientTLS{SNI: "shop.example.com"},
		Instances: []registry.Instance{shop}})
	dns.Synced([]string{"shop"})
	time.Sleep(time.Second) // in a bubble: until it is published
	synctest.Wait()
}

func TestReadiness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		synctest.Wait()
		want(t, w.do(http.MethodGet, "/livez"), http.StatusOK, "ok")
		want(t, w.do(http.MethodGet, "/readyz"), http.StatusServiceUnavailable, "registry default/main/consul/main has not been read")
		w.sinks["consul/main"].Synced(nil)
		synctest.Wait()
		answer := w.do(http.MethodGet, "/readyz")
		want(t, answer, http.StatusServiceUnavailable, "registry default/main/dns/shop has not been read")
		if strings.Contains(answer.Body.String(), "consul") {
			t.Errorf("a registry that was read is named: %s", answer.Body)
		}
		w.sinks["dns/shop"].Synced(nil)
		time.Sleep(time.Second)
		want(t, w.do(http.MethodGet, "/readyz"), http.StatusOK, "ready")
		want(t, w.do(http.MethodHead, "/readyz"), http.StatusOK, "")

		w.admin.Drain()
		want(t, w.do(http.MethodGet, "/readyz"), http.StatusServiceUnavailable, "about to end")
		want(t, w.do(http.MethodGet, "/livez"), http.StatusOK, "ok")
	})
}

func TestUnreadableConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := bridge.Config{
			Err: errors.New("open /etc/bridge.yaml: permission denied"),
			Problems: []bridge.Problem{
				{File: "bridge.yaml", Line: 12, Path: "spec.registries[0].port", Message: "want a port <b>", Warning: false},
				{File: "bridge.yaml", Line: 13, Path: "spec.registries[0].x", Message: "no such field", Warning: true},
			},
		}
		w := newWorld(t, c)
		synctest.Wait()
		want(t, w.do(http.MethodGet, "/readyz"), http.StatusServiceUnavailable, "permission denied")
		var got struct {
			Error    string
			Problems []bridge.Problem
		}
		w.decode("/debug/problems", &got)
		if !strings.Contains(got.Error, "permission denied") || len(got.Problems) != 2 || got.Problems[0] != c.Problems[0] {
			t.Errorf("got %+v", got)
		}
		page := w.get("/")
		for _, text := range []string{"permission denied", "bridge.yaml:12", "want a port &lt;b&gt;", "not ready", "There are none"} {
			if !strings.Contains(page, text) {
				t.Errorf("the page lacks %q", text)
			}
		}
	})
}

func TestHealthHandler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main"))
		w.sinks["consul/main"].Synced(nil)
		time.Sleep(time.Second)
		w.handler = w.admin.HealthHandler()
		want(t, w.do(http.MethodGet, "/livez"), http.StatusOK, "ok")
		want(t, w.do(http.MethodGet, "/readyz"), http.StatusOK, "ready")
		want(t, w.do(http.MethodGet, "/metrics"), http.StatusOK, "regbridge_ready 1")
		for _, path := range []string{"/", "/debug/registries", "/debug/configz", "/debug/pprof/", "/registry/watcherStatus"} {
			want(t, w.do(http.MethodGet, path), http.StatusNotFound, "")
		}
		want(t, w.do(http.MethodPost, "/release?registry=main"), http.StatusNotFound, "")
	})
}

func TestRegistries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		w.sinks["dns/shop"].Fail(errors.New("lookup: no route to host"))
		synctest.Wait()
		var all []bridge.Status
		w.decode("/debug/registries", &all)
		if len(all) != 2 || all[0].Registry != "default/main/consul/main" || all[0].State != bridge.StateSynced ||
			all[1].State != bridge.StateFailing || all[1].LastError != "lookup: no route to host" {
			t.Errorf("got %+v", all)
		}
		left := all[0].LeftOutInstances
		if len(left) != 1 || left[0].Address != "10.0.0.7" || left[0].Detail != "check web is critical" || all[0].LeftOut[bridge.ReasonUnhealthy] != 1 {
			t.Errorf("left out: %+v", left)
		}
		for _, name := range []string{"shop", "dns/shop", "default/main/dns/shop"} {
			var one []bridge.Status
			w.decode("/debug/registries?registry="+name, &one)
			if len(one) != 1 || one[0].Name != "shop" {
				t.Errorf("registry=%s: got %+v", name, one)
			}
		}
		if got := strings.TrimSpace(w.get("/debug/registries?registry=nobody")); got != "[]" {
			t.Errorf("an unknown registry: %s", got)
		}

		var watchers []map[string]any
		w.decode("/registry/watcherStatus", &watchers)
		text, err := json.Marshal(watchers)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(text); got != `[{"healthy":true,"name":"main","ready":true,"type":"consul"},{"healthy":false,"name":"shop","ready":true,"type":"dns"}]` {
			t.Errorf("watcherStatus: %s", got)
		}
	})
}

// A registry that was never read is not ready; without registries there is an empty list, and not null.
func TestWatcherStatusAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("static/zeta", "consul/alpha"))
		w.sinks["consul/alpha"].Fail(errors.New("connection refused"))
		synctest.Wait()
		var got []watcher
		w.decode("/registry/watcherStatus", &got)
		if len(got) != 2 || got[0] != (watcher{Name: "alpha", Type: "consul"}) || got[1] != (watcher{Name: "zeta", Type: "static"}) {
			t.Errorf("got %+v", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, bridge.Config{Read: true})
		synctest.Wait()
		for path, empty := range map[string]string{
			"/registry/watcherStatus": "[]", "/debug/registries": "[]", "/debug/registryz": "[]", "/debug/endpointShardz": "{}",
			"/debug/configz": "[]", "/debug/clients": "[]",
		} {
			if got := strings.TrimSpace(w.get(path)); got != empty {
				t.Errorf("%s: got %s, want %s", path, got, empty)
			}
		}
	})
}

func TestRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main"))
		consul := w.sinks["consul/main"]
		var all []registry.Instance
		for i := range 20 {
			all = append(all, instance("10.0.1."+string(rune('1'+i/10))+string(rune('0'+i%10)), 80))
		}
		consul.Put(registry.Service{ID: "big", Host: "big.consul", Instances: all})
		consul.Synced([]string{"big"})
		time.Sleep(time.Minute)
		consul.Put(registry.Service{ID: "big", Host: "big.consul", Instances: all[:2]})
		consul.Synced([]string{"big"})
		time.Sleep(time.Second)
		synctest.Wait()
		endpoints := func() int { return strings.Count(w.get("/debug/endpointShardz"), `"EndpointPort"`) }
		if got := endpoints(); got != 20 {
			t.Fatalf("%d endpoints are published, want all 20: 18 are held", got)
		}
		var status []bridge.Status
		w.decode("/debug/registries", &status)
		if status[0].Held != 18 || len(status[0].HeldEndpoints) != 18 || status[0].HeldEndpoints[0].Why != bridge.HoldMass {
			t.Errorf("held: %+v", status[0])
		}
		if page := w.get("/"); !strings.Contains(page, "regbridge release") {
			t.Error("the page does not say how to release")
		}

		want(t, w.do(http.MethodGet, "/release?registry=main"), http.StatusMethodNotAllowed, "")
		want(t, w.do(http.MethodPost, "/release"), http.StatusBadRequest, "name a registry")
		want(t, w.do(http.MethodPost, "/release?registry=nobody"), http.StatusNotFound, `"nobody"`)
		for _, header := range [][]string{
			{"Origin", "https://evil.example"}, {"Origin", "null"}, {"Origin", "http://127.0.0.1:8888"}, {"Sec-Fetch-Site", "cross-site"},
			{"Sec-Fetch-Site", "same-origin"}, {"Sec-Fetch-Site", "none"},
		} {
			want(t, w.do(http.MethodPost, "/release?registry=main", header...), http.StatusForbidden, "browsers")
		}
		synctest.Wait()
		if got := endpoints(); got != 20 {
			t.Fatalf("%d endpoints are published after refused requests, want 20", got)
		}
		answer := w.do(http.MethodPost, "/release?registry=consul/main")
		var released struct{ Released map[string]int }
		if err := json.Unmarshal(answer.Body.Bytes(), &released); err != nil || answer.Code != http.StatusOK ||
			len(released.Released) != 1 || released.Released["default/main/consul/main"] != 18 {
			t.Errorf("got %d %s", answer.Code, answer.Body)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := endpoints(); got != 2 {
			t.Errorf("%d endpoints are published after the release, want 2", got)
		}
	})
}

// Every page of the list answers, to a request with any bearer token, and holds no secret.
func TestPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		w.sinks["dns/shop"].Fail(errors.New(`dial "<script>alert(1)</script>"`))
		synctest.Wait()
		page := w.get("/")
		for _, text := range []string{
			"v1.2.3", "consul/main", "synced", "failing", "&lt;script&gt;", "unhealthy", "bridge.yaml:1", `<b>5</b>`,
			"/release?registry=NAME",
		} {
			if !strings.Contains(page, text) {
				t.Errorf("the page lacks %q", text)
			}
		}
		if strings.Contains(page, "<script") {
			t.Error("the page holds text of a registry as HTML")
		}
		links := regexp.MustCompile(`href="(/[^"]*)"`).FindAllStringSubmatch(page, -1)
		if len(links) < 10 {
			t.Errorf("the page has %d links", len(links))
		}
		for _, l := range links {
			answer := w.do(http.MethodGet, l[1], "Authorization", "Bearer whatever", "Host", "evil.example")
			if answer.Code != http.StatusOK || answer.Header().Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("GET %s: %d %v", l[1], answer.Code, answer.Header())
			}
			if strings.Contains(answer.Body.String(), theSecret) {
				t.Errorf("GET %s holds a secret", l[1])
			}
		}
		want(t, w.do(http.MethodGet, "/nothing"), http.StatusNotFound, "")
		want(t, w.do(http.MethodGet, "/debug/pprof/"), http.StatusNotFound, "")
		want(t, w.do(http.MethodPost, "/debug/configz"), http.StatusMethodNotAllowed, "")
		if got := w.get("/metrics"); !strings.Contains(got, `regbridge_registry_state{registry="default/main/dns/shop",state="failing",type="dns"} 1`) {
			t.Errorf("metrics: %s", got)
		}
	})
}

// picky is a reader that refuses one host.
type picky struct{ bridge.IstioRenderer }

// Render implements bridge.Renderer.
func (p picky) Render(s mcp.Service) ([]xds.Resource, error) {
	if s.Host == "bad.consul" {
		return nil, errors.New("no taste for " + s.Host)
	}
	return p.IstioRenderer.Render(s)
}

// A service that the mesh would refuse is named with the reason, and is not among those that are published.
func TestQuarantined(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorldOf(t, picky{bridge.IstioRenderer{Dialect: istio.Stock}}, entries("consul/main"))
		consul := w.sinks["consul/main"]
		for _, id := range []string{"bad", "good"} {
			consul.Put(registry.Service{ID: id, Host: id + ".consul", Instances: []registry.Instance{instance("10.0.0.1", 80)}})
		}
		consul.Synced([]string{"bad", "good"})
		time.Sleep(time.Second)
		synctest.Wait()
		if page := w.get("/"); !strings.Contains(page, "<code>bad</code>: ") || !strings.Contains(page, "quarantined") {
			t.Errorf("the page does not name the service: %s", page)
		}
		var status []bridge.Status
		w.decode("/debug/registries", &status)
		if status[0].LeftOut[bridge.ReasonQuarantined] != 1 || !strings.Contains(status[0].LeftOutInstances[0].Detail, "no taste for bad.consul") {
			t.Errorf("got %+v", status[0])
		}
		for _, path := range []string{"/debug/registryz", "/debug/endpointShardz", "/debug/configz"} {
			if text := w.get(path); strings.Contains(text, "bad.consul") || !strings.Contains(text, "good.consul") {
				t.Errorf("%s: %s", path, text)
			}
		}
	})
}

func TestPprof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, bridge.Config{Read: true}, func(o *Options) { o.Pprof = true })
		want(t, w.do(http.MethodGet, "/debug/pprof/"), http.StatusOK, "goroutine")
		want(t, w.do(http.MethodGet, "/debug/pprof/goroutine?debug=1"), http.StatusOK, "profile")
		if !strings.Contains(w.get("/"), "/debug/pprof/") {
			t.Error("the page does not list pprof")
		}
	})
}

// A client that takes nothing keeps nobody waiting: neither the bridge nor other clients.
func TestStuckReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		release := make(chan struct{})
		done := make(chan struct{})
		paths := []string{"/", "/debug/registryz", "/debug/endpointShardz", "/debug/configz", "/debug/registries", "/metrics"}
		for _, path := range paths {
			go func() {
				w.handler.ServeHTTP(stuck{http.Header{}, release}, httptest.NewRequest(http.MethodGet, path, nil))
				done <- struct{}{}
			}()
		}
		synctest.Wait() // all of them are stuck
		w.sinks["consul/main"].Put(registry.Service{ID: "order", Host: "Order_Service.consul", Instances: []registry.Instance{instance("10.9.9.9", 1)}})
		time.Sleep(time.Second)
		for _, path := range append(paths, "/readyz") {
			w.get(path)
		}
		if !strings.Contains(w.get("/debug/configz"), "10.9.9.9") {
			t.Error("a change is not published while clients are stuck")
		}
		close(release)
		for range paths {
			<-done
		}
	})
}

// stuck is a client that takes nothing until it is released, and is gone then.
type stuck struct {
	header  http.Header
	release <-chan struct{}
}

func (s stuck) Header() http.Header { return s.header }
func (stuck) WriteHeader(int)       {}
func (s stuck) Write([]byte) (int, error) {
	<-s.release
	return 0, io.ErrClosedPipe
}
