package nacos

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// TestTokenOnlyInHeaders looks at all that a client sends.
func TestTokenOnlyInHeaders(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	p := f.run(every(100 * time.Millisecond))
	p.wait("two listings", func(s registrytest.State) bool { return countSince(s, 0, registrytest.Synced) >= 2 })
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.log {
		sent := r.body
		for name, value := range r.headers {
			if name != tokenHeader {
				sent += value
			}
		}
		for token := range f.tokens {
			if strings.Contains(sent, token) || strings.Contains(sent, pushPassword) {
				t.Errorf("%s has a secret where none belongs: %s", r.typ, sent)
			}
		}
		authorised := r.typ == "ServiceListRequest" || r.typ == "SubscribeServiceRequest"
		if token := r.headers[tokenHeader]; authorised != f.tokens[token] {
			t.Errorf("%s with token %q", r.typ, token)
		}
	}
}

// TestBlackHoledServer never answers, nor refuses a connection.
func TestBlackHoledServer(t *testing.T) {
	t.Parallel()
	hole, living := newPushServer(t), newPushServer(t)
	hole.edit(func() { hole.blackhole = true })
	living.set("order", at("10.0.0.1"))
	e := hole.entry()
	p := runPush(t, e, pushEnv(t)) // the end of Run is timed
	hole.await("a connection", func() bool { return len(hole.held) > 0 })
	if s := p.State(); len(s.Events) > 0 {
		t.Errorf("told %v before anything could be known", s.Events)
	}
	e.Domain = fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", hole.port, living.port)
	for range 3 { // servers are taken in any order
		runPush(t, e, pushEnv(t), within(300*time.Millisecond)).wait("the other server", lists("order"))
	}
}

// TestLostWhileBeingSetUp loses the connection in the midst of the introduction, and what would be a second connection finds
// a black hole.
func TestLostWhileBeingSetUp(t *testing.T) {
	t.Parallel()
	for _, typ := range []string{"ServerCheckRequest", "HealthCheckRequest", "ServiceListRequest"} {
		t.Run(typ, func(t *testing.T) {
			t.Parallel()
			f := newPushServer(t)
			f.before = func(r pushRequest) {
				if r.typ == typ {
					f.edit(func() { f.blackhole = true })
					f.cut()
				}
			}
			p := f.run()
			p.wait("a gap", failedSince(0, ""))
			f.await("the next connection", func() bool { return len(f.held) > 0 })
		})
	}
}

// TestConnectionIsNotReplaced has a server that asks to leave a connection for a new one, as proxies do, while the stream goes
// on. On the new one nobody would know us.
func TestConnectionIsNotReplaced(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.stop()
	f.age = 700 * time.Millisecond
	f.start()
	f.set("order", at("10.0.0.1"))
	p := f.run(every(100 * time.Millisecond))
	s := p.wait("a gap", func(s registrytest.State) bool { return s.Synced && failedSince(0, "")(s) })
	p.wait("a new listing", syncedSince(len(s.Events)))
	p.wait("another", func(s registrytest.State) bool { return countSince(s, 0, registrytest.Fail) >= 2 && s.Gap == nil })
	f.mu.Lock()
	defer f.mu.Unlock()
	setups := map[string]int{}
	for _, r := range f.log {
		if r.typ == "ConnectionSetupRequest" {
			setups[r.client]++
		}
	}
	for _, r := range f.log {
		if r.client != "" && setups[r.client] != 1 {
			t.Errorf("%s over a connection with %d introductions", r.typ, setups[r.client])
		}
	}
}

// TestNeverReady never takes the introduction in.
func TestNeverReady(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.edit(func() { f.early = 1 << 30 })
	p := f.run(within(200 * time.Millisecond))
	p.wait("a gap", failedSince(0, "", "not ready", "301"))
	f.edit(func() { f.early = 0 })
	p.wait("the listing", lists())
}

// TestNoGRPC is a server with the HTTP port alone.
func TestNoGRPC(t *testing.T) {
	t.Parallel()
	f := newPushServer(t)
	f.grpc.Stop()
	f.run().wait("a gap", failedSince(0, "", "needs type nacos", "refused"))
}

// TestProxyOfEnvironment counts on TestMain, which fills the environment with proxies and settings of Nacos's own client; that the
// proxies are not asked is the suite's to see.
func TestProxyOfEnvironment(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"HTTPS_PROXY", "ALL_PROXY", "nacos_username", "nacos_remote_client_rpc_tls_enable"} {
		if os.Getenv(name) == "" {
			t.Errorf("%s is not set", name)
		}
	}
	f := newPushServer(t)
	f.set("order", at("10.0.0.1"))
	f.run().wait("the listing", lists("order"))
	for _, r := range f.log {
		if strings.Contains(fmt.Sprint(r.headers, r.body), "rubbish") {
			t.Errorf("%s has something of the environment: %v %s", r.typ, r.headers, r.body)
		}
	}
}

// TestCyclesLeaveNothing runs the adapter a hundred times in different moods of the server.
func TestCyclesLeaveNothing(t *testing.T) { // not parallel: it counts what the process has
	f := newPushServer(t)
	f.early = 0
	for i := range 10 {
		f.set(fmt.Sprintf("s-%d", i), at("10.0.0.1"))
	}
	idle := runtime.NumGoroutine()
	cycle := func(n int) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r, err := NewGRPC(f.entry(), pushEnv(t))
		if err != nil {
			t.Fatal(err)
		}
		rec, done := registrytest.NewRecorder(ctx), make(chan error)
		go func() { done <- r.Run(ctx, rec) }()
		switch n % 4 {
		case 0: // at any time
			runtime.Gosched()
		case 1: // during the first subscriptions
			rec.Wait(pushLimit, func(s registrytest.State) bool { return len(s.Events) > 3 })
		case 2: // after the connection was lost
			rec.Wait(pushLimit, func(s registrytest.State) bool { return s.Loaded })
			f.cut()
			rec.Wait(pushLimit, func(s registrytest.State) bool { return s.Gap != nil })
		default:
			if _, ok := rec.Wait(pushLimit, func(s registrytest.State) bool { return s.Loaded }); !ok {
				t.Error("not loaded")
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	measure := func() (goroutines, files int, heap uint64) {
		for deadline := time.Now().Add(pushLimit); ; time.Sleep(time.Millisecond) {
			entries, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				t.Skip("no /proc")
			}
			goroutines, files = runtime.NumGoroutine(), len(entries)
			if goroutines <= idle || time.Now().After(deadline) {
				break
			}
		}
		f.edit(func() {
			f.log = nil
			clear(f.conns)
			clear(f.tokens)
		})
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return goroutines, files, m.HeapAlloc
	}
	for n := range 20 {
		cycle(n)
	}
	g0, f0, h0 := measure()
	for n := range 100 {
		cycle(n)
	}
	g1, f1, h1 := measure()
	t.Logf("goroutines %d and %d, files %d and %d, heap %d and %d", g0, g1, f0, f1, h0, h1)
	if g1 > g0+2 || f1 > f0+2 || h1 > h0+1<<20 {
		t.Errorf("100 cycles: goroutines %d -> %d, open files %d -> %d, heap %d -> %d", g0, g1, f0, f1, h0, h1)
	}
}

// authority signs certificates.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.key, a.cert = a.sign("authority", nil)
	return a
}

// sign makes a certificate for a name, which is its own authority's if that has none yet.
func (a *authority) sign(name string, ips []net.IP) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, IPAddresses: ips,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, parentKey := a.cert, a.key
	if parent == nil {
		template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert
}

func (a *authority) pair(name string, ips ...net.IP) tls.Certificate {
	key, cert := a.sign(name, ips)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// TestTLS reaches both ports by TLS, with a client certificate.
func TestTLS(t *testing.T) {
	t.Parallel()
	ours, foreign := newAuthority(t), newAuthority(t)
	f := newPushServer(t)
	f.stop()
	f.tls = &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{ours.pair("nacos.internal", net.IPv4(127, 0, 0, 1))},
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ours.pool(),
	}
	f.start()
	f.set("order", at("10.0.0.1"))
	client := []tls.Certificate{ours.pair("regbridge")}
	for name, c := range map[string]struct {
		config *tls.Config
		words  []string // of the error; none if it works
	}{
		"by address":            {&tls.Config{RootCAs: ours.pool(), Certificates: client}, nil},
		"by name":               {&tls.Config{RootCAs: ours.pool(), Certificates: client, ServerName: "nacos.internal"}, nil},
		"not verified":          {&tls.Config{InsecureSkipVerify: true, Certificates: client}, nil},
		"wrong name":            {&tls.Config{RootCAs: ours.pool(), Certificates: client, ServerName: "other.internal"}, []string{"nacos.internal", "not other.internal"}},
		"other authority":       {&tls.Config{RootCAs: foreign.pool(), Certificates: client}, []string{"unknown authority"}},
		"no client certificate": {&tls.Config{RootCAs: ours.pool()}, []string{"connect to nacos"}},
		"foreign client":        {&tls.Config{RootCAs: ours.pool(), Certificates: []tls.Certificate{foreign.pair("x")}}, []string{"connect to nacos"}},
		"plain":                 {nil, []string{"connect to nacos"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := pushEnv(t)
			env.ClientTLS = func() (*tls.Config, error) { return c.config.Clone(), nil }
			p := runPush(t, f.entry(), env, within(2*time.Second))
			if c.words == nil {
				p.wait("the listing", lists("order"))
				return
			}
			p.wait("a gap that tells why", failedSince(0, "", c.words...))
			if s := p.State(); s.Synced {
				t.Error("the server was read")
			}
		})
	}
	t.Run("TLS to a plain server", func(t *testing.T) {
		t.Parallel()
		f := newPushServer(t)
		env := pushEnv(t)
		env.ClientTLS = func() (*tls.Config, error) { return &tls.Config{RootCAs: ours.pool()}, nil }
		runPush(t, f.entry(), env).wait("a gap", failedSince(0, "", "TLS handshake"))
	})
}

// TestIPv6 reaches a server by addresses with brackets, and with a zone, which no URL may have as it is.
func TestIPv6(t *testing.T) {
	t.Parallel()
	for _, host := range []string{"::1", "::1%lo"} {
		t.Run(host, func(t *testing.T) {
			l, err := net.Listen("tcp", "[::1]:0")
			if err != nil {
				t.Skip("no IPv6")
			}
			defer l.Close()
			port := l.Addr().(*net.TCPAddr).Port - grpcOffset
			e := registry.Entry{Type: "nacos2", Domain: fmt.Sprintf("[%s]:%d", host, port), NacosGroups: []string{pushGroup}}
			p := runPush(t, e, pushEnv(t))
			if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(pushLimit)); err != nil {
				t.Fatal(err)
			}
			c, err := l.Accept()
			if err != nil {
				t.Fatalf("%v; the adapter says %v", err, p.State().Gap)
			}
			c.Close()
			p.wait("a gap", failedSince(0, "", "connect to nacos"))
		})
	}
}
