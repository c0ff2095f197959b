package xds

import (
	"slices"
	"strings"

	"google.golang.org/grpc/mem"
)

// A partition is what one port serves: the whole, which is the zero partition, or shard number index of count.
type partition struct {
	count, index int
}

// A collection is the resources of one type in one partition, with what happened to them last. Cache.mu guards it.
//
// Every name has one node, and the nodes are a list in order of their last change. So what changed since a cursor is the
// end of that list, each name once, however long ago the cursor was taken, and the list never outgrows the names. Names
// of removed resources stay as nodes without an item until there are too many of them.
type collection struct {
	typ   string
	gated bool // its first answers wait for Cache.Open

	nodes map[string]*node
	root  node // of the list; root.next changed longest ago, root.prev last
	live  int  // nodes with an item
	seq   uint64
	// horizon is the seq of the latest removal that was forgotten: a cursor below it cannot tell all removals any more.
	horizon  uint64
	remember int // how many removals are remembered at the least
	sum      digest

	// order is the live items by name, nil until somebody asks and after big changes.
	order []*item
	// fullSotw and fullDelta are the answers that hold everything, and last the one with the changes after the step
	// lastAfter; nil until somebody asks and after each step.
	fullSotw, fullDelta *answer
	last                *answer
	lastAfter           uint64

	// armed are the subscriptions that wait for a change; users counts all subscriptions.
	armed map[*subscription]struct{}
	users int
}

// A node is what is known of one name.
type node struct {
	item       *item // nil: removed
	name       string
	seq        uint64 // the step that changed it last
	born       uint64 // the step that first brought the name
	prev, next *node
}

// An answer is what a response holds. It is immutable, and shared by all who are sent the same.
type answer struct {
	resources []mem.Buffer
	removed   []string
	bytes     int // of the resources
	full      bool
}

func (a *answer) add(b mem.Buffer) {
	a.resources = append(a.resources, b)
	a.bytes += b.Len()
}

// minRemembered is how many removed names a collection remembers; a bigger one remembers as many as it has resources.
const minRemembered = 1 << 14

// maxInserts is how many names may come or go in one step before the order is sorted anew, when somebody next asks.
const maxInserts = 16

func newCollection(typ string, gated bool) *collection {
	c := &collection{typ: typ, gated: gated, remember: minRemembered, nodes: map[string]*node{}, armed: map[*subscription]struct{}{}}
	c.root.prev, c.root.next = &c.root, &c.root
	return c
}

// get returns the live item of that name, nil if there is none.
func (c *collection) get(name string) *item {
	if n := c.nodes[name]; n != nil {
		return n.item
	}
	return nil
}

func (c *collection) version() string { return c.sum.String() }

// step applies changes as one step. Each item is new or differs from the one before; each name in removed is live, and
// is not among the items.
func (c *collection) step(items []*item, removed []string) {
	c.seq++
	c.fullSotw, c.fullDelta, c.last = nil, nil, nil
	moved := len(removed)
	for _, it := range items {
		if c.get(it.name) == nil {
			moved++
		}
	}
	if moved > maxInserts {
		c.order = nil
	}
	for _, it := range items {
		n := c.nodes[it.name]
		if n == nil {
			n = &node{name: it.name, born: c.seq}
			c.nodes[it.name] = n
		}
		if n.item == nil {
			c.live++
		} else {
			c.sum = c.sum.minus(n.item.digest)
		}
		c.sum = c.sum.plus(it.digest)
		n.item = it
		c.touch(n)
		c.reorder(it.name, it)
	}
	for _, name := range removed {
		n := c.nodes[name]
		c.sum = c.sum.minus(n.item.digest)
		n.item = nil
		c.live--
		c.touch(n)
		c.reorder(name, nil)
	}
	c.forget()
}

// touch moves n to the end of the list.
func (c *collection) touch(n *node) {
	if n.prev != nil {
		n.prev.next, n.next.prev = n.next, n.prev
	}
	n.prev, n.next = c.root.prev, &c.root
	n.prev.next, c.root.prev = n, n
	n.seq = c.seq
}

// reorder puts the item, or with nil its absence, into the sorted order, if that is kept.
func (c *collection) reorder(name string, it *item) {
	if c.order == nil {
		return
	}
	i, found := slices.BinarySearchFunc(c.order, name, func(o *item, name string) int { return strings.Compare(o.name, name) })
	switch {
	case it == nil && found:
		c.order = slices.Delete(c.order, i, i+1)
	case it != nil && found:
		c.order[i] = it
	case it != nil:
		c.order = slices.Insert(c.order, i, it)
	}
}

// forget drops the oldest removed names once twice as many as need be are remembered, which makes its cost constant for
// each removal.
func (c *collection) forget() {
	dead, limit := len(c.nodes)-c.live, max(c.remember, c.live)
	if dead <= 2*limit {
		return
	}
	for n := c.root.next; dead > limit; {
		next := n.next
		if n.item == nil {
			n.prev.next, n.next.prev = n.next, n.prev
			delete(c.nodes, n.name)
			c.horizon = n.seq
			dead--
		}
		n = next
	}
}

// sorted returns the live items by name. The slice is valid until the next step.
func (c *collection) sorted() []*item {
	if c.order == nil {
		c.order = make([]*item, 0, c.live)
		for _, n := range c.nodes {
			if n.item != nil {
				c.order = append(c.order, n.item)
			}
		}
		slices.SortFunc(c.order, func(a, b *item) int { return strings.Compare(a.name, b.name) })
	}
	return c.order
}

// everything returns the whole collection in the order of names, for SotW or for delta.
func (c *collection) everything(delta bool) *answer {
	full := &c.fullSotw
	if delta {
		full = &c.fullDelta
	}
	if *full == nil {
		*full = &answer{full: true, resources: make([]mem.Buffer, 0, c.live)}
		for _, it := range c.sorted() {
			if delta {
				(*full).add(it.delta)
			} else {
				(*full).add(it.sotw)
			}
		}
	}
	return *full
}

// since returns what changed after the step cursor, for a delta client that is subscribed to all.
func (c *collection) since(cursor uint64) *answer {
	if c.last == nil || c.lastAfter != cursor {
		c.last, c.lastAfter = c.changes(cursor, nil), cursor
	}
	return c.last
}

// changes returns what changed after the step cursor, in the order of names, for a delta client. Unless want is nil, only
// the names that it holds for are looked at.
func (c *collection) changes(cursor uint64, want func(name string) bool) *answer {
	var nodes []*node
	for n := c.root.prev; n != &c.root && n.seq > cursor; n = n.prev {
		// A name that came and went since the cursor is nothing to a client that never heard of it.
		if (n.item != nil || n.born <= cursor) && (want == nil || want(n.name)) {
			nodes = append(nodes, n)
		}
	}
	slices.SortFunc(nodes, func(a, b *node) int { return strings.Compare(a.name, b.name) })
	a := &answer{}
	for _, n := range nodes {
		if n.item != nil {
			a.add(n.item.delta)
		} else {
			a.removed = append(a.removed, n.name)
		}
	}
	return a
}

// difference returns what differs from what a client has, a version for each name.
func (c *collection) difference(has map[string]string) *answer {
	a := &answer{}
	for _, it := range c.sorted() {
		if version, ok := has[it.name]; !ok || version != it.version {
			a.add(it.delta)
		}
	}
	for name := range has {
		if c.get(name) == nil {
			a.removed = append(a.removed, name)
		}
	}
	slices.Sort(a.removed)
	return a
}

// touched tells whether one of the names changed after the step cursor.
func (c *collection) touched(cursor uint64, names map[string]struct{}) bool {
	for n := c.root.prev; n != &c.root && n.seq > cursor; n = n.prev {
		if _, ok := names[n.name]; ok {
			return true
		}
	}
	return false
}

// named returns the live items of these names in their order, and the version of that selection. The version tells names
// without a resource as well: a client that asked for another name has another version.
func (c *collection) named(names map[string]struct{}) (items []*item, version string) {
	var sum digest
	for name := range names {
		if it := c.get(name); it != nil {
			items = append(items, it)
			sum = sum.plus(it.digest)
		} else {
			sum = sum.plus(digestOf(name, ""))
		}
	}
	slices.SortFunc(items, func(a, b *item) int { return strings.Compare(a.name, b.name) })
	return items, sum.String()
}
