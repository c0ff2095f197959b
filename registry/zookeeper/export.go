package zookeeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"time"

	"github.com/go-zookeeper/zk"
)

// What an instance at Dubbo's application level exports is not in its node. It is asked for only if the instance has an
// endpoint that its application has not registered at interface level. If its metadata is remote, it is in
// /dubbo/metadata/<application>/<revision>. Else only the provider itself knows; but /dubbo/mapping/<interface> (Dubbo 2.7:
// /dubbo/config/mapping/<interface>/<application>) tells which applications provide an interface, and the service
// definitions /dubbo/metadata/<interface>[/<version>][/<group>]/provider/<application> in which versions and groups. Both
// stay when providers go, so they tell about instances that are alive, and nothing else.

const (
	metadataPath      = dubboRoot + "/metadata"
	mappingPath       = dubboRoot + "/mapping"
	legacyMappingPath = dubboRoot + "/config/mapping"

	// exportPause is the least time between two looks at what an application exports because of what the mapping says.
	exportPause = 100 * time.Millisecond
	// grace is how long an instance may take to register at interface level too, before the mapping is read because of it.
	grace = time.Second
	// definitionsPause is the least time between two readings of an application's definitions because of new instances.
	definitionsPause = time.Minute
)

// exporting is what is known of a folder's exports.
type exporting struct {
	documents map[string]*metadata // by revision
	exported  map[*iface]bool      // interfaces that have exports of it
	asked     time.Time            // when its definitions were last asked for because of new instances
}

// metadata is what the instances of one revision export.
type metadata struct {
	z     *znode
	known bool
	of    []export
}

// exporter has the folders whose exports are to be looked at, and what Dubbo's mapping says.
type exporter struct {
	due      map[*folder]time.Time
	at       time.Time        // the first of those
	local    map[*folder]bool // those whose exports only the mapping tells
	mappings []*mapping
	defined  map[string]*defined // by interface
}

// mapping is one of the two folders of interfaces and their applications.
type mapping struct {
	path   string
	kind   kind // what its nodes are
	list   *znode
	ifaces map[string]*mapped
}

// mapped are the applications of an interface.
type mapped struct {
	z    *znode
	apps []string
}

// defined is what the definitions of an interface say.
type defined struct {
	z    *znode
	apps []string                // those asked for
	keys map[string][]serviceKey // by application
	flaw string
}

func newExporter() exporter {
	return exporter{due: map[*folder]time.Time{}, local: map[*folder]bool{}, defined: map[string]*defined{}}
}

// changed has the exports of a folder looked at, from a time on.
func (e *exporter) changed(f *folder, at time.Time) {
	if due, ok := e.due[f]; ok && !at.Before(due) {
		return
	}
	e.due[f] = at
	if len(e.due) == 1 || at.Before(e.at) {
		e.at = at
	}
}

// export looks at what is due, and says when it is to be called again.
func (t *tree) export(now time.Time) time.Time {
	e := &t.exports
	if len(e.due) == 0 || t.r.synced && now.Before(e.at) {
		return e.at
	}
	due := e.due
	e.due, e.at = map[*folder]time.Time{}, time.Time{}
	for f, at := range due {
		if t.r.synced && at.After(now) {
			e.changed(f, at)
			continue
		}
		t.exportFolder(f, now)
	}
	return e.at
}

// exportFolder finds out what the instances of a folder export.
func (t *tree) exportFolder(f *folder, now time.Time) {
	if f.root.folders[f.name] != f {
		return
	}
	byIface := map[*iface][]exported{}
	revisions := map[string]bool{}
	var local []*instanceNode
	add := func(n *instanceNode) {
		for _, x := range exports(n.node, n.of) {
			i := t.iface(x.key.iface)
			byIface[i] = append(byIface[i], x)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		n := f.nodes[name]
		if !n.known || !n.node.dubbo || t.covers(n.node) {
			n.uncovered = time.Time{}
			continue
		}
		if n.uncovered.IsZero() {
			n.uncovered = now
		}
		switch {
		case n.node.remoteMetadata && n.node.revision != "":
			revisions[n.node.revision] = true
			if m := t.metadata(f, n.node.revision); m.known {
				n.of = m.of
			}
			add(n)
		case t.exports.mappings == nil && t.r.synced && now.Sub(n.uncovered) < grace:
			t.exports.changed(f, n.uncovered.Add(grace))
		default:
			local = append(local, n)
		}
	}
	delete(t.exports.local, f)
	if len(local) > 0 {
		t.exports.local[f] = true
		of := t.definitions(f, local, now)
		for _, n := range local {
			n.of = of
			add(n)
		}
	}
	for revision, m := range f.documents {
		if !revisions[revision] {
			t.r.drop(m.z)
			delete(f.documents, revision)
		}
	}
	for i := range f.exported {
		if byIface[i] == nil {
			delete(i.exported, f)
			t.dirty[i] = true
		}
	}
	f.exported = map[*iface]bool{}
	for i, list := range byIface {
		i.exported[f], f.exported[i] = list, true
		t.dirty[i] = true
	}
}

// dropExports ends what a folder that is gone exports.
func (t *tree) dropExports(f *folder) {
	for i := range f.exported {
		delete(i.exported, f)
		t.dirty[i] = true
	}
	for _, m := range f.documents {
		t.r.drop(m.z)
	}
	f.exporting = exporting{}
	delete(t.exports.due, f)
	delete(t.exports.local, f)
}

// covers reports whether all endpoints of an instance are registered at interface level too.
func (t *tree) covers(n node) bool {
	for _, i := range n.instances {
		if t.covered[endpoint{n.application, i.Address, i.Port}] == 0 {
			return false
		}
	}
	return true
}

// metadata returns what is known of a revision, and has it read if need be.
func (t *tree) metadata(f *folder, revision string) *metadata {
	m := f.documents[revision]
	if m == nil {
		m = &metadata{}
		if f.documents == nil {
			f.documents = map[string]*metadata{}
		}
		f.documents[revision] = m
	}
	if m.known || m.z != nil && m.z.reader == t.r {
		return m
	}
	m.z = t.begin(false, document, metadataPath+"/"+f.name+"/"+revision, func(a answer) {
		switch {
		case a.err != nil:
			t.failFolder(f, a.err)
			return
		case a.missing:
			return
		}
		of, err := decodeMetadata(a.data)
		if err != nil {
			t.warn("the metadata of an application in ZooKeeper cannot be used", m.z.path, err)
		}
		m.of, m.known = of, err == nil || len(of) > 0
		t.putFolder(f)
	})
	return m
}

// definitions gives what the mapping and the definitions say that the application of a folder exports, as far as is known,
// and has read what is not.
func (t *tree) definitions(f *folder, local []*instanceNode, now time.Time) []export {
	e := &t.exports
	if e.mappings == nil {
		e.mappings = []*mapping{{path: mappingPath, kind: watched}, {path: legacyMappingPath, kind: listed}}
		t.readMappings()
	}
	news := slices.ContainsFunc(local, func(n *instanceNode) bool { return !n.asked })
	if news && now.Sub(f.asked) < definitionsPause {
		e.changed(f, f.asked.Add(definitionsPause))
		news = false
	}
	if news {
		f.asked = now
		for _, n := range local {
			n.asked = true
		}
	}
	names := map[string]bool{}
	for _, m := range e.mappings {
		for name, of := range m.ifaces {
			if slices.Contains(of.apps, f.name) {
				names[name] = true
			}
		}
	}
	var out []export
	for _, name := range slices.Sorted(maps.Keys(names)) {
		d := t.define(name)
		if !slices.Contains(d.apps, f.name) {
			d.apps = append(slices.Clone(d.apps), f.name)
			d.z.apps = d.apps
			t.r.soon(d.z)
		} else if news {
			t.r.soon(d.z)
		}
		for _, key := range d.keys[f.name] {
			out = append(out, export{key: key})
		}
	}
	return out
}

// define returns what is known of the definitions of an interface. They are read over each session.
func (t *tree) define(name string) *defined {
	d := t.exports.defined[name]
	if d == nil {
		d = &defined{}
		t.exports.defined[name] = d
	}
	if d.z != nil && d.z.reader == t.r {
		return d
	}
	d.z = t.begin(false, definitions, metadataPath+"/"+url.QueryEscape(name), func(a answer) {
		if a.err != nil {
			t.failLocal(a.err)
			return
		}
		flaw := ""
		if a.flaws != nil {
			flaw = a.flaws.Error()
		}
		if flaw != "" && flaw != d.flaw {
			t.warn("service definitions in ZooKeeper cannot be used", d.z.path, a.flaws)
		}
		d.flaw, d.keys = flaw, a.definitions
		t.lookAtLocal()
	})
	d.z.apps = d.apps
	return d
}

// readMappings has the mapping read over this session.
func (t *tree) readMappings() {
	for _, m := range t.exports.mappings {
		m.list = t.begin(false, listed, m.path, func(a answer) { t.mappingRead(m, a) })
	}
}

// mappingRead takes the interfaces of a mapping.
func (t *tree) mappingRead(m *mapping, a answer) {
	if a.err != nil {
		t.failLocal(a.err)
		return
	}
	before := m.ifaces
	m.ifaces = make(map[string]*mapped, len(a.names))
	for _, name := range a.names {
		of := before[name]
		if of == nil {
			of = &mapped{}
		}
		m.ifaces[name] = of
		if of.z == nil || of.z.reader != t.r {
			of.z = t.begin(false, m.kind, m.path+"/"+name, func(a answer) { t.mappedRead(of, a) })
		}
	}
	for name, of := range before {
		if m.ifaces[name] == nil {
			t.r.drop(of.z)
		}
	}
	t.lookAtLocal()
}

// mappedRead takes the applications of an interface.
func (t *tree) mappedRead(of *mapped, a answer) {
	switch {
	case a.err != nil:
		t.failLocal(a.err)
		return
	case of.z.kind == listed:
		of.apps = a.names
	default:
		of.apps = decodeMapping(a.data)
	}
	t.lookAtLocal()
}

func (t *tree) lookAtLocal() {
	for f := range t.exports.local {
		t.exports.changed(f, time.Now().Add(exportPause))
	}
}

func (t *tree) failLocal(err error) {
	for f := range t.exports.local {
		t.failFolder(f, err)
	}
}

// definitions reads the definitions of some applications below the path of an interface.
func (c *conn) definitions(ctx context.Context, path string, apps []string) (map[string][]serviceKey, error, error) {
	found := map[string][]serviceKey{}
	var flaws []error
	var read func(path string, depth int) error
	read = func(path string, depth int) error {
		names, _, err := c.children(ctx, path, false)
		if err != nil {
			return err
		}
		for _, name := range names {
			below := path + "/" + name
			switch {
			case name == "consumer":
				continue
			case name != "provider" && depth < 2: // a version or group
				err = read(below, depth+1)
			case name == "provider":
				err = c.providerDefinitions(ctx, below, apps, found, &flaws)
			}
			if err != nil && !errors.Is(err, zk.ErrNoNode) {
				return err
			}
		}
		return nil
	}
	err := read(path, 0)
	return found, errors.Join(flaws...), err
}

func (c *conn) providerDefinitions(ctx context.Context, path string, apps []string, found map[string][]serviceKey,
	flaws *[]error,
) error {
	names, _, err := c.children(ctx, path, false)
	if err != nil {
		return err
	}
	for _, app := range names {
		if !slices.Contains(apps, app) {
			continue
		}
		data, _, err := c.get(ctx, path+"/"+app, false)
		if errors.Is(err, zk.ErrNoNode) {
			continue
		}
		if err != nil {
			return err
		}
		key, err := decodeDefinition(data)
		if err != nil {
			*flaws = append(*flaws, fmt.Errorf("%s/%s: %w", path, app, err))
			continue
		}
		found[app] = append(found[app], key)
	}
	return nil
}
