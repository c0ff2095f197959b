package xds

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
)

const (
	seKind = "networking.istio.io/ServiceEntry"
	seV1   = "networking.istio.io/v1/ServiceEntry"
	drKind = "networking.istio.io/DestinationRule"
	drV1   = "networking.istio.io/v1/DestinationRule"
	cds    = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	eds    = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

	mcpResource = "type.googleapis.com/istio.mcp.v1alpha1.Resource"
)

// wait bounds what must happen soon.
const wait = 20 * time.Second

func se(name, content string) Resource {
	return Resource{Type: seKind, Name: name, Version: "v-" + content, Shard: name, Body: body(content)}
}

func body(content string) *anypb.Any {
	return &anypb.Any{TypeUrl: mcpResource, Value: []byte(content)}
}

func ref(name string) Ref { return Ref{seKind, name} }

func newTestCache(t *testing.T, opts Options) *Cache {
	t.Helper()
	if opts.Published == nil {
		opts.Published = []string{seKind, drKind, cds, eds}
	}
	return NewCache(opts)
}

// openCache is a cache that is open and holds these resources.
func openCache(t *testing.T, resources ...Resource) *Cache {
	t.Helper()
	c := newTestCache(t, Options{})
	c.Apply(resources, nil)
	c.Open()
	return c
}

// serve runs a server of the cache for the length of the test and returns its base address.
func serve(t *testing.T, c *Cache) string {
	t.Helper()
	base, _ := serveWith(t, c, ServerOptions{}).Addresses()
	return base.String()
}

// serveWith does so on free loopback ports, with these options.
func serveWith(t *testing.T, c *Cache, opts ServerOptions) *Server {
	t.Helper()
	if opts.Address == "" {
		opts.Address = "127.0.0.1:0"
	}
	if opts.DrainTimeout == 0 {
		opts.DrainTimeout = 100 * time.Millisecond
	}
	s, err := NewServer(c, opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s
}

func dial(t *testing.T, address string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1 << 30)),
	}, opts...)
	conn, err := grpc.NewClient(address, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// received is a response of either protocol, or the end of the stream.
type received struct {
	url, version, nonce string
	names, removed      []string // names only of delta
	values              []string // of the bodies
	bodyTypes           []string
	versions            map[string]string // by name, delta
	err                 error
}

// A testClient is one stream of either protocol.
type testClient struct {
	t      *testing.T
	cancel context.CancelFunc
	sotw   grpc.BidiStreamingClient[discovery.DiscoveryRequest, discovery.DiscoveryResponse]
	delta  grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	in     chan received
	names  []string // of the last named state-of-the-world subscription
	fences int
	fence  string // nonce of the last fence's response
}

var testNode = &core.Node{Id: "sidecar~192.0.2.2~istiod-test.istio-system~istio-system.svc.cluster.local"}

func newClient(t *testing.T, conn *grpc.ClientConn, protocol string) *testClient {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &testClient{t: t, cancel: cancel, in: make(chan received, 1000)}
	ads := discovery.NewAggregatedDiscoveryServiceClient(conn)
	var err error
	var recv func() received
	if protocol == protocolSotw {
		c.sotw, err = ads.StreamAggregatedResources(ctx)
		recv = func() received { return fromSotw(c.sotw.Recv()) }
	} else {
		c.delta, err = ads.DeltaAggregatedResources(ctx)
		recv = func() received { return fromDelta(c.delta.Recv()) }
	}
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			r := recv()
			c.in <- r
			if r.err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func sotwClient(t *testing.T, address string) *testClient {
	t.Helper()
	return newClient(t, dial(t, address), protocolSotw)
}

func deltaClient(t *testing.T, address string) *testClient {
	t.Helper()
	return newClient(t, dial(t, address), protocolDelta)
}

func fromSotw(resp *discovery.DiscoveryResponse, err error) received {
	r := received{url: resp.GetTypeUrl(), version: resp.GetVersionInfo(), nonce: resp.GetNonce(), err: err}
	for _, a := range resp.GetResources() {
		r.values = append(r.values, string(a.GetValue()))
		r.bodyTypes = append(r.bodyTypes, a.GetTypeUrl())
	}
	return r
}

func fromDelta(resp *discovery.DeltaDiscoveryResponse, err error) received {
	r := received{url: resp.GetTypeUrl(), version: resp.GetSystemVersionInfo(), nonce: resp.GetNonce(), err: err,
		removed: resp.GetRemovedResources(), versions: map[string]string{}}
	for _, a := range resp.GetResources() {
		r.names = append(r.names, a.GetName())
		r.values = append(r.values, string(a.GetResource().GetValue()))
		r.bodyTypes = append(r.bodyTypes, a.GetResource().GetTypeUrl())
		r.versions[a.GetName()] = a.GetVersion()
	}
	return r
}

// next returns the next response of the stream.
func (c *testClient) next() received {
	c.t.Helper()
	select {
	case r := <-c.in:
		return r
	case <-time.After(wait):
		c.t.Fatal("no response in time")
		return received{}
	}
}

// expect is next for a response of that type with these bodies.
func (c *testClient) expect(url string, values ...string) received {
	c.t.Helper()
	r := c.next()
	if r.err != nil {
		c.t.Fatalf("stream ended: %v", r.err)
	}
	if r.url != url || !slices.Equal(r.values, values) {
		c.t.Fatalf("got %s %q, want %s %q", r.url, r.values, url, values)
	}
	return r
}

func (c *testClient) sendSotw(req *discovery.DiscoveryRequest) {
	c.t.Helper()
	if req.GetNode() == nil {
		req.Node = testNode
	}
	if err := c.sotw.Send(req); err != nil {
		c.t.Fatalf("sending a request: %v", err)
	}
}

func (c *testClient) sendDelta(req *discovery.DeltaDiscoveryRequest) {
	c.t.Helper()
	if req.GetNode() == nil {
		req.Node = testNode
	}
	if err := c.delta.Send(req); err != nil {
		c.t.Fatalf("sending a request: %v", err)
	}
}

// subscribe asks for a type the first time, as istiod does: with a nonce that means nothing.
func (c *testClient) subscribe(url string, names ...string) {
	c.t.Helper()
	c.names = names
	if c.sotw != nil {
		c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: url, ResourceNames: names, ResponseNonce: "2026-11-23 11:05:49"})
	} else {
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: names})
	}
}

// ack accepts a response; names repeat a named state-of-the-world subscription.
func (c *testClient) ack(r received, names ...string) {
	c.t.Helper()
	if c.sotw != nil {
		c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: r.url, VersionInfo: r.version, ResponseNonce: r.nonce, ResourceNames: names})
	} else {
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: r.url, ResponseNonce: r.nonce})
	}
}

// nack refuses a response.
func (c *testClient) nack(r received, version, message string) {
	c.t.Helper()
	refusal := &rpc.Status{Code: 3, Message: message}
	if c.sotw != nil {
		c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: r.url, VersionInfo: version, ResponseNonce: r.nonce, ErrorDetail: refusal})
	} else {
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: r.url, ResponseNonce: r.nonce, ErrorDetail: refusal})
	}
}

// quiet fails the test if something is on its way to the client. It makes several round trips with a type of its own:
// requests are handled in their order, and an answer made before cannot be overtaken by all of them.
func (c *testClient) quiet() {
	c.t.Helper()
	const url = "fence.test/v1/Fence"
	for range 12 {
		c.fences++
		name := strconv.Itoa(c.fences)
		if c.sotw != nil {
			c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: url, ResourceNames: []string{name}, ResponseNonce: c.fence})
		} else {
			c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{name}, ResponseNonce: c.fence})
		}
		r := c.next()
		if r.err != nil {
			c.t.Fatalf("stream ended: %v", r.err)
		}
		if r.url != url {
			c.t.Fatalf("unexpected response: %s %q, removed %q", r.url, r.values, r.removed)
		}
		c.fence = r.nonce
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(wait)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func manySE(n int, content string) []Resource {
	out := make([]Resource, n)
	for i := range out {
		out[i] = se(fmt.Sprintf("mcp/svc-%06d", i), content)
	}
	return out
}
