package registrytest

import (
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// What a case may need of the backend: each returns what is missing, empty if nothing is.

func set(b Backend) string    { return unless(b.Set != nil, "change services") }
func remove(b Backend) string { return unless(b.Remove != nil, "remove services") }
func restart(b Backend) string {
	return unless(b.Stop != nil && b.Restart != nil, "be stopped and started")
}
func wipe(b Backend) string   { return unless(b.Wipe != nil, "come back empty") }
func refuse(b Backend) string { return unless(b.Refuse != nil, "refuse credentials") }
func hang(b Backend) string   { return unless(b.Hang != nil, "hang") }
func hangAt(b Backend) string {
	return unless(b.HangAt != nil && b.Requests != nil, "hang at one request")
}
func anyNames(b Backend) string {
	return unless(b.Set != nil && b.Services == nil, "have any number of services")
}

func unless(can bool, what string) string {
	if can {
		return ""
	}
	return what
}

func needs(list ...func(Backend) string) func(Backend) string {
	return func(b Backend) string {
		for _, need := range list {
			if what := need(b); what != "" {
				return what
			}
		}
		return ""
	}
}

func cases() []testcase {
	return []testcase{
		{"first sync", needs(), firstSync},
		{"empty registry", needs(anyNames), emptyRegistry},
		{"nothing new is published", needs(), nothingNew},
		{"listings prove freshness", needs(), freshness},
		{"add", needs(set), add},
		{"change", needs(set), change},
		{"remove one instance", needs(set), removeOne},
		{"remove the last instance", needs(set), removeLast},
		{"service vanishes", needs(set, remove), vanish},
		{"outage", needs(restart), outage},
		{"down at the start", needs(restart), downAtStart},
		{"recovery with change", needs(set, restart), recoveryWithChange},
		{"restart empty", needs(wipe), restartEmpty},
		{"bad credentials at the start", needs(refuse), badCredentialsAtStart},
		{"bad credentials while running", needs(refuse), badCredentialsRunning},
		{"server hangs", needs(hang), serverHangs},
		{"one call hangs", needs(hangAt), oneCallHangs},
		{"cancel at each request", needs(hangAt), cancelAtEachRequest},
		{"cancel at once", needs(), cancelAtOnce},
		{"run again", needs(), runAgain},
		{"1000 services", needs(anyNames, remove), thousand},
		{"environment", needs(), environment},
		{"files", needs(), filesCase},
	}
}

func firstSync(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	s := h.agree(w, "first sync")
	for _, own := range h.b.Own {
		if _, ok := s.Services[own]; !ok {
			h.Errorf("the registry's own service %s is missing", own)
		}
	}
	for _, e := range s.Events {
		if e.Kind == Fail {
			h.Errorf("Fail %v without a failure: %v", e.IDs, e.Err)
		}
	}
	h.end()
}

// most is the number of services that the backend can have.
func (h *harness) most() int {
	if h.b.Services == nil {
		return 1 << 20
	}
	return len(h.b.Services)
}

func emptyRegistry(h *harness) {
	h.run()
	h.wait("the listing of an empty registry", func(s State) bool { return s.Loaded && s.Gap == nil })
	w := h.populate(1)
	h.agree(w, "the first service of an empty registry")
	h.end()
}

func nothingNew(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	after := h.listings(len(before.Events), 4)
	h.quiet(after.Events[len(before.Events):], "while nothing happened")
	for _, e := range after.Events[len(before.Events):] {
		if e.Kind == Fail {
			h.Errorf("Fail %v while nothing happened: %v", e.IDs, e.Err)
		}
	}
	h.end()
}

func freshness(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	after := h.listings(len(before.Events), 5)
	last := time.Time{}
	for _, e := range after.Events {
		if e.Kind != Synced {
			continue
		}
		if pause := e.At.Sub(last); !last.IsZero() && pause > h.c.Interval+h.c.Interval/2+250*time.Millisecond {
			h.Errorf("%v passed between two listings; the interval is %v", pause, h.c.Interval)
		}
		last = e.At
	}
	h.end()
}

func add(h *harness) {
	w := h.populate(1)
	h.run()
	h.agree(w, "first sync")
	first := h.names(1)[0]
	h.set(w, first, append(slices.Clone(w[first]), instance(101))...)
	h.agree(w, "an instance was added")
	if h.most() > 1 {
		h.set(w, h.names(2)[1], instance(201))
		h.agree(w, "a service was added")
	}
	h.end()
}

func change(h *harness) {
	w := h.populate(1)
	name := h.names(1)[0]
	h.run()
	h.agree(w, "first sync")
	steps := []struct {
		what string
		edit func(*registry.Instance)
	}{
		{"metadata", func(i *registry.Instance) { i.Metadata = labels.FromMap(map[string]string{"version": "v2"}) }},
		{"no metadata", func(i *registry.Instance) { i.Metadata = labels.Set{} }},
		{"port", func(i *registry.Instance) { i.Port = 9090 }},
		{"weight", func(i *registry.Instance) { i.Weight = 3 }},
		{"unhealthy", func(i *registry.Instance) { i.Unhealthy = true }},
		{"healthy again", func(i *registry.Instance) { i.Unhealthy = false }},
		{"disabled", func(i *registry.Instance) { i.Disabled = true }},
		{"enabled again", func(i *registry.Instance) { i.Disabled = false }},
	}
	for _, step := range steps {
		edited := slices.Clone(w[name])
		step.edit(&edited[0])
		if same(h.facts(edited), h.facts(w[name])) {
			h.Logf("skipped, the registry has no such fact: %s", step.what)
			continue
		}
		h.set(w, name, edited...)
		h.agree(w, step.what)
	}
	h.end()
}

func same(a, b []registry.Instance) bool { return slices.Equal(a, b) }

func removeOne(h *harness) {
	w := h.populate(1)
	name := h.names(1)[0]
	h.run()
	before := h.agree(w, "first sync")
	h.set(w, name, w[name][0])
	after := h.agree(w, "an instance was removed")
	noFail(h, after.Events[len(before.Events):])
	h.end()
}

func noFail(h *harness, events []Event) {
	h.Helper()
	for _, e := range events {
		if e.Kind == Fail {
			h.Errorf("a removal came with a gap, which holds it back: %v", e.Err)
		}
	}
}

func removeLast(h *harness) {
	w := h.populate(min(2, h.most()))
	name := h.names(1)[0]
	h.run()
	before := h.agree(w, "first sync")
	h.set(w, name, w[name][0])
	h.agree(w, "all but one instance were removed")
	h.set(w, name)
	after := h.agree(w, "the last instance was removed")
	noFail(h, after.Events[len(before.Events):])
	h.set(w, name, instance(301))
	h.agree(w, "an instance came back")
	h.end()
}

func vanish(h *harness) {
	w := h.populate(min(3, h.most()))
	name := h.names(1)[0]
	h.run()
	before := h.agree(w, "first sync")
	h.remove(w, name)
	after := h.agree(w, "a service was removed")
	noFail(h, after.Events[len(before.Events):])
	later := h.listings(len(after.Events), 3)
	h.quiet(later.Events[len(after.Events):], "after a service was removed")
	h.set(w, name, instance(401))
	h.agree(w, "the service came back")
	h.end()
}

func outage(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	h.wiped = true
	h.b.Stop()
	h.gap(len(before.Events), "the registry is down")
	during := h.rec.State()
	// The outage lasts until the adapter has tried again and reported it.
	failures := func(s State) int {
		n := 0
		for _, e := range s.Events {
			if e.Kind == Fail {
				n++
			}
		}
		return n
	}
	first := failures(during)
	s := h.wait("a further failure", func(s State) bool { return failures(s) > first })
	h.quiet(s.Events[len(before.Events):], "while the registry was down")
	h.b.Restart()
	s = h.agree(w, "the registry is back")
	h.quiet(s.Events[len(before.Events):], "recovery without change")
	h.end()
}

func downAtStart(h *harness) {
	w := h.populate(min(3, h.most()))
	h.wiped = true
	h.b.Stop()
	h.run()
	s := h.gap(0, "the registry is down at the start")
	if s.Synced {
		h.Error("a registry that is down was listed")
	}
	h.b.Restart()
	h.agree(w, "the registry is up")
	h.end()
}

func recoveryWithChange(h *harness) {
	w := h.populate(min(3, h.most()))
	name := h.names(1)[0]
	h.run()
	before := h.agree(w, "first sync")
	h.wiped = true
	h.b.Stop()
	h.gap(len(before.Events), "the registry is down")
	h.b.Restart()
	h.set(w, name, w[name][0], instance(501))
	h.agree(w, "the registry came back with other instances")
	h.end()
}

func restartEmpty(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	h.wiped = true
	h.b.Wipe()
	h.gap(len(before.Events), "the registry came back empty")
	h.agree(world{}, "the registry is empty")
	if h.b.Set != nil {
		for name, instances := range w {
			h.b.Set(name, instances...)
		}
		h.agree(w, "providers registered again")
	}
	h.end()
}

func badCredentialsAtStart(h *harness) {
	w := h.populate(min(3, h.most()))
	h.b.Refuse(true)
	h.run()
	s := h.gap(0, "the credentials are refused")
	n := len(s.Events)
	s = h.wait("a further failure", func(s State) bool { return len(s.Events) > n })
	for _, e := range s.Events {
		if e.Kind == Synced {
			h.Fatalf("a refused login was taken for a listing of %d services", len(e.IDs))
		}
	}
	h.b.Refuse(false)
	h.agree(w, "the credentials are accepted")
	h.end()
}

func badCredentialsRunning(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	h.b.Refuse(true)
	h.gap(len(before.Events), "the credentials are refused")
	s := h.rec.State()
	n := len(s.Events)
	s = h.wait("a further failure", func(s State) bool {
		return slices.ContainsFunc(s.Events[n:], func(e Event) bool { return e.Kind == Fail })
	})
	h.quiet(s.Events[len(before.Events):], "while the credentials were refused")
	h.b.Refuse(false)
	s = h.agree(w, "the credentials are accepted again")
	h.quiet(s.Events[len(before.Events):], "once the credentials were accepted again")
	h.end()
}

func serverHangs(h *harness) {
	w := h.populate(min(3, h.most()))
	h.run()
	before := h.agree(w, "first sync")
	h.b.Hang(true)
	h.gap(len(before.Events), "the registry hangs")
	h.quiet(h.rec.State().Events[len(before.Events):], "while the registry hung")
	h.b.Hang(false)
	h.agree(w, "the registry answers again")
	h.b.Hang(true)
	h.end() // in the midst of a call
}

// requests counts what a first sync costs.
func (h *harness) requests(w world) int {
	h.Helper()
	before := h.b.Requests()
	h.run()
	h.agree(w, "first sync")
	h.end()
	return min(h.b.Requests()-before, 20)
}

func oneCallHangs(h *harness) {
	w := h.populate(min(3, h.most()))
	for n := range h.requests(w) {
		hung := h.b.HangAt(n + 1)
		h.run()
		if !h.hung(hung, h.c.Timeout) {
			h.Fatalf("request %d did not come", n+1)
		}
		h.agree(w, fmt.Sprintf("request %d was never answered", n+1))
		h.end()
	}
}

func cancelAtEachRequest(h *harness) {
	w := h.populate(min(3, h.most()))
	for n := range h.requests(w) {
		hung := h.b.HangAt(n + 1)
		h.run()
		if !h.hung(hung, h.c.Timeout) {
			h.Fatalf("request %d did not come", n+1)
		}
		h.end()
	}
}

func cancelAtOnce(h *harness) {
	h.populate(1)
	for range 5 {
		h.run()
		h.end()
	}
}

func runAgain(h *harness) {
	w := h.populate(min(3, h.most()))
	reg, err := h.c.New(h.entry(), h.env)
	if err != nil {
		h.Fatalf("New: %v", err)
	}
	for n := range 3 {
		h.runAgain(reg)
		h.agree(w, fmt.Sprintf("run %d", n+1))
		h.end()
	}
}

func thousand(h *harness) {
	h.c.Interval *= 10 // what else is asked for per second would have nothing to do with real intervals
	h.c.Timeout *= 2
	w := h.populate(1000)
	h.run()
	h.agree(w, "1,000 services")
	names := h.names(1000)
	for _, n := range []int{0, 499, 999} {
		h.set(w, names[n], w[names[n]][0], instance(60000+n))
	}
	h.agree(w, "three of 1,000 services changed")
	h.remove(w, names[500])
	h.agree(w, "one of 1,000 services was removed")
	h.end()
}

func environment(h *harness) {
	if os.Getenv("CONSUL_HTTP_TOKEN") != rubbish()["CONSUL_HTTP_TOKEN"] {
		h.Fatal("the environment is clean: let TestMain be registrytest.Main")
	}
	w := h.populate(min(3, h.most()))
	h.run()
	h.agree(w, "rubbish in the environment")
	h.end()
	if h.b.EntryAt == nil {
		h.Log("skipped: proxies; the adapter speaks no HTTP")
		return
	}
	// Go never uses a proxy for loopback addresses: it takes another one to see.
	e := h.b.EntryAt("registry.invalid:8500")
	e.RefreshInterval = registry.Interval(h.c.Interval)
	before := proxyHits(h.T)
	h.runEntry(e)
	h.gap(0, "the registry's host does not exist")
	h.end()
	if after := proxyHits(h.T); after != before {
		h.Errorf("the adapter used the proxy of the environment (%s requests before, %s after)", before, after)
	}
}

func filesCase(h *harness) {
	dirs := map[string]string{}
	for _, v := range []string{"HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"} {
		dirs[v] = h.TempDir()
	}
	for v, dir := range dirs {
		h.Setenv(v, dir)
	}
	w := h.populate(min(3, h.most()))
	h.run()
	s := h.agree(w, "first sync")
	h.listings(len(s.Events), 2)
	h.end()
	dirs["the working folder"] = "."
	for what, dir := range dirs {
		found, err := files(dir)
		if err != nil {
			h.Fatal(err)
		}
		if len(found) > 0 {
			h.Errorf("the adapter wrote outside its folder, in %s: %q", what, found)
		}
	}
}
