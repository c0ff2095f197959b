package consul

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/regbridge/regbridge/registry"
)

// An agent allows 200 connections per client address (limits.http_max_conns_per_client), which all programs of a host
// share. Over TLS many requests share a connection (HTTP/2).
const (
	// watches is the number of blocking queries about single services that all entries together keep open at one agent.
	watches = 100
	// lists is the number of blocking queries about all services or all checks; an entry needs one or two. Further
	// entries take turns.
	lists = 32
	// watchesHTTP2 is the same where queries share connections.
	watchesHTTP2 = 1000
	// calls is the number of other requests that all entries together have under way at one agent.
	calls = 16
	// idleConns is the number of connections that one entry keeps for later.
	idleConns = 16
	// urgentReaders and sweepReaders are the requests that one entry has under way.
	urgentReaders = 8
	sweepReaders  = 4
	// sweepRate is how many services per second are looked at because something, somewhere, changed. sweepBurst lets a
	// change after a quiet time be found at once.
	sweepRate  = 400
	sweepBurst = 1000

	// minPause is the least time between two answers of one query, so that a flapping check costs little. The first
	// change after a quiet time is not delayed. An answer of bytesPerSecond bytes costs another second.
	minPause       = 200 * time.Millisecond
	bytesPerSecond = 4 << 20
	// coldAfter is how much longer a watched service must have been quiet than one that is not to lose its query to it.
	coldAfter = 10 * time.Second
	// hot is how many of the services without a query are looked at first whenever something, somewhere, changed.
	hot = 32
	// minChecksPause is the least time between two lists of all checks.
	minChecksPause = 500 * time.Millisecond
	// failover is the number of failures in a row after which another agent is tried, if there is one.
	failover = 3
)

// errReset is wrapped by the error that ends a session whose agent works, but forgot what it knew.
var errReset = errors.New("the index went back")

// session reads one agent until that agent fails. All state belongs to the goroutine of run; readers hand their results
// to it as functions. So the calls about one service are in order, and what a stopped reader still learns is dropped.
type session struct {
	*consul
	client  *client
	memory  *memory
	sink    registry.Sink
	calls   *registry.Budget
	lists   *registry.Budget
	watches *registry.Budget // known once the protocol is
	limiter *rate.Limiter

	readers sync.WaitGroup
	events  chan func()
	urgent  queue
	sweep   queue
	ended   error // why the session must end

	services map[string]*service
	nodes    map[string]map[*service]bool // the services that have instances on a node
	awaited  int                          // services that are awaited
	watched  int                          // services with a watch
	due      bool                         // a listing is to be reported, once nothing is awaited
	synced   bool                         // a listing was reported

	// unexplained are the versions of the catalog of which it is not known yet whose change made them. thorough says that
	// several changes may have come at once, so that a sweep has to go on when one is found.
	unexplained map[uint64]bool
	thorough    bool

	checking bool // the list of all checks is watched
	checks   map[checkKey]check

	crowded  time.Time // no new blocking query before, since the agent has too many connections
	relax    registry.Backoff
	madeRoom time.Time // when a service last lost its blocking query to a busier one
}

// service is what the session knows of one service that the catalog lists.
type service struct {
	name string
	// settled says that it was read, or failed by name, so that a listing may name it.
	settled bool
	// awaited says that no listing is reported until it is read, or fails by name, once more.
	awaited bool
	// index is the version of the last answer, 0 before it.
	index uint64
	nodes []string // in order
	// watch is the blocking query, nil if there is none.
	watch *watch
	// stage tells whether the service is about to be read otherwise. again is where it is to be queued after that,
	// since something may have changed while it was being read.
	stage stage
	in    *queue // where it is queued
	again *queue
	// blank says that an answer without a token had no instances. Consul does not tell whether there are none or whether
	// the anonymous token may not see them, so it is for the next listing to say.
	blank bool
	// doubtful says that a listing that the token's policies cut no longer has the service.
	doubtful bool
	readAt   time.Time // when the last answer came
	changed  time.Time // when the last answer differed from the one before
	retryAt  time.Time // not before, after a failure
	backoff  registry.Backoff
}

type stage int

const (
	idle stage = iota
	queued
	reading
)

// watch identifies a blocking query about one service.
type watch struct{ cancel context.CancelFunc }

// queue is a list of services to read, in order, and the channel to its readers.
type queue struct {
	list []*service
	jobs chan *service
}

// next gives what to send and where to; a nil channel if there is nothing.
func (q *queue) next() (chan<- *service, *service) {
	for len(q.list) > 0 && (q.list[0].stage != queued || q.list[0].in != q) { // was dropped, or went to the other queue
		q.list = q.list[1:]
	}
	if len(q.list) == 0 {
		return nil, nil
	}
	return q.jobs, q.list[0]
}

// sent notes that the first service went to a reader.
func (q *queue) sent() {
	q.list[0].stage = reading
	q.list = q.list[1:]
}

func newSession(c *consul, server registry.Server, m *memory, sink registry.Sink) (*session, error) {
	cl, err := newClient(c, server)
	if err != nil {
		return nil, err
	}
	return &session{
		consul:      c,
		client:      cl,
		memory:      m,
		sink:        sink,
		calls:       c.budget("calls", server, calls),
		lists:       c.budget("lists", server, lists),
		limiter:     rate.NewLimiter(sweepRate, sweepBurst),
		events:      make(chan func()),
		urgent:      queue{jobs: make(chan *service)},
		sweep:       queue{jobs: make(chan *service)},
		services:    map[string]*service{},
		nodes:       map[string]map[*service]bool{},
		unexplained: map[uint64]bool{},
		relax:       registry.Backoff{Min: 10 * time.Second, Max: 5 * time.Minute},
	}, nil
}

func (c *consul) budget(kind string, server registry.Server, size int64) *registry.Budget {
	return c.env.Budgets.Of("consul "+kind+" "+server.String(), size)
}

// run reads until ctx ends or the agent fails, and says why.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer s.client.close()
	defer s.readers.Wait()
	defer cancel()

	s.readers.Go(func() { s.list(ctx) })
	for range urgentReaders {
		s.readers.Go(func() { s.read(ctx, s.urgent.jobs, nil) })
	}
	for range sweepReaders {
		s.readers.Go(func() { s.read(ctx, s.sweep.jobs, s.limiter) })
	}
	tick := time.NewTicker(min(max(s.interval/20, 20*time.Millisecond), time.Second))
	defer tick.Stop()
	for s.ended == nil {
		urgentJobs, urgentJob := s.urgent.next()
		sweepJobs, sweepJob := s.sweep.next()
		if sweepJob == nil {
			clear(s.unexplained)
			s.thorough = false
		}
		select {
		case <-ctx.Done():
			return nil
		case event := <-s.events:
			event()
			s.report()
			s.promote(ctx)
		case urgentJobs <- urgentJob:
			s.urgent.sent()
		case sweepJobs <- sweepJob:
			s.sweep.sent()
		case <-tick.C:
			s.refresh()
			s.promote(ctx)
		}
	}
	return s.ended
}

// do has f run by the session's goroutine.
func (s *session) do(ctx context.Context, f func()) {
	select {
	case s.events <- f:
	case <-ctx.Done():
	}
}

// wait is how long a blocking query may wait, so that its answer is there within the interval, though the agent adds a
// sixteenth.
func (s *session) wait() time.Duration { return registry.Jitter(s.interval * 85 / 100) }

// list keeps the list of services: once at first, then as it changes, and at least once per interval.
func (s *session) list(ctx context.Context) {
	var index uint64
	backoff := registry.Backoff{Max: min(s.interval, maxBackoff)}
	failures := 0
	var quick time.Duration // what an answer takes that waits for nothing
	for ctx.Err() == nil {
		ask := index
		if failures > 0 {
			ask = 0 // waiting for a change would only prolong the gap
		}
		begun := time.Now()
		names, m, err := s.listOnce(ctx, ask)
		took := time.Since(begun)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			failures++
			inARow := failures
			s.do(ctx, func() { s.listFailed(err, inARow) })
			_ = registry.Sleep(ctx, backoff.Next())
			continue
		}
		if ask == 0 && (quick == 0 || took < quick) {
			quick = took
		}
		before, waited := index, ask > 0 && took > 2*quick+5*time.Millisecond
		failures, index = 0, m.index
		backoff.Reset()
		s.do(ctx, func() { s.listed(names, m, before, waited) })
		_ = registry.Sleep(ctx, min(pauseAfter(minPause, m.size), s.interval/20))
	}
}

func (s *session) listOnce(ctx context.Context, index uint64) (map[string]bool, meta, error) {
	budget := s.calls
	if index > 0 {
		budget = s.lists
	}
	if err := budget.Acquire(ctx, 1); err != nil {
		return nil, meta{}, err
	}
	defer budget.Release(1)
	names, m, err := s.client.services(ctx, index, s.wait())
	if err == nil && s.watches == nil { // nobody else looks at the field before the first answer
		s.watches = s.budget("watches", s.client.server, watches)
		if m.http2 {
			s.watches = s.budget("watches over HTTP/2", s.client.server, watchesHTTP2)
		}
	}
	return names, m, err
}

// pauseAfter is the pause after an answer of size bytes.
func pauseAfter(least time.Duration, size int) time.Duration {
	return least + time.Duration(size)*time.Second/bytesPerSecond
}

// listFailed reports that the services could not be listed. An answer that is no success leaves all as it is, since the
// next one tells what was missed. A broken connection ends the session, since the agent may come back as another one.
func (s *session) listFailed(err error, failures int) {
	status, ok := errors.AsType[*statusError](err)
	answered := ok || errors.Is(err, errUnproven)
	elsewhere := len(s.servers) > 1 && failures >= failover && (status == nil || status.code != http.StatusForbidden)
	if !answered || elsewhere {
		s.ended = err
		return
	}
	s.sink.Fail(err)
	if tooMany(err) {
		s.yield()
	}
}

// tooMany reports whether the agent refused to answer since there are too many connections or requests.
func tooMany(err error) bool {
	status, ok := errors.AsType[*statusError](err)
	return ok && status.code == http.StatusTooManyRequests
}

// yield gives half of the blocking queries up, those about the quietest services, and begins no new ones for a while.
func (s *session) yield() {
	var list []*service
	for _, sv := range s.services {
		if sv.watch != nil {
			list = append(list, sv)
		}
	}
	slices.SortFunc(list, func(a, b *service) int { return a.changed.Compare(b.changed) })
	for _, sv := range list[:(len(list)+1)/2] {
		s.unwatch(sv)
		s.enqueue(&s.urgent, sv)
	}
	s.crowded = time.Now().Add(s.relax.Next())
}

// listed takes an answer to "which services are there", asked for with the index before. waited says that the query was
// waiting when a change came, so that the answer tells of that one alone. However many services it no longer names, the
// sink is told by one call, since it must see that as one loss.
func (s *session) listed(names map[string]bool, m meta, before uint64, waited bool) {
	if m.index < before {
		s.ended = fmt.Errorf("list services of consul at %s: %w from %d to %d: was the cluster restarted or restored?",
			s.client.server, errReset, before, m.index)
		return
	}
	if before > 0 && m.index != before {
		s.search(m.index, waited)
	}
	if err := s.believable(names, m); err != nil {
		s.sink.Fail(fmt.Errorf("list services of consul at %s: %w", s.client.server, err))
		return
	}
	mem := s.memory
	if mem.listed && m.filtered && !mem.filtered {
		s.sink.Fail(fmt.Errorf("list services of consul at %s: the token may no longer read all services: "+
			"services that it cannot see are kept; check its policies", s.client.server))
	}
	_, consul := names["consul"]
	mem.listed, mem.filtered, mem.consul = true, m.filtered, mem.consul || consul

	now := map[string]bool{}
	for name, tagged := range names {
		if name == "" || !tagged {
			continue
		}
		now[name] = true
		if sv := s.services[name]; sv != nil {
			sv.doubtful = false
			continue
		}
		s.begin(name, false)
	}
	lost := map[string]bool{} // nodes of services that are gone
	for name := range mem.known {
		if now[name] {
			continue
		}
		if _, there := names[name]; m.filtered && !there {
			// Gone, or merely hidden: reading it tells.
			now[name] = true
			s.begin(name, true)
			continue
		}
		s.explain(m.index)
		for _, node := range s.forget(name) {
			lost[node] = true
		}
	}
	s.affected(maps.Keys(lost))
	mem.known = now
	s.due = true
}

// believable tells an empty cluster from a token that sees nothing. Consul answers a request without a token with what
// the anonymous token may read, by default nothing, and does not say that anything was left out.
func (s *session) believable(names map[string]bool, m meta) error {
	_, consul := names["consul"]
	switch {
	case m.filtered && len(names) == 0 && len(s.memory.known) == 0:
		return fmt.Errorf("%w: the token may read no service: give it service_prefix \"\" { policy = \"read\" } and "+
			"node_prefix \"\" { policy = \"read\" }, or less", errUnproven)
	case m.filtered || consul:
		return nil
	case m.anonymous && (len(names) == 0 || s.memory.consul):
		return fmt.Errorf("%w: it does not even list consul itself, and the agent denies by default: "+
			"name a Secret with the key consulToken in authSecretName", errUnproven)
	case s.ownService && (len(names) == 0 || s.memory.consul):
		return fmt.Errorf("%w: it does not even list consul itself: is the cluster just starting?", errUnproven)
	default:
		return nil
	}
}

// begin has a service read: a new one, or one that is doubtful. A listing waits for doubtful ones, so that those that turn
// out to be gone are one loss, but once there was a listing it does not wait for new ones: it leaves them out, unless it
// has been waiting already and takes back what the one before did not name.
func (s *session) begin(name string, doubtful bool) {
	sv := s.services[name]
	wait := doubtful && (sv == nil || !sv.doubtful)
	if sv == nil {
		sv = &service{name: name, changed: time.Now(), backoff: registry.Backoff{Max: s.interval}}
		s.services[name] = sv
		wait = wait || !s.synced || s.due
	}
	if wait && !sv.awaited {
		sv.awaited = true
		s.awaited++
	}
	sv.doubtful = doubtful
	if doubtful {
		s.unwatch(sv) // a blocking query about a service that is not there would only wait
	}
	s.enqueue(&s.urgent, sv)
}

// forget ends a service that is not there any more, and returns the nodes it had instances on. The sink is not told.
func (s *session) forget(name string) (lost []string) {
	if sv := s.services[name]; sv != nil {
		s.unwatch(sv)
		s.settle(sv)
		sv.stage = idle
		lost = s.move(sv, nil)
		delete(s.services, name)
	}
	delete(s.memory.whole, name)
	return lost
}

// move notes the nodes that a service has instances on now, and returns those on which it no longer has any.
func (s *session) move(sv *service, nodes []string) (lost []string) {
	for _, node := range nodes {
		if s.nodes[node] == nil {
			s.nodes[node] = map[*service]bool{}
		}
		s.nodes[node][sv] = true
	}
	for _, node := range sv.nodes {
		if _, still := slices.BinarySearch(nodes, node); still {
			continue
		}
		lost = append(lost, node)
		if delete(s.nodes[node], sv); len(s.nodes[node]) == 0 {
			delete(s.nodes, node)
		}
	}
	sv.nodes = nodes
	return lost
}

func (s *session) settle(sv *service) {
	sv.settled = true
	if sv.awaited {
		sv.awaited = false
		s.awaited--
	}
}

func (s *session) unwatch(sv *service) {
	if sv.watch != nil {
		sv.watch.cancel()
		sv.watch = nil
		s.watched--
	}
}

// enqueue has a service read once, from now on, unless it is watched.
func (s *session) enqueue(q *queue, sv *service) {
	switch {
	case sv.watch != nil:
	case sv.stage == reading:
		sv.again = q
	case sv.stage == idle || q == &s.urgent && sv.in != q:
		sv.stage, sv.in = queued, q
		q.list = append(q.list, sv)
	}
}

// search looks for the service whose change made this version of the catalog, among those without a query of their own.
// The catalog does not tell. Where several may have changed, all are read.
func (s *session) search(index uint64, one bool) {
	if one {
		for _, sv := range s.services {
			if sv.index == index {
				return // its own query was faster
			}
		}
		s.unexplained[index] = true
	} else {
		s.thorough = true
	}
	s.sweepAll()
}

// explain notes whose change made a version of the catalog. The sweep ends if nothing else is looked for; what it would
// have read is read within the interval.
func (s *session) explain(index uint64) {
	if !s.unexplained[index] {
		return
	}
	delete(s.unexplained, index)
	if len(s.unexplained) > 0 || s.thorough {
		return
	}
	for _, sv := range s.sweep.list {
		if sv.stage == queued && sv.in == &s.sweep {
			sv.stage = idle
		}
	}
	s.sweep.list = nil
}

// sweepAll has all services read that are not watched, since any of them may have changed.
func (s *session) sweepAll() {
	list := make([]*service, 0, len(s.services))
	for _, sv := range s.services {
		if sv.settled && sv.watch == nil {
			list = append(list, sv)
		}
	}
	// What changed lately is likely to be what changed now.
	slices.SortFunc(list, func(a, b *service) int { return b.changed.Compare(a.changed) })
	for n, sv := range list {
		if n < hot {
			s.enqueue(&s.urgent, sv)
		} else {
			s.enqueue(&s.sweep, sv)
		}
	}
}

// affected has those services read that are not watched and have instances on one of the nodes.
func (s *session) affected(nodes iter.Seq[string]) {
	for node := range nodes {
		for sv := range s.nodes[node] {
			s.enqueue(&s.urgent, sv)
		}
	}
}

// refresh has services read that failed, or of which nothing was heard for long.
func (s *session) refresh() {
	now := time.Now()
	for _, sv := range s.services {
		switch {
		case sv.watch != nil || sv.stage != idle:
		case !sv.retryAt.IsZero():
			if now.After(sv.retryAt) {
				s.enqueue(&s.urgent, sv)
			}
		case now.Sub(sv.readAt) > s.interval*85/100:
			s.enqueue(&s.sweep, sv)
		}
	}
}

// report reports the listing once nothing is awaited.
func (s *session) report() {
	if !s.due || s.awaited > 0 || s.ended != nil {
		return
	}
	names := make([]string, 0, len(s.memory.known))
	for name := range s.memory.known {
		if s.services[name].settled {
			names = append(names, name)
		}
	}
	if len(names) == 0 && len(s.memory.known) > 0 {
		return // all are new: to name none would say that the registry is empty
	}
	s.due, s.synced = false, true
	slices.Sort(names)
	s.sink.Synced(names)
}

// read reads services as they are asked for.
func (s *session) read(ctx context.Context, jobs <-chan *service, limiter *rate.Limiter) {
	for {
		var sv *service
		select {
		case <-ctx.Done():
			return
		case sv = <-jobs:
		}
		if limiter != nil && limiter.Wait(ctx) != nil {
			return
		}
		if s.calls.Acquire(ctx, 1) != nil {
			return
		}
		a := s.ask(ctx, sv.name, 0)
		s.calls.Release(1)
		s.do(ctx, func() {
			if s.services[sv.name] != sv {
				return
			}
			sv.stage = idle
			s.answered(sv, a)
			if q := sv.again; q != nil {
				sv.again = nil
				s.enqueue(q, sv)
			}
		})
	}
}

// answer is what was learned of one service.
type answer struct {
	meta
	instances  []registry.Instance
	all        int // instances, before they were selected by tag
	datacenter string
	nodes      []string // in order
	err        error
}

func (s *session) ask(ctx context.Context, name string, index uint64) answer {
	r, m, err := s.client.health(ctx, name, index, s.wait())
	if err != nil {
		return answer{meta: m, err: err}
	}
	slices.Sort(r.nodes)
	return answer{
		meta: m, instances: r.instances(), all: r.all, datacenter: r.datacenter, nodes: slices.Clip(slices.Compact(r.nodes)),
	}
}

// answered takes an answer about a service.
func (s *session) answered(sv *service, a answer) {
	if a.err == nil && a.index < sv.index {
		s.ended = fmt.Errorf("read service %s of consul at %s: %w from %d to %d: was the cluster restarted or restored?", sv.name,
			s.client.server, errReset, sv.index, a.index)
		return
	}
	switch whole := s.memory.whole[sv.name]; {
	case a.err != nil || !a.filtered:
	case a.all == 0:
		a.err = fmt.Errorf("read service %s of consul at %s: %w: the token may not read its instances: grant it service "+
			"and node read", sv.name, s.client.server, errUnproven)
	case whole: // what is not there may be gone, or merely hidden
		a.err = fmt.Errorf("read service %s of consul at %s: %w: the token may no longer read all its instances: grant it "+
			"service and node read for all of them, or restart regbridge to do without those that it cannot see", sv.name,
			s.client.server, errUnproven)
	}
	if blank := a.err == nil && a.anonymous && a.all == 0; blank && sv.blank {
		a.err = fmt.Errorf("read service %s of consul at %s: %w: it has no instances though the service is listed: may the "+
			"anonymous token read nodes? Name a Secret with the key consulToken in authSecretName", sv.name, s.client.server, errUnproven)
	} else if sv.blank = blank; blank {
		s.unwatch(sv)
		sv.retryAt = time.Now().Add(sv.backoff.Next())
		return
	}
	if a.err != nil {
		s.sink.Fail(a.err, sv.name)
		s.settle(sv)
		sv.retryAt = time.Now().Add(sv.backoff.Next())
		if tooMany(a.err) {
			s.yield()
		}
		return
	}
	sv.backoff.Reset()
	sv.retryAt, sv.readAt = time.Time{}, time.Now()
	if sv.doubtful && a.all == 0 {
		s.gone(sv)
		return
	}
	if a.index != sv.index {
		sv.changed = time.Now()
		if sv.index > 0 && sv.watch == nil {
			s.makeRoom(sv)
		}
	}
	s.settle(sv)
	s.explain(a.index)
	sv.index = a.index
	lost := s.move(sv, a.nodes)
	if !a.filtered {
		s.memory.whole[sv.name] = true
	}
	s.affected(slices.Values(lost)) // a node that is gone takes all its services away at once
	if s.datacenter == "" && a.datacenter != "" {
		s.memory.datacenter = a.datacenter
	}
	if s.memory.datacenter == "" {
		return // no instance, and not one seen so far of any service: the next listing will not have it either
	}
	s.sink.Put(registry.Service{ID: sv.name, Host: hostOf(sv.name, s.memory.datacenter), Instances: a.instances})
}

// gone takes in that a doubtful service is not there any more. If a listing waits for it, that one tells.
func (s *session) gone(sv *service) {
	delete(s.memory.known, sv.name)
	s.forget(sv.name)
	if !s.due {
		s.sink.Delete(sv.name)
	}
}

// promote begins blocking queries while there are connections for them, for those services first that changed last.
// Where not all get one, the list of all checks is watched beside.
func (s *session) promote(ctx context.Context) {
	if !s.synced || s.ended != nil || s.watched == len(s.services) {
		return
	}
	if time.Now().Before(s.crowded) || !s.watches.TryAcquire(1) {
		if !s.checking {
			s.checking = true
			s.readers.Go(func() { s.watchChecks(ctx) })
		}
		return
	}
	var waiting []*service
	for _, sv := range s.services {
		if sv.watch == nil && sv.stage == idle && !sv.doubtful && sv.index > 0 && sv.retryAt.IsZero() {
			waiting = append(waiting, sv)
		}
	}
	slices.SortFunc(waiting, func(a, b *service) int { return b.changed.Compare(a.changed) })
	for _, sv := range waiting {
		s.begun(ctx, sv)
		if !s.watches.TryAcquire(1) {
			return
		}
	}
	s.watches.Release(1)
}

// makeRoom takes the blocking query from the service that did not change for the longest time, if sv, which has none
// and just changed, is likely to need one more.
func (s *session) makeRoom(sv *service) {
	if s.watched == 0 || time.Since(s.madeRoom) < minPause {
		return
	}
	var coldest *service
	for _, other := range s.services {
		if other.watch != nil && (coldest == nil || other.changed.Before(coldest.changed)) {
			coldest = other
		}
	}
	if sv.changed.Sub(coldest.changed) < coldAfter {
		return
	}
	s.madeRoom = time.Now()
	s.unwatch(coldest) // its connection goes to sv, once the query has returned
	s.enqueue(&s.urgent, coldest)
}

// begun starts the blocking query of a service; it has a connection.
func (s *session) begun(ctx context.Context, sv *service) {
	ctx, cancel := context.WithCancel(ctx)
	w := &watch{cancel: cancel}
	sv.watch = w
	s.watched++
	index := sv.index
	s.readers.Go(func() {
		defer cancel()
		s.follow(ctx, sv, w, index)
	})
}

// follow asks for one service again and again, until ctx ends, the connection is needed elsewhere, or it fails.
func (s *session) follow(ctx context.Context, sv *service, w *watch, index uint64) {
	for {
		a := s.ask(ctx, sv.name, index)
		s.watches.Release(1)
		if ctx.Err() != nil {
			return
		}
		ended := a.err != nil
		pause := min(pauseAfter(minPause, a.size), s.interval)
		s.do(ctx, func() {
			switch {
			case sv.watch != w:
			case tooMany(a.err):
				// Nothing is missed: the service is read at once, and then like those for which there is no connection.
				s.unwatch(sv)
				s.crowded = time.Now().Add(s.relax.Next())
				s.enqueue(&s.urgent, sv)
			case ended:
				s.unwatch(sv)
				s.answered(sv, a)
			default:
				s.answered(sv, a)
			}
		})
		if ended || registry.Sleep(ctx, pause) != nil {
			return
		}
		index = a.index
		if !s.watches.TryAcquire(1) { // another entry needs it
			s.do(ctx, func() {
				if sv.watch == w {
					s.unwatch(sv)
					s.enqueue(&s.urgent, sv)
				}
			})
			return
		}
	}
}

type checkKey struct{ node, id, service string }

// watchChecks waits for changes of any check, and has those services read that are not watched and may be affected.
func (s *session) watchChecks(ctx context.Context) {
	var index uint64
	backoff := registry.Backoff{Max: min(s.interval, maxBackoff)}
	for ctx.Err() == nil {
		if s.lists.Acquire(ctx, 1) != nil {
			return
		}
		list, m, err := s.client.checks(ctx, index, s.wait())
		s.lists.Release(1)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			// Nothing is missed: each service is read within the interval, only later than it could be.
			s.env.Logger.LogAttrs(ctx, slog.LevelWarn, "changes of checks are noticed late", slog.Any("error", err))
			index = 0
			_ = registry.Sleep(ctx, backoff.Next())
			continue
		}
		backoff.Reset()
		before := index
		index = m.index
		s.do(ctx, func() { s.checked(list, before) })
		_ = registry.Sleep(ctx, pauseAfter(minChecksPause, m.size))
	}
}

// checked takes a list of all checks, the first one if before is 0.
func (s *session) checked(list []check, before uint64) {
	old := s.checks
	s.checks = make(map[checkKey]check, len(list))
	nodes := map[string]bool{}
	affect := func(c check) {
		if c.ServiceName == "" {
			nodes[c.Node] = true
		} else if sv := s.services[c.ServiceName]; sv != nil && before > 0 {
			s.enqueue(&s.urgent, sv)
		}
	}
	for _, c := range list {
		key := checkKey{c.Node, c.CheckID, c.ServiceID}
		s.checks[key] = c
		if o, ok := old[key]; !ok || o.ModifyIndex != c.ModifyIndex {
			affect(c)
		}
		delete(old, key)
	}
	for _, c := range old {
		affect(c)
	}
	if before == 0 { // changes between the services' reads and now may have been missed
		s.thorough = true
		s.sweepAll()
		return
	}
	s.affected(maps.Keys(nodes))
}
