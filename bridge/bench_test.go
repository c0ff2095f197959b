package bridge

import (
	"context"
	"crypto/sha256"
	"fmt"

	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
	"github.com/regbridge/regbridge/registry"
)

// benchBridge is a bridge without adapters: what a registry says is put into its store, and published by hand.
type benchBridge struct {
	*Bridge
	state *registryState
}

func newBenchBridge(b *testing.B, shards ...int) *benchBridge {
	b.Helper()
	cache := xds.NewCache(xds.Options{Published: istio.Published(), ShardCounts: shards})
	br, err := New(Options{
		Mesh: cache, Renderer: IstioRenderer{istio.Stock}, Logger: slog.New(slog.DiscardHandler),
		StateDir: filepath.Join(b.TempDir(), "state"),
	})
	if err != nil {
		b.Fatal(err)
	}
	state := newRegistryState(Key{"default", "bench", "consul", "bench"})
	state.policy = policyOf(registry.Entry{})
	br.store.add(state)
	return &benchBridge{br, state}
}

func (b *benchBridge) put(s registry.Service) {
	b.store.update(b.state, func(now time.Time) { b.state.put(s, now) })
}

func (b *benchBridge) publish() { b.publisher.publish(b.store.takeDirty(), b.store.claims) }

func (b *benchBridge) load(services, endpoints int) {
	ids := make([]string, services)
	for i := range services {
		s := benchService(i, endpoints, 0)
		ids[i] = s.ID
		b.put(s)
		if i%1000 == 999 {
			b.publish()
		}
	}
	b.store.update(b.state, func(now time.Time) { b.state.listing(ids, now) })
	b.publish()
}

// benchService is a service as Consul has it: its instances share their metadata but for the version.
func benchService(i, endpoints, version int) registry.Service {
	name := fmt.Sprintf("service-%06d", i)
	s := registry.Service{ID: name, Host: name + ".dc1.consul", Instances: make([]registry.Instance, endpoints)}
	for e := range endpoints {
		s.Instances[e] = registry.Instance{
			Address: fmt.Sprintf("10.%d.%d.%d", i/250%250, i%250, e+1), Port: 8080, Weight: 1,
			Metadata: labels.FromMap(map[string]string{"app": name, "version": "v" + strconv.Itoa(e%2+version), "secure": "false"}),
		}
	}
	return s
}

// BenchmarkChange is one changed instance, from the adapter's Put to the mesh's version step.
func BenchmarkChange(b *testing.B) {
	for _, services := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("%dx10", services), func(b *testing.B) {
			br := newBenchBridge(b)
			br.load(services, 10)
			for i := 0; b.Loop(); i++ {
				br.put(benchService(i%services, 10, 1+i/services))
				br.publish()
			}
		})
	}
}

// BenchmarkMemory is the memory of a million endpoints with everything that is kept of them: facts, what is published,
// and the bytes that clients are sent.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		before := liveHeap()
		br := newBenchBridge(b)
		br.load(100_000, 10)
		heap := liveHeap() - before
		debug.FreeOSMemory()
		b.ReportMetric(float64(heap)/1e6, "heap-B/endpoint")
		b.ReportMetric(rss(b)/1e6, "rss-B/endpoint")
		runtime.KeepAlive(br)
	}
}

func liveHeap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// rss is the process's resident memory in bytes.
func rss(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Skip("no /proc: ", err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	kb, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kb * 1024
}

// BenchmarkChurn makes 10,000 changes a second for 30 seconds, and tells how many were made and published, and how much
// the heap grew.
func BenchmarkChurn(b *testing.B) {
	const services, perSecond, seconds = 10_000, 10_000, 30
	for b.Loop() {
		br := newBenchBridge(b)
		br.load(services, 10)
		before := liveHeap()
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error)
		go func() { done <- br.publishLoop(ctx) }()
		began, made := time.Now(), 0
		for tick := range seconds * 100 {
			for range perSecond / 100 {
				br.put(benchService(made%services, 10, 1+made/services))
				made++
			}
			time.Sleep(time.Until(began.Add(time.Duration(tick+1) * 10 * time.Millisecond)))
		}
		took := time.Since(began)
		for br.store.isDirty() {
			time.Sleep(time.Millisecond)
		}
		cancel()
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(made)/took.Seconds(), "changes/s")
		b.ReportMetric((float64(liveHeap())-float64(before))/1e6, "heap-growth-MB")
		runtime.KeepAlive(br)
	}
}

// BenchmarkSnapshot writes and loads the snapshot of a million endpoints.
func BenchmarkSnapshot(b *testing.B) {
	br := newBenchBridge(b)
	br.load(100_000, 10)
	if err := br.snapshots.write(br.state); err != nil {
		b.Fatal(err)
	}
	content, err := os.ReadFile(br.snapshots.path(br.state.key))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			br.state.version++
			if err := br.snapshots.write(br.state); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(len(content))/1e6, "B/endpoint")
	})
	b.Run("load", func(b *testing.B) {
		for b.Loop() {
			if _, services, err := decodeSnapshot(content); err != nil || len(services) != 100_000 {
				b.Fatal(len(services), err)
			}
		}
	})
	b.Run("sha256-of-it", func(b *testing.B) { // the yardstick: one pass over the same bytes
		for b.Loop() {
			_ = sha256.Sum256(content)
		}
	})
}
