package harness

import (
	"net"
	"strconv"
	"sync"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	mcp "istio.io/api/mcp/v1alpha1"
)

// adsServer is the least that istiod and Envoy can read from: it answers each type once with all that it has, empty
// where it has nothing, and again when set changes something.
type adsServer struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	address string

	mu        sync.Mutex
	version   int
	resources map[string][]*anypb.Any // by type URL
	changed   chan struct{}           // closed, and replaced, at each change
}

func startADS(t *testing.T, options ...grpc.ServerOption) *adsServer {
	t.Helper()
	s := &adsServer{address: loopback(FreePort(t)), resources: map[string][]*anypb.Any{}, changed: make(chan struct{})}
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	discovery.RegisterAggregatedDiscoveryServiceServer(server, s)
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *adsServer) set(typeURL string, resources ...*anypb.Any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.resources[typeURL] = resources
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *adsServer) StreamAggregatedResources(
	stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer,
) error {
	requests := make(chan *discovery.DiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	sent := map[string]int{} // version by type URL
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		select {
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			if _, again := sent[r.TypeUrl]; !again { // else an acknowledgement
				sent[r.TypeUrl] = 0
			}
		case <-changed:
		}
		for typeURL := range sent {
			s.mu.Lock()
			version, resources := s.version+1, s.resources[typeURL]
			s.mu.Unlock()
			if sent[typeURL] == version {
				continue
			}
			sent[typeURL] = version
			v := strconv.Itoa(version)
			answer := &discovery.DiscoveryResponse{TypeUrl: typeURL, VersionInfo: v, Nonce: v, Resources: resources}
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
	}
}

func packed(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// mcpResource wraps a configuration resource, named namespace/name, as istiod reads it.
func mcpResource(t *testing.T, name, version string, body proto.Message) *anypb.Any {
	t.Helper()
	return packed(t, &mcp.Resource{
		Metadata: &mcp.Metadata{Name: name, Version: version, CreateTime: &timestamppb.Timestamp{Seconds: 1767225600}},
		Body:     packed(t, body),
	})
}
