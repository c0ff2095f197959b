package xds

import (
	"fmt"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestCanonicalType(t *testing.T) {
	for url, want := range map[string]string{
		"networking.istio.io/v1/ServiceEntry":              "networking.istio.io/ServiceEntry",
		"networking.istio.io/v1beta1/ServiceEntry":         "networking.istio.io/ServiceEntry",
		"networking.istio.io/v1alpha3/ServiceEntry":        "networking.istio.io/ServiceEntry",
		"networking.istio.io/ServiceEntry":                 "networking.istio.io/ServiceEntry",
		"extensions.istio.io/v1alpha1/WasmPlugin":          "extensions.istio.io/WasmPlugin",
		"core/v1alpha1/MeshConfig":                         "core/MeshConfig",
		"type.googleapis.com/envoy.config.cluster.v3.X":    "type.googleapis.com/envoy.config.cluster.v3.X",
		"envoy.config.cluster.v3.X":                        "type.googleapis.com/envoy.config.cluster.v3.X",
		"networking.istio.io/vX/ServiceEntry":              "networking.istio.io/vX/ServiceEntry",
		"networking.istio.io/v1gamma1/ServiceEntry":        "networking.istio.io/v1gamma1/ServiceEntry",
		"networking.istio.io/v1/ServiceEntry/more":         "networking.istio.io/v1/ServiceEntry/more",
		"security.istio.io/v1/ServiceEntry":                "security.istio.io/ServiceEntry",
		"type.googleapis.com/networking.istio.io/v1/Gatew": "networking.istio.io/Gatew",
	} {
		if got := canonicalType(url); got != want {
			t.Errorf("canonicalType(%q) = %q, want %q", url, got, want)
		}
		if got := canonicalType(canonicalType(url)); got != want {
			t.Errorf("canonicalType(%q) is not stable: %q", url, got)
		}
	}
}

// What is written by hand must be read by the protocol's own code as what was meant.
func TestEncoding(t *testing.T) {
	bodies := []*anypb.Any{
		{TypeUrl: mcpResource, Value: []byte("some bytes")},
		{TypeUrl: mcpResource, Value: []byte(strings.Repeat("x", 300))},
		{TypeUrl: mcpResource, Value: []byte(strings.Repeat("x", 70000))},
		{TypeUrl: mcpResource},
		{Value: []byte("no type")},
		{},
		nil,
	}
	var items []*item
	wantSotw := &discovery.DiscoveryResponse{VersionInfo: "v", TypeUrl: "url", Nonce: "7"}
	wantDelta := &discovery.DeltaDiscoveryResponse{SystemVersionInfo: "v", TypeUrl: "url", Nonce: "7", RemovedResources: []string{"x", "y"}}
	for i, b := range bodies {
		r := Resource{Type: seKind, Name: strings.Repeat("n", i*i*9), Version: fmt.Sprint("version", i), Shard: "s", Body: b}
		it := newItem(r)
		items = append(items, it)
		sent := proto.CloneOf(b)
		if sent == nil {
			sent = &anypb.Any{}
		}
		wantSotw.Resources = append(wantSotw.Resources, sent)
		wantDelta.Resources = append(wantDelta.Resources, &discovery.Resource{Name: r.Name, Version: r.Version, Resource: sent})

		back := it.resource(seKind)
		if !proto.Equal(back.Body, sent) || back.Name != r.Name || back.Version != r.Version || back.Shard != "s" || back.Type != seKind {
			t.Errorf("resource %d is given back as %v", i, back)
		}
	}
	sotw := &answer{}
	delta := &answer{removed: []string{"x", "y"}}
	for _, it := range items {
		sotw.add(it.sotw)
		delta.add(it.delta)
	}
	s := &subscription{url: "url"}
	for _, c := range []struct {
		name      string
		answer    *answer
		got, want proto.Message
	}{
		{"sotw", sotw, &discovery.DiscoveryResponse{}, wantSotw},
		{"delta", delta, &discovery.DeltaDiscoveryResponse{}, wantDelta},
	} {
		f := &flight{sub: s, answer: c.answer, version: "v"}
		wire, err := newCodec().Marshal(f.encode("7"))
		if err != nil {
			t.Fatal(err)
		}
		if err := proto.Unmarshal(wire.Materialize(), c.got); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if !proto.Equal(c.got, c.want) {
			t.Errorf("%s: other than what was meant: %.2000v", c.name, c.got)
		}
		size := 0
		for _, b := range c.answer.resources {
			size += b.Len()
		}
		if c.answer.bytes != size {
			t.Errorf("%s: %d bytes counted, %d there", c.name, c.answer.bytes, size)
		}
	}
}

func TestVersionWithoutVersion(t *testing.T) {
	a := newItem(Resource{Name: "n", Body: body("1")})
	b := newItem(Resource{Name: "n", Body: body("1")})
	c := newItem(Resource{Name: "n", Body: body("2")})
	if a.version == "" || a.version != b.version || a.version == c.version {
		t.Errorf("versions %q %q %q", a.version, b.version, c.version)
	}
}

// The shards of a text never change: clients rely on it across releases.
func TestShardOf(t *testing.T) {
	for text, want := range map[string]int{"": 4, "order.DEFAULT-GROUP.public.nacos": 0, "a": 10} {
		if got := shardOf(text, 16); got != want {
			t.Errorf("shardOf(%q, 16) = %d, want %d", text, got, want)
		}
	}
	var n [16]int
	for i := range 16000 {
		n[shardOf(fmt.Sprintf("svc-%d.static", i), 16)]++
	}
	for i, got := range n {
		if got < 800 || got > 1200 {
			t.Errorf("shard %d has %d of 16000", i, got)
		}
	}
}
