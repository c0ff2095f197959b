// Package bridge turns McpBridge resources into published services. It runs one adapter per configured registry, keeps
// what they report in one cache, decides what of it is to be believed and published, and hands the result to the mesh.
//
// The way of one endpoint: an adapter puts a service into the store (state.go), which assembles it (assemble.go) and
// guards it against unexplained absence (guard.go); the publisher merges all registries' claims on a host (merge.go),
// renders and checks them, and gives the mesh what changed (publisher.go). Package bridge knows no registry type, no
// dialect of the mesh and nothing of Kubernetes.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/regbridge/regbridge/registry"
)

// Options are what a Bridge is made of.
type Options struct {
	// Types are the registry types by name.
	Types map[string]Constructor
	// Source tells which registries there are.
	Source Source
	// Secrets gives the Secrets that entries name.
	Secrets Secrets
	// Mesh takes what is published.
	Mesh Mesh
	// Renderer makes resources of services.
	Renderer Renderer
	// StateDir is the folder of the snapshots; empty keeps none. It is created.
	StateDir string
	// FirstAnswerDeadline is how long a registry without a snapshot is waited for before first answers go out.
	FirstAnswerDeadline time.Duration
	// Coalesce is the shortest time between two version steps. The first change after a quiet time goes out at once.
	Coalesce time.Duration
	// VIPRange is where virtual addresses are taken from.
	VIPRange netip.Prefix
	// Logger takes everything worth a line.
	Logger *slog.Logger
	// Registerer takes the metrics.
	Registerer prometheus.Registerer
}

// Defaults of Options.
const (
	DefaultFirstAnswerDeadline = time.Minute
	DefaultCoalesce            = 100 * time.Millisecond
	DefaultVIPRange            = "240.224.0.0/11"
)

// secretsPeriod is how often TLS files of registries are looked at. Changes of Secrets are told by SecretsChanged.
const secretsPeriod = 10 * time.Second

// A Bridge runs everything between the configuration and the mesh.
type Bridge struct {
	opts      Options
	store     *store
	publisher *publisher
	snapshots *snapshots
	budgets   registry.Budgets
	metrics   *metrics
	started   time.Time

	mu      sync.Mutex // guards the rest
	config  Config
	runners map[Key]*runner
	opened  bool
	readAt  time.Time // when the configuration was first read completely
	swept   bool      // snapshots of registries that are gone have been looked for

	rechecks sync.Mutex // held while Secrets and TLS files are compared with those in use

	runs runs // all Runs, also of entries that are gone
}

// New makes a Bridge. It opens nothing but the folder of the snapshots, which belongs to this process until Run ends.
func New(opts Options) (*Bridge, error) {
	if opts.VIPRange == (netip.Prefix{}) {
		opts.VIPRange = netip.MustParsePrefix(DefaultVIPRange)
	}
	b := &Bridge{
		opts: opts, store: newStore(), runners: map[Key]*runner{},
		publisher: &publisher{mesh: opts.Mesh, renderer: opts.Renderer, vips: newVIPPool(opts.VIPRange), hosts: map[string]*published{}},
	}
	if opts.StateDir != "" {
		s, err := openSnapshots(opts.StateDir, opts.Logger)
		if err != nil {
			return nil, err
		}
		b.snapshots = s
	}
	b.metrics = newMetrics(b, opts.Registerer)
	return b, nil
}

// stopTimeout is how long adapters may take to end when the Bridge does.
const stopTimeout = 10 * time.Second

// Run works until ctx ends. It stops every adapter, writes the last snapshot, and returns nil. An adapter that does not
// end when it is told to is waited for 10 s, and then left behind.
func (b *Bridge) Run(ctx context.Context) error {
	b.started = time.Now()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.opts.Source.Run(ctx, func(c Config) { b.configure(ctx, c) }) })
	g.Go(func() error { return b.publishLoop(ctx) })
	g.Go(func() error { return b.watchFiles(ctx) })
	if b.snapshots != nil {
		g.Go(func() error { return b.snapshotLoop(ctx) })
	}
	err := g.Wait()
	if b.snapshots != nil { // before the adapters have ended: nobody hears them any more
		err = errors.Join(err, b.saveSnapshots(), b.snapshots.lock.Close())
	}
	if left := b.runs.wait(stopTimeout); len(left) > 0 {
		b.opts.Logger.Error("adapters did not end in time: they are left behind", "registries", left, "timeout", stopTimeout)
	}
	return err
}

// publishLoop is the only queue between the registries and the mesh.
func (b *Bridge) publishLoop(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time // of the last version step
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.store.wake:
		case <-timer.C:
		}
		now := time.Now()
		due := b.store.tick(now)
		complete, again := b.complete(now) // what makes it so is published below
		due = earlier(due, again)
		if next := last.Add(b.opts.Coalesce); now.Before(next) {
			due = earlier(due, next)
		} else {
			if dirty := b.store.takeDirty(); len(dirty) > 0 {
				b.publisher.publish(dirty, b.store.claims)
				last = now
				b.metrics.steps.Inc()
			}
			if complete {
				b.open(now)
			}
		}
		if due.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(max(0, time.Until(due)))
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// complete reports whether first answers, which have not gone out yet, need not wait any longer. It returns when to look
// again if they do.
func (b *Bridge) complete(now time.Time) (bool, time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.opened || !b.config.Read {
		return false, time.Time{}
	}
	deadline := b.readAt.Add(b.opts.FirstAnswerDeadline) // before, nobody could read a registry
	if now.Before(deadline) && len(b.waitedFor()) > 0 {
		return false, deadline
	}
	return true, time.Time{}
}

// open lets the first answers out.
func (b *Bridge) open(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if waiting := b.waitedFor(); len(waiting) > 0 {
		b.opts.Logger.Warn("first answers go out without registries that have not been read completely", "registries", waiting,
			"deadline", b.opts.FirstAnswerDeadline)
	}
	b.opened = true
	b.opts.Mesh.Open()
	b.opts.Logger.Info("first answers go out", "after", now.Sub(b.started).Round(time.Millisecond))
}

// waitedFor returns the registries that have neither been read completely nor come from a snapshot. b.mu is held.
func (b *Bridge) waitedFor() []string {
	var waiting []string
	for _, c := range b.config.Registries {
		if run := b.runners[c.Key]; run == nil || run.invalid() {
			continue
		} else if run.state.awaited() {
			waiting = append(waiting, c.Key.String())
		}
	}
	return waiting
}

// Ready reports whether first answers may go out, and if not, what is waited for.
func (b *Bridge) Ready() (ready bool, reasons []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.opened {
		return true, nil
	}
	if !b.config.Read {
		if b.config.Err != nil {
			return false, []string{"the configuration cannot be read: " + b.config.Err.Error()}
		}
		return false, []string{"the configuration has not been read yet"}
	}
	for _, key := range b.waitedFor() {
		reasons = append(reasons, "registry "+key+" has not been read completely yet")
	}
	return false, append(reasons, "nothing has been published yet")
}

// Release lets go what is held of the registries with this name, which is the entry's name, type/name, or the whole key.
// It returns the number of endpoints by registry; an error if no registry has the name.
func (b *Bridge) Release(name string) (map[string]int, error) {
	released := map[string]int{}
	for _, r := range b.store.all() {
		if name != r.key.Name && name != r.key.Type+"/"+r.key.Name && name != r.key.String() {
			continue
		}
		b.store.update(r, func(now time.Time) { released[r.key.String()] = r.release(now) })
		b.opts.Logger.Info("held endpoints released", "registry", r.key.String(), "endpoints", released[r.key.String()])
	}
	if len(released) == 0 {
		return nil, fmt.Errorf("release %q: no registry has this name: write the entry's name, type/name, or namespace/bridge/type/name", name)
	}
	return released, nil
}

// configure makes the running registries what the configuration says.
func (b *Bridge) configure(ctx context.Context, c Config) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.report(c)
	wanted := map[Key]int{}
	for i, rc := range c.Registries {
		wanted[rc.Key] = i
		b.configureOne(ctx, rc, i)
	}
	// An entry that cannot be used may be a misspelt one of those that are missing.
	unusable := map[string]string{} // by McpBridge
	for _, rc := range c.Registries {
		if b.runners[rc.Key].invalid() {
			unusable[rc.Key.bridge()] = rc.Key.String()
		}
	}
	for _, key := range slices.SortedFunc(maps.Keys(b.runners), func(a, b Key) int { return strings.Compare(a.String(), b.String()) }) {
		if _, ok := wanted[key]; !ok {
			run := b.runners[key]
			if other := unusable[key.bridge()]; other != "" {
				b.opts.Logger.Warn("registry is no longer in the configuration, and is not removed before all entries of its McpBridge can be used",
					"registry", key.String(), "unusable", other)
				wanted[key] = len(wanted)
				continue
			}
			b.opts.Logger.Info("registry removed from the configuration", "registry", key.String())
			run.stop()
			b.store.remove(run.state)
			run.forgetMetrics()
			delete(b.runners, key)
			if c.Read { // else the entry may be in what could not be read
				b.forgetSnapshot(key)
			}
		}
	}
	b.store.setOrder(wanted)
	b.config = c
	if c.Read && b.readAt.IsZero() {
		b.readAt = time.Now()
	}
	if c.Read && len(c.Registries) > 0 && len(unusable) == 0 { // an empty configuration may be a volume that is not mounted
		b.sweepSnapshots()
	}
	b.store.wakeUp()
}

// configureOne starts, replaces, re-assembles or leaves one registry alone.
func (b *Bridge) configureOne(ctx context.Context, rc RegistryConfig, order int) {
	run := b.runners[rc.Key]
	fresh := run == nil
	if fresh {
		run = newRunner(b, rc.Key, order)
		b.runners[rc.Key] = run
		b.restore(run.state, rc)
		b.store.add(run.state)
	}
	if !fresh && run.config.Err == nil && rc.Err == nil && sameEntry(run.config.Entry, rc.Entry) {
		run.config = rc
		return
	}
	if rc.Err == nil {
		rc.Err = run.prepare(ctx, rc)
	}
	if rc.Err != nil { // what ran before goes on with the settings that it has
		run.refuse(rc)
		b.opts.Logger.Error("registry entry cannot be used", "registry", rc.Key.String(), "at", rc.Origin+" "+rc.Path, "error", rc.Err)
	}
}

// watchFiles looks for changed TLS files of registries.
func (b *Bridge) watchFiles(ctx context.Context) error {
	for registry.Sleep(ctx, secretsPeriod) == nil {
		b.SecretsChanged()
	}
	return nil
}

// SecretsChanged makes registries whose credentials changed connect anew. It is called when Secrets may have changed.
func (b *Bridge) SecretsChanged() {
	b.rechecks.Lock()
	defer b.rechecks.Unlock()
	b.mu.Lock()
	configs := map[*runner]RegistryConfig{}
	for _, run := range b.runners {
		if run.running {
			configs[run] = run.config
		}
	}
	b.mu.Unlock()
	for run, rc := range configs {
		identity, err := run.identify(rc) // reads files, so without the lock
		if err != nil {
			continue
		}
		b.mu.Lock()
		if b.runners[rc.Key] == run && sameEntry(run.config.Entry, rc.Entry) {
			run.identified(identity)
		}
		b.mu.Unlock()
	}
}

// report logs what the configuration's reader found, each finding once.
func (b *Bridge) report(c Config) {
	known := map[Problem]bool{}
	for _, p := range b.config.Problems {
		known[p] = true
	}
	for _, p := range c.Problems {
		if known[p] {
			continue
		}
		level := slog.LevelError
		if p.Warning {
			level = slog.LevelWarn
		}
		b.opts.Logger.Log(context.Background(), level, "configuration: "+p.Message, "file", p.File, "line", p.Line, "field", p.Path)
	}
	if c.Err != nil && (b.config.Err == nil || b.config.Err.Error() != c.Err.Error()) {
		b.opts.Logger.Error("the configuration cannot be read", "error", c.Err)
	}
}
