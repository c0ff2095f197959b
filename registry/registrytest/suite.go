package registrytest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// a testcase is one subtest of the suite.
type testcase struct {
	name string
	// missing tells what of the backend the case needs and does not have; empty means that the case can run.
	missing func(Backend) string
	run     func(*harness)
}

// Run runs all cases, each as a subtest.
func Run(t *testing.T, c Config) {
	t.Helper()
	if c.Interval == 0 {
		c.Interval = 500 * time.Millisecond
	}
	if c.Timeout == 0 {
		c.Timeout = 15 * time.Second
	}
	if c.StopWithin == 0 {
		c.StopWithin = 2 * time.Second
	}
	cases := cases()
	for name := range c.Skip {
		if !slices.ContainsFunc(cases, func(tc testcase) bool { return tc.name == name }) {
			t.Errorf("Skip names %q, which is no case", name)
		}
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			if reason, ok := c.Skip[tc.name]; ok {
				t.Skip(reason)
			}
			h := newHarness(t, c)
			if what := tc.missing(h.b); what != "" {
				t.Skipf("the backend cannot %s", what)
			}
			tc.run(h)
		})
	}
}

// harness is one case's backend, and the run of the adapter that is under way.
type harness struct {
	*testing.T
	c     Config // a case may change it before it runs the adapter
	b     Backend
	env   registry.Env
	start []goleak.Option // goroutines that were there with the backend, before the adapter

	rec     *Recorder
	stop    context.CancelFunc
	running chan struct{} // closed when Run has returned
	err     error         // of Run
	stray   string        // a goroutine of the adapter that was there when Run returned
	wiped   bool          // the backend was stopped, so its goroutines are not those of the beginning
}

func newHarness(t *testing.T, c Config) *harness {
	t.Helper()
	h := &harness{T: t, c: c}
	before := append([]goleak.Option{goleak.IgnoreCurrent()}, c.Leaks...)
	t.Cleanup(func() { // after the backend has ended
		if err := leaks(before); err != nil {
			t.Errorf("goroutines are left once the backend has ended, too: %v", err)
		}
	})
	h.b = c.Start(t)
	h.Chdir(t.TempDir()) // a file written to the working folder is found there
	h.start = append([]goleak.Option{goleak.IgnoreCurrent()}, c.Leaks...)
	t.Cleanup(func() {
		if h.running != nil {
			h.end()
		}
	})
	h.env = registry.Env{
		Credentials: func() (registry.Credentials, error) { return maps.Clone(h.b.Credentials), nil },
		ClientTLS:   func() (*tls.Config, error) { return h.b.ClientTLS.Clone(), nil },
		Logger:      slog.New(slog.NewTextHandler(&testWriter{t: t, secrets: h.b.Credentials}, nil)),
		Observe:     func(string, time.Duration, error) {},
		Budgets:     &registry.Budgets{},
	}
	return h
}

// strays returns the stack of a goroutine that is in the code of the constructor's package, other than its tests, and
// stays there for longer than a goroutine takes to end that has said that it is done.
func strays(constructor any) string {
	name := runtime.FuncForPC(reflect.ValueOf(constructor).Pointer()).Name()
	folder := path.Base(name[:strings.LastIndexByte(name, '.')]) // the last part of the import path
	buf := make([]byte, 4<<20)
	for deadline := time.Now().Add(50 * time.Millisecond); ; runtime.Gosched() {
		found := ""
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			frames, _, _ := strings.Cut(stack, "\ncreated by ")
			for line := range strings.SplitSeq(frames, "\n") {
				file, _, _ := strings.Cut(strings.TrimSpace(line), ".go:")
				if path.Base(path.Dir(file)) == folder && path.IsAbs(file) && !strings.HasSuffix(file, "_test") {
					found = stack
				}
			}
		}
		if found == "" || time.Now().After(deadline) {
			return found
		}
	}
}

// leaks looks for goroutines that are left, and gives connections time to be torn down at the other end too.
func leaks(options []goleak.Option) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := goleak.Find(options...) // waits a little by itself
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// testWriter writes the adapter's log lines to the test's, and fails the test where one shows a secret.
type testWriter struct {
	t       *testing.T
	secrets registry.Credentials
	mu      sync.Mutex
}

func (w *testWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.t.Logf("adapter: %s", b)
	for key, value := range w.secrets {
		if value != "" && strings.Contains(string(b), value.Reveal()) {
			w.t.Errorf("the log shows the secret %s", key)
		}
	}
	return len(b), nil
}

func (h *harness) entry() registry.Entry {
	e := h.b.Entry
	e.RefreshInterval = registry.Interval(h.c.Interval)
	return e
}

// run starts the adapter.
func (h *harness) run() { h.runEntry(h.entry()) }

func (h *harness) runEntry(e registry.Entry) {
	h.Helper()
	reg, err := h.c.New(e, h.env)
	if err != nil {
		h.Fatalf("New: %v", err)
	}
	h.runAgain(reg)
}

func (h *harness) runAgain(reg registry.Registry) {
	h.Helper()
	if h.running != nil {
		h.Fatal("the adapter is running already")
	}
	ctx, cancel := context.WithCancel(context.Background())
	rec, running := NewRecorder(ctx), make(chan struct{})
	h.rec, h.stop, h.running = rec, cancel, running
	go func() {
		defer close(running)
		h.err = reg.Run(ctx, rec)
		rec.Returned()
		h.stray = strays(h.c.New)
	}()
}

// end stops the adapter and checks what must hold of every run.
func (h *harness) end() {
	h.Helper()
	begun, running := time.Now(), h.running
	h.running = nil
	h.stop()
	select {
	case <-running:
	case <-time.After(h.c.Timeout):
		h.Fatalf("Run did not return within %v of the end of its context", h.c.Timeout)
	}
	if took := time.Since(begun); took > h.c.StopWithin {
		h.Errorf("Run took %v to return once its context had ended; at most %v is allowed", took, h.c.StopWithin)
	}
	if h.err != nil {
		h.Errorf("Run returned %v; once its context has ended it returns nil", h.err)
	}
	if h.stray != "" {
		h.Errorf("a goroutine of the adapter was left when Run returned:\n%s", h.stray)
	}
	if !h.wiped {
		if err := leaks(h.start); err != nil {
			h.Errorf("goroutines are left after Run returned: %v", err)
		}
	}
	for _, v := range h.rec.Violations() {
		h.Errorf("against the contract: %s", v)
	}
	for _, e := range h.rec.State().Events {
		for key, value := range h.b.Credentials {
			if e.Err != nil && value != "" && strings.Contains(e.Err.Error(), value.Reveal()) {
				h.Errorf("an error shows the secret %s", key)
			}
		}
	}
	if h.Failed() {
		h.Logf("what the adapter reported:\n%s", describe(h.rec.State()))
	}
}

// wait waits for a state, and fails the case if it does not come.
func (h *harness) wait(what string, ok func(State) bool) State {
	h.Helper()
	s, got := h.rec.Wait(h.c.Timeout, func(s State) bool { return ok(s) || h.ended() })
	if h.ended() {
		h.Fatalf("Run returned %v while the case waited for %s\n%s", h.err, what, describe(s))
	}
	if !got {
		h.Fatalf("waited %v in vain for %s\n%s", h.c.Timeout, what, describe(s))
	}
	return s
}

func (h *harness) ended() bool {
	select {
	case <-h.running:
		return true
	default:
		return false
	}
}

// names are n names of services.
func (h *harness) names(n int) []string {
	h.Helper()
	if h.b.Services != nil {
		if len(h.b.Services) < n {
			h.Skipf("the case needs %d services; the backend has %d", n, len(h.b.Services))
		}
		return h.b.Services[:n]
	}
	out := []string{"order", "user", "stock_level"}
	for i := len(out); i < n; i++ {
		out = append(out, fmt.Sprintf("service-%04d", i))
	}
	return out[:n]
}

func (h *harness) id(service string) string {
	if h.b.ID == nil {
		return service
	}
	return h.b.ID(service)
}

// world is what the backend holds: the instances of each service by name.
type world map[string][]registry.Instance

// populate creates n services with two instances each.
func (h *harness) populate(n int) world {
	h.Helper()
	w := world{}
	for i, name := range h.names(n) {
		w[name] = []registry.Instance{instance(2*i + 1), instance(2*i + 2)}
		if h.b.Set != nil {
			h.b.Set(name, w[name]...)
		}
	}
	return w
}

// instance is an ordinary healthy instance. Different n are different addresses.
func instance(n int) registry.Instance {
	return registry.Instance{
		Address:  fmt.Sprintf("10.%d.%d.%d", 1+n/62500, n/250%250, 1+n%250),
		Port:     8080,
		Weight:   1,
		Metadata: labels.FromMap(map[string]string{"version": "v1", "n": fmt.Sprint(n)}),
	}
}

func (h *harness) set(w world, service string, instances ...registry.Instance) {
	w[service] = instances
	h.b.Set(service, instances...)
}

func (h *harness) remove(w world, service string) {
	delete(w, service)
	h.b.Remove(service)
}

// facts are the instances as the registry states them, in a fixed order.
func (h *harness) facts(instances []registry.Instance) []registry.Instance {
	out := slices.Clone(instances)
	if h.b.Fact != nil {
		for n, i := range out {
			out[n] = h.b.Fact(i)
		}
	}
	return ordered(out)
}

// ordered puts instances in a fixed order and drops what is not compared.
func ordered(instances []registry.Instance) []registry.Instance {
	out := slices.Clone(instances)
	for n := range out {
		out[n].Reason = ""
	}
	slices.SortFunc(out, func(a, b registry.Instance) int {
		return strings.Compare(fmt.Sprint(a.Address, a.Port), fmt.Sprint(b.Address, b.Port))
	})
	return out
}

// difference tells how the state differs from the world; empty if it does not. A service without instances may be
// listed or not: registries differ in that.
func (h *harness) difference(s State, w world) string {
	want, got := map[string][]registry.Instance{}, map[string][]registry.Instance{}
	for name, instances := range w {
		if len(instances) > 0 {
			want[h.id(name)] = h.facts(instances)
		}
	}
	for id, service := range s.Services {
		if len(service.Instances) > 0 && !slices.Contains(h.b.Own, id) {
			got[id] = ordered(service.Instances)
		}
	}
	if h.b.Set == nil { // what the fixed instances are is known to the adapter's own test
		return cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)))
	}
	return cmp.Diff(want, got, cmp.Comparer(func(a, b labels.Set) bool { return a == b }))
}

// agree waits until the adapter has loaded and stated exactly what the backend holds, without a gap.
func (h *harness) agree(w world, when string) State {
	h.Helper()
	var last string
	s, ok := h.rec.Wait(h.c.Timeout, func(s State) bool {
		if h.ended() {
			return true
		}
		if last = ""; !s.Loaded || s.Gap != nil || len(s.Gaps) > 0 {
			last = "not loaded, or in a gap"
			return false
		}
		last = h.difference(s, w)
		return last == ""
	})
	if h.ended() {
		h.Fatalf("%s: Run returned %v", when, h.err)
	}
	if !ok {
		h.Fatalf("%s: after %v the adapter and the registry differ (-registry +adapter): %s\n%s", when, h.c.Timeout, last, describe(s))
	}
	return s
}

// gap waits for a gap that is reported after the first n events, and checks that nothing was removed since.
func (h *harness) gap(n int, when string) State {
	h.Helper()
	s := h.wait("a gap: "+when, func(s State) bool {
		return slices.ContainsFunc(s.Events[n:], func(e Event) bool { return isGap(e) })
	})
	for _, e := range s.Events[n:] {
		if isGap(e) {
			break
		}
		if len(e.Removed) > 0 {
			h.Fatalf("%s: %v removed before the gap was reported", when, e.Removed)
		}
	}
	return s
}

// isGap reports whether the event says that changes may have been missed. A listing of nothing does so by itself.
func isGap(e Event) bool { return e.Kind == Fail || e.Kind == Synced && len(e.IDs) == 0 }

// quiet checks that the events change no service.
func (h *harness) quiet(events []Event, when string) {
	h.Helper()
	for _, e := range events {
		if e.Changed || len(e.Removed) > 0 {
			h.Errorf("%s: %s %v changed what is known", when, e.Kind, e.IDs)
		}
	}
}

// listings waits for n further listings.
func (h *harness) listings(from, n int) State {
	h.Helper()
	return h.wait(fmt.Sprintf("%d listings", n), func(s State) bool {
		count := 0
		for _, e := range s.Events[from:] {
			if e.Kind == Synced {
				count++
			}
		}
		return count >= n
	})
}

// hung waits until a request hangs.
func (h *harness) hung(hung <-chan struct{}, within time.Duration) bool {
	select {
	case <-hung:
		return true
	case <-time.After(within):
		return false
	}
}

// files lists what is in a folder.
func files(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if path != dir {
			out = append(out, path)
		}
		return err
	})
	return out, err
}

// describe shows the last events.
func describe(s State) string {
	var out strings.Builder
	fmt.Fprintf(&out, "synced %v, loaded %v, gap %v, gaps of services %v, %d services\n", s.Synced, s.Loaded, s.Gap, s.Gaps, len(s.Services))
	events := s.Events
	if len(events) > 40 {
		fmt.Fprintf(&out, "... %d events\n", len(events)-40)
		events = events[len(events)-40:]
	}
	for _, e := range events {
		fmt.Fprintf(&out, "%s %-6s", e.At.Format("05.000"), e.Kind)
		if len(e.IDs) > 5 {
			fmt.Fprintf(&out, " %d ids", len(e.IDs))
		} else {
			fmt.Fprintf(&out, " %v", e.IDs)
		}
		if len(e.Removed) > 0 {
			fmt.Fprintf(&out, " removed %d", len(e.Removed))
		}
		if e.Changed {
			fmt.Fprint(&out, " changed")
		}
		if e.Err != nil {
			fmt.Fprintf(&out, " %v", e.Err)
		}
		fmt.Fprintln(&out)
	}
	return out.String()
}
