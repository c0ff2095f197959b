package eureka

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func testEnv(logs *bytes.Buffer) registry.Env {
	handler := slog.DiscardHandler
	if logs != nil {
		handler = slog.NewTextHandler(logs, nil)
	}
	return registry.Env{
		Credentials: func() (registry.Credentials, error) { return registry.Credentials{}, nil },
		ClientTLS:   func() (*tls.Config, error) { return nil, nil },
		Logger:      slog.New(handler),
		Observe:     func(string, time.Duration, error) {},
		Budgets:     &registry.Budgets{},
	}
}

// stepper reads a fake whenever the test says so.
type stepper struct {
	*reader
	rec  *registrytest.Recorder
	f    *fake
	logs bytes.Buffer
}

func newStepper(t *testing.T, f *fake, edit ...func(*registry.Entry)) *stepper {
	t.Helper()
	s := &stepper{f: f}
	e := f.entry()
	for _, change := range edit {
		change(&e)
	}
	r, err := New(e, testEnv(&s.logs))
	if err != nil {
		t.Fatal(err)
	}
	settings := &r.(*source).settings
	settings.timeout = limit
	c, err := newClient(settings)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	s.rec = registrytest.NewRecorder(t.Context())
	s.reader = &reader{settings: settings, client: c, sink: s.rec, known: newKnown(), gap: true}
	t.Cleanup(func() {
		for _, v := range s.rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
	})
	return s
}

// ok reads once, and returns what was asked for and what was reported.
func (s *stepper) ok(t *testing.T) (requests string, events []registrytest.Event) {
	t.Helper()
	before := len(s.rec.State().Events)
	s.f.take()
	if err := s.read(t.Context()); err != nil {
		t.Fatal(err)
	}
	events = s.rec.State().Events[before:]
	if n := len(events); n == 0 || events[n-1].Kind != registrytest.Synced {
		t.Fatalf("a reading that succeeded ended with %v", events)
	}
	return strings.Join(s.f.take(), " "), events
}

// expect reads once, and checks what was asked for and the kinds of what was reported.
func (s *stepper) expect(t *testing.T, requests, kinds string) {
	t.Helper()
	got, events := s.ok(t)
	var list []string
	for _, e := range events {
		if e.Kind == registrytest.Put && !e.Changed {
			continue // says what is known
		}
		list = append(list, string(e.Kind))
	}
	if k := strings.Join(list, " "); got != requests || k != kinds {
		t.Errorf("asked for %q and reported %q; want %q and %q", got, k, requests, kinds)
	}
	s.agrees(t)
}

// agrees checks that what is known is what the fake has.
func (s *stepper) agrees(t *testing.T) {
	t.Helper()
	want, got := map[string][]string{}, map[string][]string{}
	s.f.edit(func() {
		for app, instances := range s.f.apps {
			for _, i := range instances {
				want[app] = append(want[app], fmt.Sprint(i.ip, ":", i.port, i.status == statusUp, i.metadata["v"]))
			}
			slices.Sort(want[app])
		}
	})
	for id, service := range s.rec.State().Services {
		for _, i := range service.Instances {
			v, _ := i.Metadata.Get("v")
			got[id] = append(got[id], fmt.Sprint(i.Address, ":", i.Port, !i.Unhealthy && !i.Disabled, v))
		}
		slices.Sort(got[id])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-server +known: %s", diff)
	}
}

func (f *fake) set(app, id string, edit func(*fakeInstance)) {
	f.edit(func() { f.change(app, id, edit) })
}

func TestDelta(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2")
	f.register("USERS", "10.0.1.1")
	s.expect(t, "/apps", "put put synced")
	for range 3 {
		s.expect(t, "/apps/delta", "synced")
	}
	for _, step := range []struct {
		name   string
		change func()
		kinds  string
	}{
		{"an instance is added", func() { f.register("ORDERS", "10.0.0.3") }, "put synced"},
		{"the same is told again", func() {}, "synced"},
		{"an application is added", func() { f.register("STOCK", "10.0.2.1") }, "put synced"},
		{"metadata", func() {
			f.set("ORDERS", "10.0.0.1", func(i *fakeInstance) { i.metadata = map[string]string{"v": "2"} })
		}, "put synced"},
		{"status", func() { f.set("ORDERS", "10.0.0.1", func(i *fakeInstance) { i.status = "DOWN" }) }, "put synced"},
		{"an override says ADDED", func() {
			f.set("ORDERS", "10.0.0.1", func(i *fakeInstance) { i.status, i.action = statusOutOfService, "ADDED" })
		}, "put synced"},
		{"nothing but the time of a change", func() { f.set("ORDERS", "10.0.0.1", func(*fakeInstance) {}) }, "synced"},
		{"an instance is removed", func() { f.deregister("ORDERS", "10.0.0.1") }, "put synced"},
		{"the last one is removed", func() { f.deregister("USERS", "10.0.1.1") }, "synced"},
		{"it comes back", func() { f.register("USERS", "10.0.1.1") }, "put synced"},
		{"away and back with another port", func() {
			f.deregister("USERS", "10.0.1.1")
			f.set("USERS", "10.0.1.1", func(i *fakeInstance) { i.ip, i.port = "10.0.1.1", 9090 })
		}, "put synced"},
		{"a new one comes and goes", func() {
			f.register("SHORT", "10.0.3.1")
			f.deregister("SHORT", "10.0.3.1")
		}, "synced"},
		{"one for another", func() {
			f.deregister("STOCK", "10.0.2.1")
			f.register("STOCK", "10.0.2.2")
		}, "put synced"},
		{"the last of all", func() {
			f.deregister("STOCK", "10.0.2.2")
			f.deregister("USERS", "10.0.1.1")
			f.deregister("ORDERS", "10.0.0.2")
			f.deregister("ORDERS", "10.0.0.3")
		}, "synced"},
	} {
		t.Run(step.name, func(t *testing.T) {
			step.change()
			s.expect(t, "/apps/delta", step.kinds)
			s.expect(t, "/apps/delta", "synced")
		})
	}
}

// TestSilentStatus is about the one change that real servers do not tell: a status that a heartbeat changes.
func TestSilentStatus(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2")
	s.ok(t)
	f.edit(func() { f.apps["ORDERS"]["10.0.0.1"].status = "DOWN"; f.queue = nil })
	s.expect(t, "/apps/delta /apps", "put synced")
	s.expect(t, "/apps/delta", "synced")
}

// TestRepair is about what no count shows.
func TestRepair(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2")
	s.ok(t)
	if due := time.Until(s.fullAt); due < repairPause*8/10 || due > repairPause {
		t.Errorf("the next full reading is due in %v", due)
	}
	f.edit(func() {
		f.apps["ORDERS"]["10.0.0.1"].ip = "10.0.0.9"
		f.queue = nil
	})
	s.fullAt = time.Now()
	s.expect(t, "/apps", "put synced")
	f.deregister("ORDERS", "10.0.0.1")
	s.fullAt = time.Now()
	s.expect(t, "/apps /apps/delta", "put synced") // asked whether it was removed
	s.expect(t, "/apps/delta", "synced")
}

func TestFullAfterAWhile(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1")
	s.ok(t)
	s.last = time.Now().Add(-retention - time.Second)
	s.expect(t, "/apps", "synced")
	s.expect(t, "/apps/delta", "synced")

	s = newStepper(t, f, func(e *registry.Entry) { e.RefreshInterval = registry.Interval(retention + time.Second) })
	s.ok(t)
	s.expect(t, "/apps", "synced")
	f.register("ORDERS", "10.0.0.2")
	s.expect(t, "/apps", "put synced")
	f.deregister("ORDERS", "10.0.0.2")
	s.expect(t, "/apps", "put synced")
}

// TestLies is about a server that was restarted between two readings. Whoever is missing is reported as missing after a
// gap, and nobody is before it.
func TestLies(t *testing.T) {
	kept := func(ips ...string) func(string, *fakeInstance) bool {
		return func(_ string, i *fakeInstance) bool { return slices.Contains(ips, i.ip) }
	}
	onlyUp := func(_ string, i *fakeInstance) bool { return i.status == statusUp }
	for _, tc := range []struct {
		name   string
		change func(f *fake)
		gap    bool
	}{
		{"alone and empty", func(f *fake) { f.reborn(kept()) }, true},
		{"some have registered again", func(f *fake) { f.reborn(kept("10.0.0.1", "10.0.1.1")) }, true},
		{"a peer gave it those that are UP", func(f *fake) { f.reborn(onlyUp) }, true},
		{"one is missing, another one is new", func(f *fake) {
			f.reborn(kept("10.0.0.1", "10.0.0.2", "10.0.1.1"))
			f.change("USERS", "10.0.1.9", func(i *fakeInstance) { i.ip, i.status = "10.0.1.9", "DOWN" })
		}, true},
		{"it has made more deltas than before", func(f *fake) {
			f.reborn(onlyUp)
			f.version = 100
		}, true},
		{"some have registered again, and one is removed", func(f *fake) {
			f.reborn(kept("10.0.0.1", "10.0.0.2", "10.0.1.1"))
			f.remove("ORDERS", "10.0.0.1")
		}, true},
		{"all have registered again", func(f *fake) { f.reborn(func(string, *fakeInstance) bool { return true }) }, false},
		{"all have registered again, and one is removed", func(f *fake) {
			f.reborn(func(string, *fakeInstance) bool { return true })
			f.remove("ORDERS", "10.0.0.1")
		}, false},
	} {
		for _, delta := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/delta %v", tc.name, delta), func(t *testing.T) {
				gap := tc.gap
				if !delta && tc.name == "all have registered again, and one is removed" {
					gap = true // that is no different then from one that has not registered again
				}
				f := newFake(t)
				if !delta {
					f.noDelta = 403
				}
				s := newStepper(t, f)
				f.register("ORDERS", "10.0.0.1", "10.0.0.2")
				f.register("USERS", "10.0.1.1")
				f.set("USERS", "10.0.1.2", func(i *fakeInstance) { i.ip, i.status = "10.0.1.2", "DOWN" })
				s.ok(t)
				f.register("LATE", "10.0.2.1")
				f.deregister("LATE", "10.0.2.1")
				s.ok(t)
				f.edit(func() { tc.change(f) })
				_, events := s.ok(t)
				if got := events[0].Kind == registrytest.Fail; got != gap {
					t.Errorf("reported %v", events)
				}
				s.agrees(t)
				if _, events := s.ok(t); events[0].Kind == registrytest.Fail {
					t.Errorf("the gap is reported again: %v", events[0].Err)
				}
				s.agrees(t)
			})
		}
	}
}

// TestLossWithoutDelta is about removals that a server without deltas cannot explain: they are believed, unless nobody's
// registration is as it was.
func TestLossWithoutDelta(t *testing.T) {
	f := newFake(t)
	f.noDelta = 404
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2", "10.0.0.3")
	s.ok(t)
	s.expect(t, "/apps/delta /apps", "synced")
	f.edit(func() { f.lose("ORDERS", "10.0.0.1") })
	s.expect(t, "/apps", "put synced")
	f.register("ORDERS", "10.0.0.4")
	f.edit(func() { f.lose("ORDERS", "10.0.0.2"); f.lose("ORDERS", "10.0.0.3") })
	s.expect(t, "/apps", "fail put synced")
	if n := strings.Count(s.logs.String(), "of no use"); n != 1 {
		t.Errorf("%d log lines: %s", n, s.logs.String())
	}
	s.noDelta = time.Now()
	f.edit(func() { f.noDelta, f.queue = 0, nil })
	s.expect(t, "/apps/delta", "synced")
}

// TestOtherServerAtOneAddress is about a load balancer: that answers come from several servers is no reason to doubt what
// they say was removed.
func TestOtherServerAtOneAddress(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2", "10.0.0.3")
	s.ok(t)
	s.ok(t)
	for n := range 2 {
		f.edit(func() { f.version = 10 * (1 - n) })
		f.deregister("ORDERS", fmt.Sprintf("10.0.0.%d", n+1))
		s.expect(t, "/apps/delta", "put synced")
	}

	t.Run("one lags behind", func(t *testing.T) {
		f.register("ORDERS", "10.0.0.1")
		s.ok(t)
		var now fakeInstance
		f.edit(func() { // it has not heard of the registration yet, but of the removal before
			now = *f.apps["ORDERS"]["10.0.0.1"]
			f.queue = f.queue[:len(f.queue)-1]
			f.lose("ORDERS", "10.0.0.1")
		})
		s.expect(t, "/apps/delta /apps /apps/delta", "fail put synced")
		f.edit(func() { f.change("ORDERS", "10.0.0.1", func(i *fakeInstance) { *i = now }) })
		s.expect(t, "/apps/delta", "put synced")
	})
}

// TestNoAgreement is about a server whose deltas never lead to what it counts.
func TestNoAgreement(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1")
	s.ok(t)
	f.bodies["/apps/delta"] = `{"applications":{"versions__delta":"1","apps__hashcode":"UP_7_","application":[]}}`
	for range maxMismatches {
		s.expect(t, "/apps/delta /apps", "synced")
	}
	s.expect(t, "/apps", "synced")
	s.expect(t, "/apps", "synced")
	if n := strings.Count(s.logs.String(), "of no use"); n != 1 {
		t.Errorf("%d log lines: %s", n, s.logs.String())
	}
}

func TestOddDelta(t *testing.T) {
	for name, body := range map[string]string{
		"a page": "<html>hello</html>", "nothing": "", "an empty object": "{}", "another object": `{"status":"ok"}`,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			s := newStepper(t, f)
			f.register("ORDERS", "10.0.0.1")
			s.ok(t)
			f.bodies["/apps/delta"] = body
			if name == "nothing" { // may have been cut off
				if err := s.read(t.Context()); err == nil {
					t.Error("an empty answer was taken")
				}
				return
			}
			for range maxMismatches { // one of them may be bad luck
				s.expect(t, "/apps/delta /apps", "synced")
			}
			s.expect(t, "/apps", "synced")
		})
	}
}

// TestStatedAgainAfterGap: what the reading says that ends a gap is no evidence, what the next one says is.
func TestStatedAgainAfterGap(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1")
	puts := func() (n int) {
		for _, e := range s.rec.State().Events {
			if e.Kind == registrytest.Put {
				n++
			}
		}
		return n
	}
	for n, want := range []int{1, 2, 2, 2} {
		if s.ok(t); puts() != want {
			t.Fatalf("after reading %d the service was stated %d times, want %d", n+1, puts(), want)
		}
	}
	s.fail(errors.New("a failure"))
	for n, want := range []int{3, 4, 4} {
		if s.ok(t); puts() != want {
			t.Fatalf("after reading %d since the failure the service was stated %d times, want %d", n+1, puts(), want)
		}
	}
}

// TestFullAnswerIsCounted has a full answer that lists less than it counts.
func TestFullAnswerIsCounted(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2")
	s.ok(t)
	s.noDelta = time.Now().Add(time.Hour)
	s.ok(t)
	f.bodies["/apps"] = `{"applications":{"versions__delta":"1","apps__hashcode":"UP_2_","application":[{"name":"ORDERS","instance":[` +
		`{"instanceId":"10.0.0.1","app":"ORDERS","ipAddr":"10.0.0.1","status":"UP","port":{"$":8080,"@enabled":"true"}}]}]}}`
	f.edit(func() { f.lose("ORDERS", "10.0.0.2") })
	s.expect(t, "/apps", "fail put synced")
}

// TestFailureChangesNothing is about a delta that was merged, and a full reading that then failed.
func TestFailureChangesNothing(t *testing.T) {
	f := newFake(t)
	s := newStepper(t, f)
	f.register("ORDERS", "10.0.0.1", "10.0.0.2")
	f.register("USERS", "10.0.1.1")
	s.ok(t)
	f.deregister("ORDERS", "10.0.0.1")
	f.edit(func() {
		f.queue = f.queue[len(f.queue)-1:]
		f.apps["USERS"]["10.0.1.1"].status = "DOWN"
		f.status["/apps"] = 500
	})
	before := s.rec.State()
	err := s.read(t.Context())
	if err == nil || !strings.Contains(err.Error(), "500") {
		t.Errorf("the error is %v", err)
	}
	if after := s.rec.State(); len(after.Events) != len(before.Events) {
		t.Errorf("a failed reading reported %v", after.Events[len(before.Events):])
	}
	s.fail(err)
	f.edit(func() { clear(f.status) })
	s.expect(t, "/apps/delta /apps", "put put synced")
}

// TestRandomChanges lets all kinds of changes happen between readings.
func TestRandomChanges(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	f := newFake(t)
	s := newStepper(t, f)
	statuses := []string{statusUp, statusUp, "DOWN", "STARTING", statusOutOfService}
	for range 300 {
		for range rnd.IntN(6) {
			app, ip := fmt.Sprintf("APP-%d", rnd.IntN(4)), fmt.Sprintf("10.0.0.%d", rnd.IntN(5))
			f.edit(func() {
				old := f.apps[app][ip]
				switch kind := rnd.IntN(10); {
				case old != nil && kind < 3:
					f.remove(app, ip)
				case old != nil && kind == 3:
					old.status = statuses[rnd.IntN(len(statuses))] // silently
				default:
					f.change(app, ip, func(i *fakeInstance) {
						i.ip, i.status = ip, statuses[rnd.IntN(len(statuses))]
						i.metadata = map[string]string{"v": fmt.Sprint(rnd.IntN(3))}
					})
				}
			})
		}
		if rnd.IntN(10) == 0 {
			s.fullAt = time.Now()
		}
		s.ok(t)
		// A silent change can be hidden by another one until the next full reading.
		if s.known.hash() != f.hash() {
			t.Fatalf("counts %s, the server %s", s.known.hash(), f.hash())
		}
	}
	s.fullAt = time.Now()
	s.ok(t)
	s.agrees(t)
	for _, e := range s.rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("a gap without a reason: %v", e.Err)
		}
	}
}

// running runs the adapter until the test ends.
func running(t *testing.T, e registry.Entry, env registry.Env, interval time.Duration) *registrytest.Recorder {
	t.Helper()
	r, err := New(e, env)
	if err != nil {
		t.Fatal(err)
	}
	r.(*source).interval = interval
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
	})
	return rec
}

func await(t *testing.T, rec *registrytest.Recorder, what string, ok func(registrytest.State) bool) registrytest.State {
	t.Helper()
	s, got := rec.Wait(limit, ok)
	if !got {
		t.Fatalf("waited in vain for %s: gap %v, services %v", what, s.Gap, slices.Sorted(maps.Keys(s.Services)))
	}
	return s
}

func TestFailover(t *testing.T) {
	a, b := newFake(t), newFake(t)
	for _, f := range []*fake{a, b} {
		f.register("ORDERS", "10.0.0.1")
	}
	b.register("ONLY-B", "10.0.0.2")
	e := a.entry()
	e.Domain = a.address + ", " + b.address
	rec := running(t, e, testEnv(nil), 50*time.Millisecond)
	await(t, rec, "the first server", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == 1 })
	if len(b.requests()) != 0 {
		t.Error("the second server was asked although the first one works")
	}
	a.stop()
	s := await(t, rec, "the second server", func(s registrytest.State) bool { return s.Gap == nil && len(s.Services) == 2 })
	if !slices.ContainsFunc(s.Events, func(e registrytest.Event) bool {
		return e.Kind == registrytest.Fail && strings.Contains(e.Err.Error(), a.address)
	}) {
		t.Error("the change of server is no gap")
	}
	if got := b.requests(); got[0] != "/apps" {
		t.Errorf("the second server was asked for %v", got)
	}
	a.start()
	n := len(s.Events)
	await(t, rec, "ten readings", func(s registrytest.State) bool { return len(s.Events) > n+10 })
	if got := a.requests(); slices.ContainsFunc(got[1:], func(p string) bool { return p == "/apps" }) {
		t.Error("the first server was read again although the second one works")
	}
	b.stop()
	await(t, rec, "the first server again", func(s registrytest.State) bool { return s.Gap == nil && len(s.Services) == 1 })
}

// TestRefusedByAll is about a pause between attempts although there are several servers.
func TestRefusedByAll(t *testing.T) {
	a, b := newFake(t), newFake(t)
	a.user, b.user = goodUser, goodUser
	e := a.entry()
	e.Domain = a.address + "," + b.address
	rec := running(t, e, testEnv(nil), time.Hour)
	await(t, rec, "three failures", func(s registrytest.State) bool { return len(s.Events) >= 3 })
	if n := len(a.requests()); n > 2 {
		t.Errorf("%d requests at once", n)
	}
	for _, e := range rec.State().Events {
		if e.Kind != registrytest.Fail || !strings.Contains(e.Err.Error(), "authSecretName") {
			t.Errorf("reported %v", e)
		}
	}
}
