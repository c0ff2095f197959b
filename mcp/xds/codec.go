package xds

import (
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that ours falls back to
	"google.golang.org/grpc/mem"
)

// A message is a DiscoveryResponse or DeltaDiscoveryResponse on its way out: the fields that are this stream's own, and
// the resources, which all streams share. Protocol buffers do not care in what order fields come, so the two are simply
// put behind one another.
type message struct {
	head []byte
	body []mem.Buffer
}

// encodeHead writes all fields but the resources.
func encodeHead(version, url, nonce string, removed []string) []byte {
	b := appendField(nil, responseVersion, version)
	b = appendField(b, responseTypeURL, url)
	b = appendField(b, responseNonce, nonce)
	for _, name := range removed {
		b = appendField(b, responseRemoved, name)
	}
	return b
}

// A codec sends messages without copying their resources, has readers read requests, and does everything else as gRPC
// does by default.
//
// This is what bounds the memory of full answers in flight. gRPC queues a whole message on a stream as soon as the
// client's window opens, and would hold a marshalled copy of the full set for each slow client. Here a queued answer
// holds sixteen bytes for each resource, and points to bytes that the cache holds anyway. Only what has been superseded
// since the answer was made is held by the answer alone, and Options.MaxStale bounds that.
type codec struct {
	encoding.CodecV2
}

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(*message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	out := make(mem.BufferSlice, 0, len(m.body)+1)
	out = append(out, mem.SliceBuffer(m.head))
	return append(out, m.body...), nil
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*reader)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	b := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer b.Free()
	r.err = r.read(b.ReadOnlyData())
	return nil
}
