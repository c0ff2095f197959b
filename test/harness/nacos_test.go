package harness

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/servers"
)

// The servers take their time, and a busy machine multiplies it.
const nacosTimeout = time.Minute

// The tests of one version share a server, because starting one is what costs.

func TestNacos1(t *testing.T) { testNacos(t, servers.Nacos1, NacosOptions{Auth: true}) }
func TestNacos2(t *testing.T) { testNacos(t, servers.Nacos2, NacosOptions{Auth: true}) }
func TestNacos3(t *testing.T) { testNacos(t, servers.Nacos3, NacosOptions{Auth: true, Console: true}) }

func testNacos(t *testing.T, server servers.Server, o NacosOptions) {
	began := time.Now()
	n := StartNacos(t, server, o)
	t.Logf("%s ready after %v", server, time.Since(began))
	for _, step := range []struct {
		name string
		run  func(*testing.T, *Nacos)
	}{
		{"new", nacosIsEmpty},
		{"login", nacosAsksForALogin},
		{"api", nacosTakesInstances},
		{"provider", nacosProviders},
		{"users", nacosUsers},
		{"pause", nacosPauses},
		{"restart", nacosRestarts},
	} {
		began := time.Now()
		step.run(t, n)
		t.Logf("%s: %v", step.name, time.Since(began))
		if t.Failed() {
			return // what follows builds on it
		}
	}
	t.Logf("%s: %s at most", server, memory(t, n.PID()))
}

// memory is the most physical memory that a process has had so far.
func memory(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

// wildcards lists the sockets of a process that are bound to all addresses of the machine, as /proc/net has them.
func wildcards(t *testing.T, pid int) (found []string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	sockets := map[string]bool{} // by inode
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if inode, ok := strings.CutPrefix(target, "socket:["); ok && err == nil {
			sockets[strings.TrimSuffix(inode, "]")] = true
		}
	}
	if len(sockets) == 0 {
		t.Errorf("process %d has no sockets", pid)
	}
	for _, kind := range []string{"tcp", "tcp6", "udp", "udp6"} {
		table, err := os.ReadFile("/proc/net/" + kind)
		if err != nil {
			continue // a machine without IPv6
		}
		for line := range strings.Lines(string(table)) {
			f := strings.Fields(line) // sl local remote state queues timers retransmissions uid timeout inode
			if len(f) > 9 && sockets[f[9]] && strings.Trim(strings.Split(f[1], ":")[0], "0") == "" {
				found = append(found, kind+" "+f[1])
			}
		}
	}
	return found
}

// reaches waits until the server lists these instances of a service, as address/weight/metadata.
func reaches(t *testing.T, n *Nacos, namespace, group, service string, want ...string) {
	t.Helper()
	Eventually(t, nacosTimeout, func() error {
		all, err := n.Instances(namespace, group, service)
		if err != nil {
			return err
		}
		if got := described(all); !slices.Equal(got, want) {
			return fmt.Errorf("%s lists %v of %s %s, want %v", n.name, got, namespace, service, want)
		}
		return nil
	})
}

func described(all []NacosInstance) []string {
	var texts []string
	for _, i := range all {
		metadata := maps.Clone(i.Metadata)
		maps.DeleteFunc(metadata, func(k, _ string) bool { return strings.HasPrefix(k, "preserved.") })
		text := fmt.Sprintf("%s:%d %s %v", i.IP, i.Port, i.Cluster, i.weight())
		if len(metadata) > 0 {
			text += fmt.Sprint(" ", metadata)
		}
		if i.Unhealthy {
			text += " unhealthy"
		}
		texts = append(texts, text)
	}
	slices.Sort(texts)
	return texts
}

func expectServices(t *testing.T, n *Nacos, namespace, group string, want ...string) {
	t.Helper()
	Eventually(t, 10*time.Second, func() error {
		got, err := n.Services(namespace, group)
		slices.Sort(got)
		if err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("services of %q %q: %v, want %v", namespace, group, got, want)
		}
		return err
	})
}

func nacosIsEmpty(t *testing.T, n *Nacos) {
	t.Helper()
	for _, namespace := range []string{"", "regbridge-probe"} {
		if got, err := n.Services(namespace, ""); err != nil || len(got) > 0 {
			t.Errorf("a new server has the services %v in namespace %q (%v)", got, namespace, err)
		}
	}
	if open := wildcards(t, n.PID()); len(open) > 0 {
		t.Errorf("the server can be reached from the network: %v", open)
	}
	if n.Console != "" {
		if _, err := getOK(t.Context(), "http://"+n.Console+"/"); err != nil {
			t.Error(err)
		}
	}
}

func nacosAsksForALogin(t *testing.T, n *Nacos) {
	t.Helper()
	list := func(query string) int {
		t.Helper()
		status, _, err := Get(t.Context(), "http://"+n.Address+"/nacos/v1/ns/service/list?pageNo=1&pageSize=9"+query)
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	if got := list(""); got != http.StatusForbidden {
		t.Errorf("without a login the server answers %d", got)
	}
	if token, err := n.Token(n.User, "wrong"); err == nil {
		t.Errorf("a wrong password gets the token %q", token)
	}
	token, err := n.Token(n.User, n.Password)
	if err != nil {
		t.Fatal(err)
	}
	if got := list("&accessToken=" + token); got != http.StatusOK {
		t.Errorf("with a login the server answers %d", got)
	}
}

func nacosTakesInstances(t *testing.T, n *Nacos) {
	t.Helper()
	half := 0.5
	web := NacosInstance{Service: "web", IP: "10.0.0.1", Port: 80, Weight: &half, Metadata: map[string]string{"v": "1"}}
	other := NacosInstance{Service: "web", IP: "10.0.0.2", Port: 80, Cluster: "c1"}
	n.Register(web, other)
	reaches(t, n, "", "", "web", "10.0.0.1:80 DEFAULT 0.5 map[v:1]", "10.0.0.2:80 c1 1")
	web.Metadata, web.Weight = map[string]string{"v": "2"}, nil
	n.Update(web)
	reaches(t, n, "", "", "web", "10.0.0.1:80 DEFAULT 1 map[v:2]", "10.0.0.2:80 c1 1")
	web.Disabled = true
	n.Update(web)
	reaches(t, n, "", "", "web", "10.0.0.2:80 c1 1")
	n.Deregister(web, other)
	reaches(t, n, "", "", "web")

	n.CreateNamespace("dev")
	big := NacosInstance{Namespace: "dev", Group: "g", Service: "big", IP: "10.0.0.1", Port: 80}
	big.Metadata = map[string]string{"k": strings.Repeat("x", 800)} // what Nacos takes is 1024 bytes
	n.Register(big)
	reaches(t, n, "dev", "g", "big", "10.0.0.1:80 DEFAULT 1 "+fmt.Sprint(big.Metadata))
	expectServices(t, n, "dev", "g", "big")
	expectServices(t, n, "", "g")
	n.Deregister(big)
	reaches(t, n, "dev", "g", "big")
	expectServices(t, n, "dev", "g", "big")
	n.DeleteService("dev", "g", "big")
	expectServices(t, n, "dev", "g")

	mortal := NacosInstance{Service: "mortal", IP: "10.0.0.1", Port: 80, Mortal: true, Metadata: quick()}
	n.Register(mortal)
	reaches(t, n, "", "", "mortal", "10.0.0.1:80 DEFAULT 1")
	n.Beat(mortal) // the last one: nacosProviders expects the instance to be gone

	n.Register(NacosInstance{Service: "kept", IP: "127.0.0.9", Port: 80, Persistent: true})
	Eventually(t, nacosTimeout, func() error { // health is the server's own finding
		all, err := n.Instances("", "", "kept")
		if err == nil && (len(all) != 1 || !all[0].Persistent) {
			err = fmt.Errorf("kept has %+v, want one persistent instance", all)
		}
		return err
	})
}

// quick lets the server notice within seconds that an instance is dead.
func quick() map[string]string {
	return map[string]string{
		"preserved.heart.beat.interval": "1000", "preserved.heart.beat.timeout": "3000", "preserved.ip.delete.timeout": "6000",
	}
}

func nacosProviders(t *testing.T, n *Nacos) {
	t.Helper()
	began := time.Now()
	first, second := n.StartProvider(NacosProviderOptions{Beat: time.Second}), n.StartProvider(NacosProviderOptions{})
	t.Logf("two providers are ready after %v", time.Since(began))
	a := NacosInstance{IP: "10.0.0.1", Port: 80, Metadata: quick()}
	b := NacosInstance{IP: "10.0.0.2", Port: 80, Metadata: quick()}
	c := NacosInstance{IP: "10.0.0.3", Port: 80}
	first.Provide("g", "app", a, b)
	reaches(t, n, "", "g", "app", "10.0.0.1:80 DEFAULT 1", "10.0.0.2:80 DEFAULT 1")
	second.Provide("g", "app", c)
	reaches(t, n, "", "g", "app", "10.0.0.1:80 DEFAULT 1", "10.0.0.2:80 DEFAULT 1", "10.0.0.3:80 DEFAULT 1")
	first.Provide("g", "app", b)
	reaches(t, n, "", "g", "app", "10.0.0.2:80 DEFAULT 1", "10.0.0.3:80 DEFAULT 1")

	var many []NacosInstance
	for service := range 100 {
		for host := range 2 {
			many = append(many, NacosInstance{Service: fmt.Sprintf("many-%d", service), IP: fmt.Sprintf("10.1.%d.%d", service, host), Port: 80})
		}
	}
	byHTTP, byGRPC := requests(t, n)
	began = time.Now()
	second.ProvideAll(many...)
	t.Logf("100 services of 2 instances are registered after %v", time.Since(began))
	Eventually(t, nacosTimeout, func() error { // the server counts gRPC from time to time
		http, grpc := requests(t, n)
		if n.Version == 1 && http < byHTTP+200 || n.Version > 1 && grpc < byGRPC+100 {
			return fmt.Errorf("the server took %v requests by HTTP and %v by gRPC, before %v and %v", http, grpc, byHTTP, byGRPC)
		}
		return nil
	})
	reaches(t, n, "", "", "many-7", "10.1.7.0:80 DEFAULT 1", "10.1.7.1:80 DEFAULT 1")

	if n.Version > 1 {
		nacosTells(t, n, second)
	}
	first.Kill()
	began = time.Now()
	reaches(t, n, "", "g", "app", "10.0.0.3:80 DEFAULT 1")
	t.Logf("a killed provider's instance is gone after %v", time.Since(began))
	second.Provide("g", "app")
	reaches(t, n, "", "g", "app")
	second.Provide("g", "app", c)
	if err := second.Stop(); err != nil {
		t.Error(err)
	}
	reaches(t, n, "", "g", "app")
	reaches(t, n, "", "", "many-7")
	reaches(t, n, "", "", "mortal") // it has had no sign of life since nacosTakesInstances
}

// A server with a wrong class path does all that it is asked to, but never tells anybody of a change.
func nacosTells(t *testing.T, n *Nacos, p *NacosProvider) {
	t.Helper()
	w := n.StartProvider(NacosProviderOptions{})
	told := func(want ...string) {
		t.Helper()
		Eventually(t, nacosTimeout, func() error {
			all, err := w.Watch("", "told")
			if got := described(all); err == nil && (all == nil || !slices.Equal(got, want)) {
				err = fmt.Errorf("the client was told of %v (nil: %v), want %v", got, all == nil, want)
			}
			return err
		})
	}
	subscribers := func(want int) {
		t.Helper()
		Eventually(t, nacosTimeout, func() error {
			got, err := n.Subscribers("", "", "told")
			if err == nil && got != want {
				err = fmt.Errorf("told has %d subscribers, want %d", got, want)
			}
			return err
		})
	}
	told()
	subscribers(1)
	began := time.Now()
	p.Provide("", "told", NacosInstance{IP: "10.0.0.1", Port: 80, Unhealthy: true})
	told("10.0.0.1:80 DEFAULT 1 unhealthy")
	t.Logf("a client is told of an instance after %v", time.Since(began))
	p.Provide("", "told")
	told()
	w.Kill()
	subscribers(0)
}

func nacosUsers(t *testing.T, n *Nacos) {
	t.Helper()
	n.CreateUser("reader", "first", "", "dev")
	if err := n.mayRead("reader", "first", "other"); err == nil {
		t.Error("a reader of two namespaces may read a third one")
	}
	n.SetPassword("reader", "second")
	if err := n.mayRead("reader", "second", "", "dev"); err != nil {
		t.Error(err)
	}
	if _, err := n.Token("reader", "first"); err == nil {
		t.Error("a reader's old password is still good")
	}
	n.SetPassword(n.User, "changed")
	if _, err := n.Token(n.User, nacosUser); err == nil {
		t.Error("the old password is still good")
	}
	if _, err := n.Token(n.User, "changed"); err != nil || n.Password != "changed" {
		t.Errorf("%v with the new password; Password is %q", err, n.Password)
	}
}

func nacosPauses(t *testing.T, n *Nacos) {
	t.Helper()
	n.Pause()
	short, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := n.ready(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a paused server: %v, want that it hangs", err)
	}
	n.Resume()
	Eventually(t, nacosTimeout, func() error { return n.ready(t.Context()) })
	// A request is counted after its answer went out.
	before := -1.0
	Eventually(t, nacosTimeout, func() error {
		last := before
		if before, _ = requests(t, n); before != last {
			return fmt.Errorf("%v requests, and %v before", before, last)
		}
		return nil
	})
	const asked = 10
	for range asked {
		if _, err := n.Services("", ""); err != nil {
			t.Fatal(err)
		}
	}
	Eventually(t, nacosTimeout, func() error {
		if after, _ := requests(t, n); after != before+asked {
			return fmt.Errorf("%v requests before, %v after %d more", before, after, asked)
		}
		return nil
	})
}

func requests(t *testing.T, n *Nacos) (http, grpc float64) {
	t.Helper()
	http, grpc, err := n.Requests()
	if err != nil {
		t.Fatal(err)
	}
	return http, grpc
}

func nacosRestarts(t *testing.T, n *Nacos) {
	t.Helper()
	p := n.StartProvider(NacosProviderOptions{Beat: time.Second})
	p.Provide("", "app", NacosInstance{IP: "10.0.0.1", Port: 80})
	kept := func(want int) {
		t.Helper()
		if all, err := n.Instances("", "", "kept"); err != nil || len(all) != want {
			t.Errorf("%d persistent instances, want %d (%v)", len(all), want, err)
		}
	}
	address := n.Address
	began := time.Now()
	n.Restart(false)
	t.Logf("ready again, with data, after %v", time.Since(began))
	kept(1)
	if _, err := n.Token(n.User, "changed"); err != nil || n.Address != address {
		t.Errorf("%v; address %s, before %s", err, n.Address, address)
	}
	began = time.Now()
	reaches(t, n, "", "", "app", "10.0.0.1:80 DEFAULT 1")
	t.Logf("a provider that lived on is back after %v", time.Since(began))

	p.Kill()
	n.Restart(true)
	kept(0)
	expectServices(t, n, "", "")
	if _, err := n.Token(nacosUser, nacosUser); err != nil || n.Password != nacosUser {
		t.Errorf("%v after an empty restart; Password is %q", err, n.Password)
	}
}

// The zero value is a server that asks nobody for a login.
func TestNacosWithoutLogin(t *testing.T) {
	n := StartNacos(t, servers.Nacos1, NacosOptions{})
	if _, err := getOK(t.Context(), "http://"+n.Address+"/nacos/v1/ns/service/list?pageNo=1&pageSize=9"); err != nil {
		t.Error(err)
	}
}

// A server that cannot start says why.
func TestNacosDoesNotStart(t *testing.T) {
	got := failures(t, func(tb testing.TB) {
		tb.Helper()
		StartNacos(tb, servers.Nacos2, NacosOptions{Auth: true, Properties: map[string]string{
			"nacos.core.auth.plugin.nacos.token.secret.key": "c2hvcnQ=",
		}})
	})
	for _, want := range []string{"start nacos2", "it ended before it was ready", "secret key", "nacos/logs/nacos.log"} {
		if !strings.Contains(strings.ToLower(got), want) {
			t.Errorf("the failure does not have %q: %s", want, got)
		}
	}
}
