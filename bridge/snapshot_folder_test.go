package bridge

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

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
