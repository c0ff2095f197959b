package eureka

import (
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHasty,
		Interval: 100 * time.Millisecond,
		Start:    func(t *testing.T) registrytest.Backend { return newFake(t).backend() },
	})
}

// TestConformanceWithoutDelta is against a server that tells no changes, over TLS.
func TestConformanceWithoutDelta(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New:      newHasty,
		Interval: 100 * time.Millisecond,
		Start: func(t *testing.T) registrytest.Backend {
			f := newTLSFake(t)
			f.edit(func() { f.noDelta = 403 })
			b := f.backend()
			b.ClientTLS = f.trust()
			return b
		},
		Skip: map[string]string{"1000 services": "takes long, and TestConformance has shown it"},
	})
}

// newHasty is New, but gives a request up sooner.
func newHasty(e registry.Entry, env registry.Env) (registry.Registry, error) {
	r, err := New(e, env)
	if s, ok := r.(*source); ok {
		s.timeout = 2 * time.Second
	}
	return r, err
}
