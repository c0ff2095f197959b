package zookeeper

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/registry"
)

// place is what tells instances of one service apart. All nodes that an instance wrote, before and after a restart and at
// both levels, have one place.
type place struct {
	address  string
	port     uint32
	protocol string
}

func placeOf(i registry.Instance) place { return place{i.Address, i.Port, i.Protocol} }

func (p place) compare(o place) int {
	return cmp.Or(strings.Compare(p.address, o.address), cmp.Compare(p.port, o.port), strings.Compare(p.protocol, o.protocol))
}

// sighting is an instance with what decides between two of the same place.
type sighting struct {
	rank int   // by the level at which it registered: the higher one counts
	at   int64 // when: the later one counts
	registry.Instance
}

func (s sighting) compare(o sighting) int {
	return cmp.Or(placeOf(s.Instance).compare(placeOf(o.Instance)), -cmp.Compare(s.rank, o.rank), -cmp.Compare(s.at, o.at),
		-strings.Compare(s.Metadata.Encoded(), o.Metadata.Encoded()), strings.Compare(s.Reason, o.Reason))
}

// settle gives one instance for each place, in a fixed order.
func settle(all []sighting) []registry.Instance {
	slices.SortFunc(all, sighting.compare)
	out := make([]registry.Instance, 0, len(all))
	for n, s := range all {
		if n == 0 || placeOf(s.Instance) != placeOf(all[n-1].Instance) {
			out = append(out, s.Instance)
		}
	}
	return out
}

// interfaceServices gives the services of one interface, sorted by id: one for each version and group that somebody
// provides.
//
// An instance that registered at both levels counts once, as its node at the interface's level has it: also where that says
// that it is disabled. Of two nodes of one place the later registration counts: the session of the other, which is dead, has
// not ended yet.
func interfaceServices(iface string, providers []provider, overrides []override, all []exported) []registry.Service {
	overrides = slices.SortedFunc(slices.Values(overrides), compareOverrides)
	keys := map[string]serviceKey{}
	sightings := map[string][]sighting{}
	add := func(k serviceKey, s sighting) {
		keys[k.id()] = k
		sightings[k.id()] = append(sightings[k.id()], s)
	}
	interfaceLevel := map[place]bool{}
	for _, p := range providers {
		interfaceLevel[placeOf(p.instance)] = true
		add(p.key, sighting{rank: 1, at: p.timestamp, Instance: apply(overrides, p.key, p.application, p.instance)})
	}
	for _, e := range all {
		// A process that registered at the interface's level has told there what it serves: nothing needs to be guessed.
		told := slices.ContainsFunc(e.process, func(i registry.Instance) bool { return interfaceLevel[placeOf(i)] })
		if e.key.iface == iface && (!e.guessed || !told) {
			add(e.key, sighting{Instance: apply(overrides, e.key, e.application, e.instance)})
		}
	}
	out := make([]registry.Service, 0, len(keys))
	for _, id := range slices.Sorted(maps.Keys(keys)) {
		out = append(out, keys[id].service(settle(sightings[id])))
	}
	return out
}

// rootService gives the service of a folder, by its nodes. root is the path of the folder that it is in, such as /services.
// Of two nodes of one place the one that was written later counts: the other's session has not ended yet.
func rootService(root, name string, nodes []node) registry.Service {
	root = strings.Trim(root, "/")
	id, host := "/"+name, name+".zookeeper"
	if root != "" {
		id, host = "/"+root+id, name+"."+strings.ReplaceAll(root, "/", "-")+".zookeeper"
	}
	var all []sighting
	for _, n := range nodes {
		for _, i := range n.instances {
			all = append(all, sighting{at: n.registered, Instance: i})
		}
	}
	return registry.Service{ID: id, Host: host, Instances: settle(all)}
}
