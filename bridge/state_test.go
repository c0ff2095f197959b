package bridge

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

// TestReducerAtRandom feeds random incidents to the reducer: registries that state, forget, list, fail and
// recover, edits, releases and our own restarts. After each input the books must be in order; while the registry is away
// nothing may vanish; and in the end, when it has told the truth and time has passed, that truth and nothing else is left.
func TestReducerAtRandom(t *testing.T) {
	for seed := range uint64(150) {
		newFate(t, seed).run()
	}
}

// fate is one random incident.
type fate struct {
	t    *testing.T
	rnd  *rand.Rand
	seed uint64
	log  []string // the newest inputs

	now    time.Time
	store  *store
	r      *registryState
	policy policy
	source int
	truth  map[string]registry.Service
}

func newFate(t *testing.T, seed uint64) *fate {
	f := &fate{
		t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 7)), now: at(0), store: newStore(), truth: map[string]registry.Service{},
		policy: policy{protocol: mcp.HTTP, guard: guardSettings{settle: time.Minute, hold: 5 * time.Minute}},
	}
	f.r = newRegistryState(Key{"ns", "bridge", "test", "a"})
	f.store.add(f.r)
	f.do("read", func() { f.r.read("0"); f.r.reassemble(f.policy, f.now) })
	return f
}

func (f *fate) fatalf(format string, args ...any) {
	f.t.Helper()
	f.t.Fatalf("seed %d: %s\n%s", f.seed, fmt.Sprintf(format, args...), strings.Join(f.log[max(0, len(f.log)-25):], "\n"))
}

// do gives the reducer one input, and looks at its books.
func (f *fate) do(what string, input func()) {
	f.t.Helper()
	f.log = append(f.log, f.now.Format("15:04:05.000 ")+what)
	before := f.published()
	away := f.r.gap.open()
	input()
	f.store.collect(f.r)
	f.audit()
	if away && f.r.gap.open() && !f.r.policy.guard.off && strings.HasPrefix(what, "tick") {
		after := f.published() // services that were deleted before, and linger empty, may go
		maps.DeleteFunc(before, func(k, v string) bool { return v != "there" && after[k] == "" })
		if !maps.Equal(before, after) {
			f.fatalf("time alone changed what is published of a registry that is away: %v became %v", before, after)
		}
	}
}

func (f *fate) run() {
	for range 20 + f.rnd.IntN(150) {
		f.step()
	}
	f.converge()
}

func (f *fate) step() {
	ids := []string{"s0", "s1", "s2", "s3"}
	id := ids[f.rnd.IntN(len(ids))]
	switch n := f.rnd.IntN(100); {
	case n < 35:
		s := f.service(id)
		f.truth[id] = s
		f.do(fmt.Sprintf("put %s %v", id, s.Instances), func() { f.r.put(s, f.now) })
	case n < 40:
		if s, ok := f.truth[id]; ok { // the same again
			f.do("put again "+id, func() { f.r.put(s, f.now) })
		}
	case n < 48:
		delete(f.truth, id)
		f.do("delete "+id, func() { f.r.forget([]string{id}, f.now) })
	case n < 60:
		list := slices.Sorted(maps.Keys(f.truth))
		f.do(fmt.Sprint("synced ", list), func() { f.r.listing(list, f.now) })
	case n < 63:
		f.do("synced nothing", func() { f.r.listing(nil, f.now) })
	case n < 66: // lists what it has not told
		f.do("synced all", func() { f.r.listing(slices.Clone(ids), f.now) })
	case n < 72:
		f.do("fail", func() { f.r.fail(errors.New("down"), nil, f.now) })
	case n < 77:
		f.do("fail "+id, func() { f.r.fail(errors.New("unreadable"), []string{id}, f.now) })
	case n < 79:
		f.do("release", func() { f.r.release(f.now) })
	case n < 82:
		f.policy.guard.off = f.rnd.IntN(4) == 0
		f.policy.protocol = []mcp.Protocol{mcp.HTTP, mcp.GRPC}[f.rnd.IntN(2)]
		f.do(fmt.Sprintf("edit %+v", f.policy), func() { f.r.reassemble(f.policy, f.now) })
	case n < 84:
		f.source++
		f.do("edit source", func() { f.r.read(fmt.Sprint(f.source)); f.r.reassemble(f.policy, f.now) })
	case n < 86:
		f.restart()
	case n < 96:
		f.advance(time.Duration(f.rnd.IntN(15_000)) * time.Millisecond)
	default:
		f.advance(time.Duration(f.rnd.IntN(400)) * time.Second)
	}
}

func (f *fate) service(id string) registry.Service {
	s := registry.Service{ID: id, Host: id + ".test", Port: []uint32{0, 0, 80}[f.rnd.IntN(3)]}
	for range f.rnd.IntN(16) {
		s.Instances = append(s.Instances, registry.Instance{
			Address: fmt.Sprint("10.0.0.", f.rnd.IntN(40)), Port: []uint32{80, 80, 80, 81}[f.rnd.IntN(4)], Weight: 1,
			Unhealthy: f.rnd.IntN(8) == 0, Protocol: []string{"", "", "", "", "grpc"}[f.rnd.IntN(5)],
		})
	}
	return s
}

// advance lets time pass, with a tick whenever one is due.
func (f *fate) advance(d time.Duration) {
	end := f.now.Add(d)
	for n := 0; !f.r.alarm.IsZero() && !f.r.alarm.After(end); n++ {
		if n > 1000 {
			f.fatalf("the alarm rings without end")
		}
		if f.r.alarm.After(f.now) {
			f.now = f.r.alarm
		}
		f.do("tick", func() { f.r.tick(f.now) })
		if !f.r.alarm.IsZero() && !f.r.alarm.After(f.now) {
			f.fatalf("after a tick at %v the alarm is at %v", f.now, f.r.alarm)
		}
	}
	f.now = end
}

// restart takes the state through a snapshot, if it is worth one.
func (f *fate) restart() {
	before := f.published()
	if !f.r.storable() {
		return
	}
	var b bytes.Buffer
	header, written := f.r.snapshot()
	if err := encodeSnapshot(&b, header, written); err != nil {
		f.fatalf("%v", err)
	}
	header, services, err := decodeSnapshot(b.Bytes())
	if err != nil {
		f.fatalf("%v", err)
	}
	strays := false // of a replaced source, which no snapshot has
	for _, s := range f.r.services {
		strays = strays || s.old
	}
	f.store.remove(f.r)
	f.r = newRegistryState(f.r.key)
	f.do("restart", func() {
		f.r.policy = f.policy
		restoreInto(f.r, header, services, f.now)
		f.store.add(f.r)
		f.r.read(fmt.Sprint(f.source))
		f.r.reassemble(f.policy, f.now)
	})
	if after := f.published(); !strays && !maps.Equal(before, after) {
		f.fatalf("a restart changed %v to %v", before, after)
	}
}

// published is what the mesh has, by host and place.
func (f *fate) published() map[string]string {
	out := map[string]string{}
	for host, claims := range f.store.hosts {
		for _, c := range claims {
			out[host] = fmt.Sprint(c.port)
			for _, e := range c.endpoints {
				out[fmt.Sprint(host, " ", e.address, ":", e.port)] = "there"
			}
		}
	}
	return out
}

// audit looks at the books.
func (f *fate) audit() {
	f.t.Helper()
	r := f.r
	live, held, holders, homes := 0, 0, 0, map[endpointKey]int{}
	for id, s := range r.services {
		live += len(s.live)
		for _, e := range s.live {
			homes[e.key()]++
		}
		_, timed := r.timed[id]
		_, holding := r.holding[id]
		if holding != (len(s.held) > 0) || timed != (len(s.held) > 0 || !s.linger.IsZero()) {
			f.fatalf("%s: timed %v, holding %v; held %v, linger %v", id, timed, holding, s.held, s.linger)
		}
		if len(s.held) > 0 && !s.linger.IsZero() || s.known && !s.linger.IsZero() {
			f.fatalf("%s lingers although it is known or held", id)
		}
		if s.out == nil || r.placed[id] != strings.ToLower(s.out.host) || !s.out.equal(r.contribution(id, s)) {
			f.fatalf("%s: its contribution is out of date", id)
		}
		if !slices.IsSortedFunc(s.out.endpoints, endpoint.compare) {
			f.fatalf("%s: not sorted: %v", id, s.out.endpoints)
		}
		for i, e := range s.out.endpoints {
			if i > 0 && s.out.endpoints[i-1].key() == e.key() {
				f.fatalf("%s: %v stands twice", id, e)
			}
		}
		here := listed(s.facts)
		for k, h := range s.held {
			if !slices.Contains(r.heldBy[k], id) {
				f.fatalf("%s: %v is held, and not in the index", id, k)
			}
			held++
			if here[k] {
				f.fatalf("%s: %v is held although it is listed", id, k)
			}
			if len(s.out.endpoints) == 0 {
				f.fatalf("%s: %v is held, and nothing is published: it speaks %v, the service %v", id, k, h.had, s.had)
			}
		}
	}
	for _, ids := range r.heldBy {
		holders += len(ids)
	}
	if held != holders {
		f.fatalf("%d endpoints are held, %d in the index %v", held, holders, r.heldBy)
	}
	if live != r.live {
		f.fatalf("live is %d, should be %d", r.live, live)
	}
	if r.homes != nil && !maps.Equal(homes, r.homes) {
		f.fatalf("homes are %v, should be %v", r.homes, homes)
	}
	for id := range r.holding {
		for k := range r.services[id].held {
			if homes[k] > 0 && !r.services[id].old {
				f.fatalf("%s: %v is held although it lives elsewhere", id, k)
			}
		}
		if r.homes == nil {
			f.fatalf("something is held, and nobody knows what lives where")
		}
	}
	if len(r.holding) == 0 && r.homes != nil {
		f.fatalf("homes are kept for nothing")
	}
	if len(r.placed) != len(r.services) {
		f.fatalf("%d services, %d placed", len(r.services), len(r.placed))
	}
	for id := range r.timed {
		if r.services[id] == nil {
			f.fatalf("%s has gone and is timed", id)
		}
	}
	if r.policy.guard.off && len(r.holding) > 0 {
		f.fatalf("the guard is off and holds")
	}
}

// converge lets the registry tell the truth, and time pass.
func (f *fate) converge() {
	list := slices.Sorted(maps.Keys(f.truth))
	tell := func() {
		for _, id := range list {
			f.do("put "+id, func() { f.r.put(f.truth[id], f.now) })
		}
		f.do(fmt.Sprint("synced ", list), func() { f.r.listing(list, f.now) })
	}
	tell()
	f.advance(time.Second)
	tell() // an empty listing has to be said twice
	f.advance(time.Hour)
	tell()
	want := map[string]string{}
	for _, id := range list {
		s := f.r.services[id]
		a := assemble(f.policy, f.truth[id], s.had, nil)
		host := strings.ToLower(f.truth[id].Host)
		want[host] = fmt.Sprint(remembered{max(f.truth[id].Port, a.had.port*boolToInt(f.truth[id].Port == 0)), a.had.protocol})
		if a.had == (remembered{}) {
			want[host] = fmt.Sprint(remembered{f.truth[id].Port, f.policy.protocol})
		}
		for _, e := range a.endpoints {
			want[fmt.Sprint(host, " ", e.address, ":", e.port)] = "there"
		}
		if a.had != s.had {
			f.fatalf("%s has %v, should have %v", id, s.had, a.had)
		}
	}
	if got := f.published(); !maps.Equal(got, want) {
		f.fatalf("in the end there is %v\nshould be %v", got, want)
	}
	r := f.r
	if len(r.services) != len(list) || len(r.timed)+len(r.holding)+len(r.errs)+len(r.pending)+len(r.window.events)+len(r.window.services) > 0 {
		f.fatalf("left behind: %d services, timed %v, holding %v, errs %v, pending %v, window %v", len(r.services), r.timed, r.holding, r.errs,
			r.pending, r.window)
	}
	if !r.loaded || r.gap.open() || !r.alarm.IsZero() || r.replaced {
		f.fatalf("loaded %v, gap %v, alarm %v, replaced %v", r.loaded, r.gap, r.alarm, r.replaced)
	}
}

func boolToInt(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// BenchmarkMassLoss loses all of a registry's services one by one, and gets them back one by one: what one input costs must
// not depend on how much is held.
func BenchmarkMassLoss(b *testing.B) {
	for _, services := range []int{1000, 10_000, 100_000} {
		b.Run(fmt.Sprint(services), func(b *testing.B) {
			for b.Loop() {
				r := newRegistryState(Key{"ns", "bridge", "test", "a"})
				r.reassemble(policy{protocol: mcp.HTTP, guard: guardOf(nil)}, at(0))
				facts := make([]registry.Service, services)
				for i := range facts {
					facts[i] = registry.Service{ID: fmt.Sprint("s", i), Host: fmt.Sprint("s", i, ".test"), Instances: []registry.Instance{
						{Address: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255), Port: 80, Weight: 1},
					}}
					r.put(facts[i], at(0))
				}
				for _, s := range facts {
					r.forget([]string{s.ID}, at(100))
				}
				if len(r.holding) != services {
					b.Fatalf("%d services are held", len(r.holding))
				}
				for _, s := range facts {
					r.put(s, at(105))
				}
				if len(r.holding) != 0 {
					b.Fatalf("%d services are still held", len(r.holding))
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(3*services), "ns/input")
		})
	}
}
