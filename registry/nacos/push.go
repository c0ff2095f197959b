package nacos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/regbridge/regbridge/registry"
)

const (
	// healthPause is the time between two questions whether the server is there. A server asks by itself after 20 s.
	healthPause = 5 * time.Second
	// reordered bounds how much older a push can be than what it overtook.
	reordered = 5 * time.Second
	// patience is how many requests in a row may go unanswered before a listing counts as failed, and how many listings in
	// a row may fail where there is another server.
	patience = 3
)

// subscription is a service whose changes the server pushes.
type subscription struct {
	key       key
	confirmed bool // by the server's answer; of no concern to pushes

	mu    sync.Mutex // held while the sink is told
	taken int        // how many answers and pushes were handed over
	time  int64      // of the newest of them, by the server's clock
	ended bool
}

// session reads one server over one connection.
type session struct {
	*settings
	sink  registry.Sink
	conn  *connection
	known []key       // the last listing
	turn  int         // of known, to be asked for again
	read  atomic.Bool // everything has been read once

	mu            sync.Mutex // may be taken with a subscription's held, not the reverse
	subscriptions map[key]*subscription
	doubts        map[*subscription]bool // what is known of them may be old
}

// subscribe reads one server of Nacos 2 or 3: it lists the services at each refresh interval, and is told of changes.
func subscribe(ctx context.Context, s *settings, server registry.Server, sink registry.Sink, fresh func()) error {
	a, err := newAPI(s, server)
	if err != nil {
		return err
	}
	defer a.close()
	conn, err := connect(ctx, s, server, a.auth)
	if err != nil {
		return err
	}
	n := &session{settings: s, sink: sink, conn: conn, subscriptions: map[key]*subscription{}, doubts: map[*subscription]bool{}}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { // ends receive
		<-ctx.Done()
		conn.close()
		return ctx.Err()
	})
	g.Go(func() error { return conn.receive(n.push) })
	g.Go(func() error { return n.watch(ctx, fresh) })
	g.Go(func() error { return n.keep(ctx) })
	return fmt.Errorf("nacos at %s: %w", server, g.Wait())
}

// watch asks the server from time to time whether it is there: a frozen one breaks no connection. Only a connection that
// was read and still works then is a success: a server that soon sends its clients away must not be hurried back to.
func (n *session) watch(ctx context.Context, fresh func()) error {
	for registry.Sleep(ctx, n.healthPause) == nil {
		if err := n.conn.check(ctx); err != nil {
			return fmt.Errorf("check the connection: %w", err)
		}
		if n.read.Load() {
			fresh()
		}
	}
	return ctx.Err()
}

// keep holds the subscriptions to what the server lists.
func (n *session) keep(ctx context.Context) error {
	backoff := registry.Backoff{Max: min(n.interval, 10*time.Second)}
	failures := 0 // in a row
	for {
		err := n.refresh(ctx)
		if err == nil {
			n.read.Store(true)
			backoff.Reset()
			failures = 0
			if err = n.repair(ctx, time.Now().Add(registry.Jitter(n.interval))); err == nil {
				continue
			}
		}
		if failures++; !survivable(err) || n.others() && failures >= patience && !final(err) {
			return err
		}
		n.sink.Fail(fmt.Errorf("nacos at %s: %w", n.conn.server, err)) // the connection works, and so do the pushes
		if err := registry.Sleep(ctx, backoff.Next()); err != nil {
			return err
		}
	}
}

// others reports whether there may be another server to read.
func (s *settings) others() bool { return len(s.servers) > 1 || s.directory != nil }

// isAnswer reports whether the error is an answer of a server to which the connection works.
func isAnswer(err error) bool {
	_, ok := errors.AsType[*answerError](err)
	return ok || errors.Is(err, errContradiction) || errors.Is(err, errRefused)
}

// survivable reports whether the connection may work in spite of the error. If it is but silence, watch finds out.
func survivable(err error) bool { return isAnswer(err) || errors.Is(err, context.DeadlineExceeded) }

// refresh lists the services once, subscribes to those that are new, and ends what is gone.
func (n *session) refresh(ctx context.Context) error {
	listed, err := n.list(ctx, n.known, n.conn.services)
	if err != nil {
		return err
	}
	if err := n.subscribeAll(ctx, listed); err != nil {
		return err
	}
	gone := n.endOthers(listed)
	n.known = listed
	ids := make([]string, len(listed))
	for i, k := range listed {
		ids[i] = k.id()
	}
	n.sink.Synced(ids)
	for _, k := range gone {
		if _, err := n.conn.subscribe(ctx, k, false); err != nil && !survivable(err) {
			return fmt.Errorf("unsubscribe from %s: %w", k.id(), err)
		}
	}
	return nil
}

// subscribeAll subscribes to the services of which the server has not confirmed that yet.
func (n *session) subscribeAll(ctx context.Context, listed []key) error {
	limit := rate.NewLimiter(maxSubscribeRate, concurrency)
	var silent atomic.Int32 // requests in a row without an answer
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(concurrency / 2)
	var ended error
	for _, k := range listed {
		sub := n.subscription(k)
		if sub.confirmed {
			continue
		}
		if ended = limit.Wait(gctx); ended != nil {
			break
		}
		g.Go(func() error {
			err := n.ask(gctx, sub)
			if isAnswer(err) || err == nil {
				silent.Store(0)
			}
			if err == nil {
				return nil
			}
			if !survivable(err) || errors.Is(err, errRefused) || !isAnswer(err) && silent.Add(1) >= patience {
				return err
			}
			n.sink.Fail(err, k.id()) // the next listing tries again
			return nil
		})
	}
	return cmp.Or(g.Wait(), ended)
}

// subscription returns the one of a service. It is there before the server is asked: a push can overtake the answer.
func (n *session) subscription(k key) *subscription {
	n.mu.Lock()
	defer n.mu.Unlock()
	sub := n.subscriptions[k]
	if sub == nil {
		sub = &subscription{key: k}
		n.subscriptions[k] = sub
	}
	return sub
}

// endOthers ends all subscriptions but those to the services that are listed, on our side: nothing is told of the others
// any more. It returns the others.
func (n *session) endOthers(listed []key) []key {
	var gone []*subscription
	n.mu.Lock()
	for k, sub := range n.subscriptions {
		if _, ok := slices.BinarySearchFunc(listed, k, key.compare); !ok {
			gone = append(gone, sub)
			delete(n.subscriptions, k)
		}
	}
	n.mu.Unlock()
	keys := make([]key, len(gone))
	for i, sub := range gone {
		sub.mu.Lock()
		sub.ended = true
		sub.mu.Unlock()
		keys[i] = sub.key
	}
	return keys
}

// ask subscribes to a service and takes the answer. Where there is a subscription already, it only answers anew.
func (n *session) ask(ctx context.Context, sub *subscription) error {
	sub.mu.Lock()
	before := sub.taken
	sub.mu.Unlock()
	info, err := n.conn.subscribe(ctx, sub.key, true)
	if err != nil {
		return fmt.Errorf("subscribe to %s: %w", sub.key.id(), err)
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	// A push that came in the meantime is newer, whatever the times are: a server makes pushes from its data, but
	// answers from what it pushed last.
	if sub.taken == before {
		if err := n.put(sub, info); err != nil {
			return fmt.Errorf("subscribe to %s: %w", sub.key.id(), err)
		}
	}
	sub.confirmed = true
	return nil
}

// repair asks for services again until the deadline, one by one: for those in doubt, and by turns for all others, in case
// that the server lost a push or a subscription.
func (n *session) repair(ctx context.Context, deadline time.Time) error {
	for left := n.repairPause + 1; left > n.repairPause; {
		left = time.Until(deadline)
		if err := registry.Sleep(ctx, min(left, n.repairPause)); err != nil {
			return err
		}
		for _, sub := range n.due() {
			err := n.ask(ctx, sub)
			switch {
			case err == nil:
			case !survivable(err), errors.Is(err, errRefused):
				return err
			default:
				n.sink.Fail(err, sub.key.id())
			}
		}
	}
	return nil
}

// due returns the subscriptions to ask for now.
func (n *session) due() []*subscription {
	n.mu.Lock()
	defer n.mu.Unlock()
	var due []*subscription
	if len(n.known) > 0 {
		n.turn++
		n.doubts[n.subscriptions[n.known[n.turn%len(n.known)]]] = true
	}
	for sub := range n.doubts {
		if n.subscriptions[sub.key] == sub { // it has not ended
			due = append(due, sub)
			sub.confirmed = false // if it is not reached, the next listing asks for it
		}
	}
	clear(n.doubts)
	return due
}

// push takes what the server says by itself of a service. bad tells that not all of it could be read. An error means that
// nobody knows of which service a change was missed.
func (n *session) push(info serviceInfo, bad error) error {
	n.mu.Lock()
	sub := n.subscriptions[key{info.GroupName, info.Name}]
	n.mu.Unlock()
	if sub == nil {
		if info.Name == "" {
			return bad
		}
		return nil
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if sub.ended {
		return nil
	}
	behind := time.Duration(sub.time-info.LastRefTime) * time.Millisecond
	if bad == nil && (behind <= 0 || behind >= reordered) {
		bad = n.put(sub, info)
	}
	n.env.Observe("push", 0, bad)
	if bad != nil {
		n.sink.Fail(fmt.Errorf("read a push about %s: %w", sub.key.id(), bad), sub.key.id())
	}
	// An older push is late, or the server's clock was set back.
	if bad != nil || behind > 0 {
		n.mu.Lock()
		n.doubts[sub] = true
		n.mu.Unlock()
	}
	return nil
}

// put hands over what the server said of a service. sub.mu is held.
func (n *session) put(sub *subscription, info serviceInfo) error {
	s, err := convert(sub.key, n.shown, info)
	if err != nil {
		return err
	}
	sub.taken++
	sub.time = info.LastRefTime
	n.sink.Put(s)
	return nil
}
