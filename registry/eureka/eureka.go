// Package eureka reads the services of Eureka servers: everything once, then what has changed since (the servers' delta),
// checked against the servers' own count. README.md tells what users see.
//
// eureka.go validates the entry and reads at each interval, client.go speaks HTTP, decode.go reads answers, convert.go turns
// them into facts, known.go keeps what is known and merges deltas.
package eureka

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	// defaultTimeout is the longest time in which nothing arrives of an answer, maxRequest that for one request.
	defaultTimeout, maxRequest = 10 * time.Second, 2 * time.Minute
	// concurrency is how many requests may be on their way to one server at once, from all entries together.
	concurrency = 4
	// retention is how long after a reading a delta is trusted to hold all changes since: a server keeps them for 3 min.
	retention = 2 * time.Minute
	// repairPause is the time between two full readings of a server whose deltas are used, and the time for which deltas
	// that turned out to be of no use are not asked for.
	repairPause = 10 * time.Minute
	// maxMismatches is how many deltas in a row may contradict the server's count before they are of no use.
	maxMismatches = 3
)

// settings are what an entry says.
type settings struct {
	env      registry.Env
	servers  []registry.Server
	path     string // of the API, without a slash at its end
	interval time.Duration
	timeout  time.Duration
	repair   time.Duration
	secret   string // the Secret's name; empty means none
	choice   choice
}

// New validates an entry of type eureka. It connects to nothing.
func New(e registry.Entry, env registry.Env) (registry.Registry, error) {
	if env.Budgets == nil || env.Logger == nil {
		return nil, errors.New("eureka: Env lacks Budgets or Logger")
	}
	var problems []error
	usable := true
	fatal := func(path, format string, args ...any) {
		problems = append(problems, registry.Fieldf(path, format, args...))
		usable = false
	}
	s := settings{
		env: env, interval: e.Interval(), timeout: defaultTimeout, repair: repairPause, secret: e.AuthSecretName,
		choice: choice{secure: cmp.Or(strings.TrimSpace(e.EurekaSecure), secureAuto), hostName: e.EurekaPreferHostName},
	}
	if e.Port > 65535 {
		fatal("port", "is %d: write the HTTP port of the Eureka servers, 1 to 65535", e.Port)
	}
	var err error
	if s.servers, err = registry.ParseServers("domain", e.Domain, cmp.Or(e.Port, 8761)); err != nil {
		problems = append(problems, err)
		usable = usable && len(s.servers) > 0
	} else if len(s.servers) == 0 {
		fatal("domain", "is empty: write the address of a Eureka server")
	}
	if s.path, err = contextPath(e.EurekaContextPath); err != nil {
		fatal("eurekaContextPath", "%w", err)
	}
	switch s.choice.secure {
	case secureAuto, secureAlways, secureNever:
	default:
		fatal("eurekaSecure", "is %q: write auto, always or never", e.EurekaSecure)
	}
	if !usable {
		return nil, errors.Join(problems...)
	}
	return &source{s}, errors.Join(problems...)
}

// contextPath gives the path of the API with one slash before each part.
func contextPath(s string) (string, error) {
	if s = strings.TrimSpace(s); s == "" {
		return "/eureka", nil
	}
	if strings.Contains(s, "://") || strings.ContainsAny(s, "@?#%") || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return "", errors.New("is no plain path: write one such as /eureka or /eureka/v2, or / for none, and the servers in domain")
	}
	parts := []string{""}
	for part := range strings.SplitSeq(s, "/") {
		switch part {
		case "":
		case ".", "..":
			return "", errors.New("has a part that is . or ..: write the path itself")
		default:
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, "/"), nil
}

// source is a configured source of services.
type source struct{ settings }

// Run implements registry.Registry. It stays with one server for as long as that one answers. With another one everything is
// read anew before the next listing is reported.
func (e *source) Run(ctx context.Context, sink registry.Sink) error {
	c, err := newClient(&e.settings)
	if err != nil {
		return err
	}
	defer c.close()
	r := &reader{settings: &e.settings, client: c, sink: sink, known: newKnown(), gap: true}
	backoff := registry.Backoff{Max: e.interval}
	for untried := len(e.servers); ; {
		began := time.Now()
		err := r.read(ctx)
		pause := max(registry.Jitter(e.interval)-time.Since(began), e.interval/20) // a slow server is left alone for a while, too
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			backoff.Reset()
			untried = len(e.servers)
		default:
			r.fail(fmt.Errorf("eureka at %s: %w", r.server(), err))
			if len(e.servers) > 1 {
				r.turn = (r.turn + 1) % len(e.servers)
				r.history = history{}
			}
			if untried--; untried > 0 {
				continue // with a server that has not been tried
			}
			untried = len(e.servers)
			pause = backoff.Next()
		}
		if registry.Sleep(ctx, pause) != nil {
			return nil
		}
	}
}

// reader reads the servers, one at a time.
type reader struct {
	*settings
	client *client
	sink   registry.Sink
	turn   int // the server's index
	known  *known
	// gap says that a failure was reported, or nothing was yet, since the last listing.
	gap bool
	// confirm says that nothing was stated yet that was read after the last gap.
	confirm bool
	// history is of the current server.
	history
	odd bool // a log line has told of elements that are no instances
}

// history is what has been seen of one server.
type history struct {
	last       time.Time // the last good reading; zero means none
	fullAt     time.Time // the next full one is due
	version    int64     // of the last delta, 0 if there was none
	mismatches int       // deltas in a row that contradicted the server's count, or could not be read
	noDelta    time.Time // deltas are not asked for before
	told       bool      // a log line has told that deltas are of no use
}

func (r *reader) server() registry.Server { return r.servers[r.turn] }

func (r *reader) fail(err error) {
	r.sink.Fail(err)
	r.gap = true
}

// read reads the current server once, and reports what it says.
func (r *reader) read(ctx context.Context) error {
	now := time.Now()
	usable := r.interval <= retention && !r.last.IsZero() && now.Sub(r.last) <= retention && !now.Before(r.noDelta)
	var because string
	if usable && now.Before(r.fullAt) {
		d, err := r.client.delta(ctx, r.server())
		switch {
		case errors.Is(err, errNoDelta):
			r.withoutDelta(now, err)
			usable = false
		case errors.Is(err, errOddDelta): // once is nothing: what is missing below is still asked for
			if r.mismatches++; r.mismatches == maxMismatches {
				r.withoutDelta(now, err)
				usable = false
			}
		case err != nil:
			return fmt.Errorf("read what has changed: %w", err)
		default:
			r.known.apply(d)
			if d.version < r.version {
				because = fmt.Sprintf("its versions__delta went back from %d to %d: it was restarted, or another server answered", r.version, d.version)
			}
			r.version = d.version
			if r.known.hash() == d.hash {
				r.mismatches = 0
				r.good(now)
				return nil
			}
			if r.mismatches++; r.mismatches == maxMismatches {
				r.withoutDelta(now, errors.New("what it says has changed does not lead to what it counts"))
			}
		}
	}
	full, err := r.client.apps(ctx, r.server())
	if err != nil {
		return fmt.Errorf("read all applications: %w", err)
	}
	if full.odd > 0 && !r.odd {
		r.odd = true
		r.env.Logger.Warn("Eureka lists elements that are no instances, or have no application; they are left out",
			"server", r.server().String(), "number", full.odd)
	}
	if !r.gap {
		if err := r.unexplained(ctx, full, usable, because); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			r.fail(fmt.Errorf("eureka at %s: %w", r.server(), err))
		}
	}
	r.known.replace(full)
	r.fullAt = now.Add(registry.Jitter(r.repair))
	r.good(now)
	return nil
}

// withoutDelta lets the server be read in full for some time.
func (r *reader) withoutDelta(now time.Time, why error) {
	r.noDelta, r.mismatches = now.Add(r.repair), 0
	if !r.told {
		r.told = true
		r.env.Logger.Warn("the changes that the Eureka server tells are of no use, so all applications are read each time",
			"server", r.server().String(), "error", why)
	}
}

// good reports what is known.
func (r *reader) good(now time.Time) {
	r.last = now
	// What the reading says that ended the gap is no evidence of what is there now; the next one states it again.
	for _, s := range r.known.changed(r.gap || r.confirm) {
		r.sink.Put(s)
	}
	r.sink.Synced(r.known.ids())
	r.gap, r.confirm = false, r.gap
}

// unexplained returns an error if the server no longer lists an instance, and has not said that it was removed. That is what a
// server looks like that was restarted between two readings: it knows only who has registered again, or what its peer gave
// it. A server that works says which instances were removed, for some minutes.
func (r *reader) unexplained(ctx context.Context, full *answer, delta bool, because string) error {
	lost := r.known.lost(full)
	if len(lost) == 0 {
		return nil
	}
	if counted := countOf(full); full.hash != "" && full.odd == 0 && counted != full.hash {
		return fmt.Errorf("it lists %q, and counts %q: %d instances that it had are missing (%s)", counted, full.hash, len(lost), lost[0])
	}
	if !delta {
		// It does not say. But it tells when each instance registered, and after a restart all of them just have.
		if r.known.keptRegistration(full) {
			return nil
		}
		because = "and no other instance is still registered as it was: the server was restarted, or another one answered"
	} else {
		// The removal may have come between two answers.
		d, err := r.client.delta(ctx, r.server())
		if err != nil {
			return fmt.Errorf("ask what has become of %d instances that it no longer lists: %w", len(lost), err)
		}
		if lost = r.known.unexplained(lost, d); len(lost) == 0 {
			return nil
		}
		because = cmp.Or(because, "and does not say that they were removed: perhaps it was restarted")
	}
	return fmt.Errorf("it no longer lists %d instances (%s), %s", len(lost), lost[0], because)
}
