package consul

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// agentVariable names the consul program with which the tests in this file run. They are skipped without it.
const agentVariable = "REGBRIDGE_TEST_CONSUL"

const managementToken = "8a1f2c3e-0000-4000-8000-000000000001"

// agent is a real Consul server with access control that denies by default. It keeps its data over a restart.
type agent struct {
	t       *testing.T
	program string
	dir     string
	ports   [3]int // http, server, serf
	cmd     *exec.Cmd
	exited  chan struct{}
	held    map[string]map[string]bool // service -> ids
	tokens  map[string]string          // secret -> rules
	client  *http.Client
}

func startAgent(t *testing.T) *agent {
	t.Helper()
	program := os.Getenv(agentVariable)
	if program == "" {
		t.Skipf("%s does not name a consul program", agentVariable)
	}
	a := &agent{
		t: t, program: program, dir: t.TempDir(), held: map[string]map[string]bool{}, tokens: map[string]string{},
		client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second},
	}
	for i := range a.ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		a.ports[i] = l.Addr().(*net.TCPAddr).Port
		defer l.Close()
	}
	config := fmt.Sprintf(`
		node_name = "t"
		bind_addr = "127.0.0.1"
		client_addr = "127.0.0.1"
		server = true
		bootstrap_expect = 1
		data_dir = %q
		log_level = "warn"
		disable_update_check = true
		acl { enabled = true default_policy = "deny" tokens { initial_management = %q agent = %[2]q } }
		connect { enabled = false }
		performance { raft_multiplier = 1 }
		ports { http = %d server = %d serf_lan = %d serf_wan = -1 dns = -1 grpc = -1 grpc_tls = -1 }
	`, filepath.Join(a.dir, "data"), managementToken, a.ports[0], a.ports[1], a.ports[2])
	if err := os.WriteFile(filepath.Join(a.dir, "c.hcl"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.stop)
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(a.dir, "log"))
			t.Logf("the agent's log:\n%s", log)
		}
	})
	return a
}

func (a *agent) address() string { return fmt.Sprintf("127.0.0.1:%d", a.ports[0]) }

func (a *agent) start() {
	a.t.Helper()
	log, err := os.OpenFile(filepath.Join(a.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		a.t.Fatal(err)
	}
	a.cmd = exec.Command(a.program, "agent", "-config-file", filepath.Join(a.dir, "c.hcl"))
	a.cmd.Stdout, a.cmd.Stderr = log, log
	a.cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	log.Close()
	cmd, exited := a.cmd, make(chan struct{})
	a.exited = exited
	go func() {
		defer close(exited)
		_ = cmd.Wait()
	}()
	deadline := time.Now().Add(60 * time.Second)
	for {
		if out, err := a.try("GET", "/v1/health/service/consul?passing", nil); err == nil && strings.Contains(out, `"Node"`) {
			return
		}
		select {
		case <-exited:
			a.t.Fatal("the agent ended")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			a.t.Fatal("the agent did not get ready")
		}
	}
}

func (a *agent) stop() {
	if a.cmd != nil {
		_ = a.cmd.Process.Kill()
		<-a.exited
		a.cmd = nil
	}
}

func (a *agent) wipe() {
	a.stop()
	if err := os.RemoveAll(filepath.Join(a.dir, "data")); err != nil {
		a.t.Fatal(err)
	}
	a.held = map[string]map[string]bool{}
	a.start()
	for secret, rules := range a.tokens {
		a.token(secret, rules)
	}
}

func (a *agent) try(method, path string, body any) (string, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(context.Background(), method, "http://"+a.address()+path, bytes.NewReader(b))
	if err != nil {
		return "", err
	}
	req.Header.Set("X-Consul-Token", managementToken)
	resp, err := a.client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %d %s", method, path, resp.StatusCode, out)
	}
	return string(out), err
}

func (a *agent) call(method, path string, body any) string {
	a.t.Helper()
	out, err := a.try(method, path, body)
	if err != nil {
		a.t.Fatal(err)
	}
	return out
}

// token makes a token with rules.
func (a *agent) token(secret, rules string) {
	a.t.Helper()
	a.tokens[secret] = rules
	name := "p-" + secret[:8]
	if _, err := a.try("GET", "/v1/acl/policy/name/"+name, nil); err != nil {
		a.call("PUT", "/v1/acl/policy", map[string]any{"Name": name, "Rules": rules})
	}
	a.call("PUT", "/v1/acl/token", map[string]any{
		"SecretID": secret, "AccessorID": "a" + secret[1:], "Policies": []any{map[string]any{"Name": name}},
	})
}

// revoke deletes a token.
func (a *agent) revoke(secret string) {
	a.t.Helper()
	a.call("DELETE", "/v1/acl/token/a"+secret[1:], nil)
}

func (a *agent) set(name string, instances ...registry.Instance) {
	a.t.Helper()
	now := map[string]bool{}
	for _, i := range instances {
		id := name + "-" + i.Address
		now[id] = true
		node := "node-" + i.Address
		status := "passing"
		if i.Unhealthy {
			status = "critical"
		}
		checks := []map[string]any{{"Node": node, "CheckID": "c-" + id, "Name": "web", "Status": status, "ServiceID": id}}
		maintenance := "_service_maintenance:" + id
		if i.Disabled {
			checks = append(checks, map[string]any{"Node": node, "CheckID": maintenance, "Name": "Service Maintenance Mode", "Status": "critical", "ServiceID": id})
		} else if _, err := a.try("PUT", "/v1/catalog/deregister", map[string]any{"Node": node, "CheckID": maintenance}); err != nil {
			a.t.Fatal(err)
		}
		a.call("PUT", "/v1/catalog/register", map[string]any{
			"Node": node, "Address": i.Address,
			"Service": map[string]any{
				"ID": id, "Service": name, "Address": i.Address, "Port": i.Port, "Meta": i.Metadata.Map(),
				"Weights": map[string]int{"Passing": int(i.Weight), "Warning": 1},
			},
			"Checks": checks,
		})
	}
	for id := range a.held[name] {
		if !now[id] {
			a.call("PUT", "/v1/catalog/deregister", map[string]any{"Node": "node-" + strings.TrimPrefix(id, name+"-"), "ServiceID": id})
		}
	}
	a.held[name] = now
}

const readRules = `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`

func (a *agent) backend() registrytest.Backend {
	secret := "1b2c3d4e-0000-4000-8000-00000000000a"
	a.start()
	a.token(secret, readRules)
	return registrytest.Backend{
		Entry:       registry.Entry{Type: "consul", Name: "test", Domain: a.address(), AuthSecretName: "consul"},
		Credentials: registry.Credentials{"token": registry.Secret(secret)},
		Own:         []string{"consul"},
		Set:         a.set,
		Remove:      func(name string) { a.set(name) },
		Stop:        a.stop,
		Restart:     a.start,
		Wipe:        a.wipe,
		Refuse: func(on bool) {
			if on {
				a.revoke(secret)
			} else {
				a.token(secret, readRules)
			}
		},
		Hang: func(on bool) {
			signal := syscall.SIGCONT
			if on {
				signal = syscall.SIGSTOP
			}
			if err := a.cmd.Process.Signal(signal); err != nil {
				a.t.Fatal(err)
			}
		},
	}
}

func TestAgentConformance(t *testing.T) {
	if os.Getenv(agentVariable) == "" {
		t.Skipf("%s does not name a consul program", agentVariable)
	}
	registrytest.Run(t, registrytest.Config{
		New:      New,
		Interval: time.Second,
		Timeout:  60 * time.Second,
		Start:    func(t *testing.T) registrytest.Backend { return startAgent(t).backend() },
	})
}

// TestAgentManyServices shows that more services than the agent allows connections all arrive, and change promptly. The
// times go to the log.
func TestAgentManyServices(t *testing.T) {
	a := startAgent(t)
	a.start()
	const n = 1000 // and consul
	name := func(i int) string { return fmt.Sprintf("service-%04d", i) }
	at := func(i int, port uint32) registry.Instance {
		return registry.Instance{Address: fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250), Port: port, Weight: 1}
	}
	for i := range n {
		a.set(name(i), at(i, 8080))
	}
	var requests atomic.Int64
	env := testEnv(t, registry.Credentials{"consulToken": managementToken})
	env.Observe = func(string, time.Duration, error) { requests.Add(1) }
	begun := time.Now()
	rec := runWith(t, registry.Entry{Type: "consul", Domain: a.address()}, env)
	wait := func(what string, ok func(registrytest.State) bool) {
		t.Helper()
		if _, got := rec.Wait(30*time.Second, ok); !got {
			t.Fatalf("waited in vain: %s", what)
		}
	}
	wait("all services", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == n+1 })
	t.Logf("%d services loaded after %v", n+1, time.Since(begun))

	measure := func(what string, times int, change func(i int), seen func(i int, s registrytest.State) bool) {
		t.Helper()
		var took []time.Duration
		for i := range times {
			from := time.Now()
			change(i)
			wait(what, func(s registrytest.State) bool { return seen(i, s) })
			took = append(took, time.Since(from))
			time.Sleep(300 * time.Millisecond) // the registry is quiet in between
		}
		slices.Sort(took)
		t.Logf("%-55s p50 %v max %v", what, took[times/2].Round(100*time.Microsecond), took[times-1].Round(100*time.Microsecond))
		if took[times-1] > 5*time.Second {
			t.Errorf("%s took %v", what, took[times-1])
		}
	}
	port := func(service string, port uint32) func(registrytest.State) bool {
		return func(s registrytest.State) bool {
			in := s.Services[service].Instances
			return len(in) == 1 && in[0].Port == port
		}
	}
	measure("a new service", 10,
		func(i int) { a.set(fmt.Sprintf("new-%d", i), at(2000+i, 80)) },
		func(i int, s registrytest.State) bool { return port(fmt.Sprintf("new-%d", i), 80)(s) })
	measure("a new port, each time of another service", 40,
		func(i int) { a.set(name(i*25), at(i*25, 9000)) },
		func(i int, s registrytest.State) bool { return port(name(i*25), 9000)(s) })
	measure("a new port, again of the same service", 10,
		func(i int) { a.set(name(500), at(500, uint32(9100+i))) },
		func(i int, s registrytest.State) bool { return port(name(500), uint32(9100+i))(s) })
	measure("a check turns critical, each time of another service", 40,
		func(i int) {
			in := at(i*25, 9000)
			in.Unhealthy = true
			a.set(name(i*25), in)
		},
		func(i int, s registrytest.State) bool {
			in := s.Services[name(i*25)].Instances
			return len(in) == 1 && in[0].Unhealthy
		})
	measure("a service is gone", 10,
		func(i int) { a.set(fmt.Sprintf("new-%d", i)) },
		func(i int, s registrytest.State) bool {
			return len(s.Services[fmt.Sprintf("new-%d", i)].Instances) == 0
		})

	before := requests.Load()
	time.Sleep(20 * time.Second)
	t.Logf("requests at rest: %.1f/s", float64(requests.Load()-before)/20)
	t.Logf("connections at rest: %d", a.connections())
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("%v %v", e.IDs, e.Err)
		}
	}
}

// connections counts the established connections to the agent.
func (a *agent) connections() int {
	n := 0
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line)
			if len(f) > 3 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", a.ports[0])) && f[3] == "01" {
				n++
			}
		}
	}
	return n
}
