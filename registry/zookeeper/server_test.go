package zookeeper

import (
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
	"github.com/regbridge/regbridge/test/harness"
)

// real is a real server with a client that writes.
type real struct {
	*harness.ZooKeeper
	t   *testing.T
	zk  *zk.Conn
	acl []zk.ACL
}

func startReal(t *testing.T, o harness.ZooKeeperOptions) *real {
	r := &real{ZooKeeper: harness.StartZooKeeper(t, o), t: t, acl: zk.WorldACL(zk.PermAll)}
	r.login()
	return r
}

func (r *real) login() { r.zk = r.Client(r.t, "admin:admin") }

// try does something until it works: the writing client may be on its way to a server that was restarted.
func (r *real) try(what string, do func() error) {
	r.t.Helper()
	harness.Eventually(r.t, limit, func() error {
		if err := do(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	})
}

// put makes a node, with its parents, or changes its data.
func (r *real) put(path, data string) {
	r.t.Helper()
	r.try("put "+path, func() error {
		_, err := r.zk.Set(path, []byte(data), -1)
		if !errors.Is(err, zk.ErrNoNode) {
			return err
		}
		for at := 1; at < len(path); at++ {
			if path[at] == '/' {
				if _, err := r.zk.Create(path[:at], nil, 0, r.acl); err != nil && !errors.Is(err, zk.ErrNodeExists) {
					return err
				}
			}
		}
		_, err = r.zk.Create(path, []byte(data), 0, r.acl)
		return err
	})
}

func (r *real) remove(path string) {
	r.t.Helper()
	r.try("remove "+path, func() error {
		names, _, err := r.zk.Children(path)
		if errors.Is(err, zk.ErrNoNode) {
			return nil
		}
		for _, name := range names {
			r.remove(path + "/" + name)
		}
		if err == nil {
			err = r.zk.Delete(path, -1)
		}
		if errors.Is(err, zk.ErrNoNode) {
			return nil
		}
		return err
	})
}

func (r *real) register(l layout, service string, instances ...registry.Instance) {
	r.t.Helper()
	folder, nodes := l.nodes(service, instances)
	r.try("look at "+folder, func() error {
		names, _, err := r.zk.Children(folder)
		if errors.Is(err, zk.ErrNoNode) {
			r.put(folder, "")
			return nil
		}
		for _, name := range names {
			if _, ok := nodes[name]; !ok {
				r.remove(folder + "/" + name)
			}
		}
		return err
	})
	var all sync.WaitGroup
	for name, data := range nodes {
		all.Go(func() { r.put(folder+"/"+name, data) })
	}
	all.Wait()
}

// readableBy lets only that user read, and nobody but us write.
func readableBy(user string) []zk.ACL {
	return append(zk.DigestACL(zk.PermAll, "admin", "admin"), zk.DigestACL(zk.PermRead, user, goodPassword)...)
}

// protect changes who may read nodes that are there.
func (r *real) protect(acl []zk.ACL, paths ...string) {
	r.t.Helper()
	for _, path := range paths {
		r.try("protect "+path, func() error {
			if _, err := r.zk.SetACL(path, acl, -1); !errors.Is(err, zk.ErrNoNode) {
				return err
			}
			return nil
		})
	}
}

func (r *real) entry() registry.Entry {
	return registry.Entry{Type: "zookeeper", Name: "real", Domain: r.Address, AuthSecretName: "zk"}
}

// number is what a four-letter word tells behind a label.
func (r *real) number(word, label string) int {
	r.t.Helper()
	for line := range strings.Lines(r.FourLetter(word)) {
		if rest, ok := strings.CutPrefix(line, label); ok {
			n, err := strconv.Atoi(strings.TrimSpace(rest))
			if err != nil {
				r.t.Fatal(err)
			}
			return n
		}
	}
	r.t.Fatalf("%s does not tell %q", word, label)
	return 0
}

// TestServerConformance runs the suite against a real server, whose nodes only our user may read, once in each layout.
func TestServerConformance(t *testing.T) {
	for name, l := range map[string]layout{"Spring Cloud": spring, "Dubbo": dubbo} {
		t.Run(name, func(t *testing.T) {
			registrytest.Run(t, registrytest.Config{
				New:     New,
				Timeout: time.Minute,
				Start: func(t *testing.T) registrytest.Backend {
					r := startReal(t, harness.ZooKeeperOptions{})
					r.acl = readableBy(goodUser)
					return registrytest.Backend{
						Entry:       r.entry(),
						Credentials: credentials(),
						ID:          l.id,
						Fact:        l.fact,
						Set:         func(s string, instances ...registry.Instance) { r.register(l, s, instances...) },
						Remove:      func(s string) { r.remove(l.folder(s)) },
						Stop:        r.Kill,
						Restart:     r.Restart,
						Wipe: func() {
							r.Wipe()
							r.login() // the connection of before never gets in again
						},
						Refuse: func(on bool) {
							user := goodUser
							if on {
								user = "another"
							}
							r.protect(readableBy(user), "/dubbo", "/services")
						},
						Hang: func(on bool) {
							if on {
								r.Pause()
							} else {
								r.Resume()
							}
						},
					}
				},
			})
		})
	}
}

// TestServer tries what needs a server, but none for itself.
func TestServer(t *testing.T) {
	t.Parallel()
	ca := harness.NewCA(t, "zookeeper")
	r := startReal(t, harness.ZooKeeperOptions{TLS: ca})
	r.register(spring, "order", at("10.0.0.1"))
	order := func(addresses ...string) func(registrytest.State) bool { return has("/services/order", addresses...) }

	t.Run("access", func(t *testing.T) {
		r.put("/protected/app", "")
		r.protect(readableBy(goodUser), "/protected", "/protected/app")
		for what, c := range map[string]struct {
			secret registry.Credentials
			word   string
		}{
			"no secret":      {nil, "name a Secret"},
			"wrong password": {registry.Credentials{"zkUsername": goodUser, "zkPassword": "wrong"}, "check user and password"},
			"right password": {registry.Credentials{"zkUsername": goodUser, "zkPassword": goodPassword}, ""},
		} {
			t.Run(what, func(t *testing.T) {
				e := r.entry()
				e.ZkServicesPath = []string{"/protected"}
				if c.secret == nil {
					e.AuthSecretName = ""
				}
				rec := run(t, e, testEnv(t, c.secret))
				if c.word == "" {
					wait(t, rec, "the protected service", has("/protected/app"))
					return
				}
				s := wait(t, rec, "a refusal", func(s registrytest.State) bool { return s.Gap != nil })
				if text := s.Gap.Error(); !strings.Contains(text, "/protected") || !strings.Contains(text, c.word) || s.Synced {
					t.Errorf("synced %v, %s", s.Synced, text)
				}
			})
		}
	})
	t.Run("path behind the servers", func(t *testing.T) {
		e := r.entry()
		e.Domain, e.ZkServicesPath = r.Address+"/prod/eu", []string{""}
		rec := run(t, e, testEnv(t, credentials()))
		wait(t, rec, "nothing", func(s registrytest.State) bool { return s.Synced && len(s.Services) == 0 })
		for path, id := range map[string]string{"/prod/eu/services/a": "/services/a", "/prod/eu/b": "/b"} {
			_, nodes := spring.nodes("x", []registry.Instance{at("10.0.1.1")})
			r.put(path+"/1", slices.Collect(maps.Values(nodes))[0])
			wait(t, rec, id, has(id, "10.0.1.1"))
		}
		r.put("/prod/eu/dubbo/demo.Api/providers/"+dubboNode("demo.Api", at("10.0.1.2")), "")
		wait(t, rec, "an interface", has("providers:demo.Api:0.0.0:", "10.0.1.2"))
		if s := rec.State(); len(s.Services) != 3 {
			t.Errorf("services %v", slices.Sorted(maps.Keys(s.Services)))
		}
	})
	t.Run("TLS", func(t *testing.T) {
		e := r.entry()
		e.Domain = r.TLSAddress
		env := testEnv(t, credentials())
		env.ClientTLS = func() (*tls.Config, error) {
			return &tls.Config{RootCAs: ca.Pool(), MinVersion: tls.VersionTLS12}, nil
		}
		wait(t, run(t, e, env), "a service", order("10.0.0.1"))
		env.ClientTLS = func() (*tls.Config, error) {
			return &tls.Config{RootCAs: harness.NewCA(t, "other").Pool(), MinVersion: tls.VersionTLS12}, nil
		}
		s := wait(t, run(t, e, env), "a refusal", func(s registrytest.State) bool { return s.Gap != nil })
		if !strings.Contains(s.Gap.Error(), "certificate") || s.Synced {
			t.Error(s.Gap)
		}
	})
	t.Run("the session expires", func(t *testing.T) {
		p := startProxy(t, r.Address)
		e := r.entry()
		e.Domain, e.RefreshInterval = p.address, registry.Interval(time.Second)
		rec := run(t, e, testEnv(t, credentials()))
		n := len(wait(t, rec, "a service", order("10.0.0.1")).Events)
		sessions := strings.Count(r.FourLetter("cons"), "sid=")
		p.freeze(true)
		wait(t, rec, "a gap", func(s registrytest.State) bool { return s.Gap != nil })
		r.try("wait for the end of the session", func() error {
			if now := strings.Count(r.FourLetter("cons"), "sid="); now >= sessions {
				return fmt.Errorf("%d sessions, %d before", now, sessions)
			}
			return nil
		})
		r.register(spring, "order", at("10.0.0.2"))
		r.register(spring, "late", at("10.0.0.3"))
		p.freeze(false)
		wait(t, rec, "what changed meanwhile", func(s registrytest.State) bool {
			return s.Gap == nil && order("10.0.0.2")(s) && has("/services/late", "10.0.0.3")(s)
		})
		noRemovalInGap(t, rec, n)
		r.register(spring, "order", at("10.0.0.4"))
		wait(t, rec, "a change over the new session", order("10.0.0.4"))
	})
}

// TestServerWatches counts what a big tree costs.
func TestServerWatches(t *testing.T) {
	t.Parallel()
	const interfaces, providers = 2000, 5
	r := startReal(t, harness.ZooKeeperOptions{})
	var all sync.WaitGroup
	for part := range 16 {
		all.Go(func() {
			for n := part; n < interfaces; n += 16 {
				var instances []registry.Instance
				for i := range providers {
					instances = append(instances, at(fmt.Sprintf("10.%d.%d.%d", i, n/250, n%250)))
				}
				r.register(dubbo, fmt.Sprintf("demo.Api%04d", n), instances...)
			}
		})
	}
	all.Wait()
	before := r.number("mntr", "zk_packets_received")
	begun := time.Now()
	rec := run(t, r.entry(), testEnv(t, credentials()))
	s := wait(t, rec, "all interfaces", func(s registrytest.State) bool { return s.Loaded && len(s.Services) == interfaces })
	took, packets := time.Since(begun), r.number("mntr", "zk_packets_received")-before
	watches := r.number("mntr", "zk_watch_count")
	t.Logf("%d interfaces with %d providers each: loaded after %v, %d requests, %d watches", interfaces, providers, took, packets,
		watches)
	if watches > 2*interfaces+10 || packets > 3*interfaces+100 {
		t.Errorf("%d watches and %d requests for %d interfaces", watches, packets, interfaces)
	}
	for _, e := range s.Events {
		if e.Kind == registrytest.Fail {
			t.Error(e.Err)
		}
	}
	begun = time.Now()
	r.register(dubbo, "demo.Api0007", at("10.9.9.9"))
	wait(t, rec, "a change", has("providers:demo.Api0007:0.0.0:", "10.9.9.9"))
	t.Logf("one change took %v", time.Since(begun))
	if now := r.number("mntr", "zk_watch_count"); now != watches {
		t.Errorf("%d watches after a change, %d before", now, watches)
	}
}

// A proxy passes bytes on, as long as it is not frozen.
type proxy struct {
	address string
	mu      sync.Mutex
	thawed  *sync.Cond
	frozen  bool
	ended   bool
}

func startProxy(t *testing.T, target string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: l.Addr().String()}
	p.thawed = sync.NewCond(&p.mu)
	var running sync.WaitGroup
	pass := func(to, from net.Conn) {
		defer to.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil || !p.wait() {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	running.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			running.Go(func() { pass(out, in) })
			running.Go(func() { pass(in, out) })
		}
	})
	t.Cleanup(func() { // the adapter has ended, and its connections with it
		l.Close()
		p.mu.Lock()
		p.ended, p.frozen = true, false
		p.mu.Unlock()
		p.thawed.Broadcast()
		running.Wait()
	})
	return p
}

// wait waits until the proxy is not frozen. It reports whether it still runs.
func (p *proxy) wait() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.frozen {
		p.thawed.Wait()
	}
	return !p.ended
}

func (p *proxy) freeze(on bool) {
	p.mu.Lock()
	p.frozen = on
	p.mu.Unlock()
	p.thawed.Broadcast()
}
