package bridge

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

// fullSnapshot has something in every field that a snapshot keeps.
func fullSnapshot() (snapshotHeader, []serviceState) {
	set := labels.FromMap(map[string]string{"version": "v1", "": "ü\x00"})
	e := endpoint{address: "10.0.0.9", port: 80, implicit: true, weight: 0.25, locality: "r/z/s", labels: set}
	return snapshotHeader{
			Key: Key{"ns", "bridge", "test", "a"}, Source: "source", LastSync: at(1), GapStart: at(2), GapEnd: at(3), Services: 2,
		}, []serviceState{
			{
				facts: registry.Service{ID: "order", Host: "order.test", Port: 80, TLS: &registry.ClientTLS{SNI: "sni"}, Instances: []registry.Instance{
					{
						Address: "10.0.0.1", Port: 8080, Protocol: "grpc", Weight: 0.5, Unhealthy: true, Disabled: true, Reason: "check failed",
						Locality: registry.Locality{Region: "r", Zone: "z", SubZone: "s"}, Metadata: set,
					},
					{Address: "10.0.0.2", Weight: math.Inf(1), Metadata: set},
				}},
				known: true, restored: true, confirmed: at(4), gap: gap{at(5), at(6)}, had: remembered{80, mcp.GRPC},
				held: map[endpointKey]held{e.key(): {
					loss: loss{id: "order", endpoint: e, had: remembered{81, mcp.HTTP}, restored: true}, kind: HoldMass, since: at(7), until: at(8), readable: 3 * time.Second,
				}},
			},
			{
				facts:    registry.Service{ID: "pay", Host: "pay.test", Instances: []registry.Instance{}},
				restored: true, confirmed: at(9), had: remembered{90, mcp.TCP}, linger: at(10),
			},
		}
}

func encoded(t testing.TB, header snapshotHeader, services []serviceState) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := encodeSnapshot(&b, header, services); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestSnapshotKeepsEverything holds that what is written is read, and that nothing of a service's state was forgotten when
// a field was added.
func TestSnapshotKeepsEverything(t *testing.T) {
	header, services := fullSnapshot()
	gotHeader, got, err := decodeSnapshot(encoded(t, header, services))
	if err != nil {
		t.Fatal(err)
	}
	all := cmp.Exporter(func(reflect.Type) bool { return true })
	if diff := cmp.Diff(header, gotHeader, all); diff != "" {
		t.Error(diff)
	}
	want := map[string]*serviceState{}
	for i := range services {
		want[services[i].facts.ID] = &services[i]
	}
	if diff := cmp.Diff(want, got, all, cmp.Comparer(func(a, b labels.Set) bool { return a == b })); diff != "" {
		t.Error(diff)
	}

	made := []string{"live", "leftOut", "out"} // of the facts, again
	v := reflect.TypeFor[serviceState]()
	for i := range v.NumField() {
		name := v.Field(i).Name
		if name == "old" || slices.Contains(made, name) { // what is old is not written
			continue
		}
		if reflect.ValueOf(services[0]).Field(i).IsZero() && reflect.ValueOf(services[1]).Field(i).IsZero() {
			t.Errorf("the test says nothing of serviceState.%s", name)
		}
	}
}

func TestSnapshotDamage(t *testing.T) {
	header, services := fullSnapshot()
	good := encoded(t, header, services)
	for i := range good {
		if _, _, err := decodeSnapshot(good[:i]); err == nil {
			t.Fatalf("cut to %d of %d bytes it is still good", i, len(good))
		}
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		if _, _, err := decodeSnapshot(bad); err == nil {
			t.Fatalf("with byte %d flipped it is still good", i)
		}
	}
	for name, content := range map[string]string{
		"empty": "", "foreign": "PK\x03\x04 no snapshot", "newer": strings.Replace(string(good), "snapshot 1", "snapshot 2", 1),
		"more at its end": string(good) + "x",
	} {
		if _, _, err := decodeSnapshot([]byte(content)); err == nil {
			t.Errorf("%s: it is good", name)
		}
	}
}

func TestSnapshotOfAnother(t *testing.T) {
	s, err := openSnapshots(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	header, services := fullSnapshot()
	other := Key{"ns", "bridge", "test", "other"}
	if err := os.WriteFile(s.path(other), encoded(t, header, services), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.read(other); err == nil || !strings.Contains(err.Error(), header.Key.String()) {
		t.Errorf("another registry's snapshot: %v", err)
	}
	if _, _, err := s.read(header.Key); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no snapshot: %v", err)
	}
}

// TestSnapshotIsReplacedAtomically holds that a failed write leaves the old file, and nothing else.
func TestSnapshotIsReplacedAtomically(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.snapshot")
	write := func(text string, failure error) error {
		return writeAtomically(path, func(w io.Writer) error {
			_, err := io.WriteString(w, text)
			return errors.Join(err, failure)
		})
	}
	if err := write("one", nil); err != nil {
		t.Fatal(err)
	}
	full := errors.New("disk full")
	if err := write("half of tw", full); !errors.Is(err, full) {
		t.Errorf("a failed write: %v", err)
	}
	content, err := os.ReadFile(path)
	if err != nil || string(content) != "one" {
		t.Errorf("after a failed write: %q, %v", content, err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
	// What a crash left is cleared away at the next start.
	if err := os.WriteFile(filepath.Join(dir, snapshotTemp+"1"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openSnapshots(dir, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 1 {
		t.Errorf("left behind: %v", files)
	}
}

// FuzzDecodeSnapshot feeds streams with a good checksum: none may panic, or take memory beyond their size.
func FuzzDecodeSnapshot(f *testing.F) {
	header, services := fullSnapshot()
	good := encoded(f, header, services)
	head := bytes.IndexByte(good, '\n') + 1
	f.Add(good[head : len(good)-sha256.Size])
	header.Services = -1
	negative := encoded(f, header, services)
	f.Add(negative[head : len(negative)-sha256.Size])
	header.Services = math.MaxInt
	more := encoded(f, header, services)
	f.Add(more[head : len(more)-sha256.Size])
	f.Fuzz(func(t *testing.T, stream []byte) {
		content := append([]byte(snapshotMagic+"x\n"), stream...)
		sum := sha256.Sum256(content)
		header, services, err := decodeSnapshot(append(content, sum[:]...))
		if err != nil {
			return
		}
		r := newRegistryState(header.Key)
		r.policy = policyOf(registry.Entry{})
		restoreInto(r, header, services, at(0))
		r.tick(at(0).Add(time.Hour))
		if !r.alarm.IsZero() && !r.alarm.After(at(0).Add(time.Hour)) {
			t.Fatalf("after a tick the alarm is at %v", r.alarm)
		}
	})
}

// TestSnapshotFromTheFuture holds that a clock that was ahead when the snapshot was written holds nothing for a year.
func TestSnapshotFromTheFuture(t *testing.T) {
	header, services := fullSnapshot()
	_, got, err := decodeSnapshot(encoded(t, header, services))
	if err != nil {
		t.Fatal(err)
	}
	now := at(0).AddDate(-1, 0, 0)
	r := newRegistryState(header.Key)
	r.policy = policyOf(registry.Entry{})
	restoreInto(r, header, got, now)
	r.listing([]string{"order"}, now)
	now = now.Add(DefaultHold)
	r.tick(now)
	if n := len(r.services["order"].held); n != 0 {
		t.Errorf("%d endpoints are held after %v", n, DefaultHold)
	}
	if r.services["pay"] != nil {
		t.Errorf("a deleted service lingers for more than %v", Linger)
	}
	if _, covered := r.gap.covers(now, now.Add(time.Minute), time.Minute); covered {
		t.Error("the gap covers what was seen after it")
	}
}

// TestSnapshotThatIsAPipe holds that something strange in the snapshot's place cannot keep us from starting.
func TestSnapshotThatIsAPipe(t *testing.T) {
	s, err := openSnapshots(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	key := Key{"ns", "bridge", "test", "a"}
	if err := syscall.Mkfifo(s.path(key), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.read(key); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("reading a pipe: %v", err)
	}
}
