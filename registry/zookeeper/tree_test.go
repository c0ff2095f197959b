package zookeeper

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// every sets a short refresh interval.
func every(e registry.Entry) registry.Entry {
	e.RefreshInterval = registry.Interval(300 * time.Millisecond)
	return e
}

func (f *fake) plainEntry() registry.Entry {
	e := every(f.entry())
	e.AuthSecretName = ""
	return e
}

// differs tells how what is known differs from services, with those that have no instances.
func differs(s registrytest.State, want []registry.Service) string {
	got := slices.SortedFunc(maps.Values(s.Services), func(a, b registry.Service) int { return strings.Compare(a.ID, b.ID) })
	return cmp.Diff(want, got, equalSets)
}

// TestRecordedTreesAreRead reads what real applications wrote, as it is at the start, and as it comes while we watch.
func TestRecordedTreesAreRead(t *testing.T) {
	t.Parallel()
	for _, file := range recordings(t) {
		tr := readRecording(t, file)
		want := tr.services(t, true)
		load := func(f *fake) {
			for p, data := range tr { // in any order
				f.set(p, data)
			}
		}
		name := filepath.Base(filepath.Dir(file)) + "/" + filepath.Base(file)
		t.Run(name+" at the start", func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			load(f)
			e := f.plainEntry()
			e.ZkServicesPath = []string{"/myroot"}
			rec := run(t, e, testEnv(t, nil))
			s := wait(t, rec, "a listing", func(s registrytest.State) bool { return s.Synced })
			if diff := differs(s, want); diff != "" { // the first listing is complete
				t.Errorf("-want +got:\n%s", diff)
			}
		})
		t.Run(name+" later", func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			e := f.plainEntry()
			e.ZkServicesPath = []string{"/myroot"}
			rec := run(t, e, testEnv(t, nil))
			wait(t, rec, "a listing", func(s registrytest.State) bool { return s.Synced })
			load(f)
			diff := ""
			s, ok := rec.Wait(limit, func(s registrytest.State) bool {
				diff = differs(s, want)
				return diff == ""
			})
			if !ok {
				t.Errorf("gap %v, gaps %v, -want +got:\n%s", s.Gap, s.Gaps, diff)
			}
		})
	}
}

// TestMappingIsReadOnlyIfNeeded has applications that registered at both levels.
func TestMappingIsReadOnlyIfNeeded(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for p, data := range readRecording(t, "testdata/dubbo3/all-dubbo-tri-remote.jsonl") {
		f.set(p, data)
	}
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	s := wait(t, rec, "a listing", func(s registrytest.State) bool { return s.Loaded })
	wait(t, rec, "a further listing", func(now registrytest.State) bool { return len(now.Events) > len(s.Events) })
	f.edit(func() {
		for p := range f.reads {
			if strings.HasPrefix(p, mappingPath) || strings.HasPrefix(p, legacyMappingPath) || strings.HasPrefix(p, metadataPath) {
				t.Errorf("%s was read", p)
			}
		}
	})
}

// TestApplicationLevelLives follows a provider of Dubbo 3 that is only at application level.
func TestApplicationLevelLives(t *testing.T) {
	t.Parallel()
	for file, metadata := range map[string]string{
		"dubbo3/instance-dubbo-local": "", "dubbo2/service-local": "", "dubbo3/mixed-with-2.7": metadataPath,
	} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tr := readRecording(t, "testdata/"+file+".jsonl")
			instances := map[string]string{}
			for p, data := range tr {
				if strings.HasPrefix(p, "/dubbo/demo.api") || strings.HasPrefix(p, "/dubbo/t.") {
					continue // what is at interface level too
				}
				f.set(p, data)
				if strings.Count(p, "/") == 3 && strings.HasPrefix(p, "/services/") {
					instances[p] = data
				}
			}
			rec := run(t, f.plainEntry(), testEnv(t, nil))
			const id = "providers:demo.api.Greeter:0.0.0:"
			all := func(s registrytest.State) bool { return len(s.Services[id].Instances) == len(instances) }
			wait(t, rec, "the interface", all)
			for p := range instances {
				f.remove(p)
			}
			wait(t, rec, "nobody", func(s registrytest.State) bool {
				service, ok := s.Services[id]
				return ok && len(service.Instances) == 0
			})
			if metadata != "" { // the provider writes it after it registered
				for p := range tr {
					if strings.HasPrefix(p, metadata+"/app-") {
						f.remove(p)
					}
				}
			}
			for p, data := range instances {
				f.set(p, data)
			}
			app := path.Base(path.Dir(slices.Sorted(maps.Keys(instances))[0]))
			wait(t, rec, "the application", func(s registrytest.State) bool { return len(s.Services["/services/"+app].Instances) > 0 })
			if metadata != "" {
				if s := rec.State(); len(s.Services[id].Instances) > 0 {
					t.Error("instances without metadata are known to provide the interface")
				}
				for p, data := range tr {
					if strings.HasPrefix(p, metadata+"/app-") {
						f.set(p, data)
					}
				}
			}
			wait(t, rec, "the interface again", all)
		})
	}
}

// TestMassLossIsOneListing has most services go at once. However many there are, one call says so: only then does whoever
// listens see it as one loss.
func TestMassLossIsOneListing(t *testing.T) {
	t.Parallel()
	const n, left = 300, 30
	for name, l := range map[string]layout{"Spring Cloud": spring, "Dubbo": dubbo} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			service := func(i int) string { return fmt.Sprintf("service-%03d", i) }
			for i := range n {
				f.register(l, service(i), at(fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)))
			}
			rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.settle = time.Minute })
			s := wait(t, rec, "all", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == n })
			before := len(s.Events)
			f.edit(func() {
				for i := left; i < n; i++ {
					f.delete(l.folder(service(i)))
				}
			})
			s = wait(t, rec, "the loss", func(s registrytest.State) bool { return len(s.Services) == left })
			for _, e := range s.Events[before:] {
				if e.Kind != registrytest.Synced && len(e.Removed) > 0 {
					t.Errorf("%s removed %q by itself", e.Kind, e.Removed)
				}
				if e.Kind == registrytest.Synced && len(e.IDs) != n && len(e.IDs) != left {
					t.Errorf("a listing named %d services", len(e.IDs))
				}
			}
		})
	}
}

// TestProviderRegistersAgain has a provider go and come under another name, as Dubbo's do when a configurator concerns them.
func TestProviderRegistersAgain(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(dubbo, "demo.Api", at("10.0.0.1"))
	rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.settle = 2 * time.Second })
	const id, providers = "providers:demo.Api:0.0.0:", "/dubbo/demo.Api/providers"
	wait(t, rec, "the provider", has(id, "10.0.0.1"))
	for n := range 3 {
		reads := 0
		f.edit(func() { reads = f.reads[providers] })
		f.register(dubbo, "demo.Api")
		f.await("a look at no provider", func() bool { return f.reads[providers] > reads })
		again := at("10.0.0.1")
		again.Weight = float64(n + 2)
		f.register(dubbo, "demo.Api", again)
		wait(t, rec, "another weight", func(s registrytest.State) bool {
			i := s.Services[id].Instances
			return len(i) == 1 && i[0].Weight == again.Weight
		})
	}
	for _, e := range rec.State().Events {
		if len(e.Removed) > 0 {
			t.Errorf("%v was removed", e.Removed)
		}
	}
	f.register(dubbo, "demo.Api", at("10.0.0.2")) // additions do not wait
	wait(t, rec, "both", has(id, "10.0.0.1", "10.0.0.2"))
	wait(t, rec, "the end of the first one", has(id, "10.0.0.2"))
}

// TestInstanceRegistersAgain has the node of an application go and come again under its name with another revision.
func TestInstanceRegistersAgain(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"), at("10.0.0.2"))
	rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.settle = time.Second })
	wait(t, rec, "both", has("/services/order", "10.0.0.1", "10.0.0.2"))
	reads := 0
	f.edit(func() { reads = f.reads["/services/order"] })
	f.remove("/services/order/10.0.0.1")
	f.await("a look at the rest", func() bool { return f.reads["/services/order"] > reads })
	changed := at("10.0.0.1")
	changed.Port = 9999
	f.register(spring, "order", changed, at("10.0.0.2"))
	wait(t, rec, "another port", func(s registrytest.State) bool {
		i := s.Services["/services/order"].Instances
		return len(i) == 2 && i[0].Port == 9999
	})
	for _, e := range rec.State().Events {
		if len(e.Removed) > 0 {
			t.Errorf("%v was removed", e.Removed)
		}
	}
}

// TestConfigurators has rules for providers that do not follow them.
func TestConfigurators(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(dubbo, "demo.Api", at("10.0.0.1"))
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	const id = "providers:demo.Api:0.0.0:"
	wait(t, rec, "the provider", has(id, "10.0.0.1"))
	rule := "/dubbo/demo.Api/configurators/" +
		url.QueryEscape("override://0.0.0.0/demo.Api?category=configurators&enabled=true&weight=50")
	weight := func(w float64) func(registrytest.State) bool {
		return func(s registrytest.State) bool {
			i := s.Services[id].Instances
			return len(i) == 1 && i[0].Weight == w
		}
	}
	f.set(rule, "") // its folder was not there
	wait(t, rec, "the weight of the rule", weight(0.5))
	f.remove(rule)
	wait(t, rec, "no rule", weight(1))
	f.remove(path.Dir(rule))
	f.set(rule, "")
	wait(t, rec, "the rule again", weight(0.5))
}

// counter counts warnings.
type counter struct {
	slog.Handler
	mu    sync.Mutex
	paths map[string]int
}

func (c *counter) Enabled(context.Context, slog.Level) bool { return true }

func (c *counter) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "path" && r.Level >= slog.LevelWarn {
			c.mu.Lock()
			c.paths[a.Value.String()]++
			c.mu.Unlock()
		}
		return true
	})
	return nil
}

func newCounter() *counter {
	return &counter{Handler: slog.DiscardHandler, paths: map[string]int{}}
}

// TestBadNodes has nodes that nobody can decode. They harm nothing else, and are told of once.
func TestBadNodes(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.register(dubbo, "demo.Api", at("10.0.0.2"))
	bad := []string{
		"/services/order/broken", "/dubbo/demo.Api/providers/%ZZ", "/dubbo/demo.Api/configurators/nonsense", "/services/only/broken",
	}
	for _, p := range bad {
		f.set(p, "{")
	}
	warnings := newCounter()
	env := testEnv(t, nil)
	env.Logger = slog.New(warnings)
	rec := run(t, f.plainEntry(), env)
	wait(t, rec, "the rest", func(s registrytest.State) bool {
		return has("/services/order", "10.0.0.1")(s) && has("providers:demo.Api:0.0.0:", "10.0.0.2")(s) && has("/services/only")(s)
	})
	f.register(spring, "order2", at("10.0.0.9"))
	f.set("/services/order/1", "[")
	f.set("/dubbo/demo.Api/providers/"+dubboNode("demo.Api", at("10.0.0.3")), "")
	wait(t, rec, "a further provider", has("providers:demo.Api:0.0.0:", "10.0.0.2", "10.0.0.3"))
	f.set("/services/only/broken", "{}") // still bad, otherwise
	_, nodes := spring.nodes("only", []registry.Instance{at("10.0.0.4")})
	f.set("/services/only/broken", nodes["10.0.0.4"])
	wait(t, rec, "the mended one", has("/services/only", "10.0.0.4"))
	f.cut()
	wait(t, rec, "a gap", func(s registrytest.State) bool { return s.Gap != nil })
	wait(t, rec, "all again", func(s registrytest.State) bool { return s.Gap == nil })
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail && len(e.IDs) > 0 {
			t.Errorf("Fail %v: %v", e.IDs, e.Err)
		}
	}
	warnings.mu.Lock()
	defer warnings.mu.Unlock()
	for _, p := range bad {
		if strings.HasPrefix(p, "/dubbo") { // the name is not told, since it may hold a secret
			p = path.Dir(p)
		}
		if n := warnings.paths[p]; n == 0 || n > 2 {
			t.Errorf("%d warnings about %s", n, p)
		}
	}
}

// TestRefusedNodes has single nodes that we may not read, from the start and later.
func TestRefusedNodes(t *testing.T) {
	t.Parallel()
	const iface, folder = "providers:demo.Api:1.0.0:g", "/services/order"
	for name, c := range map[string]struct{ path, id, first string }{
		"providers":     {"/dubbo/demo.Api/providers", iface, "providers:demo.Api:0.0.0:"},
		"configurators": {"/dubbo/demo.Api/configurators", iface, "providers:demo.Api:0.0.0:"},
		"service":       {folder, folder, folder},
		"instance":      {folder + "/10.0.0.1", folder, folder},
	} {
		setup := func(t *testing.T) (*fake, func()) {
			f := newFake(t)
			f.register(spring, "other", at("10.0.0.9"))
			f.set("/dubbo/demo.Api/configurators", "")
			versioned := func(address string) {
				f.edit(func() {
					const folder = "/dubbo/demo.Api/providers"
					f.put(folder, "")
					for name := range f.nodes[folder].children {
						f.delete(folder + "/" + name)
					}
					f.put(folder+"/dubbo%3A%2F%2F"+address+"%3A8080%2Fdemo.Api%3Fversion%3D1.0.0%26group%3Dg", "")
				})
				f.register(spring, "order", at(address))
			}
			versioned("10.0.0.1")
			return f, func() { versioned("10.0.0.2") }
		}
		refuse := func(f *fake, on bool) {
			f.edit(func() { f.refused = func(p string) bool { return on && p == c.path } })
		}
		recovered := func(t *testing.T, rec *registrytest.Recorder, address string) {
			t.Helper()
			wait(t, rec, "recovery", func(s registrytest.State) bool {
				return has(iface, address)(s) && has(folder, address)(s)
			})
			s := rec.State()
			wait(t, rec, "a listing without what is not there", func(now registrytest.State) bool {
				last := now.Events[len(now.Events)-1]
				return len(now.Events) > len(s.Events) && last.Kind == registrytest.Synced && len(last.IDs) == 3
			})
		}
		t.Run(name+" at the start", func(t *testing.T) {
			t.Parallel()
			f, _ := setup(t)
			refuse(f, true)
			rec := run(t, f.plainEntry(), testEnv(t, nil))
			s := wait(t, rec, "a failure by name, and the rest", func(s registrytest.State) bool {
				return s.Loaded && s.Gaps[c.first] != nil && has("/services/other", "10.0.0.9")(s)
			})
			if _, ok := s.Services[c.first]; ok {
				t.Errorf("%s was stated", c.first)
			}
			if text := s.Gaps[c.first].Error(); !strings.Contains(text, c.path) || !strings.Contains(text, "authSecretName") {
				t.Error(text)
			}
			refuse(f, false)
			recovered(t, rec, "10.0.0.1")
		})
		t.Run(name+" later", func(t *testing.T) {
			t.Parallel()
			f, change := setup(t)
			rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.repair = 300 * time.Millisecond })
			recovered(t, rec, "10.0.0.1")
			n := len(rec.State().Events)
			refuse(f, true)
			wait(t, rec, "a failure by name", func(s registrytest.State) bool { return s.Gaps[c.id] != nil })
			s := wait(t, rec, "a listing", func(s registrytest.State) bool {
				return s.Events[len(s.Events)-1].Kind == registrytest.Synced
			})
			if last := s.Events[len(s.Events)-1]; !slices.Contains(last.IDs, c.id) {
				t.Errorf("the listing names %v", last.IDs)
			}
			for _, e := range s.Events[n:] {
				if len(e.Removed) > 0 {
					t.Errorf("%v was removed", e.Removed)
				}
			}
			f.edit(func() { f.lost = true }) // since ZooKeeper does not tell us of what we may not read
			if name != "instance" {
				change()
			}
			f.edit(func() { f.lost = false })
			refuse(f, false)
			if name == "instance" {
				recovered(t, rec, "10.0.0.1")
				change()
			}
			recovered(t, rec, "10.0.0.2")
		})
	}
}

// TestRefusedRoot has a root that we may not read for a while. Nothing is listed meanwhile, and everything read anew after it.
func TestRefusedRoot(t *testing.T) {
	t.Parallel()
	for _, root := range []string{"/dubbo", "/services"} {
		t.Run(root, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.register(spring, "order", at("10.0.0.1"))
			f.register(dubbo, "demo.Api", at("10.0.0.1"))
			rec := run(t, f.plainEntry(), testEnv(t, nil))
			both := func(address string) func(registrytest.State) bool {
				return func(s registrytest.State) bool {
					return has("/services/order", address)(s) && has("providers:demo.Api:0.0.0:", address)(s)
				}
			}
			n := len(wait(t, rec, "both", both("10.0.0.1")).Events)
			f.edit(func() { f.refused = func(p string) bool { return p == root } })
			s := wait(t, rec, "a gap", func(s registrytest.State) bool { return s.Gap != nil })
			if !strings.Contains(s.Gap.Error(), root) {
				t.Error(s.Gap)
			}
			f.edit(func() { f.lost = true })
			f.register(spring, "order", at("10.0.0.2"))
			f.register(dubbo, "demo.Api", at("10.0.0.2"))
			f.edit(func() { f.lost, f.refused = false, nil })
			wait(t, rec, "what changed", both("10.0.0.2"))
			noRemovalInGap(t, rec, n)
		})
	}
}

// TestLostEvents has the server forget to tell. The slow repair finds out, and watches again.
func TestLostEvents(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.register(dubbo, "demo.Api", at("10.0.0.1"))
	rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.repair = 300 * time.Millisecond })
	const iface = "providers:demo.Api:0.0.0:"
	wait(t, rec, "all", has(iface, "10.0.0.1"))
	changed := at("10.0.0.1")
	changed.Port = 9999
	f.edit(func() { f.lost = true })
	f.register(spring, "order", changed)
	f.register(spring, "new", at("10.0.0.7"))
	f.register(dubbo, "demo.Api", at("10.0.0.2"))
	f.edit(func() { f.lost = false })
	wait(t, rec, "what was not told", func(s registrytest.State) bool {
		i := s.Services["/services/order"].Instances
		return len(i) == 1 && i[0].Port == 9999 && has(iface, "10.0.0.2")(s) && has("/services/new", "10.0.0.7")(s)
	})
	f.await("watches where they were lost", func() bool {
		for c := range f.conns {
			return c.child["/services"] && c.child["/dubbo/demo.Api/providers"] && c.data["/services/order/10.0.0.1"]
		}
		return false
	})
	f.register(spring, "order", at("10.0.0.1"))
	f.register(dubbo, "demo.Api", at("10.0.0.3"))
	wait(t, rec, "what is told", func(s registrytest.State) bool {
		i := s.Services["/services/order"].Instances
		return len(i) == 1 && i[0].Port == 8080 && has(iface, "10.0.0.3")(s)
	})
}

// TestAtRest has nothing happen. Watches that stand are not asked for again, since the library would keep each of them.
func TestAtRest(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for n := range 20 {
		f.register(spring, fmt.Sprint("s", n), at("10.0.0.1"), at("10.0.0.2"))
		f.register(dubbo, fmt.Sprint("i", n), at("10.0.0.1"))
	}
	e := f.plainEntry()
	e.ZkServicesPath = []string{"/missing"}
	rec := run(t, e, testEnv(t, nil), func(z *zookeeper) { z.repair = 500 * time.Millisecond })
	s := wait(t, rec, "all, twice", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == 40 && listings(s) >= 2 })
	standing := 0
	f.edit(func() { standing = f.watches })
	if most := 3 + 20*(1+2) + 20*2; standing != most {
		t.Errorf("%d watches for 20 services with 2 instances and 20 interfaces, want %d", standing, most)
	}
	events, requests := len(s.Events), 0
	f.edit(func() { requests = f.requests })
	f.await("many reads of the repair", func() bool { return f.requests > requests+150 })
	for _, e := range rec.State().Events[events:] {
		if e.Kind != registrytest.Synced {
			t.Errorf("%s %v %v at rest", e.Kind, e.IDs, e.Err)
		}
	}
	f.edit(func() {
		if f.watches != standing {
			t.Errorf("%d watches were asked for at rest", f.watches-standing)
		}
	})
	// Each change costs one watch, and each look at what went another read.
	for n := range 5 {
		changed := at("10.0.0.1")
		changed.Port = uint32(9000 + n)
		f.register(spring, "s0", changed, at("10.0.0.2"))
		wait(t, rec, "a change", func(s registrytest.State) bool {
			i := s.Services["/services/s0"].Instances
			return len(i) == 2 && i[0].Port == changed.Port
		})
	}
	f.edit(func() {
		if f.watches != standing+5 {
			t.Errorf("5 changes took %d watches", f.watches-standing)
		}
	})
}

// TestRootOfTheTree reads services that are not in a folder of their own.
func TestRootOfTheTree(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	_, nodes := spring.nodes("x", []registry.Instance{at("10.0.0.1")})
	for _, p := range []string{"/web", "/services/web", "/apps/prod/web", "/zookeeper/quota"} {
		f.set(p+"/1", nodes["10.0.0.1"])
	}
	f.register(dubbo, "demo.Api", at("10.0.0.1"))
	e := f.plainEntry()
	e.ZkServicesPath = []string{"/", "/apps/prod/", "/services", "/dubbo"}
	rec := run(t, e, testEnv(t, nil))
	s := wait(t, rec, "all", func(s registrytest.State) bool { return s.Loaded })
	hosts := map[string]string{}
	for id, service := range s.Services {
		hosts[id] = service.Host
	}
	if diff := cmp.Diff(map[string]string{
		"/web": "web.zookeeper", "/services/web": "web.services.zookeeper", "/apps/prod/web": "web.apps-prod.zookeeper",
		"providers:demo.Api:0.0.0:": "providers:demo.Api:0.0.0:.zookeeper",
	}, hosts); diff != "" {
		t.Error(diff)
	}
}

// TestVersionsComeAndGo has an interface change its version.
func TestVersionsComeAndGo(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	provider := func(version string) string {
		return "/dubbo/demo.Api/providers/dubbo%3A%2F%2F10.0.0.1%3A20880%2Fdemo.Api%3Fversion%3D" + version
	}
	f.set(provider("1.0.0"), "")
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	wait(t, rec, "version 1", has("providers:demo.Api:1.0.0:", "10.0.0.1"))
	f.set(provider("2.0.0"), "")
	f.remove(provider("1.0.0"))
	wait(t, rec, "version 2, and nobody of version 1", func(s registrytest.State) bool {
		return has("providers:demo.Api:1.0.0:")(s) && has("providers:demo.Api:2.0.0:", "10.0.0.1")(s)
	})
	f.remove("/dubbo/demo.Api/providers")
	wait(t, rec, "nobody", has("providers:demo.Api:2.0.0:"))
	f.remove("/dubbo/demo.Api")
	wait(t, rec, "nothing", func(s registrytest.State) bool { return len(s.Services) == 0 })
	f.set(provider("3.0.0"), "")
	wait(t, rec, "version 3", func(s registrytest.State) bool {
		return len(s.Services) == 1 && has("providers:demo.Api:3.0.0:", "10.0.0.1")(s)
	})
}

// TestServersTakeTurns has a list of servers of which some do not serve.
func TestServersTakeTurns(t *testing.T) {
	t.Parallel()
	good, other := newFake(t), newFake(t)
	for _, f := range []*fake{good, other} {
		f.register(spring, "order", at("10.0.0.1"))
	}
	for what, serve := range map[string]struct {
		answer string
		word   string
	}{
		"closes":         {"", "quorum"},
		"speaks HTTP":    {"HTTP/1.1 400 Bad Request\r\n\r\n", "is it a ZooKeeper?"},
		"a short answer": {"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00", "is it a ZooKeeper?"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_, _ = packet(c)
					_, _ = io.WriteString(c, serve.answer)
					c.Close()
				}
			})
			t.Cleanup(serving.Wait)
			t.Cleanup(func() { l.Close() })
			e := good.plainEntry()
			e.Domain = l.Addr().String()
			s := wait(t, run(t, e, testEnv(t, nil)), "a failure", func(s registrytest.State) bool { return s.Gap != nil })
			if !strings.Contains(s.Gap.Error(), serve.word) {
				t.Error(s.Gap)
			}
			e.Domain += "," + good.address
			wait(t, run(t, e, testEnv(t, nil)), "the good one", has("/services/order", "10.0.0.1"))
		})
	}
	t.Run("one stops", func(t *testing.T) {
		t.Parallel()
		f := newFake(t)
		f.register(spring, "order", at("10.0.0.1"))
		_, port, err := net.SplitHostPort(other.address)
		if err != nil {
			t.Fatal(err)
		}
		e := f.plainEntry()
		e.Domain = "localhost:" + port + "," + f.address
		rec := run(t, e, testEnv(t, nil))
		n := len(wait(t, rec, "a service", has("/services/order", "10.0.0.1")).Events)
		for _, f := range []*fake{f, other} { // whichever is in use
			f.cut()
			f.edit(func() { f.hang = true })
			s := wait(t, rec, "a gap and its end", func(s registrytest.State) bool { return s.Gap == nil })
			f.edit(func() { f.hang = false })
			for _, e := range s.Events[n:] {
				if e.Changed || len(e.Removed) > 0 {
					t.Errorf("%s %v changed something", e.Kind, e.IDs)
				}
			}
		}
	})
}

// TestSecret has Secrets that are of no use. Without the keys nothing is read, since nobody sees less.
func TestSecret(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.edit(func() { f.login = goodUser + ":" + goodPassword })
	var current atomic.Pointer[registry.Credentials]
	env := testEnv(t, nil)
	env.Credentials = func() (registry.Credentials, error) { return *current.Load(), nil }
	secret := registry.Credentials{}
	current.Store(&secret)
	rec := run(t, every(f.entry()), env)
	for _, c := range []struct {
		secret registry.Credentials
		word   string
	}{
		{registry.Credentials{}, "lacks zkUsername"},
		{registry.Credentials{"zkUsername": goodUser}, "lacks zkUsername or zkPassword"},
		{registry.Credentials{"zkUsername": "a:b", "zkPassword": goodPassword}, "colon"},
		{registry.Credentials{"username": goodUser, "password": "wrong-password"}, "check user and password in secret zk"},
	} {
		current.Store(&c.secret)
		s := wait(t, rec, c.word, func(s registrytest.State) bool { return s.Gap != nil && strings.Contains(s.Gap.Error(), c.word) })
		if s.Synced {
			t.Fatalf("a listing with %s", c.word)
		}
		for _, value := range c.secret {
			if value != goodUser && strings.Contains(s.Gap.Error(), value.Reveal()) {
				t.Errorf("the error shows the secret: %v", s.Gap)
			}
		}
		f.cut()
	}
	secret = registry.Credentials{"zkUsername": goodUser, "zkPassword": goodPassword, "username": "other", "password": "other"}
	current.Store(&secret)
	f.cut()
	wait(t, rec, "the service", has("/services/order", "10.0.0.1"))
}

// TestStopAtAnyTime ends a Run at any moment of its beginning.
func TestStopAtAnyTime(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for n := range 5 {
		f.register(dubbo, fmt.Sprint("i", n), at("10.0.0.1"))
	}
	var slow int
	for range 100 {
		r, err := New(f.plainEntry(), testEnv(t, nil))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rand.IntN(5000))*time.Microsecond)
		if err := r.Run(ctx, registrytest.NewRecorder(ctx)); err != nil {
			t.Error(err)
		}
		if end, _ := ctx.Deadline(); time.Since(end) > 900*time.Millisecond {
			slow++
		}
		cancel()
	}
	if slow > 10 { // the library's own second
		t.Errorf("%d of 100 took long to end", slow)
	}
}

// TestObserve has the requests counted.
func TestObserve(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.edit(func() { f.login = goodUser + ":" + goodPassword })
	env := testEnv(t, credentials())
	var mu sync.Mutex
	seen := map[string]int{}
	env.Observe = func(operation string, _ time.Duration, err error) {
		mu.Lock()
		defer mu.Unlock()
		seen[operation]++
		if err != nil {
			t.Errorf("%s: %v", operation, err)
		}
	}
	rec := run(t, every(f.entry()), env)
	wait(t, rec, "the service", has("/services/order", "10.0.0.1"))
	mu.Lock()
	defer mu.Unlock()
	for _, operation := range []string{"session", "auth", "sync", "children", "get", "exists"} {
		if seen[operation] == 0 {
			t.Errorf("no %s among %v", operation, seen)
		}
	}
}

// TestNewSaysWhatIsWrong tells of each bad field, and uses what is left.
func TestNewSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		entry   registry.Entry
		paths   []string
		nothing bool
	}{
		"all well": {
			registry.Entry{Domain: "zk-1, zk-2:2182,[::1]:2183/prod/eu/", ZkServicesPath: []string{"/services/", "/dubbo", "/a"}}, nil, false,
		},
		"empty":               {registry.Entry{}, []string{"domain"}, true},
		"a path alone":        {registry.Entry{Domain: "/prod"}, []string{"domain"}, true},
		"one bad server":      {registry.Entry{Domain: "zk-1,zk-2:0"}, []string{"domain[1]"}, false},
		"a URL":               {registry.Entry{Domain: "zookeeper://zk-1:2181"}, []string{"domain[0]"}, true},
		"a path in the midst": {registry.Entry{Domain: "zk-1/prod,zk-2"}, []string{"domain"}, true},
		"a bad path":          {registry.Entry{Domain: "zk-1//prod"}, []string{"domain"}, true},
		"a path with dots":    {registry.Entry{Domain: "zk-1/../prod"}, []string{"domain"}, true},
		"a bad port":          {registry.Entry{Domain: "zk-1", Port: 65536}, []string{"port"}, false},
		"bad paths of services": {
			registry.Entry{Domain: "zk-1", ZkServicesPath: []string{"a", "/b", "/c//d", "/dubbo/x"}},
			[]string{"zkServicesPath[0]", "zkServicesPath[2]", "zkServicesPath[3]"}, false,
		},
		"a path thrice": {registry.Entry{Domain: "zk-1", ZkServicesPath: []string{"/b", " /b/ ", "/b", ""}}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := New(c.entry, testEnv(t, nil))
			var paths []string
			for _, e := range registry.FieldErrors(err) {
				paths = append(paths, e.Path)
			}
			if !slices.Equal(paths, c.paths) || (r == nil) != c.nothing || err == nil != (len(c.paths) == 0) {
				t.Errorf("%v: %q, nothing %v", err, paths, r == nil)
			}
		})
	}
	r, err := New(registry.Entry{Domain: "zk-1, zk-2:2182,[::1]/prod/eu/", ZkServicesPath: []string{"/b", " /b/ ", "/services/", "/"}}, testEnv(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	z := r.(*zookeeper)
	const want = `[zk-1:2181 zk-2:2182 [::1]:2181] /prod/eu ["/services" "/b" ""]`
	if got := fmt.Sprintf("%v %s %q", z.servers, z.chroot, z.roots); got != want {
		t.Error(got)
	}
}
