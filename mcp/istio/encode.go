package istio

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	mcpv1alpha1 "istio.io/api/mcp/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
)

const (
	typePrefix   = "type.googleapis.com/"
	resourceType = typePrefix + "istio.mcp.v1alpha1.Resource"
)

// created is the creation time of every resource: 1 January 2026. istiod compares creation times where a host is claimed
// twice, and takes a change of one for a change of the resource, so it must be the same at each start and each replica.
func created() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

// Encode returns o as istiod reads it: an istio.mcp.v1alpha1.Resource named "namespace/name". The version is a hash of
// all the rest, so it changes if and only if something else does; istiod ignores a change without a new version. Equal
// objects give equal bytes.
func Encode(o Object) (name, version string, body *anypb.Any, err error) {
	if o.Spec == nil {
		return "", "", nil, fmt.Errorf("encode %s %s/%s: it has no spec", o.Kind, o.Namespace, o.Name)
	}
	name = o.Namespace + "/" + o.Name
	spec, err := marshalSpec(o.Spec)
	if err != nil {
		return "", "", nil, fmt.Errorf("encode the spec of %s %s: %w", o.Kind, name, err)
	}
	// The wrapper is written by hand, so that the body is copied but once.
	meta, err := proto.MarshalOptions{Deterministic: true}.Marshal(&mcpv1alpha1.Metadata{
		Name: name, CreateTime: timestamppb.New(created()), Labels: o.Labels,
	})
	if err != nil {
		return "", "", nil, fmt.Errorf("encode the metadata of %s %s: %w", o.Kind, name, err)
	}
	hash := sha256.New()
	hash.Write(binary.AppendUvarint(nil, uint64(len(meta))))
	hash.Write(meta)
	hash.Write(spec)
	version = hex.EncodeToString(hash.Sum(nil)[:8])
	meta = appendText(meta, 3, version) // Metadata.version

	typeURL := typePrefix + string(o.Spec.ProtoReflect().Descriptor().FullName())
	inner := 2 + protowire.SizeBytes(len(typeURL)) + protowire.SizeBytes(len(spec))
	value := make([]byte, 0, 2+protowire.SizeBytes(len(meta))+protowire.SizeBytes(inner))
	value = protowire.AppendTag(value, 1, protowire.BytesType) // Resource.metadata
	value = protowire.AppendBytes(value, meta)
	value = protowire.AppendTag(value, 2, protowire.BytesType) // Resource.body
	value = protowire.AppendVarint(value, uint64(inner))
	value = appendText(value, 1, typeURL)                      // Any.type_url
	value = protowire.AppendTag(value, 2, protowire.BytesType) // Any.value
	value = protowire.AppendBytes(value, spec)
	return name, version, &anypb.Any{TypeUrl: resourceType, Value: value}, nil
}

// Decode reads what Encode wrote.
func Decode(body *anypb.Any) (o Object, version string, err error) {
	var res mcpv1alpha1.Resource
	if err := body.UnmarshalTo(&res); err != nil {
		return Object{}, "", fmt.Errorf("decode a resource: %w", err)
	}
	name := res.GetMetadata().GetName()
	ns, short, ok := strings.Cut(name, "/")
	if !ok {
		return Object{}, "", fmt.Errorf("decode resource %q: its name is not namespace/name", name)
	}
	if res.Body == nil {
		return Object{}, "", fmt.Errorf("decode resource %s: it has no body", name)
	}
	spec, err := res.Body.UnmarshalNew()
	if err != nil {
		return Object{}, "", fmt.Errorf("decode the body of resource %s: %w", name, err)
	}
	o = Object{Kind: kindOf(spec), Namespace: ns, Name: short, Labels: res.Metadata.Labels, Spec: spec}
	if o.Kind == "" {
		return Object{}, "", fmt.Errorf("decode resource %s: its body is a %T", name, spec)
	}
	return o, res.Metadata.Version, nil
}

// kindOf returns the kind of resource that spec is the spec of; empty for others than those that Render makes.
func kindOf(spec proto.Message) string {
	switch spec.(type) {
	case *networking.ServiceEntry:
		return ServiceEntryKind
	case *networking.DestinationRule:
		return DestinationRuleKind
	}
	return ""
}

// JSON returns o in the form in which istiod prints it at /debug/configz.
func JSON(o Object, version string) ([]byte, error) {
	type metadata struct {
		Name              string            `json:"name"`
		Namespace         string            `json:"namespace"`
		ResourceVersion   string            `json:"resourceVersion"`
		CreationTimestamp time.Time         `json:"creationTimestamp"`
		Labels            map[string]string `json:"labels,omitempty"`
	}
	group, kind, ok := strings.Cut(o.Kind, "/")
	if !ok || o.Spec == nil {
		return nil, errors.New("print a resource: it has no kind or no spec")
	}
	spec, err := protojson.Marshal(o.Spec)
	if err != nil {
		return nil, fmt.Errorf("print the spec of %s %s/%s: %w", kind, o.Namespace, o.Name, err)
	}
	return json.Marshal(struct {
		Kind       string          `json:"kind"`
		APIVersion string          `json:"apiVersion"`
		Metadata   metadata        `json:"metadata"`
		Spec       json.RawMessage `json:"spec"`
	}{kind, group + "/v1", metadata{o.Name, o.Namespace, version, created(), o.Labels}, spec})
}
