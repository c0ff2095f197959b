package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// patience is the longest wait for what takes milliseconds on an idle machine.
const patience = 30 * time.Second

// A world is the whole way of an endpoint, from registries to requests. All services have one port: Envoy listens on it at
// 127.0.0.1, and the upstreams at other addresses. Parts that a test does not start are nil.
type world struct {
	consul *harness.Consul
	dns    *harness.CoreDNS
	bridge *harness.Regbridge
	istiod *harness.Istiod
	envoy  *harness.Envoy
	client *http.Client

	port   int
	lastIP int // the last part of the address of the upstream that was started last
}

// newWorld makes a world without servers.
func newWorld(t *testing.T) *world {
	t.Helper()
	return &world{port: harness.FreePort(t)}
}

// startConsul starts Consul, and regbridge reading it with the settings given, in YAML. The guard's times are short.
func (w *world) startConsul(t *testing.T, o harness.ConsulOptions, settings string) {
	t.Helper()
	w.consul = harness.StartConsul(t, o)
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"consul.yaml": w.consulBridge(settings)}})
}

// consulBridge is a McpBridge with the one entry "c" for Consul.
func (w *world) consulBridge(settings string) string {
	return mcpBridge("consul", w.consulEntry("c", settings))
}

func (w *world) consulEntry(name, settings string) string {
	host, port, _ := net.SplitHostPort(w.consul.Address)
	// Consul's own service would make Envoy listen on the port on which Consul itself does.
	return fmt.Sprintf("{type: consul, name: %s, domain: %s, port: %s, consulDatacenter: dc1, "+
		"vport: {services: [{name: consul.dc1.consul, value: %d}]}, %s}",
		name, host, port, w.port, cmp.Or(settings, "refreshInterval: 2s, guard: {settle: 2s, hold: 3s}"))
}

func (w *world) startBridge(t *testing.T, o harness.RegbridgeOptions) {
	t.Helper()
	w.bridge = harness.StartRegbridge(t, o)
}

// startMesh starts istiod, reading from the base port, and a sidecar.
func (w *world) startMesh(t *testing.T, o harness.IstiodOptions, s harness.SidecarOptions) {
	t.Helper()
	if o.Sources == nil {
		o.Sources = []harness.MCPSource{{Address: w.bridge.XDS}}
	}
	w.istiod = harness.StartIstiod(t, o)
	w.envoy = harness.StartSidecar(t, w.istiod, s)
	w.client = w.envoy.Client()
}

// consulWorld is a world with Consul and a mesh.
func consulWorld(t *testing.T, o harness.ConsulOptions, settings string) *world {
	t.Helper()
	w := newWorld(t)
	w.startConsul(t, o, settings)
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})
	return w
}

// mcpBridge is a McpBridge resource with entries that are YAML flow maps.
func mcpBridge(name string, entries ...string) string {
	return "apiVersion: networking.higress.io/v1\nkind: McpBridge\nmetadata: {name: " + name + ", namespace: prod}\n" +
		"spec:\n  registries:\n  - " + strings.Join(entries, "\n  - ") + "\n"
}

// upstream starts an instance at an address of its own, with the world's port. It answers with its name.
func (w *world) upstream(t *testing.T, name string) *harness.Upstream {
	t.Helper()
	return harness.StartUpstream(t, w.upstreamOptions(name))
}

func (w *world) upstreamOptions(name string) harness.UpstreamOptions {
	w.lastIP = max(w.lastIP, 1) + 1
	return harness.UpstreamOptions{Name: name, IP: fmt.Sprintf("127.0.0.%d", w.lastIP), Port: w.port}
}

// instance is the registration of an upstream in Consul, under its own name as the id.
func instance(service string, u *harness.Upstream) api.AgentServiceRegistration {
	return api.AgentServiceRegistration{ID: u.Name, Name: service, Address: u.IP, Port: u.Port}
}

// start starts and registers an instance.
func (w *world) start(t *testing.T, service, name string) *harness.Upstream {
	t.Helper()
	u := w.upstream(t, name)
	w.consul.Register(instance(service, u))
	return u
}

// inConsul is the host that a service of Consul has in the mesh.
func inConsul(service string) string { return service + ".dc1.consul" }

func (w *world) url(host string) string { return "http://" + host + ":" + strconv.Itoa(w.port) + "/" }

// A statusError is an answer that is not 200: Envoy's own, since upstreams do not give others.
type statusError struct {
	status int
	body   string
}

func (e *statusError) Error() string { return fmt.Sprintf("%d %s", e.status, e.body) }

// ask sends one request through Envoy, and returns the name of the upstream that answered.
func (w *world) ask(host string) (string, error) {
	resp, err := w.client.Get(w.url(host))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %w", host, &statusError{resp.StatusCode, string(body)})
	}
	return string(body), nil
}

// unavailable tells whether an error of ask is Envoy's "503 no healthy upstream".
func unavailable(err error) bool {
	var e *statusError
	return errors.As(err, &e) && e.status == http.StatusServiceUnavailable && strings.Contains(e.body, "no healthy upstream")
}

// serves waits until these upstreams, and no others, answer for the host, and istiod has exactly them as its endpoints.
func (w *world) serves(t *testing.T, host string, upstreams ...*harness.Upstream) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		if err := w.has(host, addresses(upstreams)...); err != nil {
			return err
		}
		var names []string
		for _, u := range upstreams {
			names = append(names, u.Name)
		}
		return w.answers(host, names...)
	})
}

// answers returns nil if the instances of these names, and no others, answer for the host.
func (w *world) answers(host string, want ...string) error {
	got := map[string]bool{}
	for range 4 * len(want) {
		name, err := w.ask(host)
		if err != nil {
			return err
		}
		got[name] = true
	}
	slices.Sort(want)
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, want) {
		return fmt.Errorf("%s is answered by %v, want %v", host, names, want)
	}
	return nil
}

// serves503 waits until Envoy answers by itself for the host, and istiod still has the service, without endpoints.
func (w *world) serves503(t *testing.T, host string) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		if err := w.has(host); err != nil {
			return err
		}
		hosts, err := w.hosts()
		if err != nil {
			return err
		}
		if !slices.Contains(hosts, host) {
			return fmt.Errorf("istiod has no service %s any more", host)
		}
		if name, err := w.ask(host); !unavailable(err) {
			return fmt.Errorf("%s is answered by %q, want 503; error: %w", host, name, err)
		}
		return nil
	})
}

func addresses(upstreams []*harness.Upstream) []string {
	var all []string
	for _, u := range upstreams {
		all = append(all, u.Address())
	}
	return all
}

// has returns nil if these addresses are istiod's endpoints of the host.
func (w *world) has(host string, want ...string) error {
	all, err := w.istiod.Endpoints()
	if err != nil {
		return err
	}
	var got []string
	for _, e := range all[host] {
		got = append(got, net.JoinHostPort(e.Addresses[0], strconv.Itoa(e.EndpointPort)))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return fmt.Errorf("istiod's endpoints of %s are %v, want %v", host, got, want)
	}
	return nil
}

// hosts lists the services that istiod has.
func (w *world) hosts() ([]string, error) {
	services, err := w.istiod.Registryz()
	if err != nil {
		return nil, err
	}
	var all []string
	for _, s := range services {
		all = append(all, s.Hostname)
	}
	slices.Sort(all)
	return all, nil
}

// registryStatus is what is used of one element of /debug/registries.
type registryStatus struct {
	Registry, State, LastError string
	Stale                      bool
	Services, Published, Held  int
	LeftOutInstances           []struct{ Service, Address, Reason string }
	FailedServices             map[string]string
}

// status is what regbridge says of a registry.
func (w *world) status(name string) (registryStatus, error) {
	var all []registryStatus
	if err := w.bridge.JSON("/debug/registries?registry="+name, &all); err != nil {
		return registryStatus{}, err
	}
	if len(all) != 1 {
		return registryStatus{}, fmt.Errorf("%d registries are named %s", len(all), name)
	}
	return all[0], nil
}

// inState waits until regbridge says that a registry is in this state.
func (w *world) inState(t *testing.T, name, state string) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		s, err := w.status(name)
		if err == nil && s.State != state {
			err = fmt.Errorf("registry %s is %s (%s), want %s", name, s.State, s.LastError, state)
		}
		return err
	})
}

// holds waits until regbridge says that it holds n endpoints of a registry.
func (w *world) holds(t *testing.T, name string, n int) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		s, err := w.status(name)
		if err == nil && s.Held != n {
			err = fmt.Errorf("%d endpoints of %s are held, want %d; it is %s (%s)", s.Held, name, n, s.State, s.LastError)
		}
		return err
	})
}

// traffic is an endless row of requests for one host, one after the other.
type traffic struct {
	host    string
	cancel  context.CancelFunc
	done    chan struct{} // closed at the end; the rest is valid then
	answers map[string]int
	failed  []string
}

// pace is the time between two requests of traffic.
const pace = 4 * time.Millisecond

// traffic begins to send requests. None may fail until end is called.
func (w *world) traffic(t *testing.T, host string) *traffic {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	f := &traffic{host: host, cancel: cancel, done: make(chan struct{}), answers: map[string]int{}}
	t.Cleanup(func() {
		cancel()
		<-f.done
	})
	go func() {
		defer close(f.done)
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for began := time.Now(); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			name, err := w.ask(host)
			if err != nil {
				f.failed = append(f.failed, fmt.Sprintf("after %v: %v", time.Since(began).Round(time.Millisecond), err))
			} else {
				f.answers[name]++
			}
		}
	}()
	return f
}

// end ends the requests, and fails the test if one failed.
func (f *traffic) end(t *testing.T) {
	t.Helper()
	f.cancel()
	<-f.done
	total := 0
	for _, n := range f.answers {
		total += n
	}
	t.Logf("%d requests for %s, %d failed, answers: %v", total+len(f.failed), f.host, len(f.failed), f.answers)
	if len(f.failed) > 0 {
		t.Errorf("%d requests for %s failed, the first %s", len(f.failed), f.host, f.failed[0])
	}
	if total == 0 {
		t.Errorf("no request for %s was answered", f.host)
	}
}

// measured logs the median and the maximum.
func measured(t testing.TB, what string, samples []time.Duration) {
	t.Helper()
	sorted := slices.Sorted(slices.Values(samples))
	t.Logf("measured: %s: p50 %v, max %v (%d times)", what,
		sorted[len(sorted)/2].Round(100*time.Microsecond), sorted[len(sorted)-1].Round(100*time.Microsecond), len(sorted))
}

// soon asks for the host, request after request, until want says that the answer is the awaited one; it returns when.
func (w *world) soon(t *testing.T, host string, want func(name string, err error) bool) time.Time {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; {
		name, err := w.ask(host)
		if want(name, err) {
			return time.Now()
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s still answers %q, %v", host, name, err)
		}
		<-tick.C
	}
}

// quiet is a time for which regbridge and its reader of Consul do not collect changes any more: the next change is the first
// after a quiet time.
const quiet = 400 * time.Millisecond

// pause lets time pass between two measurements. Nothing may depend on what happens meanwhile.
func pause(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-t.Context().Done():
	case <-time.After(d):
	}
}

// soak skips tests that take minutes, unless they are asked for.
func soak(t *testing.T) {
	t.Helper()
	if os.Getenv("SOAK") == "" {
		t.Skip("takes minutes: make soak")
	}
}
