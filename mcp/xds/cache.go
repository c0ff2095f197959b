// Package xds keeps the published resources in versions and serves them over xDS, state-of-the-world and delta, to any
// number of clients. It knows neither registries nor the rules of Istio and Envoy: resources are opaque. Package bridge
// feeds a Cache, and a Server streams it; go-control-plane's server is the state machine of each stream.
package xds

import (
	"container/list"
	"log/slog"
	"slices"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Options are the settings of a Cache.
type Options struct {
	// Published are the types that may ever have resources: their first answers wait for Open. All other types are
	// answered at once, and empty.
	Published []string
	// ShardCounts are the divisions that servers of this cache may offer; 16 divides every type into 16 shards.
	ShardCounts []int
	// MaxStale bounds, in bytes, the superseded resources that are kept for answers which clients have not acknowledged
	// yet. The streams furthest behind are ended beyond it; their clients connect again and get the present state.
	// 0 means 256 MiB.
	MaxStale int64
	// Logger takes refused responses and ended streams; nil discards them.
	Logger *slog.Logger
	// Registerer takes the metrics regbridge_xds_*; nil keeps them to the cache. It panics if they are registered already.
	Registerer prometheus.Registerer
}

// A Cache holds the resources of all types, and what each client has of them. Its methods may be called concurrently.
type Cache struct {
	log      *slog.Logger
	metrics  *metrics
	shards   []int
	maxStale int64
	warnings *rate.Limiter // of what clients cause, so that they cannot flood the log

	applying sync.Mutex // held by Apply throughout, so that steps do not overlap

	mu          sync.Mutex
	open        bool
	published   map[string]bool // types with metrics of their own
	collections map[collectionKey]*collection
	streams     map[*stream]struct{}
	// flights are the answers not yet acknowledged, oldest first, and superseded counts the bytes of all resources that
	// were ever replaced or removed. What has been superseded since the oldest flight bounds what all of them hold.
	flights    *list.List
	superseded int64
}

type collectionKey struct {
	typ  string
	part partition
}

// NewCache makes an empty cache.
func NewCache(opts Options) *Cache {
	c := &Cache{
		log:         opts.Logger,
		metrics:     newMetrics(opts.Registerer),
		maxStale:    opts.MaxStale,
		warnings:    rate.NewLimiter(1, 100),
		published:   map[string]bool{},
		collections: map[collectionKey]*collection{},
		streams:     map[*stream]struct{}{},
		flights:     list.New(),
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if c.maxStale <= 0 {
		c.maxStale = 256 << 20
	}
	c.shards = slices.Compact(slices.Sorted(slices.Values(opts.ShardCounts)))
	for _, typ := range opts.Published {
		c.publish(canonicalType(typ), true)
	}
	for _, protocol := range []string{protocolSotw, protocolDelta} {
		c.metrics.clients.WithLabelValues(protocol)
	}
	return c
}

// warn logs what a client caused.
func (c *Cache) warn(text string, attrs ...any) {
	if c.warnings.Allow() {
		c.log.Warn(text, attrs...)
	}
}

// publish makes the collections of a type that has resources, or may get some.
func (c *Cache) publish(typ string, gated bool) {
	if c.published[typ] {
		return
	}
	c.published[typ] = true
	c.metrics.announce(typ)
	for _, part := range c.partitions() {
		key := collectionKey{typ, part}
		if c.collections[key] == nil { // clients may have asked before
			c.collections[key] = newCollection(typ, gated)
		}
	}
}

// partitions lists the whole and all shards.
func (c *Cache) partitions() []partition {
	parts := []partition{{}}
	for _, count := range c.shards {
		for i := range count {
			parts = append(parts, partition{count, i})
		}
	}
	return parts
}

// collection returns the one that serves typ in part. For a type that is not published it is made when a client first
// asks, and goes with the last one.
func (c *Cache) collection(typ string, part partition) *collection {
	key := collectionKey{typ, part}
	col := c.collections[key]
	if col == nil {
		col = newCollection(typ, false)
		c.collections[key] = col
	}
	return col
}

func (c *Cache) release(col *collection, part partition) {
	col.users--
	if col.users == 0 && !c.published[col.typ] {
		delete(c.collections, collectionKey{col.typ, part})
	}
}

// label is the type's name in metrics.
func (c *Cache) label(typ string) string {
	if c.published[typ] {
		return typ
	}
	return otherTypes
}

// a change is what one Apply does to one collection.
type change struct {
	items   []*item
	removed []string
}

// Apply is one version step: all changes of one call reach each client together, as far as they are of one type. What is
// equal to what is served already is dropped, and so are unknown names in removed; a resource that is in both lists is
// changed. It returns when the answers are handed to the streams, and never waits for a client. A type that was not named
// in Options.Published is served all the same, without holding back its first answer.
func (c *Cache) Apply(changed []Resource, removed []Ref) {
	c.applying.Lock()
	defer c.applying.Unlock()

	// Only this method writes items, so what is new can be found out and encoded without keeping the clients waiting.
	news := make(map[Ref]*item, len(changed))
	current := c.current(changed)
	for i, r := range changed {
		ref, old := Ref{canonicalType(r.Type), r.Name}, current[i]
		if old.same(r.Version, r.Shard) {
			news[ref] = old
			continue
		}
		it := newItem(r)
		if old.same(it.version, it.shard) {
			it = old
		}
		news[ref] = it
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	steps := map[collectionKey]*change{}
	at := func(typ string, part partition) *change {
		key := collectionKey{typ, part}
		if steps[key] == nil {
			steps[key] = &change{}
		}
		return steps[key]
	}
	for ref, it := range news {
		c.publish(ref.Type, false)
		old := c.collection(ref.Type, partition{}).get(ref.Name)
		if old == it {
			continue
		}
		kind := "added"
		if old != nil {
			kind = "changed"
			c.superseded += int64(old.delta.Len())
		}
		c.metrics.changes.WithLabelValues(ref.Type, kind).Inc()
		at(ref.Type, partition{}).items = append(at(ref.Type, partition{}).items, it)
		for _, count := range c.shards {
			to := at(ref.Type, partition{count, shardOf(it.shard, count)})
			to.items = append(to.items, it)
			if old != nil && shardOf(old.shard, count) != shardOf(it.shard, count) {
				from := at(ref.Type, partition{count, shardOf(old.shard, count)})
				from.removed = append(from.removed, ref.Name)
			}
		}
	}
	for _, ref := range removed {
		ref.Type = canonicalType(ref.Type)
		if _, ok := news[ref]; ok || !c.published[ref.Type] {
			continue
		}
		old := c.collection(ref.Type, partition{}).get(ref.Name)
		if old == nil {
			continue
		}
		news[ref] = nil // once, even if it is named twice
		c.superseded += int64(old.delta.Len())
		c.metrics.changes.WithLabelValues(ref.Type, "removed").Inc()
		at(ref.Type, partition{}).removed = append(at(ref.Type, partition{}).removed, ref.Name)
		for _, count := range c.shards {
			from := at(ref.Type, partition{count, shardOf(old.shard, count)})
			from.removed = append(from.removed, ref.Name)
		}
	}
	for key, ch := range steps {
		col := c.collections[key]
		col.step(ch.items, ch.removed)
		if key.part == (partition{}) {
			c.metrics.steps.WithLabelValues(key.typ).Inc()
			c.metrics.resources.WithLabelValues(key.typ).Set(float64(col.live))
		}
	}
	for key := range steps {
		c.collections[key].wake()
	}
	c.shed()
}

// current returns what is served now of each resource, nil for what is not.
func (c *Cache) current(of []Resource) []*item {
	c.mu.Lock()
	defer c.mu.Unlock()
	items := make([]*item, len(of))
	for i, r := range of {
		if col := c.collections[collectionKey{typ: canonicalType(r.Type)}]; col != nil {
			items[i] = col.get(r.Name)
		}
	}
	return items
}

// wake answers the subscriptions that have something to be told.
func (c *collection) wake() {
	for sub := range c.armed {
		sub.advance(false)
	}
}

// shed ends the streams that make the cache hold too much.
func (c *Cache) shed() {
	for e := c.flights.Front(); e != nil; e = c.flights.Front() {
		f := e.Value.(*flight)
		if c.superseded-f.mark <= c.maxStale {
			return
		}
		f.sub.stream.cutOff()
	}
}

// Open lets the first answers of published types go out. Before it, requests of these types are held, for the first
// answer tells a client to delete what it does not hold. Further calls do nothing.
func (c *Cache) Open() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open {
		return
	}
	c.open = true
	for _, col := range c.collections {
		col.wake()
	}
}

// Opened tells whether Open was called.
func (c *Cache) Opened() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open
}

// Resources returns all resources of a type, by name. The bodies are shared and must not be written to.
func (c *Cache) Resources(typ string) []Resource {
	typ = canonicalType(typ)
	c.mu.Lock()
	defer c.mu.Unlock()
	col := c.collections[collectionKey{typ: typ}]
	if col == nil {
		return nil
	}
	out := make([]Resource, 0, col.live)
	for _, it := range col.sorted() {
		out = append(out, it.resource(typ))
	}
	return out
}

// Counts returns the number of resources of each type that is published.
func (c *Cache) Counts() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[string]int, len(c.published))
	for typ := range c.published {
		out[typ] = c.collections[collectionKey{typ: typ}].live
	}
	return out
}
