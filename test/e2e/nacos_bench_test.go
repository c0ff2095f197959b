package e2e

import (
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
	"github.com/regbridge/regbridge/test/servers"
)

// BenchmarkNacos measures 10,000 services of 10 instances in one Nacos 2.3: the time until all have been read, what regbridge
// and the server do at rest, and the time from one change to an xDS client; by gRPC, and by the HTTP API that type nacos
// polls, as ratios to the former.
func BenchmarkNacos(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads the CPU time of a process from /proc")
	}
	const services, instances = 10_000, 10
	n := harness.StartNacos(b, servers.Nacos2, harness.NacosOptions{Heap: 2000})
	p := n.StartProvider(harness.NacosProviderOptions{})
	for from := 0; from < services; from += 500 {
		var some []harness.NacosInstance
		for s := from; s < from+500; s++ {
			for i := range instances {
				some = append(some, harness.NacosInstance{Service: fmt.Sprintf("svc-%d", s), IP: bigIP(s, i), Port: 80})
			}
		}
		p.ProvideAll(some...)
	}
	var first nacosResult
	for _, typ := range []string{"nacos2", "nacos"} {
		b.Run("type="+typ, func(b *testing.B) {
			got := measureNacos(b, n, p, typ, services, instances)
			if typ == "nacos2" {
				first = got
			}
			b.ReportMetric(got.sync.Seconds(), "s/first-sync")
			b.ReportMetric(ms(got.change), "p50-ms/change")
			b.ReportMetric(100*got.cpu, "cpu-%-at-rest")
			b.ReportMetric(got.rss, "MB-RSS")
			b.ReportMetric(got.requests, "requests/s-at-rest")
			b.ReportMetric(got.sync.Seconds()/first.sync.Seconds(), "sync-to-nacos2")
			b.ReportMetric(float64(got.change)/float64(first.change), "change-to-nacos2")
			b.ReportMetric(got.requests/first.requests, "requests-to-nacos2")
		})
	}
}

// nacosResult is what reading a big Nacos costs.
type nacosResult struct {
	sync, change       time.Duration
	cpu, rss, requests float64 // at rest: share of one core, MB, requests per second that the server gets
}

func bigIP(service, instance int) string {
	return net.IPv4(10, byte(service>>8), byte(service), byte(instance+1)).String()
}

func measureNacos(b *testing.B, n *harness.Nacos, p *harness.NacosProvider, typ string, services, instances int) nacosResult {
	b.Helper()
	began := time.Now()
	bridge := harness.StartRegbridge(b, harness.RegbridgeOptions{
		Config: map[string]string{"nacos.yaml": mcpBridge("nacos", fmt.Sprintf("{type: %s, name: n, domain: %s}", typ, n.Address))},
		Args:   []string{"--first-answer-deadline", "10m"},
	})
	bridge.WaitReady(10 * time.Minute)
	got := nacosResult{sync: time.Since(began)}
	w := &world{bridge: bridge}
	if s, err := w.status("n"); err != nil || s.Published != services*instances {
		b.Fatalf("the registry is %+v, %v", s, err)
	}
	client := startReader(b, bridge.XDS)
	harness.Eventually(b, patience, func() error { return client.check(benchHost(0), bigEndpoints(0, instances)...) })

	const rest = 30 * time.Second // a refresh interval
	<-time.After(rest)            // the server pushes each service once, of its own accord, after a subscription
	cpu, requests := cpuTime(b, bridge.PID()), served(b, n)
	<-time.After(rest)
	got.cpu = (cpuTime(b, bridge.PID()) - cpu).Seconds() / rest.Seconds()
	got.requests = (served(b, n) - requests) / rest.Seconds()
	got.rss = rss(b, bridge.PID())

	var times []time.Duration
	service := services / 2
	for b.Loop() {
		for _, extra := range []int{1, 0} {
			all := make([]harness.NacosInstance, instances+extra)
			for i := range all {
				all[i] = harness.NacosInstance{IP: bigIP(service, i), Port: 80}
			}
			p.Provide("", fmt.Sprintf("svc-%d", service), all...)
			changed := time.Now()
			harness.Eventually(b, 2*time.Minute, func() error {
				return client.check(benchHost(service), bigEndpoints(service, len(all))...)
			})
			times = append(times, time.Since(changed))
		}
		service++
	}
	slices.Sort(times)
	got.change = times[len(times)/2]
	return got
}

func benchHost(service int) string { return fmt.Sprintf("svc-%d.default-group.public.nacos", service) }

func bigEndpoints(service, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = bigIP(service, i) + ":80"
	}
	return all
}

// served is how many requests the server has taken.
func served(b *testing.B, n *harness.Nacos) float64 {
	b.Helper()
	http, grpc, err := n.Requests()
	if err != nil {
		b.Fatal(err)
	}
	return http + grpc
}

// rss is the memory that a process has, in MB (proc(5), status).
func rss(b *testing.B, pid int) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			if err != nil {
				b.Fatal(err)
			}
			return float64(kb) / 1024
		}
	}
	b.Fatal("no VmRSS")
	return 0
}
