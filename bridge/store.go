package bridge

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// store holds what all registries said, and knows which hosts have to be published anew. A registry's own lock is held
// for the time of one input; the store's lock, taken inside it, only to move claims.
type store struct {
	mu         sync.Mutex
	registries map[Key]*registryState
	hosts      map[string][]claim  // by host in lower case, in no order
	dirty      map[string]struct{} // hosts in lower case
	wake       chan struct{}       // holds one token while somebody should look at dirty or at the alarms
}

func newStore() *store {
	return &store{
		registries: map[Key]*registryState{}, hosts: map[string][]claim{}, dirty: map[string]struct{}{},
		wake: make(chan struct{}, 1),
	}
}

// update feeds one input to a registry's state, and takes over what it changed.
func (s *store) update(r *registryState, input func(now time.Time)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	alarm := r.alarm
	changed := s.step(r, time.Now(), input)
	if s.collect(r) || changed || r.alarm != alarm {
		s.wakeUp()
	}
}

// step makes one step of the registry's state, and reports whether its condition changed.
func (s *store) step(r *registryState, now time.Time, input func(now time.Time)) bool {
	before := r.condition()
	input(now)
	after := r.condition()
	if (after != before || r.expired > 0) && r.note != nil {
		r.note(before, after)
	}
	return after != before
}

func (s *store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// collect moves changed contributions to their hosts. The registry's lock is held.
func (s *store) collect(r *registryState) bool {
	ids := r.takeTouched()
	if len(ids) == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range ids {
		var out *contribution
		if st := r.services[id]; st != nil {
			out = st.out
		}
		if host, ok := r.placed[id]; ok && (out == nil || strings.ToLower(out.host) != host) {
			s.unplace(r, id, host)
		}
		if out == nil {
			continue
		}
		host := strings.ToLower(out.host)
		s.dirty[host] = struct{}{}
		c := claim{registry: r, contribution: out}
		if _, ok := r.placed[id]; !ok {
			s.hosts[host] = append(s.hosts[host], c)
			r.placed[id] = host
			continue
		}
		claims := s.hosts[host]
		claims[slices.IndexFunc(claims, func(c claim) bool { return c.registry == r && c.id == id })] = c
	}
	return true
}

func (s *store) unplace(r *registryState, id, host string) {
	delete(r.placed, id)
	s.dirty[host] = struct{}{}
	claims := slices.DeleteFunc(s.hosts[host], func(c claim) bool { return c.registry == r && c.id == id })
	if s.hosts[host] = claims; len(claims) == 0 {
		delete(s.hosts, host)
	}
}

// takeDirty returns the hosts that changed, in order, with the claims on each, and forgets that they changed.
func (s *store) takeDirty() map[string][]claim {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := make(map[string][]claim, len(s.dirty))
	for host := range s.dirty {
		taken[host] = slices.SortedFunc(slices.Values(s.hosts[host]), compareClaims)
	}
	s.dirty = map[string]struct{}{}
	return taken
}

func (s *store) isDirty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.dirty) > 0
}

// claims returns the claims on one host.
func (s *store) claims(host string) []claim {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(slices.Values(s.hosts[host]), compareClaims)
}

// all returns the registries in configuration order.
func (s *store) all() []*registryState {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*registryState, 0, len(s.registries))
	for _, r := range s.registries {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *registryState) int { return a.order - b.order })
	return out
}

// tick lets time pass for all registries, and returns when the next of them is due; the zero time if none is.
func (s *store) tick(now time.Time) time.Time {
	var next time.Time
	for _, r := range s.all() {
		r.mu.Lock()
		if !r.alarm.IsZero() && !now.Before(r.alarm) {
			s.step(r, now, r.tick)
			s.collect(r)
		}
		if !r.alarm.IsZero() && (next.IsZero() || r.alarm.Before(next)) {
			next = r.alarm
		}
		r.mu.Unlock()
	}
	return next
}

// setOrder gives the registries their places in the configuration; hosts with several claims may then have another lead.
func (s *store) setOrder(order map[Key]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := false
	for key, r := range s.registries {
		changed = changed || r.order != order[key]
		r.order = order[key]
	}
	if !changed {
		return
	}
	for host, claims := range s.hosts {
		if len(claims) > 1 {
			s.dirty[host] = struct{}{}
		}
	}
	s.wakeUp()
}

func (s *store) add(r *registryState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.registries[r.key] = r
}

// remove takes a registry out with all that it contributed.
func (s *store) remove(r *registryState) {
	s.update(r, func(time.Time) {
		r.removed = true
		for id, st := range r.services {
			r.drop(id, st)
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.registries, r.key)
}

// sink is the Sink of one Run. It is deaf once the Run's context is done.
type sink struct {
	ctx   context.Context //nolint:containedctx // a sink lives exactly as long as the Run whose context it is
	store *store
	state *registryState
}

var _ registry.Sink = sink{}

func (k sink) do(input func(now time.Time)) {
	k.store.update(k.state, func(now time.Time) {
		if k.ctx.Err() == nil {
			input(now)
		}
	})
}

func (k sink) Put(s registry.Service) { k.do(func(now time.Time) { k.state.put(s, now) }) }

func (k sink) Delete(id string) {
	k.do(func(now time.Time) { k.state.forget([]string{id}, now) })
}

func (k sink) Synced(ids []string) { k.do(func(now time.Time) { k.state.listing(ids, now) }) }

func (k sink) Fail(err error, ids ...string) {
	k.do(func(now time.Time) { k.state.fail(err, ids, now) })
}
