package harness

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// lists waits until the server lists these instances, as id status/override metadata, beside the servers themselves.
func (e *Eureka) lists(t *testing.T, want ...string) {
	t.Helper()
	Eventually(t, 30*time.Second, func() error {
		all, err := e.Apps()
		if err != nil {
			return err
		}
		var got []string
		for _, i := range all {
			if i.App == "EUREKA" {
				continue
			}
			delete(i.Metadata, "management.port")
			text := i.App + " " + i.ID + " " + i.Status
			if i.Overridden != "UNKNOWN" {
				text += "/" + i.Overridden
			}
			if len(i.Metadata) > 0 {
				text += fmt.Sprint(" ", i.Metadata)
			}
			got = append(got, text)
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("%s lists %q, want %q", e.name, got, want)
		}
		return nil
	})
}

func TestEureka(t *testing.T) {
	t.Parallel()
	began := time.Now()
	e := StartEureka(t, EurekaOptions{User: "reader", Password: "p#1/%+"})
	t.Logf("eureka ready after %v", time.Since(began))
	if open := wildcards(t, e.PID()); len(open) > 0 {
		t.Errorf("the server can be reached from the network: %v", open)
	}
	if status, body, err := Get(t.Context(), e.URL+"/apps"); err != nil || status != http.StatusUnauthorized {
		t.Errorf("without a login: %d %s (%v)", status, body, err)
	}
	e.lists(t)
	full := EurekaInstance{
		App: "orders", ID: "a", IP: "10.0.0.1", HostName: "a.example", Port: 80, PortDisabled: true, SecurePort: 8443,
		Status: "DOWN", Metadata: map[string]string{"v": "1"}, Lease: time.Minute, Zone: "z-1a",
	}
	b := EurekaInstance{App: "orders", IP: "10.0.0.2", Port: 81}
	e.Register(full, b)
	e.lists(t, "ORDERS 10.0.0.2:orders:81 UP", "ORDERS a DOWN map[v:1]")
	all, err := e.Apps()
	if err != nil {
		t.Fatal(err)
	}
	full.App, full.Overridden = "ORDERS", "UNKNOWN"
	if got := all[1]; fmt.Sprint(got) != fmt.Sprint(full) {
		t.Errorf("registered %v, listed %v", full, got)
	}
	e.SetStatus(b, "OUT_OF_SERVICE")
	e.PutMetadata(b, "k/1", "a b&c")
	e.lists(t, "ORDERS 10.0.0.2:orders:81 OUT_OF_SERVICE/OUT_OF_SERVICE map[k/1:a b&c]", "ORDERS a DOWN map[v:1]")
	e.DeleteStatus(b, "UP")
	e.lists(t, "ORDERS 10.0.0.2:orders:81 UP map[k/1:a b&c]", "ORDERS a DOWN map[v:1]")
	e.Deregister(full, b)
	e.lists(t)
	if err := e.Heartbeat(b); err == nil {
		t.Error("an instance that is gone has a heartbeat")
	}

	b.Lease = time.Second
	stop := e.KeepAlive(300*time.Millisecond, b)
	address := e.Address
	e.Restart()
	if e.Address != address {
		t.Errorf("restarted at %s, before %s", e.Address, address)
	}
	e.lists(t, "ORDERS 10.0.0.2:orders:81 UP") // registered again
	stop()
	e.lists(t)

	began = time.Now()
	c := StartEurekaClient(t, e.URL, EurekaClientOptions{
		App: "web", InstanceID: "web-1", Metadata: map[string]string{"a.b/c": "1"}, User: e.User, Password: e.Password,
	})
	t.Logf("eureka client ready after %v", time.Since(began))
	if open := wildcards(t, c.PID()); len(open) > 0 {
		t.Errorf("the application can be reached from the network: %v", open)
	}
	e.lists(t, "WEB web-1 UP map[a.b/c:1]")
	c.SetMetadata(map[string]string{"x": "2"})
	e.lists(t, "WEB web-1 UP map[a.b/c:1 x:2]")
	c.SetStatus("DOWN")
	e.lists(t, "WEB web-1 DOWN map[a.b/c:1 x:2]")
	address = c.Address
	c.Kill()
	began = time.Now()
	e.lists(t)
	t.Logf("a killed client is gone after %v", time.Since(began))
	c.Restart()
	if c.Address != address {
		t.Errorf("restarted at %s, before %s", c.Address, address)
	}
	e.lists(t, "WEB web-1 UP map[a.b/c:1]")
	stops(t, c.Process)
	e.lists(t)
	stops(t, e.Process)
}

// stops checks that a server on the Java virtual machine ends soon after SIGTERM, which its exit status tells of.
func stops(t *testing.T, p *Process) {
	t.Helper()
	began := time.Now()
	if err := p.Stop(); err != nil && !strings.Contains(err.Error(), "exit status 143") {
		t.Error(err)
	}
	t.Logf("%s stopped after %v", p.name, time.Since(began))
	if p.Running() {
		t.Errorf("%s is still running", p.name)
	}
}

func TestEurekaPeers(t *testing.T) {
	t.Parallel()
	began := time.Now()
	peers := StartEurekaPeers(t, EurekaOptions{User: "reader", Password: "p#1"})
	t.Logf("two eurekas ready after %v", time.Since(began))
	a, b := EurekaInstance{App: "web", ID: "a", IP: "10.0.0.1", Port: 80}, EurekaInstance{App: "web", ID: "b", IP: "10.0.0.1", Port: 80}
	peers[0].Register(a)
	peers[1].Register(b)
	for _, e := range peers {
		e.lists(t, "WEB a UP", "WEB b UP")
	}
	peers[0].Kill()
	peers[1].Deregister(a)
	peers[0].Restart()
	peers[0].lists(t, "WEB b UP")
	c := EurekaInstance{App: "web", ID: "c", IP: "10.0.0.1", Port: 80} // a might go again: that is still being told
	peers[0].Register(c)
	peers[1].lists(t, "WEB b UP", "WEB c UP")
}

func TestEurekaTLS(t *testing.T) {
	t.Parallel()
	ca := NewCA(t, "eureka")
	e := StartEureka(t, EurekaOptions{TLS: ca, ClientCertificates: true})
	e.Register(EurekaInstance{App: "web", ID: "a", IP: "10.0.0.1", Port: 80})
	e.lists(t, "WEB a UP")
	get := func(trust, client *CA) error {
		transport := &http.Transport{DisableKeepAlives: true}
		if client != nil {
			transport.TLSClientConfig = client.ServerTLS(t, "client")
			transport.TLSClientConfig.RootCAs = trust.Pool()
		} else {
			transport.TLSClientConfig = NewCA(t, "none").ServerTLS(t, "none")
			transport.TLSClientConfig.Certificates = nil
			transport.TLSClientConfig.RootCAs = trust.Pool()
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.URL+"/apps", nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	other := NewCA(t, "other")
	if err := get(ca, ca); err != nil {
		t.Error("with a client's certificate:", err)
	}
	if err := get(ca, nil); err == nil {
		t.Error("a client without a certificate is let in")
	}
	if err := get(ca, other); err == nil {
		t.Error("a client of another CA is let in")
	}
	if err := get(other, ca); err == nil {
		t.Error("the server's certificate is good for another CA")
	}
}
