package istio_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
)

func encode(t *testing.T, o istio.Object) (string, *anypb.Any) {
	t.Helper()
	_, version, body, err := istio.Encode(o)
	if err != nil {
		t.Fatal(err)
	}
	return version, body
}

// TestEncodeShape reads the bytes as istiod does.
func TestEncodeShape(t *testing.T) {
	o := entry(nil)
	o.Labels = map[string]string{"higress-registry-type": "static"}
	name, version, body, err := istio.Encode(o)
	if err != nil {
		t.Fatal(err)
	}
	if body.TypeUrl != "type.googleapis.com/istio.mcp.v1alpha1.Resource" {
		t.Errorf("type %s", body.TypeUrl)
	}
	var res mcpv1alpha1.Resource
	if err := body.UnmarshalTo(&res); err != nil {
		t.Fatal(err)
	}
	m := res.Metadata
	if m.Name != "mcp/a.example" || m.Name != name || m.Version != version || len(version) != 16 ||
		!m.CreateTime.AsTime().Equal(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) ||
		m.Labels["higress-registry-type"] != "static" || len(m.Annotations) != 0 {
		t.Errorf("metadata %v", m)
	}
	if res.Body.TypeUrl != "type.googleapis.com/istio.networking.v1alpha3.ServiceEntry" {
		t.Errorf("body type %s", res.Body.TypeUrl)
	}
	spec, err := res.Body.UnmarshalNew()
	if err != nil || !proto.Equal(spec, o.Spec) {
		t.Errorf("%v: spec %v, want %v", err, spec, o.Spec)
	}
}

// TestVersion holds that the version changes with each part of the content, and with nothing else.
func TestVersion(t *testing.T) {
	many := map[string]string{}
	for i := range 50 {
		many[strings.Repeat("k", i+1)] = "v"
	}
	service := mcp.Service{
		Host: "a.b", Port: 80, Protocol: mcp.HTTP, RegistryType: "static", RegistryName: "a",
		Endpoints: []mcp.Endpoint{
			{Address: "10.0.0.1", Port: 80, Labels: labels.FromMap(many)},
			{Address: "10.0.0.2", Port: 80, Labels: labels.FromMap(many)},
		},
	}
	version, body := encode(t, istio.Stock.Render(service)[0])
	for range 20 {
		v, b := encode(t, istio.Stock.Render(service)[0])
		if v != version || !bytes.Equal(b.Value, body.Value) {
			t.Fatal("the same service gave other bytes")
		}
	}
	seen := map[string]string{version: "the service itself"}
	changes := map[string]func(*istio.Object, *networking.ServiceEntry){
		"name":      func(o *istio.Object, _ *networking.ServiceEntry) { o.Name = "x" },
		"namespace": func(o *istio.Object, _ *networking.ServiceEntry) { o.Namespace = "x" },
		"labels":    func(o *istio.Object, _ *networking.ServiceEntry) { o.Labels = nil },
		"label":     func(o *istio.Object, _ *networking.ServiceEntry) { o.Labels["higress-registry-name"] = "b" },
		"host":      func(_ *istio.Object, e *networking.ServiceEntry) { e.Hosts[0] = "x" },
		"weight":    func(_ *istio.Object, e *networking.ServiceEntry) { e.Endpoints[1].Weight = 2 },
		"removal":   func(_ *istio.Object, e *networking.ServiceEntry) { e.Endpoints = e.Endpoints[:1] },
	}
	for what, change := range changes {
		o := istio.Stock.Render(service)[0]
		change(&o, o.Spec.(*networking.ServiceEntry))
		v, _ := encode(t, o)
		if other, ok := seen[v]; ok {
			t.Errorf("version %s for a changed %s and for %s", v, what, other)
		}
		seen[v] = "a changed " + what
	}
}

func TestEncodeErrors(t *testing.T) {
	for name, o := range map[string]istio.Object{
		"no spec": {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one"},
		"address": {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one", Spec: &networking.ServiceEntry{
			Endpoints: []*networking.WorkloadEntry{{Address: "\xff"}},
		}},
		"port name": {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one", Spec: &networking.ServiceEntry{
			Endpoints: []*networking.WorkloadEntry{{Ports: map[string]uint32{"\xff": 1}}},
		}},
		"endpoint's label": {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one", Spec: &networking.ServiceEntry{
			Endpoints: []*networking.WorkloadEntry{{Labels: map[string]string{"a": "\xff"}}},
		}},
		"spec":          {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one", Spec: &networking.ServiceEntry{Hosts: []string{"\xff"}}},
		"label's value": {Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "the-one", Labels: map[string]string{"a": "\xff"}, Spec: &networking.ServiceEntry{}},
	} {
		if _, _, _, err := istio.Encode(o); err == nil || !strings.Contains(err.Error(), "mcp/the-one") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	pack := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	meta := &mcpv1alpha1.Metadata{Name: "mcp/x"}
	for name, body := range map[string]*anypb.Any{
		"nothing":      nil,
		"no wrapper":   pack(&networking.ServiceEntry{}),
		"no metadata":  pack(&mcpv1alpha1.Resource{Body: pack(&networking.ServiceEntry{})}),
		"no body":      pack(&mcpv1alpha1.Resource{Metadata: meta}),
		"unknown type": pack(&mcpv1alpha1.Resource{Metadata: meta, Body: &anypb.Any{TypeUrl: "type.googleapis.com/x.Y"}}),
		"other kind":   pack(&mcpv1alpha1.Resource{Metadata: meta, Body: pack(&networking.Gateway{})}),
		"rubbish":      {TypeUrl: pack(&mcpv1alpha1.Resource{}).TypeUrl, Value: []byte{0xff}},
		"rubbish inside": pack(&mcpv1alpha1.Resource{Metadata: meta, Body: &anypb.Any{
			TypeUrl: pack(&networking.ServiceEntry{}).TypeUrl, Value: []byte{0xff},
		}}),
	} {
		if o, _, err := istio.Decode(body); err == nil {
			t.Errorf("%s: decoded as %v", name, o)
		}
	}
}

// TestJSON holds the shape of istiod's own page.
func TestJSON(t *testing.T) {
	o := entry(nil)
	o.Labels = map[string]string{"registry": "demo"}
	got, err := istio.JSON(o, "1f")
	want := `{"kind":"ServiceEntry","apiVersion":"networking.istio.io/v1","metadata":{"name":"a.example","namespace":"mcp",` +
		`"resourceVersion":"1f","creationTimestamp":"2026-01-01T00:00:00Z","labels":{"registry":"demo"}},"spec":{"hosts":["a.example"],` +
		`"ports":[{"number":80,"protocol":"HTTP","name":"HTTP"}],"location":"MESH_INTERNAL","resolution":"STATIC",` +
		`"endpoints":[{"address":"10.0.0.1","ports":{"HTTP":8080},"labels":{"version":"v1"}}]}}`
	if err != nil || string(got) != want {
		t.Errorf("%v:\n%s\nwant\n%s", err, got, want)
	}
	for _, bad := range []istio.Object{{}, {Kind: istio.ServiceEntryKind}, {Kind: "x", Spec: o.Spec}} {
		if _, err := istio.JSON(bad, ""); err == nil {
			t.Errorf("%v was printed", bad)
		}
	}
}

// FuzzDecode holds that no bytes of a peer bring the reader down, and that what is read can be printed.
func FuzzDecode(f *testing.F) {
	for _, o := range istio.Stock.Render(mcp.Service{Host: "a", Port: 443, Protocol: mcp.HTTPS, TLS: &mcp.TLS{SNI: "b"}}) {
		_, _, body, err := istio.Encode(o)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(body.Value)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		o, version, err := istio.Decode(&anypb.Any{TypeUrl: "type.googleapis.com/istio.mcp.v1alpha1.Resource", Value: b})
		if err != nil {
			return
		}
		if _, err := istio.JSON(o, version); err != nil {
			t.Errorf("decoded, but: %v", err)
		}
		_ = istio.Stock.Check(o) // must not panic
	})
}

// TestAllFieldsAreEncoded holds that nothing of a resource is lost on the way, fields included that Render never sets.
func TestAllFieldsAreEncoded(t *testing.T) {
	if n := (&networking.WorkloadEntry{}).ProtoReflect().Descriptor().Fields().Len(); n != 7 {
		t.Fatalf("WorkloadEntry has %d fields now: write them all in wire.go", n)
	}
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1)
	full := &networking.WorkloadEntry{
		Address: "10.0.0.1", Ports: map[string]uint32{"a": 0, "": 70000, "b": 1}, Labels: map[string]string{"": "", "a": "b", "c": ""},
		Network: "n", Locality: "l", Weight: 1 << 31, ServiceAccount: "sa",
	}
	full.ProtoReflect().SetUnknown(unknown)
	o := entry(func(e *networking.ServiceEntry) {
		e.Addresses, e.ExportTo, e.SubjectAltNames = []string{"240.0.0.1"}, []string{"."}, []string{"san"}
		e.WorkloadSelector = &networking.WorkloadSelector{Labels: map[string]string{"a": "b"}}
		e.Endpoints = append(e.Endpoints, full, &networking.WorkloadEntry{})
		e.ProtoReflect().SetUnknown(unknown)
	})
	_, body := encode(t, o)
	got, _, err := istio.Decode(body)
	if err != nil || !proto.Equal(got.Spec, o.Spec) {
		t.Errorf("%v:\n%v\nwant\n%v", err, got.Spec, o.Spec)
	}
	o.Spec.(*networking.ServiceEntry).Endpoints[0] = nil // not refused before Check
	if _, _, _, err := istio.Encode(o); err != nil {
		t.Error(err)
	}
}
