package xds

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"regexp"
	"strings"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"
)

// A Resource is one opaque resource of a collection.
type Resource struct {
	// Type is "group/Kind" for Istio's kinds ("networking.istio.io/ServiceEntry"), the full type URL for Envoy's types.
	Type string
	// Name is unique within the type.
	Name string
	// Version changes if and only if the content changes: two resources with one name and one version are taken as
	// equal. An empty one is replaced by a hash of Body.
	Version string
	// Shard is the text that chooses the resource's shard; resources that belong together share it.
	Shard string
	// Body is sent as it is. It is handed over: the caller never writes to it again.
	Body *anypb.Any
}

// A Ref names a resource.
type Ref struct {
	Type, Name string
}

const googleAPIs = "type.googleapis.com/"

var istioVersion = regexp.MustCompile(`^v[0-9]+((alpha|beta)[0-9]+)?$`)

// canonicalType turns a requested or published type into the key of its collection: Istio's group/version/Kind loses the
// version, since releases of istiod ask for one kind by different versions of it; Envoy's types get their URL prefix.
func canonicalType(url string) string {
	rest := strings.TrimPrefix(url, googleAPIs)
	parts := strings.Split(rest, "/")
	switch {
	case len(parts) == 1:
		return googleAPIs + rest
	case len(parts) == 3 && istioVersion.MatchString(parts[1]):
		return parts[0] + "/" + parts[2]
	default:
		return rest
	}
}

// A digest is a sum, modulo 2^128, of hashes. Being independent of order, it gives a set of resources the same version in
// every replica and after every restart, and follows a change at the cost of that change.
type digest struct{ hi, lo uint64 }

func digestOf(name, version string) digest {
	buf := binary.AppendUvarint(make([]byte, 0, 128), uint64(len(name)))
	buf = append(append(buf, name...), version...)
	sum := sha256.Sum256(buf)
	return digest{binary.BigEndian.Uint64(sum[:8]), binary.BigEndian.Uint64(sum[8:16])}
}

func (d digest) plus(e digest) digest {
	lo, carry := bits.Add64(d.lo, e.lo, 0)
	hi, _ := bits.Add64(d.hi, e.hi, carry)
	return digest{hi, lo}
}

func (d digest) minus(e digest) digest {
	lo, borrow := bits.Sub64(d.lo, e.lo, 0)
	hi, _ := bits.Sub64(d.hi, e.hi, borrow)
	return digest{hi, lo}
}

// String is the version_info of the set. It is never empty, not even for the empty set.
func (d digest) String() string { return fmt.Sprintf("%016x%016x", d.hi, d.lo) }

// shardOf tells which of count shards a text belongs to. The answer is part of the interface: a client that is told to
// read shards 0 to 15 of 16 relies on every replica and every release dividing alike.
func shardOf(text string, count int) int {
	sum := sha256.Sum256([]byte(text))
	return int(binary.BigEndian.Uint64(sum[:8]) % uint64(count))
}

// An item is a resource as it is kept: immutable, and encoded once for all clients and both protocols.
type item struct {
	name, version, shard string
	bodyType             string
	// valueAt and valueLen locate the bytes of the body's value in sotw.
	valueAt, valueLen int
	digest            digest
	// delta is one element of DeltaDiscoveryResponse.resources: its tag, its length and a Resource message. Within it
	// stands the Resource's own field "resource". That has the field number and the type of an element of
	// DiscoveryResponse.resources, so sotw is simply that part of delta's memory.
	delta, sotw mem.Buffer
}

// Field numbers of envoy.service.discovery.v3 and google.protobuf.Any that are written by hand.
const (
	anyTypeURL = 1
	anyValue   = 2

	resourceVersion = 1
	resourceBody    = 2
	resourceName    = 3

	responseVersion   = 1 // version_info and system_version_info
	responseResources = 2
	responseTypeURL   = 4
	responseNonce     = 5
	responseRemoved   = 6 // of DeltaDiscoveryResponse alone
)

func newItem(r Resource) *item {
	url, value := r.Body.GetTypeUrl(), r.Body.GetValue()
	if r.Version == "" {
		h := sha256.New()
		h.Write(binary.AppendUvarint(nil, uint64(len(url))))
		h.Write([]byte(url))
		h.Write(value)
		r.Version = hex.EncodeToString(h.Sum(nil)[:16])
	}
	bodySize := sizeField(anyTypeURL, len(url)) + sizeField(anyValue, len(value))
	size := sizeField(resourceVersion, len(r.Version)) + sizeField(resourceName, len(r.Name)) +
		protowire.SizeTag(resourceBody) + protowire.SizeBytes(bodySize)

	b := make([]byte, 0, protowire.SizeTag(responseResources)+protowire.SizeBytes(size))
	b = protowire.AppendTag(b, responseResources, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b = appendField(b, resourceVersion, r.Version)
	start := len(b)
	b = protowire.AppendTag(b, resourceBody, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(bodySize))
	b = appendField(b, anyTypeURL, url)
	b = appendField(b, anyValue, value)
	end := len(b)
	b = appendField(b, resourceName, r.Name)

	return &item{
		name: r.Name, version: r.Version, shard: r.Shard, bodyType: url,
		valueAt: end - start - len(value), valueLen: len(value),
		digest: digestOf(r.Name, r.Version),
		delta:  mem.SliceBuffer(b), sotw: mem.SliceBuffer(b[start:end:end]),
	}
}

// same tells whether the item is there, and has this version and shard.
func (it *item) same(version, shard string) bool {
	return it != nil && it.version == version && it.shard == shard
}

// resource gives the item back as what it was made of. Body's value shares the item's memory.
func (it *item) resource(typ string) Resource {
	value := it.sotw.ReadOnlyData()[it.valueAt : it.valueAt+it.valueLen]
	return Resource{Type: typ, Name: it.name, Version: it.version, Shard: it.shard,
		Body: &anypb.Any{TypeUrl: it.bodyType, Value: value}}
}

// sizeField is the encoded size of a bytes or string field; as proto3 has it, an empty one is left out.
func sizeField(num protowire.Number, n int) int {
	if n == 0 {
		return 0
	}
	return protowire.SizeTag(num) + protowire.SizeBytes(n)
}

func appendField[T string | []byte](b []byte, num protowire.Number, v T) []byte {
	if len(v) == 0 {
		return b
	}
	b = protowire.AppendTag(b, num, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(v)))
	return append(b, v...)
}
