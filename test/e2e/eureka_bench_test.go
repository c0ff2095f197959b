package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

// BenchmarkEureka measures 10,000 applications of 3 instances in one Eureka: the time until all have been read, requests per
// refresh interval and CPU at rest, beside those of a client that asks for everything each time, and the time from one change
// to an xDS client.
func BenchmarkEureka(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads the CPU time of a process from /proc")
	}
	const apps, instances = 10_000, 3
	const period = 10 * time.Second // the refresh interval
	e := harness.StartEureka(b, harness.EurekaOptions{Heap: 1500, Properties: map[string]string{
		"eureka.server.response-cache-update-interval-ms": "1000",
		// At rest it no longer tells that they all registered.
		"eureka.server.retention-time-in-m-s-in-delta-queue": "20000", "eureka.server.delta-retention-timer-interval-in-ms": "1000",
	}})
	var all []harness.EurekaInstance
	for a := range apps {
		for i := range instances {
			all = append(all, benchEureka(a, i))
		}
	}
	e.Register(all...)
	harness.Eventually(b, time.Minute, func() error { // its answers are made once in a while
		listed, err := e.Apps()
		if err == nil && len(listed) != len(all) {
			err = fmt.Errorf("the server lists %d of %d instances", len(listed), len(all))
		}
		return err
	})
	target, err := url.Parse("http://" + e.Address)
	if err != nil {
		b.Fatal(err)
	}
	var requests atomic.Int64
	forward := httputil.NewSingleHostReverseProxy(target)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		forward.ServeHTTP(w, r)
	}))
	b.Cleanup(proxy.Close)

	began := time.Now()
	bridge := harness.StartRegbridge(b, harness.RegbridgeOptions{
		Config: map[string]string{"eureka.yaml": mcpBridge("eureka", fmt.Sprintf(
			"{type: eureka, name: e, domain: '%s', refreshInterval: %v}", proxy.Listener.Addr(), period))},
		Args: []string{"--first-answer-deadline", "10m"},
	})
	bridge.WaitReady(10 * time.Minute)
	sync := time.Since(began)
	w := &world{bridge: bridge}
	if s, err := w.status("e"); err != nil || s.Published != apps*instances {
		b.Fatalf("the registry is %+v, %v", s, err)
	}
	client := startReader(b, bridge.XDS)
	endpoints := func(a, n int) []string {
		all := make([]string, n)
		for i := range all {
			all[i] = bigIP(a, i) + ":80"
		}
		return all
	}
	harness.Eventually(b, patience, func() error { return client.check(benchApp(0), endpoints(0, instances)...) })

	const rest = 6 * period
	<-time.After(4 * period)
	asked, cpu := requests.Load(), cpuTime(b, bridge.PID())
	<-time.After(rest)
	perInterval := float64(requests.Load()-asked) * period.Seconds() / rest.Seconds()
	share := (cpuTime(b, bridge.PID()) - cpu).Seconds() / rest.Seconds()
	naive := naiveFetch(b, target.String()+"/eureka/apps", apps).Seconds() / period.Seconds()

	var times []time.Duration
	app := apps / 2
	for b.Loop() {
		for _, extra := range []int{1, 0} {
			if extra == 1 {
				e.Register(benchEureka(app, instances))
			} else {
				e.Deregister(benchEureka(app, instances))
			}
			changed := time.Now()
			harness.Eventually(b, time.Minute, func() error { return client.check(benchApp(app), endpoints(app, instances+extra)...) })
			times = append(times, time.Since(changed))
		}
		app++
	}
	slices.Sort(times)
	b.ReportMetric(sync.Seconds(), "s/first-sync")
	b.ReportMetric(perInterval, "requests/interval")
	b.ReportMetric(100*share, "cpu-%-at-rest")
	b.ReportMetric(100*naive, "cpu-%-naive")
	b.ReportMetric(share/naive, "cpu-to-naive")
	b.ReportMetric(rss(b, bridge.PID()), "MB-RSS")
	b.ReportMetric(ms(times[len(times)/2]), "p50-ms/change")
}

func benchApp(a int) string { return fmt.Sprintf("app-%d.eureka", a) }

func benchEureka(a, i int) harness.EurekaInstance {
	return harness.EurekaInstance{
		App: fmt.Sprintf("APP-%d", a), ID: fmt.Sprintf("app-%d-%d", a, i), IP: bigIP(a, i), Port: 80, Lease: 24 * time.Hour,
		Metadata: map[string]string{"version": "v1", "zone": "z1", "management.port": "8081"},
	}
}

// naiveFetch is the CPU time that it takes to get all applications once and to decode them, with nothing but the standard
// library.
func naiveFetch(b *testing.B, url string, apps int) time.Duration {
	b.Helper()
	req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, url, nil)
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Accept", "application/json")
	before := cpuTime(b, os.Getpid())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		b.Fatal(err)
	}
	var answer struct {
		Applications struct{ Application []map[string]any }
	}
	if err := json.Unmarshal(body, &answer); err != nil || len(answer.Applications.Application) != apps {
		b.Fatalf("%d applications, %v", len(answer.Applications.Application), err)
	}
	return cpuTime(b, os.Getpid()) - before
}
