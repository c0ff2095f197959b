package istio

import (
	"fmt"
	"maps"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	networking "istio.io/api/networking/v1alpha3"
)

// endpointsField is the number of ServiceEntry.endpoints.
const endpointsField = 6

// marshalSpec returns the bytes of a spec, the same for equal ones.
//
// Endpoints are written by hand: protobuf goes through reflection to sort a map's keys, which costs 30 allocations for
// each of perhaps a million endpoints.
func marshalSpec(spec proto.Message) ([]byte, error) {
	opts := proto.MarshalOptions{Deterministic: true}
	entry, ok := spec.(*networking.ServiceEntry)
	if !ok || len(entry.GetEndpoints()) == 0 {
		return opts.Marshal(spec)
	}
	from := entry.ProtoReflect()
	rest := from.New() // all but the endpoints; it shares the fields' values
	from.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if field.Number() != endpointsField {
			rest.Set(field, v)
		}
		return true
	})
	rest.SetUnknown(from.GetUnknown())
	b, err := opts.Marshal(rest.Interface())
	if err != nil {
		return nil, err
	}
	b = slices.Grow(b, 96*len(entry.Endpoints))
	var w endpointWriter
	for i, e := range entry.Endpoints {
		if err := w.write(e); err != nil {
			return nil, fmt.Errorf("endpoints[%d]: %w", i, err)
		}
		b = protowire.AppendTag(b, endpointsField, protowire.BytesType)
		b = protowire.AppendBytes(b, w.buf)
	}
	return b, nil
}

// An endpointWriter holds the bytes of one WorkloadEntry.
type endpointWriter struct {
	buf  []byte
	keys []string
}

// write replaces the bytes by those of e. The fields are those of istio/networking/v1alpha3/workload_entry.proto.
func (w *endpointWriter) write(e *networking.WorkloadEntry) error {
	w.buf = w.buf[:0]
	if e == nil {
		return nil
	}
	for _, text := range []string{e.Address, e.Network, e.Locality, e.ServiceAccount} {
		if !utf8.ValidString(text) {
			return fmt.Errorf("%q is not UTF-8", text)
		}
	}
	w.text(1, e.Address)
	w.keys = slices.AppendSeq(w.keys[:0], maps.Keys(e.Ports))
	slices.Sort(w.keys)
	for _, k := range w.keys {
		if !utf8.ValidString(k) {
			return fmt.Errorf("port name %q is not UTF-8", k)
		}
		port := uint64(e.Ports[k])
		w.open(2, 2+protowire.SizeBytes(len(k))+protowire.SizeVarint(port))
		w.buf = appendText(w.buf, 1, k)
		w.buf = protowire.AppendTag(w.buf, 2, protowire.VarintType)
		w.buf = protowire.AppendVarint(w.buf, port)
	}
	w.keys = slices.AppendSeq(w.keys[:0], maps.Keys(e.Labels))
	slices.Sort(w.keys)
	for _, k := range w.keys {
		v := e.Labels[k]
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("label %q is not UTF-8", k)
		}
		w.open(3, 2+protowire.SizeBytes(len(k))+protowire.SizeBytes(len(v)))
		w.buf = appendText(w.buf, 1, k)
		w.buf = appendText(w.buf, 2, v)
	}
	w.text(4, e.Network)
	w.text(5, e.Locality)
	if e.Weight != 0 {
		w.buf = protowire.AppendTag(w.buf, 6, protowire.VarintType)
		w.buf = protowire.AppendVarint(w.buf, uint64(e.Weight))
	}
	w.text(7, e.ServiceAccount)
	w.buf = append(w.buf, e.ProtoReflect().GetUnknown()...)
	return nil
}

// open begins a message of size bytes.
func (w *endpointWriter) open(field protowire.Number, size int) {
	w.buf = protowire.AppendTag(w.buf, field, protowire.BytesType)
	w.buf = protowire.AppendVarint(w.buf, uint64(size))
}

func (w *endpointWriter) text(field protowire.Number, s string) {
	if s != "" {
		w.buf = appendText(w.buf, field, s)
	}
}

// appendText appends a text field, empty or not.
func appendText(b []byte, field protowire.Number, s string) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	return protowire.AppendString(b, s)
}
