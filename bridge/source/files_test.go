package source

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/regbridge/regbridge/bridge"
)

// quick is a timing for tests. What is missing must be so for long enough that a test can look in between.
func quick() timing {
	return timing{
		quiet: 10 * time.Millisecond, latest: 100 * time.Millisecond, confirm: 300 * time.Millisecond, longest: time.Hour,
		retry: 20 * time.Millisecond, rescan: time.Hour,
	}
}

// doc is a McpBridge with consul registries of these names, given as name or name:port.
func doc(name string, registries ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: networking.higress.io/v1\nkind: McpBridge\nmetadata: {name: %s}\nspec:\n  registries:\n", name)
	if len(registries) == 0 {
		b.WriteString("    []\n")
	}
	for _, r := range registries {
		r, port, _ := strings.Cut(r, ":")
		fmt.Fprintf(&b, "  - {type: consul, name: %s, domain: h, port: %s}\n", r, port)
	}
	return b.String()
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A reader runs Files and remembers what was applied.
type reader struct {
	t       *testing.T
	mu      sync.Mutex
	last    bridge.Config
	applied int
	changed chan struct{}
}

func read(t *testing.T, o FilesOptions, tm timing) *reader {
	t.Helper()
	o.Logger = slog.New(slog.DiscardHandler)
	f := NewFiles(o)
	f.t = tm
	r := &reader{t: t, changed: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- f.Run(ctx, func(c bridge.Config) {
			r.mu.Lock()
			r.last = c
			r.applied++
			r.mu.Unlock()
			select {
			case r.changed <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

func (r *reader) config() (bridge.Config, int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last, r.applied
}

// names gives the registries as "bridge/name:port".
func names(c bridge.Config) string {
	var out []string
	for _, rc := range c.Registries {
		out = append(out, fmt.Sprintf("%s/%s:%d", rc.Key.Bridge, rc.Key.Name, rc.Entry.Port))
	}
	return strings.Join(out, " ")
}

// until waits until the configuration is as wanted: the registries, and a part of the error ("" means no error).
func (r *reader) until(registries, errText string) bridge.Config {
	r.t.Helper()
	return r.untilConfig(fmt.Sprintf("%q with error %q", registries, errText), func(c bridge.Config) bool {
		asWanted := c.Err == nil && errText == "" || c.Err != nil && errText != "" && strings.Contains(c.Err.Error(), errText)
		return names(c) == registries && asWanted
	})
}

func (r *reader) untilConfig(what string, ok func(bridge.Config) bool) bridge.Config {
	r.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		c, n := r.config()
		if n > 0 && ok(c) {
			return c
		}
		select {
		case <-r.changed:
		case <-deadline:
			r.t.Fatalf("want %s; have %q with error %v, read %v, problems %s", what, names(c), c.Err, c.Read, text(c.Problems))
		}
	}
}

func TestFilesReadsAFolder(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "b.yaml"), doc("b", "y:1", "x:2"))
	write(t, filepath.Join(dir, "a.yml"), doc("z", "z:3")+"---\n"+doc("a", "a:4"))
	write(t, filepath.Join(dir, ".hidden.yaml"), doc("h", "h:1"))
	write(t, filepath.Join(dir, "notes.txt"), "{")
	must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o700))
	write(t, filepath.Join(dir, "sub", "s.yaml"), doc("s", "s:1"))
	write(t, filepath.Join(dir, "c.json"), `{"apiVersion":"mcp.higress.io/v1alpha1","kind":"McpBridge",
		"metadata":{"name":"j"},"spec":{"registries":[{"type":"consul","name":"j","port":5}]}}`)
	r := read(t, FilesOptions{Path: dir}, quick())
	c := r.until("a/a:4 b/y:1 b/x:2 j/j:5 z/z:3", "")
	if !c.Read || len(c.Problems) != 0 {
		t.Errorf("Read = %v, problems: %s", c.Read, text(c.Problems))
	}
	if rc := c.Registries[0]; rc.Origin != filepath.Join(dir, "a.yml")+":8" || rc.Path != "spec.registries[0]" || rc.Fields["port"].Line != 13 {
		t.Errorf("origin %s, path %s, port %v", rc.Origin, rc.Path, rc.Fields["port"])
	}
}

func TestFilesFollowsChanges(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	for name, path := range map[string]string{"file": file, "folder": dir} {
		t.Run(name, func(t *testing.T) {
			write(t, file, doc("a", "x:1"))
			r := read(t, FilesOptions{Path: path}, quick())
			r.until("a/x:1", "")
			write(t, file, doc("a", "x:2", "y:1"))
			r.until("a/x:2 a/y:1", "")
			write(t, file+".new", doc("a", "x:3", "y:1")) // as editors do
			must(t, os.Rename(file+".new", file))
			r.until("a/x:3 a/y:1", "")
			write(t, file, doc("a", "x:3"))
			r.until("a/x:3", "")
		})
	}
}

// A file system that tells of no changes is read every now and then.
func TestFilesReadsAgainWithoutEvents(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	target := filepath.Join(elsewhere, "x.yaml")
	write(t, target, doc("a", "x:1"))
	must(t, os.Symlink(target, filepath.Join(dir, "a.yaml"))) // the folder with the target is not watched
	tm := quick()
	tm.rescan = 50 * time.Millisecond
	r := read(t, FilesOptions{Path: dir}, tm)
	r.until("a/x:1", "")
	write(t, target, doc("a", "x:2"))
	r.until("a/x:2", "")
}

func TestFilesFollowsConfigMaps(t *testing.T) {
	dir := t.TempDir()
	mount := func(version string, files map[string]string) {
		must(t, os.Mkdir(filepath.Join(dir, ".."+version), 0o700))
		for name, content := range files {
			write(t, filepath.Join(dir, ".."+version, name), content)
		}
		must(t, os.Symlink(".."+version, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		for name := range files {
			if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
				must(t, os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
			}
		}
	}
	mount("v1", map[string]string{"a.yaml": doc("a", "x:1"), "b.yaml": doc("b", "x:1")})
	folder := read(t, FilesOptions{Path: dir}, quick())
	single := read(t, FilesOptions{Path: filepath.Join(dir, "a.yaml")}, quick())
	folder.until("a/x:1 b/x:1", "")
	single.until("a/x:1", "")

	mount("v2", map[string]string{"a.yaml": doc("a", "x:2"), "b.yaml": doc("b", "x:2")})
	must(t, os.RemoveAll(filepath.Join(dir, "..v1")))
	folder.until("a/x:2 b/x:2", "")
	single.until("a/x:2", "")

	// A key is taken out: for a moment its link leads nowhere.
	mount("v3", map[string]string{"a.yaml": doc("a", "x:3")})
	folder.until("a/x:3 b/x:2", "b.yaml")
	must(t, os.Remove(filepath.Join(dir, "b.yaml")))
	folder.until("a/x:3", "")
	single.until("a/x:3", "")
}

func TestFilesWaitsForWhatIsMissing(t *testing.T) {
	for name, file := range map[string]string{"folder": "", "file": "a.yaml"} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "later")
			r := read(t, FilesOptions{Path: filepath.Join(dir, file)}, quick())
			if c := r.until("", "no such file"); c.Read {
				t.Error("a missing path counts as read")
			}
			must(t, os.Mkdir(dir, 0o700))
			write(t, filepath.Join(dir, "a.yaml"), doc("a", "x:1"))
			if c := r.until("a/x:1", ""); !c.Read {
				t.Error("not read")
			}
			// A folder or file that goes away later has not deleted anything.
			must(t, os.Rename(dir, dir+".old"))
			if c := r.until("a/x:1", "no such file"); !c.Read {
				t.Error("what was read once no longer counts as read")
			}
			must(t, os.Mkdir(dir, 0o700))
			if file == "" {
				r.until("a/x:1", "unmounted") // as the mount point of a volume
			}
			write(t, filepath.Join(dir, "a.yaml"), doc("a", "x:2"))
			r.until("a/x:2", "")
			write(t, filepath.Join(dir, "a.yaml"), doc("a", "x:3")) // it is the new folder that is watched
			r.until("a/x:3", "")
		})
	}
}

func TestFilesKeepsWhatCannotBeRead(t *testing.T) {
	unreadable := map[string]func(t *testing.T, path string){
		"a folder": func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) },
		"a dangling link": func(t *testing.T, path string) {
			must(t, os.Symlink(filepath.Join(t.TempDir(), "nothing"), path))
		},
		"invalid YAML": func(t *testing.T, path string) { write(t, path, doc("a", "x:9")+"  - {\n") },
		"an invalid object": func(t *testing.T, path string) {
			write(t, path, strings.ReplaceAll(doc("a", "x:9"), "registries:", "Registries:"))
		},
		"a wrong version": func(t *testing.T, path string) { write(t, path, strings.ReplaceAll(doc("a", "x:9"), "/v1", "/v2")) },
		"the beginning":   func(t *testing.T, path string) { write(t, path, "apiVersion: networking.higress.io/v1\n") },
		"a nameless entry": func(t *testing.T, path string) {
			write(t, path, strings.ReplaceAll(doc("a", "x:9"), "name: x", "naem: x"))
		},
		"another name for registries": func(t *testing.T, path string) {
			write(t, path, strings.ReplaceAll(doc("a", "x:9"), "registries:", "registry:"))
		},
		"cut off in registries": func(t *testing.T, path string) { write(t, path, upTo("registries:")) },
		"cut off in the spec":   func(t *testing.T, path string) { write(t, path, upTo("spec:")) },
		"cut off before it":     func(t *testing.T, path string) { write(t, path, upTo("metadata: {name: a}")) },
		"an empty spec":         func(t *testing.T, path string) { write(t, path, upTo("spec:")+" {}\n") },
		"an alias of null": func(t *testing.T, path string) {
			write(t, path, strings.ReplaceAll(upTo("registries:"), "name: a", "name: a, labels: &l")+" *l\n")
		},
	}
	for name, spoil := range unreadable {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			bad, good := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
			write(t, bad, doc("a", "x:1"))
			write(t, good, doc("b", "y:1"))
			f, now := NewFiles(FilesOptions{Path: dir}), time.Now()
			f.scan(now)
			must(t, os.Remove(bad))
			spoil(t, bad)
			write(t, good, doc("b", "y:2"))
			for range 3 {
				c, pause := f.scan(now)
				if got := names(c); got != "a/x:1 b/y:2" || !c.Read {
					t.Fatalf("%s, read %v, error %v", got, c.Read, c.Err)
				}
				// That one entry has no name is its own problem; the document is read.
				if (c.Err == nil) != (name == "a nameless entry") || c.Err != nil && !strings.Contains(c.Err.Error(), bad) {
					t.Errorf("error %v", c.Err)
				}
				if !strings.Contains(text(c.Problems), bad) {
					t.Errorf("problems do not name the file: %s", text(c.Problems))
				}
				now = now.Add(pause)
			}
			must(t, os.RemoveAll(bad))
			write(t, bad, doc("a", "x:3"))
			if c, _ := f.scan(now); names(c) != "a/x:3 b/y:2" || c.Err != nil {
				t.Errorf("not mended: %s, %v", names(c), c.Err)
			}
		})
	}
}

// What takes the place of the configuration, and is another kind of thing, has deleted nothing: a missing source of a mount
// becomes an empty folder.
func TestFilesKeepsWhatAnotherKindOfThingReplaced(t *testing.T) {
	file := func(t *testing.T, path string) { write(t, path, doc("a", "x:1")) }
	folder := func(t *testing.T, path string) {
		must(t, os.Mkdir(path, 0o700))
		write(t, filepath.Join(path, "a.yaml"), doc("a", "x:1"))
	}
	empty := func(t *testing.T, path string) { must(t, os.Mkdir(path, 0o700)) }
	for name, c := range map[string]struct{ before, after func(*testing.T, string) }{
		"a file by an empty folder": {file, empty},
		"a file by a folder": {file, func(t *testing.T, path string) {
			must(t, os.Mkdir(path, 0o700))
			write(t, filepath.Join(path, "b.yaml"), doc("b", "y:1"))
		}},
		"a file by a pipe":         {file, func(t *testing.T, path string) { must(t, syscall.Mkfifo(path, 0o600)) }},
		"a folder by a file":       {folder, func(t *testing.T, path string) { write(t, path, doc("b", "y:1")) }},
		"a folder by an empty one": {folder, func(t *testing.T, path string) { must(t, os.Rename(path+".empty", path)) }},
		"a folder by an empty file": {folder, func(t *testing.T, path string) {
			write(t, path, "")
		}},
		"a folder by a pipe": {folder, func(t *testing.T, path string) { must(t, syscall.Mkfifo(path, 0o600)) }},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bridges")
			empty(t, path+".empty") // at hand, so that its inode is no recycled one
			c.before(t, path)
			f, now := NewFiles(FilesOptions{Path: path}), time.Now()
			f.scan(now)
			if info, err := os.Stat(path); err == nil && !info.IsDir() { // which is no deletion, and no file to forget
				write(t, path, "")
				f.scan(now)
				write(t, path, doc("a", "x:1"))
			}
			must(t, os.Rename(path, path+".old"))
			c.after(t, path)
			for range 5 {
				got, pause := f.scan(now)
				if names(got) != "a/x:1" || !got.Read || got.Err == nil || !strings.Contains(got.Err.Error(), path) {
					t.Fatalf("%s, read %v, error %v", names(got), got.Read, got.Err)
				}
				now = now.Add(pause)
			}
			must(t, os.RemoveAll(path))
			must(t, os.Rename(path+".old", path))
			if got, _ := f.scan(now); names(got) != "a/x:1" || got.Err != nil {
				t.Errorf("not mended: %s, %v", names(got), got.Err)
			}
		})
	}
}

// What was never read may turn out to be a file or a folder.
func TestFilesWaitsForAnyKindOfThing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bridges")
	f := NewFiles(FilesOptions{Path: path})
	must(t, os.Mkdir(path, 0o700))
	f.scan(time.Now())
	must(t, os.Remove(path))
	write(t, path, "")
	f.scan(time.Now())
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o700))
	f.scan(time.Now())
	must(t, os.Remove(path))
	write(t, path, doc("a", "x:1"))
	if c, _ := f.scan(time.Now()); names(c) != "a/x:1" || !c.Read || c.Err != nil {
		t.Errorf("%s, read %v, error %v", names(c), c.Read, c.Err)
	}
}

// A file that is written slowly is not believed to lack what is not written yet.
func TestFilesWaitsUntilAFileIsWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.yaml")
	write(t, path, doc("a", "v:1", "w:1", "x:1", "y:1", "z:1"))
	f, now := NewFiles(FilesOptions{Path: path}), time.Now()
	f.scan(now)
	scan := func(want string, entries ...string) {
		t.Helper()
		write(t, path, doc("a", entries...))
		now = now.Add(400 * time.Millisecond)
		if c, _ := f.scan(now); names(c) != want {
			t.Fatalf("%q, want %q", names(c), want)
		}
	}
	const before = "a/v:1 a/w:1 a/x:1 a/y:1 a/z:1"
	written := []string{"v:2", "w:2", "x:2", "y:2"}
	for n := range 5 {
		scan(before, written[:n]...)
	}
	scan(before, written...) // 0.4 s later it is the same
	scan(before, written...)
	scan("a/v:2 a/w:2 a/x:2 a/y:2", written...)

	// One that never comes to rest has what is new in it believed.
	const held = "a/v:2 a/w:2 a/x:2 a/y:2"
	for n := range 75 {
		scan(held, fmt.Sprintf("new:%d", n))
	}
	scan("a/new:99 a/v:2 a/w:2 a/x:2 a/y:2", "new:99")
	scan("a/new:100 a/v:2 a/w:2 a/x:2 a/y:2", "new:100")
	for range 2 {
		scan("a/new:100 a/v:2 a/w:2 a/x:2 a/y:2", "new:100")
	}
	scan("a/new:100", "new:100")
}

// upTo is the beginning of a McpBridge, with this text as its end.
func upTo(end string) string {
	before, _, _ := strings.Cut(doc("a", "x:9"), end)
	return before + end
}

// What could not be read at the start may be in use, as may what a broken document says, or an entry of which it is not
// known which one it is.
func TestFilesIsNotReadWhileSomethingIsUnknown(t *testing.T) {
	for name, content := range map[string]string{
		"broken": "{", "a folder": "", "object": strings.ReplaceAll(doc("a", "x:1"), "name: a", "name: A"),
		"type":                        strings.ReplaceAll(doc("a", "x:1"), "type:", "typ:"),
		"name":                        strings.ReplaceAll(doc("a", "x:1"), "name: x", "name: ''"),
		"another name for registries": strings.ReplaceAll(doc("a", "x:1"), "registries:", "registry:"),
		"cut off in registries":       upTo("registries:"),
		"cut off in the spec":         upTo("spec:"),
		"cut off before the kind":     upTo("networking.higress.io/v1"),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			bad := filepath.Join(dir, "a.yaml")
			write(t, filepath.Join(dir, "b.yaml"), doc("b", "y:1"))
			if content == "" {
				must(t, os.Mkdir(bad, 0o700))
			} else {
				write(t, bad, content)
			}
			r := read(t, FilesOptions{Path: dir}, quick())
			if c := r.until("b/y:1", "a.yaml"); c.Read {
				t.Error("counts as read")
			}
			must(t, os.RemoveAll(bad))
			if c := r.until("b/y:1", ""); !c.Read {
				t.Error("does not count as read")
			}
		})
	}
}

// At the start nothing was good before, and a file that is the whole configuration has no folder to be deleted from.
func TestFilesTellsOnlyWhatIsSo(t *testing.T) {
	dir := t.TempDir()
	path, rules := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "rules.yaml")
	f := NewFiles(FilesOptions{Path: path, DefaultsFile: rules})
	complaint := func(content string) string {
		t.Helper()
		write(t, path, content)
		c, _ := f.scan(time.Now())
		if c.Err == nil || !strings.Contains(c.Err.Error(), path) {
			t.Fatalf("error %v", c.Err)
		}
		return c.Err.Error()
	}
	for _, content := range []string{"", "{", doc("a") + "  - {type: consul}\n"} {
		if got := complaint(content); strings.Contains(got, "stays") || strings.Contains(got, "delete the file") {
			t.Errorf("%q: %s", content, got)
		}
	}
	if got := complaint(""); !strings.Contains(got, "no McpBridge in it") || !strings.Contains(got, "registries: []") {
		t.Error(got)
	}
	write(t, rules, "defaults: []\n")
	write(t, path, doc("a", "x:1"))
	f.scan(time.Now())
	must(t, os.Remove(rules))
	for _, content := range []string{"", "{"} {
		if got := complaint(content); strings.Count(got, "stays") != 2 || strings.Contains(got, "delete the file") {
			t.Errorf("%q: %s", content, got)
		}
	}
}

// At the start, a place without any McpBridge is one that is not filled yet.
func TestFilesWaitsForAFirstMcpBridge(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "other objects": "apiVersion: v1\nkind: Secret\n", "a comment": "# later\n", "no objects": "resources: [a.yaml]\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if content != "" {
				write(t, filepath.Join(dir, "other.yaml"), content)
			}
			f, now := NewFiles(FilesOptions{Path: dir}), time.Now()
			for range 3 {
				c, pause := f.scan(now)
				if c.Read || c.Err == nil || !strings.Contains(c.Err.Error(), dir+": there is no McpBridge in it") {
					t.Fatalf("read %v, error %v", c.Read, c.Err)
				}
				if pause > f.t.retry { // a mount over the folder is no change of it
					t.Errorf("the folder is read again after %v only", pause)
				}
				now = now.Add(pause)
			}
			write(t, filepath.Join(dir, "a.yaml"), doc("a"))
			if c, _ := f.scan(now); !c.Read || c.Err != nil {
				t.Errorf("with a McpBridge that has no registries: read %v, error %v", c.Read, c.Err)
			}
		})
	}
}

// A file is emptied before it is written, and two steps make a renaming.
func TestFilesDoesNotBelieveAMoment(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.yaml"), filepath.Join(dir, "b.yaml")
	write(t, a, doc("a", "x:1"))
	write(t, b, doc("b", "y:1"))
	tm := quick()
	tm.confirm = time.Hour
	r := read(t, FilesOptions{Path: dir}, tm)
	r.until("a/x:1 b/y:1", "")
	for i, partial := range []string{"", "# nothing\n", doc("a")} {
		write(t, a, partial)
		write(t, b, doc("b", fmt.Sprintf("y:%d", i+2))) // proves that a.yaml was read too
		complaint := ""
		if i < 2 {
			complaint = "no McpBridge"
		}
		r.until(fmt.Sprintf("a/x:1 b/y:%d", i+2), complaint)
	}
	must(t, os.Remove(a))
	write(t, b, doc("b", "y:7"))
	r.until("a/x:1 b/y:7", "")
	write(t, filepath.Join(dir, "c.yaml"), doc("a", "x:2"))
	r.until("a/x:2 b/y:7", "") // it moved, which needs no second look

	late := read(t, FilesOptions{Path: dir}, tm)
	late.until("a/x:2 b/y:7", "")
	write(t, a, "")
	fresh := read(t, FilesOptions{Path: a}, tm)
	if c := fresh.until("", "no McpBridge"); c.Read {
		t.Error("an empty file counts as read")
	}
}

func TestFilesBelievesDeletions(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c", "d"} {
		write(t, filepath.Join(dir, name+".yaml"), doc(name, "x:1", "y:1"))
	}
	r := read(t, FilesOptions{Path: dir}, quick())
	r.until("a/x:1 a/y:1 b/x:1 b/y:1 c/x:1 c/y:1 d/x:1 d/y:1", "")
	must(t, os.Remove(filepath.Join(dir, "a.yaml")))
	write(t, filepath.Join(dir, "b.yaml"), "")
	write(t, filepath.Join(dir, "c.yaml"), doc("c", "y:1"))
	r.until("b/x:1 b/y:1 c/y:1 d/x:1 d/y:1", "b.yaml: there is no McpBridge in it") // nobody removes registries that way
	write(t, filepath.Join(dir, "b.yaml"), doc("b"))
	r.until("c/y:1 d/x:1 d/y:1", "")
	must(t, os.Remove(filepath.Join(dir, "c.yaml")))
	must(t, os.Remove(filepath.Join(dir, "b.yaml")))
	must(t, os.Remove(filepath.Join(dir, "d.yaml")))
	if c := r.until("", ""); !c.Read {
		t.Error("an empty folder does not count as read")
	}
}

func TestFilesAppliesOnlyChanges(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	write(t, file, doc("a", "x:1")+"  - {type: consul, name: y, port: x}\n  extra: 1\n")
	write(t, filepath.Join(dir, "b.yaml"), "{")
	must(t, os.Mkdir(filepath.Join(dir, "c.yaml"), 0o700))
	tm := quick()
	tm.rescan, tm.retry = time.Millisecond, time.Millisecond
	r := read(t, FilesOptions{Path: dir}, tm)
	r.until("a/x:1 a/y:0", "b.yaml")
	for i := range 100 { // each of which may be seen, as may the file before it is written again
		write(t, filepath.Join(dir, "notes.txt"), fmt.Sprint(i))
		write(t, file+".new", doc("a", "x:1")+"  - {type: consul, name: y, port: x}\n  extra: 1\n")
		must(t, os.Rename(file+".new", file))
	}
	write(t, file+".new", doc("a", "x:2")+"  - {type: consul, name: y, port: x}\n  extra: 1\n")
	must(t, os.Rename(file+".new", file))
	r.until("a/x:2 a/y:0", "b.yaml")
	if _, n := r.config(); n > 2 {
		t.Errorf("applied %d times", n)
	}
}

const consulRules = `
defaults:
- match: {namespace: default, bridge: a, type: consul, name: x}
  set: {refreshInterval: 15s, port: 99, tls: {caFile: /a}}
- match: {type: "*", name: ""}
  set:
    tls: {caFile: /b}
    dnsServers: [1.2.3.4]
`

func TestFilesAppliesDefaults(t *testing.T) {
	dir := t.TempDir()
	rules := filepath.Join(dir, "defaults.yaml") // in the same folder, where it is no McpBridge
	write(t, filepath.Join(dir, "a.yaml"), doc("a", "x:1")+"  - {type: consul, name: own, port: 2, consulRefreshInterval: 20, tls: {}}\n")
	r := read(t, FilesOptions{Path: dir, DefaultsFile: rules}, quick())
	if c := r.until("", "defaults.yaml"); c.Read {
		t.Error("counts as read without the defaults")
	}
	write(t, rules, consulRules)
	c := r.until("a/x:1 a/own:2", "")
	x, own := c.Registries[0], c.Registries[1]
	if !c.Read || len(c.Problems) > 0 || x.Entry.RefreshInterval.Or(0) != 15*time.Second || x.Entry.Port != 1 || x.Entry.TLS.CAFile != "/a" ||
		len(x.Entry.DNSServers) != 1 || own.Entry.RefreshInterval != 0 || own.Entry.TLS.CAFile != "" {
		t.Errorf("%+v %+v %s", x.Entry, own.Entry, text(c.Problems))
	}
	if at := x.Fields["tls.caFile"]; at.File != rules || at.Line != 4 {
		t.Errorf("tls.caFile is at %v", at)
	}
	if at := x.Fields["port"]; at.File == rules {
		t.Errorf("port is at %v", at)
	}

	write(t, rules, strings.ReplaceAll(consulRules, "refreshInterval: 15s", "refreshinterval: 15s"))
	c = r.until("a/x:1 a/own:2", "refreshInterval")
	if c.Registries[0].Entry.RefreshInterval == 0 {
		t.Error("a broken defaults file is not the last good one")
	}
	must(t, os.Remove(rules))
	r.until("a/x:1 a/own:2", "no such file")
	write(t, rules, "defaults:\n- match: {name: nobody}\n  set: {port: 1}\n- set: {refreshInterval: 20s, consulDatacenter: dc1}\n")
	c = r.until("a/x:1 a/own:2", "")
	if got := text(c.Problems); !strings.Contains(got, "defaults.yaml:2: defaults[0]: no registry matches") {
		t.Error(got)
	}
	if c.Registries[0].Entry.RefreshInterval.Or(0) != 20*time.Second {
		t.Error("the new defaults are not used")
	}
	write(t, rules, "defaults:\n- set: {refreshInterval: 1ns}\n") // no registry may be hurt
	r.untilConfig("the shortest interval and a warning", func(c bridge.Config) bool {
		return c.Registries[0].Entry.RefreshInterval.Or(0) == time.Second &&
			strings.Contains(text(c.Problems), "warning: "+rules+":2: spec.registries[0].refreshInterval: ")
	})
}

func TestDefaultsAreStrict(t *testing.T) {
	for content, want := range map[string]string{
		"":                                 "the file is empty",
		"{":                                "no valid YAML",
		"defaults: []\n---\ndefaults: []":  "f:3: a second document",
		"default: []":                      `write "defaults"`,
		"defaults: {}":                     "f:1: defaults: want a list",
		"defaults:\n- match: {}":           "f:2: defaults[0].set: the rule sets nothing",
		"defaults:\n- set: {name: x}":      "f:2: defaults[0].set.name: an entry's name has no default",
		"defaults:\n- set: {port: x}":      "f:2: defaults[0].set.port: want a port",
		"defaults:\n- set: {tsl: {}}":      `f:2: defaults[0].set.tsl: there is no field "tsl" here, and it has no effect: write "tls"`,
		"defaults:\n- match: {name: a*}\n": "only * alone",
	} {
		_, problems := parseRules("f", []byte(content))
		if got := text(problems); !strings.Contains(got, want) || strings.Contains(got, "warning") {
			t.Errorf("%q: %s", content, got)
		}
	}
	if rules, problems := parseRules("f", []byte("# none\ndefaults: []\n")); len(rules) > 0 || len(problems) > 0 {
		t.Error(rules, text(problems))
	}
}
