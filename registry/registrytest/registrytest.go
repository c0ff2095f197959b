// Package registrytest is the conformance suite that every adapter passes: what package registry's contract asks for,
// as tests. An adapter's test supplies a Backend, a protocol fake on loopback or the real server, and calls Run:
//
//	func TestMain(m *testing.M) { registrytest.Main(m) }
//
//	func TestConformance(t *testing.T) {
//		registrytest.Run(t, registrytest.Config{New: consul.New, Start: startFake})
//	}
//
// Each case starts a backend of its own. A case that needs what the backend cannot do is skipped and says so.
package registrytest

import (
	"crypto/tls"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/registry"
)

// Config is an adapter under test.
type Config struct {
	// New is the adapter's constructor.
	New func(registry.Entry, registry.Env) (registry.Registry, error)
	// Start starts an empty backend for one case. What it starts it stops in t.Cleanup.
	Start func(t *testing.T) Backend
	// Interval is the refresh interval that the adapter is given. The default is 500 ms.
	Interval time.Duration
	// Timeout is how long the suite waits for anything that must happen. The default is 15 s.
	Timeout time.Duration
	// StopWithin is how long Run may take to return once its context has ended. The default is 2 s.
	StopWithin time.Duration
	// Skip names cases that cannot apply to this registry, each with the reason.
	Skip map[string]string
	// Leaks are goroutines that the adapter's library is known to leave behind, each with a reason beside it.
	Leaks []goleak.Option
}

// A Backend is a registry that the suite controls. Functions that are nil are what it cannot do. They return once the
// change has taken effect at the backend, are never called concurrently, and may fail the test.
type Backend struct {
	// Entry is the entry that reads this backend. The suite sets the refresh interval.
	Entry registry.Entry
	// Credentials are what the entry's Secret holds. The suite checks that no error shows them.
	Credentials registry.Credentials
	// ClientTLS is how to reach the backend, nil for plain text.
	ClientTLS *tls.Config

	// Services are the names that Set takes, or, where Set is nil, the names of what the backend holds for ever. Nil
	// means that any name goes.
	Services []string
	// ID gives the id of a service of that name; nil means the name itself.
	ID func(service string) string
	// Fact gives what the registry states of an instance that was Set: some registries have no metadata, or a port per
	// service. Nil means the instance as it was given. Reason is never compared.
	Fact func(registry.Instance) registry.Instance
	// Own are the ids of services that the registry always lists by itself.
	Own []string

	// Set makes these the instances of the service, which it creates if need be. Addresses are IP addresses.
	Set func(service string, instances ...registry.Instance)
	// Remove removes the service with all its instances.
	Remove func(service string)
	// Stop ends the server: connections break, and new ones are refused.
	Stop func()
	// Restart starts it again at the same address, with the same content.
	Restart func()
	// Wipe stops the server and starts it again without any content.
	Wipe func()
	// Refuse makes the server refuse our credentials, in its own way, or accept them again.
	Refuse func(bool)
	// Hang makes the server accept requests and leave them unanswered. Switched off, new requests are answered.
	Hang func(bool)
	// HangAt lets the n-th request from now, counted from 1, go unanswered for ever, alone. The channel is closed when
	// it has arrived.
	HangAt func(n int) <-chan struct{}
	// Requests is the number of requests that have arrived.
	Requests func() int
	// EntryAt is the entry with another server, for adapters that speak HTTP.
	EntryAt func(hostport string) registry.Entry
}
