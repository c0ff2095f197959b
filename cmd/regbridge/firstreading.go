package main

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

// firstReading is a source that reads once. What could not be read is told as a problem, and keeps nobody waiting.
type firstReading struct {
	from bridge.Source

	mu       sync.Mutex // guards these
	config   bridge.Config
	apply    func(bridge.Config)
	failures map[bridge.Key]failures
}

// failures are those of one registry.
type failures struct {
	seen int
	last time.Time
}

// Run implements bridge.Source.
func (f *firstReading) Run(ctx context.Context, apply func(bridge.Config)) error {
	var once sync.Once
	return f.from.Run(ctx, func(c bridge.Config) {
		once.Do(func() {
			c.Read = true
			apply(c)
			f.mu.Lock()
			defer f.mu.Unlock()
			f.config, f.apply, f.failures = c, apply, map[bridge.Key]failures{}
		})
	})
}

// giveUp is called again and again with the statuses of all registries. Once each of them has been read, or has failed
// often enough, it takes those that have failed out of the configuration, so that nothing is waited for any more, and
// returns the statuses; until then it returns nil.
func (f *firstReading) giveUp(statuses []bridge.Status) []bridge.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.apply == nil {
		return nil
	}
	left := f.config
	left.Registries = nil
	waiting := false
	for _, rc := range f.config.Registries {
		i := slices.IndexFunc(statuses, func(s bridge.Status) bool { return s.Key == rc.Key })
		switch {
		case i < 0: // not begun yet
			waiting = true
		case statuses[i].State == bridge.StateSynced || statuses[i].State == bridge.StateInvalid:
			left.Registries = append(left.Registries, rc)
		case statuses[i].State == bridge.StateBlocked:
		default:
			waiting = !f.failed(statuses[i], rc.Entry) || waiting
		}
	}
	if waiting || len(left.Registries) == len(f.config.Registries) {
		return nil
	}
	f.apply(left)
	return statuses
}

// failed counts the registry's failures, and reports whether they are enough: two, and one for each server, since those are
// tried in turn. Failures in quick succession may be counted as one.
func (f *firstReading) failed(s bridge.Status, e registry.Entry) bool {
	if s.State != bridge.StateFailing || s.Services > 0 { // it answers at least in part, and is worth waiting for
		return false
	}
	n := f.failures[s.Key]
	if s.LastErrorTime != nil && s.LastErrorTime.After(n.last) {
		n = failures{n.seen + 1, *s.LastErrorTime}
		f.failures[s.Key] = n
	}
	servers := 1
	if e.Type != "dns" { // whose domain lists names
		servers = len(strings.Split(e.Domain, ","))
	}
	return n.seen >= max(2, servers)
}
