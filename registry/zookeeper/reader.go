package zookeeper

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/registry"
)

const (
	// minPause is the least time between two reads of one node that something changed in. The first change after a quiet
	// time is not delayed. An answer of bytesPerSecond bytes costs another second.
	minPause       = 100 * time.Millisecond
	bytesPerSecond = 4 << 20
	// repairPause is the least time between two reads of the slow repair.
	repairPause = 50 * time.Millisecond
	// maxRetry bounds the pause before what failed is read again.
	maxRetry = time.Minute
)

// kind is what is read of a node.
type kind int

const (
	listed      kind = iota // its children, with a watch; where it is missing, its appearance is watched for
	watched                 // its data, with a watch
	document                // its data, which never changes; where it is missing, its appearance is watched for
	checked                 // its data, which does not matter: that it can be read does
	definitions             // the service definitions below it
)

// znode is a node of ZooKeeper that is read. All but the first fields belong to the reader.
type znode struct {
	path string
	kind kind
	// take is given each answer, by the reader's goroutine.
	take func(answer)
	// apps are the applications whose definitions are read.
	apps []string

	reader  *reader
	armed   watches // those that stand
	stage   stage
	again   bool      // something happened while it was being read
	probe   bool      // whether it exists is to be asked next
	compare bool      // the slow repair reads it
	due     time.Time // when it is to be queued, if it is delayed
	index   int       // in the heap of those
	awaited bool      // the first listing of the session waits for it
	group   *int      // counts those of a kind that it waits for
	settled bool      // it was read, or failed, in this session
	missing bool
	dropped bool
	err     error // of the last read
	read    time.Time
	size    int
	version versions
	backoff registry.Backoff
}

type stage int

const (
	idle stage = iota
	delayed
	queued
	reading
)

// answer is what was learned of a node.
type answer struct {
	names       []string
	data        []byte
	version     versions
	missing     bool
	definitions map[string][]serviceKey // by application
	flaws       error                   // of definitions that cannot be decoded
	err         error
}

func (a answer) size() int {
	n := len(a.data)
	for _, name := range a.names {
		n += len(name) + 4
	}
	return n
}

// reader reads nodes over one session. All its state belongs to one goroutine, that of run; workers hand their results to
// it. So what is learned of a node is in order.
type reader struct {
	conn    *conn
	workers sync.WaitGroup
	jobs    chan job
	results chan result
	znodes  map[string]*znode // those that may be watched, by path
	queue   []*znode
	later   schedule
	awaited int   // nodes that the first listing waits for
	synced  bool  // it was reported
	ended   error // why the session must end

	repairs  []*znode // those that the slow repair has yet to read
	repairAt time.Time
}

// job is one request.
type job struct {
	z     *znode
	probe bool
	watch bool
	apps  []string
}

type result struct {
	job
	answer
}

func newReader(c *conn) *reader {
	return &reader{
		conn:     c,
		jobs:     make(chan job),
		results:  make(chan result),
		znodes:   map[string]*znode{},
		repairAt: time.Now().Add(c.z.repair),
	}
}

// run reads until ctx or the session ends, and says why; it ends the session. step is called after everything that
// happens; it returns when it wants to be called again at the latest.
func (r *reader) run(ctx context.Context, step func(now time.Time) time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer r.workers.Wait()
	defer r.conn.release()
	defer cancel()
	for range inFlight {
		r.workers.Go(func() { r.work(ctx) })
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		r.advance(now)
		wakeAt := step(now)
		if r.ended != nil {
			return r.ended
		}
		if at := r.nextAt(); wakeAt.IsZero() || at.Before(wakeAt) {
			wakeAt = at
		}
		timer.Reset(time.Until(wakeAt))
		jobs, next := r.next()
		select {
		case <-ctx.Done():
			return nil
		case <-r.conn.ended:
			return fmt.Errorf("read zookeeper at %s: %w", r.conn.server, r.conn.reason())
		case <-r.conn.wake:
			events, quiet := r.conn.fired()
			for path, fired := range events {
				r.fired(path, fired, quiet[path])
			}
		case jobs <- next:
			r.sent(next)
		case res := <-r.results:
			r.answered(res)
		case <-timer.C:
		}
	}
}

// begin has a node read from now on.
func (r *reader) begin(kind kind, path string, take func(answer)) *znode {
	z := &znode{path: path, kind: kind, take: take, reader: r, backoff: registry.Backoff{Max: maxRetry}}
	if kind != checked && kind != definitions {
		r.znodes[path] = z
	}
	if !r.synced && kind != checked {
		z.awaited = true
		r.awaited++
	}
	r.soon(z)
	return z
}

// drop ends the reading of a node. Its watch stays until it fires.
func (r *reader) drop(z *znode) {
	if z == nil || z.reader != r || z.dropped {
		return
	}
	z.dropped = true
	r.settle(z)
	r.unschedule(z)
	if r.znodes[z.path] == z {
		delete(r.znodes, z.path)
	}
}

func (r *reader) settle(z *znode) {
	z.settled = true
	if z.awaited {
		z.awaited = false
		r.awaited--
		if z.group != nil {
			*z.group--
		}
	}
}

// good reports whether the node was read in this session, and can be.
func (r *reader) good(z *znode) bool { return z != nil && z.reader == r && z.settled && z.err == nil }

// soon has a node read now.
func (r *reader) soon(z *znode) {
	switch {
	case z.reader != r || z.dropped || z.stage == queued:
	case z.stage == reading:
		z.again = true
	default:
		r.unschedule(z)
		z.stage = queued
		r.queue = append(r.queue, z)
	}
}

// changed has a node read since something happened to it: now, if it was not read a moment ago.
func (r *reader) changed(z *znode) {
	r.at(z, z.read.Add(minPause+time.Duration(z.size)*time.Second/bytesPerSecond))
}

// at has a node read at a time, or earlier.
func (r *reader) at(z *znode, due time.Time) {
	if !due.After(time.Now()) || z.stage == reading {
		r.soon(z)
		return
	}
	if z.reader != r || z.dropped || z.stage == queued || z.stage == delayed && !due.Before(z.due) {
		return
	}
	r.unschedule(z)
	z.stage, z.due = delayed, due
	heap.Push(&r.later, z)
}

func (r *reader) unschedule(z *znode) {
	if z.stage == delayed {
		heap.Remove(&r.later, z.index)
		z.stage = idle
	}
}

// advance queues what is due.
func (r *reader) advance(now time.Time) {
	for len(r.later) > 0 && !r.later[0].due.After(now) {
		r.soon(r.later[0])
	}
	if !r.synced || now.Before(r.repairAt) {
		return
	}
	if len(r.repairs) == 0 {
		for _, z := range r.znodes {
			r.repairs = append(r.repairs, z)
		}
	}
	r.repairAt = now.Add(max(repairPause, r.conn.z.repair/time.Duration(len(r.znodes)+1)))
	if n := len(r.repairs); n > 0 {
		z := r.repairs[n-1]
		r.repairs = r.repairs[:n-1]
		if z.stage == idle && !z.dropped && z.kind != document {
			z.compare = true
			r.soon(z)
		}
	}
}

func (r *reader) nextAt() time.Time {
	at := r.repairAt
	if !r.synced {
		at = time.Now().Add(time.Hour)
	}
	if len(r.later) > 0 && r.later[0].due.Before(at) {
		at = r.later[0].due
	}
	return at
}

// next gives what to send and where to; a nil channel if there is nothing. A watch is asked for only where none stands: the
// library would keep each until it fires.
func (r *reader) next() (chan<- job, job) {
	for len(r.queue) > 0 && r.queue[0].dropped {
		r.queue = r.queue[1:]
	}
	if len(r.queue) == 0 {
		return nil, job{}
	}
	z := r.queue[0]
	wants := z.wants()
	return r.jobs, job{z: z, probe: z.probe, apps: z.apps, watch: !z.compare && wants != 0 && z.armed&wants == 0}
}

// wants gives the watches of which one is to stand after the next read.
func (z *znode) wants() watches {
	switch {
	case z.kind == checked || z.kind == definitions || z.kind == document && !z.probe:
		return 0
	case z.probe:
		return existWatch | dataWatch
	case z.kind == listed:
		return childWatch
	default:
		return dataWatch
	}
}

// sent notes that the first job went to a worker. Its watch counts as standing from now on: should it fire before the
// answer is taken, that is not missed.
func (r *reader) sent(j job) {
	j.z.stage = reading
	if j.watch {
		j.z.armed |= j.z.wants()
	}
	r.queue = r.queue[1:]
}

// fired takes note of watches that fired. quiet says that only the data changed.
func (r *reader) fired(path string, fired watches, quiet bool) {
	z := r.znodes[path]
	if z == nil {
		return
	}
	z.armed &^= fired
	if quiet && z.kind != watched {
		return
	}
	z.probe, z.compare = false, false
	r.changed(z)
}

func (r *reader) work(ctx context.Context) {
	for {
		var j job
		select {
		case <-ctx.Done():
			return
		case j = <-r.jobs:
		}
		a := r.perform(ctx, j)
		select {
		case <-ctx.Done():
			return
		case r.results <- result{j, a}:
		}
	}
}

func (r *reader) perform(ctx context.Context, j job) (a answer) {
	c, path := r.conn, j.z.path
	switch {
	case j.z.kind == definitions:
		a.definitions, a.flaws, a.err = c.definitions(ctx, path, j.apps)
	case j.probe:
		var there bool
		there, a.version, a.err = c.exists(ctx, path, j.watch)
		a.missing = !there && a.err == nil
	case j.z.kind == listed:
		a.names, a.version, a.err = c.children(ctx, path, j.watch)
	default:
		a.data, a.version, a.err = c.get(ctx, path, j.watch)
	}
	if errors.Is(a.err, zk.ErrNoNode) {
		a.missing, a.err = true, nil
	}
	return a
}

// answered takes the answer to a job, and has what was learned taken.
func (r *reader) answered(res result) {
	z, a := res.z, res.answer
	z.stage = idle
	compare := z.compare && !z.again
	z.compare = false
	if z.dropped || errors.Is(a.err, errEnded) {
		return
	}
	switch {
	case a.err != nil: // a watch may be spent: ZooKeeper does not tell what we may not read
		z.armed = 0
		a.err = r.explain(z, a.err)
	case res.probe && a.missing:
		z.armed &^= dataWatch
	case res.probe: // it is there by now
		z.armed &^= existWatch
		z.probe = false
		r.soon(z)
		return
	case a.missing:
		if res.watch {
			z.armed &^= z.wants()
		}
		if compare && z.missing {
			return
		}
		if z.kind == listed || z.kind == document {
			z.probe = true
			r.soon(z)
			return
		}
	case compare && (z.missing || z.err != nil || z.version != a.version): // and no event told
		r.conn.z.env.Logger.Debug("the slow repair found a change", "path", z.path)
		z.armed = 0
		r.soon(z)
		return
	}
	if compare && a.err == nil && !a.missing {
		return
	}
	z.probe, z.missing, z.err, z.version, z.read, z.size = false, a.missing, a.err, a.version, time.Now(), a.size()
	r.settle(z)
	switch {
	case a.err == nil:
		z.backoff.Reset()
	case z.kind != checked: // which are read again anyway
		r.at(z, time.Now().Add(z.backoff.Next()))
	}
	z.take(a)
	if z.again {
		z.again = false
		r.changed(z)
	}
}

// explain tells what was being read, and what to do about it.
func (r *reader) explain(z *znode, err error) error {
	path := shortPath(r.conn.full(z.path))
	switch {
	case errors.Is(err, zk.ErrNoAuth) && r.conn.z.secret != "":
		return fmt.Errorf("read %s of zookeeper at %s: we may not (%w): check user and password in secret %s, and the ACL of "+
			"the node", path, r.conn.server, err, r.conn.z.secret)
	case errors.Is(err, zk.ErrNoAuth):
		return fmt.Errorf("read %s of zookeeper at %s: we may not (%w): name a Secret with zkUsername and zkPassword in "+
			"authSecretName, or let the ACL of the node admit world:anyone", path, r.conn.server, err)
	default:
		return fmt.Errorf("read %s of zookeeper at %s: %w", path, r.conn.server, err)
	}
}

// schedule is a heap of nodes, by when they are due.
type schedule []*znode

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].due.Before(s[j].due) }
func (s schedule) Swap(i, j int) {
	s[i], s[j] = s[j], s[i]
	s[i].index, s[j].index = i, j
}

// Push implements heap.Interface.
func (s *schedule) Push(x any) {
	z := x.(*znode)
	z.index = len(*s)
	*s = append(*s, z)
}

// Pop implements heap.Interface.
func (s *schedule) Pop() any {
	last := len(*s) - 1
	z := (*s)[last]
	(*s)[last] = nil
	*s = (*s)[:last]
	return z
}
