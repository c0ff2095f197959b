package bridge

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func at(seconds int) time.Time {
	return time.Unix(1_000_000, 0).Add(time.Duration(seconds) * time.Second)
}

func TestGapCovers(t *testing.T) {
	ended := gap{start: at(10), end: at(20)}
	for name, c := range map[string]struct {
		gap       gap
		seen, now int
		until     int // 0: no time
		covered   bool
	}{
		"never a gap":                      {gap{}, 5, 100, 0, false},
		"open, seen before":                {gap{start: at(10)}, 5, 100, 0, true},
		"open, seen at its start":          {gap{start: at(10)}, 10, 100, 0, true},
		"open, seen since":                 {gap{start: at(10)}, 11, 100, 0, false},
		"ended, seen before":               {ended, 5, 21, 80, true},
		"ended, seen by what ended it":     {ended, 20, 21, 80, true},
		"ended, seen since":                {ended, 21, 22, 0, false},
		"ended, seen before, last instant": {ended, 5, 79, 80, true},
		"ended and settled":                {ended, 5, 80, 80, false},
	} {
		t.Run(name, func(t *testing.T) {
			until, covered := c.gap.covers(at(c.seen), at(c.now), time.Minute)
			if covered != c.covered || covered && c.until != 0 && !until.Equal(at(c.until)) || covered && c.until == 0 && !until.IsZero() {
				t.Errorf("covers = %v, %v", until, covered)
			}
		})
	}
}

// TestLossWindowAgainstModel compares the running sums with a model that looks at all events anew.
func TestLossWindowAgainstModel(t *testing.T) {
	type event struct {
		at       time.Time
		id       string
		added    int
		lost     int
		restored int
	}
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var w lossWindow
		var events []event
		now := at(0)
		for range 300 {
			now = now.Add(time.Duration(rnd.IntN(3000)) * time.Millisecond)
			e := event{at: now, id: fmt.Sprint("s", rnd.IntN(5)), added: rnd.IntN(4), lost: rnd.IntN(6)}
			var lost []loss
			for i := range e.lost {
				restored := rnd.IntN(20) == 0
				if restored {
					e.restored++
				}
				lost = append(lost, loss{id: e.id, endpoint: endpoint{address: fmt.Sprint(i)}, restored: restored})
			}
			w.record(now, e.id, e.added, lost)
			events = append(events, e)

			perService, restored := map[string]int{}, 0
			for _, e := range events {
				if now.Sub(e.at) <= 10*time.Second {
					perService[e.id] += e.lost - e.added
					restored += e.restored
				}
			}
			net := 0
			for _, n := range perService {
				net += max(0, n)
			}
			live := rnd.IntN(40)
			want := net > live && (net >= 10 || restored > 0 && net >= 1)
			if w.net != net || w.mass(live) != want {
				t.Fatalf("seed %d: net %d, want %d; mass(%d) %v, want %v", seed, w.net, net, live, w.mass(live), want)
			}
		}
		w.prune(now.Add(time.Hour))
		if len(w.events) != 0 || len(w.services) != 0 || w.net != 0 || w.restored != 0 {
			t.Fatalf("seed %d: after an hour %d events and %d services are left", seed, len(w.events), len(w.services))
		}
	}
}

func TestDiffEndpoints(t *testing.T) {
	for seed := range uint64(500) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		list := func() []endpoint {
			keys := map[endpointKey]bool{}
			for range rnd.IntN(8) {
				keys[endpointKey{fmt.Sprint("10.0.0.", rnd.IntN(5)), uint32(rnd.IntN(3))}] = true
			}
			var out []endpoint
			for k := range keys {
				out = append(out, endpoint{address: k.address, port: k.port, weight: rnd.Float64()})
			}
			slices.SortFunc(out, endpoint.compare)
			return out
		}
		has := func(list []endpoint, e endpoint) bool {
			return slices.ContainsFunc(list, func(o endpoint) bool { return o.key() == e.key() })
		}
		before, after := list(), list()
		added, gone := diffEndpoints(before, after)
		for _, e := range before {
			if has(gone, e) == has(after, e) {
				t.Fatalf("seed %d: %v -> %v: gone %v", seed, before, after, gone)
			}
		}
		for _, e := range after {
			if has(added, e) == has(before, e) {
				t.Fatalf("seed %d: %v -> %v: added %v", seed, before, after, added)
			}
		}
		if len(before)-len(gone)+len(added) != len(after) {
			t.Fatalf("seed %d: %v -> %v: added %v, gone %v", seed, before, after, added, gone)
		}
	}
}
