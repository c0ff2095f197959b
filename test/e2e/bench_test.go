package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/hashicorp/consul/api"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/regbridge/regbridge/test/harness"
)

// BenchmarkIstiod measures one change behind 10,000 services of 10 endpoints, from the registry's answer to the EDS response
// at a sidecar, with an istiod that reads all from one port, or 4 or 16 shards. Times, and istiod's CPU time, are also
// given as ratios to those of the single source, since the machine has its part in the plain figures.
func BenchmarkIstiod(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads the CPU time of a process from /proc")
	}
	r := startBigRegistry(b, 10000, 10)
	ports := map[int]int{4: freeRow(b, 4), 16: freeRow(b, 16)} // the first, by number of shards
	bridge := harness.StartRegbridge(b, harness.RegbridgeOptions{
		Config: map[string]string{"big.yaml": mcpBridge("big",
			fmt.Sprintf("{type: consul, name: big, domain: %q, consulDatacenter: dc1, refreshInterval: 10m}", r.address))},
		Args: []string{
			"--xds-shards", fmt.Sprintf("4@127.0.0.1:%d", ports[4]), "--xds-shards", fmt.Sprintf("16@127.0.0.1:%d", ports[16]),
			"--first-answer-deadline", "10m",
		},
	})
	bridge.WaitReady(5 * time.Minute)
	var single result
	for _, sources := range []int{1, 4, 16} {
		b.Run(fmt.Sprintf("sources=%d", sources), func(b *testing.B) {
			list := []harness.MCPSource{{Address: bridge.XDS}}
			if first := ports[sources]; first != 0 {
				list = nil
				for port := first; port < first+sources; port++ {
					list = append(list, harness.MCPSource{Address: "127.0.0.1:" + strconv.Itoa(port)})
				}
			}
			d := harness.StartIstiod(b, harness.IstiodOptions{Sources: list})
			w := &world{istiod: d}
			harness.Eventually(b, 2*time.Minute, func() error { // it is ready before it has stored all that it was sent
				hosts, err := w.hosts()
				if err == nil && len(hosts) != len(r.services) {
					err = fmt.Errorf("istiod has %d services, want %d", len(hosts), len(r.services))
				}
				return err
			})
			got := measureChanges(b, r, d)
			if sources == 1 {
				single = got
			}
			b.ReportMetric(ms(got.time), "p50-ms/change")
			b.ReportMetric(ms(got.most), "max-ms/change")
			b.ReportMetric(ms(got.cpu), "istiod-cpu-ms/change")
			b.ReportMetric(float64(got.time)/float64(single.time), "time-to-single")
			b.ReportMetric(float64(got.cpu)/float64(single.cpu), "cpu-to-single")
		})
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// result is what changes cost: medians, and the longest time.
type result struct{ time, most, cpu time.Duration }

// rest is the time between two changes, in which what the last one caused comes to its end.
const rest = 400 * time.Millisecond

func measureChanges(b *testing.B, r *bigRegistry, d *harness.Istiod) result {
	b.Helper()
	s := startBenchSidecar(b, d, len(r.services))
	var times, cpus []time.Duration
	pause := time.NewTicker(rest)
	defer pause.Stop()
	for b.Loop() {
		b.StopTimer()
		<-pause.C
		before := cpuTime(b, d.PID())
		service := r.watched(b)
		b.StartTimer()
		began := time.Now()
		r.change(service)
		s.wait(b, inConsul(r.services[service].name))
		took := time.Since(began)
		b.StopTimer()
		pause.Reset(rest)
		<-pause.C
		times, cpus = append(times, took), append(cpus, cpuTime(b, d.PID())-before)
		b.StartTimer()
	}
	slices.Sort(times)
	slices.Sort(cpus)
	return result{time: times[len(times)/2], most: times[len(times)-1], cpu: cpus[len(cpus)/2]}
}

// cpuTime is the CPU time that all threads of a process have used (proc(5), schedstat: nanoseconds come first).
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		b.Fatalf("process %d has no threads in /proc (%v)", pid, err)
	}
	var sum time.Duration
	for _, f := range files {
		text, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) { // the thread has ended
			continue
		}
		if err != nil {
			b.Fatal(err)
		}
		n, err := strconv.ParseInt(strings.Fields(string(text))[0], 10, 64)
		if err != nil {
			b.Fatalf("%s: %v", f, err)
		}
		sum += time.Duration(n)
	}
	return sum
}

// bigRegistry answers what regbridge asks of Consul, for more instances than could be registered in a real one in a
// benchmark's time, and knows to the moment when it told a change.
type bigRegistry struct {
	address  string
	mu       sync.Mutex
	services []bigService
	byName   map[string]int
	names    []byte        // the answer that lists them
	never    chan struct{} // the list of services does not change
}

type bigService struct {
	name    string
	version int
	waiting int // blocking queries
	changed chan struct{}
	size    int // instances
}

func startBigRegistry(b *testing.B, services, instances int) *bigRegistry {
	b.Helper()
	r := &bigRegistry{byName: map[string]int{}, never: make(chan struct{})}
	names := map[string][]string{}
	for n := range services {
		name := fmt.Sprintf("svc-%05d", n)
		r.byName[name], names[name] = n, []string{}
		r.services = append(r.services, bigService{name: name, version: 1, changed: make(chan struct{}), size: instances})
	}
	var err error
	if r.names, err = json.Marshal(names); err != nil {
		b.Fatal(err)
	}
	u := harness.StartUpstream(b, harness.UpstreamOptions{Name: "registry", Handler: http.HandlerFunc(r.serve)})
	r.address = u.Address()
	return r
}

func (r *bigRegistry) serve(w http.ResponseWriter, req *http.Request) {
	answer := func(index int, body []byte) {
		w.Header().Set("X-Consul-Index", strconv.Itoa(index))
		w.Header().Set("X-Consul-Knownleader", "true")
		w.Header().Set("X-Consul-Lastcontact", "0")
		_, _ = w.Write(body)
	}
	known, _ := strconv.Atoi(req.URL.Query().Get("index"))
	wait, _ := time.ParseDuration(req.URL.Query().Get("wait"))
	block := func(changed <-chan struct{}) {
		select {
		case <-changed:
		case <-time.After(wait):
		case <-req.Context().Done():
		}
	}
	name, one := strings.CutPrefix(req.URL.Path, "/v1/health/service/")
	i, ok := r.byName[name]
	switch {
	case one && ok:
		r.mu.Lock()
		s := &r.services[i]
		if known == s.version {
			s.waiting++
			changed := s.changed
			r.mu.Unlock()
			block(changed)
			r.mu.Lock()
			s.waiting--
		}
		version, body := s.version, s.entries(i)
		r.mu.Unlock()
		answer(version, body)
	case req.URL.Path == "/v1/catalog/services" || req.URL.Path == "/v1/health/state/any":
		if known > 0 {
			block(r.never)
		}
		if strings.HasSuffix(req.URL.Path, "any") {
			answer(1, []byte("[]"))
		} else {
			answer(1, r.names)
		}
	default:
		http.NotFound(w, req)
	}
}

// entries is the answer about a service, the i-th; the port of its first instance is another one in each version.
func (s *bigService) entries(i int) []byte {
	all := make([]api.ServiceEntry, s.size)
	for n := range all {
		port := 8080
		if n == 0 {
			port += s.version % 1000
		}
		id := fmt.Sprintf("%s-%d", s.name, n)
		all[n] = api.ServiceEntry{
			Node: &api.Node{Node: "n", Datacenter: "dc1", Address: "10.0.0.1"},
			Service: &api.AgentService{
				ID: id, Service: s.name, Address: fmt.Sprintf("10.%d.%d.%d", 1+i/250, i%250, n+1), Port: port,
				Meta: map[string]string{"version": "v1", "zone": "z" + strconv.Itoa(n%3)},
			},
		}
	}
	body, err := json.Marshal(all)
	if err != nil {
		panic(err) // of values that we made
	}
	return body
}

// watched returns a service for which a blocking query waits.
func (r *bigRegistry) watched(b *testing.B) int {
	b.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		r.mu.Lock()
		i := slices.IndexFunc(r.services, func(s bigService) bool { return s.waiting > 0 })
		r.mu.Unlock()
		if i >= 0 {
			return i
		}
		runtime.Gosched()
	}
	b.Fatal("no service is watched")
	return 0
}

func (r *bigRegistry) change(i int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.services[i]
	s.version++
	close(s.changed)
	s.changed = make(chan struct{})
}

// benchSidecar is an ADS client of istiod that has all clusters and all their endpoints, and does nothing with them.
type benchSidecar struct {
	endpoints chan string // the host of each ClusterLoadAssignment, after the first of all
	failed    chan error
}

const (
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// startBenchSidecar waits until the sidecar has the endpoints of that many services.
func startBenchSidecar(b *testing.B, d *harness.Istiod, services int) *benchSidecar {
	b.Helper()
	conn, err := grpc.NewClient(d.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		b.Fatal(err)
	}
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	meta, err := structpb.NewStruct(map[string]any{"ISTIO_VERSION": "1.31.0", "CLUSTER_ID": "Kubernetes", "NAMESPACE": "demo"})
	if err != nil {
		b.Fatal(err)
	}
	node := &core.Node{Id: "sidecar~10.99.0.1~bench.demo~demo.svc.cluster.local", Metadata: meta}
	if err := stream.Send(&discovery.DeltaDiscoveryRequest{Node: node, TypeUrl: clusterType}); err != nil {
		b.Fatal(err)
	}
	s := &benchSidecar{endpoints: make(chan string, 2*services), failed: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.failed <- s.read(stream)
	}()
	b.Cleanup(func() {
		_ = conn.Close()
		<-done
	})
	first := map[string]bool{}
	for deadline := time.After(2 * time.Minute); len(first) < services; {
		select {
		case host := <-s.endpoints:
			first[host] = true
		case err := <-s.failed:
			b.Fatal(err)
		case <-deadline:
			b.Fatalf("the sidecar has the endpoints of %d services", len(first))
		}
	}
	return s
}

func (s *benchSidecar) read(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient) error {
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}); err != nil {
			return err
		}
		var names []string
		for _, res := range r.Resources {
			if _, host, ok := strings.Cut(res.Name, "||"); ok && r.TypeUrl == endpointType {
				s.endpoints <- host
			}
			var c cluster.Cluster
			if r.TypeUrl == clusterType && res.Resource.UnmarshalTo(&c) == nil && c.GetType() == cluster.Cluster_EDS {
				names = append(names, c.Name)
			}
		}
		if len(names) > 0 {
			if err := stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: endpointType, ResourceNamesSubscribe: names}); err != nil {
				return err
			}
		}
	}
}

// wait waits for the endpoints of a host.
func (s *benchSidecar) wait(b *testing.B, host string) {
	b.Helper()
	for deadline := time.After(patience); ; {
		select {
		case got := <-s.endpoints:
			if got == host {
				return
			}
		case err := <-s.failed:
			b.Fatal(err)
		case <-deadline:
			b.Fatalf("the endpoints of %s did not arrive", host)
		}
	}
}
