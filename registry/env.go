package registry

import (
	"context"
	"crypto/tls"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// Env is what an adapter may use of its surroundings. No adapter reads the environment, writes files, logs
// elsewhere or registers metrics by itself.
type Env struct {
	// Credentials returns the current content of the Secret that the entry names, empty if it names none. It is called
	// when a connection or request needs it, so that a rotated Secret takes effect. A changed Secret also ends Run and
	// starts it anew.
	Credentials func() (Credentials, error)
	// ClientTLS returns the current configuration for reaching the registry, nil for plain text. The value is the
	// caller's. It is called for each new client or connection.
	ClientTLS func() (*tls.Config, error)
	// Logger carries the registry's name and type.
	Logger *slog.Logger
	// Observe counts one request to the registry: what was done ("list", "health"), how long it took and how it ended.
	Observe func(operation string, took time.Duration, err error)
	// Budgets bounds what all entries together may ask of one server.
	Budgets *Budgets
}

// Credentials are the keys and values of a Secret.
type Credentials map[string]Secret

// First returns the value of the first key that is set and not empty.
func (c Credentials) First(keys ...string) Secret {
	for _, k := range keys {
		if c[k] != "" {
			return c[k]
		}
	}
	return ""
}

// Budgets shares out connections to servers between all entries that use the same server. The zero value is ready.
type Budgets struct {
	mu    sync.Mutex
	byKey map[string]*Budget
}

// Of returns the budget of a server address. The first caller decides its size.
func (b *Budgets) Of(address string, size int64) *Budget {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byKey == nil {
		b.byKey = map[string]*Budget{}
	}
	if b.byKey[address] == nil {
		b.byKey[address] = &Budget{sem: semaphore.NewWeighted(size), size: size}
	}
	return b.byKey[address]
}

// A Budget bounds the connections to one server.
type Budget struct {
	sem  *semaphore.Weighted
	size int64
}

// Size returns the number of connections that may be in use at once.
func (b *Budget) Size() int64 { return b.size }

// Acquire takes n connections, waiting until they are free or ctx ends.
func (b *Budget) Acquire(ctx context.Context, n int64) error { return b.sem.Acquire(ctx, n) }

// TryAcquire takes n connections if they are free now.
func (b *Budget) TryAcquire(n int64) bool { return b.sem.TryAcquire(n) }

// Release gives n connections back.
func (b *Budget) Release(n int64) { b.sem.Release(n) }
