package xds

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	xdscache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	xdsstream "github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// benchAssignment is a service of ten endpoints, about 1 KB as it is sent.
func benchAssignment(i, change int) *endpointv3.ClusterLoadAssignment {
	a := &endpointv3.ClusterLoadAssignment{
		ClusterName: fmt.Sprintf("outbound|8080||svc-%06d.demo.public.nacos.%s", i, strings.Repeat("x", 60)),
		Endpoints:   []*endpointv3.LocalityLbEndpoints{{Locality: &core.Locality{Region: "r1", Zone: "z1"}}},
	}
	for e := range 10 {
		a.Endpoints[0].LbEndpoints = append(a.Endpoints[0].LbEndpoints, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Hostname: fmt.Sprintf("pod-%d.svc-%06d.demo.svc.cluster.local.%d", e, i, change),
				Address: &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
					Address:       fmt.Sprintf("10.%d.%d.%d", i>>8&255, i&255, e),
					PortSpecifier: &core.SocketAddress_PortValue{PortValue: uint32(8080 + change%100)},
				}}},
			}},
		})
	}
	return a
}

func benchResource(b *testing.B, i, change int) Resource {
	b.Helper()
	a := benchAssignment(i, change)
	body := &anypb.Any{}
	if err := anypb.MarshalFrom(body, a, proto.MarshalOptions{Deterministic: true}); err != nil {
		b.Fatal(err)
	}
	return Resource{Type: eds, Name: a.GetClusterName(), Version: fmt.Sprintf("%d.%d", i, change), Shard: a.GetClusterName(), Body: body}
}

func benchCache(b *testing.B, n int) *Cache {
	b.Helper()
	c := NewCache(Options{Published: []string{eds}})
	all := make([]Resource, n)
	for i := range all {
		all[i] = benchResource(b, i, 0)
	}
	c.Apply(all, nil)
	c.Open()
	return c
}

// A watcher is a delta stream with go-control-plane's side played by the benchmark: it takes the response, encodes it as
// gRPC would, and replies to it.
type watcher struct {
	watch func(*discovery.DeltaDiscoveryRequest, xdscache.Subscription, chan xdscache.DeltaResponse) (func(), error)
	take  func(resp xdscache.DeltaResponse, nonce string, encode bool) int // returns the encoded bytes
	sub   xdsstream.Subscription
	out   chan xdscache.DeltaResponse
	nonce int
}

func (w *watcher) arm(b *testing.B, nonce string) {
	b.Helper()
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: eds, ResponseNonce: nonce}
	if _, err := w.watch(req, w.sub, w.out); err != nil {
		b.Fatal(err)
	}
}

func (w *watcher) round(b *testing.B, encode bool) int {
	b.Helper()
	resp := <-w.out
	w.nonce++
	nonce := fmt.Sprint(w.nonce)
	n := w.take(resp, nonce, encode)
	w.sub.SetReturnedResources(resp.GetReturnedResources())
	w.arm(b, nonce)
	return n
}

func benchWatchers(b *testing.B, n int, one func() *watcher) []*watcher {
	b.Helper()
	ws := make([]*watcher, n)
	for i := range ws {
		ws[i] = one()
		ws[i].sub = xdsstream.NewDeltaSubscription(nil, nil, nil, true)
		ws[i].out = make(chan xdscache.DeltaResponse, 20)
		ws[i].arm(b, "")
		ws[i].round(b, false) // everything, which is not what is measured
	}
	return ws
}

func ourWatcher(b *testing.B, c *Cache) *watcher {
	b.Helper()
	st := c.join(streamInfo{protocol: protocolDelta})
	st.admit(eds, "", nil)
	codec := newCodec()
	return &watcher{watch: st.CreateDeltaWatch, take: func(resp xdscache.DeltaResponse, nonce string, encode bool) int {
		out, err := resp.GetDeltaDiscoveryResponse()
		if err != nil {
			b.Fatal(err)
		}
		out.Nonce = nonce
		st.OnStreamDeltaResponse(1, resp.GetDeltaRequest(), out)
		if !encode {
			return 0
		}
		wire, err := codec.Marshal(st.next)
		if err != nil {
			b.Fatal(err)
		}
		return wire.Len()
	}}
}

func linearWatcher(b *testing.B, c *xdscache.LinearCache) *watcher {
	b.Helper()
	codec := newCodec()
	return &watcher{watch: c.CreateDeltaWatch, take: func(resp xdscache.DeltaResponse, nonce string, encode bool) int {
		if !encode {
			return 0
		}
		out, err := resp.GetDeltaDiscoveryResponse()
		if err != nil {
			b.Fatal(err)
		}
		out.Nonce = nonce
		wire, err := codec.Marshal(out)
		if err != nil {
			b.Fatal(err)
		}
		n := wire.Len()
		wire.Free()
		return n
	}}
}

// BenchmarkDeltaChange is one change to one resource until all delta clients have it encoded and have replied. The same
// through go-control-plane's LinearCache stands beside it: linear-ns/op, and how many times ours that is.
func BenchmarkDeltaChange(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		for _, watchers := range []int{1, 100} {
			b.Run(fmt.Sprintf("resources=%d/watchers=%d", n, watchers), func(b *testing.B) {
				linearTime, linearBytes := linearChange(b, n, watchers)
				cache := benchCache(b, n)
				ws := benchWatchers(b, watchers, func() *watcher { return ourWatcher(b, cache) })
				change, sent := 0, 0
				b.ReportAllocs()
				for b.Loop() {
					change++
					b.StopTimer()
					r := benchResource(b, change%n, change)
					b.StartTimer()
					cache.Apply([]Resource{r}, nil)
					for _, w := range ws {
						sent += w.round(b, true)
					}
				}
				ns := float64(b.Elapsed().Nanoseconds()) / float64(b.N)
				b.ReportMetric(float64(sent)/float64(b.N)/float64(watchers), "wire-B/client")
				b.ReportMetric(float64(linearTime.Nanoseconds()), "linear-ns/op")
				b.ReportMetric(float64(linearBytes), "linear-B/op")
				b.ReportMetric(float64(linearTime.Nanoseconds())/ns, "linear/ours")
			})
		}
	}
}

// linearChange measures LinearCache by itself, since one benchmark has one clock. It returns what one change costs.
func linearChange(b *testing.B, n, watchers int) (each time.Duration, bytes uint64) {
	b.Helper()
	initial := make(map[string]types.Resource, n)
	for i := range n {
		a := benchAssignment(i, 0)
		initial[a.GetClusterName()] = a
	}
	cache := xdscache.NewLinearCache(eds, xdscache.WithInitialResources(initial))
	ws := benchWatchers(b, watchers, func() *watcher { return linearWatcher(b, cache) })
	rounds := 3
	if n*watchers > 1_000_000 {
		rounds = 1 // more than ten seconds each
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := time.Now()
	for change := 1; change <= rounds; change++ {
		a := benchAssignment(change%n, change)
		if err := cache.UpdateResource(a.GetClusterName(), a); err != nil {
			b.Fatal(err)
		}
		for _, w := range ws {
			w.round(b, true)
		}
	}
	each = time.Since(began) / time.Duration(rounds)
	runtime.ReadMemStats(&after)
	return each, (after.TotalAlloc - before.TotalAlloc) / uint64(rounds)
}

// BenchmarkSotwFullSet is one answer with the full set to a client that has just come, encoded as gRPC would, and the
// next one after one change. A change of the set of names costs sorting it in again.
func BenchmarkSotwFullSet(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		cache := benchCache(b, n)
		col := cache.collections[collectionKey{typ: eds}]
		codec := newCodec()
		answer := func(b *testing.B) int {
			st := cache.join(streamInfo{protocol: protocolSotw})
			defer st.leave()
			st.admit(eds, "", nil)
			out := make(chan xdscache.Response, 1)
			req := &discovery.DiscoveryRequest{TypeUrl: eds}
			if _, err := st.CreateWatch(req, xdsstream.NewSotwSubscription(nil, true), out); err != nil {
				b.Fatal(err)
			}
			resp := <-out
			st.depart(eds, "1")
			wire, err := codec.Marshal(st.next)
			if err != nil || resp == nil {
				b.Fatal(err)
			}
			return wire.Len()
		}
		b.Run(fmt.Sprintf("resources=%d/first", n), func(b *testing.B) {
			b.ReportAllocs()
			sent := 0
			for b.Loop() {
				col.order, col.fullSotw = nil, nil // nobody has asked before
				sent = answer(b)
			}
			b.ReportMetric(float64(sent), "wire-B")
		})
		for _, kind := range []string{"changed", "added"} {
			b.Run(fmt.Sprintf("resources=%d/one-%s", n, kind), func(b *testing.B) {
				answer(b)
				b.ReportAllocs()
				change, sent := 0, 0
				for b.Loop() {
					change++
					b.StopTimer()
					r := benchResource(b, change%n, change)
					if kind == "added" {
						r = benchResource(b, n+change, change)
					}
					b.StartTimer()
					cache.Apply([]Resource{r}, nil)
					sent = answer(b)
				}
				b.ReportMetric(float64(sent), "wire-B")
			})
		}
		b.Run(fmt.Sprintf("resources=%d/another-client", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				answer(b)
			}
		})
	}
}
