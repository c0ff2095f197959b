package bridge

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
	"github.com/regbridge/regbridge/registry"
)

// play runs lines of a script in a world.
func play(w *world, script string) {
	w.t.Helper()
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); line != "" {
			w.where = line
			w.line(line)
		}
	}
}

// inWorld runs a test in a world of its own.
func inWorld(t *testing.T, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		test(t, w)
	})
}

func TestSplit(t *testing.T) {
	adapter := &scriptedRun{}
	part := &registry.FieldError{Path: "domain[1]", Err: errors.New("bad"), Partial: true}
	whole := &registry.FieldError{Path: "port", Err: errors.New("bad")}
	for name, c := range map[string]struct {
		adapter  registry.Registry
		err      error
		warnings []string
		ok       bool
	}{
		"good":                    {adapter, nil, nil, true},
		"bad":                     {nil, whole, nil, false},
		"bad in part":             {adapter, part, []string{"domain[1]: bad"}, true},
		"bad in two parts":        {adapter, errors.Join(part, part), []string{"domain[1]: bad", "domain[1]: bad"}, true},
		"bad in part, wrapped":    {adapter, fmt.Errorf("entry: %w", part), []string{"domain[1]: bad"}, true},
		"bad in part and whole":   {adapter, errors.Join(part, whole), nil, false},
		"bad in part, no adapter": {nil, part, nil, false},
		"no field":                {adapter, errors.New("bad"), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, warnings, err := split(c.adapter, c.err)
			if (err == nil) != c.ok || (got != nil) != c.ok {
				t.Errorf("split = %v, %v", got, err)
			}
			if !c.ok && !errors.Is(err, c.err) {
				t.Errorf("the error became %v", err)
			}
			if diff := cmp.Diff(c.warnings, warnings); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// pair makes a self-signed certificate and its key.
func pair(t *testing.T) (cert, key string) {
	t.Helper()
	k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true,
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k))
	keyDER := must(x509.MarshalPKCS8PrivateKey(k))
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
}

func TestClientTLS(t *testing.T) {
	cert, key := pair(t)
	_, otherKey := pair(t)
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certFile, keyFile, badFile := file("tls.crt", cert), file("tls.key", key), file("bad.pem", "s3cret, not PEM")
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	off := false
	for name, c := range map[string]struct {
		tls    *registry.TLS
		secret registry.Credentials
		err    string // empty: none
		check  func(*tls.Config) bool
	}{
		"none": {nil, nil, "", func(c *tls.Config) bool { return c == nil }},
		"off":  {&registry.TLS{Enabled: &off, CAFile: "/nowhere"}, nil, "", func(c *tls.Config) bool { return c == nil }},
		"plain": {&registry.TLS{ServerName: "consul.test"}, nil, "", func(c *tls.Config) bool {
			return c.ServerName == "consul.test" && c.RootCAs == nil && !c.InsecureSkipVerify && c.MinVersion == tls.VersionTLS12
		}},
		"insecure": {&registry.TLS{InsecureSkipVerify: true}, nil, "", func(c *tls.Config) bool { return c.InsecureSkipVerify }},
		"files": {&registry.TLS{CAFile: certFile, CertFile: certFile, KeyFile: keyFile}, nil, "", func(c *tls.Config) bool {
			return c.RootCAs != nil && len(c.Certificates) == 1
		}},
		"secret": {&registry.TLS{SecretName: "tls"}, registry.Credentials{
			"ca.crt": registry.Secret(cert), "tls.crt": registry.Secret(cert), "tls.key": registry.Secret(key),
		}, "", func(c *tls.Config) bool { return c.RootCAs != nil && len(c.Certificates) == 1 }},
		"secret with a CA alone": {&registry.TLS{SecretName: "tls"}, registry.Credentials{"ca.crt": registry.Secret(cert)}, "",
			func(c *tls.Config) bool { return c.RootCAs != nil && len(c.Certificates) == 0 }},
		"a file goes before the secret": {&registry.TLS{SecretName: "tls", CAFile: certFile}, registry.Credentials{"ca.crt": "s3cret"}, "",
			func(c *tls.Config) bool { return c.RootCAs != nil }},
		"missing secret":      {&registry.TLS{SecretName: "other"}, nil, "secret ns/other", nil},
		"missing file":        {&registry.TLS{CAFile: filepath.Join(dir, "nowhere")}, nil, "nowhere", nil},
		"pipe":                {&registry.TLS{CAFile: pipe}, nil, "no regular file", nil},
		"endless file":        {&registry.TLS{CertFile: certFile, KeyFile: "/dev/zero"}, nil, "/dev/zero", nil},
		"bad CA file":         {&registry.TLS{CAFile: badFile}, nil, badFile, nil},
		"bad CA in secret":    {&registry.TLS{SecretName: "tls"}, registry.Credentials{"ca.crt": "s3cret"}, "ca.crt of secret tls", nil},
		"bad certificate":     {&registry.TLS{CertFile: badFile, KeyFile: keyFile}, nil, "client certificate", nil},
		"key of another":      {&registry.TLS{SecretName: "tls"}, registry.Credentials{"tls.crt": registry.Secret(cert), "tls.key": registry.Secret(otherKey)}, "client certificate", nil},
		"bad key in secret":   {&registry.TLS{SecretName: "tls"}, registry.Credentials{"tls.crt": registry.Secret(cert), "tls.key": "s3cret"}, "client certificate", nil},
		"certificate, no key": {&registry.TLS{CertFile: certFile}, nil, "client certificate", nil},
	} {
		t.Run(name, func(t *testing.T) {
			secrets := &fakeSecrets{m: map[string]registry.Credentials{}}
			if c.secret != nil {
				secrets.m["tls"] = c.secret
			}
			run := newRunner(&Bridge{opts: Options{Secrets: secrets, Logger: slog.New(slog.DiscardHandler)}}, Key{Namespace: "ns"}, 0)
			if _, err := run.identify(RegistryConfig{Entry: registry.Entry{TLS: c.tls}}); err != nil && c.err == "" {
				t.Errorf("identify: %v", err)
			}
			got, err := run.clientTLS(c.tls)
			if c.err == "" {
				if err != nil || !c.check(got) {
					t.Errorf("clientTLS = %+v, %v", got, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Fatalf("the error is %v, should name %q", err, c.err)
			}
			if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "PRIVATE") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}

// TestNoSecretIsTold looks for a secret in all that is shown of a registry whose entry and Secret have one.
func TestNoSecretIsTold(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			secret reader token=s3cret-token
			entry a secret=reader
			entry b secret=missing
		`)
		w.config.Registries[0].Entry.NacosSecretKey = "s3cret-key"
		w.config.Registries[1].Entry.NacosSecretKey = "s3cret-key"
		play(w, `
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			a fail
			a end panic
			secret reader token=s3cret-other
			entry a secret=reader domain=bad
			apply
			advance 1m
		`)
		var all bytes.Buffer
		for _, v := range []any{w.bridge.Statuses(), w.bridge.Services()} {
			if err := json.NewEncoder(&all).Encode(v); err != nil {
				t.Fatal(err)
			}
		}
		fmt.Fprintf(&all, "%+v\n%s\n", w.bridge.Statuses(), w.log)
		for _, family := range must(w.metrics.Gather()) {
			fmt.Fprintln(&all, family)
		}
		w.stop()
		for _, f := range must(filepath.Glob(w.stateDir + "/*")) {
			all.Write(must(os.ReadFile(f)))
		}
		if i := strings.Index(all.String(), "s3cret"); i >= 0 {
			t.Errorf("a secret is told: ...%s", all.String()[max(0, i-200):i+6])
		}
	})
}

// TestMetricsGoWithTheRegistry holds that an entry that is deleted leaves no series behind, not even by a request that ends later.
func TestMetricsGoWithTheRegistry(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		var env registry.Env
		w.wrap = func(construct Constructor) Constructor {
			return func(e registry.Entry, now registry.Env) (registry.Registry, error) {
				if e.Name == "a" {
					env = now
				}
				return construct(e, now)
			}
		}
		series := func() map[string]int {
			out := map[string]int{}
			for _, family := range must(w.metrics.Gather()) {
				for _, m := range family.GetMetric() {
					for _, l := range m.GetLabel() {
						if l.GetName() == "registry" {
							out[l.GetValue()]++
						}
					}
				}
			}
			return out
		}
		play(w, `
			entry a
			entry b
			start
			apply
			a put order 10.0.0.1-2:80
			a synced order
		`)
		observe := env.Observe
		observe("list", time.Second, nil)
		observe("list", time.Second, context.DeadlineExceeded)
		if n := series()["default/bridge/script/a"]; n < 8 {
			t.Fatalf("%d series of a registry that runs", n)
		}
		play(w, `
			drop a
			apply
		`)
		observe("list", time.Second, context.Canceled)
		if n := series(); n["default/bridge/script/a"] != 0 || n["default/bridge/script/b"] == 0 {
			t.Errorf("series by registry: %v", n)
		}
		play(w, `
			entry a
			apply
		`)
		env.Observe("list", time.Second, nil)
		if n := series()["default/bridge/script/a"]; n == 0 {
			t.Errorf("an entry that was put back has no series")
		}
	})
}

func TestRelease(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			entry b
			start
			apply
			a put order 10.0.0.1-20:80
			a synced order
		`)
		for _, name := range []string{"a", "script/a", "default/bridge/script/a"} {
			play(w, `
				a put order 10.0.0.1-20:80
				advance 1m
				a put order 10.0.0.1:80
				expect order.script 10.0.0.1-20:80
			`)
			got, err := w.bridge.Release(name)
			if diff := cmp.Diff(map[string]int{"default/bridge/script/a": 19}, got); err != nil || diff != "" {
				t.Errorf("Release(%s): %v %s", name, err, diff)
			}
			play(w, "expect order.script 10.0.0.1:80")
		}
		for _, name := range []string{"", "c", "consul/a", "bridge/script/a", "default/bridge/script"} {
			if got, err := w.bridge.Release(name); err == nil {
				t.Errorf("Release(%q) = %v", name, got)
			}
		}
		if got, err := w.bridge.Release("b"); err != nil || got["default/bridge/script/b"] != 0 || len(got) != 1 {
			t.Errorf("Release of a registry that holds nothing = %v, %v", got, err)
		}
	})
}

// stuck is an adapter that does not end when it is told to.
type stuck struct {
	registry.Registry
	until chan struct{}
}

func (s stuck) Run(ctx context.Context, sink registry.Sink) error {
	err := s.Registry.Run(ctx, sink)
	<-s.until
	return err
}

// TestStopIsBounded holds that an adapter that never ends delays the end of the Bridge for ten seconds, no more, that it is
// named, and that what was known is kept. While the Bridge runs, it harms no other registry.
func TestStopIsBounded(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		until := make(chan struct{})
		w.wrap = func(construct Constructor) Constructor {
			return func(e registry.Entry, env registry.Env) (registry.Registry, error) {
				r, err := construct(e, env)
				if e.Name == "a" && e.Domain != "good" {
					r = stuck{r, until}
				}
				return r, err
			}
		}
		play(w, `
			entry a
			entry b
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			b put pay 10.0.1.1:80
			b synced pay
			ready yes
			entry a domain=good
			apply
			runs a 2
			a put order 10.0.0.2:80
			a synced order
			expect order.script 10.0.0.2:80
			drop b
			apply
			absent pay.script
		`)
		began := time.Now()
		w.stop()
		if took := time.Since(began); took != stopTimeout {
			t.Errorf("it took %v", took)
		}
		play(w, "logged adapters did not end in time")
		close(until)
		synctest.Wait()
		w.wrap = nil
		play(w, `
			start
			apply
			ready yes
			expect order.script 10.0.0.2:80
		`)
	})
}

// TestStopDoesNotWait holds that adapters that end leave nothing to wait for.
func TestStopDoesNotWait(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			entry b secret=missing
			start
			apply
		`)
		began := time.Now()
		w.stop()
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
		play(w, "unlogged did not end in time")
	})
}

// busy is a renderer during whose work the registries say something new, whenever it works.
type busy struct {
	IstioRenderer
	more func()
}

func (b busy) Render(s mcp.Service) ([]xds.Resource, error) {
	b.more()
	return b.IstioRenderer.Render(s)
}

// TestFirstAnswersUnderChurn holds that first answers do not wait for a quiet moment, which a big registry never has.
func TestFirstAnswersUnderChurn(t *testing.T) {
	inWorld(t, func(_ *testing.T, w *world) {
		n := 0
		w.renderer = busy{more: func() {
			s := w.registries["a"]
			s.mu.Lock()
			sink := s.sink
			s.mu.Unlock()
			n++
			sink.Put(w.service("churn", []string{fmt.Sprintf("10.1.%d.%d:80", n/250%250, 1+n%250)}))
		}}
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1:80
			a put churn 10.0.0.2:80
			a synced order churn
			advance 2s
			ready yes
			expect order.script 10.0.0.1:80
		`)
	})
}

// choosy is a renderer whose reader refuses some services, by host.
type choosy struct {
	IstioRenderer
	mu     sync.Mutex
	refuse func(mcp.Service) bool
}

func (c *choosy) Render(s mcp.Service) ([]xds.Resource, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse != nil && c.refuse(s) {
		return nil, errors.New("the reader does not like it")
	}
	return c.IstioRenderer.Render(s)
}

func (c *choosy) set(refuse func(mcp.Service) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = refuse
}

// TestQuarantine goes on where the scripts, which only have real offences, end: the last good shape itself is refused.
func TestQuarantine(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		reader := &choosy{IstioRenderer: IstioRenderer{istio.Stock}}
		w.renderer = reader
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1-2:80
			a put pay 10.0.1.1:80
			a synced order pay
			expect order.script 10.0.0.1-2:80
		`)
		reader.set(func(s mcp.Service) bool { return s.Host == "order.script" && len(s.Endpoints) > 1 })
		play(w, `
			a put order 10.0.0.2-4:80
			a put pay 10.0.1.1-2:80
			expect order.script 10.0.0.2:80
			expect pay.script 10.0.1.1-2:80
			state a left=quarantined:1
		`)
		for _, s := range w.bridge.Services() {
			if (s.Quarantined != nil) != (s.Host == "order.script") {
				t.Errorf("%s: quarantined %v", s.Host, s.Quarantined)
			}
		}
		reader.set(func(s mcp.Service) bool { return s.Host == "order.script" })
		play(w, `
			a put order 10.0.0.1-4:80
			absent order.script
			state a left=quarantined:1
		`)
		if n := len(w.bridge.Services()); n != 1 {
			t.Errorf("%d services are shown as published", n)
		}
		reader.set(func(s mcp.Service) bool { return s.Host == "order.script" && len(s.Endpoints) > 2 })
		play(w, `
			a put order 10.0.0.1-5:80
			expect order.script 10.0.0.1-2:80
		`)
		reader.set(nil)
		play(w, `
			a put order 10.0.0.1-6:80
			expect order.script 10.0.0.1-6:80
			state a left=quarantined:0
		`)
	})
}

// TestReadersAndWriters reads everything there is to read while registries talk, for the race detector.
func TestReadersAndWriters(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			entry b
			start
			apply
		`)
		stop := make(chan struct{})
		var all sync.WaitGroup
		for _, name := range []string{"a", "b"} {
			s := w.registries[name]
			s.mu.Lock()
			sink := s.sink
			s.mu.Unlock()
			all.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					sink.Put(w.service("order@order.shop", []string{fmt.Sprintf("10.0.0.%d:80", n%20)}))
					if n%7 == 0 {
						sink.Fail(errors.New("down"), "order")
					}
					sink.Synced([]string{"order"})
					time.Sleep(time.Millisecond)
				}
			})
		}
		for range 200 {
			if err := json.NewEncoder(io.Discard).Encode(w.bridge.Statuses()); err != nil {
				t.Fatal(err)
			}
			w.bridge.Services()
			w.bridge.Ready()
			must(w.metrics.Gather())
			if _, err := w.bridge.Release("a"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		close(stop)
		all.Wait()
		synctest.Wait()
		var names []string
		for _, s := range w.bridge.Statuses() {
			names = append(names, s.Name)
		}
		if !slices.Equal(names, []string{"a", "b"}) {
			t.Errorf("statuses of %q", names)
		}
	})
}

// TestProblemsOfEntries holds that an entry that its type refuses is among the configuration's problems, for alerts.
func TestProblemsOfEntries(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			entry a domain=bad
			apply
			expect order.script 10.0.0.1:80
		`)
		problems, err := w.bridge.Problems()
		if err != nil || len(problems) != 1 || problems[0].Warning || problems[0].Path != "spec.registries[0].domain" {
			t.Errorf("the problems are %+v, %v", problems, err)
		}
		play(w, `
			entry a
			apply
		`)
		if problems, err := w.bridge.Problems(); err != nil || len(problems) != 0 {
			t.Errorf("once it is mended: %+v, %v", problems, err)
		}
	})
}
