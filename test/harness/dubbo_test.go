package harness

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/servers"
)

// has waits until a node has children with these texts, in any order; each want must be in one of them.
func has(t *testing.T, conn *zk.Conn, path string, want ...string) {
	t.Helper()
	Eventually(t, 30*time.Second, func() error {
		children, _, err := conn.Children(path)
		if errors.Is(err, zk.ErrNoNode) && len(want) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		var texts []string
		for _, child := range children {
			text, err := url.QueryUnescape(child)
			if err != nil {
				return err
			}
			texts = append(texts, text)
		}
		left := slices.Clone(texts)
		for _, text := range want {
			i := slices.IndexFunc(left, func(s string) bool { return strings.Contains(s, text) })
			if i < 0 {
				return fmt.Errorf("%s has %q, without %q", path, texts, text)
			}
			left = slices.Delete(left, i, i+1)
		}
		if len(left) > 0 {
			return fmt.Errorf("%s has %q, want %q", path, texts, want)
		}
		return nil
	})
}

func TestDubbo(t *testing.T) {
	t.Parallel()
	z := StartZooKeeper(t, ZooKeeperOptions{})
	t.Run("3", func(t *testing.T) { testDubbo3(t, z) })
	z.Wipe() // of nodes that need a login
	t.Run("2", func(t *testing.T) { testDubbo2(t, z) })
}

const providers = "/dubbo/" + DubboGreeter + "/providers"

func testDubbo3(t *testing.T, z *ZooKeeper) {
	t.Helper()
	began := time.Now()
	d := StartDubbo(t, DubboOptions{
		ZooKeeper: z.Address, App: "shop", Mode: "all", Two: true, Group: "g", ServiceVersion: "1.1", Weight: 30,
		User: "app", Password: "secret", Protocols: []DubboProtocol{{Name: "dubbo"}, {Name: "tri"}},
	})
	t.Logf("dubbo 3 ready after %v", time.Since(began))
	listens(t, d)
	for _, path := range []string{"/services/shop", providers} {
		if _, _, err := z.Client(t).Children(path); !errors.Is(err, zk.ErrNoAuth) {
			t.Errorf("%s without a login: %v", path, err)
		}
	}
	conn := z.Client(t, "app:secret")
	has(t, conn, "/services/shop", d.ID)
	has(t, conn, providers, "dubbo://"+d.ID+"/", "tri://10.0.0.7:")
	has(t, conn, providers, "group=g", "weight=30")
	has(t, conn, providers, "version=1.1", "interface=demo.api.Greeter")
	has(t, conn, "/dubbo/"+url.QueryEscape(DubboStock)+"/providers", "dubbo://"+d.ID+"/", "version=2.0.0")
	id := d.ID
	d.Restart()
	if d.ID != id {
		t.Errorf("restarted as %s, before %s", d.ID, id)
	}
	has(t, conn, "/services/shop", id)
	stops(t, d.Process)
	has(t, conn, "/services/shop")
	has(t, conn, providers)
}

func testDubbo2(t *testing.T, z *ZooKeeper) {
	t.Helper()
	conn := z.Client(t)
	began := time.Now()
	service := StartDubbo(t, DubboOptions{Version: 2, ZooKeeper: z.Address, App: "shop", Mode: "service"})
	t.Logf("dubbo 2 ready after %v", time.Since(began))
	listens(t, service)
	has(t, conn, "/services/shop", service.ID)
	has(t, conn, providers)
	service.Kill()
	d := StartDubbo(t, DubboOptions{
		Version: 2, ZooKeeper: z.Address, App: "shop", Weight: 30, Address: "10.0.0.8", User: "app", Password: "secret",
	})
	listens(t, d)
	has(t, conn, providers, "dubbo://"+d.ID+"/") // a login protects nothing
	has(t, conn, providers, "weight=30")
	has(t, conn, "/services/shop") // the one that was killed is gone by now
	d.Kill()
	began = time.Now()
	has(t, conn, providers)
	t.Logf("a killed provider is gone after %v", time.Since(began))
}

// listens checks that a provider listens on its ports, and on loopback alone.
func listens(t *testing.T, d *Dubbo) {
	t.Helper()
	if open := wildcards(t, d.PID()); len(open) > 0 {
		t.Errorf("the provider can be reached from the network: %v", open)
	}
	for _, protocol := range d.Protocols {
		conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(t.Context(), "tcp", loopback(protocol.Port))
		if err != nil {
			t.Errorf("%s: %v", protocol.Name, err)
			continue
		}
		_ = conn.Close()
	}
}

func TestDubboRefuses(t *testing.T) {
	for want, o := range map[string]DubboOptions{
		"the modes are":             {Mode: "service"},
		"registers no loopback":     {Address: "127.0.0.2"},
		"registers no loopback a":   {Address: "a.example"},
		"version 2 with mode \"all": {Version: 2, Mode: "all"},
	} {
		if got := failures(t, func(tb testing.TB) { tb.Helper(); StartDubbo(tb, o) }); !strings.Contains(got, want) {
			t.Errorf("%+v: %q, want %q", o, got, want)
		}
	}
}

// In a namespace a provider is reached where it says that it is.
func TestDubboAnswers(t *testing.T) {
	t.Parallel()
	servers.Need(t, servers.ZooKeeper)
	servers.Need(t, servers.Dubbo3)
	InNamespace(t, func(t *testing.T) {
		z := StartZooKeeper(t, ZooKeeperOptions{})
		d := StartDubbo(t, DubboOptions{
			ZooKeeper: z.Address, Protocols: []DubboProtocol{{Name: "tri"}}, Address: "10.0.0.8", Bind: "10.0.0.8",
		})
		status, body, err := call(t.Context(), http.MethodPost, "http://"+d.ID+"/"+DubboGreeter+"/greet",
			http.Header{"Content-Type": {"application/json"}}, []string{"Ann"})
		if want := d.ID + " greets Ann"; err != nil || status != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("greet: %d %s (%v), want %q", status, body, err, want)
		}
		if open := wildcards(t, d.PID()); len(open) > 0 {
			t.Errorf("the provider listens on all addresses: %v", open)
		}
	}, "10.0.0.8")
}
