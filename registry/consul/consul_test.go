package consul

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", "8"); err != nil { // the tests wait more than they work
		panic(err)
	}
	registrytest.Main(m)
}

func TestConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHasty,
		Interval: 250 * time.Millisecond,
		Start:    func(t *testing.T) registrytest.Backend { return newFake(t).backend() },
	})
}

// TestConformanceOverTLS has all queries share connections.
func TestConformanceOverTLS(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHasty,
		Interval: 250 * time.Millisecond,
		Start: func(t *testing.T) registrytest.Backend {
			f := newTLSFake(t)
			b := f.backend()
			b.ClientTLS = f.trust()
			return b
		},
		Skip: map[string]string{"one call hangs": "takes long, and plain HTTP has shown it"},
	})
}

// newHasty is New, but gives up a request sooner where the interval is short, and leaves more time for a thousand services.
func newHasty(e registry.Entry, env registry.Env) (registry.Registry, error) {
	if e.RefreshInterval > registry.Interval(time.Second) {
		e.RefreshInterval = registry.Interval(5 * time.Second)
	}
	r, err := New(e, env)
	if c, ok := r.(*consul); ok && c.interval < time.Second {
		c.timeout = 750 * time.Millisecond
	}
	return r, err
}

// testEnv is an Env with credentials.
func testEnv(t *testing.T, credentials registry.Credentials) registry.Env {
	t.Helper()
	return registry.Env{
		Credentials: func() (registry.Credentials, error) { return credentials, nil },
		ClientTLS:   func() (*tls.Config, error) { return nil, nil },
		Logger:      slog.New(slog.DiscardHandler),
		Observe:     func(string, time.Duration, error) {},
		Budgets:     &registry.Budgets{},
	}
}

// runWith runs the adapter until the test ends.
func runWith(t *testing.T, e registry.Entry, env registry.Env) *registrytest.Recorder {
	t.Helper()
	r, err := New(e, env)
	if err != nil {
		t.Fatal(err)
	}
	return runRegistry(t, r)
}

func runRegistry(t *testing.T, r registry.Registry) *registrytest.Recorder {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	rec, done := registrytest.NewRecorder(ctx), make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx, rec); err != nil {
			t.Errorf("Run: %v", err)
		}
		rec.Returned()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, v := range rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
		told := map[string]bool{}
		for _, e := range rec.State().Events {
			for _, id := range e.IDs {
				if e.Kind == registrytest.Synced && !told[id] {
					t.Errorf("a listing named %s, of which nothing had been told yet", id)
				}
				told[id] = e.Kind != registrytest.Delete
			}
		}
	})
	return rec
}

const limit = 15 * time.Second

func wait(t *testing.T, rec *registrytest.Recorder, what string, ok func(registrytest.State) bool) registrytest.State {
	t.Helper()
	s, got := rec.Wait(limit, ok)
	if !got {
		names := slices.Sorted(maps.Keys(s.Services))
		t.Fatalf("waited in vain for %s; gap %v, gaps %v, %d services, %q first", what, s.Gap, s.Gaps, len(names), names[:min(9, len(names))])
	}
	return s
}

func at(address string) registry.Instance {
	return registry.Instance{Address: address, Port: 8080, Weight: 1}
}

func loaded(ids ...string) func(registrytest.State) bool {
	return func(s registrytest.State) bool {
		return s.Loaded && s.Gap == nil && slices.Equal(slices.Sorted(maps.Keys(s.Services)), ids)
	}
}

// failed says that a Fail came whose text has all the words: of the registry if id is empty, else of the service.
func failed(id string, words ...string) func(registrytest.State) bool {
	return func(s registrytest.State) bool {
		return slices.ContainsFunc(s.Events, func(e registrytest.Event) bool {
			if e.Kind != registrytest.Fail || (id == "") != (len(e.IDs) == 0) || id != "" && !slices.Contains(e.IDs, id) {
				return false
			}
			return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(e.Err.Error(), w) })
		})
	}
}

// noRemoval fails the test if anything was ever taken away.
func noRemoval(t *testing.T, rec *registrytest.Recorder) {
	t.Helper()
	for _, e := range rec.State().Events {
		if len(e.Removed) > 0 {
			t.Errorf("%s removed %q", e.Kind, e.Removed)
		}
		if e.Kind == registrytest.Put && e.Changed && len(rec.State().Services[e.IDs[0]].Instances) == 0 {
			t.Errorf("%s lost its instances", e.IDs[0])
		}
	}
}

// quick makes the entry notice quickly what no notification tells.
func quick(e registry.Entry) registry.Entry {
	e.RefreshInterval = registry.Interval(300 * time.Millisecond)
	return e
}

var good = registry.Credentials{"consulToken": goodToken}

func TestNewSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		entry  registry.Entry
		path   string
		usable bool
	}{
		"no domain":       {registry.Entry{}, "domain", false},
		"blank domain":    {registry.Entry{Domain: " , "}, "domain", false},
		"URL":             {registry.Entry{Domain: "http://consul:8500"}, "domain[0]", false},
		"one bad server":  {registry.Entry{Domain: "consul, con sul"}, "domain[1]", true},
		"port":            {registry.Entry{Domain: "consul", Port: 70000}, "port", false},
		"two datacenters": {registry.Entry{Domain: "consul", ConsulDatacenter: "a", ConsulDataCenter: "b"}, "consulDataCenter", true},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := New(c.entry, testEnv(t, nil))
			problems := registry.FieldErrors(err)
			if len(problems) != 1 || problems[0].Path != c.path {
				t.Fatalf("got %v, want a problem with %s", err, c.path)
			}
			if usable := r != nil && problems[0].Partial; usable != c.usable {
				t.Errorf("usable is %v, want %v: %v", usable, c.usable, err)
			}
		})
	}
}

func TestHostHasTheDatacenter(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		edit func(*registry.Entry)
		want string
	}{
		"of the agent":     {func(*registry.Entry) {}, "user-api.dc1.consul"},
		"consulDatacenter": {func(e *registry.Entry) { e.ConsulDatacenter = "dc_2" }, "user-api.dc-2.consul"},
		"consulDataCenter": {func(e *registry.Entry) { e.ConsulDataCenter = "dc3" }, "user-api.dc3.consul"},
		"both":             {func(e *registry.Entry) { e.ConsulDatacenter, e.ConsulDataCenter = "dc4", "dc5" }, "user-api.dc4.consul"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.set("user_api", at("10.0.0.1"))
			e := f.entry()
			c.edit(&e)
			env := testEnv(t, good)
			r, err := New(e, env)
			if r == nil {
				t.Fatal(err)
			}
			rec := runRegistry(t, r)
			s := wait(t, rec, "the service", loaded("consul", "user_api"))
			if got := s.Services["user_api"].Host; got != c.want {
				t.Errorf("host %q, want %q", got, c.want)
			}
		})
	}
}

func TestQueriesCarryWhatTheEntrySays(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	e := f.entry()
	e.ConsulDatacenter, e.ConsulNamespace, e.ConsulPartition = "dc1", "team", "part"
	rec := runWith(t, e, testEnv(t, good))
	wait(t, rec, "a listing", func(s registrytest.State) bool { return s.Loaded })
	f.edit(func() {
		for _, q := range f.queries {
			for _, want := range []string{"dc=dc1", "ns=team", "partition=part"} {
				if !strings.Contains(q, want) {
					t.Errorf("request %s lacks %s", q, want)
				}
			}
		}
	})
}

func TestTag(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	blue := func(address string) fakeInstance {
		return fakeInstance{node: "n", nodeAddress: address, Instance: at(address), tags: []string{" Blue"}}
	}
	plain := func(address string) fakeInstance {
		return fakeInstance{node: "n", nodeAddress: address, Instance: at(address)}
	}
	f.setInstances("mixed", blue("10.0.0.1"), plain("10.0.0.2"))
	f.setInstances("plain", plain("10.0.0.3"))
	e := f.entry()
	e.ConsulServiceTag = "bLue "
	rec := runWith(t, e, testEnv(t, good))
	s := wait(t, rec, "the tagged service alone", loaded("mixed"))
	if in := s.Services["mixed"].Instances; len(in) != 1 || in[0].Address != "10.0.0.1" {
		t.Errorf("the tag selected %v", in)
	}
	f.setInstances("mixed", plain("10.0.0.1"), plain("10.0.0.2"))
	wait(t, rec, "nothing with the tag", func(s registrytest.State) bool { return len(s.Services) == 0 && s.Gap == nil })
	f.setInstances("plain", blue("10.0.0.3"))
	wait(t, rec, "another tagged service", loaded("plain"))
}

func TestWarning(t *testing.T) {
	t.Parallel()
	for _, passingOnly := range []bool{true, false} {
		f := newFake(t)
		f.setInstances("web", fakeInstance{node: "n", nodeAddress: "10.0.0.1", Instance: at("10.0.0.1"), warning: true, warnWeight: 7})
		e := f.entry()
		e.ConsulPassingOnly = &passingOnly
		rec := runWith(t, e, testEnv(t, good))
		in := wait(t, rec, "the service", loaded("consul", "web")).Services["web"].Instances[0]
		if in.Unhealthy != passingOnly || !passingOnly && in.Weight != 7 {
			t.Errorf("consulPassingOnly %v: %+v", passingOnly, in)
		}
	}
}

// What follows is about tokens. The answers are those of an agent that denies by default.

// anonymous is an entry that names no Secret.
func anonymous(f *fake) registry.Entry {
	e := quick(f.entry())
	e.AuthSecretName = ""
	return e
}

// TestSecretWithoutToken has a Secret that lacks the token where the anonymous token reads a part: reading on without
// a token would take the rest for gone.
func TestSecretWithoutToken(t *testing.T) {
	t.Parallel()
	for name, bad := range map[string]registry.Credentials{
		"misspelt": {"consultoken": goodToken},
		"empty":    {"consulToken": "", "token": ""},
		"blank":    {"token": " \n"},
		"no keys":  {},
		"nothing":  nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.set("web", at("10.0.0.1"))
			f.set("pay", at("10.0.0.2"))
			f.edit(func() { f.policies[""] = policy{services: func(n string) bool { return n != "pay" }, nodes: true} })
			var current atomic.Value
			current.Store(bad)
			env := testEnv(t, nil)
			env.Credentials = func() (registry.Credentials, error) { return current.Load().(registry.Credentials), nil }
			rec := runWith(t, quick(f.entry()), env)
			refused := failed("", `Secret "consul"`, "consulToken", "token", "authSecretName")
			if s := wait(t, rec, "a clear message", refused); len(s.Services) > 0 || s.Synced {
				t.Errorf("services were read without a token: %v", s.Services)
			}
			current.Store(good)
			n := len(wait(t, rec, "recovery", loaded("consul", "pay", "web")).Events)
			current.Store(bad)
			wait(t, rec, "the message again", func(s registrytest.State) bool {
				return s.Gap != nil && refused(registrytest.State{Events: s.Events[n:]})
			})
			noRemoval(t, rec)
			current.Store(good)
			wait(t, rec, "recovery", func(s registrytest.State) bool {
				return loaded("consul", "pay", "web")(s) && len(s.Gaps) == 0
			})
			noRemoval(t, rec)
			f.edit(func() {
				if f.tokenless > 0 {
					t.Errorf("%d requests went without a token", f.tokenless)
				}
			})
		})
	}
}

func TestNoTokenIsNoEmptyRegistry(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, anonymous(f), testEnv(t, nil))
	wait(t, rec, "a clear message", failed("", "not even list consul itself", "consulToken"))
	if s := rec.State(); s.Synced {
		t.Error("an anonymous, empty answer was believed")
	}
}

func TestTokenWithoutServices(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.edit(func() { f.policies[goodToken] = policy{nodes: true} })
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "a clear message", failed("", "may read no service", "service_prefix"))
	if s := rec.State(); s.Synced {
		t.Error("an empty answer that policies cut was believed")
	}
}

func TestTokenWithoutNodes(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	f.edit(func() { f.policies[goodToken] = policy{services: readAll.services} })
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "a clear message", failed("web", "service and node read"))
	wait(t, rec, "a listing", func(s registrytest.State) bool { return s.Loaded })
	if s := rec.State(); len(s.Services) > 0 {
		t.Errorf("services without visible instances were stated: %v", s.Services)
	}
}

func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web-a", at("10.0.0.1"))
	f.set("web-b", at("10.0.0.2"))
	f.set("other", at("10.0.0.3"))
	f.edit(func() {
		f.policies[goodToken] = policy{nodes: true, services: func(n string) bool { return strings.HasPrefix(n, "web-") }}
	})
	rec := runWith(t, f.entry(), testEnv(t, good))
	wait(t, rec, "the allowed services", loaded("web-a", "web-b"))
	f.remove("web-a")
	wait(t, rec, "a true removal", loaded("web-b"))
	f.remove("web-b")
	wait(t, rec, "the removal of the last one that the token may see", loaded())
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("a token that may not read all is normal, but: %v", e.Err)
		}
	}
	f.set("web-a", at("10.0.0.1"))
	wait(t, rec, "a service that came back", loaded("web-a"))
}

func TestNarrowedTokenRemovesNothing(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	f.set("pay", at("10.0.0.2"))
	f.set("old", at("10.0.0.3"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "old", "pay", "web"))
	f.edit(func() {
		f.policies[goodToken] = policy{nodes: true, services: func(n string) bool { return n == "web" }}
	})
	wait(t, rec, "a gap", failed("", "may no longer read all services"))
	wait(t, rec, "the hidden service by name", failed("pay", "may not read its instances"))
	noRemoval(t, rec)
	f.remove("old")
	wait(t, rec, "a true removal all the same", func(s registrytest.State) bool {
		_, ok := s.Services["old"]
		return !ok
	})
	f.edit(func() { f.policies[goodToken] = readAll })
	wait(t, rec, "the widened token", func(s registrytest.State) bool {
		return loaded("consul", "pay", "web")(s) && len(s.Gaps) == 0
	})
}

func TestNodesHiddenLater(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	f.edit(func() { f.policies[goodToken] = policy{services: readAll.services} })
	wait(t, rec, "the service by name", failed("web", "service and node read"))
	noRemoval(t, rec)
}

// TestOneNodeHiddenLater has a policy hide a part of what the token saw before.
func TestOneNodeHiddenLater(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"), at("10.0.0.2"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	both := func(s registrytest.State) bool { return len(s.Services["web"].Instances) == 2 && s.Gap == nil }
	hide := func(node string) {
		f.edit(func() { f.policies[goodToken] = policy{services: readAll.services, nodes: true, hidden: node} })
	}
	hide("node-10.0.0.2")
	wait(t, rec, "the service by name", failed("web", "may no longer read all", "node read"))
	n := len(rec.State().Events)
	f.edit(f.cut)
	wait(t, rec, "the same in another session", func(s registrytest.State) bool {
		return failed("web", "may no longer read all")(registrytest.State{Events: s.Events[n:]}) && both(s)
	})
	noRemoval(t, rec)
	f.set("web", at("10.0.0.1"), at("10.0.0.2"), at("10.0.0.3"))
	hide("")
	wait(t, rec, "the widened token", func(s registrytest.State) bool {
		return len(s.Services["web"].Instances) == 3 && s.Gap == nil && len(s.Gaps) == 0
	})
	noRemoval(t, rec)
}

// TestLastVisibleInstance has the one instance go that the token may see of two.
func TestLastVisibleInstance(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.edit(func() {
		f.policies[goodToken] = policy{services: readAll.services, nodes: true, hidden: "node-10.0.0.2"}
	})
	f.set("web", at("10.0.0.1"), at("10.0.0.2"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "what may be seen", func(s registrytest.State) bool {
		return loaded("consul", "web")(s) && len(s.Services["web"].Instances) == 1
	})
	f.set("web", at("10.0.0.2"))
	wait(t, rec, "the service by name", failed("web", "may not read its instances", "node read"))
	noRemoval(t, rec)
}

// TestFilteredListIsNoRemoval has a policy hide all but one service from the list, and all of them from a new session.
func TestFilteredListIsNoRemoval(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	f.set("pay", at("10.0.0.2"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "pay", "web"))
	for _, visible := range []string{"web", "none"} {
		f.edit(func() {
			f.policies[goodToken] = policy{nodes: true, services: func(n string) bool { return n == visible }}
		})
		n := len(rec.State().Events)
		f.edit(f.cut)
		wait(t, rec, "listings in a new session", func(s registrytest.State) bool {
			listings := 0
			for _, e := range s.Events[n:] {
				if e.Kind == registrytest.Synced {
					listings++
				}
			}
			return listings > 3 && s.Gaps["pay"] != nil && (visible == "web") == (s.Gaps["web"] == nil)
		})
		noRemoval(t, rec)
	}
}

func TestStreamedAnswersAreNotBelieved(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.edit(func() { f.streams = true })
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	f.set("web", at("10.0.0.1"), at("10.0.0.2"))
	wait(t, rec, "a change", func(s registrytest.State) bool { return len(s.Services["web"].Instances) == 2 })
	f.edit(func() { f.policies[goodToken] = policy{services: readAll.services} })
	wait(t, rec, "the hidden service by name", failed("web", "service and node read"))
	noRemoval(t, rec)
}

func TestAnonymousToken(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	f.set("pay", at("10.0.0.2"))
	f.edit(func() { f.policies[""] = readAll })
	rec := runWith(t, anonymous(f), testEnv(t, nil))
	wait(t, rec, "all", loaded("consul", "pay", "web"))
	f.remove("pay")
	wait(t, rec, "a true removal", loaded("consul", "web"))
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("a removal came with a gap: %v", e.Err)
		}
	}
	n := len(rec.State().Events)
	f.edit(func() { f.policies[""] = policy{services: readAll.services} })
	wait(t, rec, "the service by name", failed("web", "anonymous token"))
	f.edit(func() { delete(f.policies, "") })
	wait(t, rec, "a clear message", failed("", "not even list consul itself"))
	for _, e := range rec.State().Events[n:] {
		if e.Changed || len(e.Removed) > 0 {
			t.Errorf("%s %q changed something", e.Kind, e.IDs)
		}
	}
}

// pathlike are names of services that something on the way may take for more than a name.
var pathlike = []string{".", "..", "a//b", "a/../web", "a/b", "/", "a/", "...", "q?z", "x y", "100%", "%2e", "#"}

func TestNamesThatLookLikePaths(t *testing.T) {
	t.Parallel()
	for _, cleaning := range []bool{false, true} {
		f := newFake(t)
		f.edit(func() { f.cleaning = cleaning })
		f.set("web", at("10.0.0.99"))
		for i, name := range pathlike {
			f.set(name, at(fmt.Sprintf("10.0.0.%d", i)))
		}
		rec := runWith(t, quick(f.entry()), testEnv(t, good))
		s := wait(t, rec, "all", func(s registrytest.State) bool { return s.Loaded && s.Gap == nil })
		for i, name := range pathlike {
			if cleaning && path.Clean("/"+name) != "/"+name {
				if err := s.Gaps[name]; err == nil || !strings.Contains(err.Error(), "rename") || strings.Contains(err.Error(), "<") {
					t.Errorf("%q: %v", name, err)
				}
				continue
			}
			if in := s.Services[name].Instances; len(in) != 1 || in[0].Address != fmt.Sprintf("10.0.0.%d", i) {
				t.Errorf("%q has %v", name, in)
			}
		}
	}
}

func TestTokenRotates(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	var token atomic.Value
	token.Store(registry.Secret(goodToken))
	env := testEnv(t, nil)
	env.Credentials = func() (registry.Credentials, error) {
		return registry.Credentials{"token": token.Load().(registry.Secret)}, nil
	}
	rec := runWith(t, quick(f.entry()), env)
	wait(t, rec, "all", loaded("consul", "web"))
	f.edit(func() { f.policies = map[string]policy{"second": readAll} })
	wait(t, rec, "the refusal", failed("", "403", "consulToken"))
	token.Store(registry.Secret(" second\n"))
	wait(t, rec, "recovery", func(s registrytest.State) bool { return loaded("consul", "web")(s) && len(s.Gaps) == 0 })
	noRemoval(t, rec)
}

// What follows is about answers that prove nothing.

func TestUnprovenAnswers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil, mend func(*fake)
		words       []string
	}{
		"no leader": {func(f *fake) { f.leader = false }, func(f *fake) { f.leader = true }, []string{"no leader"}},
		"stale":     {func(f *fake) { f.contact = time.Minute }, func(f *fake) { f.contact = time.Second }, []string{"1m0s ago"}},
		"no Consul": {func(f *fake) { f.bare = true }, func(f *fake) { f.bare = false }, []string{"is this a Consul agent"}},
		"429":       {func(f *fake) { f.status["/v1/"] = 429 }, func(f *fake) { f.status = map[string]int{} }, []string{"429", "http_max_conns_per_client"}},
		"500":       {func(f *fake) { f.status["/v1/"] = 500 }, func(f *fake) { f.status = map[string]int{} }, []string{"500"}},
		"no leader yet": {
			func(f *fake) { f.status["/v1/"], f.text = 500, "No cluster leader\n" },
			func(f *fake) { f.status = map[string]int{} },
			[]string{"500 No cluster leader"},
		},
		"a page": {
			func(f *fake) { f.status["/v1/"], f.text = 502, "<html>\n<h1>Oops</h1>" },
			func(f *fake) { f.status = map[string]int{} },
			[]string{"502 Bad Gateway"},
		},
		"redirected": {func(f *fake) { f.status["/v1/"] = 302 }, func(f *fake) { f.status = map[string]int{} }, []string{"302"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.set("web", at("10.0.0.1"))
			rec := runWith(t, quick(f.entry()), testEnv(t, good))
			wait(t, rec, "all", loaded("consul", "web"))
			f.edit(func() {
				c.spoil(f)
				f.services = map[string]*fakeService{} // and what such an answer says is wrong
			})
			wait(t, rec, "a gap", failed("", c.words...))
			noRemoval(t, rec)
			f.wipe()
			f.set("web", at("10.0.0.1"))
			f.edit(func() { c.mend(f) })
			wait(t, rec, "recovery", func(s registrytest.State) bool { return loaded("consul", "web")(s) && len(s.Gaps) == 0 })
		})
	}
}

func TestIndexThatGoesBackIsAGap(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for i := range 20 {
		f.set("web", at(fmt.Sprintf("10.0.0.%d", 1+i)))
	}
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	f.wipe() // without breaking a connection, as behind a load balancer
	s := wait(t, rec, "a gap", failed("", "went back"))
	for _, e := range s.Events {
		if len(e.Removed) > 0 {
			t.Errorf("%s removed %q before the gap", e.Kind, e.Removed)
		}
		if e.Kind == registrytest.Fail && len(e.IDs) == 0 {
			break
		}
	}
	wait(t, rec, "the new cluster", loaded("consul"))
}

func TestIndexOfOneServiceThatGoesBackIsAGap(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"), at("10.0.0.2"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	n := len(wait(t, rec, "all", loaded("consul", "web")).Events)
	f.edit(func() { // what an agent of another cluster may answer
		f.services["web"] = &fakeService{index: 7, instances: f.services["web"].instances[:1]}
	})
	gapFirst(t, rec, n, "went back")
	wait(t, rec, "the new state", func(s registrytest.State) bool {
		return len(s.Services["web"].Instances) == 1 && s.Gap == nil && len(s.Gaps) == 0
	})
}

// gapFirst waits for a gap of the registry with these words after the first n events, and then some listings more. No
// event before the gap may change anything, unless a gap of its own goes before.
func gapFirst(t *testing.T, rec *registrytest.Recorder, n int, words ...string) {
	t.Helper()
	all := func(s registrytest.State) registrytest.State { return registrytest.State{Events: s.Events[n:]} }
	s := wait(t, rec, "a gap", func(s registrytest.State) bool { return failed("", words...)(all(s)) })
	gaps := map[string]bool{}
	for _, e := range s.Events[n:] {
		if e.Kind == registrytest.Fail {
			if len(e.IDs) == 0 {
				return
			}
			gaps[e.IDs[0]] = true
		}
		if (e.Changed || len(e.Removed) > 0) && !gaps[e.IDs[0]] {
			t.Errorf("%s %q changed something before a gap was reported", e.Kind, e.IDs)
		}
	}
}

// TestReplacedAgentIsAGap has another agent, of a cluster with a newer index, answer at the same address. The interval is
// 30 s: no listing is missed.
func TestReplacedAgentIsAGap(t *testing.T) {
	t.Parallel()
	touch := func(f *fake) { // a change of the catalog that is none of a service
		f.index++
		f.catalog = f.index
		f.wake()
	}
	for name, c := range map[string]struct {
		tls     bool
		replace func(*fake)
	}{
		"while queries wait":              {false, (*fake).replace},
		"while queries wait, over TLS":    {true, (*fake).replace},
		"between two lists, over TLS":     {true, func(f *fake) { f.parted = (*fake).replace; touch(f) }},
		"between two lists":               {false, func(f *fake) { f.parted = (*fake).replace; touch(f) }},
		"the old one says that it closes": {false, func(f *fake) { f.server.Config.SetKeepAlivesEnabled(false); touch(f) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			if c.tls {
				f = newTLSFake(t)
			}
			f.set("web", at("10.0.0.1"), at("10.0.0.2"))
			f.set("old", at("10.0.0.3"))
			env := testEnv(t, good)
			if c.tls {
				env.ClientTLS = func() (*tls.Config, error) { return f.trust(), nil }
			}
			rec := runWith(t, f.entry(), env)
			wait(t, rec, "all", loaded("consul", "old", "web"))
			for lists := range 3 { // so that no query is the first one of its connection
				if lists > 0 {
					f.edit(func() { touch(f) })
				}
				f.await("queries that wait", func() bool { return f.waiting == 4 && f.asked(catalogPath) == lists+2 })
			}
			n := len(rec.State().Events)
			f.edit(func() { c.replace(f) })
			gapFirst(t, rec, n, "list services")
			f.edit(func() { f.services["web"].instances[0].Port = 1; touch(f) })
			wait(t, rec, "recovery", func(s registrytest.State) bool {
				return s.Gap == nil && len(s.Gaps) == 0 && s.Services["web"].Instances[0].Port == 1
			})
		})
	}
}

// TestServerThatKeepsNoConnection has an answer end its connection each time, as a proxy may do: that is no gap.
func TestServerThatKeepsNoConnection(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.server.Config.SetKeepAlivesEnabled(false)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	f.set("web", at("10.0.0.1"), at("10.0.0.2"))
	f.set("new", at("10.0.0.3"))
	s := wait(t, rec, "changes, and some listings", func(s registrytest.State) bool {
		return loaded("consul", "new", "web")(s) && len(s.Services["web"].Instances) == 2 && len(s.Events) > 30
	})
	for _, e := range s.Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("Fail %q: %v", e.IDs, e.Err)
		}
	}
}

func TestEmptyAnswerOfAStartingClusterIsNotBelieved(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, quick(f.entry()), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	f.edit(func() {
		f.index++
		f.catalog, f.services = f.index, map[string]*fakeService{}
		f.wake()
	})
	wait(t, rec, "a gap", failed("", "not even list consul itself"))
	noRemovalOf(t, rec, "web")
}

func noRemovalOf(t *testing.T, rec *registrytest.Recorder, id string) {
	t.Helper()
	if _, ok := rec.State().Services[id]; !ok {
		t.Errorf("%s was removed", id)
	}
}

func TestFailover(t *testing.T) {
	t.Parallel()
	a, b := newFake(t), newFake(t)
	for _, f := range []*fake{a, b} {
		f.set("web", at("10.0.0.1"))
	}
	e := quick(a.entry())
	e.Domain = a.address + " , " + b.address
	rec := runWith(t, e, testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	if b.requests() > 0 {
		t.Error("the second agent was asked while the first one worked")
	}
	from := time.Now()
	a.stop()
	wait(t, rec, "a gap", failed("", a.address))
	wait(t, rec, "the second agent", func(s registrytest.State) bool { return s.Gap == nil && len(s.Gaps) == 0 && b.requests() > 0 })
	if took := time.Since(from); took > 5*time.Second {
		t.Errorf("the failover took %v", took)
	}
	a.start()
	asked := a.requests()
	n := len(rec.State().Events)
	wait(t, rec, "some listings", func(s registrytest.State) bool { return len(s.Events) > n+10 })
	if a.requests() > asked {
		t.Error("it went back to the first agent while the second one worked")
	}
	noRemoval(t, rec)
	// An agent that answers, but with errors, is left too.
	b.edit(func() { b.status["/v1/"] = 500 })
	wait(t, rec, "the first agent again", func(registrytest.State) bool { return a.requests() > asked })
	wait(t, rec, "recovery", func(s registrytest.State) bool { return s.Gap == nil && len(s.Gaps) == 0 })
	noRemoval(t, rec)
}

// What follows is about promptness and what it costs. The interval is 30 s: nothing is found by waiting for it.

func TestChangesAreNoticedAtOnce(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, f.entry(), testEnv(t, good))
	wait(t, rec, "all", loaded("consul", "web"))
	for n, step := range []struct {
		do func()
		ok func(registrytest.State) bool
	}{
		{func() { f.set("new", at("10.0.0.2")) }, loaded("consul", "new", "web")},
		{
			func() { f.set("web", at("10.0.0.1"), at("10.0.0.3")) },
			func(s registrytest.State) bool { return len(s.Services["web"].Instances) == 2 },
		},
		{
			func() {
				down := at("10.0.0.3")
				down.Unhealthy = true
				f.set("web", at("10.0.0.1"), down)
			},
			func(s registrytest.State) bool { return s.Services["web"].Instances[1].Unhealthy },
		},
		{func() { f.remove("web") }, loaded("consul", "new")},
	} {
		from := time.Now()
		step.do()
		wait(t, rec, "a change", step.ok)
		if took := time.Since(from); took > 5*time.Second {
			t.Errorf("step %d took %v", n, took)
		}
	}
	f.edit(func() {
		if f.streamed > 0 {
			t.Errorf("%d answers came from a stream, and each cost a second request", f.streamed)
		}
	})
}

func TestFlappingIsSlowedDown(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("web", at("10.0.0.1"))
	rec := runWith(t, f.entry(), testEnv(t, good))
	before := wait(t, rec, "all", loaded("consul", "web"))
	begun := time.Now()
	for i := 0; time.Since(begun) < time.Second; i++ {
		in := at("10.0.0.1")
		in.Unhealthy = i%2 == 0
		f.set("web", in)
		_, _ = rec.Wait(5*time.Millisecond, func(registrytest.State) bool { return false })
	}
	f.set("web", at("10.0.0.7"))
	s := wait(t, rec, "the last state", func(s registrytest.State) bool { return s.Services["web"].Instances[0].Address == "10.0.0.7" })
	took := time.Since(begun)
	puts := 0
	for _, e := range s.Events[len(before.Events):] {
		if e.Kind == registrytest.Put && e.IDs[0] == "web" {
			puts++
		}
	}
	if most := int(took/minPause) + 2; puts > most {
		t.Errorf("%d changes were stated within %v, more than %d", puts, took, most)
	}
}

// TestManyServices reads many more services than an agent allows connections, twice, by two entries.
func TestManyServices(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	const n = 400
	name := func(i int) string { return fmt.Sprintf("service-%04d", i) }
	ip := func(i int) string { return fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250) }
	for i := range n {
		f.set(name(i), at(ip(i)))
	}
	env := testEnv(t, good)
	e := f.entry()
	e.RefreshInterval = registry.Interval(10 * time.Minute)
	recs := []*registrytest.Recorder{runWith(t, e, env), runWith(t, e, env)}
	for _, rec := range recs {
		wait(t, rec, "all services", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == n+1 })
	}
	// The last names have no query of their own. A check tells of the one change, the catalog of the other.
	for i := n - 40; i < n; i += 16 {
		for what, edit := range map[string]func(*registry.Instance){
			"a check": func(in *registry.Instance) { in.Unhealthy = true },
			"a port":  func(in *registry.Instance) { in.Port = 9090 },
		} {
			in := at(ip(i))
			edit(&in)
			begun := time.Now()
			f.set(name(i), in)
			for _, rec := range recs {
				wait(t, rec, "a change of "+what, func(s registrytest.State) bool {
					got := s.Services[name(i)].Instances[0]
					return got.Unhealthy == in.Unhealthy && got.Port == in.Port
				})
			}
			t.Logf("a change of %s reached both entries after %v", what, time.Since(begun).Round(time.Millisecond))
			f.set(name(i), at(ip(i)))
			for _, rec := range recs {
				wait(t, rec, "the way back", func(s registrytest.State) bool {
					got := s.Services[name(i)].Instances[0]
					return !got.Unhealthy && got.Port == 8080
				})
			}
		}
	}
	// A node without checks goes, and with it an instance of each of some services, as one change.
	for i := n - 240; i < n; i += 3 {
		f.setInstances(name(i), fakeInstance{node: "n", nodeAddress: ip(i), Instance: at(ip(i)), unchecked: true},
			fakeInstance{node: "doomed", nodeAddress: "10.9.9.9", Instance: at("10.9.9.9"), unchecked: true})
	}
	instances := func(want int) func(registrytest.State) bool {
		return func(s registrytest.State) bool {
			for i := n - 240; i < n; i += 3 {
				if len(s.Services[name(i)].Instances) != want {
					return false
				}
			}
			return true
		}
	}
	for _, rec := range recs {
		wait(t, rec, "two instances of each", instances(2))
	}
	f.await("quiet", func() bool { return f.listing == len(recs) })
	// A query that comes back soon may have missed more than one change, and has everything read in any case.
	_, _ = recs[0].Wait(time.Second, func(registrytest.State) bool { return false })
	f.dropNode("doomed")
	for _, rec := range recs {
		wait(t, rec, "the end of a node", instances(1))
	}
	f.remove(name(300))
	for _, rec := range recs {
		wait(t, rec, "a removal", func(s registrytest.State) bool { return len(s.Services) == n })
		for _, e := range rec.State().Events {
			if e.Kind == registrytest.Fail {
				t.Errorf("%v %v", e.IDs, e.Err)
			}
		}
	}
	f.edit(func() {
		if f.most > 180 {
			t.Errorf("%d connections at once; an agent allows 200 to all programs of a host", f.most)
		}
		t.Logf("%d requests, at most %d connections at once", f.seen, f.most)
	})
}

func TestCrowdedAgent(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]func(*fake){
		"few connections":                     func(f *fake) { f.allowed = 40 },
		"queries leave no room for a listing": func(f *fake) { f.busy = 60 },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.edit(func() { limit(f) })
			const n = 150
			for i := range n {
				f.set(fmt.Sprintf("service-%d", i), at(fmt.Sprintf("10.0.0.%d", i)))
			}
			rec := runWith(t, f.entry(), testEnv(t, good))
			wait(t, rec, "all services", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == n+1 })
			f.set("service-149", at("10.0.1.1"))
			wait(t, rec, "a change", func(s registrytest.State) bool {
				return s.Services["service-149"].Instances[0].Address == "10.0.1.1"
			})
			f.set("new", at("10.0.2.1"))
			wait(t, rec, "a new service, and that nothing is in a gap", func(s registrytest.State) bool {
				return s.Services["new"].ID != "" && s.Gap == nil && len(s.Gaps) == 0
			})
			noRemoval(t, rec)
		})
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	f := newTLSFake(t)
	const n = 150
	for i := range n {
		f.set(fmt.Sprintf("service-%d", i), at(fmt.Sprintf("10.0.0.%d", i)))
	}
	pool := x509.NewCertPool()
	env := testEnv(t, good)
	env.ClientTLS = func() (*tls.Config, error) { return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil }
	unknown := runWith(t, quick(f.entry()), env)
	wait(t, unknown, "a certificate that nobody vouches for", failed("", "certificate"))

	env.ClientTLS = func() (*tls.Config, error) { return f.trust(), nil }
	rec := runWith(t, f.entry(), env)
	wait(t, rec, "all services", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == n+1 })
	f.await("a query per service, since they share connections", func() bool { return f.waiting >= n+2 })
	f.edit(func() {
		if len(f.conns) > 3 {
			t.Errorf("%d connections for %d queries", len(f.conns), f.waiting)
		}
	})
	unknownTLS := errors.New("no such Secret")
	env.ClientTLS = func() (*tls.Config, error) { return nil, unknownTLS }
	r, err := New(f.entry(), env)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := r.Run(ctx, registrytest.NewRecorder(ctx)); !errors.Is(err, unknownTLS) {
		t.Errorf("Run without certificates returned %v", err)
	}
}
