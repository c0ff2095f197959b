package bridge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/regularfile"
)

// snapshots keeps what each registry said in a folder, so that our restart forgets nothing. One file holds one registry:
// a line that names the format and the registry, a gob stream (a header, then one record per service), and the SHA-256
// of all that. Files are replaced atomically. They hold facts, never credentials.
type snapshots struct {
	dir  string
	lock *os.File // the folder; closing it lets another process have it

	mu    sync.Mutex     // held while files change
	saved map[Key]uint64 // registryState.version that the file holds
	cost  time.Duration  // of the last round; of the loop alone
}

const (
	snapshotMagic  = "regbridge-snapshot 1 "
	snapshotSuffix = ".snapshot"
	snapshotTemp   = ".unfinished-"
	maxSnapshot    = 8 << 30 // bytes
	lockTimeout    = 5 * time.Second
	// snapshotPeriod is the shortest time between two rounds of writing; a round that takes long makes it longer, so
	// that writing takes at most a twentieth of the time.
	snapshotPeriod = 5 * time.Second
)

// snapshotHeader begins a snapshot.
type snapshotHeader struct {
	Key      Key
	Source   string // Fingerprint.Source of the entry
	LastSync time.Time
	GapStart time.Time
	GapEnd   time.Time
	Services int
}

// snapshotRecord is one service of a snapshot.
type snapshotRecord struct {
	NewLabels []map[string]string // label sets that no record before had; Instances refer to them by number, from 1
	ID, Host  string
	Port      uint32
	TLS       bool
	SNI       string
	Known     bool
	Confirmed time.Time
	GapStart  time.Time
	GapEnd    time.Time
	HadPort   uint32
	HadProto  string
	Linger    time.Time
	Instances []snapshotInstance
	Held      []snapshotHeld
}

type snapshotInstance struct {
	Address, Protocol, Reason string
	Region, Zone, SubZone     string
	Port                      uint32
	Weight                    float64
	Unhealthy, Disabled       bool
	Labels                    int
}

type snapshotHeld struct {
	Address, Protocol, Locality string
	Port, HadPort               uint32
	Implicit                    bool // the service's port
	Weight                      float64
	Labels                      int
	Restored                    bool
	Kind                        string
	Since, Until                time.Time
	Readable                    time.Duration
}

// openSnapshots makes the folder, and takes it for this process: two that write into one would delete each other's files.
func openSnapshots(dir string, log *slog.Logger) (*snapshots, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of the snapshots: %w", err)
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the folder of the snapshots: %w", err)
	}
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(100 * time.Millisecond) { // a predecessor may be about to end
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil || !errors.Is(err, syscall.EWOULDBLOCK) { // not every file system has locks
			break
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(errors.New("another process of regbridge uses the folder: give each its own"), lock.Close())
		}
	}
	unfinished, err := filepath.Glob(filepath.Join(dir, snapshotTemp+"*"))
	if err != nil {
		return nil, fmt.Errorf("look for unfinished snapshots: %w", errors.Join(err, lock.Close()))
	}
	for _, file := range unfinished { // of a process that crashed
		if err := os.Remove(file); err != nil {
			log.Warn("an unfinished snapshot cannot be deleted", "error", err)
		}
	}
	return &snapshots{dir: dir, lock: lock, saved: map[Key]uint64{}}, nil
}

func snapshotName(key Key) string {
	sum := sha256.Sum256([]byte(key.String()))
	return hex.EncodeToString(sum[:12])
}

func (s *snapshots) path(key Key) string {
	return filepath.Join(s.dir, snapshotName(key)+snapshotSuffix)
}

// write stores what the state holds, if that changed since the file was written, or somebody deleted the file.
func (s *snapshots) write(r *registryState) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.mu.Lock()
	_, missing := os.Stat(s.path(r.key))
	if !r.storable() || missing == nil && r.version == s.saved[r.key] {
		r.mu.Unlock()
		return nil
	}
	version := r.version
	header, services := r.snapshot()
	r.mu.Unlock()
	if err := writeAtomically(s.path(r.key), func(w io.Writer) error { return encodeSnapshot(w, header, services) }); err != nil {
		return fmt.Errorf("write the snapshot of registry %s: %w", r.key, err)
	}
	s.saved[r.key] = version
	return nil
}

// storable reports whether the state is one to restore: what was never read completely is not. Nor is what a new source
// is about to replace: until then the file keeps the old source's.
func (r *registryState) storable() bool { return (r.loaded || r.restored) && !r.replaced && !r.removed }

// snapshot returns what a snapshot keeps, by id. It stays valid when the state changes.
func (r *registryState) snapshot() (snapshotHeader, []serviceState) {
	services := make([]serviceState, 0, len(r.services))
	for _, id := range slices.Sorted(maps.Keys(r.services)) {
		st := *r.services[id] // facts are values; only what is held has to be copied
		st.held = maps.Clone(st.held)
		if !st.old {
			services = append(services, st)
		}
	}
	return snapshotHeader{
		Key: r.key, Source: r.source, LastSync: r.lastSync, GapStart: r.gap.start, GapEnd: r.gap.end, Services: len(services),
	}, services
}

func writeAtomically(path string, content func(io.Writer) error) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil { // somebody may have deleted it
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), snapshotTemp+"*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if err = content(f); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return f.Close()
}

func encodeSnapshot(w io.Writer, header snapshotHeader, services []serviceState) error {
	sum := sha256.New()
	buffered := bufio.NewWriterSize(w, 1<<16)
	out := io.MultiWriter(buffered, sum)
	if _, err := io.WriteString(out, snapshotMagic+header.Key.String()+"\n"); err != nil {
		return err
	}
	enc := gob.NewEncoder(out)
	if err := enc.Encode(header); err != nil {
		return err
	}
	table := map[labels.Set]int{{}: 0}
	for i := range services {
		if err := enc.Encode(recordOf(&services[i], table)); err != nil {
			return err
		}
	}
	if _, err := buffered.Write(sum.Sum(nil)); err != nil {
		return err
	}
	return buffered.Flush()
}

func recordOf(s *serviceState, table map[labels.Set]int) *snapshotRecord {
	rec := &snapshotRecord{
		ID: s.facts.ID, Host: s.facts.Host, Port: s.facts.Port, Known: s.known, Confirmed: s.confirmed,
		GapStart: s.gap.start, GapEnd: s.gap.end, HadPort: s.had.port, HadProto: string(s.had.protocol), Linger: s.linger,
	}
	if s.facts.TLS != nil {
		rec.TLS, rec.SNI = true, s.facts.TLS.SNI
	}
	number := func(set labels.Set) int {
		n, ok := table[set]
		if !ok {
			n = len(table)
			table[set] = n
			rec.NewLabels = append(rec.NewLabels, set.Map())
		}
		return n
	}
	rec.Instances = make([]snapshotInstance, len(s.facts.Instances))
	for i, f := range s.facts.Instances {
		rec.Instances[i] = snapshotInstance{
			Address: f.Address, Protocol: f.Protocol, Reason: f.Reason, Region: f.Locality.Region, Zone: f.Locality.Zone,
			SubZone: f.Locality.SubZone, Port: f.Port, Weight: f.Weight, Unhealthy: f.Unhealthy, Disabled: f.Disabled,
			Labels: number(f.Metadata),
		}
	}
	for _, h := range s.held {
		rec.Held = append(rec.Held, snapshotHeld{
			Address: h.address, Protocol: string(h.had.protocol), Locality: h.locality, Port: h.port, HadPort: h.had.port,
			Implicit: h.implicit, Weight: h.weight, Labels: number(h.labels), Restored: h.restored, Kind: string(h.kind),
			Since: h.since, Until: h.until, Readable: h.readable,
		})
	}
	slices.SortFunc(rec.Held, func(a, b snapshotHeld) int {
		return endpoint{address: a.Address, port: a.Port}.compare(endpoint{address: b.Address, port: b.Port})
	})
	return rec
}

// errDamaged is wrapped by errors about what is in a snapshot, not about reading it.
var errDamaged = errors.New("it is damaged")

// read loads the snapshot of a registry. Without one it returns an error that wraps os.ErrNotExist.
func (s *snapshots) read(key Key) (snapshotHeader, map[string]*serviceState, error) {
	content, err := regularfile.Read(s.path(key), maxSnapshot)
	if err != nil {
		return snapshotHeader{}, nil, err
	}
	header, services, err := decodeSnapshot(content)
	if err == nil && header.Key != key {
		err = fmt.Errorf("it belongs to registry %s", header.Key)
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return header, services, err
}

func decodeSnapshot(content []byte) (snapshotHeader, map[string]*serviceState, error) {
	var header snapshotHeader
	body, ok := bytes.CutPrefix(content, []byte(snapshotMagic))
	end := len(body) - sha256.Size
	if !ok || end < 0 {
		return header, nil, errors.New("it is no snapshot of this version of regbridge")
	}
	if sum := sha256.Sum256(content[:len(content)-sha256.Size]); !bytes.Equal(sum[:], body[end:]) {
		return header, nil, errors.New("its checksum is wrong")
	}
	_, stream, _ := bytes.Cut(body[:end], []byte("\n"))
	dec := gob.NewDecoder(bytes.NewReader(stream))
	if err := dec.Decode(&header); err != nil {
		return header, nil, fmt.Errorf("decode its header: %w", err)
	}
	table := []labels.Set{{}}
	services := make(map[string]*serviceState, max(0, min(header.Services, len(stream)/16))) // a corrupt number costs nothing
	for range header.Services {
		var rec snapshotRecord
		if err := dec.Decode(&rec); err != nil {
			return header, nil, fmt.Errorf("decode a service: %w", err)
		}
		for _, m := range rec.NewLabels {
			table = append(table, labels.FromMap(m))
		}
		st, err := rec.state(table)
		if err != nil {
			return header, nil, err
		}
		services[rec.ID] = st
	}
	return header, services, nil
}

func (rec *snapshotRecord) state(table []labels.Set) (*serviceState, error) {
	set := func(n int) (labels.Set, error) {
		if n < 0 || n >= len(table) {
			return labels.Set{}, fmt.Errorf("service %s refers to label set %d of %d", rec.ID, n, len(table))
		}
		return table[n], nil
	}
	st := &serviceState{
		facts: registry.Service{ID: rec.ID, Host: rec.Host, Port: rec.Port, Instances: make([]registry.Instance, len(rec.Instances))},
		known: rec.Known, restored: true, confirmed: rec.Confirmed, gap: gap{start: rec.GapStart, end: rec.GapEnd}, linger: rec.Linger,
		had: remembered{rec.HadPort, mcp.Protocol(rec.HadProto)},
	}
	if rec.TLS {
		st.facts.TLS = &registry.ClientTLS{SNI: rec.SNI}
	}
	for i, f := range rec.Instances {
		metadata, err := set(f.Labels)
		if err != nil {
			return nil, err
		}
		st.facts.Instances[i] = registry.Instance{
			Address: f.Address, Port: f.Port, Protocol: f.Protocol, Weight: f.Weight, Unhealthy: f.Unhealthy, Disabled: f.Disabled,
			Reason: f.Reason, Locality: registry.Locality{Region: f.Region, Zone: f.Zone, SubZone: f.SubZone}, Metadata: metadata,
		}
	}
	for _, h := range rec.Held {
		metadata, err := set(h.Labels)
		if err != nil {
			return nil, err
		}
		e := endpoint{
			address: h.Address, port: h.Port, implicit: h.Implicit, weight: h.Weight, locality: h.Locality, labels: metadata,
		}
		if st.held == nil {
			st.held = map[endpointKey]held{}
		}
		st.held[e.key()] = held{
			loss: loss{id: rec.ID, endpoint: e, had: remembered{h.HadPort, mcp.Protocol(h.Protocol)}, restored: h.Restored},
			kind: HoldKind(h.Kind), since: h.Since, until: h.Until, readable: h.Readable,
		}
	}
	return st, nil
}

// restoreInto gives a new state what a snapshot holds. The entry may have been edited since: services of another source
// stay until the new one is loaded.
func restoreInto(r *registryState, header snapshotHeader, services map[string]*serviceState, now time.Time) {
	r.restored, r.source, r.lastSync = true, header.Source, header.LastSync
	r.gap = gap{start: header.GapStart, end: header.GapEnd}
	r.services = services
	r.notLaterThan(now)
	for id, s := range services {
		for k := range s.held {
			r.heldBy[k] = append(r.heldBy[k], id)
		}
		if s.known {
			r.assembleService(s)
		}
		r.settleOut(id, s, now)
	}
	if len(r.holding) > 0 {
		r.findHomes()
	}
	r.setAlarm()
}

// notLaterThan corrects times that a clock which was ahead when the snapshot was written has put into the future: nothing
// is held, or lingers, for longer than from now.
func (r *registryState) notLaterThan(now time.Time) {
	limit := func(t *time.Time, latest time.Time) {
		if t.After(latest) {
			*t = latest
		}
	}
	limit(&r.lastSync, now)
	limit(&r.gap.start, now)
	limit(&r.gap.end, now)
	longest := now.Add(max(r.policy.guard.settle, r.policy.guard.hold))
	for _, s := range r.services {
		limit(&s.confirmed, now)
		limit(&s.gap.start, now)
		limit(&s.gap.end, now)
		limit(&s.linger, now.Add(Linger))
		for k, h := range s.held {
			limit(&h.since, now)
			limit(&h.until, longest)
			s.held[k] = h
		}
	}
}

// restore loads the registry's snapshot, if there is one that can be read.
func (b *Bridge) restore(r *registryState, rc RegistryConfig) {
	if b.snapshots == nil {
		return
	}
	header, services, err := b.snapshots.read(rc.Key)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	path := b.snapshots.path(rc.Key)
	if err != nil && !errors.Is(err, errDamaged) {
		b.opts.Logger.Error("snapshot cannot be read: what it knows is not served", "registry", rc.Key.String(), "error", err)
		return
	}
	if err != nil {
		aside := path + ".damaged"
		b.opts.Logger.Error("snapshot cannot be used; it is set aside", "registry", rc.Key.String(), "file", aside, "error", err)
		if err := os.Rename(path, aside); err != nil {
			b.opts.Logger.Error("set a damaged snapshot aside", "error", err)
		}
		return
	}
	b.store.update(r, func(now time.Time) {
		r.policy = policyOf(rc.Entry)
		restoreInto(r, header, services, now)
	})
	b.snapshots.mu.Lock()
	b.snapshots.saved[r.key] = r.version // nobody else has the state yet
	b.snapshots.mu.Unlock()
	b.opts.Logger.Info("registry's services restored from a snapshot", "registry", rc.Key.String(), "services", len(services),
		"age", time.Since(header.LastSync).Round(time.Second))
}

// snapshotLoop writes what changed, now and then.
func (b *Bridge) snapshotLoop(ctx context.Context) error {
	for registry.Sleep(ctx, max(snapshotPeriod, 19*b.snapshots.cost)) == nil {
		if err := b.saveSnapshots(); err != nil {
			b.opts.Logger.Error("a restart would forget the newest state", "error", err)
		}
	}
	return nil
}

func (b *Bridge) saveSnapshots() error {
	began := time.Now()
	var errs []error
	for _, r := range b.store.all() {
		errs = append(errs, b.snapshots.write(r))
	}
	b.snapshots.cost = time.Since(began)
	return errors.Join(errs...)
}

// forgetSnapshot deletes the snapshot of an entry that was removed.
func (b *Bridge) forgetSnapshot(key Key) {
	if b.snapshots == nil {
		return
	}
	b.snapshots.mu.Lock()
	defer b.snapshots.mu.Unlock()
	delete(b.snapshots.saved, key)
	if err := os.Remove(b.snapshots.path(key)); err != nil && !errors.Is(err, os.ErrNotExist) {
		b.opts.Logger.Error("delete the snapshot of a removed registry", "registry", key.String(), "error", err)
	}
}

// sweepSnapshots deletes, once, snapshots of entries that were removed while we did not run.
func (b *Bridge) sweepSnapshots() {
	if b.snapshots == nil || b.swept {
		return
	}
	b.swept = true
	ours := map[string]bool{}
	for key := range b.runners {
		ours[b.snapshots.path(key)] = true
	}
	files, err := filepath.Glob(filepath.Join(b.snapshots.dir, "*"+snapshotSuffix))
	if err != nil {
		return // the pattern is constant and valid
	}
	for _, file := range files {
		if !ours[file] {
			b.opts.Logger.Info("snapshot of a registry that is no longer configured is deleted", "file", file)
			if err := os.Remove(file); err != nil {
				b.opts.Logger.Error("delete a snapshot", "error", err)
			}
		}
	}
}
