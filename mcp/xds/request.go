package xds

import (
	"strings"
	"unicode/utf8"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpc "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// maxText is how much is read of a type URL, a version, a nonce or a node id, in bytes. What is longer is none of ours.
const maxText = 1 << 10

// maxRefusal is how much is read of a client's error text, in bytes.
const maxRefusal = 4 << 10

var errMalformed = status.Error(codes.InvalidArgument, "the request is no valid message")

// A reader reads a request as far as it is of use here. The general decoder would make dozens of bytes of each byte of a
// node's metadata, and of a name without a letter. The codec calls read, and leaves its error in err, which gRPC would
// disguise.
type reader struct {
	read func([]byte) error
	err  error
	held int // by the names so far
}

func newSotwReader(m *discovery.DiscoveryRequest) *reader {
	r := &reader{}
	r.read = func(b []byte) error {
		return eachField(b, func(num protowire.Number, v []byte) (err error) {
			switch num {
			case 1:
				m.VersionInfo, err = text(v, maxText)
			case 2:
				m.Node, err = readNode(v, m.GetNode())
			case 3:
				m.ResourceNames, err = r.name(v, m.GetResourceNames())
			case 4:
				m.TypeUrl, err = text(v, maxText)
			case 5:
				m.ResponseNonce, err = text(v, maxText)
			case 6:
				m.ErrorDetail, err = readStatus(v, m.GetErrorDetail())
			}
			return err
		})
	}
	return r
}

func newDeltaReader(m *discovery.DeltaDiscoveryRequest) *reader {
	r := &reader{}
	r.read = func(b []byte) error {
		return eachField(b, func(num protowire.Number, v []byte) (err error) {
			switch num {
			case 1:
				m.Node, err = readNode(v, m.GetNode())
			case 2:
				m.TypeUrl, err = text(v, maxText)
			case 3:
				m.ResourceNamesSubscribe, err = r.name(v, m.GetResourceNamesSubscribe())
			case 4:
				m.ResourceNamesUnsubscribe, err = r.name(v, m.GetResourceNamesUnsubscribe())
			case 5:
				m.InitialResourceVersions, err = r.version(v, m.GetInitialResourceVersions())
			case 6:
				m.ResponseNonce, err = text(v, maxText)
			case 7:
				m.ErrorDetail, err = readStatus(v, m.GetErrorDetail())
			}
			return err
		})
	}
	return r
}

func (r *reader) hold(v []byte) (string, error) {
	if r.held += len(v) + nameCost; r.held > maxHeld {
		return "", errTooMuch
	}
	return text(v, len(v))
}

func (r *reader) name(v []byte, to []string) ([]string, error) {
	name, err := r.hold(v)
	return append(to, name), err
}

// version reads an entry of a map.
func (r *reader) version(b []byte, to map[string]string) (map[string]string, error) {
	var entry [2]string
	err := eachField(b, func(num protowire.Number, v []byte) (err error) {
		if num == 1 || num == 2 {
			entry[num-1], err = r.hold(v)
		}
		return err
	})
	if to == nil {
		to = map[string]string{}
	}
	to[entry[0]] = entry[1]
	return to, err
}

// readNode reads the id of a core.Node, into n unless that is nil.
func readNode(b []byte, n *core.Node) (*core.Node, error) {
	if n == nil {
		n = &core.Node{}
	}
	return n, eachField(b, func(num protowire.Number, v []byte) (err error) {
		if num == 1 {
			n.Id, err = text(v, maxText)
		}
		return err
	})
}

// readStatus reads the message of an rpc.Status, into s unless that is nil.
func readStatus(b []byte, s *rpc.Status) (*rpc.Status, error) {
	if s == nil {
		s = &rpc.Status{}
	}
	return s, eachField(b, func(num protowire.Number, v []byte) (err error) {
		if num == 2 {
			s.Message, err = text(v, maxRefusal)
		}
		return err
	})
}

// eachField calls f for each field of a message that is of the wire type of texts and messages, until it fails.
func eachField(b []byte, f func(num protowire.Number, v []byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		size := protowire.ConsumeFieldValue(num, typ, b[n:])
		if size < 0 {
			return errMalformed
		}
		if typ == protowire.BytesType {
			v, _ := protowire.ConsumeBytes(b[n:])
			if err := f(num, v); err != nil {
				return err
			}
		}
		b = b[n+size:]
	}
	return nil
}

// text returns the first bytes of a string, at most limit.
func text(v []byte, limit int) (string, error) {
	if !utf8.Valid(v) {
		return "", errMalformed
	}
	return strings.ToValidUTF8(string(v[:min(len(v), limit)]), ""), nil
}
