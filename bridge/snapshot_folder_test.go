package bridge

import (
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

// snapshotsOf returns the names of the entries that have a snapshot, among those of the configuration.
func snapshotsOf(w *world, entries []RegistryConfig) []string {
	w.t.Helper()
	names := map[string]string{}
	for _, rc := range entries {
		names[snapshotName(rc.Key)+snapshotSuffix] = rc.Key.Name
	}
	found := map[string]bool{}
	for _, file := range must(filepath.Glob(filepath.Join(w.stateDir, "*"))) {
		found[names[filepath.Base(file)]] = true
	}
	return slices.Sorted(maps.Keys(found))
}

// TestSnapshotsOutliveAConfigurationThatSaysNothing holds that snapshots are deleted, at a start, only by a configuration
// that was read completely and names a registry: an empty one may be a volume that is not mounted.
func TestSnapshotsOutliveAConfigurationThatSaysNothing(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			entry b
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			b put pay 10.0.0.2:80
			b synced pay
			stop
		`)
		all := w.config.Registries
		check := func(when string, want ...string) {
			t.Helper()
			if diff := cmp.Diff(want, snapshotsOf(w, all)); diff != "" {
				t.Errorf("snapshots %s (-want +got):\n%s", when, diff)
			}
		}
		check("after the first run", "a", "b")

		w.config.Registries = nil
		play(w, `
			start
			apply
			advance 1m
		`)
		check("with an empty configuration", "a", "b")

		w.config.Registries = all[:1]
		play(w, `
			unread
			apply
			advance 1m
		`)
		check("with a configuration that is not complete", "a", "b")

		play(w, `
			readable
			apply
		`)
		check("with a complete configuration", "a")
		play(w, "expect order.script 10.0.0.1:80")
	})
}

// TestSnapshotsComeBackAfterTheirFolderWasDeleted holds that whoever deletes the folder of a running regbridge makes it
// forget nothing that it still knows.
func TestSnapshotsComeBackAfterTheirFolderWasDeleted(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			advance 10s
		`)
		if got := snapshotsOf(w, w.config.Registries); len(got) != 1 {
			t.Fatalf("snapshots %v", got)
		}
		if err := os.RemoveAll(w.stateDir); err != nil {
			t.Fatal(err)
		}
		play(w, `
			a put order 10.0.0.1-2:80
			advance 10s
			restart
			expect order.script 10.0.0.1-2:80
			unlogged a restart would forget
		`)
	})
}

// TestSnapshotFolderOfAnother holds that two processes do not share a folder: each would delete what it does not know.
func TestSnapshotFolderOfAnother(t *testing.T) {
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	first, err := openSnapshots(dir, log)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		if _, err := openSnapshots(dir, log); err == nil || !strings.Contains(err.Error(), "another process") {
			t.Errorf("the folder of another process: %v", err)
		}
	})
	if err := first.lock.Close(); err != nil {
		t.Fatal(err)
	}
	second, err := openSnapshots(dir, log)
	if err != nil {
		t.Fatalf("the folder of a process that has ended: %v", err)
	}
	second.lock.Close()
}

// TestUnfinishedSnapshotThatStays holds that what cannot be deleted, in a folder that has become read-only, keeps nobody
// from starting.
func TestUnfinishedSnapshotThatStays(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, snapshotTemp+"1", "x"), 0o700); err != nil { // a folder that is not empty
		t.Fatal(err)
	}
	s, err := openSnapshots(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.lock.Close()
}

// TestDeletedSnapshotIsWrittenAgain deletes the snapshot of a registry that does not change any more.
func TestDeletedSnapshotIsWrittenAgain(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			advance 10s
		`)
		for _, wait := range []string{"advance 10s", "stop"} {
			if err := os.RemoveAll(w.stateDir); err != nil {
				t.Fatal(err)
			}
			play(w, wait)
			if files := must(filepath.Glob(w.stateDir + "/*.snapshot")); len(files) != 1 {
				t.Errorf("after %q there are the snapshots %q", wait, files)
			}
		}
	})
}

// TestSnapshotThatCannotBeRead holds that only what is damaged is set aside: another user, or another start, may be able to
// read the rest.
func TestSnapshotThatCannotBeRead(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		play(w, `
			entry a
			start
			apply
			a put order 10.0.0.1:80
			a synced order
			advance 10s
			stop
		`)
		files := must(filepath.Glob(w.stateDir + "/*.snapshot"))
		if len(files) != 1 {
			t.Fatalf("the snapshots are %q", files)
		}
		if err := os.Rename(files[0], files[0]+".away"); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(files[0], 0o700); err != nil {
			t.Fatal(err)
		}
		play(w, `
			start
			apply
			logged snapshot cannot be read
		`)
		if info, err := os.Stat(files[0]); err != nil || !info.IsDir() {
			t.Errorf("what could not be read is no longer there: %v, %v", info, err)
		}
	})
}
