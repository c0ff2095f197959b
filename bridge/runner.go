package bridge

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/regularfile"
)

// maxTLSFile bounds a certificate, key or bundle of CAs, in bytes.
const maxTLSFile = 1 << 20

// runner supervises one registry: it runs the adapter again after errors and panics, and with new credentials.
type runner struct {
	bridge *Bridge
	key    Key
	log    *slog.Logger
	state  *registryState

	// The Bridge's lock guards these.
	config   RegistryConfig // as it runs; Err is set if the newest cannot be used
	running  bool           // a supervise goroutine exists
	cancel   context.CancelFunc
	warnings []string // of the constructor: parts of the entry that are not used

	mu       sync.Mutex                      // guards these
	secrets  map[string]registry.Credentials // the last good content
	lost     map[string]string               // what is to be said of Secrets that are gone, by name
	identity string                          // digest of the credentials and certificates in use
	problem  error                           // why the adapter cannot run now
	gone     bool                            // removed from the configuration
	restart  context.CancelFunc              // ends the current Run, so that it begins anew
	wake     chan struct{}
}

func newRunner(b *Bridge, key Key, order int) *runner {
	state := newRegistryState(key)
	state.order = order
	run := &runner{
		bridge: b, key: key, state: state, wake: make(chan struct{}, 1), secrets: map[string]registry.Credentials{}, lost: map[string]string{},
		log: b.opts.Logger.With("registry", key.String(), "type", key.Type),
	}
	state.note = run.note
	return run
}

// invalid reports whether the entry cannot be used and nothing runs in its place.
func (run *runner) invalid() bool { return run.config.Err != nil && !run.running }

func (run *runner) stop() {
	if run.cancel != nil {
		run.cancel()
	}
}

// refuse notes that the newest entry cannot be used.
func (run *runner) refuse(rc RegistryConfig) {
	if run.running {
		rc.Entry = run.config.Entry
	}
	run.config = rc
}

// prepare validates an entry and makes it the one that runs. On an error nothing has changed.
func (run *runner) prepare(ctx context.Context, rc RegistryConfig) error {
	b := run.bridge
	before, after := run.config.Entry.Fingerprint(), rc.Entry.Fingerprint()
	again := !run.running || before != after
	adapter, warnings, err := split(Construct(b.opts.Types, rc.Entry, run.env(rc)))
	if err != nil {
		return err
	}
	if again {
		run.stop() // its sink is deaf from now on; its services stay until the new Run replaces them
	}
	for _, w := range warnings {
		run.log.Warn("part of a registry entry is not used", "at", rc.Origin+" "+rc.Path, "problem", w)
	}
	b.store.update(run.state, func(now time.Time) {
		run.state.read(after.Source)
		// Also who reads otherwise, or once more, has not seen what went since the last reading, and why.
		if run.running && before.Source == after.Source && again {
			run.state.reconnect(now)
		}
		run.state.reassemble(policyOf(rc.Entry), now)
	})
	run.config, run.warnings = rc, warnings
	if !again {
		return nil
	}
	rctx, cancel := context.WithCancel(ctx)
	run.cancel, run.running = cancel, true
	b.runs.start(run.key, func() {
		defer cancel()
		run.supervise(rctx, adapter, rc)
	})
	return nil
}

// split tells a constructor's warnings about parts of an entry from an error that makes it unusable.
func split(adapter registry.Registry, err error) (registry.Registry, []string, error) {
	if err == nil {
		return adapter, nil, nil
	}
	var warnings []string
	for _, f := range registry.FieldErrors(err) {
		if !f.Partial {
			return nil, nil, err
		}
		warnings = append(warnings, f.Error())
	}
	if adapter == nil || len(warnings) == 0 {
		return nil, nil, err
	}
	return adapter, warnings, nil
}

// supervise runs the adapter until ctx ends.
func (run *runner) supervise(ctx context.Context, adapter registry.Registry, rc RegistryConfig) {
	backoff := registry.Backoff{Min: time.Second, Max: time.Minute}
	for ctx.Err() == nil {
		select {
		case <-run.wake: // what it tells of is read now
		default:
		}
		identity, err := run.identify(rc)
		run.setProblem(identity, err)
		if err != nil {
			run.fail(ctx, err)
			run.pause(ctx, secretsPeriod)
			continue
		}
		rctx, restart := context.WithCancel(ctx)
		run.mu.Lock()
		run.restart = restart
		run.mu.Unlock()
		began := time.Now()
		err = safely(func() error {
			return adapter.Run(rctx, sink{ctx: rctx, store: run.bridge.store, state: run.state})
		})
		restarted := rctx.Err() != nil
		restart()
		if ctx.Err() != nil {
			return
		}
		if restarted { // with new credentials
			backoff.Reset()
			continue
		}
		if err == nil {
			err = errors.New("the adapter ended without an error, which it must not")
		}
		run.fail(ctx, err)
		if time.Since(began) > time.Minute {
			backoff.Reset()
		}
		if errors.Is(err, registry.ErrConfig) {
			run.setProblem(identity, err)
			run.pause(ctx, 0)
			continue
		}
		run.pause(ctx, backoff.Next())
	}
}

// runs are goroutines that run adapters. The zero value is ready.
type runs struct {
	mu   sync.Mutex
	keys map[Key]int // how many of each registry have not ended
	wg   sync.WaitGroup
}

func (r *runs) start(key Key, f func()) {
	r.count(key, 1)
	r.wg.Go(func() {
		defer r.count(key, -1)
		f()
	})
}

func (r *runs) count(key Key, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys == nil {
		r.keys = map[Key]int{}
	}
	if r.keys[key] += n; r.keys[key] == 0 {
		delete(r.keys, key)
	}
}

// wait waits until all have ended, at most for timeout, and returns the registries of those that have not.
func (r *runs) wait(timeout time.Duration) []string {
	ended := make(chan struct{})
	go func() { // ends with the last adapter
		r.wg.Wait()
		close(ended)
	}()
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case <-ended:
		return nil
	case <-t.C:
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var left []string
	for key := range r.keys {
		left = append(left, key.String())
	}
	slices.Sort(left)
	return left
}

// safely turns a panic into an error.
func safely(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the adapter panicked: %v\n%s", p, debug.Stack())
		}
	}()
	return f()
}

// fail reports an error that ended a Run, or kept it from beginning.
func (run *runner) fail(ctx context.Context, err error) {
	sink{ctx: ctx, store: run.bridge.store, state: run.state}.Fail(err)
}

// pause waits for d, or for ever if d is 0, or until the credentials changed.
func (run *runner) pause(ctx context.Context, d time.Duration) {
	var timeout <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-ctx.Done():
	case <-run.wake:
	case <-timeout:
	}
}

func (run *runner) setProblem(identity string, err error) {
	run.mu.Lock()
	defer run.mu.Unlock()
	run.problem = err
	if identity != "" {
		run.identity = identity
	}
}

// identified makes the registry connect anew if its credentials and certificates, whose digest it gets, are not what they
// were.
func (run *runner) identified(identity string) {
	run.mu.Lock()
	defer run.mu.Unlock()
	if identity == run.identity {
		return
	}
	if run.identity != "" { // else nothing has run yet, for want of credentials
		run.identity = identity
		run.log.Info("credentials changed: the registry is connected anew")
		if run.restart != nil {
			run.restart() // first, since the Run that ends could end the gap
		}
		run.bridge.store.update(run.state, run.state.reconnect)
	}
	select {
	case run.wake <- struct{}{}:
	default:
	}
}

// identify reads the credentials and certificates, and returns a digest of them. A Secret that was there once and is
// gone now counts as it was.
func (run *runner) identify(rc RegistryConfig) (string, error) {
	h := sha256.New()
	names := []string{rc.Entry.AuthSecretName}
	if rc.Entry.TLS.On() {
		names = append(names, rc.Entry.TLS.SecretName)
		for _, file := range []string{rc.Entry.TLS.CAFile, rc.Entry.TLS.CertFile, rc.Entry.TLS.KeyFile} {
			if file == "" {
				continue
			}
			content, err := regularfile.Read(file, maxTLSFile)
			if err != nil {
				return "", fmt.Errorf("read a TLS file of the registry: %w", err)
			}
			fmt.Fprintf(h, "file %s %x\n", file, sha256.Sum256(content))
		}
	}
	for _, name := range names {
		if name == "" {
			continue
		}
		secret, err := run.secret(name)
		if err != nil {
			return "", err
		}
		for _, k := range slices.Sorted(maps.Keys(secret)) {
			fmt.Fprintf(h, "secret %s %s %x\n", name, k, sha256.Sum256([]byte(secret[k].Reveal())))
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// secret returns the Secret's content, or its last known one if it is gone.
func (run *runner) secret(name string) (registry.Credentials, error) {
	current, err := run.bridge.opts.Secrets.Get(run.key.Namespace, name)
	run.mu.Lock()
	defer run.mu.Unlock()
	if err == nil {
		run.secrets[name] = current
		delete(run.lost, name)
		return current, nil
	}
	if last, ok := run.secrets[name]; ok {
		if _, told := run.lost[name]; !told {
			run.lost[name] = fmt.Sprintf("secret %s/%s is gone or cannot be read: its last content is used until our next restart", run.key.Namespace, name)
			run.log.Warn("registry: "+run.lost[name], "error", err)
		}
		return last, nil
	}
	return nil, fmt.Errorf("secret %s/%s that the entry names: %w", run.key.Namespace, name, err)
}

// env is what the adapter may use.
func (run *runner) env(rc RegistryConfig) registry.Env {
	return registry.Env{
		Credentials: func() (registry.Credentials, error) {
			if rc.Entry.AuthSecretName == "" {
				return registry.Credentials{}, nil
			}
			return run.secret(rc.Entry.AuthSecretName)
		},
		ClientTLS: func() (*tls.Config, error) { return run.clientTLS(rc.Entry.TLS) },
		Logger:    run.log,
		Observe:   run.observe,
		Budgets:   &run.bridge.budgets,
	}
}

// observe counts a request to the registry.
func (run *runner) observe(operation string, took time.Duration, err error) {
	run.mu.Lock()
	defer run.mu.Unlock()
	if !run.gone { // a request that the removal cancelled must not bring the series back
		run.bridge.metrics.request(run.key, operation, took, err)
	}
}

// forgetMetrics deletes the registry's series, for good.
func (run *runner) forgetMetrics() {
	run.mu.Lock()
	defer run.mu.Unlock()
	run.gone = true
	run.bridge.metrics.forget(run.key)
}

func (run *runner) clientTLS(t *registry.TLS) (*tls.Config, error) {
	if !t.On() {
		return nil, nil //nolint:nilnil // plain text
	}
	var ca, cert, key []byte
	if t.SecretName != "" {
		secret, err := run.secret(t.SecretName)
		if err != nil {
			return nil, err
		}
		ca, cert, key = []byte(secret["ca.crt"]), []byte(secret["tls.crt"]), []byte(secret["tls.key"])
	}
	for _, f := range []struct {
		name string
		into *[]byte
	}{{t.CAFile, &ca}, {t.CertFile, &cert}, {t.KeyFile, &key}} {
		if f.name == "" {
			continue
		}
		content, err := regularfile.Read(f.name, maxTLSFile)
		if err != nil {
			return nil, fmt.Errorf("read a TLS file of the registry: %w", err)
		}
		*f.into = content
	}
	c := &tls.Config{
		MinVersion: tls.VersionTLS12, ServerName: t.ServerName,
		InsecureSkipVerify: t.InsecureSkipVerify, //nolint:gosec // the user's explicit wish
	}
	if len(ca) > 0 {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("tls of the registry: %s holds no PEM certificate", cmp.Or(t.CAFile, "ca.crt of secret "+t.SecretName))
		}
	}
	if len(cert) > 0 || len(key) > 0 {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("tls of the registry: client certificate and key: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// sameEntry reports whether two entries say the same, in every field.
func sameEntry(a, b registry.Entry) bool { return reflect.DeepEqual(a, b) }

// note logs changes of the registry's condition: a registry that is lost is one line, not one a second.
func (run *runner) note(from, to condition) {
	switch {
	case to.failing && !from.failing && len(run.state.services) == 0:
		run.log.Error("registry cannot be read", "error", run.state.lastErr)
	case to.failing && !from.failing:
		run.log.Error("registry failed; what it had stays", "error", run.state.lastErr)
	case to.loaded && !from.loaded:
		run.log.Info("registry read completely", "services", len(run.state.services))
	case !to.failing && from.failing && to.loaded && !run.state.gap.open():
		run.log.Info("registry works again")
	}
	switch {
	case to.holding && !from.holding:
		run.log.Warn("registry stopped listing endpoints without a word: they are held", "services", len(run.state.holding),
			"to let them go", "regbridge release "+run.key.Name)
	case !to.holding && from.holding:
		run.log.Info("registry: no endpoints are held any more")
	}
	if n := run.state.expired; n > 0 {
		run.state.expired = 0
		run.log.Warn("registry: endpoints that it no longer lists were removed, since their time was over", "endpoints", n)
	}
}
