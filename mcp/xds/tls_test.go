package xds

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// An authority signs certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	next int64
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{t: t, next: 1}
	a.cert, a.pem, a.key = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// issue signs a template; the first one signs itself.
func (a *authority) issue(template *x509.Certificate) (*x509.Certificate, []byte, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(a.next)
	a.next++
	template.NotBefore = time.Now().Add(-time.Hour)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key
}

// pair issues a certificate for a name, for servers and clients, and returns it with its key, PEM.
func (a *authority) pair(name string) (cert, key []byte) {
	a.t.Helper()
	return a.pairUntil(name, time.Time{})
}

// pairUntil is pair for a certificate that expires at that time.
func (a *authority) pairUntil(name string, expires time.Time) (cert, key []byte) {
	a.t.Helper()
	_, certPEM, k := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotAfter: expires,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return certPEM, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func write(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// served makes a handshake and returns the server's certificate name. The error includes the server's verdict on the
// client's certificate, which comes after the handshake in TLS 1.3.
func served(t *testing.T, address string, config *tls.Config) (string, error) {
	t.Helper()
	conn, err := (&tls.Dialer{Config: config}).DialContext(context.Background(), "tcp", address)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(wait))
	if _, err := conn.Read(make([]byte, 9)); err != nil { // the server's settings frame
		return "", err
	}
	state := conn.(*tls.Conn).ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		t.Errorf("protocol %q", state.NegotiatedProtocol)
	}
	return state.PeerCertificates[0].Subject.CommonName, nil
}

func TestTLSFilesRotate(t *testing.T) {
	ca := newAuthority(t, "ca")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	cert, key := ca.pair("one.test")
	write(t, certFile, cert)
	write(t, keyFile, key)
	cache := openCache(t, se("a", "1"))
	s := serveWith(t, cache, ServerOptions{TLS: TLS{CertFile: certFile, KeyFile: keyFile}})
	base, _ := s.Addresses()
	client := func(name string) *tls.Config {
		return &tls.Config{RootCAs: ca.pool(), ServerName: name, NextProtos: []string{"h2"}}
	}
	check := func(name string) {
		t.Helper()
		if got, err := served(t, base.String(), client(name)); err != nil || got != name {
			t.Errorf("got %q, error %v, want %s", got, err, name)
		}
	}
	check("one.test")
	old := newClient(t, dial(t, base.String(), grpc.WithTransportCredentials(credentials.NewTLS(client("one.test")))), protocolSotw)
	old.subscribe(seV1)
	old.ack(old.expect(seV1, "1"))

	cert, key = ca.pair("two.test")
	write(t, certFile, cert)
	for range 3 { // the key does not fit yet
		check("one.test")
	}
	write(t, keyFile, key)
	check("two.test")
	write(t, certFile, []byte("nonsense"))
	for range 3 {
		check("two.test")
	}
	if err := os.Remove(keyFile); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		check("two.test")
	}
	cert, key = ca.pair("three.test")
	write(t, certFile, cert)
	write(t, keyFile, key)
	check("three.test")
	check("three.test")
	cache.Apply([]Resource{se("a", "2")}, nil)
	old.expect(seV1, "2") // connections stay
}

// What is logged does not depend on whether there are handshakes, nor on how many files a change takes.
func TestTLSFilesAreLoggedOncePerChange(t *testing.T) {
	for name, handshakes := range map[string]int{"without handshakes": 0, "with handshakes": 3} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			opts := TLS{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
			synctest.Test(t, func(t *testing.T) {
				ca := newAuthority(t, "ca")
				cert, key := ca.pair("one.test")
				write(t, opts.CertFile, cert)
				write(t, opts.KeyFile, key)
				var log syncBuffer
				f, err := newTLSFiles(opts, slog.New(slog.NewTextHandler(&log, nil)))
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				var watching sync.WaitGroup
				watching.Go(func() { f.watch(ctx) })
				logged := 0
				pause := func(d time.Duration) {
					for range handshakes {
						if config, err := f.server().GetConfigForClient(nil); err != nil || config == nil {
							t.Errorf("handshake: %v", err)
						}
					}
					time.Sleep(d)
					synctest.Wait()
				}
				expect := func(what string, lines ...string) {
					t.Helper()
					pause(time.Hour)
					got := strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")[logged:]
					if log.String() == "" {
						got = nil
					}
					logged += len(got)
					if len(got) != len(lines) {
						t.Fatalf("%s: logged %q, want %d lines", what, got, len(lines))
					}
					for i, want := range lines {
						for part := range strings.SplitSeq(want, "|") {
							if !strings.Contains(got[i], part) {
								t.Errorf("%s: logged %q, want %q", what, got[i], part)
							}
						}
						if strings.Contains(got[i], "PRIVATE") {
							t.Error("a key was logged")
						}
					}
				}
				expect("nothing happened")
				cert, key = ca.pair("two.test")
				pause(watchTLSFiles - time.Second)
				write(t, opts.CertFile, nil) // it is looked at between each two steps
				pause(2 * time.Second)
				write(t, opts.CertFile, cert)
				pause(watchTLSFiles)
				write(t, opts.KeyFile, key)
				expect("a rotation in steps", "level=INFO|expires=2000-01-01T02:00:00")
				write(t, opts.CertFile, []byte("nonsense"))
				expect("damage", "level=ERROR|"+opts.CertFile)
				if err := os.Remove(opts.KeyFile); err != nil {
					t.Fatal(err)
				}
				expect("other damage", "level=ERROR|"+opts.KeyFile)
				write(t, opts.KeyFile, key)
				write(t, opts.CertFile, cert)
				expect("repair", "level=INFO|"+opts.CertFile)
				if err := os.Rename(opts.KeyFile, opts.KeyFile+".away"); err != nil {
					t.Fatal(err)
				}
				expect("the key is away", "level=ERROR|"+opts.KeyFile)
				if err := os.Rename(opts.KeyFile+".away", opts.KeyFile); err != nil {
					t.Fatal(err)
				}
				expect("the same key is back", "level=INFO|"+opts.CertFile)
				write(t, opts.CertFile, []byte("nonsense"))
				expect("the same damage again", "level=ERROR|"+opts.CertFile)
				cancel()
				watching.Wait()
			})
		})
	}
}

// A file that cannot be read to its end holds up neither handshakes nor the stop, and takes no memory.
func TestTLSFilesMustBeRegular(t *testing.T) {
	dir := t.TempDir()
	good := TLS{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"),
		ClientCAFile: filepath.Join(dir, "ca.crt"), ClientAuth: ClientAuthOptional}
	ca := newAuthority(t, "ca")
	cert, key := ca.pair("server.test")
	bad := map[string]func(name string) error{
		"a pipe":   func(name string) error { return syscall.Mkfifo(name, 0o600) },
		"a device": func(name string) error { return os.Symlink("/dev/zero", name) },
		"a folder": func(name string) error { return os.Mkdir(name, 0o700) },
		"huge": func(name string) error {
			// A good file, but for its length.
			content := map[string][]byte{good.CertFile: cert, good.KeyFile: key, good.ClientCAFile: ca.pem}[name]
			return os.WriteFile(name, append(bytes.Clone(content), make([]byte, 1<<20)...), 0o600)
		},
	}
	for what, put := range bad {
		for _, name := range []string{good.CertFile, good.KeyFile, good.ClientCAFile} {
			t.Run(what+" as "+filepath.Base(name), func(t *testing.T) {
				write(t, good.CertFile, cert)
				write(t, good.KeyFile, key)
				write(t, good.ClientCAFile, ca.pem)
				t.Cleanup(func() { _ = os.Remove(name) })
				s := serveWith(t, openCache(t), ServerOptions{TLS: good})
				base, _ := s.Addresses()
				if err := os.Remove(name); err != nil {
					t.Fatal(err)
				}
				if err := put(name); err != nil {
					t.Fatal(err)
				}
				for range 3 {
					got, err := served(t, base.String(), &tls.Config{RootCAs: ca.pool(), ServerName: "server.test", NextProtos: []string{"h2"}})
					if err != nil || got != "server.test" {
						t.Errorf("got %q, error %v, want the last good certificate", got, err)
					}
				}
				s, err := NewServer(newTestCache(t, Options{}), ServerOptions{Address: "127.0.0.1:0", TLS: good})
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Listen(); err == nil || !strings.Contains(err.Error(), name) {
					t.Errorf("at the start: error %v, want one that names %s", err, name)
				}
			})
		}
	}
}

func TestExpiredServerCertificateRotates(t *testing.T) {
	ca := newAuthority(t, "ca")
	dir := t.TempDir()
	opts := TLS{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	cert, key := ca.pairUntil("server.test", time.Now().Add(-time.Minute))
	write(t, opts.CertFile, cert)
	write(t, opts.KeyFile, key)
	s := serveWith(t, openCache(t, se("a", "1")), ServerOptions{TLS: opts})
	base, _ := s.Addresses()
	config := &tls.Config{RootCAs: ca.pool(), ServerName: "server.test", NextProtos: []string{"h2"}}
	if _, err := served(t, base.String(), config); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Fatalf("error %v, want that the certificate expired", err)
	}
	// A client that does not look at the date keeps its stream.
	careless := newClient(t, dial(t, base.String(), grpc.WithTransportCredentials(credentials.NewTLS(
		&tls.Config{InsecureSkipVerify: true}))), protocolSotw)
	careless.subscribe(seV1)
	careless.ack(careless.expect(seV1, "1"))
	cert, key = ca.pair("server.test")
	write(t, opts.CertFile, cert)
	write(t, opts.KeyFile, key)
	c := newClient(t, dial(t, base.String(), grpc.WithTransportCredentials(credentials.NewTLS(config))), protocolDelta)
	c.subscribe(seV1)
	c.ack(c.expect(seV1, "1"))
	careless.quiet()
}

func TestTLSFilesMustBeGoodAtFirst(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	s, err := NewServer(newTestCache(t, Options{}), ServerOptions{Address: "127.0.0.1:0", TLS: TLS{CertFile: certFile, KeyFile: keyFile}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), certFile) {
		t.Errorf("without the file: %v", err)
	}
	write(t, certFile, []byte("x"))
	write(t, keyFile, []byte("x"))
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), certFile) {
		t.Errorf("with nonsense in it: %v", err)
	}
}

func TestClientCertificates(t *testing.T) {
	ca, clients, others := newAuthority(t, "ca"), newAuthority(t, "clients"), newAuthority(t, "others")
	dir := t.TempDir()
	opts := TLS{
		CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), ClientCAFile: filepath.Join(dir, "ca.crt"),
	}
	cert, key := ca.pair("server.test")
	write(t, opts.CertFile, cert)
	write(t, opts.KeyFile, key)
	certificate := func(a *authority, expires time.Time) []tls.Certificate {
		cert, key := a.pairUntil("client", expires)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{pair}
	}
	good, bad := certificate(clients, time.Time{}), certificate(others, time.Time{})
	expired := certificate(clients, time.Now().Add(-time.Minute))
	for _, mode := range []string{ClientAuthNone, ClientAuthOptional, ClientAuthRequire} {
		t.Run(mode, func(t *testing.T) {
			write(t, opts.ClientCAFile, clients.pem)
			opts := opts
			opts.ClientAuth = mode
			if mode == ClientAuthNone {
				opts.ClientCAFile = ""
			}
			s := serveWith(t, openCache(t), ServerOptions{TLS: opts})
			base, _ := s.Addresses()
			check := func(who string, certs []tls.Certificate, want bool) {
				t.Helper()
				// It sends its certificate whatever authorities the server names.
				_, err := served(t, base.String(), &tls.Config{
					RootCAs: ca.pool(), ServerName: "server.test", NextProtos: []string{"h2"},
					GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
						if len(certs) == 0 {
							return &tls.Certificate{}, nil
						}
						return &certs[0], nil
					},
				})
				if (err == nil) != want {
					t.Errorf("%s: error %v, want to be let in: %v", who, err, want)
				}
			}
			check("no certificate", nil, mode != ClientAuthRequire)
			check("a good certificate", good, true)
			check("a certificate of others", bad, mode == ClientAuthNone)
			check("an expired certificate", expired, mode == ClientAuthNone)
			if mode != ClientAuthNone {
				write(t, opts.ClientCAFile, others.pem)
				check("a certificate of the old authority", good, false)
				check("a certificate of the new authority", bad, true)
			}
		})
	}
}

// A syncBuffer can be written and read at the same time.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
