package xds

import (
	"container/list"
	"maps"
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	xdscache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
)

// A subscription is what one stream asked of one type URL, and what it was given. Cache.mu guards it.
//
// Its life is a circle: a request arms it; when there is something to tell it makes a response and is disarmed; the
// response is sent; the request that acknowledges or refuses the response arms it again. So one response of a type is
// under way on a stream at any time, and what changes meanwhile is told in the next one, as one change.
type subscription struct {
	stream *stream
	url    string // as the client wrote it
	col    *collection

	// What the client wants. The map is owned by go-control-plane: it changes only between a watch's end and the next
	// watch, and must not be read then.
	wildcard bool
	names    map[string]struct{}
	// returned is another map of go-control-plane, for delta: what the client had at the beginning until the first
	// response, and then the names that it gave up since the last one while it wanted everything.
	returned map[string]string

	// The client was told everything up to step cursor that it wants.
	cursor uint64

	// The open watch; one of the two channels is set while the subscription is armed.
	sotwRequest  *discovery.DiscoveryRequest
	sotwOut      chan xdscache.Response
	deltaRequest *discovery.DeltaDiscoveryRequest
	deltaOut     chan xdscache.DeltaResponse

	sotw  sotwState
	delta deltaState

	// flight is the response under way, from its making to the client's reply.
	flight *flight

	// For Cache.Clients, and to tell replies from stale requests.
	started   bool
	nonce     string // of the last response; empty before the first one
	sent      string // its version
	sentAt    time.Time
	acked     string
	nacks     int
	refusal   string
	refusedAt time.Time
}

// sotwState is the state of a state-of-the-world subscription.
type sotwState struct {
	// told says that the client got a response on this stream, or showed that it has the present state. What follows is
	// what it has up to the subscription's cursor: everything, at a version, or these names.
	told     bool
	wildcard bool
	names    map[string]struct{}
	version  string
}

// deltaState is the state of a delta subscription.
type deltaState struct {
	// all says that everything is to be told, except what the client had at the beginning (with its versions in initial).
	all     bool
	initial map[string]string
	// answerEmpty says that an answer is due even if it is empty: clients wait for the first one.
	answerEmpty bool
	// asked are the names to be told whether or not they changed.
	asked map[string]struct{}
}

// A flight is a response from its making to the client's reply.
type flight struct {
	sub     *subscription
	answer  *answer // nil once it was sent
	version string
	// sotw is what the client will have; nil for delta, whose state moves when the response is made.
	sotw   *sotwState
	cursor uint64
	mark   int64 // Cache.superseded when it was made
	sent   bool
	place  *list.Element // in Cache.flights
}

// launch makes a flight of an answer.
func (s *subscription) launch(f *flight) {
	c := s.stream.cache
	f.sub, f.mark = s, c.superseded
	if f.answer.bytes > 0 { // else it holds nothing; some clients never reply to an answer without resources
		f.place = c.flights.PushBack(f)
	}
	s.flight = f
	s.disarm()
}

// land ends the flight: the client replied, or the response will never be sent.
func (s *subscription) land() {
	if s.flight != nil && s.flight.place != nil {
		s.stream.cache.flights.Remove(s.flight.place)
	}
	s.flight = nil
}

func (s *subscription) disarm() {
	delete(s.col.armed, s)
	s.sotwOut, s.deltaOut, s.sotwRequest, s.deltaRequest = nil, nil, nil, nil
}

// closeWatch is called when go-control-plane gives up the watch, before it changes the names.
func (s *subscription) closeWatch() {
	s.disarm()
	s.names, s.returned = nil, nil
	if s.flight != nil && !s.flight.sent && s.flight.sotw != nil {
		s.land() // a response that go-control-plane had not taken yet is dropped with its watch
	}
}

func (s *subscription) gated() bool { return s.col.gated && !s.stream.cache.open }

// advance answers the open watch if there is something to tell. requested says that it was opened just now.
func (s *subscription) advance(requested bool) {
	switch {
	case s.gated():
	case s.sotwOut != nil:
		s.advanceSotw(requested)
	case s.deltaOut != nil:
		s.advanceDelta()
	}
}

func (s *subscription) advanceSotw(requested bool) {
	var a *answer
	var version string
	if s.wildcard {
		version = s.col.version()
		if !s.wantsAll(version) {
			s.toldSotw(version)
			return
		}
		a = s.col.everything(false)
	} else {
		news := !s.sotw.told || requested && s.hasNewName() || s.hasChange()
		if len(s.names) == 0 || !news {
			s.toldSotw("")
			return
		}
		var items []*item
		items, version = s.col.named(s.names)
		if !s.sotw.told && s.sotwRequest.GetVersionInfo() == version {
			s.toldSotw(version)
			return
		}
		a = &answer{}
		for _, it := range items {
			a.add(it.sotw)
		}
	}
	out, req := s.sotwOut, s.sotwRequest
	s.launch(&flight{answer: a, version: version, cursor: s.col.seq,
		sotw: &sotwState{told: true, wildcard: s.wildcard, names: s.names, version: version}})
	// The channel is this watch's own and has room for its one response.
	out <- &xdscache.PassthroughResponse{
		Request:           req,
		DiscoveryResponse: &discovery.DiscoveryResponse{VersionInfo: version, TypeUrl: s.url},
	}
}

// wantsAll tells whether a client that wants everything has another version than this. One that has just connected says
// what it has from before, from another replica perhaps: versions mean the same everywhere.
func (s *subscription) wantsAll(version string) bool {
	if s.sotw.told {
		return !s.sotw.wildcard || s.sotw.version != version
	}
	return s.sotwRequest.GetVersionInfo() != version
}

// toldSotw notes that the client has all that it wants at the present step.
func (s *subscription) toldSotw(version string) {
	s.sotw = sotwState{told: true, wildcard: s.wildcard, names: s.names, version: version}
	s.cursor = s.col.seq
}

// hasNewName tells whether the client wants a name that it was not told about.
func (s *subscription) hasNewName() bool {
	if s.sotw.wildcard {
		return false
	}
	for name := range s.names {
		if _, ok := s.sotw.names[name]; !ok {
			return true
		}
	}
	return false
}

// hasChange tells whether a wanted name changed since the client was told; yes if removals were forgotten meanwhile.
func (s *subscription) hasChange() bool {
	return s.cursor < s.col.horizon || s.col.touched(s.cursor, s.names)
}

func (s *subscription) advanceDelta() {
	if len(s.deltaOut) == cap(s.deltaOut) {
		// All types of a stream share this channel, which has room for fewer of them than a client may ask for. The
		// stream looks again when it has taken a response out.
		s.stream.stalled = true
		return
	}
	var a *answer
	switch {
	case s.delta.all:
		a = s.deltaAll()
	case s.wildcard && s.cursor < s.col.horizon:
		s.stream.cutOff() // it connects again and says what it has, which makes the answer a plain difference
		return
	case s.wildcard && len(s.delta.asked) == 0:
		a = s.col.since(s.cursor)
	default:
		a = s.deltaNames()
	}
	due := len(a.resources) > 0 || len(a.removed) > 0 || s.delta.answerEmpty
	s.delta, s.cursor = deltaState{}, s.col.seq
	if !due {
		return
	}
	out, req, version := s.deltaOut, s.deltaRequest, s.col.version()
	s.launch(&flight{answer: a, version: version, cursor: s.col.seq})
	out <- &xdscache.DeltaPassthroughResponse{
		DeltaRequest:           req,
		DeltaDiscoveryResponse: &discovery.DeltaDiscoveryResponse{SystemVersionInfo: version, TypeUrl: s.url},
		// go-control-plane notes in this map what a client unsubscribes from by name while it wants everything.
		NextVersionMap: map[string]string{},
	}
}

// deltaAll is the answer for a client that wants everything and has what it had at the beginning.
func (s *subscription) deltaAll() *answer {
	a := s.col.everything(true)
	if len(s.delta.initial) > 0 {
		a = s.col.difference(s.delta.initial)
	}
	absent := slices.DeleteFunc(slices.Sorted(maps.Keys(s.delta.asked)), func(name string) bool {
		_, told := s.delta.initial[name]
		return told || s.col.get(name) != nil
	})
	if len(absent) > 0 {
		a = &answer{resources: a.resources, bytes: a.bytes, full: a.full, removed: append(absent, a.removed...)}
	}
	return a
}

// deltaNames is the answer for names that were asked for, and for changes of names that the client wants.
func (s *subscription) deltaNames() *answer {
	a := s.col.changes(s.cursor, func(name string) bool {
		if _, ok := s.delta.asked[name]; ok {
			return false // told anyway, below
		}
		_, ok := s.names[name]
		return ok || s.wildcard
	})
	if s.cursor < s.col.horizon {
		// Some removals are forgotten. To say once more that a name does not exist does no harm.
		for name := range s.names {
			if _, ok := s.delta.asked[name]; !ok && s.col.nodes[name] == nil {
				a.removed = append(a.removed, name)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.delta.asked)) {
		it := s.col.get(name)
		had, known := s.delta.initial[name]
		switch {
		case it == nil:
			a.removed = append(a.removed, name)
		case !known || had != it.version:
			a.add(it.delta)
		}
	}
	slices.Sort(a.removed)
	return a
}

// encode is the response of the flight as it goes out.
func (f *flight) encode(nonce string) *message {
	return &message{head: encodeHead(f.version, f.sub.url, nonce, f.answer.removed), body: f.answer.resources}
}
