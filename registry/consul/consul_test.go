package consul

import (
	"context"
	"crypto/tls"
	"log/slog"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) { registrytest.Main(m) }

func TestConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:   New,
		Start: func(t *testing.T) registrytest.Backend { return newFake(t).backend() },
	})
}

// testEnv is an Env with credentials.
func testEnv(t *testing.T, credentials registry.Credentials) registry.Env {
	t.Helper()
	return registry.Env{
		Credentials: func() (registry.Credentials, error) { return credentials, nil },
		ClientTLS:   func() (*tls.Config, error) { return nil, nil },
		Logger:      slog.New(slog.DiscardHandler),
		Observe:     func(string, time.Duration, error) {},
		Dir:         t.TempDir(),
		Budgets:     &registry.Budgets{},
	}
}

// runWith runs the adapter until the test ends.
func runWith(t *testing.T, e registry.Entry, env registry.Env) *registrytest.Recorder {
	t.Helper()
	r, err := New(e, env)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	rec, done := registrytest.NewRecorder(ctx), make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx, rec); err != nil {
			t.Errorf("Run: %v", err)
		}
		rec.Returned()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, v := range rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
	})
	return rec
}
