package eureka

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/registry"
)

// known is what a server says, as far as we know: the last full answer, with the deltas since.
type known struct {
	apps   map[string][]record // sorted by id
	counts map[string]int      // instances by status
	dirty  map[string]bool     // applications that changed since they were last reported
	names  []string            // of apps, sorted; nil if that has to be found out
}

func newKnown() *known {
	return &known{apps: map[string][]record{}, counts: map[string]int{}, dirty: map[string]bool{}}
}

// hash gives the number of instances by status, as servers write it ("DOWN_1_UP_2_").
func (k *known) hash() string { return hashOf(k.counts) }

func hashOf(counts map[string]int) string {
	var out strings.Builder
	for _, status := range slices.Sorted(maps.Keys(counts)) {
		fmt.Fprintf(&out, "%s_%d_", status, counts[status])
	}
	return out.String()
}

// countOf gives the hash of what a full answer lists.
func countOf(full *answer) string {
	counts := map[string]int{}
	for _, records := range full.apps {
		for _, r := range records {
			counts[r.status]++
		}
	}
	return hashOf(counts)
}

func (k *known) count(status string, by int) {
	if k.counts[status] += by; k.counts[status] == 0 {
		delete(k.counts, status)
	}
}

func find(records []record, id string) (int, bool) {
	return slices.BinarySearchFunc(records, id, func(r record, id string) int { return strings.Compare(r.id, id) })
}

// settled sorts the records of one application, and keeps the latest of those with one id: by the server's clock, else the last one. Servers list
// an instance once, in deltas too, with its last state.
func settled(records []record) []record {
	slices.SortStableFunc(records, func(a, b record) int {
		return cmp.Or(strings.Compare(a.id, b.id), cmp.Compare(a.updated, b.updated))
	})
	out := records[:0]
	for n, r := range records {
		if n+1 == len(records) || records[n+1].id != r.id {
			out = append(out, r)
		}
	}
	return slices.Clip(out)
}

// older reports whether r is a state of the instance before that of o. A server's states never go back; but another server,
// which answers at the same address, may lag behind. A clock alone may have been set.
func (r record) older(o record) bool {
	return r.dirty != 0 && r.updated != 0 && r.dirty < o.dirty && r.updated < o.updated
}

// apply merges a delta. That may be done again: a change is told for some minutes.
func (k *known) apply(d *answer) {
	for name, changes := range d.apps {
		for _, change := range changes {
			k.applyOne(name, change)
		}
	}
}

func (k *known) applyOne(name string, change record) {
	records := k.apps[name]
	at, exists := find(records, change.id)
	switch {
	case exists && change.older(records[at]), !exists && change.deleted:
		return
	case change.deleted:
		k.count(records[at].status, -1)
		if records = slices.Delete(records, at, at+1); len(records) == 0 {
			delete(k.apps, name)
			k.names = nil
		} else {
			k.apps[name] = records
		}
	case exists:
		same := records[at].fact == change.fact
		k.count(records[at].status, -1)
		k.count(change.status, 1)
		records[at] = change
		if same {
			return
		}
	default:
		if k.apps[name] == nil {
			k.names = nil
		}
		k.count(change.status, 1)
		k.apps[name] = slices.Insert(records, at, change)
	}
	k.dirty[name] = true
}

// replace takes a full answer.
func (k *known) replace(full *answer) {
	old := k.apps
	k.apps, k.counts, k.names = full.apps, map[string]int{}, nil
	for name, records := range k.apps {
		for _, r := range records {
			k.count(r.status, 1)
		}
		before, existed := old[name]
		if !existed || !slices.EqualFunc(before, records, func(a, b record) bool { return a.fact == b.fact }) {
			k.dirty[name] = true
		}
	}
}

// lost names instances that are known and that a full answer does not list.
func (k *known) lost(full *answer) []instanceKey {
	var lost []instanceKey
	for name, records := range k.apps {
		listed := full.apps[name]
		if len(listed) == 0 {
			for _, r := range records {
				lost = append(lost, instanceKey{name, r.id})
			}
			continue
		}
		ids := make(map[string]bool, len(listed))
		for _, r := range listed {
			ids[r.id] = true
		}
		for _, r := range records {
			if !ids[r.id] {
				lost = append(lost, instanceKey{name, r.id})
			}
		}
	}
	slices.SortFunc(lost, func(a, b instanceKey) int {
		return cmp.Or(strings.Compare(a.app, b.app), strings.Compare(a.id, b.id))
	})
	return lost
}

// instanceKey names an instance.
type instanceKey struct{ app, id string }

// String gives application and id.
func (k instanceKey) String() string { return k.app + "/" + k.id }

// unexplained selects those of the instances that a delta does not say were removed.
func (k *known) unexplained(lost []instanceKey, d *answer) []instanceKey {
	var out []instanceKey
	for _, key := range lost {
		changes := d.apps[key.app]
		at, told := find(changes, key.id)
		records := k.apps[key.app]
		had, _ := find(records, key.id)
		if !told || !changes[at].deleted || changes[at].older(records[had]) {
			out = append(out, key)
		}
	}
	return out
}

// keptRegistration reports whether a full answer has an instance whose registration is the one that is known, or is not
// told.
func (k *known) keptRegistration(full *answer) bool {
	for name, listed := range full.apps {
		records := k.apps[name]
		for _, r := range listed {
			if at, ok := find(records, r.id); ok && (r.registered == 0 || r.registered == records[at].registered) {
				return true
			}
		}
	}
	return false
}

// changed gives the services that changed since it was last called, or all of them, in the order of their ids.
func (k *known) changed(all bool) []registry.Service {
	var names []string
	if all {
		names = k.sorted()
	} else {
		names = slices.Sorted(maps.Keys(k.dirty))
	}
	var out []registry.Service
	for _, name := range names {
		if records, ok := k.apps[name]; ok {
			out = append(out, service(name, records))
		}
	}
	clear(k.dirty)
	return out
}

func service(name string, records []record) registry.Service {
	s := registry.Service{ID: name, Host: hostOf(name), Instances: make([]registry.Instance, len(records))}
	for n, r := range records {
		s.Instances[n] = r.fact
	}
	return s
}

func (k *known) sorted() []string {
	if k.names == nil {
		k.names = slices.Sorted(maps.Keys(k.apps))
	}
	return k.names
}

// ids gives the ids of all services, as a slice of the caller's own.
func (k *known) ids() []string { return slices.Clone(k.sorted()) }
