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
	"testing"
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
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
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
	_, certPEM, k := a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
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
	var log syncBuffer
	cache := openCache(t, se("a", "1"))
	s := serveWith(t, cache, ServerOptions{
		TLS:    TLS{CertFile: certFile, KeyFile: keyFile},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
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
	if n := strings.Count(log.String(), "level=ERROR"); n != 3 {
		t.Errorf("%d errors logged, want one for each kind of damage:\n%s", n, log.String())
	}
	if strings.Contains(log.String(), "PRIVATE") {
		t.Error("a key was logged")
	}
	cert, key = ca.pair("three.test")
	write(t, certFile, cert)
	write(t, keyFile, key)
	check("three.test")
	check("three.test")
	if n := strings.Count(log.String(), "level=INFO"); n != 2 {
		t.Errorf("%d rotations logged, want 2:\n%s", n, log.String())
	}
	cache.Apply([]Resource{se("a", "2")}, nil)
	old.expect(seV1, "2") // connections stay
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
	certificate := func(a *authority) []tls.Certificate {
		cert, key := a.pair("client")
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{pair}
	}
	good, bad := certificate(clients), certificate(others)
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
