package xds

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus/testutil"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Clients that ask for everything and take nothing share what is held for them, and delay nobody.
func TestManyClientsThatNeverRead(t *testing.T) {
	const clients, n, size = 200, 200, 100_000
	cache := newTestCache(t, Options{MaxStale: n * size / 2})
	var all []Resource
	for i := range n {
		all = append(all, Resource{Type: []string{seKind, cds}[i%2], Name: fmt.Sprint(i), Version: "1", Body: body(strings.Repeat("x", size))})
	}
	cache.Apply(all, nil)
	cache.Open()
	s, err := NewServer(cache, ServerOptions{Address: "127.0.0.1:0", DrainTimeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(cancel)
	base, _ := s.Addresses()
	good := deltaClient(t, base.String())
	good.subscribe(seV1)
	good.ack(good.next())

	before := heap()
	for i := range clients {
		stuck(t, base.String(), []string{protocolSotw, protocolDelta}[i%2], seV1, cds, "networking.istio.io/v1beta1/ServiceEntry")
	}
	eventually(t, "all clients were sent something", func() bool {
		stuck := 0
		for _, cl := range cache.Clients() {
			if len(cl.Types) > 1 {
				stuck++
			}
		}
		return stuck == clients
	})
	// One copy for each client would be 4 GB. Most of this are the buffers of both ends of the connections.
	if kept := heap() - before; kept > clients*mib {
		t.Errorf("%d MiB are held for %d clients", kept/mib, clients)
	}
	change := func(i int) {
		t.Helper()
		r := Resource{Type: seKind, Name: fmt.Sprint(i % n / 2 * 2), Version: fmt.Sprint("v", i), Body: body(strings.Repeat("y", size))}
		cache.Apply([]Resource{r}, nil)
		good.ack(good.expectDelta(seV1, []string{r.Name}, nil))
	}
	for i := range 20 {
		change(i)
	}
	if got := len(cache.Clients()); got != clients+1 {
		t.Errorf("%d clients are left before too much is held for them", got)
	}
	for i := range n {
		change(i)
	}
	eventually(t, "those who never read are gone", func() bool { return len(cache.Clients()) == 1 })
	for range clients {
		stuck(t, base.String(), protocolDelta, cds, drV1)
	}
	good.quiet()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(wait):
		t.Fatal("Run did not return")
	}
	checkIdle(t, cache)
}

// Whoever connects and says nothing must not hold up the stop.
func TestRunDoesNotWaitForSilentConnections(t *testing.T) {
	dir := t.TempDir()
	secured := TLS{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	cert, key := newAuthority(t, "ca").pair("server.test")
	write(t, secured.CertFile, cert)
	write(t, secured.KeyFile, key)
	for name, opts := range map[string]TLS{"plain": {}, "TLS": secured} {
		t.Run(name, func(t *testing.T) {
			s, err := NewServer(openCache(t), ServerOptions{Address: "127.0.0.1:0", TLS: opts, DrainTimeout: 100 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Listen(); err != nil {
				t.Fatal(err)
			}
			base, _ := s.Addresses()
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			for range 3 {
				silent, err := net.Dial("tcp", base.String())
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = silent.Close() }()
			}
			// The server accepts in order: once this one is served, the silent ones are waited for.
			if opts == (TLS{}) {
				c := sotwClient(t, base.String())
				c.subscribe(drV1)
				c.expect(drV1)
			} else if _, err := served(t, base.String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			if took := time.Since(began); took > 10*time.Second { // gRPC waits for 20
				t.Errorf("the stop took %v", took)
			}
		})
	}
}

func TestLongHeadersAreRefused(t *testing.T) {
	conn := dial(t, serve(t, openCache(t, se("a", "1"))))
	c := newClient(t, conn, protocolSotw)
	c.subscribe(seV1)
	c.ack(c.expect(seV1, "1"))
	ads := discovery.NewAggregatedDiscoveryServiceClient(conn)
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "x", strings.Repeat("x", 100*kib)))
	defer cancel()
	s, err := ads.StreamAggregatedResources(ctx)
	if err == nil {
		_, err = s.Recv()
	}
	if err == nil || !strings.Contains(err.Error(), "header list size") {
		t.Errorf("error %v, want one of the headers' size", err)
	}
	c.quiet()
}

func TestClientsCannotFloodTheLog(t *testing.T) {
	var log syncBuffer
	conn := dial(t, serve(t, logCache(t, &log, se("a", "1"))))
	began := time.Now()
	for range 300 {
		c := newClient(t, conn, protocolSotw)
		c.sendSotw(&discovery.DiscoveryRequest{})
		c.subscribe(drV1)
		c.expect(drV1)
		c.cancel()
	}
	if n, most := len(lines(&log)), 101+int(time.Since(began).Seconds()); n < 50 || n > most {
		t.Errorf("%d lines were logged of 300 clients, want at most %d", n, most)
	}
}

// What a client repeats is not answered again and again.
func TestFloodsAreNotAnswered(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		for what, refusal := range map[string]*rpc.Status{"ACK": nil, "NACK": {Code: 3, Message: "no"}} {
			for _, names := range [][]string{nil, {"a", "absent"}} {
				t.Run(fmt.Sprint(protocol, " ", what, " ", names), func(t *testing.T) {
					var log syncBuffer
					cache := logCache(t, &log, se("a", "1"), se("b", "1"))
					c := newClient(t, dial(t, serve(t, cache)), protocol)
					c.subscribe(seV1, names...)
					r := c.next()
					sent := testutil.ToFloat64(cache.metrics.responses.WithLabelValues(seKind, "full")) +
						testutil.ToFloat64(cache.metrics.responses.WithLabelValues(seKind, "part"))
					for i := range 2000 {
						nonce := r.nonce
						if i%10 == 9 {
							nonce = fmt.Sprint("unknown", i)
						}
						if c.sotw != nil {
							c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: seV1, ResponseNonce: nonce, ResourceNames: names, ErrorDetail: refusal})
						} else {
							c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResponseNonce: nonce, ErrorDetail: refusal})
						}
					}
					c.quiet()
					if n := testutil.ToFloat64(cache.metrics.responses.WithLabelValues(seKind, "full")) +
						testutil.ToFloat64(cache.metrics.responses.WithLabelValues(seKind, "part")); n != sent {
						t.Errorf("%v responses were sent, want %v", n, sent)
					}
					want := 0
					if refusal != nil {
						want = 1
					}
					if got := clientType(t, cache, seV1); got.NACKs != want || strings.Count(log.String(), "\n") != want {
						t.Errorf("%d refusals counted, want %d; logged:\n%s", got.NACKs, want, log.String())
					}
					cache.Apply([]Resource{se("a", "2")}, nil)
					if r := c.next(); r.err != nil || !slices.Contains(r.values, "2") {
						t.Errorf("after the flood: %+v", r)
					}
				})
			}
		}
	}
}

// An unknown nonce is no reply to the response under way.
func TestDeltaUnknownNonce(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"))
	c := deltaClient(t, serve(t, cache))
	c.subscribe(seV1, "a")
	r := c.expectDelta(seV1, []string{"a"}, nil)
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResponseNonce: "unknown", ErrorDetail: &rpc.Status{Message: "no"},
		ResourceNamesSubscribe: []string{"b"}})
	c.quiet()
	if got := clientType(t, cache, seV1); got.NACKs != 0 || got.Acked != "" {
		t.Errorf("an unknown nonce was taken for a reply: %+v", got)
	}
	c.ack(r)
	c.ack(c.expectDelta(seV1, []string{"b"}, nil)) // it subscribed all the same
	c.quiet()
}

func TestNodeIsTheFirstOne(t *testing.T) {
	cache := openCache(t, se("a", "1"))
	c := sotwClient(t, serve(t, cache))
	c.subscribe(seV1)
	r := c.expect(seV1, "1")
	c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: seV1, VersionInfo: r.version, ResponseNonce: r.nonce, Node: &core.Node{Id: "another"}})
	c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: drV1, Node: &core.Node{Id: "yet another", Cluster: "c"}})
	c.ack(c.expect(drV1))
	c.quiet()
	if got := cache.Clients(); len(got) != 1 || got[0].Node != testNode.GetId() {
		t.Errorf("clients %+v", got)
	}
}

// A first request without names asks for everything. What names mean that come later is another thing in each protocol.
func TestFromEverythingToNames(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"))
	address := serve(t, cache)
	s, d := sotwClient(t, address), deltaClient(t, address)
	s.subscribe(seV1)
	s.ack(s.expect(seV1, "1", "1"), "b", "absent")
	s.quiet() // it has b, and an absent name is absent from what it has
	d.subscribe(seV1)
	d.ack(d.expectDelta(seV1, []string{"a", "b"}, nil))
	d.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: []string{"b", "absent"}})
	d.ack(d.expectDelta(seV1, []string{"b"}, []string{"absent"}))
	cache.Apply([]Resource{se("a", "2")}, nil)
	s.quiet()
	d.ack(d.expectDelta(seV1, []string{"a"}, nil)) // still everything
	d.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"*"}})
	d.quiet()
	cache.Apply([]Resource{se("a", "3")}, nil)
	s.quiet()
	d.quiet()
	cache.Apply([]Resource{se("absent", "1")}, nil)
	s.ack(s.expect(seV1, "1", "1"), "b", "absent")
	d.ack(d.expectDelta(seV1, []string{"absent"}, nil))
}

func TestDeltaUnsubscribeFromWhatIsNotSubscribed(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"))
	address := serve(t, cache)
	named, all := deltaClient(t, address), deltaClient(t, address)
	named.subscribe(seV1, "a")
	named.ack(named.expectDelta(seV1, []string{"a"}, nil))
	all.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"never"}}) // names nothing: everything
	all.ack(all.expectDelta(seV1, []string{"a", "b"}, nil))
	for _, c := range []*testClient{named, all} {
		for range 3 {
			c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"never", "b", "b"}})
		}
		c.quiet()
	}
	named.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"*"}})
	named.quiet()
	cache.Apply([]Resource{se("a", "2"), se("b", "2"), se("never", "1")}, nil)
	named.ack(named.expectDelta(seV1, []string{"a"}, nil))
	all.ack(all.expectDelta(seV1, []string{"a", "b", "never"}, nil))
	named.quiet()
	all.quiet()
}

// Streams that are aborted in any state leave nothing behind, while the server and the connection live on.
func TestAbortedStreamsLeaveNothing(t *testing.T) {
	big := strings.Repeat("x", 300_000)
	cache := newTestCache(t, Options{Logger: slog.New(slog.DiscardHandler)})
	cache.Apply([]Resource{se("a", big), {Type: cds, Name: "c", Body: body(big)}}, nil)
	address := serve(t, cache)
	conn := dial(t, address)
	first := newClient(t, conn, protocolSotw)
	first.subscribe("other.test/v1/Kind")
	first.ack(first.expect("other.test/v1/Kind"))
	before := runtime.NumGoroutine()
	abort := func() {
		for i := range 60 {
			protocol := []string{protocolSotw, protocolDelta}[i%2]
			ctx, cancel := context.WithCancel(context.Background())
			ads := discovery.NewAggregatedDiscoveryServiceClient(conn)
			if protocol == protocolSotw {
				s, err := ads.StreamAggregatedResources(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, url := range []string{seV1, cds, drV1}[:i%4] {
					_ = s.Send(&discovery.DiscoveryRequest{TypeUrl: url})
				}
				if i%3 == 0 {
					_ = s.CloseSend()
				}
			} else {
				s, err := ads.DeltaAggregatedResources(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for _, url := range []string{seV1, cds, drV1}[:i%4] {
					_ = s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: url})
				}
				if i%3 == 0 {
					_ = s.CloseSend()
				}
			}
			if i%5 != 0 {
				eventually(t, "the stream is seen", func() bool { return len(cache.Clients()) > 1 || i%3 == 0 })
			}
			cancel()
		}
		eventually(t, "aborted streams are forgotten", func() bool { return len(cache.Clients()) == 1 })
		eventually(t, "their goroutines are gone", func() bool { return runtime.NumGoroutine() <= before })
	}
	abort() // while first answers are held
	cache.Open()
	abort()
	first.quiet()
	first.cancel()
	if r := first.next(); status.Code(r.err) != codes.Canceled {
		t.Errorf("got %+v", r)
	}
	eventually(t, "all streams are forgotten", func() bool { return len(cache.Clients()) == 0 })
	checkIdle(t, cache)
}
