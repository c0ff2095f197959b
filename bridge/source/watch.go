package source

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/fsnotify/fsnotify"
)

// timing is how patient the readers of files are.
type timing struct {
	// quiet is how long no file may have changed before they are read, so that one who writes can finish; latest is when
	// they are read although they still change.
	quiet, latest time.Duration
	// confirm is how long something must be missing from what is read, without any change, before that is believed; longest
	// is when what is new beside it is believed although there still are changes.
	confirm, longest time.Duration
	// retry is the pause after a failed read, and rescan the time after which all is read again in any case: not every
	// file system tells of changes.
	retry, rescan time.Duration
}

func defaultTiming() timing {
	return timing{
		quiet: 100 * time.Millisecond, latest: time.Second, confirm: time.Second, longest: 30 * time.Second,
		retry: time.Second, rescan: 30 * time.Second,
	}
}

// watch calls scan at once, again when something changed in one of the folders, and after the pause that scan returns,
// until ctx ends. The folders, whose number may change, are those that dirs returns before each scan. A folder that is not
// there is watched when it appears.
func watch(ctx context.Context, log *slog.Logger, t timing, dirs func() []string, scan func() time.Duration) {
	var events chan fsnotify.Event
	var failures chan error
	w, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("cannot watch folders: changes are seen only every now and then; is fs.inotify.max_user_instances used up?",
			"error", err, "every", t.rescan)
	} else {
		defer w.Close() //nolint:errcheck // nothing is written
		events, failures = w.Events, w.Errors
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	var since time.Time // the first change that is not read yet
	complained := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-events:
			if since.IsZero() {
				since = time.Now()
			}
			timer.Reset(min(t.quiet, time.Until(since.Add(t.latest))))
		case <-failures: //nolint:errcheck // any failure, such as too many events, means the same
			timer.Reset(t.quiet)
		case <-timer.C:
			since = time.Time{}
			if w != nil {
				rewatch(w, log, dirs(), complained)
			}
			timer.Reset(scan())
		}
	}
}

// rewatch makes w watch exactly the folders. One that is watched already may be another one by now, under the same name;
// adding it again sees to that.
func rewatch(w *fsnotify.Watcher, log *slog.Logger, dirs []string, complained map[string]bool) {
	for _, old := range w.WatchList() {
		if !slices.Contains(dirs, old) {
			_ = w.Remove(old) // it is gone, or will be
		}
	}
	for _, dir := range dirs {
		err := w.Add(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !complained[dir] {
			log.Warn("cannot watch a folder: changes in it are seen only every now and then", "folder", dir, "error", err)
		}
		complained[dir] = err != nil
	}
}

// watched returns the folders in which changes of a file or folder show: where it is, and where it is really, if it is or
// lies behind a symbolic link. ConfigMaps and Secrets are mounted so that links in the folder itself change.
func watched(path string) []string {
	var dirs []string
	add := func(path string) {
		if info, err := os.Stat(path); err != nil || !info.IsDir() {
			path = filepath.Dir(path)
		}
		if !slices.Contains(dirs, path) {
			dirs = append(dirs, path)
		}
	}
	path = filepath.Clean(path)
	add(path)
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSymlink != 0 {
		add(filepath.Dir(path))
		if target, err := filepath.EvalSymlinks(path); err == nil {
			add(target)
		}
	}
	return dirs
}
