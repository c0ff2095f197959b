package zookeeper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// forgetAfter is how long a service is listed of which no provider is left, though its interface's folder is.
const forgetAfter = time.Hour

// errRestored ends a session that may read a folder again. Watches may be spent that fired while it was refused.
var errRestored = errors.New("access was restored: everything is read anew")

// tree is what a Run knows of ZooKeeper. It stays from one session to the next, and belongs to the goroutine of Run.
type tree struct {
	z    *zookeeper
	sink registry.Sink
	r    *reader // of this session

	roots  []*root // /dubbo is the last
	ifaces map[string]*iface
	// covered counts the providers of applications at interface level, by endpoint.
	covered map[endpoint]int
	exports exporter

	dirty    map[*iface]bool // those to be stated anew
	due      bool            // a listing is to be reported
	checks   int             // roots that are being checked
	unproven bool            // one of them could not be read
	checkAt  time.Time
	// confirmed is the session in which all was stated once more.
	confirmed *reader
	curator   int // nodes in Curator's form that the first listing of the session waits for
	// applications says that something registered at Dubbo's application level.
	applications bool
}

// endpoint is a port of a Dubbo application.
type endpoint struct {
	application, address string
	port                 uint32
}

// root is a folder of interfaces or services.
type root struct {
	path    string
	dubbo   bool
	list    *znode
	check   *znode
	read    *reader // the session in which it was last read
	failing error
	folders map[string]*folder // of services, by name
	skip    map[string]bool    // children that are something else
}

// folder is a service in Curator's form.
type folder struct {
	id    string
	root  *root
	name  string
	list  *znode
	nodes map[string]*instanceNode
	told  bool                // it was stated, or failed, so that listings name it
	last  []registry.Instance // as it was stated last

	exporting // Dubbo's application level
}

// instanceNode is a child of a folder.
type instanceNode struct {
	z       *znode
	node    node
	known   bool      // node is what was read
	missing bool      // it was gone when it was read
	flaw    string    // what was last logged about it
	gone    time.Time // when it was first seen to be missing in its folder

	of        []export  // what it exports
	asked     bool      // definitions were asked for because of it
	uncovered time.Time // since when it has an endpoint that is not registered at interface level
}

// iface is an interface at Dubbo's interface level, or one that an application exports.
type iface struct {
	name          string
	folder        bool   // it has one
	spelling      string // the folder's name
	providers     *znode
	configurators *znode
	nodes         map[string]*providerNode
	rules         map[string]*override // nil: it cannot be decoded
	exported      map[*folder][]exported
	ids           map[string]*known
	warned        string // the spelling that was warned of
	// placeholder says that it could not be read before anything was known of it.
	placeholder bool
}

// providerNode is a child of providers.
type providerNode struct {
	provider
	bad  bool
	gone time.Time // when it was first seen to be missing
	// moving says that it no longer counts as registered at interface level, so that its application is asked what it
	// exports, and that it stays until that is known.
	moving bool
}

// known is a service of an interface that was stated.
type known struct {
	host    string
	last    []registry.Instance // as it was stated last
	emptied time.Time           // when the last instance went
}

func newTree(z *zookeeper, sink registry.Sink) *tree {
	t := &tree{
		z: z, sink: sink, ifaces: map[string]*iface{}, covered: map[endpoint]int{}, dirty: map[*iface]bool{},
	}
	t.exports = newExporter()
	for _, path := range z.roots {
		t.roots = append(t.roots, &root{path: path, folders: map[string]*folder{}, skip: map[string]bool{}})
	}
	t.roots = append(t.roots, &root{
		path: dubboRoot, dubbo: true, skip: map[string]bool{"config": true, "mapping": true, "metadata": true},
	})
	for _, r := range t.roots {
		for _, other := range t.roots {
			if below, ok := strings.CutPrefix(other.path, r.path+"/"); ok {
				name, _, _ := strings.Cut(below, "/")
				r.skip[name] = true
			}
		}
		if r.path == "" {
			r.skip["zookeeper"] = true // its own
		}
	}
	return t
}

// follow reads everything over a new session, and goes on until ctx or the session ends. It says why the session ended.
func (t *tree) follow(ctx context.Context, c *conn) error {
	t.r = newReader(c)
	t.curator, t.checks, t.unproven, t.due = 0, 0, false, true
	for _, r := range t.roots {
		r.failing, r.check = nil, nil
		r.list = t.begin(!r.dubbo, listed, r.path, func(a answer) { t.rootRead(r, a) })
		r.list.backoff.Max = min(t.z.interval, maxBackoff)
	}
	t.readMappings()
	return t.r.run(ctx, t.step)
}

// begin has a node read. curator says that it is one in Curator's form.
func (t *tree) begin(curator bool, kind kind, path string, take func(answer)) *znode {
	if path == "" {
		path = "/"
	}
	z := t.r.begin(kind, path, take)
	if curator && z.awaited {
		z.group = &t.curator
		t.curator++
	}
	return z
}

// step does what is to be done after something happened.
func (t *tree) step(now time.Time) (wakeAt time.Time) {
	if !t.r.synced && t.r.awaited > 0 {
		if t.curator == 0 && !t.applications { // then no interface has instances that are not known yet
			t.state()
		}
		return time.Time{}
	}
	wakeAt = t.export(now)
	if !t.r.synced && t.r.awaited > 0 {
		return time.Time{}
	}
	t.state()
	t.report(now)
	if t.r.synced && !now.Before(t.checkAt) {
		t.check(now)
	}
	if t.r.synced && (wakeAt.IsZero() || t.checkAt.Before(wakeAt)) {
		wakeAt = t.checkAt
	}
	return wakeAt
}

// report reports the listing.
func (t *tree) report(now time.Time) {
	if !t.due || slices.ContainsFunc(t.roots, func(r *root) bool { return r.failing != nil }) {
		return
	}
	t.due = false
	ids := map[string]bool{}
	for _, r := range t.roots {
		for _, f := range r.folders {
			if f.told {
				ids[f.id] = true
			}
		}
	}
	for _, i := range t.ifaces {
		for id, k := range i.ids {
			if !k.emptied.IsZero() && now.Sub(k.emptied) > forgetAfter {
				delete(i.ids, id)
				continue
			}
			ids[id] = true
		}
		if i.placeholder {
			ids[serviceKey{iface: i.name}.id()] = true
		}
		t.forget(i)
	}
	if !t.r.synced {
		t.r.synced = true
		t.checkAt = now.Add(t.checkPause())
	} else if t.confirmed != t.r {
		t.confirmed = t.r
		t.confirm()
	}
	t.sink.Synced(slices.Sorted(maps.Keys(ids)))
}

// confirm states once more what is there. What was stated before a session's first listing is no evidence that it outlived
// the gap before, in which other sessions may have ended too, and are only found out now. From here on what goes is believed.
func (t *tree) confirm() {
	for _, r := range t.roots {
		for _, f := range r.folders {
			if f.told && t.whole(f) {
				s := rootService(r.path, f.name, nil)
				s.Instances = f.last
				t.sink.Put(s)
			}
		}
	}
	for _, i := range t.ifaces {
		missing := false
		for _, n := range i.nodes {
			missing = missing || !n.gone.IsZero()
		}
		read := !i.folder || t.r.good(i.providers) && t.r.good(i.configurators)
		if missing || t.dirty[i] || !read {
			continue
		}
		for id, k := range i.ids {
			t.sink.Put(registry.Service{ID: id, Host: k.host, Instances: k.last})
		}
	}
}

// whole reports whether all of a folder was read in this session, and nothing of it is missing.
func (t *tree) whole(f *folder) bool {
	if !t.r.good(f.list) {
		return false
	}
	for _, n := range f.nodes {
		if !n.gone.IsZero() || n.missing || !t.r.good(n.z) {
			return false
		}
	}
	return true
}

func (t *tree) checkPause() time.Duration { return registry.Jitter(t.z.interval * 4 / 5) }

// check reads the roots, to prove that what is known is fresh. The answer counts once all are there.
func (t *tree) check(now time.Time) {
	t.checkAt = now.Add(t.checkPause())
	if t.checks > 0 {
		return
	}
	for _, r := range t.roots {
		t.checks++
		if r.check != nil {
			t.r.soon(r.check)
			continue
		}
		r.check = t.begin(false, checked, r.path, func(a answer) {
			if a.err != nil {
				t.unproven = true
				if r.failing == nil {
					t.r.soon(r.list)
				}
			}
			if t.checks--; t.checks == 0 {
				t.due, t.unproven = t.due || !t.unproven, false
			}
		})
	}
}

// rootRead takes the folders of a root. However many are gone, the next listing tells, since it must be seen as one loss.
func (t *tree) rootRead(r *root, a answer) {
	if a.err != nil {
		r.failing = a.err
		t.sink.Fail(a.err)
		return
	}
	if r.failing != nil && r.read == t.r {
		t.r.ended = errRestored
		return
	}
	r.failing, r.read = nil, t.r
	if r.dubbo {
		t.interfaces(r, a.names)
		return
	}
	now := map[string]bool{}
	for _, name := range a.names {
		if r.skip[name] || len(name) > maxName { // no request may be that long
			continue
		}
		now[name] = true
		f := r.folders[name]
		if f == nil {
			f = &folder{id: rootService(r.path, name, nil).ID, root: r, name: name, nodes: map[string]*instanceNode{}}
			r.folders[name] = f
		}
		if f.list == nil || f.list.reader != t.r {
			f.list = t.begin(true, listed, r.path+"/"+name, func(a answer) { t.folderRead(f, a) })
		}
	}
	for name, f := range r.folders {
		if !now[name] {
			t.dropFolder(f)
			delete(r.folders, name)
			t.due = true
		}
	}
}

func (t *tree) dropFolder(f *folder) {
	t.r.drop(f.list)
	for _, n := range f.nodes {
		t.r.drop(n.z)
	}
	t.dropExports(f)
}

// believed reports whether what was seen to be gone stays so. It has z read again when the time has come.
func (t *tree) believed(z *znode, gone *time.Time) bool {
	now := time.Now()
	if gone.IsZero() {
		*gone = now
	}
	if now.Sub(*gone) >= t.z.settle {
		return true
	}
	t.r.at(z, gone.Add(t.z.settle))
	return false
}

// folderRead takes the names of a folder's nodes.
func (t *tree) folderRead(f *folder, a answer) {
	if a.err != nil {
		t.failFolder(f, a.err)
		return
	}
	now := map[string]bool{}
	for _, name := range a.names {
		if len(name) > maxName { // no request may be that long
			t.warn("a node of ZooKeeper cannot be used", f.list.path, fmt.Errorf("a name has %d bytes: delete the node", len(name)))
			continue
		}
		now[name] = true
		n := f.nodes[name]
		if n == nil {
			n = &instanceNode{}
			f.nodes[name] = n
		}
		n.gone = time.Time{}
		switch {
		case n.z == nil || n.z.reader != t.r:
			n.missing = false
			n.z = t.begin(true, watched, f.list.path+"/"+name, func(a answer) { t.instanceRead(f, n, a) })
		case n.missing:
			t.r.changed(n.z)
		}
	}
	for name, n := range f.nodes {
		if !now[name] && (!n.known || t.believed(f.list, &n.gone)) {
			t.r.drop(n.z)
			delete(f.nodes, name)
		}
	}
	t.putFolder(f)
}

// instanceRead takes the data of a folder's node.
func (t *tree) instanceRead(f *folder, n *instanceNode, a answer) {
	n.missing = a.missing
	switch {
	case a.err != nil:
	case a.missing: // its folder tells whether it is there again
		if n.gone.IsZero() {
			t.r.soon(f.list)
		}
	default:
		decoded, err := decodeNode(a.data)
		t.applications = t.applications || decoded.dubbo
		t.complain(n, "a node of ZooKeeper cannot be used", n.z.path, err)
		n.node, n.known = decoded, true
	}
	t.putFolder(f)
}

// complain logs what is wrong with a node, once.
func (t *tree) complain(n *instanceNode, message, path string, err error) {
	flaw := ""
	if err != nil {
		flaw = err.Error()
	}
	if flaw != "" && flaw != n.flaw {
		t.warn(message, path, err)
	}
	n.flaw = flaw
}

func (t *tree) warn(message, path string, err error) {
	t.z.env.Logger.Warn(message, slog.String("path", shortPath(path)), slog.Any("error", err))
}

// putFolder states a service in Curator's form, once all its nodes were read.
func (t *tree) putFolder(f *folder) {
	if !t.r.good(f.list) {
		return
	}
	var failed error
	for _, n := range f.nodes {
		if !n.gone.IsZero() {
			continue
		}
		if n.z.reader != t.r || !n.z.settled {
			return
		}
		failed = cmp.Or(failed, n.z.err)
	}
	if failed != nil {
		t.failFolder(f, failed)
		return
	}
	var nodes []node
	missing := false
	for _, name := range slices.Sorted(maps.Keys(f.nodes)) {
		if n := f.nodes[name]; n.known {
			nodes = append(nodes, n.node)
			missing = missing || n.missing || !n.gone.IsZero()
		}
	}
	s := rootService(f.root.path, f.name, nodes)
	if !missing || !f.told || !slices.Equal(s.Instances, f.last) { // else nothing is known that would be worth stating
		f.told, f.last = true, s.Instances
		t.sink.Put(s)
	}
	t.exports.changed(f, time.Time{})
}

func (t *tree) failFolder(f *folder, err error) {
	f.told = true
	t.sink.Fail(err, f.id)
}

// interfaces takes the folders of /dubbo.
func (t *tree) interfaces(r *root, names []string) {
	now := map[string]bool{}
	for _, name := range names {
		if r.skip[name] || len(name) > maxName {
			continue
		}
		decoded, err := url.QueryUnescape(name)
		if err != nil {
			decoded = name
		}
		i := t.iface(decoded)
		if now[decoded] || i.folder && i.spelling != name && slices.Contains(names, i.spelling) {
			t.twice(i, r.path, name)
			continue
		}
		now[decoded] = true
		if i.folder && i.spelling != name {
			t.r.drop(i.providers)
			t.r.drop(i.configurators)
			i.providers = nil
		}
		i.folder, i.spelling = true, name
		if i.providers == nil || i.providers.reader != t.r {
			path := r.path + "/" + name
			i.providers = t.begin(false, listed, path+"/providers", func(a answer) { t.providersRead(i, a) })
			i.configurators = t.begin(false, listed, path+"/configurators", func(a answer) { t.configuratorsRead(i, a) })
		}
	}
	for name, i := range t.ifaces {
		if i.folder && !now[name] {
			t.r.drop(i.providers)
			t.r.drop(i.configurators)
			for _, n := range i.nodes {
				t.cover(n, -1)
			}
			*i = iface{name: name, exported: i.exported}
			i.clear()
			t.dirty[i] = true
			t.due = true
		}
	}
}

// twice warns, once, of a folder whose name is another spelling of one that is read.
func (t *tree) twice(i *iface, root, name string) {
	if i.warned != name {
		i.warned = name
		t.warn("a folder of ZooKeeper is not read: its name is another spelling of one that is", root+"/"+name,
			fmt.Errorf("%s is read: delete the wrong one", root+"/"+i.spelling))
	}
}

// iface returns the interface of a name, a new one if need be.
func (t *tree) iface(name string) *iface {
	i := t.ifaces[name]
	if i == nil {
		i = &iface{name: name, exported: map[*folder][]exported{}}
		i.clear()
		t.ifaces[name] = i
	}
	return i
}

func (i *iface) clear() {
	i.nodes, i.rules, i.ids = map[string]*providerNode{}, map[string]*override{}, map[string]*known{}
}

// forget ends an interface of which nothing is left.
func (t *tree) forget(i *iface) {
	if !i.folder && len(i.exported) == 0 && len(i.ids) == 0 {
		delete(t.ifaces, i.name)
	}
}

// cover notes that one provider more, or less, has an endpoint at interface level.
func (t *tree) cover(n *providerNode, change int) {
	if n.bad {
		return
	}
	e := endpoint{n.application, n.instance.Address, n.instance.Port}
	before := t.covered[e]
	if t.covered[e] += change; t.covered[e] == 0 {
		delete(t.covered, e)
	}
	if before != 0 && t.covered[e] != 0 {
		return
	}
	for _, r := range t.roots {
		if f := r.folders[n.application]; f != nil {
			t.exports.changed(f, time.Time{})
		}
	}
}

// providersRead takes the names of an interface's providers. One that comes again under another name replaces the one
// before at once; one that goes is kept for a moment, since it may be about to come again.
func (t *tree) providersRead(i *iface, a answer) {
	if a.err != nil {
		t.failInterface(i, a.err)
		return
	}
	type replaced struct {
		key serviceKey
		at  place
	}
	now, there := map[string]bool{}, map[replaced]bool{}
	for _, name := range a.names {
		now[name] = true
		n := i.nodes[name]
		if n == nil {
			p, err := decodeProvider(i.name, name)
			n = &providerNode{provider: p, bad: err != nil}
			if err != nil {
				t.warn("a provider in ZooKeeper cannot be used", i.providers.path, err) // its name may hold a secret
			}
			i.nodes[name] = n
			t.cover(n, 1)
		}
		n.gone = time.Time{}
		if n.moving {
			n.moving = false
			t.cover(n, 1)
		}
		if !n.bad {
			there[replaced{n.key, placeOf(n.instance)}] = true
		}
	}
	for name, n := range i.nodes {
		if !now[name] && (n.bad || there[replaced{n.key, placeOf(n.instance)}] || t.believed(i.providers, &n.gone) && !t.moves(i, n)) {
			if !n.moving {
				t.cover(n, -1)
			}
			delete(i.nodes, name)
		}
	}
	t.dirty[i] = true
}

// moves reports whether a provider that is gone at interface level is still there at application level, and what it exports
// there is not known yet. That was not asked for while both were there.
func (t *tree) moves(i *iface, n *providerNode) bool {
	others := t.covered[endpoint{n.application, n.instance.Address, n.instance.Port}]
	if !n.moving {
		others--
	}
	if others > 0 || time.Since(n.gone) > t.z.move { // it still registers at interface level, but not this; or it has had its time
		return false
	}
	for _, r := range t.roots {
		f := r.folders[n.application]
		if f == nil || !f.offers(n.instance.Address, n.instance.Port) ||
			slices.ContainsFunc(i.exported[f], func(x exported) bool { return placeOf(x.instance) == placeOf(n.instance) }) {
			continue
		}
		if !n.moving {
			n.moving = true
			t.cover(n, -1)
		}
		t.r.at(i.providers, time.Now().Add(t.z.settle))
		return true
	}
	return false
}

// offers reports whether an instance at Dubbo's application level has this endpoint.
func (f *folder) offers(address string, port uint32) bool {
	for _, n := range f.nodes {
		if n.known && n.node.dubbo && !n.missing && n.gone.IsZero() && slices.ContainsFunc(n.node.instances, func(i registry.Instance) bool {
			return i.Address == address && i.Port == port
		}) {
			return true
		}
	}
	return false
}

// configuratorsRead takes the names of an interface's rules.
func (t *tree) configuratorsRead(i *iface, a answer) {
	if a.err != nil {
		t.failInterface(i, a.err)
		return
	}
	rules := make(map[string]*override, len(a.names))
	for _, name := range a.names {
		rule, known := i.rules[name]
		if !known {
			o, err := decodeOverride(i.name, name)
			if err != nil {
				t.warn("a configurator in ZooKeeper cannot be used", i.configurators.path, err)
			} else {
				rule = &o
			}
		}
		rules[name] = rule
	}
	i.rules = rules
	t.dirty[i] = true
}

func (t *tree) failInterface(i *iface, err error) {
	ids := slices.Sorted(maps.Keys(i.ids))
	if len(ids) == 0 {
		i.placeholder = true
		ids = []string{serviceKey{iface: i.name}.id()}
	}
	t.sink.Fail(err, ids...)
}

// state states the interfaces of which something changed.
func (t *tree) state() {
	for i := range t.dirty {
		delete(t.dirty, i)
		if !i.folder || t.r.good(i.providers) && t.r.good(i.configurators) { // else it comes again once they are read
			t.put(i)
		}
	}
}

// put states the services of an interface. One that was there before, and has no instance any more, is stated as such.
func (t *tree) put(i *iface) {
	var providers []provider
	missing := false
	for _, n := range i.nodes {
		if !n.bad {
			providers = append(providers, n.provider)
			missing = missing || !n.gone.IsZero()
		}
	}
	var overrides []override
	for _, o := range i.rules {
		if o != nil {
			overrides = append(overrides, *o)
		}
	}
	var all []exported
	for _, list := range i.exported {
		all = append(all, list...)
	}
	now := map[string]bool{}
	for _, s := range interfaceServices(i.name, providers, overrides, all) {
		now[s.ID] = true
		if k := i.ids[s.ID]; missing && k != nil && slices.Equal(s.Instances, k.last) {
			continue // what is missing may be among them, and was not seen again
		}
		i.ids[s.ID] = &known{host: s.Host, last: s.Instances}
		t.sink.Put(s)
	}
	for id, k := range i.ids {
		if now[id] {
			continue
		}
		if k.emptied.IsZero() {
			k.emptied, k.last = time.Now(), nil
		}
		t.sink.Put(registry.Service{ID: id, Host: k.host})
	}
	i.placeholder = false
	t.forget(i)
}
