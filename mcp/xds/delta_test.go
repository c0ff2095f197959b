package xds

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// expectDelta is next for a response with these resources and removals.
func (c *testClient) expectDelta(url string, names, removed []string) received {
	c.t.Helper()
	r := c.next()
	if r.err != nil {
		c.t.Fatalf("stream ended: %v", r.err)
	}
	if r.url != url || !slices.Equal(r.names, names) || !slices.Equal(r.removed, removed) {
		c.t.Fatalf("got %s %q, removed %q; want %s %q, removed %q", r.url, r.names, r.removed, url, names, removed)
	}
	return r
}

func TestDeltaOnlyChanges(t *testing.T) {
	cache := openCache(t, se("c", "1"), se("a", "1"), se("b", "1"))
	c := deltaClient(t, serve(t, cache))
	c.subscribe(seV1)
	r := c.expectDelta(seV1, []string{"a", "b", "c"}, nil)
	if want := map[string]string{"a": "v-1", "b": "v-1", "c": "v-1"}; !maps.Equal(r.versions, want) {
		t.Errorf("versions %v", r.versions)
	}
	for _, typ := range r.bodyTypes {
		if typ != mcpResource {
			t.Errorf("type of a resource is %s", typ)
		}
	}
	c.ack(r)
	c.quiet()
	cache.Apply([]Resource{se("b", "2")}, nil)
	c.ack(c.expectDelta(seV1, []string{"b"}, nil))
	cache.Apply([]Resource{se("d", "1")}, []Ref{ref("a")})
	r = c.expectDelta(seV1, []string{"d"}, []string{"a"})

	// What happens while a response is under way is told at once afterwards, each name once.
	cache.Apply([]Resource{se("b", "3"), se("e", "1")}, nil)
	cache.Apply([]Resource{se("b", "4"), se("brief", "1")}, []Ref{ref("d")})
	cache.Apply([]Resource{se("a", "9")}, []Ref{ref("brief"), ref("c")})
	c.quiet()
	c.ack(r)
	r = c.expectDelta(seV1, []string{"a", "b", "e"}, []string{"c", "d"})
	if !slices.Equal(r.values, []string{"9", "4", "1"}) {
		t.Errorf("bodies %q", r.values)
	}
	c.ack(r)
	c.quiet()
}

func TestDeltaRemovalSurvivesReturn(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"))
	c := deltaClient(t, serve(t, cache))
	c.subscribe(seV1)
	r := c.expectDelta(seV1, []string{"a", "b"}, nil)
	// The client has a; it goes, comes back and goes again before the client is told anything.
	cache.Apply(nil, []Ref{ref("a")})
	cache.Apply([]Resource{se("a", "2")}, nil)
	cache.Apply(nil, []Ref{ref("a")})
	c.ack(r)
	c.ack(c.expectDelta(seV1, nil, []string{"a"}))
	c.quiet()
}

func TestDeltaReconnect(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"), se("c", "2"))
	address := serve(t, cache)
	c := deltaClient(t, address)
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, InitialResourceVersions: map[string]string{
		"b": "v-1", "c": "v-1", "gone": "v-1",
	}})
	c.ack(c.expectDelta(seV1, []string{"a", "c"}, []string{"gone"}))
	c.quiet()
	cache.Apply([]Resource{se("b", "2")}, nil)
	c.ack(c.expectDelta(seV1, []string{"b"}, nil))

	// Who has everything gets an empty first answer, which it waits for.
	same := deltaClient(t, address)
	same.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, InitialResourceVersions: map[string]string{
		"a": "v-1", "b": "v-2", "c": "v-2",
	}})
	same.ack(same.expectDelta(seV1, nil, nil))
	same.quiet()

	named := deltaClient(t, address)
	named.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: []string{"a", "b", "gone"},
		InitialResourceVersions: map[string]string{"a": "v-1", "b": "v-1", "gone": "v-1"}})
	named.ack(named.expectDelta(seV1, []string{"b"}, []string{"gone"}))
	named.quiet()
}

func TestDeltaNamed(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"), se("c", "1"))
	c := deltaClient(t, serve(t, cache))
	c.subscribe(seV1, "b", "none")
	r := c.expectDelta(seV1, []string{"b"}, []string{"none"})
	c.ack(r)
	cache.Apply([]Resource{se("a", "2")}, nil)
	c.quiet()
	cache.Apply([]Resource{se("b", "2"), se("none", "1")}, nil)
	r = c.expectDelta(seV1, []string{"b", "none"}, nil)

	// A change of the subscription while a response is under way waits for the reply.
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: []string{"a", "c"}})
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"c", "b"}})
	c.quiet()
	c.ack(r)
	c.ack(c.expectDelta(seV1, []string{"a"}, nil))
	c.quiet()
	cache.Apply([]Resource{se("b", "3"), se("c", "2")}, nil)
	c.quiet()

	// A name that is asked for again is told again.
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: []string{"a", "b"}})
	c.ack(c.expectDelta(seV1, []string{"a", "b"}, nil))
	cache.Apply(nil, []Ref{ref("a"), ref("c")})
	c.ack(c.expectDelta(seV1, nil, []string{"a"}))

	// To everything and back.
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesSubscribe: []string{"*"}})
	c.ack(c.expectDelta(seV1, []string{"b", "none"}, nil))
	cache.Apply([]Resource{se("z", "1")}, nil)
	c.ack(c.expectDelta(seV1, []string{"z"}, nil))
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"b"}})
	c.ack(c.expectDelta(seV1, []string{"b"}, nil)) // wanted still, with everything: told how it stands
	c.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, ResourceNamesUnsubscribe: []string{"*"}})
	c.quiet()
	cache.Apply([]Resource{se("z", "2"), se("b", "9")}, nil)
	c.quiet()
	cache.Apply([]Resource{se("none", "2")}, nil)
	c.ack(c.expectDelta(seV1, []string{"none"}, nil))
	c.quiet()
}

// A stream may ask for more types than go-control-plane's channel has room for. While its client takes nothing, no step
// may wait for it, and nothing may be lost.
func TestDeltaMoreTypesThanTheChannelHolds(t *testing.T) {
	cache := openCache(t)
	c := deltaClient(t, serve(t, cache))
	const types = 100
	seen := map[string]string{}
	for i := range types {
		url := fmt.Sprintf("networking.istio.io/v%d/ServiceEntry", i+1)
		c.subscribe(url)
		c.ack(c.expect(url))
		seen[url] = ""
	}
	c.quiet()
	for i := range 50 {
		cache.Apply([]Resource{se("a", strconv.Itoa(i))}, nil)
	}
	for {
		r := c.next()
		if r.err != nil {
			t.Fatal(r.err)
		}
		c.ack(r)
		if len(r.values) == 1 {
			seen[r.url] = r.values[0]
		}
		if !slices.ContainsFunc(slices.Collect(maps.Values(seen)), func(v string) bool { return v != "49" }) {
			break
		}
	}
	c.quiet()
}

func TestDeltaClientBehindForgottenRemovals(t *testing.T) {
	const few = 100
	cache := openCache(t, manySE(3*few, "1")...)
	cache.mu.Lock()
	cache.collections[collectionKey{typ: seKind}].remember = few
	cache.mu.Unlock()
	address := serve(t, cache)
	slow, named := deltaClient(t, address), deltaClient(t, address)
	slow.subscribe(seV1)
	r := slow.next()
	if len(r.names) != 3*few {
		t.Fatalf("%d names", len(r.names))
	}
	named.subscribe(seV1, "mcp/svc-000000", "mcp/svc-999999")
	rn := named.expectDelta(seV1, []string{"mcp/svc-000000"}, []string{"mcp/svc-999999"})

	var all []Ref
	for _, s := range manySE(3*few, "1") {
		all = append(all, ref(s.Name))
	}
	cache.Apply([]Resource{se("x", "1")}, all)
	cache.mu.Lock()
	n := len(cache.collections[collectionKey{typ: seKind}].nodes)
	cache.mu.Unlock()
	if n > few+1 {
		t.Errorf("%d names are remembered", n)
	}
	// Names still come out right; who wants everything has to say what it has, on a new stream.
	named.ack(rn)
	named.ack(named.expectDelta(seV1, nil, []string{"mcp/svc-000000", "mcp/svc-999999"}))
	named.quiet()
	slow.ack(r)
	if end := slow.next(); status.Code(end.err) != codes.Aborted {
		t.Fatalf("got %+v, want the stream to end", end)
	}
	again := deltaClient(t, address)
	again.sendDelta(&discovery.DeltaDiscoveryRequest{TypeUrl: seV1, InitialResourceVersions: r.versions})
	if r := again.next(); len(r.removed) != 3*few || !slices.Equal(r.names, []string{"x"}) {
		t.Fatalf("after the reconnect: %d removed, %q", len(r.removed), r.names)
	}
}

// Clients of all kinds, some of them slow, follow a cache that changes at random, and end with what it ends with.
func TestClientsConverge(t *testing.T) {
	cache := newTestCache(t, Options{ShardCounts: []int{4}})
	s := serveWith(t, cache, ServerOptions{Shards: []ShardListen{{Count: 4, Address: "127.0.0.1:0"}}})
	base, shards := s.Addresses()

	type follower struct {
		c     *testClient
		want  func(Resource) bool
		names []string
	}
	var followers []follower
	all := func(Resource) bool { return true }
	for range 3 {
		for _, protocol := range []string{protocolSotw, protocolDelta} {
			conn := dial(t, base.String())
			followers = append(followers, follower{newClient(t, conn, protocol), all, nil})
			names := []string{"n3", "n5", "n7", "n77"}
			followers = append(followers, follower{newClient(t, conn, protocol),
				func(r Resource) bool { return slices.Contains(names, r.Name) }, names})
			for i, addr := range shards[4] {
				followers = append(followers, follower{newClient(t, dial(t, addr.String()), protocol),
					func(r Resource) bool { return shardOf(r.Shard, 4) == i }, nil})
			}
		}
	}
	for _, f := range followers {
		f.c.subscribe(seV1, f.names...)
	}

	final := map[string]string{}
	var writing sync.WaitGroup
	writing.Go(func() {
		rng := rand.New(rand.NewPCG(1, 2))
		for i := range 600 {
			var changed []Resource
			var removed []Ref
			for range 1 + rng.IntN(5) {
				r := se("n"+strconv.Itoa(rng.IntN(40)), strconv.Itoa(i))
				if rng.IntN(3) == 0 {
					r.Shard = strconv.Itoa(rng.IntN(9)) // it may move between shards
				}
				changed = append(changed, r)
			}
			for range rng.IntN(5) {
				removed = append(removed, ref("n"+strconv.Itoa(rng.IntN(40))))
			}
			cache.Apply(changed, removed)
			if i == 50 {
				cache.Open()
			}
		}
		cache.Apply([]Resource{se("n3", "end"), se("n77", "end")}, []Ref{ref("n5")})
		// A mark in each shard tells its followers that nothing comes after it.
		for _, r := range marks() {
			cache.Apply([]Resource{r}, nil)
		}
	})
	writing.Wait()
	resources := cache.Resources(seV1)
	for _, r := range resources {
		final[r.Name] = string(r.Body.GetValue())
	}

	var reading sync.WaitGroup
	for _, f := range followers {
		reading.Go(func() {
			want := map[string]string{}
			for _, r := range resources {
				if f.want(r) {
					want[r.Name] = final[r.Name]
				}
			}
			if err := f.c.follow(want); err != nil {
				t.Errorf("%s client of %v: %v", map[bool]string{true: protocolSotw, false: protocolDelta}[f.c.sotw != nil], f.names, err)
			}
		})
	}
	reading.Wait()
	for _, f := range followers {
		f.c.quiet()
	}
	counts := cache.Counts()
	if counts[seKind] != len(final) || counts[drKind] != 0 {
		t.Errorf("counts %v, %d resources", counts, len(final))
	}
}

// marks are resources of which each shard of 4 gets one.
func marks() []Resource {
	var out []Resource
	for i := range 4 {
		for j := 0; ; j++ {
			text := strconv.Itoa(j)
			if shardOf(text, 4) == i {
				r := se("mark"+strconv.Itoa(i), "mark")
				r.Shard = text
				out = append(out, r)
				break
			}
		}
	}
	return out
}

// follow replies to responses until they add up to want. The state-of-the-world test client knows no names: there it
// compares the bodies.
func (c *testClient) follow(want map[string]string) error {
	have := map[string]string{}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	for {
		var r received
		select {
		case r = <-c.in:
		case <-ctx.Done():
			return fmt.Errorf("has %v, want %v", have, want)
		}
		if r.err != nil {
			return r.err
		}
		if c.sotw != nil {
			if err := c.sotw.Send(&discovery.DiscoveryRequest{TypeUrl: r.url, VersionInfo: r.version, ResponseNonce: r.nonce,
				ResourceNames: c.names}); err != nil {
				return err
			}
			a, b := slices.Sorted(slices.Values(r.values)), slices.Sorted(maps.Values(want))
			have = map[string]string{"values": fmt.Sprint(a)}
			if slices.Equal(a, b) {
				return nil
			}
			continue
		}
		if err := c.delta.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.url, ResponseNonce: r.nonce}); err != nil {
			return err
		}
		for i, name := range r.names {
			have[name] = r.values[i]
		}
		for _, name := range r.removed {
			delete(have, name)
		}
		if maps.Equal(have, want) {
			return nil
		}
	}
}
