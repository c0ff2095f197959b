package registrytest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// Kind is what an adapter called.
type Kind string

// The kinds of events.
const (
	Put    Kind = "put"
	Delete Kind = "delete"
	Synced Kind = "synced"
	Fail   Kind = "fail"
)

// An Event is one call that an adapter made.
type Event struct {
	Kind Kind
	// IDs are the services that the call names, as given.
	IDs []string
	// Removed are the services that the call took away, and that had instances.
	Removed []string
	// Changed says that a Put stated something new.
	Changed bool
	// Err is the error of a Fail.
	Err error
	At  time.Time
}

// State is what an adapter's calls amount to, without a guard.
type State struct {
	// Services are what is known, by id. The values must not be written.
	Services map[string]registry.Service
	// Synced says that there was a listing.
	Synced bool
	// Loaded says that each service of the last listing was Put, or failed by name.
	Loaded bool
	// Gap is the error of the last Fail of the whole registry, nil from the next Synced on.
	Gap error
	// Gaps are the errors of single services, each until its next Put.
	Gaps map[string]error
	// Events are all calls so far. The slice must not be written.
	Events []Event
}

// Recorder is a Sink that remembers. It is safe for concurrent use. Like the real sink it does nothing once the context
// of its Run is done; such calls are counted.
type Recorder struct {
	ctx context.Context

	mu         sync.Mutex
	changed    chan struct{} // closed and replaced at each event
	services   map[string]registry.Service
	prints     map[string]string // of services, as they were when Put
	listed     []string          // the last listing
	synced     bool
	gap        error
	gaps       map[string]error
	failed     map[string]bool
	events     []Event
	returned   bool
	late       int
	violations []string
}

// NewRecorder returns a Recorder for one Run with the context ctx.
func NewRecorder(ctx context.Context) *Recorder {
	return &Recorder{
		ctx:      ctx,
		changed:  make(chan struct{}),
		services: map[string]registry.Service{},
		prints:   map[string]string{},
		gaps:     map[string]error{},
		failed:   map[string]bool{},
	}
}

// accept locks the recorder and reports whether the call counts. It is followed by done in any case.
func (r *Recorder) accept(call string) bool {
	r.mu.Lock()
	if r.returned {
		r.violations = append(r.violations, call+" after Run had returned")
		return false
	}
	if r.ctx.Err() != nil {
		r.late++
		return false
	}
	return true
}

func (r *Recorder) done(e *Event) {
	defer r.mu.Unlock()
	if e == nil {
		return
	}
	e.At = time.Now()
	r.events = append(r.events, *e)
	close(r.changed)
	r.changed = make(chan struct{})
}

// Put implements registry.Sink.
func (r *Recorder) Put(s registry.Service) {
	var e *Event
	if r.accept("Put " + s.ID) {
		if s.ID == "" {
			r.violations = append(r.violations, "Put without an id")
		}
		if s.Host == "" {
			r.violations = append(r.violations, fmt.Sprintf("Put %s without a host", s.ID))
		}
		p := fingerprint(s)
		e = &Event{Kind: Put, IDs: []string{s.ID}, Changed: r.prints[s.ID] != p}
		r.services[s.ID], r.prints[s.ID] = s, p
		delete(r.gaps, s.ID)
	}
	r.done(e)
}

// Delete implements registry.Sink.
func (r *Recorder) Delete(id string) {
	var e *Event
	if r.accept("Delete " + id) {
		e = &Event{Kind: Delete, IDs: []string{id}, Removed: r.remove(id)}
		r.listed = slices.DeleteFunc(slices.Clone(r.listed), func(s string) bool { return s == id })
	}
	r.done(e)
}

func (r *Recorder) remove(id string) []string {
	s, ok := r.services[id]
	if !ok {
		return nil
	}
	r.verify(s)
	delete(r.services, id)
	delete(r.prints, id)
	delete(r.gaps, id)
	delete(r.failed, id)
	if len(s.Instances) == 0 {
		return nil
	}
	return []string{id}
}

// Synced implements registry.Sink.
func (r *Recorder) Synced(ids []string) {
	var e *Event
	if r.accept("Synced") {
		e = &Event{Kind: Synced, IDs: slices.Clone(ids)}
		known := map[string]bool{}
		for _, id := range ids {
			if known[id] {
				r.violations = append(r.violations, "Synced names "+id+" twice")
			}
			known[id] = true
		}
		for _, id := range slices.Sorted(maps.Keys(r.services)) {
			if !known[id] {
				e.Removed = append(e.Removed, r.remove(id)...)
			}
		}
		r.listed, r.synced, r.gap = e.IDs, true, nil
	}
	r.done(e)
}

// Fail implements registry.Sink.
func (r *Recorder) Fail(err error, ids ...string) {
	var e *Event
	if r.accept("Fail") {
		if err == nil {
			r.violations = append(r.violations, "Fail without an error")
			err = fmt.Errorf("Fail was called without an error")
		}
		e = &Event{Kind: Fail, IDs: slices.Clone(ids), Err: err}
		if len(ids) == 0 {
			r.gap = err
		}
		for _, id := range ids {
			r.gaps[id], r.failed[id] = err, true
		}
	}
	r.done(e)
}

// verify notes a service that was written after it had been handed over.
func (r *Recorder) verify(s registry.Service) {
	if fingerprint(s) != r.prints[s.ID] {
		r.violations = append(r.violations, fmt.Sprintf("service %s was written after it was Put", s.ID))
	}
}

// Returned tells the recorder that Run has returned: every call from now on breaks the contract.
func (r *Recorder) Returned() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.returned = true
	for _, s := range r.services {
		r.verify(s)
	}
}

// Violations are the breaches of the contract so far.
func (r *Recorder) Violations() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.violations)
}

// Late is the number of calls that came after Run's context had ended. They are allowed, and do nothing.
func (r *Recorder) Late() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.late
}

// State returns what the calls so far amount to.
func (r *Recorder) State() State {
	s, _ := r.state()
	return s
}

func (r *Recorder) state() (State, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	loaded := r.synced
	for _, id := range r.listed {
		_, ok := r.services[id]
		loaded = loaded && (ok || r.failed[id])
	}
	return State{
		Services: maps.Clone(r.services),
		Synced:   r.synced,
		Loaded:   loaded,
		Gap:      r.gap,
		Gaps:     maps.Clone(r.gaps),
		Events:   slices.Clip(r.events),
	}, r.changed
}

// Wait returns the first state, from now on, for which ok is true; or, once limit is over, the last state and false.
func (r *Recorder) Wait(limit time.Duration, ok func(State) bool) (State, bool) {
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	for {
		s, changed := r.state()
		if ok(s) {
			return s, true
		}
		select {
		case <-changed:
		case <-timeout.C:
			return s, false
		}
	}
}

// fingerprint gives all of a service in a comparable form.
func fingerprint(s registry.Service) string {
	tls := ""
	if s.TLS != nil {
		tls = s.TLS.SNI
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%q %q %d %v %q", s.ID, s.Host, s.Port, s.TLS != nil, tls)
	for _, i := range s.Instances {
		fmt.Fprintf(&out, "\n%q %d %q %v %v %v %q %v %q", i.Address, i.Port, i.Protocol, i.Weight, i.Unhealthy, i.Disabled,
			i.Reason, i.Locality, i.Metadata.Encoded())
	}
	return out.String()
}
