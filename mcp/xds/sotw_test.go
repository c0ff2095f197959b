package xds

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	xdscache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	xdsstream "github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// istiodTypes are what istiod 1.31 asks for, in its order.
var istiodTypes = []string{
	"core/v1alpha1/MeshConfig",
	"security.istio.io/v1/AuthorizationPolicy",
	"networking.istio.io/v1/DestinationRule",
	"networking.istio.io/v1alpha3/EnvoyFilter",
	"networking.istio.io/v1/Gateway",
	"security.istio.io/v1/PeerAuthentication",
	"networking.istio.io/v1beta1/ProxyConfig",
	"security.istio.io/v1/RequestAuthentication",
	"networking.istio.io/v1/ServiceEntry",
	"networking.istio.io/v1/Sidecar",
	"telemetry.istio.io/v1/Telemetry",
	"extensions.istio.io/v1alpha1/TrafficExtension",
	"networking.istio.io/v1/VirtualService",
	"extensions.istio.io/v1alpha1/WasmPlugin",
	"networking.istio.io/v1/WorkloadEntry",
	"networking.istio.io/v1/WorkloadGroup",
}

func TestFirstAnswersWaitForOpen(t *testing.T) {
	published := []string{
		seKind, drKind, "networking.istio.io/VirtualService", "networking.istio.io/EnvoyFilter",
		"extensions.istio.io/WasmPlugin", "extensions.istio.io/TrafficExtension",
	}
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			cache := newTestCache(t, Options{Published: published})
			c := newClient(t, dial(t, serve(t, cache)), protocol)
			held := map[string]bool{}
			for _, url := range istiodTypes {
				c.subscribe(url)
				held[url] = slices.Contains(published, canonicalType(url))
			}
			c.subscribe("future.istio.io/v1/Unknown")
			for range len(istiodTypes) - len(published) + 1 {
				r := c.next()
				if r.err != nil || held[r.url] || len(r.values) != 0 {
					t.Fatalf("answer before Open: %+v", r)
				}
				c.ack(r)
			}
			c.quiet()
			cache.Apply([]Resource{se("mcp/a", "1")}, nil)
			cache.Apply([]Resource{se("mcp/b", "1")}, nil)
			c.quiet()
			if cache.Opened() {
				t.Error("Opened before Open")
			}
			cache.Open()
			cache.Open()
			if !cache.Opened() {
				t.Error("not Opened after Open")
			}
			for range published {
				r := c.next()
				var want []string
				if r.url == seV1 {
					want = []string{"1", "1"}
				}
				if !held[r.url] || !slices.Equal(r.values, want) {
					t.Fatalf("answer after Open: %+v", r)
				}
				delete(held, r.url)
				c.ack(r)
			}
			c.quiet()
		})
	}
}

func TestFullStateSorted(t *testing.T) {
	cache := openCache(t, se("mcp/c", "c1"), se("mcp/a", "a1"), se("mcp/b", "b1"))
	c := sotwClient(t, serve(t, cache))
	c.subscribe(seV1)
	r := c.expect(seV1, "a1", "b1", "c1")
	for _, typ := range r.bodyTypes {
		if typ != mcpResource {
			t.Errorf("type of a resource is %s", typ)
		}
	}
	c.ack(r)
	c.quiet()
	cache.Apply([]Resource{se("mcp/b", "b2")}, nil)
	c.ack(c.expect(seV1, "a1", "b2", "c1"))
	cache.Apply([]Resource{se("mcp/aa", "x")}, []Ref{ref("mcp/c")})
	c.ack(c.expect(seV1, "a1", "x", "b2"))
	cache.Apply(nil, []Ref{ref("mcp/a"), ref("mcp/aa"), ref("mcp/b")})
	c.ack(c.expect(seV1))
	c.quiet()
}

func TestEveryVersionOfAType(t *testing.T) {
	cluster := Resource{Type: cds, Name: "c", Version: "1", Body: body("cluster")}
	cache := openCache(t, se("mcp/a", "1"), cluster)
	address := serve(t, cache)
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		c := newClient(t, dial(t, address), protocol)
		for _, version := range []string{"v1", "v1beta1", "v1alpha3", "v1alpha1"} {
			url := "networking.istio.io/" + version + "/ServiceEntry"
			c.subscribe(url)
			c.ack(c.expect(url, "1"))
		}
		for _, url := range []string{cds, strings.TrimPrefix(cds, googleAPIs)} {
			c.subscribe(url)
			c.ack(c.expect(url, "cluster"))
		}
		c.quiet()
	}
}

func TestOnlyOneResponseUnderWay(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			cache := openCache(t, se("mcp/a", "0"))
			c := newClient(t, dial(t, serve(t, cache)), protocol)
			c.subscribe(seV1)
			first := c.expect(seV1, "0")
			for i := range 200 {
				cache.Apply([]Resource{se("mcp/a", fmt.Sprint(i+1))}, nil)
			}
			c.quiet()
			c.ack(first)
			last := c.expect(seV1, "200")
			c.quiet()
			c.ack(last)
			c.quiet()
		})
	}
}

func TestRefusedResponseIsNotRepeated(t *testing.T) {
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		t.Run(protocol, func(t *testing.T) {
			reg := prometheus.NewPedanticRegistry()
			cache := newTestCache(t, Options{Registerer: reg})
			cache.Apply([]Resource{se("mcp/a", "good")}, nil)
			cache.Open()
			c := newClient(t, dial(t, serve(t, cache)), protocol)
			c.subscribe(seV1)
			good := c.expect(seV1, "good")
			c.ack(good)
			cache.Apply([]Resource{se("mcp/a", "bad")}, nil)
			bad := c.expect(seV1, "bad")
			c.nack(bad, good.version, "no such protocol")
			c.quiet()

			got := clientType(t, cache, seV1)
			if got.NACKs != 1 || got.LastError != "no such protocol" || got.LastErrorAt.IsZero() ||
				got.Sent != bad.version || got.Acked != good.version {
				t.Errorf("after a refusal: %+v", got)
			}
			if n := testutil.ToFloat64(cache.metrics.nacks.WithLabelValues(seKind)); n != 1 {
				t.Errorf("%v nacks counted", n)
			}
			cache.Apply([]Resource{se("mcp/a", "better")}, nil)
			c.ack(c.expect(seV1, "better"))
			c.quiet()
			if got := clientType(t, cache, seV1); got.Acked != got.Sent {
				t.Errorf("after the repair: %+v", got)
			}
		})
	}
}

func TestStaleNoncesAreIgnored(t *testing.T) {
	cache := openCache(t, se("mcp/a", "1"))
	c := sotwClient(t, serve(t, cache))
	c.subscribe(seV1)
	first := c.expect(seV1, "1")
	c.ack(first)
	cache.Apply([]Resource{se("mcp/a", "2")}, nil)
	second := c.expect(seV1, "2")
	// While the second is under way, and also after it was accepted, replies to the first mean nothing.
	for range 3 {
		c.ack(first)
		c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: seV1, ResponseNonce: "", VersionInfo: ""})
	}
	c.quiet()
	c.ack(second)
	for range 3 {
		c.ack(first)
		c.nack(first, "", "late")
		c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: seV1, ResponseNonce: "nonsense", VersionInfo: "nonsense"})
	}
	c.quiet()
	if n := testutil.ToFloat64(cache.metrics.stale.WithLabelValues(seKind)); n != 15 {
		t.Errorf("%v stale requests counted, want 15", n)
	}
	if got := clientType(t, cache, seV1); got.NACKs != 0 {
		t.Errorf("a stale refusal was counted: %+v", got)
	}
	cache.Apply([]Resource{se("mcp/a", "3")}, nil)
	c.ack(c.expect(seV1, "3"))
}

func TestVersionInfoMeansTheSameEverywhere(t *testing.T) {
	one := openCache(t)
	one.Apply([]Resource{se("mcp/a", "1"), se("mcp/x", "1")}, nil)
	one.Apply([]Resource{se("mcp/b", "old")}, nil)
	one.Apply([]Resource{se("mcp/b", "2")}, []Ref{ref("mcp/x")})
	c := sotwClient(t, serve(t, one))
	c.subscribe(seV1)
	r := c.expect(seV1, "1", "2")
	c.ack(r)

	// Another replica with the same content, loaded in another order, keeps the client waiting; a cold one is answered.
	two := openCache(t, se("mcp/b", "2"), se("mcp/a", "1"))
	address := serve(t, two)
	warm, cold := sotwClient(t, address), sotwClient(t, address)
	warm.sendSotw(&discovery.DiscoveryRequest{TypeUrl: seV1, VersionInfo: r.version, ResponseNonce: "from before"})
	warm.quiet()
	cold.subscribe(seV1)
	if got := cold.expect(seV1, "1", "2"); got.version != r.version {
		t.Errorf("version %s here, %s there", got.version, r.version)
	}
	two.Apply([]Resource{se("mcp/a", "3")}, nil)
	if got := warm.expect(seV1, "3", "2"); got.version == r.version {
		t.Error("the version did not change with the content")
	}

	// Going back to what was accepted is a change like any other.
	c.quiet()
	one.Apply([]Resource{se("mcp/a", "9")}, nil)
	changed := c.expect(seV1, "9", "2")
	one.Apply([]Resource{se("mcp/a", "1")}, nil)
	c.ack(changed)
	if got := c.expect(seV1, "1", "2"); got.version != r.version {
		t.Errorf("version %s after going back to %s", got.version, r.version)
	}
}

func TestEqualResourcesAreDropped(t *testing.T) {
	cache := openCache(t, se("mcp/a", "1"), se("mcp/b", "1"))
	c := sotwClient(t, serve(t, cache))
	c.subscribe(seV1)
	c.ack(c.expect(seV1, "1", "1"))
	cache.Apply([]Resource{se("mcp/a", "1"), se("mcp/b", "1")}, []Ref{ref("mcp/nothing"), {"no.such/Type", "x"}})
	unversioned := Resource{Type: drKind, Name: "mcp/r", Body: body("rule")}
	cache.Apply([]Resource{unversioned}, nil)
	cache.Apply([]Resource{unversioned}, []Ref{{drKind, "mcp/r"}}) // named in both: it stays
	c.quiet()
	if n := testutil.ToFloat64(cache.metrics.steps.WithLabelValues(drKind)); n != 1 {
		t.Errorf("%v steps of one DestinationRule", n)
	}
	if n := testutil.ToFloat64(cache.metrics.steps.WithLabelValues(seKind)); n != 1 {
		t.Errorf("%v steps of the ServiceEntries", n)
	}
}

func TestNamedSotw(t *testing.T) {
	load := func(name, content string) Resource {
		return Resource{Type: eds, Name: name, Version: content, Body: body(name + content)}
	}
	cache := openCache(t, load("a", "1"), load("b", "1"), load("c", "1"))
	address := serve(t, cache)
	c := sotwClient(t, address)
	c.subscribe(eds, "b", "none")
	r := c.expect(eds, "b1")
	c.ack(r, "b", "none")
	cache.Apply([]Resource{load("a", "2")}, nil)
	c.quiet() // not its business
	cache.Apply([]Resource{load("b", "2")}, nil)
	r = c.expect(eds, "b2")
	c.ack(r, "b", "none")
	cache.Apply([]Resource{load("none", "1")}, nil)
	r = c.expect(eds, "b2", "none1")
	c.ack(r, "b", "none", "a")
	r = c.expect(eds, "a2", "b2", "none1") // another name
	c.ack(r, "a")
	c.quiet() // fewer names need no answer
	c.ack(r, "a", "b")
	r = c.expect(eds, "a2", "b2") // what was given up must be told again
	c.ack(r, "a", "b", "absent")
	r = c.expect(eds, "a2", "b2") // that a name has no resource is an answer too
	c.ack(r, "a", "b", "absent")
	cache.Apply(nil, []Ref{{eds, "b"}})
	r = c.expect(eds, "a2")
	c.ack(r, "a", "b", "absent")
	c.quiet()

	again := sotwClient(t, address)
	again.sendSotw(&discovery.DiscoveryRequest{TypeUrl: eds, VersionInfo: r.version, ResourceNames: []string{"a", "b", "absent"}})
	again.quiet() // it has this already
	cache.Apply([]Resource{load("a", "3")}, nil)
	again.expect(eds, "a3")
	c.ack(c.expect(eds, "a3"))
	// From names to everything, and back.
	c.sendSotw(&discovery.DiscoveryRequest{TypeUrl: eds, ResourceNames: []string{"*"}, ResponseNonce: clientType(t, cache, eds).Nonce})
	r = c.expect(eds, "a3", "c1", "none1")
	c.ack(r, "c")
	c.quiet()
	cache.Apply([]Resource{load("a", "4")}, nil)
	c.quiet()
	cache.Apply([]Resource{load("c", "2")}, nil)
	c.ack(c.expect(eds, "c2"), "c")
}

// go-control-plane drops a response that it has not sent yet when another request of that type comes in.
func TestDroppedResponseIsMadeAnew(t *testing.T) {
	cache := openCache(t, se("a", "1"), se("b", "1"))
	st := cache.join(streamInfo{protocol: protocolSotw})
	st.admit(seV1, "", testNode)
	ask := func(names ...string) (chan xdscache.Response, func()) {
		out := make(chan xdscache.Response, 1)
		req := &discovery.DiscoveryRequest{TypeUrl: seV1, ResourceNames: names}
		closeWatch, err := st.CreateWatch(req, xdsstream.NewSotwSubscription(names, true), out)
		if err != nil {
			t.Fatal(err)
		}
		return out, closeWatch
	}
	out, closeWatch := ask("a")
	if len(out) != 1 {
		t.Fatal("no response")
	}
	closeWatch()
	closeWatch()
	out, closeWatch = ask("a")
	if len(out) != 1 {
		t.Fatal("the dropped response is lost")
	}
	closeWatch()
	st.leave()
	checkIdle(t, cache)
}

func TestRequestsWithoutUseDoNotEndTheStream(t *testing.T) {
	cache := openCache(t, se("mcp/a", "1"))
	c := sotwClient(t, serve(t, cache))
	c.sendSotw(&discovery.DiscoveryRequest{}) // no type
	for _, url := range []string{"//", "/", "a/b", "a/v1/b/c", "type.googleapis.com/", strings.Repeat("x", 1000)} {
		c.subscribe(url)
		c.ack(c.expect(url))
	}
	for i := range 2 * maxTypes { // more types than a stream may have: the last ones get nothing
		c.subscribe(fmt.Sprintf("many.test/v1/Kind%d", i))
	}
	for range maxTypes - 6 {
		if r := c.next(); r.err != nil || len(r.values) != 0 {
			t.Fatalf("got %+v", r)
		}
	}
	d := deltaClient(t, serve(t, cache))
	d.sendDelta(&discovery.DeltaDiscoveryRequest{})
	d.subscribe(seV1)
	d.expect(seV1, "1")

	cache.mu.Lock()
	n := len(cache.collections)
	cache.mu.Unlock()
	if n < maxTypes {
		t.Errorf("only %d collections", n)
	}
	c.cancel()
	eventually(t, "types nobody asks for any more are forgotten", func() bool {
		cache.mu.Lock()
		defer cache.mu.Unlock()
		return len(cache.collections) == 4
	})
}

// clientType returns what the cache says of the only stream that asked for that type.
func clientType(t *testing.T, c *Cache, url string) ClientType {
	t.Helper()
	var found []ClientType
	for _, cl := range c.Clients() {
		for _, typ := range cl.Types {
			if typ.TypeURL == url {
				found = append(found, typ)
			}
		}
	}
	if len(found) == 0 {
		t.Fatalf("no stream asked for %s", url)
	}
	return found[0]
}
