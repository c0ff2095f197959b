package xds

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestShards(t *testing.T) {
	cache := newTestCache(t, Options{ShardCounts: []int{2, 16, 16}})
	s := serveWith(t, cache, ServerOptions{Shards: []ShardListen{
		{Count: 16, Address: "127.0.0.1:0"}, {Count: 2, Address: "127.0.0.1:0"},
	}})
	base, shards := s.Addresses()
	if len(shards) != 2 || len(shards[16]) != 16 || len(shards[2]) != 2 {
		t.Fatalf("shards: %v", shards)
	}
	rule := func(name string) Resource {
		return Resource{Type: drKind, Name: "mcp/rule-" + name, Version: "1", Shard: name, Body: body("rule of " + name)}
	}
	var all []Resource
	for i := range 100 {
		name := fmt.Sprintf("svc-%d", i)
		all = append(all, se(name, name), rule(name))
	}
	cache.Apply(all, nil)
	cache.Open()

	whole := sotwClient(t, base.String())
	whole.subscribe(seV1)
	if r := whole.next(); len(r.values) != 100 {
		t.Fatalf("the base has %d of 100", len(r.values))
	}
	for count, addrs := range shards {
		seen := map[string]bool{}
		for i, addr := range addrs {
			c := sotwClient(t, addr.String())
			c.subscribe(seV1)
			entries := c.next()
			c.subscribe(drV1)
			rules := c.next()
			if len(entries.values) != len(rules.values) {
				t.Errorf("shard %d of %d has %d entries and %d rules", i, count, len(entries.values), len(rules.values))
			}
			for _, v := range entries.values {
				if seen[v] {
					t.Errorf("%s is in two shards of %d", v, count)
				}
				seen[v] = true
				if shardOf(v, count) != i {
					t.Errorf("%s is in shard %d of %d", v, i, count)
				}
			}
		}
		if len(seen) != 100 {
			t.Errorf("%d shards have %d of 100", count, len(seen))
		}
	}

	// A change goes to its own shard only, and moves with the text that chooses the shard.
	from, to := sotwClient(t, shards[2][0].String()), deltaClient(t, shards[2][1].String())
	from.subscribe(eds)
	from.ack(from.expect(eds))
	to.subscribe(eds)
	to.ack(to.expect(eds))
	texts := [2]string{}
	for i := 0; texts[0] == "" || texts[1] == ""; i++ {
		texts[shardOf(fmt.Sprint(i), 2)] = fmt.Sprint(i)
	}
	load := Resource{Type: eds, Name: "load", Version: "1", Shard: texts[0], Body: body("load")}
	cache.Apply([]Resource{load}, nil)
	from.ack(from.expect(eds, "load"))
	to.quiet()
	load.Version, load.Shard = "2", texts[1]
	cache.Apply([]Resource{load}, nil)
	from.ack(from.expect(eds))
	to.ack(to.expectDelta(eds, []string{"load"}, nil))
	cache.Apply(nil, []Ref{{eds, "load"}})
	to.ack(to.expectDelta(eds, nil, []string{"load"}))
	from.quiet()

	listeners := map[string]bool{}
	for _, cl := range cache.Clients() {
		listeners[cl.Listener] = true
	}
	if len(listeners) != 19 || !listeners["base"] || !listeners["0/2"] || !listeners["15/16"] {
		t.Errorf("listeners of the clients: %v", listeners)
	}
}

func TestNewServerRefuses(t *testing.T) {
	cache := NewCache(Options{ShardCounts: []int{2, 4}})
	for want, opts := range map[string]ServerOptions{
		`"nowhere" is not host:port`:                    {Address: "nowhere"},
		`":70000" does not have a port`:                 {Address: ":70000"},
		"a set has at least 2":                          {Address: ":0", Shards: []ShardListen{{1, ":0"}}},
		"the ports end at 65535":                        {Address: ":0", Shards: []ShardListen{{4, ":65533"}}},
		"asked for twice":                               {Address: ":0", Shards: []ShardListen{{2, ":0"}, {2, ":0"}}},
		"is not divided into 3":                         {Address: ":0", Shards: []ShardListen{{3, ":0"}}},
		"address :15052 is used twice":                  {Address: ":15052", Shards: []ShardListen{{2, ":15051"}}},
		`client auth "maybe" is unknown`:                {Address: ":0", TLS: TLS{ClientAuth: "maybe"}},
		`client auth "require" needs a client CA`:       {Address: ":0", TLS: TLS{ClientAuth: "require", CertFile: "a", KeyFile: "b"}},
		"must be set together":                          {Address: ":0", TLS: TLS{CertFile: "a"}},
		"client certificates need TLS":                  {Address: ":0", TLS: TLS{ClientAuth: "require", ClientCAFile: "a"}},
		"client CA file is set, but client certificate": {Address: ":0", TLS: TLS{CertFile: "a", KeyFile: "b", ClientCAFile: "c"}},
	} {
		_, err := NewServer(cache, opts)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v, want %q", opts, err, want)
		}
	}
}

func TestListenTakesAllPortsOrNone(t *testing.T) {
	cache := NewCache(Options{ShardCounts: []int{2}})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := probe.Addr().String()
	_ = probe.Close()
	number := taken.Addr().(*net.TCPAddr).Port
	s, err := NewServer(cache, ServerOptions{Address: free, Shards: []ShardListen{{2, fmt.Sprintf("127.0.0.1:%d", number-1)}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), "/2") {
		t.Fatalf("error %v, want one that names the shard", err)
	}
	again, err := net.Listen("tcp", free)
	if err != nil {
		t.Fatalf("the base port was not given back: %v", err)
	}
	_ = again.Close()

	s, err = NewServer(cache, ServerOptions{Address: taken.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(context.Background()); err == nil {
		t.Error("Run without its port succeeded")
	}
}

func TestRunEndsStreamsAndReleasesEverything(t *testing.T) {
	cache := openCache(t, se("a", "1"))
	s, err := NewServer(cache, ServerOptions{Address: "127.0.0.1:0", DrainTimeout: wait})
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
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		c := newClient(t, dial(t, base.String()), protocol)
		c.subscribe(seV1)
		c.expect(seV1, "1")
		defer func() {
			if r := c.next(); status.Code(r.err) != codes.Unavailable {
				t.Errorf("the %s stream got %+v", protocol, r)
			}
		}()
	}
	began := time.Now()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if took := time.Since(began); took > wait/2 {
		t.Errorf("took %v although nothing was left to send", took)
	}
	if got := cache.Clients(); len(got) != 0 {
		t.Errorf("clients after Run: %+v", got)
	}
	checkIdle(t, cache)
	l, err := net.Listen("tcp", base.String())
	if err != nil {
		t.Fatalf("the port is still taken: %v", err)
	}
	_ = l.Close()
	cache.Apply([]Resource{se("a", "2")}, nil) // the cache lives on
}

// checkIdle fails the test if the cache holds anything for streams.
func checkIdle(t *testing.T, c *Cache) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams) != 0 || c.flights.Len() != 0 {
		t.Errorf("%d streams and %d flights are left", len(c.streams), c.flights.Len())
	}
	for key, col := range c.collections {
		if len(col.armed) != 0 || col.users != 0 {
			t.Errorf("%v: %d subscriptions are armed, %d left", key, len(col.armed), col.users)
		}
	}
}

func TestClients(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	cache := newTestCache(t, Options{Registerer: reg})
	cache.Apply([]Resource{se("a", "1"), se("b", "1")}, nil)
	address := serve(t, cache)
	c := sotwClient(t, address)
	c.subscribe(seV1)
	c.subscribe("future.istio.io/v1/Unknown")
	c.ack(c.expect("future.istio.io/v1/Unknown"))
	c.quiet()
	if got := clientType(t, cache, seV1); !got.Held || got.Sent != "" {
		t.Errorf("before Open: %+v", got)
	}
	cache.Open()
	r := c.expect(seV1, "1", "1")
	if got := clientType(t, cache, seV1); got.Held || got.Sent != r.version || got.Acked != "" || got.Nonce != r.nonce || got.SentAt.IsZero() {
		t.Errorf("before the reply: %+v", got)
	}
	c.ack(r)
	c.quiet()
	if got := clientType(t, cache, seV1); got.Acked != r.version || len(got.Names) != 1 || got.Names[0] != "*" {
		t.Errorf("after the reply: %+v", got)
	}
	d := deltaClient(t, address)
	d.subscribe(seV1, "b", "a")
	d.ack(d.expect(seV1, "1", "1"))
	d.quiet()
	clients := cache.Clients()
	if len(clients) != 2 {
		t.Fatalf("clients: %+v", clients)
	}
	for i, protocol := range []string{protocolSotw, protocolDelta} {
		cl := clients[i]
		if cl.Protocol != protocol || cl.Node != testNode.GetId() || cl.Listener != "base" || cl.Since.IsZero() ||
			!strings.HasPrefix(cl.Peer, "127.0.0.1:") {
			t.Errorf("client %d: %+v", i, cl)
		}
		if n := testutil.ToFloat64(cache.metrics.clients.WithLabelValues(protocol)); n != 1 {
			t.Errorf("%v %s clients counted", n, protocol)
		}
	}
	if names := strings.Join(clients[1].Types[1].Names, " "); names != "a b" {
		t.Errorf("names %q", names)
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) != 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if strings.Contains(l.GetValue(), "future") || strings.Contains(l.GetValue(), "fence") {
					t.Errorf("%s has a label that a client chose: %v", f.GetName(), l)
				}
			}
		}
	}
	c.cancel()
	d.cancel()
	eventually(t, "streams that ended are forgotten", func() bool { return len(cache.Clients()) == 0 })
	checkIdle(t, cache)
	if n := testutil.ToFloat64(cache.metrics.clients.WithLabelValues(protocolSotw)); n != 0 {
		t.Errorf("%v clients counted", n)
	}
}

func TestBigSetInOneResponse(t *testing.T) {
	const n, size = 10_000, 1100
	var all []Resource
	for i := range n {
		all = append(all, Resource{Type: seKind, Name: fmt.Sprintf("mcp/svc-%05d", i),
			Body: &anypb.Any{TypeUrl: mcpResource, Value: []byte(strings.Repeat("x", size))}})
	}
	cache := openCache(t, all...)
	address := serve(t, cache)
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		c := newClient(t, dial(t, address), protocol)
		c.subscribe(seV1)
		if r := c.next(); len(r.values) != n || r.err != nil {
			t.Fatalf("%s: %d resources of %d, error %v", protocol, len(r.values), n, r.err)
		}
	}
}

// stuck returns a client that asks for everything and never reads it.
func stuck(t *testing.T, address, protocol string, urls ...string) func() error {
	t.Helper()
	conn := dial(t, address, grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	ads := discovery.NewAggregatedDiscoveryServiceClient(conn)
	if protocol == protocolSotw {
		s, err := ads.StreamAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, url := range urls {
			if err := s.Send(&discovery.DiscoveryRequest{TypeUrl: url}); err != nil {
				t.Fatal(err)
			}
		}
		return func() error { return drain(s.Recv) }
	}
	s, err := ads.DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, url := range urls {
		if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: url}); err != nil {
			t.Fatal(err)
		}
	}
	return func() error { return drain(s.Recv) }
}

func drain[T any](recv func() (T, error)) error {
	for {
		if _, err := recv(); err != nil {
			return err
		}
	}
}

func TestSlowClientHoldsUpNobody(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			const maxStale = 4 << 20
			cache := newTestCache(t, Options{MaxStale: maxStale})
			big := strings.Repeat("x", 100_000)
			var all []Resource
			for i := range 20 {
				for _, typ := range []string{seKind, cds} {
					all = append(all, Resource{Type: typ, Name: fmt.Sprint(i), Body: body(big)})
				}
			}
			cache.Apply(all, nil)
			cache.Open()
			address := serve(t, cache)
			// The second type keeps the stream's goroutine waiting until the first is taken, which never happens.
			rest := stuck(t, address, protocol, seV1, cds, "networking.istio.io/v1beta1/ServiceEntry")
			eventually(t, "the slow client was sent something", func() bool {
				return len(cache.Clients()) == 1 && len(cache.Clients()[0].Types) > 1
			})
			good := deltaClient(t, address)
			good.subscribe(seV1)
			good.ack(good.next())
			steps := 0
			for ; len(cache.Clients()) == 2; steps++ {
				if steps > 1000 {
					t.Fatal("the slow client was never cut off")
				}
				// A hundred kilobytes of stale resources with each step.
				r := Resource{Type: seKind, Name: fmt.Sprint(steps % 20), Body: body(big + fmt.Sprint(steps))}
				cache.Apply([]Resource{r}, nil)
				good.ack(good.expectDelta(seV1, []string{r.Name}, nil))
			}
			if steps < maxStale/100_000 {
				t.Errorf("cut off after %d steps already", steps)
			}
			if n := testutil.ToFloat64(cache.metrics.ended); n != 1 {
				t.Errorf("%v ended streams counted", n)
			}
			if err := rest(); status.Code(err) != codes.Aborted {
				t.Errorf("the slow client got %v", err)
			}
			good.quiet()
		})
	}
}

// istiod does not reply to every type. What holds no bytes does not count.
func TestSilenceOnAnEmptyAnswerIsNotSlow(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		cache := newTestCache(t, Options{MaxStale: 1000})
		cache.Open()
		c := newClient(t, dial(t, serve(t, cache)), protocol)
		c.subscribe("core/v1alpha1/MeshConfig")
		c.expect("core/v1alpha1/MeshConfig")
		c.subscribe(seV1)
		c.ack(c.expect(seV1))
		for i := range 100 {
			content := fmt.Sprint(i, strings.Repeat("x", 100))
			cache.Apply([]Resource{se("a", content)}, nil)
			c.ack(c.expect(seV1, content))
			c.quiet()
		}
	}
}

func TestRunDoesNotWaitForAStuckClient(t *testing.T) {
	big := strings.Repeat("x", 1_000_000)
	cache := openCache(t, se("a", big), Resource{Type: cds, Name: "c", Body: body(big)})
	s, err := NewServer(cache, ServerOptions{Address: "127.0.0.1:0", DrainTimeout: 50 * time.Millisecond})
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
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		stuck(t, base.String(), protocol, seV1, cds, drV1)
	}
	eventually(t, "both are sent something", func() bool {
		n := 0
		for _, cl := range cache.Clients() {
			if len(cl.Types) > 1 {
				n++
			}
		}
		return n == 2
	})
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

func TestSingleTypeServices(t *testing.T) {
	var all []Resource
	for _, typ := range []string{cds, eds, resource.ListenerType, resource.RouteType} {
		all = append(all, Resource{Type: typ, Name: "x", Body: body(typ)})
	}
	cache := openCache(t, all...)
	conn := dial(t, serve(t, cache))
	ctx := t.Context()
	type sotw = grpc.BidiStreamingClient[discovery.DiscoveryRequest, discovery.DiscoveryResponse]
	type delta = grpc.BidiStreamingClient[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	for typ, open := range map[string]struct {
		sotw  func(context.Context, ...grpc.CallOption) (sotw, error)
		delta func(context.Context, ...grpc.CallOption) (delta, error)
	}{
		cds: {clusterservice.NewClusterDiscoveryServiceClient(conn).StreamClusters,
			clusterservice.NewClusterDiscoveryServiceClient(conn).DeltaClusters},
		eds: {endpointservice.NewEndpointDiscoveryServiceClient(conn).StreamEndpoints,
			endpointservice.NewEndpointDiscoveryServiceClient(conn).DeltaEndpoints},
		resource.ListenerType: {listenerservice.NewListenerDiscoveryServiceClient(conn).StreamListeners,
			listenerservice.NewListenerDiscoveryServiceClient(conn).DeltaListeners},
		resource.RouteType: {routeservice.NewRouteDiscoveryServiceClient(conn).StreamRoutes,
			routeservice.NewRouteDiscoveryServiceClient(conn).DeltaRoutes},
	} {
		s, err := open.sotw(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&discovery.DiscoveryRequest{}); err != nil { // the type is understood
			t.Fatal(err)
		}
		if r := fromSotw(s.Recv()); r.err != nil || r.url != typ || len(r.values) != 1 || r.values[0] != typ {
			t.Errorf("%s: %+v", typ, r)
		}
		d, err := open.delta(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Send(&discovery.DeltaDiscoveryRequest{}); err != nil {
			t.Fatal(err)
		}
		if r := fromDelta(d.Recv()); r.err != nil || r.url != typ || len(r.values) != 1 || r.values[0] != typ {
			t.Errorf("%s: %+v", typ, r)
		}
	}
}

func TestReflection(t *testing.T) {
	conn := dial(t, serve(t, openCache(t)))
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for _, service := range resp.GetListServicesResponse().GetService() {
		if service.GetName() == "envoy.service.discovery.v3.AggregatedDiscoveryService" {
			return
		}
	}
	t.Errorf("ADS is not listed: %v", resp)
}

// istiod pings every 30 s on a stream that may be idle for hours. gRPC's default policy takes that for abuse.
func TestIdleStreamSurvivesPings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := openCache(t, se("a", "1"))
		s, err := NewServer(cache, ServerOptions{Address: "unused:0"})
		if err != nil {
			t.Fatal(err)
		}
		l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		s.ports[0].listener = l
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()

		conn, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return l.dial(), nil }),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: seV1}); err != nil {
			t.Fatal(err)
		}
		r := fromSotw(stream.Recv())
		if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: seV1, VersionInfo: r.version, ResponseNonce: r.nonce}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		cache.Apply([]Resource{se("a", "2")}, nil)
		if r := fromSotw(stream.Recv()); r.err != nil || len(r.values) != 1 || r.values[0] != "2" {
			t.Errorf("after an idle hour: %+v", r)
		}
		// A connection does not live for ever: its age is bounded, give or take a tenth, and a minute's grace.
		began := time.Now()
		if _, err := stream.Recv(); err == nil {
			t.Error("a response out of nothing")
		}
		if age := time.Since(began) + time.Hour; age < 10*time.Hour || age > 14*time.Hour {
			t.Errorf("the connection lived for %v", age)
		}
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// A client that is gone without a word is noticed by pings.
func TestDeadClientIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cache := openCache(t, se("a", "1"))
		s, err := NewServer(cache, ServerOptions{Address: "unused:0"})
		if err != nil {
			t.Fatal(err)
		}
		l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
		s.ports[0].listener = l
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()

		var dead deadConn
		conn, err := grpc.NewClient("passthrough:///pipe", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
				dead = deadConn{Conn: l.dial(), silent: make(chan struct{})}
				return &dead, nil
			}))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&discovery.DiscoveryRequest{TypeUrl: seV1}); err != nil {
			t.Fatal(err)
		}
		if r := fromSotw(stream.Recv()); r.err != nil {
			t.Fatal(r.err)
		}
		synctest.Wait()
		close(dead.silent)
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := cache.Clients(); len(got) != 0 {
			t.Errorf("a dead client is still there after a minute: %+v", got)
		}
		_ = conn.Close()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// A pipeListener accepts connections in memory.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) dial() net.Conn {
	client, server := net.Pipe()
	l.conns <- server
	return client
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	close(l.closed)
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

// A deadConn swallows what is written once it is silent.
type deadConn struct {
	net.Conn
	silent chan struct{}
}

func (c *deadConn) Write(b []byte) (int, error) {
	select {
	case <-c.silent:
		return len(b), nil
	default:
		return c.Conn.Write(b)
	}
}
