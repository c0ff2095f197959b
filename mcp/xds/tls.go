package xds

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/regbridge/regbridge/regularfile"
)

// TLS is how the ports are secured. Without CertFile they speak plaintext.
type TLS struct {
	// CertFile and KeyFile hold the server's certificate chain and its key, PEM.
	CertFile, KeyFile string
	// ClientCAFile holds the certificates that sign clients' certificates, PEM.
	ClientCAFile string
	// ClientAuth is ClientAuthNone (also if empty), ClientAuthOptional or ClientAuthRequire. istiod cannot send a
	// client certificate, so ClientAuthRequire shuts it out.
	ClientAuth string
}

// What is asked of clients: no certificate; a valid one or none; a valid one.
const (
	ClientAuthNone     = "none"
	ClientAuthOptional = "optional"
	ClientAuthRequire  = "require"
)

func (t TLS) validate() error {
	switch t.ClientAuth {
	case "", ClientAuthNone:
		if t.ClientCAFile != "" {
			return errors.New("a client CA file is set, but client certificates are not asked for: set client auth to optional or require")
		}
	case ClientAuthOptional, ClientAuthRequire:
		if t.ClientCAFile == "" {
			return fmt.Errorf("client auth %q needs a client CA file", t.ClientAuth)
		}
	default:
		return fmt.Errorf("client auth %q is unknown: use none, optional or require", t.ClientAuth)
	}
	if (t.CertFile == "") != (t.KeyFile == "") {
		return errors.New("the TLS certificate file and the key file must be set together")
	}
	if t.CertFile == "" && t.ClientCAFile != "" {
		return errors.New("client certificates need TLS: set the certificate file and the key file")
	}
	return nil
}

// A tlsFiles is a TLS configuration that follows its files. They are read at each handshake: clients keep their
// connections for hours, and three small files cost less than the handshake itself. So no rotation can be missed,
// whatever the way the files are replaced.
type tlsFiles struct {
	opts TLS
	log  *slog.Logger

	mu     sync.Mutex
	seen   [3][]byte // the contents of the files when they could all be read last, good or bad
	bad    error     // what is wrong with seen
	config *tls.Config
}

// maxTLSFile is how much of a TLS file is read, in bytes. A big bundle of authorities has a quarter of it.
const maxTLSFile = 1 << 20

// watchTLSFiles is how often the files are looked at between handshakes.
const watchTLSFiles = 10 * time.Second

// newTLSFiles reads the files for the first time.
func newTLSFiles(opts TLS, log *slog.Logger) (*tlsFiles, error) {
	f := &tlsFiles{opts: opts, log: log}
	contents, err := f.read()
	if err != nil {
		return nil, err
	}
	if f.config, err = f.parse(contents); err != nil {
		return nil, err
	}
	f.seen = contents
	return f, nil
}

// server is the configuration for the listeners.
func (f *tlsFiles) server() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		config, _ := f.current() // watch logs the error
		return config, nil
	}}
}

// current returns the configuration of the files as they are. If they cannot be used it returns the last good one, and
// why.
func (f *tlsFiles) current() (*tls.Config, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	contents, err := f.read()
	if err != nil || equal(contents, f.seen) {
		return f.config, cmp.Or(err, f.bad)
	}
	f.seen = contents
	var config *tls.Config
	if config, f.bad = f.parse(contents); f.bad == nil {
		f.config = config
	}
	return f.config, f.bad
}

// watch logs what becomes of the files, until ctx ends: one line for each change, however many files and moments it takes.
// So what is wrong with them counts only if it lasts from one look to the next.
func (f *tlsFiles) watch(ctx context.Context) {
	ticker := time.NewTicker(watchTLSFiles)
	defer ticker.Stop()
	used, _ := f.current()
	var last, logged string
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		config, err := f.current()
		problem := ""
		if err != nil {
			problem = err.Error()
		}
		switch {
		case problem != last || problem == logged && config == used:
		case problem != "":
			f.log.Error("the TLS files of the xDS ports cannot be used; the last good ones stay in use", "error", problem)
			used, logged = config, problem
		default:
			f.log.Info("the xDS ports use new TLS files", "cert", f.opts.CertFile, "expires", config.Certificates[0].Leaf.NotAfter)
			used, logged = config, ""
		}
		last = problem
	}
}

func equal(a, b [3][]byte) bool {
	return bytes.Equal(a[0], b[0]) && bytes.Equal(a[1], b[1]) && bytes.Equal(a[2], b[2])
}

func (f *tlsFiles) read() (contents [3][]byte, err error) {
	for i, name := range []string{f.opts.CertFile, f.opts.KeyFile, f.opts.ClientCAFile} {
		if name == "" {
			continue
		}
		if contents[i], err = regularfile.Read(name, maxTLSFile); err != nil {
			return contents, fmt.Errorf("reading a TLS file of the xDS ports: %w", err)
		}
	}
	return contents, nil
}

func (f *tlsFiles) parse(contents [3][]byte) (*tls.Config, error) {
	pair, err := tls.X509KeyPair(contents[0], contents[1])
	if err != nil {
		return nil, fmt.Errorf("the certificate in %s and the key in %s: %w", f.opts.CertFile, f.opts.KeyFile, err)
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{pair},
		// A resumed handshake would skip a client CA that has been replaced since.
		SessionTicketsDisabled: true,
	}
	if f.opts.ClientCAFile != "" {
		config.ClientCAs = x509.NewCertPool()
		if !config.ClientCAs.AppendCertsFromPEM(contents[2]) {
			return nil, fmt.Errorf("no certificate in the client CA file %s", f.opts.ClientCAFile)
		}
		config.ClientAuth = tls.VerifyClientCertIfGiven
		if f.opts.ClientAuth == ClientAuthRequire {
			config.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	return config, nil
}
