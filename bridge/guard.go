package bridge

import (
	"time"

	"github.com/regbridge/regbridge/registry"
)

// Default times of the guard, and the linger of services.
const (
	// DefaultSettle is how long absence is no evidence after a gap.
	DefaultSettle = time.Minute
	// DefaultHold is how long a mass loss waits for recovery, or for a user's word.
	DefaultHold = 5 * time.Minute
	// Linger is how long a service that its registry deleted stays published without endpoints.
	Linger = 5 * time.Minute

	lossPeriod  = 10 * time.Second // in which losses add up to a mass loss
	lossMinimum = 10               // endpoints; fewer are never a mass loss, except right after our own restart
)

type guardSettings struct {
	settle, hold time.Duration
	off          bool
}

func guardOf(g *registry.Guard) guardSettings {
	if g == nil {
		return guardSettings{settle: DefaultSettle, hold: DefaultHold}
	}
	return guardSettings{settle: g.Settle.Or(DefaultSettle), hold: g.Hold.Or(DefaultHold), off: g.Off}
}

// gap is a time in which changes may have been missed. What was last confirmed before it started may come back later
// than it ended: providers have to register again.
type gap struct {
	start, end time.Time // end is zero while the gap is open
}

func (g *gap) begin(now time.Time) { *g = gap{start: now} }

func (g *gap) open() bool { return !g.start.IsZero() && g.end.IsZero() }

// covers reports whether the gap makes absence unbelievable for something last confirmed at seen, and until when; the
// zero time means until the gap has ended and settled. What was confirmed by the reading that ended the gap is covered: a
// server that was frozen still lists, for a moment, providers that it is about to forget.
func (g *gap) covers(seen, now time.Time, settle time.Duration) (until time.Time, covered bool) {
	switch {
	case g.start.IsZero() || seen.After(g.end) && seen.After(g.start):
		return time.Time{}, false
	case g.open():
		return time.Time{}, true
	default:
		until = g.end.Add(settle)
		return until, now.Before(until)
	}
}

// HoldKind says why endpoints are kept that a registry no longer lists.
type HoldKind string

const (
	// HoldSettle follows a gap.
	HoldSettle HoldKind = "settle"
	// HoldMass follows the loss of more than half of a registry's endpoints at once.
	HoldMass HoldKind = "mass-loss"
)

// held is an endpoint that is published although the registry no longer lists it.
type held struct {
	loss
	kind  HoldKind
	since time.Time
	until time.Time // not while the registry's gap is open
	// readable is how long the registry could have listed it since, up to the last gap.
	readable time.Duration
}

// loss is an endpoint that vanished without a word.
type loss struct {
	id string
	endpoint
	had remembered // by the service, when the endpoint was last listed
	// restored says that only a snapshot knew the endpoint since our start.
	restored bool
}

// lossWindow adds up what a registry lost, net of additions per service, during lossPeriod.
type lossWindow struct {
	events   []lossEvent // oldest first
	held     int         // so many of the first events have been held as a mass loss
	services map[string]*lossCount
	net      int // endpoints lost: the sum over services
	restored int // losses among events that only a snapshot knew
}

type lossEvent struct {
	at    time.Time
	id    string
	added int
	lost  []loss
}

type lossCount struct{ lost, added int }

func (c lossCount) net() int { return max(0, c.lost-c.added) }

func (w *lossWindow) record(now time.Time, id string, added int, lost []loss) {
	w.prune(now)
	if added == 0 && len(lost) == 0 {
		return
	}
	w.events = append(w.events, lossEvent{at: now, id: id, added: added, lost: lost})
	w.count(id, added, lost, 1)
}

func (w *lossWindow) count(id string, added int, lost []loss, sign int) {
	if w.services == nil {
		w.services = map[string]*lossCount{}
	}
	c := w.services[id]
	if c == nil {
		c = &lossCount{}
		w.services[id] = c
	}
	w.net -= c.net()
	c.added += sign * added
	c.lost += sign * len(lost)
	w.net += c.net()
	if *c == (lossCount{}) {
		delete(w.services, id)
	}
	for _, l := range lost {
		if l.restored {
			w.restored += sign
		}
	}
}

func (w *lossWindow) prune(now time.Time) {
	n := 0
	for ; n < len(w.events) && now.Sub(w.events[n].at) > lossPeriod; n++ {
		e := w.events[n]
		w.count(e.id, e.added, e.lost, -1)
	}
	clear(w.events[:n])
	w.events, w.held = w.events[n:], max(0, w.held-n)
}

// unheld returns the events that it did not return before.
func (w *lossWindow) unheld() []lossEvent {
	events := w.events[w.held:]
	w.held = len(w.events)
	return events
}

// mass reports whether the losses are a mass loss, given the number of endpoints that are still there.
func (w *lossWindow) mass(live int) bool {
	least := lossMinimum
	if w.restored > 0 {
		least = 1
	}
	return w.net >= least && w.net > live // more than half of what there was
}
