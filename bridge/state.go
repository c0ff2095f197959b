package bridge

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

// registryState is what is known of one registry, and what it contributes. It is a pure reducer: its methods take an
// input and the time, change the state, and note the services whose contribution changed. The store holds its lock.
type registryState struct {
	mu sync.Mutex // held by whoever calls a method

	key    Key
	order  int // in the configuration
	policy policy
	source string // Fingerprint.Source of the entry whose facts these are

	services map[string]*serviceState
	timed    map[string]struct{} // ids of services with held endpoints or a linger
	holding  map[string]struct{} // ids of services with held endpoints
	gap      gap
	window   lossWindow
	live     int // listed and published endpoints of all services

	synced   bool                // since the Run began that reads the current source
	pending  map[string]struct{} // listed, but neither Put nor failed by name yet
	loaded   bool                // synced, and nothing pending
	restored bool                // began with a snapshot
	replaced bool                // an edit changed the source, and the new one is not loaded: what is here is no state of it
	removed  bool                // from the configuration
	lastSync time.Time
	version  uint64 // counts changes that a snapshot has to keep

	// homes counts live endpoints by address while anything is held: an address that lives elsewhere is not held. heldBy
	// tells which services hold an address.
	homes  map[endpointKey]int
	heldBy map[endpointKey][]string

	expired int // held endpoints that went because their time was over, since the last time that was told

	lastErr   error
	lastErrAt time.Time
	errs      map[string]error // by service, since its last Put

	alarm   time.Time                // when tick is due, or earlier; zero: never
	note    func(from, to condition) // told of each change of the condition, with the lock held; may be nil
	touched []string                 // ids whose contribution changed since the store last took them
	placed  map[string]string        // where the store has the contribution of an id: the host in lower case
}

type serviceState struct {
	facts     registry.Service
	known     bool      // the registry lists it
	old       bool      // it belongs to the source that an edit replaced
	restored  bool      // only a snapshot told it so far
	confirmed time.Time // when the registry last stated it
	gap       gap
	had       remembered
	live      []endpoint
	leftOut   []LeftOut
	held      map[endpointKey]held
	linger    time.Time // until when it stays published although deleted; zero: not deleted
	out       *contribution
}

// condition is what a user has to know of a registry at once.
type condition struct {
	loaded  bool // read completely since the source was configured
	failing bool // in a gap
	holding bool // publishing endpoints that it no longer lists
}

func (r *registryState) condition() condition {
	return condition{loaded: r.loaded, failing: r.failing(), holding: len(r.holding) > 0}
}

// failing reports whether the registry cannot be read. A gap that we made ourselves, by connecting anew, is no failure yet.
func (r *registryState) failing() bool {
	return r.gap.open() && r.lastErr != nil && !errors.Is(r.lastErr, errReconnecting)
}

// awaited reports whether first answers have to wait for the registry.
func (r *registryState) awaited() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.loaded && !r.restored
}

// listed returns the addresses and ports that the registry names, in whatever state.
func listed(s registry.Service) map[endpointKey]bool {
	all := make(map[endpointKey]bool, len(s.Instances))
	for _, i := range s.Instances {
		key, _ := keyOf(s, i)
		all[key] = true
	}
	return all
}

var (
	errReconnecting = errors.New("connecting anew: what it had stays until it has been read again")
	errEmptyListing = errors.New("the registry lists no services at all: what it had is held until it says so again")
)

func newRegistryState(key Key) *registryState {
	return &registryState{
		key: key, services: map[string]*serviceState{}, timed: map[string]struct{}{}, holding: map[string]struct{}{},
		heldBy: map[endpointKey][]string{}, placed: map[string]string{},
	}
}

// read says which source is read from now on. Services of another one stay until the new one is loaded.
func (r *registryState) read(source string) {
	if r.source == source {
		return
	}
	for _, s := range r.services {
		s.old = true
	}
	r.replaced = r.source != ""
	r.source = source
	r.synced, r.loaded, r.pending, r.errs = false, false, nil, nil
	r.gap, r.window = gap{}, lossWindow{}
	r.version++
}

// put states one service.
func (r *registryState) put(facts registry.Service, now time.Time) {
	s := r.services[facts.ID]
	if s == nil {
		s = &serviceState{}
		r.services[facts.ID] = s
	}
	seen := s.confirmed
	s.confirmed = now
	delete(r.errs, facts.ID)
	r.endGapOf(s, now)
	if !s.known || s.old || s.restored || !sameFacts(s.facts, facts) {
		r.replace(facts.ID, s, facts, seen, now)
	}
	delete(r.pending, facts.ID)
	r.checkLoaded()
}

// replace takes new facts in and judges what they no longer list.
func (r *registryState) replace(id string, s *serviceState, facts registry.Service, seen, now time.Time) {
	before, had, old, restored, earlier := s.live, s.had, s.old, s.restored, s.facts
	s.facts, s.known, s.old, s.restored, s.linger = facts, true, false, false, time.Time{}
	r.version++
	if old {
		r.letGo(id, s, nil)
	}
	returned := map[endpointKey]bool{} // whose loss is not, or no longer, in the window
	if len(s.held) > 0 {
		again := listed(facts)
		r.letGo(id, s, func(h held) bool {
			returned[h.key()] = h.kind == HoldSettle || now.Sub(h.since) > lossPeriod
			return again[h.key()]
		})
	}
	r.assembleService(s)

	added, gone := diffEndpoints(before, s.live)
	r.moved(id, added, gone, now)
	if old { // the other source's endpoints are neither lost nor made up for
		r.settleOut(id, s, now)
		return
	}
	var lost []loss
	if len(gone) > 0 {
		still := listed(facts)
		for _, e := range gone {
			if !still[e.key()] {
				lost = append(lost, loss{id: id, endpoint: e, had: had, restored: restored})
			}
		}
	}
	// What comes with a new service makes up for nothing, nor does what was held or listed before and is only back.
	recruits := 0
	if earlier.ID != "" && len(added) > 0 {
		known := listed(earlier)
		for _, e := range added {
			if !known[e.key()] && !returned[e.key()] {
				recruits++
			}
		}
	}
	r.judge(map[string]int{id: recruits}, lost, func(loss) time.Time { return seen }, now)
	r.settleOut(id, s, now)
}

// rethink assembles a service again because what is held of it changed, which has a say in its port and protocol. prev is
// the port and protocol that it had before.
func (r *registryState) rethink(id string, s *serviceState, prev remembered, now time.Time) {
	before := s.live
	s.had = prev
	r.assembleService(s)
	added, gone := diffEndpoints(before, s.live)
	r.moved(id, added, gone, now)
}

// reassemble applies a changed policy to all facts.
func (r *registryState) reassemble(p policy, now time.Time) {
	r.policy = p
	if p.guard.off {
		r.window = lossWindow{}
	}
	for id, s := range r.services {
		before := s.live
		if p.guard.off {
			r.letGo(id, s, nil)
		}
		if s.known {
			r.assembleService(s)
		}
		added, gone := diffEndpoints(before, s.live)
		r.moved(id, added, gone, now)
		r.settleOut(id, s, now)
	}
}

func (r *registryState) assembleService(s *serviceState) {
	r.live -= len(s.live)
	var kept map[remembered]int
	if len(s.held) > 0 {
		kept = map[remembered]int{}
		for _, h := range s.held {
			kept[remembered{cmp.Or(s.facts.Port, h.port), h.had.protocol}]++
		}
	}
	a := assemble(r.policy, s.facts, s.had, kept)
	s.had, s.live, s.leftOut = a.had, a.endpoints, a.leftOut
	r.live += len(s.live)
}

// listing takes a complete listing in: what it does not name is gone.
func (r *registryState) listing(ids []string, now time.Time) {
	r.lastSync = now
	names := make(map[string]struct{}, len(ids))
	for _, id := range ids {
		names[id] = struct{}{}
	}
	var gone []string
	for id, s := range r.services {
		switch _, ok := names[id]; {
		case ok:
		case s.old && r.loaded: // kept only because the new source names it, but could not tell it
			r.drop(id, s)
		case s.old:
		case s.known:
			gone = append(gone, id)
		default: // forgotten before: what could not be read of it need not be read any more
			r.endGapOf(s, now)
		}
	}
	slices.Sort(gone)
	if r.gap.open() {
		r.endGap(now)
	}
	r.lastErr = nil
	if len(ids) == 0 && len(gone) > 0 { // a registry that lists nothing at all is no evidence that everything is gone
		r.beginGap(now)
		r.lastErr, r.lastErrAt = errEmptyListing, now
	}
	r.forget(gone, now)

	if !r.synced {
		r.synced = true
		r.setAlarm() // what a snapshot holds may end from now on
	}
	r.pending = map[string]struct{}{}
	for id := range names {
		if s := r.services[id]; (s == nil || !s.known || s.old) && r.errs[id] == nil {
			r.pending[id] = struct{}{}
		}
	}
	for id := range r.errs {
		if _, ok := names[id]; !ok {
			delete(r.errs, id)
		}
	}
	r.checkLoaded()
}

// forget takes in that the registry no longer knows the services.
func (r *registryState) forget(ids []string, now time.Time) {
	var lost []loss
	seen := map[string]time.Time{}
	for _, id := range ids {
		delete(r.pending, id)
		delete(r.errs, id)
		s := r.services[id]
		switch {
		case s == nil:
			continue
		case s.old && r.loaded:
			r.drop(id, s)
			continue
		case s.old: // the other source's stays until the new one is loaded
			continue
		}
		r.endGapOf(s, now)
		if !s.known {
			continue
		}
		seen[id] = s.confirmed
		for _, e := range s.live {
			lost = append(lost, loss{id: id, endpoint: e, had: s.had, restored: s.restored})
		}
		r.moved(id, nil, s.live, now)
		r.live -= len(s.live)
		s.live, s.leftOut, s.known, s.restored = nil, nil, false, false
		s.facts = registry.Service{ID: id, Host: s.facts.Host, Port: s.facts.Port, TLS: s.facts.TLS}
		s.linger = time.Time{}
		r.version++
	}
	r.judge(nil, lost, func(l loss) time.Time { return seen[l.id] }, now)
	for _, id := range ids {
		if s := r.services[id]; s != nil {
			r.settleOut(id, s, now)
		}
	}
	r.checkLoaded()
}

// judge decides about endpoints that the registry stopped listing without a word: those that are not believed to be gone
// are held. added counts the new endpoints per service.
func (r *registryState) judge(added map[string]int, lost []loss, seen func(loss) time.Time, now time.Time) {
	if r.policy.guard.off {
		return
	}
	var believed []loss
	covered := map[string]remembered{}
	for _, l := range lost {
		s := r.services[l.id]
		until, ok := r.gap.covers(seen(l), now, r.policy.guard.settle)
		if !ok {
			until, ok = s.gap.covers(seen(l), now, r.policy.guard.settle)
		}
		if !ok {
			believed = append(believed, l)
			continue
		}
		r.hold(l, HoldSettle, until, now)
		covered[l.id] = l.had
	}
	for id, had := range covered {
		r.rethink(id, r.services[id], had, now)
	}
	r.steady(added, believed, now)
}

// steady applies the steady rule: losses are believed, unless together they are a mass loss.
func (r *registryState) steady(added map[string]int, lost []loss, now time.Time) {
	r.window.prune(now)
	perService := map[string][]loss{}
	for id := range added {
		perService[id] = nil
	}
	for _, l := range lost {
		perService[l.id] = append(perService[l.id], l)
	}
	for _, id := range slices.Sorted(maps.Keys(perService)) {
		r.window.record(now, id, added[id], perService[id])
	}
	if len(lost) == 0 || !r.window.mass(r.live) {
		return
	}
	until := now.Add(r.policy.guard.hold)
	before := map[string]remembered{} // what services had that hold now, before the first of these losses
	still := map[string]map[endpointKey]bool{}
	for _, e := range r.window.unheld() { // also what was believed a moment ago, before the loss was seen to be a mass loss
		s := r.services[e.id]
		if s == nil || s.old || len(e.lost) == 0 {
			continue
		}
		if still[e.id] == nil {
			still[e.id] = listed(s.facts)
		}
		n := len(s.held)
		for _, l := range e.lost {
			if !still[e.id][l.key()] {
				r.hold(l, HoldMass, until, now)
			}
		}
		if _, ok := before[e.id]; !ok && len(s.held) > n {
			before[e.id] = e.lost[0].had
		}
	}
	for _, id := range slices.Sorted(maps.Keys(before)) {
		r.rethink(id, r.services[id], before[id], now)
		r.settleOut(id, r.services[id], now)
	}
}

func (r *registryState) hold(l loss, kind HoldKind, until, now time.Time) {
	s := r.services[l.id]
	if _, ok := s.held[l.key()]; ok || r.livesElsewhere(l.key()) {
		return
	}
	if s.held == nil {
		s.held = map[endpointKey]held{}
	}
	s.held[l.key()] = held{loss: l, kind: kind, since: now, until: until}
	r.heldBy[l.key()] = append(r.heldBy[l.key()], l.id)
	s.linger = time.Time{}
	r.timed[l.id], r.holding[l.id] = struct{}{}, struct{}{}
	r.wakeAt(until)
	r.version++
}

// letGo ends holds of a service: those that which names, or all if it is nil. It returns how many.
func (r *registryState) letGo(id string, s *serviceState, which func(held) bool) int {
	n := 0
	for k, h := range s.held {
		if which != nil && !which(h) {
			continue
		}
		delete(s.held, k)
		if ids := slices.DeleteFunc(r.heldBy[k], func(other string) bool { return other == id }); len(ids) > 0 {
			r.heldBy[k] = ids
		} else {
			delete(r.heldBy, k)
		}
		n++
	}
	return n
}

func (r *registryState) wakeAt(t time.Time) {
	if !t.IsZero() && (r.alarm.IsZero() || t.Before(r.alarm)) {
		r.alarm = t
	}
}

// livesElsewhere reports whether the registry lists the address and port, now, in any service.
func (r *registryState) livesElsewhere(k endpointKey) bool {
	if r.homes == nil {
		r.findHomes()
	}
	return r.homes[k] > 0
}

func (r *registryState) findHomes() {
	r.homes = map[endpointKey]int{}
	for _, s := range r.services {
		for _, e := range s.live {
			r.homes[e.key()]++
		}
	}
}

// moved keeps homes, and lets go what is held of an address that now lives in another service.
func (r *registryState) moved(id string, added, gone []endpoint, now time.Time) {
	if r.homes == nil {
		return
	}
	for _, e := range gone {
		if k := e.key(); r.homes[k] > 1 {
			r.homes[k]--
		} else {
			delete(r.homes, k)
		}
	}
	for _, e := range added {
		r.homes[e.key()]++
	}
	holders := map[string]bool{}
	for _, e := range added {
		for _, other := range r.heldBy[e.key()] {
			if other != id {
				holders[other] = true
			}
		}
	}
	if len(holders) == 0 {
		return
	}
	here := map[endpointKey]bool{}
	for _, e := range added {
		here[e.key()] = true
	}
	for _, other := range slices.Sorted(maps.Keys(holders)) {
		s := r.services[other]
		r.letGo(other, s, func(h held) bool { return here[h.key()] })
		r.rethink(other, s, s.had, now)
		r.settleOut(other, s, now)
		r.version++
	}
}

// fail reports a gap, of some services or of the whole registry.
func (r *registryState) fail(err error, ids []string, now time.Time) {
	r.lastErr, r.lastErrAt = err, now
	if len(ids) == 0 {
		r.beginGap(now)
		return
	}
	if r.errs == nil {
		r.errs = map[string]error{}
	}
	for _, id := range ids {
		r.errs[id] = err
		delete(r.pending, id)
		if s := r.services[id]; s != nil {
			if !s.gap.open() {
				r.countReadable(s, now)
				r.version++
			}
			s.gap.begin(now)
		}
	}
	r.checkLoaded()
}

// reconnect notes that from now on the registry is read anew: perhaps as somebody else, who may be shown something else.
func (r *registryState) reconnect(now time.Time) {
	r.lastErr, r.lastErrAt = errReconnecting, now
	r.beginGap(now)
}

// beginGap notes that from now on changes may be missed.
func (r *registryState) beginGap(now time.Time) {
	if !r.gap.open() { // a snapshot has to know of the gap; when exactly it began makes no difference
		for id := range r.holding {
			r.countReadable(r.services[id], now)
		}
		r.version++
	}
	r.gap.begin(now)
}

// countReadable notes, before a gap begins, how long the registry could be read since the last one without listing what is
// held of the service.
func (r *registryState) countReadable(s *serviceState, now time.Time) {
	if r.frozen(s) {
		return
	}
	for k, h := range s.held {
		from := h.since
		for _, end := range []time.Time{r.gap.end, s.gap.end} {
			if end.After(from) {
				from = end
			}
		}
		h.readable += now.Sub(from)
		s.held[k] = h
	}
}

// endGap ends the registry's gap. While it was open nothing that is held could end, and now everything held waits until
// providers had the time to register again.
func (r *registryState) endGap(now time.Time) {
	r.gap.end = now
	r.version++
	for id := range r.timed {
		r.extendHolds(r.services[id], now)
	}
}

func (r *registryState) endGapOf(s *serviceState, now time.Time) {
	if s.gap.open() {
		s.gap.end = now
		r.version++
		r.extendHolds(s, now)
	}
}

// extendHolds makes what is held wait for a settle time from now on, but for no more than a hold in all of the time in
// which the registry can be read: one that fails again and again would otherwise keep it for ever.
func (r *registryState) extendHolds(s *serviceState, now time.Time) {
	guard := r.policy.guard
	for k, h := range s.held {
		wait := min(guard.settle, max(0, max(guard.hold, guard.settle)-h.readable))
		if until := now.Add(wait); h.until.Before(until) {
			h.until = until
			s.held[k] = h
		}
		r.wakeAt(h.until)
	}
}

// checkLoaded notes when the Run has told everything once; what the replaced source had, and the new one has not, goes
// then. A service that the new source lists, but could not tell, is unknown, not gone.
func (r *registryState) checkLoaded() {
	if !r.synced || len(r.pending) > 0 || r.loaded {
		return
	}
	r.loaded, r.replaced = true, false
	for id, s := range r.services {
		if s.old && r.errs[id] == nil {
			r.drop(id, s)
		}
	}
}

// drop removes a service at once, with all that is held of it.
func (r *registryState) drop(id string, s *serviceState) {
	r.moved(id, nil, s.live, time.Time{})
	r.letGo(id, s, nil)
	r.live -= len(s.live)
	delete(r.services, id)
	delete(r.timed, id)
	delete(r.holding, id)
	if len(r.holding) == 0 {
		r.homes = nil
	}
	r.touched = append(r.touched, id)
	r.version++
}

// tick lets time pass: holds end, lingering services go.
func (r *registryState) tick(now time.Time) {
	var settled []loss
	ended := map[string]bool{}
	before := r.heldCount()
	for _, id := range slices.Sorted(maps.Keys(r.timed)) {
		s := r.services[id]
		if r.frozen(s) {
			continue
		}
		ended[id] = r.letGo(id, s, func(h held) bool {
			over := !now.Before(h.until)
			if over && h.kind == HoldSettle { // what is still absent comes under the steady rule
				settled = append(settled, h.loss)
			}
			return over
		}) > 0
	}
	slices.SortFunc(settled, func(a, b loss) int { return cmp.Or(cmp.Compare(a.id, b.id), a.compare(b.endpoint)) })
	r.steady(nil, settled, now)
	for _, id := range slices.Sorted(maps.Keys(r.timed)) {
		s := r.services[id]
		if len(s.held) == 0 && !s.linger.IsZero() && !now.Before(s.linger) {
			r.drop(id, s)
			continue
		}
		if ended[id] {
			r.version++
			r.rethink(id, s, s.had, now)
		}
		r.settleOut(id, s, now)
	}
	r.expired += before - r.heldCount()
	r.window.prune(now)
	r.setAlarm()
}

func (r *registryState) heldCount() int {
	n := 0
	for id := range r.holding {
		n += len(r.services[id].held)
	}
	return n
}

// frozen reports whether nothing that is held of the service can end, whatever its time: in a gap absence is no evidence,
// before the first listing after our own restart nothing is known, and the services of a replaced source wait for the
// new one.
func (r *registryState) frozen(s *serviceState) bool {
	return r.gap.open() || s.gap.open() || s.old || r.restored && !r.synced
}

// release lets go everything that is held, and returns how many endpoints that were.
func (r *registryState) release(now time.Time) int {
	n := 0
	for _, id := range slices.Sorted(maps.Keys(r.timed)) {
		s := r.services[id]
		if gone := r.letGo(id, s, nil); gone > 0 {
			n += gone
			r.rethink(id, s, s.had, now)
		}
		r.settleOut(id, s, now)
	}
	r.window = lossWindow{}
	r.version++
	return n
}

// setAlarm finds out when tick has something to do.
func (r *registryState) setAlarm() {
	r.alarm = time.Time{}
	for id := range r.timed {
		s := r.services[id]
		if len(s.held) == 0 {
			r.wakeAt(s.linger)
		}
		for _, h := range s.held {
			if !r.frozen(s) {
				r.wakeAt(h.until)
			}
		}
	}
}

// settleOut makes the service's contribution from what is live and held, and notes whether it changed.
func (r *registryState) settleOut(id string, s *serviceState, now time.Time) {
	if !s.known && len(s.held) == 0 && s.linger.IsZero() {
		s.linger = now.Add(Linger) // begins when the last hold has ended
		r.wakeAt(s.linger)
	}
	if len(s.held) > 0 || !s.linger.IsZero() {
		r.timed[id] = struct{}{}
	} else {
		delete(r.timed, id)
	}
	if len(s.held) > 0 {
		r.holding[id] = struct{}{}
	} else {
		delete(r.holding, id)
	}
	if len(r.holding) == 0 {
		r.homes = nil
	}
	out := r.contribution(id, s)
	if !s.out.equal(out) {
		s.out = out
		r.touched = append(r.touched, id)
	}
}

func (r *registryState) contribution(id string, s *serviceState) *contribution {
	own := cmp.Or(s.facts.Port, s.had.port)
	c := &contribution{
		id: id, host: s.facts.Host, endpoints: s.live, lingers: !s.linger.IsZero(),
		port: remembered{r.policy.publishedPort(s.facts.Host, own), cmp.Or(s.had.protocol, r.policy.protocol)},
	}
	if s.facts.TLS != nil {
		c.tls = &mcp.TLS{SNI: s.facts.TLS.SNI}
	}
	if len(s.held) > 0 {
		all := slices.Clone(s.live)
		for _, h := range s.held {
			if h.had.protocol == c.port.protocol {
				all = append(all, h.endpoint)
			}
		}
		slices.SortFunc(all, endpoint.compare)
		c.endpoints = all
	}
	return c
}

// takeTouched returns the ids whose contribution changed, each once, and forgets them.
func (r *registryState) takeTouched() []string {
	ids := r.touched
	r.touched = nil
	slices.Sort(ids)
	return slices.Compact(ids)
}

func sameFacts(a, b registry.Service) bool {
	sameTLS := a.TLS == b.TLS || a.TLS != nil && b.TLS != nil && *a.TLS == *b.TLS
	return a.Host == b.Host && a.Port == b.Port && sameTLS && slices.Equal(a.Instances, b.Instances)
}

// diffEndpoints compares two sorted lists by address and port.
func diffEndpoints(before, after []endpoint) (added, gone []endpoint) {
	i, j := 0, 0
	for i < len(before) && j < len(after) {
		switch c := before[i].compare(after[j]); {
		case c < 0:
			gone = append(gone, before[i])
			i++
		case c > 0:
			added = append(added, after[j])
			j++
		default:
			i++
			j++
		}
	}
	return append(added, after[j:]...), append(gone, before[i:]...)
}
