// Package dns is the registry type "dns": one service whose endpoints are names. In mode passthrough the proxies resolve
// them; in mode resolve regbridge does: addresses, and SRV records with their ports and weights.
package dns

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	// roundTimeout bounds the reading of all names of an entry.
	roundTimeout = 30 * time.Second
	// minPause is the shortest pause between two rounds, whatever TTL the records have.
	minPause = time.Second
	// forever is the TTL of what does not change, or tells no TTL.
	forever = time.Duration(math.MaxInt64)
)

// New makes a registry of an entry of type dns. Its error joins a registry.FieldError for each problem of the entry. If
// all of them are Partial the registry serves the rest of the entry; otherwise it is nil.
func New(e registry.Entry, env registry.Env) (registry.Registry, error) {
	s, err := convert(e)
	if slices.ContainsFunc(registry.FieldErrors(err), func(f *registry.FieldError) bool { return !f.Partial }) {
		return nil, err
	}
	interval := e.Interval()
	if !s.resolve {
		return &passthrough{service: s.passthrough(), interval: interval}, err
	}
	r := &resolver{
		service:  s.service,
		names:    s.names,
		config:   func() (config, error) { return readResolvConf("/etc/resolv.conf") },
		interval: interval,
		client:   client{budgets: env.Budgets, observe: env.Observe},
	}
	if len(s.servers) > 0 {
		r.config = func() (config, error) { return givenServers(s.servers), nil }
	}
	return r, err
}

// passthrough states the names themselves, which the proxies resolve.
type passthrough struct {
	service  registry.Service
	interval time.Duration
}

// Run states the service at once, and again each refresh interval, as the contract asks for.
func (p *passthrough) Run(ctx context.Context, sink registry.Sink) error {
	return registry.Poll(ctx, sink, p.interval, p.interval, func(context.Context) ([]registry.Service, error) {
		return []registry.Service{p.service}, nil
	})
}

// resolver states what the names resolve to.
type resolver struct {
	service  registry.Service // without instances
	names    []name
	config   func() (config, error) // called in each round, so that a changed resolv.conf takes effect
	interval time.Duration
	client   client
}

// Run resolves the names again and again: when the first record's time to live is over, at the latest after the refresh
// interval. A round in which one name fails says nothing of the others: it is a gap.
func (r *resolver) Run(ctx context.Context, sink registry.Sink) error {
	return watch(ctx, sink, r.interval, r.resolve)
}

// found is the outcome of a successful round.
type found struct {
	service registry.Service
	ttl     time.Duration
	from    string // the servers that answered
}

// watch calls resolve again and again, and reports what it found.
func watch(
	ctx context.Context, sink registry.Sink, interval time.Duration, resolve func(context.Context) (found, error),
) error {
	backoff := registry.Backoff{Max: interval}
	from := ""
	for {
		rctx, cancel := context.WithTimeout(ctx, roundTimeout)
		got, err := resolve(rctx)
		cancel()
		var pause time.Duration
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			sink.Fail(err)
			pause = backoff.Next()
		default:
			backoff.Reset()
			if from != "" && from != got.from {
				sink.Fail(fmt.Errorf("answers come from %s now, before from %s: they may know less", got.from, from))
			}
			from = got.from
			sink.Put(got.service)
			sink.Synced([]string{got.service.ID})
			pause = pauseFor(got.ttl, interval)
		}
		if registry.Sleep(ctx, pause) != nil {
			return nil
		}
	}
}

// pauseFor is the pause until the next round. A time to live is stretched by up to a tenth, so that the server's own copy
// has expired by then; the interval is an upper bound.
func pauseFor(ttl, interval time.Duration) time.Duration {
	ttl = max(ttl, minPause)
	if ttl < interval {
		ttl += ttl - registry.Jitter(ttl)
	}
	return min(ttl, registry.Jitter(interval))
}
