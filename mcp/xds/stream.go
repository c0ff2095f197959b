package xds

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	xdscache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	xdsstream "github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	protocolSotw  = "sotw"
	protocolDelta = "delta"
)

// maxTypes is how many type URLs one stream may ask for. istiod asks for 16, Envoy for fewer.
const maxTypes = 256

// maxHeld bounds, in bytes, what a stream makes us remember by naming resources and the versions that it has: 130,000 names
// of a hundred bytes with their versions, 200,000 without. No request may be longer than that. What is refused for certain
// is twice as much, see hold.
const maxHeld = 32 << 20

// nameCost is what remembering a name takes beside its bytes: about what a map needs for an entry.
const nameCost = 64

var (
	errTooSlow = errors.New("the client is too far behind: it has to connect again for the present state")
	errTooMuch = status.Errorf(codes.ResourceExhausted, "the client names more resources than the %d MiB that one stream "+
		"may take: subscribe to fewer, to all with \"*\", or on several streams", maxHeld>>20)
)

// A stream is one client's stream. It is the cache that go-control-plane's server sees, and the server's callbacks: each
// stream has a server of its own, which is cheap and gives watches what the shared interface lacks, the stream's state.
//
// Cache.mu guards what is written after join, but for next.
type stream struct {
	streamInfo
	cache *Cache
	since time.Time

	node    string
	subs    map[string]*subscription // by type URL as the client wrote it
	stalled bool                     // some subscription found the response channel full
	ended   bool                     // it takes no part any more

	held       int           // what its requests named since the last recount, and what that found; see hold
	broken     error         // why its requests cannot be read any more, if that is the client's doing
	complained bool          // its requests were found wrong, and that was logged
	cut        chan struct{} // closed when the stream must go because its client is too slow

	next *message // what Send is called for; belongs to the server's goroutine
}

// streamInfo is what is known of a stream from its beginning.
type streamInfo struct {
	protocol, peer, listener string
	part                     partition
	// typeURL is the type of a single-type service; empty for ADS.
	typeURL string
}

// join makes a stream known to the cache. The caller must call leave.
func (c *Cache) join(info streamInfo) *stream {
	s := &stream{
		streamInfo: info, cache: c, since: time.Now(), subs: map[string]*subscription{}, cut: make(chan struct{}),
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s] = struct{}{}
	c.metrics.clients.WithLabelValues(s.protocol).Inc()
	return s
}

// leave drops all that the cache has of the stream.
func (s *stream) leave() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	s.end()
	for _, sub := range s.subs {
		c.release(sub.col, s.part)
	}
	s.subs = nil
	delete(c.streams, s)
	c.metrics.clients.WithLabelValues(s.protocol).Dec()
}

// receive waits for a request. What is wrong with it is noted, since go-control-plane takes any error as the end of the
// stream.
func (s *stream) receive(r *reader, recvMsg func(any) error) error {
	err := recvMsg(r)
	if err == nil {
		err = r.err
	}
	switch status.Code(err) {
	case codes.ResourceExhausted, codes.InvalidArgument, codes.Internal, codes.Unimplemented: // Unimplemented: compressed
		s.cache.mu.Lock()
		defer s.cache.mu.Unlock()
		s.broken = s.refuse(err)
	}
	return err
}

// failure is why the client's requests ended the stream, nil if they did not.
func (s *stream) failure() error {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.broken
}

// refuse logs why a stream is ended.
func (s *stream) refuse(err error) error {
	s.cache.warn("ending an xDS stream for what its client asks", s.attrs(slog.String("error", status.Convert(err).Message()))...)
	return err
}

// hold counts what a request names and tells whether the stream names too much. Requests repeat names and give them up, so
// only a recount of what is remembered tells. It is made when at least as much came in as may be held, so it costs little
// for each name. Cache.mu is held, by the goroutine that owns the names of all subscriptions.
func (s *stream) hold(named int) error {
	s.held += named
	if s.held <= 2*maxHeld {
		return nil
	}
	s.held = 0
	for _, sub := range s.subs {
		s.held += weigh(maps.Keys(sub.names)) + weigh(maps.Keys(sub.delta.asked)) +
			weigh(maps.Keys(sub.returned)) + weigh(maps.Values(sub.returned))
	}
	if s.held > maxHeld {
		return s.refuse(errTooMuch)
	}
	return nil
}

// weigh is what it takes to remember these names.
func weigh(names iter.Seq[string]) (bytes int) {
	for name := range names {
		bytes += len(name) + nameCost
	}
	return bytes
}

// end stops feeding the stream. Cache.mu is held.
func (s *stream) end() {
	s.ended = true
	for _, sub := range s.subs {
		sub.disarm()
		sub.land()
	}
}

// cutOff ends the stream and tells its handler to return. Cache.mu is held.
func (s *stream) cutOff() {
	if s.ended {
		return
	}
	s.end()
	close(s.cut)
	s.cache.metrics.ended.Inc()
	s.cache.warn("ending an xDS stream: its client is too far behind", s.attrs()...)
}

func (s *stream) attrs(more ...any) []any {
	return append([]any{slog.String("peer", s.peer), slog.String("node", s.node), slog.String("listener", s.listener),
		slog.String("protocol", s.protocol)}, more...)
}

// admit looks at a request before the server does: at its type, its node and its nonce. It returns the type to go by, and
// whether the request counts at all. What does not count is dropped, since an error would end the stream with all its
// other types.
//
// The server by itself ignores a stale nonce only while a response is under way, and then answers one that comes later.
func (s *stream) admit(url, nonce string, node *core.Node) (string, bool) {
	if url == "" {
		url = s.typeURL
	}
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.node == "" {
		s.node = node.GetId()
	}
	sub := s.subs[url]
	switch {
	case url == "":
		s.complain("ignoring xDS requests without a type")
		return "", false
	case len(url) > maxText-utf8.UTFMax: // it may have been cut
		s.complain("ignoring xDS requests whose type is too long")
		return "", false
	case sub == nil && len(s.subs) >= maxTypes:
		s.complain("ignoring further types of an xDS stream: it asks for too many")
		return "", false
	case sub == nil && !s.ended:
		typ := canonicalType(url)
		sub = &subscription{stream: s, url: url, col: c.collection(typ, s.part)}
		sub.col.users++
		s.subs[url] = sub
	case sub == nil:
		return "", false
	case s.protocol == protocolSotw && sub.nonce != "" && nonce != sub.nonce:
		c.metrics.stale.WithLabelValues(c.label(sub.col.typ)).Inc()
		return "", false
	}
	return url, true
}

// complain logs what is wrong with the stream's requests, once.
func (s *stream) complain(what string) {
	if !s.complained {
		s.complained = true
		s.cache.warn(what, s.attrs()...)
	}
}

// reply notes what a request says of the response before: that the client took it, or refused it and why. It tells
// whether a response is still under way.
func (s *subscription) reply(nonce string, refused bool, text string) (waiting bool) {
	if s.flight != nil && (!s.flight.sent || nonce != s.nonce) {
		return true
	}
	if s.flight == nil {
		return false // a request that changes what is subscribed to, or the first one
	}
	s.land()
	if !refused {
		s.acked = s.sent
		return false
	}
	c := s.stream.cache
	c.metrics.nacks.WithLabelValues(c.label(s.col.typ)).Inc()
	if s.nacks == 0 || text != s.refusal {
		c.warn("an xDS client refused a response", s.stream.attrs(slog.String("type", s.url),
			slog.String("version", s.sent), slog.String("error", text))...)
	}
	s.nacks++
	s.refusal, s.refusedAt = text, time.Now()
	return false
}

// CreateWatch implements go-control-plane's cache for state-of-the-world streams.
func (s *stream) CreateWatch(req *discovery.DiscoveryRequest, want xdscache.Subscription, out chan xdscache.Response) (func(), error) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	sub := s.subs[req.GetTypeUrl()]
	if sub == nil || s.ended {
		return nil, nil
	}
	sub.reply(req.GetResponseNonce(), req.GetErrorDetail() != nil, req.GetErrorDetail().GetMessage())
	sub.started = true
	sub.wildcard, sub.names = want.IsWildcard(), want.SubscribedResources()
	if err := s.hold(weigh(slices.Values(req.GetResourceNames()))); err != nil {
		return nil, err
	}
	req.ResourceNames = nil // the request stays with the watch
	sub.sotwRequest, sub.sotwOut = req, out
	sub.col.armed[sub] = struct{}{}
	sub.advance(true)
	return s.closer(sub), nil
}

// CreateDeltaWatch implements go-control-plane's cache for delta streams.
func (s *stream) CreateDeltaWatch(req *discovery.DeltaDiscoveryRequest, want xdscache.Subscription, out chan xdscache.DeltaResponse) (func(), error) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	sub := s.subs[req.GetTypeUrl()]
	if sub == nil || s.ended {
		return nil, nil
	}
	waiting := sub.reply(req.GetResponseNonce(), req.GetErrorDetail() != nil, req.GetErrorDetail().GetMessage())
	d := &sub.delta
	switch {
	case !want.IsWildcard():
		d.all, d.answerEmpty = false, false
	case !sub.wildcard:
		d.all, d.answerEmpty = true, true
	}
	if !sub.started {
		sub.cursor = sub.col.seq
		d.initial = want.ReturnedResources()
	}
	sub.started = true
	sub.wildcard, sub.names, sub.returned = want.IsWildcard(), want.SubscribedResources(), want.ReturnedResources()
	ask := func(name string) {
		if d.asked == nil {
			d.asked = map[string]struct{}{}
		}
		d.asked[name] = struct{}{}
	}
	// A name that is subscribed to must be told, even if it was before: the client may have dropped it meanwhile.
	for _, name := range req.GetResourceNamesSubscribe() {
		if name != "*" {
			ask(name)
		}
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		delete(d.asked, name)
		// Who wants everything and gives up a name beside it must be told how it stands with that name.
		if version, ok := want.ReturnedResources()[name]; ok && version == "" && sub.wildcard {
			ask(name)
		}
	}
	named := weigh(slices.Values(req.GetResourceNamesSubscribe())) + weigh(slices.Values(req.GetResourceNamesUnsubscribe())) +
		weigh(maps.Keys(req.GetInitialResourceVersions())) + weigh(maps.Values(req.GetInitialResourceVersions()))
	if err := s.hold(named); err != nil {
		return nil, err
	}
	// The request stays with the watch.
	req.ResourceNamesSubscribe, req.ResourceNamesUnsubscribe, req.InitialResourceVersions = nil, nil, nil
	if !waiting {
		sub.deltaRequest, sub.deltaOut = req, out
		sub.col.armed[sub] = struct{}{}
		sub.advance(true)
	}
	return s.closer(sub), nil
}

// closer gives the function that closes the watch which was just made.
func (s *stream) closer(sub *subscription) func() {
	return func() {
		s.cache.mu.Lock()
		defer s.cache.mu.Unlock()
		sub.closeWatch()
	}
}

// OnStreamResponse is called before a response goes out, on the goroutine that sends it.
func (s *stream) OnStreamResponse(_ context.Context, _ int64, req *discovery.DiscoveryRequest, resp *discovery.DiscoveryResponse) {
	s.depart(req.GetTypeUrl(), resp.GetNonce())
}

// OnStreamDeltaResponse is called before a response goes out, on the goroutine that sends it.
func (s *stream) OnStreamDeltaResponse(_ int64, req *discovery.DeltaDiscoveryRequest, resp *discovery.DeltaDiscoveryResponse) {
	s.depart(req.GetTypeUrl(), resp.GetNonce())
}

// depart turns the flight of a type into the message to send.
func (s *stream) depart(url, nonce string) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	sub := s.subs[url]
	if sub == nil || sub.flight == nil {
		return // the stream was ended
	}
	f := sub.flight
	f.sent = true
	sub.nonce, sub.sent, sub.sentAt = nonce, f.version, time.Now()
	if f.sotw != nil {
		sub.sotw, sub.cursor = *f.sotw, f.cursor
	}
	s.next = f.encode(nonce)
	sub.returned = nil // go-control-plane puts another map in its place

	label, kind := c.label(sub.col.typ), "part"
	if f.answer.full {
		kind = "full"
		c.metrics.bytes.WithLabelValues(label).Observe(float64(f.answer.bytes))
	}
	c.metrics.responses.WithLabelValues(label, kind).Inc()
	f.answer = nil // a client that never replies keeps the flight

	if s.stalled { // there is room in the channel again
		s.stalled = false
		for _, sub := range s.subs {
			sub.advance(false)
		}
	}
}

// The other callbacks have nothing to do: the stream is known from join to leave, and requests from admit.

// OnStreamOpen does nothing.
func (s *stream) OnStreamOpen(context.Context, int64, string) error { return nil }

// OnStreamClosed does nothing.
func (s *stream) OnStreamClosed(int64, *core.Node) {}

// OnStreamRequest does nothing.
func (s *stream) OnStreamRequest(int64, *discovery.DiscoveryRequest) error { return nil }

// OnDeltaStreamOpen does nothing.
func (s *stream) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }

// OnDeltaStreamClosed does nothing.
func (s *stream) OnDeltaStreamClosed(int64, *core.Node) {}

// OnStreamDeltaRequest does nothing.
func (s *stream) OnStreamDeltaRequest(int64, *discovery.DeltaDiscoveryRequest) error { return nil }

// sotwStream is a gRPC stream whose requests are looked at first, and whose responses are sent encoded.
type sotwStream struct {
	xdsstream.Stream
	*stream
}

func (s sotwStream) Recv() (*discovery.DiscoveryRequest, error) {
	for {
		req := &discovery.DiscoveryRequest{}
		if err := s.receive(newSotwReader(req), s.RecvMsg); err != nil {
			return nil, err
		}
		if url, ok := s.admit(req.GetTypeUrl(), req.GetResponseNonce(), req.GetNode()); ok {
			req.TypeUrl = url
			return req, nil
		}
	}
}

func (s sotwStream) Send(*discovery.DiscoveryResponse) error { return s.send(s.SendMsg) }

// deltaStream is the same for delta.
type deltaStream struct {
	xdsstream.DeltaStream
	*stream
}

func (s deltaStream) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	for {
		req := &discovery.DeltaDiscoveryRequest{}
		if err := s.receive(newDeltaReader(req), s.RecvMsg); err != nil {
			return nil, err
		}
		if url, ok := s.admit(req.GetTypeUrl(), req.GetResponseNonce(), req.GetNode()); ok {
			req.TypeUrl = url
			return req, nil
		}
	}
}

func (s deltaStream) Send(*discovery.DeltaDiscoveryResponse) error {
	return s.send(s.SendMsg)
}

func (s *stream) send(sendMsg func(any) error) error {
	if s.next == nil {
		return errTooSlow
	}
	m := s.next
	s.next = nil
	return sendMsg(m)
}
