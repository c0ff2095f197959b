package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// CA is a certificate authority of one test. Its certificates are valid for a day.
type CA struct {
	// PEM is the CA's certificate.
	PEM  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA of that name.
func NewCA(tb testing.TB, name string) *CA {
	tb.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca := &CA{}
	ca.PEM, ca.cert, ca.key = sign(tb, template, nil, nil)
	return ca
}

// Pool holds the CA alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Issue makes a certificate, for servers and for clients, that is valid for these DNS names and IP addresses, and its
// key, as PEM. The first name is also the common name.
func (ca *CA) Issue(tb testing.TB, names ...string) (certPEM, keyPEM string) {
	tb.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: names[0]}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	certPEM, _, key := sign(tb, template, ca.cert, ca.key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		tb.Fatal(err)
	}
	return certPEM, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// ServerTLS is the configuration of a server with a certificate for these names.
func (ca *CA) ServerTLS(tb testing.TB, names ...string) *tls.Config {
	tb.Helper()
	certPEM, keyPEM := ca.Issue(tb, names...)
	cert, err := tls.X509KeyPair([]byte(certPEM), []byte(keyPEM))
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
}

// WriteFiles puts ca.crt, and tls.crt and tls.key with a new certificate for these names, into dir. Each file is
// replaced at once.
func (ca *CA) WriteFiles(tb testing.TB, dir string, names ...string) {
	tb.Helper()
	certPEM, keyPEM := ca.Issue(tb, names...)
	write(tb, filepath.Join(dir, "ca.crt"), ca.PEM)
	write(tb, filepath.Join(dir, "tls.crt"), certPEM)
	write(tb, filepath.Join(dir, "tls.key"), keyPEM)
}

// sign fills in what all certificates have, makes a key, and signs with the parent's key; without a parent with its own.
func sign(tb testing.TB, template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (
	string, *x509.Certificate, *ecdsa.PrivateKey,
) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	if parent == nil {
		parent, parentKey = template, key
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(24*time.Hour)
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		tb.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), cert, key
}
