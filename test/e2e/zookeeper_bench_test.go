package e2e

import (
	"fmt"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/harness"
)

// BenchmarkZooKeeper measures 10,000 interfaces of 5 providers in one ZooKeeper: the time until all have been read, what that
// costs the server in requests and watches, what regbridge and the server do at rest, and the time from one change to an xDS
// client, beside that to a plain client that watches the same node.
func BenchmarkZooKeeper(b *testing.B) {
	if runtime.GOOS != "linux" {
		b.Skip("reads the CPU time of a process from /proc")
	}
	const interfaces, providers = 10_000, 5
	z := zkServer{harness.StartZooKeeper(b, harness.ZooKeeperOptions{Heap: 1000, TickTime: 2 * time.Second})}
	conn := z.Client(b)
	create(b, conn, "/dubbo")
	for i := range interfaces {
		ops := []any{createOp(benchInterface(i)), createOp(benchInterface(i) + "/providers"), createOp(benchInterface(i) + "/configurators")}
		for p := range providers {
			ops = append(ops, createOp(benchProvider(i, p)))
		}
		if _, err := conn.Multi(ops...); err != nil {
			b.Fatal(err)
		}
	}
	before := z.packets(b)
	began := time.Now()
	bridge := harness.StartRegbridge(b, harness.RegbridgeOptions{
		Config: map[string]string{"zk.yaml": mcpBridge("zk", fmt.Sprintf("{type: zookeeper, name: z, domain: '%s'}", z.Address))},
		Args:   []string{"--first-answer-deadline", "10m", "--dialect", "higress"},
	})
	bridge.WaitReady(10 * time.Minute)
	sync := time.Since(began)
	read := z.packets(b) - before
	w := &world{bridge: bridge}
	if s, err := w.status("z"); err != nil || s.Published != interfaces*providers {
		b.Fatalf("the registry is %+v, %v", s, err)
	}
	client := startDeltaReader(b, bridge.XDS)
	endpoints := func(i, n int) []string {
		all := make([]string, n)
		for p := range all {
			all[p] = bigIP(i, p) + ":20880"
		}
		return all
	}
	host := func(i int) string { return fmt.Sprintf("providers:com.example.Service%d:1.0.0:.zookeeper", i) }
	harness.Eventually(b, patience, func() error { return client.check(host(0), endpoints(0, providers)...) })

	const rest = 30 * time.Second // a refresh interval
	packets, cpu := z.packets(b), cpuTime(b, bridge.PID())
	<-time.After(rest)
	perSecond := (z.packets(b) - packets) / rest.Seconds()
	share := (cpuTime(b, bridge.PID()) - cpu).Seconds() / rest.Seconds()

	var added, gone, plain []time.Duration
	i := interfaces / 2
	for b.Loop() {
		for _, extra := range []int{1, 0} {
			node := benchProvider(i, providers)
			_, _, event, err := conn.ChildrenW(benchInterface(i) + "/providers")
			if err != nil {
				b.Fatal(err)
			}
			<-time.After(quiet)
			changed := time.Now()
			if extra == 1 {
				create(b, conn, node)
			} else if err := conn.Delete(node, -1); err != nil {
				b.Fatal(err)
			}
			<-event
			if extra == 1 {
				plain = append(plain, time.Since(changed))
			}
			client.await(b, host(i), providers+extra)
			if extra == 1 {
				added = append(added, time.Since(changed))
			} else {
				gone = append(gone, time.Since(changed))
			}
		}
		i++
	}
	for _, times := range [][]time.Duration{added, gone, plain} {
		slices.Sort(times)
	}
	b.ReportMetric(sync.Seconds(), "s/first-sync")
	b.ReportMetric(read/interfaces, "requests/interface")
	b.ReportMetric(z.watches(b)/interfaces, "watches/interface")
	b.ReportMetric(perSecond, "requests/s-at-rest")
	b.ReportMetric(100*share, "cpu-%-at-rest")
	b.ReportMetric(rss(b, bridge.PID()), "MB-RSS")
	b.ReportMetric(ms(added[len(added)/2]), "p50-ms/added")
	b.ReportMetric(ms(gone[len(gone)/2]), "p50-ms/gone") // 100 ms of it wait for the provider to come again
	b.ReportMetric(float64(added[len(added)/2])/float64(plain[len(plain)/2]), "added-to-watch")
}

func benchInterface(i int) string { return fmt.Sprintf("/dubbo/com.example.Service%d", i) }

func benchProvider(i, p int) string {
	return benchInterface(i) + "/providers/" + url.QueryEscape(fmt.Sprintf("dubbo://%s:20880/com.example.Service%d?anyhost=true"+
		"&application=app-%d&dubbo=2.0.2&interface=com.example.Service%d&methods=get,list,put,remove&pid=4711&release=3.3.6&side=provider"+
		"&timestamp=1700000000000&version=1.0.0", bigIP(i, p), i, i, i))
}

func createOp(path string) *zk.CreateRequest {
	return &zk.CreateRequest{Path: path, Acl: zk.WorldACL(zk.PermAll)}
}

func create(b *testing.B, conn *zk.Conn, path string) {
	b.Helper()
	if _, err := conn.Create(path, nil, 0, zk.WorldACL(zk.PermAll)); err != nil {
		b.Fatal(err)
	}
}

// zkServer counts at the server.
type zkServer struct{ *harness.ZooKeeper }

// packets is how many requests the server has taken, pings included.
func (z zkServer) packets(b *testing.B) float64 { return z.count(b, "zk_packets_received") }

// watches is how many watches the server keeps.
func (z zkServer) watches(b *testing.B) float64 { return z.count(b, "zk_watch_count") }

// count reads one line of what the server tells of itself.
func (z zkServer) count(b *testing.B, name string) float64 {
	b.Helper()
	for line := range strings.Lines(z.FourLetter("mntr")) {
		if value, ok := strings.CutPrefix(line, name+"\t"); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Fatalf("the server does not tell %s", name)
	return 0
}
