package nacos

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestPushConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHastyPush,
		Interval: 250 * time.Millisecond,
		Start:    func(t *testing.T) registrytest.Backend { return newPushServer(t).backend() },
	})
}

// newHastyPush is NewGRPC, but listens to the entry's interval also where it is shorter than users may have it, and gives a
// request up soon.
func newHastyPush(e registry.Entry, env registry.Env) (registry.Registry, error) {
	r, err := NewGRPC(e, env)
	if s, ok := r.(*source); ok {
		s.interval = time.Duration(e.RefreshInterval)
		s.timeout = 300 * time.Millisecond
	}
	return r, err
}

// pushRun is a run of the adapter.
type pushRun struct {
	*registrytest.Recorder
	t *testing.T
}

func pushEnv(t *testing.T) registry.Env {
	t.Helper()
	return registry.Env{
		Credentials: func() (registry.Credentials, error) {
			return registry.Credentials{"nacosUsername": pushUser, "nacosPassword": pushPassword}, nil
		},
		ClientTLS: func() (*tls.Config, error) { return nil, nil },
		Logger:    slog.New(slog.DiscardHandler),
		Observe:   func(string, time.Duration, error) {},
		Budgets:   &registry.Budgets{},
	}
}

// run reads the servers until the test ends. Unless edit says otherwise they are listed once, and all else is pushed.
func (f *pushServer) run(edit ...func(*settings)) *pushRun {
	f.t.Helper()
	return runPush(f.t, f.entry(), pushEnv(f.t), edit...)
}

func runPush(t *testing.T, e registry.Entry, env registry.Env, edit ...func(*settings)) *pushRun {
	t.Helper()
	return run(t, NewGRPC, e, env, edit...)
}

func run(t *testing.T, construct constructor, e registry.Entry, env registry.Env, edit ...func(*settings)) *pushRun {
	t.Helper()
	r, err := construct(e, env)
	if err != nil {
		t.Fatal(err)
	}
	s := r.(*source).settings
	s.interval = time.Hour
	for _, change := range edit {
		change(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p, done := &pushRun{registrytest.NewRecorder(ctx), t}, make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx, p); err != nil {
			t.Errorf("Run: %v", err)
		}
		p.Returned()
	}()
	t.Cleanup(func() {
		cancel()
		began := time.Now()
		<-done
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("Run took %v to return", took)
		}
		for _, v := range p.Violations() {
			t.Errorf("against the contract: %s", v)
		}
		told := map[string]bool{}
		for _, e := range p.State().Events {
			for _, id := range e.IDs {
				if e.Kind == registrytest.Synced && !told[id] {
					t.Errorf("a listing named %s, of which nothing had been told yet", id)
				}
				told[id] = true
			}
			if e.Err != nil && strings.Contains(e.Err.Error(), pushPassword) {
				t.Errorf("an error shows the password: %v", e.Err)
			}
		}
	})
	return p
}

func every(interval time.Duration) func(*settings) {
	return func(s *settings) { s.interval = interval }
}

// often lets the pauses of pushing be short.
func often(s *settings) { s.healthPause, s.repairPause = 500*time.Millisecond, 200*time.Millisecond }

func within(timeout time.Duration) func(*settings) {
	return func(s *settings) { s.timeout = timeout }
}

func (p *pushRun) wait(what string, ok func(registrytest.State) bool) registrytest.State {
	p.t.Helper()
	s, got := p.Wait(pushLimit, ok)
	if !got {
		tail := s.Events[max(0, len(s.Events)-12):]
		p.t.Fatalf("waited in vain for %s; gap %v, gaps %v, %d services, the last events: %v", what, s.Gap, s.Gaps, len(s.Services), tail)
	}
	return s
}

func pushID(name string) string { return pushGroup + "@@" + name }

func at(ip string) registry.Instance { return registry.Instance{Address: ip, Port: 8080, Weight: 1} }

// shows says that everything is loaded, and the service has these addresses.
func shows(name string, ips ...string) func(registrytest.State) bool {
	return func(s registrytest.State) bool {
		service, ok := s.Services[pushID(name)]
		var got []string
		for _, i := range service.Instances {
			got = append(got, i.Address)
		}
		return ok && s.Loaded && s.Gap == nil && s.Gaps[pushID(name)] == nil && slices.Equal(got, ips)
	}
}

// lists says that everything is loaded, and the services are these.
func lists(names ...string) func(registrytest.State) bool {
	slices.Sort(names)
	return func(s registrytest.State) bool {
		var got []string
		for id := range maps.Keys(s.Services) {
			got = append(got, strings.TrimPrefix(id, pushGroup+"@@"))
		}
		slices.Sort(got)
		return s.Loaded && s.Gap == nil && slices.Equal(got, names)
	}
}

// failedSince says that after n events a Fail came whose text has all the words: of the registry if name is empty.
func failedSince(n int, name string, words ...string) func(registrytest.State) bool {
	return func(s registrytest.State) bool {
		return slices.ContainsFunc(s.Events[n:], func(e registrytest.Event) bool {
			if e.Kind != registrytest.Fail || (name == "") != (len(e.IDs) == 0) || name != "" && e.IDs[0] != pushID(name) {
				return false
			}
			return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(e.Err.Error(), w) })
		})
	}
}

// syncedSince says that after n events there was a listing.
func syncedSince(n int) func(registrytest.State) bool {
	return func(s registrytest.State) bool { return countSince(s, n, registrytest.Synced) > 0 && s.Gap == nil }
}

func countSince(s registrytest.State, n int, kind registrytest.Kind) int {
	count := 0
	for _, e := range s.Events[n:] {
		if e.Kind == kind {
			count++
		}
	}
	return count
}

// calm fails the test if anything was changed after the first n events.
func (p *pushRun) calm(n int) {
	p.t.Helper()
	for _, e := range p.State().Events[n:] {
		if e.Changed || len(e.Removed) > 0 {
			p.t.Errorf("%s %v changed what is known", e.Kind, e.IDs)
		}
	}
}

// noGap fails the test if the adapter reported a gap of the registry.
func (p *pushRun) noGap() {
	p.t.Helper()
	for _, e := range p.State().Events {
		if e.Kind == registrytest.Fail && len(e.IDs) == 0 {
			p.t.Errorf("a gap: %v", e.Err)
		}
	}
}

func TestPushedChanges(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run()
	p.wait("the first listing", shows("order", "10.0.0.1"))
	f.set("order", at("10.0.0.1"), at("10.0.0.2"))
	p.wait("an added instance", shows("order", "10.0.0.1", "10.0.0.2"))
	changed := registry.Instance{Address: "10.0.0.2", Port: 9090, Weight: 0.5, Unhealthy: true, Metadata: labels.FromMap(map[string]string{"v": "2"})}
	f.set("order", at("10.0.0.1"), changed)
	p.wait("a changed instance", func(s registrytest.State) bool {
		got := s.Services[pushID("order")].Instances
		if len(got) != 2 {
			return false
		}
		i := got[1]
		i.Reason = ""
		return i == changed
	})
	off := at("10.0.0.1")
	off.Disabled = true
	f.set("order", off, at("10.0.0.2"))
	p.wait("a disabled instance", shows("order", "10.0.0.2"))
	f.set("order")
	s := p.wait("the last instance gone", shows("order"))
	p.noGap()
	if n := countSince(s, 0, registrytest.Synced); n != 1 {
		t.Errorf("%d listings; the changes should have been pushed", n)
	}
	f.await("all pushes acknowledged", func() bool { return f.acknowledged() == f.pushed })
}

// TestPushOvertakesAnswer lets a change be pushed after the answer to the subscription was made, and before it is sent.
// The times tell nothing: a server makes answers from what it pushed last, and its clock may be set in between.
func TestPushOvertakesAnswer(t *testing.T) {
	t.Parallel()
	for _, clock := range []time.Duration{0, -time.Second, -time.Hour, time.Hour} {
		f := newPushServer(t)
		f.set("order", at("10.0.0.1"))
		arrived := make(chan *pushRun, 1)
		var once sync.Once
		f.before = func(r pushRequest) {
			if r.typ != "SubscribeServiceRequest" {
				return
			}
			once.Do(func() {
				p := <-arrived
				f.edit(func() { f.skew = clock }) // of the push
				f.set("order", at("10.0.0.2"))
				if !f.sees(func() bool { return f.acknowledged() == 2 }) {
					t.Error("no acknowledgement")
				}
				p.Wait(200*time.Millisecond, func(s registrytest.State) bool { return countSince(s, 0, registrytest.Put) == 2 })
			})
		}
		p := f.run(often)
		arrived <- p
		s := p.wait("the listing", shows("order", "10.0.0.2"))
		changes := 0
		for _, e := range s.Events {
			if e.Changed {
				changes++
			}
		}
		if changes > 2 {
			t.Errorf("clock %v: after the push there was a change to something older", clock)
		}
		p.noGap()
	}
}

// TestPushesOutOfOrder sends an older push after a newer one.
func TestPushesOutOfOrder(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(often)
	p.wait("the first listing", shows("order", "10.0.0.1"))
	k := key{pushGroup, "order"}
	f.edit(func() {
		now := time.Now().Add(time.Second)
		f.services[k] = []registry.Instance{at("10.0.0.3")}
		f.pushInfo(k, f.infoOf(k, now, at("10.0.0.3")))
		f.pushInfo(k, f.infoOf(k, now.Add(-time.Millisecond), at("10.0.0.2")))
		f.pushInfo(k, f.infoOf(k, now.Add(-4*time.Second), at("10.0.0.1")))
	})
	p.wait("the newest push", shows("order", "10.0.0.3"))
	n := f.count("SubscribeServiceRequest", "order")
	f.await("a question what is true", func() bool { return f.asked("SubscribeServiceRequest", "order") > n })
	changes := 0
	for _, e := range p.wait("the answer", shows("order", "10.0.0.3")).Events {
		if e.Changed {
			changes++
		}
	}
	if changes != 2 {
		t.Errorf("%d changes; there were an instance and another one", changes)
	}
}

// TestClockSetBack sets the server's clock back, by much and by so little that it looks like a push out of order.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	for _, back := range []time.Duration{time.Hour, 3 * time.Second} {
		f := newPushServer(t)
		f.set("order", at("10.0.0.1"))
		for i := range 30 { // so that its turn to be asked for is a while off
			f.set(fmt.Sprintf("zzz-%d", i), at("10.0.1.1"))
		}
		p := f.run(func(s *settings) { s.repairPause = 400 * time.Millisecond })
		p.wait("the first listing", shows("order", "10.0.0.1"))
		f.edit(func() { f.skew = -back })
		f.set("order", at("10.0.0.2"))
		began := time.Now()
		p.wait("a change by the new clock", shows("order", "10.0.0.2"))
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("clock set back by %v: the change took %v", back, took)
		}
		f.set("order", at("10.0.0.3"))
		p.wait("the next change", shows("order", "10.0.0.3"))
		p.noGap()
	}
}

// TestClockSetBackWhileRefused leaves the pushes alone to tell.
func TestClockSetBackWhileRefused(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(often)
	p.wait("the first listing", shows("order", "10.0.0.1"))
	f.backend().Refuse(true)
	p.wait("a refusal", failedSince(0, "", "refuses our credentials"))
	f.edit(func() { f.skew = -time.Hour })
	f.set("order", at("10.0.0.2"))
	p.wait("a push by the new clock", func(s registrytest.State) bool { return s.Services[pushID("order")].Instances[0].Address == "10.0.0.2" })
}

// TestFailoverToServerBehind moves to a server whose clock is an hour behind.
func TestFailoverToServerBehind(t *testing.T) {
	t.Parallel()
	a, b := newPushServer(t), newPushServer(t)
	b.edit(func() { b.skew = -time.Hour })
	a.set("order", at("10.0.0.1"))
	b.set("order", at("10.0.0.1"))
	e := a.entry()
	e.Domain = fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", a.port, b.port)
	p := runPush(t, e, pushEnv(t))
	s := p.wait("the first listing", shows("order", "10.0.0.1"))
	used, other := a, b
	if a.count("ServerCheckRequest", "") == 0 {
		used, other = b, a
		a.edit(func() { a.skew = -2 * time.Hour })
	}
	used.stop()
	n := len(s.Events)
	p.wait("a gap", failedSince(n, ""))
	p.wait("the other server", syncedSince(n))
	p.calm(n)
	other.set("order", at("10.0.0.2"))
	p.wait("a change at the other server", shows("order", "10.0.0.2"))
}

// TestLostPushIsRepaired loses a push, then a subscription.
func TestLostPushIsRepaired(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Hour, 180 * time.Millisecond} {
		t.Run(interval.String(), func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			f.set("order", at("10.0.0.1"))
			f.set("user", at("10.0.1.1"))
			p := f.run(every(interval), often)
			p.wait("the first listing", lists("order", "user"))
			k := key{pushGroup, "order"}
			f.edit(func() {
				f.services[k] = []registry.Instance{at("10.0.0.2")}
				f.services[key{pushGroup, "user"}] = []registry.Instance{at("10.0.1.2")}
			})
			p.wait("the repair", shows("order", "10.0.0.2"))
			p.wait("the other's repair", shows("user", "10.0.1.2"))
			f.edit(func() {
				for _, c := range f.clients {
					delete(c.subscribed, k)
				}
			})
			f.await("the subscription made again", func() bool { return f.subscribers("order") == 1 })
			f.set("order", at("10.0.0.3"))
			p.wait("a push again", shows("order", "10.0.0.3"))
			p.noGap()
		})
	}
}

// TestServiceThatLeft ends the subscription to a service that is no longer listed, and believes no push about it.
func TestServiceThatLeft(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	f.set("user", at("10.0.1.1"))
	p := f.run(every(200 * time.Millisecond))
	p.wait("the first listing", lists("order", "user"))
	// The server says that a service is there that it does not list, and goes on to do so.
	f.edit(func() {
		f.before = func(r pushRequest) {
			if r.key.name == "order" && !r.subscribe {
				f.edit(func() {
					for _, c := range f.clients {
						f.pushTo(c, f.infoOf(r.key, time.Now(), at("10.0.0.7")))
						f.pushTo(c, f.infoOf(key{pushGroup, "never-seen"}, time.Now(), at("10.0.0.8")))
						f.pushTo(c, `{"name":"order","groupName":"DEFAULT_GROUP","hosts":[{"ip":"10.0.0.9","port":"none"}]}`)
					}
				})
			}
		}
	})
	f.remove("order")
	s := p.wait("the listing without it", lists("user"))
	f.await("no subscriber", func() bool { return f.subscribers("order") == 0 && f.subscribers("user") == 1 })
	n := len(s.Events)
	f.set("user", at("10.0.1.2"))
	p.wait("a later push", shows("user", "10.0.1.2"))
	for _, e := range p.State().Events[n:] {
		if e.Kind != registrytest.Synced && e.IDs[0] != pushID("user") {
			t.Errorf("%s %v after it had left", e.Kind, e.IDs)
		}
	}
	p.noGap()
	f.edit(func() { f.before = nil })
	f.set("order", at("10.0.0.2"))
	p.wait("the service again", shows("order", "10.0.0.2"))
}

// TestServiceThatLeftAfterFailedListing subscribes to a service while another one is refused, and never lists it.
func TestServiceThatLeftAfterFailedListing(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("zzz", at("10.0.1.1"))
	p := f.run(every(200 * time.Millisecond))
	p.wait("the first listing", lists("zzz"))
	k := key{pushGroup, "brief"}
	f.edit(func() {
		f.services[k] = []registry.Instance{at("10.0.0.1")}
		f.services[key{pushGroup, "refused"}] = nil
		var once sync.Once
		f.answer = func(r pushRequest) (string, error) {
			if r.key.name == "refused" {
				once.Do(func() {
					if !f.sees(func() bool { return f.subscribers("brief") == 1 }) {
						t.Error("no subscription to the other service")
					}
				})
				return errorAnswer(403, "authorization failed!"), nil
			}
			return "", nil
		}
	})
	s := p.wait("a refusal", failedSince(0, "", "authorization failed!"))
	f.edit(func() {
		delete(f.services, k)
		delete(f.services, key{pushGroup, "refused"})
	})
	s = p.wait("a listing", func(now registrytest.State) bool { return syncedSince(len(s.Events))(now) && lists("zzz")(now) })
	f.await("no subscriber", func() bool { return f.subscribers("brief") == 0 })
	f.edit(func() {
		for _, c := range f.clients {
			f.pushTo(c, f.infoOf(k, time.Now(), at("10.0.0.9")))
		}
	})
	f.set("zzz", at("10.0.1.2"))
	p.wait("a later push", shows("zzz", "10.0.1.2"))
	for _, e := range p.State().Events[len(s.Events):] {
		if e.Kind == registrytest.Put && e.IDs[0] == pushID("brief") {
			t.Error("a service was told of that had left the list")
		}
	}
}

// TestRefusedMidway refuses one of many first subscriptions, which ends the others' too.
func TestRefusedMidway(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	var names []string
	for i := range 100 {
		names = append(names, fmt.Sprintf("s-%02d", i))
		f.set(names[i], at("10.0.0.1"))
	}
	refuse := true
	f.answer = func(r pushRequest) (string, error) {
		if r.key.name == "s-20" && refuse {
			return errorAnswer(403, "authorization failed!"), nil
		}
		return "", nil
	}
	p := f.run(every(200 * time.Millisecond))
	s := p.wait("a refusal", failedSince(0, "", "s-20", "authorization failed!"))
	if s.Synced {
		t.Error("a listing was reported although not all of it could be read")
	}
	f.edit(func() {
		f.answer = nil
	})
	p.wait("everything", lists(names...))
}

// TestContextWithDeadline has a context that ends before everything can be read, and tells so beforehand.
func TestContextWithDeadline(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.edit(func() {
		for i := range 5000 {
			f.services[key{pushGroup, fmt.Sprintf("s-%d", i)}] = []registry.Instance{at("10.0.0.1")}
		}
	})
	r, err := NewGRPC(f.entry(), pushEnv(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	sink := &tally{puts: map[string]string{}, listed: make(chan map[string]string, 100), failure: make(chan error, 100)}
	if err := r.Run(ctx, sink); err != nil {
		t.Error(err)
	}
	select {
	case puts := <-sink.listed:
		t.Errorf("a listing of 5,000 services was reported after %d of them were read", len(puts))
	default:
	}
}

// TestServiceRefusedAlone refuses one service, or lets its request go unanswered, or cut off, or answers it with rubbish.
func TestServiceRefusedAlone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		answer string
		err    error
		words  string
	}{
		"refused":   {errorAnswer(400, "Param 'serviceName' is illegal"), nil, "Param 'serviceName' is illegal"},
		"silent":    {"", errHang, "no answer within"},
		"too long":  {"", errTooLong, "larger than max"},
		"type":      {`{"resultCode":200,"success":true,"serviceInfo":{"name":"bad","hosts":[{"port":"x"}]}}`, nil, "port"},
		"no JSON":   {`{"resultCode":200,"success":true,"serv`, nil, "unexpected end"},
		"no hosts":  {`{"resultCode":200,"success":true,"serviceInfo":{"name":"bad","hosts":null}}`, nil, "without instances"},
		"null":      {`null`, nil, ""},
		"something": {`{"hello":1}`, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			for _, n := range []string{"a", "bad", "c", "d", "e"} {
				f.set(n, at("10.0.0.1"))
			}
			f.answer = func(r pushRequest) (string, error) {
				if r.key.name == "bad" && r.typ == "SubscribeServiceRequest" {
					return c.answer, c.err
				}
				return "", nil
			}
			p := f.run(every(300*time.Millisecond), within(400*time.Millisecond))
			p.wait("the others", func(s registrytest.State) bool {
				return s.Loaded && s.Gap == nil && len(s.Services) == 4 && failedSince(0, "bad", c.words)(s)
			})
			f.set("d", at("10.0.0.2"))
			p.wait("a push", shows("d", "10.0.0.2"))
			p.noGap()
			f.edit(func() { f.answer = nil })
			p.wait("the service", shows("bad", "10.0.0.1"))
			p.noGap()
			if n := f.count("ConnectionSetupRequest", ""); n != 1 {
				t.Errorf("%d connections", n)
			}
		})
	}
}

// TestMalformedListing answers with lists that are none. Nothing may go for that.
func TestMalformedListing(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"no count":       `{"resultCode":200,"errorCode":0,"serviceNames":[],"success":true}`,
		"nothing":        `{"resultCode":200,"errorCode":0,"success":true}`,
		"not so many":    `{"resultCode":200,"errorCode":0,"count":2,"serviceNames":["order"],"success":true}`,
		"twice the same": `{"resultCode":200,"errorCode":0,"count":2,"serviceNames":["order","order"],"success":true}`,
		"names":          `{"resultCode":200,"errorCode":0,"count":0,"serviceNames":"","success":true}`,
		"no success":     `{"resultCode":200,"errorCode":0,"count":0,"serviceNames":[]}`,
		"null":           `null`,
		"no JSON":        `<html></html>`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			f.set("order", at("10.0.0.1"))
			f.set("user", at("10.0.1.1"))
			p := f.run(every(100 * time.Millisecond))
			s := p.wait("the first listing", lists("order", "user"))
			f.edit(func() {
				f.answer = func(r pushRequest) (string, error) {
					if r.typ == "ServiceListRequest" {
						return answer, nil
					}
					return "", nil
				}
			})
			n := len(s.Events)
			p.wait("a gap", failedSince(n, "", "list the services"))
			p.calm(n)
			f.edit(func() { f.answer = nil })
			p.wait("a listing", func(s registrytest.State) bool { return s.Gap == nil && lists("order", "user")(s) })
			p.calm(n)
		})
	}
}

// TestMalformedPush pushes what is no good.
func TestMalformedPush(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		body string // of the push
		gap  bool   // of the registry
	}{
		"type":             {`{"requestId":"1","serviceInfo":{"name":"order","groupName":"DEFAULT_GROUP","hosts":[{"ip":"10.0.0.9","port":"x"}],"lastRefTime":1}}`, false},
		"no hosts":         {`{"requestId":"1","serviceInfo":{"name":"order","groupName":"DEFAULT_GROUP"}}`, false},
		"type of the rest": {`{"requestId":"1","serviceInfo":{"hosts":{},"lastRefTime":"x","name":"order","groupName":"DEFAULT_GROUP"}}`, false},
		"no name":          {`{"requestId":"1","serviceInfo":{"name":1,"groupName":"DEFAULT_GROUP","hosts":[]}}`, true},
		"no service":       {`{"requestId":"1"}`, true},
		"no JSON":          {`{"requestId":"1","serviceInfo":{"name":"order","groupName":"DEFAULT_GROUP","ho`, true},
		"empty":            {``, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			f.set("order", at("10.0.0.1"))
			f.set("user", at("10.0.1.1"))
			p := f.run(often)
			s := p.wait("the first listing", lists("order", "user"))
			f.edit(func() {
				for _, c2 := range f.clients {
					f.services[key{pushGroup, "order"}] = []registry.Instance{at("10.0.0.2")} // what the push should have told
					f.sendTo(c2, "NotifySubscriberRequest", c.body)
				}
			})
			if c.gap {
				p.wait("a gap", failedSince(len(s.Events), "", "NotifySubscriberRequest"))
			} else {
				p.wait("a gap of the service", failedSince(len(s.Events), "order"))
				p.noGap()
			}
			p.wait("the change all the same", shows("order", "10.0.0.2"))
			f.set("user", at("10.0.1.2"))
			p.wait("a push", shows("user", "10.0.1.2"))
		})
	}
}

// TestUnknownMessages sends what clients of this kind are not sent.
func TestUnknownMessages(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run()
	p.wait("the first listing", lists("order"))
	f.edit(func() {
		for _, c := range f.clients {
			f.sendTo(c, "ConfigChangeNotifyRequest", `{"requestId":"1","dataId":"x"}`)
			f.sendTo(c, "", ``)
			f.sendTo(c, "HealthCheckResponse", `no JSON`)
		}
	})
	f.set("order", at("10.0.0.2"))
	p.wait("a push", shows("order", "10.0.0.2"))
	p.noGap()
}

// TestUnregisteredMidway lets the server forget the connection, of which the stream goes on.
func TestUnregisteredMidway(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(often)
	s := p.wait("the first listing", lists("order"))
	f.edit(func() {
		for _, c := range f.clients { // as a server does that thinks that the client has gone
			c.lost = true
		}
	})
	f.set("order", at("10.0.0.2")) // nobody is told
	n := len(s.Events)
	p.wait("a gap", failedSince(n, "", "301", "unregistered"))
	p.wait("a new connection", syncedSince(n))
	p.wait("the change", shows("order", "10.0.0.2"))
}

func TestConnectReset(t *testing.T) {
	t.Parallel()
	a, b := newPushServer(t), newPushServer(t)
	e := a.entry()
	e.Domain = fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", a.port, b.port)
	a.set("order", at("10.0.0.1"))
	b.set("order", at("10.0.0.1"))
	p := runPush(t, e, pushEnv(t))
	s := p.wait("the first listing", lists("order"))
	used, other := a, b
	if a.count("ServerCheckRequest", "") == 0 {
		used, other = b, a
	}
	used.edit(func() {
		for _, c := range used.clients {
			used.sendTo(c, "ConnectResetRequest", `{"headers":{},"requestId":"1","serverIp":"","serverPort":"","module":"internal"}`)
		}
	})
	n := len(s.Events)
	p.wait("a gap", failedSince(n, "", "sends its clients away"))
	p.wait("the other server", syncedSince(n))
	p.calm(n)
	if used.count("ServerCheckRequest", "") != 1 || other.count("ServerCheckRequest", "") != 1 {
		t.Error("the client did not move to the other server at once")
	}
	used.await("no client", func() bool { return len(used.clients) == 0 })
}

// sender is a sink that has all servers send their clients away as soon as something was listed.
type sender struct {
	*registrytest.Recorder
	servers []*pushServer
}

func (s sender) Synced(ids []string) {
	s.Recorder.Synced(ids)
	for _, f := range s.servers {
		f.edit(func() {
			for _, c := range f.clients {
				f.sendTo(c, "ConnectResetRequest", `{"headers":{},"requestId":"1","module":"internal"}`)
			}
		})
	}
}

// TestServersThatSendAway has servers that answer everything and send their clients away then. It must not come to a race.
func TestServersThatSendAway(t *testing.T) {
	t.Parallel()
	a, b := newPushServer(t), newPushServer(t)
	e := a.entry()
	e.Domain = fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", a.port, b.port)
	a.set("order", at("10.0.0.1"))
	b.set("order", at("10.0.0.1"))
	r, err := NewGRPC(e, pushEnv(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	rec := registrytest.NewRecorder(ctx)
	began := time.Now()
	done := make(chan error)
	go func() { done <- r.Run(ctx, sender{rec, []*pushServer{a, b}}) }()
	// With pauses of 0.5 and 1 s after every other one, less a quarter at most, the 6th comes after more than 1.1 s.
	_, ok := rec.Wait(pushLimit, func(s registrytest.State) bool { return countSince(s, 0, registrytest.Fail) >= 6 })
	if took := time.Since(began); !ok || took < 1100*time.Millisecond {
		t.Errorf("6 connections (%v) within %v", ok, took)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestOnlyWhatLastsIsFresh calls a server good when it has been read, and is there some seconds later.
func TestOnlyWhatLastsIsFresh(t *testing.T) {
	t.Parallel()
	for name, listable := range map[string]bool{"read": true, "not read": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			f.set("order", at("10.0.0.1"))
			if !listable {
				f.backend().Refuse(true)
			}
			r, err := NewGRPC(f.entry(), pushEnv(t))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			rec := registrytest.NewRecorder(ctx)
			began := time.Now()
			fresh := make(chan time.Duration, 10)
			done := make(chan error)
			s := r.(*source).settings
			s.healthPause = 500 * time.Millisecond
			go func() { done <- subscribe(ctx, s, s.servers[0], rec, func() { fresh <- time.Since(began) }) }()
			select {
			case after := <-fresh:
				if !listable || after < s.healthPause {
					t.Errorf("good after %v", after)
				}
			case <-time.After(map[bool]time.Duration{true: pushLimit, false: 1500 * time.Millisecond}[listable]):
				if listable {
					t.Error("never good")
				}
			}
			cancel()
			<-done
		})
	}
}

func TestClientDetection(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run()
	p.wait("the first listing", lists("order"))
	f.detect()
	f.await("an answer", func() bool { return f.detected == 1 })
	f.set("order", at("10.0.0.2"))
	p.wait("a push", shows("order", "10.0.0.2"))
	p.noGap()
}

// TestFrozenServer lets a server freeze between two listings, which breaks no connection.
func TestFrozenServer(t *testing.T) {
	t.Parallel()
	if limit := healthPause + defaultTimeout; limit > 10*time.Second {
		t.Errorf("a frozen server is noticed after %v", limit)
	}
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(often, within(500*time.Millisecond))
	s := p.wait("the first listing", lists("order"))
	hang := f.backend().Hang
	hang(true)
	began := time.Now()
	f.edit(func() { f.services[key{pushGroup, "order"}] = nil })
	n := len(s.Events)
	p.wait("a gap", failedSince(n, ""))
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v; the pause and the timeout are a second together", took)
	}
	p.calm(n)
	f.edit(func() { f.services[key{pushGroup, "order"}] = []registry.Instance{at("10.0.0.1")} })
	hang(false)
	p.wait("the server again", syncedSince(n))
	p.calm(n)
}

// tally is a sink for many services: it only counts.
type tally struct {
	mu      sync.Mutex
	puts    map[string]string // address by id, since the last listing or gap
	listed  chan map[string]string
	failure chan error
}

func (s *tally) Put(v registry.Service) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.puts[v.ID] = v.Instances[0].Address
}

func (s *tally) Delete(string) {}

func (s *tally) Synced([]string) { s.listed <- s.flush() }

func (s *tally) Fail(err error, _ ...string) {
	s.flush()
	s.failure <- err
}

func (s *tally) flush() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	puts := s.puts
	s.puts = map[string]string{}
	return puts
}

// TestReconnectWithManySubscriptions measures at the server what a reconnect costs it.
func TestReconnectWithManySubscriptions(t *testing.T) {
	t.Parallel()
	const services = 5000
	f := newPushServer(t)
	fill := func(ip string) {
		for i := range services {
			f.services[key{pushGroup, fmt.Sprintf("s-%d", i)}] = []registry.Instance{at(ip)}
		}
	}
	f.edit(func() { fill("10.0.0.1") })
	r, err := NewGRPC(f.entry(), pushEnv(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	sink := &tally{puts: map[string]string{}, listed: make(chan map[string]string, 10), failure: make(chan error, 10)}
	done := make(chan error)
	go func() { done <- r.Run(ctx, sink) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	if puts := <-sink.listed; len(puts) != services {
		t.Fatalf("%d services at the first listing", len(puts))
	}
	f.edit(func() {
		f.log = nil
		clear(f.most)
		fill("10.0.0.2") // while we are not there
	})
	f.cut()
	t.Log(<-sink.failure)
	puts := <-sink.listed
	again := 0
	for _, ip := range puts {
		if ip == "10.0.0.2" {
			again++
		}
	}
	if again != services {
		t.Errorf("%d services were read again before the listing was reported", again)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if most := f.most["SubscribeServiceRequest"]; most > concurrency/2 {
		t.Errorf("%d requests at once", most)
	}
	var times []time.Time
	for _, r := range f.log {
		if r.typ == "SubscribeServiceRequest" {
			times = append(times, r.at)
		}
	}
	if len(times) != services {
		t.Errorf("%d subscriptions", len(times))
	}
	// What was held up for a moment, as by a busy machine, comes faster afterwards.
	const span = services / 2
	for i := range max(0, len(times)-span) {
		if rate := span / times[i+span].Sub(times[i]).Seconds(); rate > 1.1*maxSubscribeRate {
			t.Fatalf("%.0f requests per second", rate)
		}
	}
	if lists := f.asked("ServiceListRequest", ""); lists != 1 {
		t.Errorf("%d listings", lists)
	}
}

// TestPasswordChanged changes the password at the running server, which then refuses the old token too.
func TestPasswordChanged(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	f.set("user", at("10.0.1.1"))
	p := f.run(every(300 * time.Millisecond))
	s := p.wait("the first listing", lists("order", "user"))
	refuse := f.backend().Refuse
	refuse(true)
	n := len(s.Events)
	p.wait("a refusal", failedSince(n, "", "refuses our credentials", "403"))
	f.set("order", at("10.0.0.1"), at("10.0.0.2"))
	s = p.wait("a push all the same", func(s registrytest.State) bool { return len(s.Services[pushID("order")].Instances) == 2 })
	if s.Gap == nil {
		t.Error("the gap ended though the listing is refused")
	}
	before := f.count("login", "")
	began := time.Now()
	p.wait("further failures", func(now registrytest.State) bool { return countSince(now, len(s.Events), registrytest.Fail) >= 5 })
	// A wrong password is not tried all the time: once for each listing.
	if logins, most := f.count("login", "")-before, 2*(int(time.Since(began)/(200*time.Millisecond))+2); logins > most {
		t.Errorf("%d logins in %v", logins, time.Since(began))
	}
	refuse(false)
	s = p.wait("the password right again", syncedSince(len(p.State().Events)))
	for _, e := range s.Events[n:] {
		if len(e.Removed) > 0 {
			t.Errorf("%v removed", e.Removed)
		}
	}
	if got := f.count("ConnectionSetupRequest", ""); got != 1 {
		t.Errorf("%d connections", got)
	}
}

// TestRefusedBetweenListings has long intervals: the repair meets the refusal, and no login is tried for each service.
func TestRefusedBetweenListings(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	for i := range 20 {
		f.set(fmt.Sprintf("s-%d", i), at("10.0.0.1"))
	}
	p := f.run(often)
	s := p.wait("the first listing", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == 20 })
	f.backend().Refuse(true)
	n := len(s.Events)
	p.wait("two failures", func(s registrytest.State) bool { return countSince(s, n, registrytest.Fail) >= 2 })
	p.calm(n)
	f.backend().Refuse(false)
	p.wait("a listing", syncedSince(n))
	p.calm(n)
}

// TestNoCredentials has no login for a server that wants one.
func TestNoCredentials(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	env := pushEnv(t)
	env.Credentials = func() (registry.Credentials, error) { return nil, nil }
	e := f.entry()
	e.AuthSecretName = ""
	p := runPush(t, e, env)
	p.wait("two refusals", func(s registrytest.State) bool { return countSince(s, 0, registrytest.Fail) >= 2 })
	if s := failedSince(0, "", "authSecretName"); !s(p.State()) {
		t.Errorf("the error does not name the field: %v", p.State().Gap)
	}
	if s := p.State(); s.Synced || len(s.Services) > 0 {
		t.Error("a refusal was taken for a listing")
	}
	if n := f.count("login", ""); n != 0 {
		t.Errorf("%d logins without a user", n)
	}
}

// TestTokensEndForAllAtOnce lets the tokens of several entries end while they use all that the server's budget allows.
func TestTokensEndForAllAtOnce(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	for i := range 40 {
		f.set(fmt.Sprintf("s-%d", i), at("10.0.0.1"))
	}
	const entries = 3
	full := make(chan struct{})
	f.answer = func(r pushRequest) (string, error) {
		if r.typ != "SubscribeServiceRequest" {
			return "", nil
		}
		select {
		case <-full:
		default:
			if !f.sees(func() bool { return f.most[r.typ] >= concurrency }) {
				t.Error("fewer requests at once than there may be")
			}
			f.edit(func() {
				select {
				case <-full:
				default:
					clear(f.tokens)
					close(full)
				}
			})
		}
		return "", nil
	}
	env := pushEnv(t)
	var runs []*pushRun
	for range entries {
		runs = append(runs, runPush(t, f.entry(), env))
	}
	for _, p := range runs {
		p.wait("everything", func(s registrytest.State) bool { return s.Loaded && s.Gap == nil && len(s.Services) == 40 })
	}
}

// TestServerThatDoesNotList answers everything but the list; there is another server.
func TestServerThatDoesNotList(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{"fails": errorAnswer(500, "disk full"), "silent": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newPushServer(t), newPushServer(t)
			e := a.entry()
			e.Domain = fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", a.port, b.port)
			for _, f := range []*pushServer{a, b} {
				f.set("order", at("10.0.0.1"))
			}
			p := runPush(t, e, pushEnv(t), every(200*time.Millisecond), within(400*time.Millisecond))
			s := p.wait("the first listing", lists("order"))
			used := a
			if a.count("ServerCheckRequest", "") == 0 {
				used = b
			}
			used.edit(func() {
				used.answer = func(r pushRequest) (string, error) {
					switch {
					case r.typ != "ServiceListRequest":
						return "", nil
					case text == "":
						return "", errHang
					default:
						return text, nil
					}
				}
			})
			n := len(s.Events)
			p.wait("a gap", failedSince(n, "", "list the services"))
			p.wait("the other server", syncedSince(n))
			p.calm(n)
		})
	}
}

// TestOneServerThatDoesNotList has nowhere to go: the connection is kept, over which it pushes.
func TestOneServerThatDoesNotList(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(every(200 * time.Millisecond))
	s := p.wait("the first listing", lists("order"))
	f.edit(func() {
		f.answer = func(r pushRequest) (string, error) {
			if r.typ == "ServiceListRequest" {
				return errorAnswer(500, "disk full"), nil
			}
			return "", nil
		}
	})
	p.wait("several failures", func(now registrytest.State) bool {
		return countSince(now, len(s.Events), registrytest.Fail) > 2*patience
	})
	f.set("order", at("10.0.0.2"))
	p.wait("a push", func(s registrytest.State) bool { return s.Services[pushID("order")].Instances[0].Address == "10.0.0.2" })
	f.edit(func() { f.answer = nil })
	p.wait("a listing", shows("order", "10.0.0.2"))
	if n := f.count("ConnectionSetupRequest", ""); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func (f *pushServer) count(typ, name string) (n int) {
	f.edit(func() { n = f.asked(typ, name) })
	return n
}
