package xds

import (
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"testing"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
)

const (
	kib = 1 << 10
	mib = 1 << 20

	longName = 16 * kib
)

// heap is what is reachable, in bytes.
func heap() int {
	runtime.GC()
	runtime.GC() // the first one keeps what pools hold
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// logCache is an open cache that logs to the buffer.
func logCache(t *testing.T, log *syncBuffer, resources ...Resource) *Cache {
	t.Helper()
	c := newTestCache(t, Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
	c.Apply(resources, nil)
	c.Open()
	return c
}

// lines returns the lines of the log that are about clients.
func lines(log *syncBuffer) []string {
	return strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")
}

// longNames are n names of longName bytes or a little more, others for each first text.
func longNames(n int, first string) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("%s-%06d-%s", first, i, strings.Repeat("x", longName))
	}
	return names
}

// usualNames are n names of usual length.
func usualNames(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("outbound|8080||service-%06d.some-namespace.DEFAULT-GROUP.public.nacos.%s", i, strings.Repeat("y", 30))
	}
	return names
}

// A client may write at length; what is kept of it is short.
func TestLongTextsAreNotKept(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			var log syncBuffer
			cache := logCache(t, &log, se("a", "1"))
			c := newClient(t, dial(t, serve(t, cache)), protocol)
			const length = 200 * kib
			long := "éé" + strings.Repeat("x", length)
			refusal := &rpc.Status{Code: 3, Message: long}
			metadata := &structpb.Struct{Fields: map[string]*structpb.Value{"x": structpb.NewStringValue(long)}}
			before := heap()
			for i := range 30 {
				node := &core.Node{Id: "long-" + long, Metadata: metadata}
				tooLong, short := fmt.Sprint(i, long), fmt.Sprintf("kind%d.test/v1/Kind", i)
				if c.sotw != nil {
					c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: tooLong, Node: node})
					c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: short, Node: node, VersionInfo: long, ResponseNonce: long})
				} else {
					c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: tooLong, Node: node})
					c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: short, Node: node, ResponseNonce: long})
				}
				r := c.expect(short)
				if c.sotw != nil {
					c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: short, ResponseNonce: r.nonce, ErrorDetail: refusal, Node: node})
				} else {
					c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: short, ResponseNonce: r.nonce, ErrorDetail: refusal, Node: node})
				}
			}
			c.quiet()
			if kept := heap() - before; kept > 15*length {
				t.Errorf("%d MiB are kept", kept/mib)
			}
			clients := cache.Clients()
			if len(clients) != 1 || len(clients[0].Types) != 31 { // with the fence
				t.Fatalf("%d clients", len(clients))
			}
			if node := clients[0].Node; !strings.HasPrefix(node, "long-éé") || len(node) > kib {
				t.Errorf("a node of %d bytes", len(node))
			}
			for _, typ := range clients[0].Types {
				if len(typ.LastError) > maxRefusal || typ.NACKs == 1 != strings.HasPrefix(typ.LastError, "éé") {
					t.Errorf("%s: %d refusals, an error of %d bytes", typ.TypeURL, typ.NACKs, len(typ.LastError))
				}
			}
			if n := strings.Count(log.String(), "ignoring xDS requests whose type is too long"); n != 1 {
				t.Errorf("long types are logged %d times", n)
			}
			for _, line := range lines(&log) {
				if len(line) > 20*kib {
					t.Errorf("a line of %d bytes was logged", len(line))
				}
			}
			c.subscribe(seV1)
			c.ack(c.expect(seV1, "1"))
		})
	}
}

// refused reads until the stream ends and checks that the client is told why, and the operator once.
func (c *testClient) refused(log *syncBuffer, code codes.Code, why string) {
	c.t.Helper()
	for {
		r := c.next()
		if r.err == nil {
			continue
		}
		if status.Code(r.err) != code || !strings.Contains(r.err.Error(), why) {
			c.t.Errorf("the client is told %v, want %v, %q", r.err, code, why)
		}
		break
	}
	var found []string
	for _, line := range lines(log) {
		if strings.Contains(line, "ending an xDS stream") {
			found = append(found, line)
		}
	}
	if len(found) != 1 || !strings.Contains(found[0], why) || !strings.Contains(found[0], "level=WARN") ||
		!strings.Contains(found[0], testNode.GetId()) {
		c.t.Errorf("logged %q, want one line with %q and the node", found, why)
	}
}

// What a stream makes the server remember is bounded, whatever the way it names things.
func TestNamesOfAStreamAreBounded(t *testing.T) {
	const batch = 100
	for name, test := range map[string]struct {
		protocol string
		send     func(c *testClient, i int) error
	}{
		"sotw, types with many names": {protocolSotw, func(c *testClient, i int) error {
			return c.sotw.Send(&discovery.DiscoveryRequest{Node: testNode,
				TypeUrl: fmt.Sprintf("kind%d.test/v1/Kind", i), ResourceNames: longNames(batch, "n")})
		}},
		"delta, more and more names": {protocolDelta, func(c *testClient, i int) error {
			return c.delta.Send(&discovery.DeltaDiscoveryRequest{Node: testNode,
				TypeUrl: seV1, ResourceNamesSubscribe: longNames(batch, fmt.Sprint(i))})
		}},
		"delta, names given up while everything is wanted": {protocolDelta, func(c *testClient, i int) error {
			if i == 0 {
				return c.delta.Send(&discovery.DeltaDiscoveryRequest{Node: testNode, TypeUrl: seV1, ResourceNamesSubscribe: []string{"*"}})
			}
			names := longNames(batch, fmt.Sprint(i))
			if err := c.delta.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: names}); err != nil {
				return err
			}
			return c.delta.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: names})
		}},
		"delta, types with many versions": {protocolDelta, func(c *testClient, i int) error {
			versions := map[string]string{}
			for _, name := range longNames(batch/2, "n") {
				versions[name] = name
			}
			// The response to these is held until Open.
			return c.delta.Send(&discovery.DeltaDiscoveryRequest{Node: testNode, InitialResourceVersions: versions,
				TypeUrl: fmt.Sprintf("networking.istio.io/v%d/ServiceEntry", i+1)})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var log syncBuffer
			cache := newTestCache(t, Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
			held := strings.Contains(name, "versions")
			if !held {
				cache.Open()
			}
			address := serve(t, cache)
			before := heap()
			c := newClient(t, dial(t, address), test.protocol)
			sent := 0
			for test.send(c, sent) == nil { // which it is until the stream has ended
				if sent++; sent*batch*longName > 4*maxHeld {
					t.Fatalf("%d MiB of names were taken", sent*batch*longName/mib)
				}
			}
			if sent*batch*longName < maxHeld/2 {
				t.Errorf("%d MiB of names were not taken", sent*batch*longName/mib)
			}
			c.refused(&log, codes.ResourceExhausted, "names more resources than the 32 MiB")
			eventually(t, "the stream is forgotten", func() bool { return len(cache.Clients()) == 0 })
			checkIdle(t, cache)
			for len(c.in) > 0 {
				<-c.in
			}
			if kept := heap() - before; kept > 16*mib {
				t.Errorf("%d MiB are kept", kept/mib)
			}
		})
	}
}

// A client that takes its answers but never replies must not make the server keep their names.
func TestAnswersToASilentClientAreNotKept(t *testing.T) {
	cache := openCache(t)
	c := deltaClient(t, serve(t, cache))
	const types, batch = 20, 100
	before := heap()
	for i := range types {
		url := fmt.Sprintf("kind%d.test/v1/Kind", i)
		names := longNames(batch, "n")
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: names})
		if r := c.next(); r.err != nil || len(r.removed) != batch {
			t.Fatalf("got %d removed, %v", len(r.removed), r.err)
		}
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesUnsubscribe: names, ResponseNonce: "another"})
	}
	c.quiet()
	if kept := heap() - before; kept > types*batch*longName/3 {
		t.Errorf("%d MiB are kept of %d", kept/mib, types*batch*longName/mib)
	}
}

// What a big honest client asks for is taken, however often it repeats it.
func TestManyNamesAreTaken(t *testing.T) {
	const n = 50_000
	names := usualNames(n)
	load := func(content string) Resource {
		return Resource{Type: eds, Name: names[n/2], Version: content, Body: body(content)}
	}
	t.Run("sotw", func(t *testing.T) {
		var log syncBuffer
		cache := logCache(t, &log, load("0"))
		c := sotwClient(t, serve(t, cache))
		c.subscribe(eds, names...)
		for i := range 10 {
			c.ack(c.expect(eds, fmt.Sprint(i)), names...)
			cache.Apply([]Resource{load(fmt.Sprint(i + 1))}, nil)
		}
		c.expect(eds, "10")
		if log.String() != "" {
			t.Errorf("logged: %s", log.String())
		}
	})
	t.Run("delta", func(t *testing.T) {
		var log syncBuffer
		cache := logCache(t, &log, load("0"))
		c := deltaClient(t, serve(t, cache))
		c.subscribe(eds, names[0])
		c.ack(c.expectDelta(eds, nil, names[:1]))
		for range 4 { // a recount falls into it
			for some := range slices.Chunk(names, 5000) {
				c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: eds, ResourceNamesUnsubscribe: some})
				c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: eds, ResourceNamesSubscribe: some})
				r := c.next()
				if len(r.names)+len(r.removed) != len(some) {
					t.Fatalf("told %d names and %d removed of %d, %v", len(r.names), len(r.removed), len(some), r.err)
				}
				c.ack(r)
			}
		}
		cache.Apply([]Resource{load("1")}, nil)
		c.ack(c.expectDelta(eds, []string{names[n/2]}, nil))
		c.quiet()
		if log.String() != "" {
			t.Errorf("logged: %s", log.String())
		}
	})
	t.Run("delta that comes back", func(t *testing.T) {
		names := usualNames(2 * n)
		all := make([]Resource, len(names))
		versions := map[string]string{}
		for i, name := range names {
			all[i] = Resource{Type: eds, Name: name, Version: fmt.Sprintf("%032d", i), Body: body("x")}
			versions[name] = all[i].Version
		}
		delete(versions, names[7])
		cache := openCache(t, all...)
		c := deltaClient(t, serve(t, cache))
		c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: eds, InitialResourceVersions: versions})
		c.ack(c.expectDelta(eds, []string{names[7]}, nil))
		c.quiet()
	})
}

// rawCodec sends bytes.
type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.([]byte); ok {
		return mem.BufferSlice{mem.SliceBuffer(b)}, nil
	}
	return c.CodecV2.Marshal(v)
}

func TestRequestsThatCannotBeRead(t *testing.T) {
	for name, test := range map[string]struct {
		request []byte
		code    codes.Code
		why     string
	}{
		"too long":       {make([]byte, maxHeld+1), codes.ResourceExhausted, "larger than max"},
		"too many names": {[]byte(strings.Repeat("\x1a\x00", maxHeld/nameCost+1)), codes.ResourceExhausted, "names more resources"},
		"malformed":      {[]byte("\x0a\xffnonsense"), codes.InvalidArgument, "no valid message"},
		"no tag":         {[]byte{0xff}, codes.InvalidArgument, "no valid message"},
		"not UTF-8":      {[]byte("\x1a\x01\xff"), codes.InvalidArgument, "no valid message"},
	} {
		for _, protocol := range []string{protocolSotw, protocolDelta} {
			t.Run(name+", "+protocol, func(t *testing.T) {
				var log syncBuffer
				cache := logCache(t, &log, se("a", "1"))
				conn := dial(t, serve(t, cache), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{encoding.GetCodecV2("proto")})))
				c := newClient(t, conn, protocol)
				c.subscribe(seV1)
				c.expect(seV1, "1")
				var err error
				if c.sotw != nil {
					err = c.sotw.SendMsg(test.request)
				} else {
					err = c.delta.SendMsg(test.request)
				}
				if err != nil {
					t.Fatal(err)
				}
				c.refused(&log, test.code, test.why)
			})
		}
	}
}

// Decoding must not make much of little: a node's metadata could be made of empty values alone.
func TestReadingARequestTakesLittle(t *testing.T) {
	values := make([]*structpb.Value, 100_000)
	for i := range values {
		values[i] = &structpb.Value{}
	}
	bomb := &core.Node{Id: "bomb", Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
		"x": structpb.NewListValue(&structpb.ListValue{Values: values}),
	}}}
	wire, err := proto.Marshal(&discovery.DiscoveryRequest{Node: bomb, TypeUrl: seV1})
	if err != nil {
		t.Fatal(err)
	}
	var req discovery.DiscoveryRequest
	r := newSotwReader(&req)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, r); err != nil || r.err != nil {
		t.Fatal(err, r.err)
	}
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > uint64(len(wire)) {
		t.Errorf("reading %d bytes took %d", len(wire), took)
	}
	if req.GetNode().GetId() != "bomb" || req.GetTypeUrl() != seV1 {
		t.Errorf("read %v", &req)
	}
}

// FuzzRequests compares what is read of a request with what the general decoder reads.
func FuzzRequests(f *testing.F) {
	for _, m := range []proto.Message{
		&discovery.DiscoveryRequest{Node: testNode, TypeUrl: seV1, ResponseNonce: "7", VersionInfo: "1", ResourceNames: []string{"a", ""}},
		&discovery.DeltaDiscoveryRequest{Node: testNode, TypeUrl: seV1, ResourceNamesSubscribe: []string{"a"},
			ResourceNamesUnsubscribe: []string{"b", "é"}, InitialResourceVersions: map[string]string{"a": "1", "": ""},
			ResponseNonce: "8", ErrorDetail: &rpc.Status{Code: 3, Message: "no"}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	short := func(s string, limit int) string { return strings.ToValidUTF8(s[:min(len(s), limit)], "") }
	node := func(n *core.Node) *core.Node {
		if n == nil {
			return nil
		}
		return &core.Node{Id: short(n.GetId(), maxText)}
	}
	refusal := func(s *rpc.Status) *rpc.Status {
		if s == nil {
			return nil
		}
		return &rpc.Status{Message: short(s.GetMessage(), maxRefusal)}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var sotw, gotSotw discovery.DiscoveryRequest
		errSotw := newSotwReader(&gotSotw).read(b)
		if proto.Unmarshal(b, &sotw) == nil {
			want := &discovery.DiscoveryRequest{
				VersionInfo: short(sotw.GetVersionInfo(), maxText), Node: node(sotw.GetNode()), ResourceNames: sotw.GetResourceNames(),
				TypeUrl: short(sotw.GetTypeUrl(), maxText), ResponseNonce: short(sotw.GetResponseNonce(), maxText),
				ErrorDetail: refusal(sotw.GetErrorDetail()),
			}
			if errSotw != nil || !proto.Equal(&gotSotw, want) {
				t.Errorf("read %v, error %v; want %v", &gotSotw, errSotw, want)
			}
		}
		var delta, gotDelta discovery.DeltaDiscoveryRequest
		errDelta := newDeltaReader(&gotDelta).read(b)
		if proto.Unmarshal(b, &delta) == nil {
			want := &discovery.DeltaDiscoveryRequest{
				Node: node(delta.GetNode()), TypeUrl: short(delta.GetTypeUrl(), maxText),
				ResourceNamesSubscribe: delta.GetResourceNamesSubscribe(), ResourceNamesUnsubscribe: delta.GetResourceNamesUnsubscribe(),
				InitialResourceVersions: delta.GetInitialResourceVersions(), ResponseNonce: short(delta.GetResponseNonce(), maxText),
				ErrorDetail: refusal(delta.GetErrorDetail()),
			}
			if errDelta != nil || !proto.Equal(&gotDelta, want) {
				t.Errorf("read %v, error %v; want %v", &gotDelta, errDelta, want)
			}
		}
	})
}
