package e2e

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"
	mcp "istio.io/api/mcp/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/test/harness"
)

// serviceEntries is the type URL by which istiod asks.
const serviceEntries = "networking.istio.io/v1/ServiceEntry"

// A reader is an xDS client that takes services as istiod does, from the full sets that it is sent.
type reader struct {
	mu       sync.Mutex
	services map[string]*networking.ServiceEntry // by host; nil before the first answer
	watched  map[string][]string                 // addresses that must not be missing, by host
	missed   []string                            // what was missing all the same
}

// startReader connects to regbridge.
func startReader(tb testing.TB, address string) *reader {
	tb.Helper()
	conn := dialXDS(tb, address)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	if err := stream.Send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "reader"}, TypeUrl: serviceEntries}); err != nil {
		tb.Fatal(err)
	}
	r := &reader{watched: map[string][]string{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			answer, err := stream.Recv()
			if err != nil {
				return // the test's end, or its next check tells
			}
			if err := r.take(answer); err != nil {
				r.mu.Lock()
				r.missed = append(r.missed, err.Error())
				r.mu.Unlock()
				return
			}
			if stream.Send(&discovery.DiscoveryRequest{
				TypeUrl: serviceEntries, ResponseNonce: answer.Nonce, VersionInfo: answer.VersionInfo,
			}) != nil {
				return
			}
		}
	}()
	tb.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return r
}

// startDeltaReader is startReader with incremental xDS, for which a change costs no more than itself. It does not know keep.
func startDeltaReader(tb testing.TB, address string) *reader {
	tb.Helper()
	conn := dialXDS(tb, address)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: &core.Node{Id: "reader"}, TypeUrl: serviceEntries}); err != nil {
		tb.Fatal(err)
	}
	r := &reader{services: map[string]*networking.ServiceEntry{}}
	done := make(chan struct{})
	go func() {
		defer close(done)
		hosts := map[string]string{} // by the resource's name
		for {
			answer, err := stream.Recv()
			if err != nil {
				return // the test's end, or its next check tells
			}
			r.mu.Lock()
			for _, res := range answer.Resources {
				if s, err := decodeService(res.Resource); err == nil {
					hosts[res.Name] = s.Hosts[0]
					r.services[s.Hosts[0]] = s
				}
			}
			for _, name := range answer.RemovedResources {
				delete(r.services, hosts[name])
			}
			r.mu.Unlock()
			if stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: serviceEntries, ResponseNonce: answer.Nonce}) != nil {
				return
			}
		}
	}()
	tb.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	return r
}

func dialXDS(tb testing.TB, address string) *grpc.ClientConn {
	tb.Helper()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		tb.Fatal(err)
	}
	return conn
}

func decodeService(res *anypb.Any) (*networking.ServiceEntry, error) {
	var m mcp.Resource
	var s networking.ServiceEntry
	if err := res.UnmarshalTo(&m); err != nil {
		return nil, err
	}
	return &s, m.Body.UnmarshalTo(&s)
}

func (r *reader) take(answer *discovery.DiscoveryResponse) error {
	services := map[string]*networking.ServiceEntry{}
	for _, res := range answer.Resources {
		s, err := decodeService(res)
		if err != nil {
			return err
		}
		services[s.Hosts[0]] = s
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.services = services
	for host, want := range r.watched {
		got := addressesOf(services[host])
		for _, e := range want {
			if !slices.Contains(got, e) {
				r.missed = append(r.missed, fmt.Sprintf("%s %s", host, e))
			}
		}
	}
	return nil
}

// endpointsOf gives address:port, with =WEIGHT where it has one, sorted.
func endpointsOf(s *networking.ServiceEntry) []string {
	all := []string{}
	for _, e := range s.GetEndpoints() {
		port := s.Ports[0].Number
		if p := e.Ports[s.Ports[0].Name]; p != 0 {
			port = p
		}
		text := net.JoinHostPort(e.Address, strconv.Itoa(int(port)))
		if e.Weight != 0 {
			text += "=" + strconv.Itoa(int(e.Weight))
		}
		all = append(all, text)
	}
	slices.Sort(all)
	return all
}

// addressesOf gives address:port.
func addressesOf(s *networking.ServiceEntry) []string {
	all := endpointsOf(s)
	for i, e := range all {
		all[i], _, _ = strings.Cut(e, "=")
	}
	return all
}

func (r *reader) service(host string) *networking.ServiceEntry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.services[host]
}

// check returns nil if exactly these are the endpoints of the host.
func (r *reader) check(host string, want ...string) error {
	s := r.service(host)
	if s == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		return fmt.Errorf("the client has no service %s, but %v", host, slices.Sorted(maps.Keys(r.services)))
	}
	slices.Sort(want)
	if got := endpointsOf(s); !slices.Equal(got, want) {
		return fmt.Errorf("the client's endpoints of %s are %v, want %v", host, got, want)
	}
	return nil
}

// has waits until exactly these are the endpoints of the host, and returns how long that took.
func (r *reader) has(t *testing.T, host string, want ...string) time.Duration {
	t.Helper()
	began := time.Now()
	harness.Eventually(t, patience, func() error { return r.check(host, want...) })
	return time.Since(began)
}

// await waits until a host has so many endpoints; it looks each millisecond.
func (r *reader) await(b *testing.B, host string, endpoints int) {
	b.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); len(r.service(host).GetEndpoints()) != endpoints; <-tick.C {
		if time.Now().After(deadline) {
			b.Fatalf("%s has %d endpoints, want %d", host, len(r.service(host).GetEndpoints()), endpoints)
		}
	}
}

// keep notes all addresses that the client has now. The function that it returns fails the test if any of them was missing
// meanwhile, however short.
func (r *reader) keep(hosts ...string) func(t *testing.T) {
	all := map[string][]string{}
	for _, host := range hosts {
		all[host] = addressesOf(r.service(host))
	}
	return r.keepThese(all)
}

// keepThese is keep for some addresses, by host.
func (r *reader) keepThese(all map[string][]string) func(t *testing.T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.missed = nil
	maps.Copy(r.watched, all)
	return func(t *testing.T) {
		t.Helper()
		r.mu.Lock()
		defer r.mu.Unlock()
		for host := range all {
			if len(r.watched[host]) == 0 {
				t.Errorf("%s had no endpoints to keep", host)
			}
			delete(r.watched, host)
		}
		if len(r.missed) > 0 {
			t.Errorf("the client was told that these are gone: %s", strings.Join(r.missed, ", "))
		}
	}
}
