package source

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/regularfile"
)

// FilesOptions are the settings of Files.
type FilesOptions struct {
	// Path is a file, or a folder whose files *.yaml, *.yml and *.json are read, without hidden ones and sub-folders.
	Path string
	// DefaultsFile is a file with settings for entries that do not have them (see rule); empty means none.
	DefaultsFile string
	// Logger gets what keeps changes from being noticed. All else is in the Config.
	Logger *slog.Logger
}

// Files is the bridge.Source that reads McpBridges from a file or a folder. Changes are noticed at once; the symbolic links
// of mounted ConfigMaps too.
//
// Only what is read is believed. What cannot be read (the path, one file in the folder, one document because of its syntax,
// its metadata, or since it has no list of registries; one entry without type and name) stays as it last was; Config.Err
// tells of it. As long as anything has never been read, Config.Read is false: what an unknown document or entry would say
// may be in use already. So it is as long as no McpBridge was ever found: a volume may not be mounted yet.
//
// What is missing from what was read is gone: a file that is no longer in a folder that can be read, a document, an entry.
// But it must be missing for a second in which the file does not change, since files are emptied before they are written,
// and renamed; till then nothing of the file is believed, for at most 30 s, after which what is new in it is. Whoever
// deletes the last file of a folder that has been read removes all registries; but a folder that was replaced by one
// without any file is not believed: a volume was unmounted. Of a path that is a file, its absence is a failed read as well;
// and so it is when a file takes the place of a folder, or a folder that of a file.
type Files struct {
	o FilesOptions
	t timing

	location location
	files    map[string]*file
	complete bool

	rules         []rule
	rulesRead     bool
	rulesErr      error
	rulesProblems []bridge.Problem
	rulesSum      [sha256.Size]byte
}

// file is what is known of one file.
type file struct {
	// sum is the hash of the content that latest was parsed from.
	sum    [sha256.Size]byte
	latest parsed
	// err is why the last attempt to read failed.
	err error
	// empty says that the content has no bytes, gone that there is no such file any more.
	empty, gone bool

	// docs is what is believed: latest's, with what the rules of Files keep of earlier ones.
	docs []Document
	// believed says that all of the content was understood once, be it as nothing.
	believed bool
	// doubt is since when something is missing from latest, zero if nothing is; changed is when latest became what it is.
	doubt, changed time.Time
}

// NewFiles returns a source that reads files. It touches none before Run.
func NewFiles(o FilesOptions) *Files {
	return &Files{o: o, t: defaultTiming(), files: map[string]*file{}}
}

// Run implements bridge.Source. It is called once.
func (f *Files) Run(ctx context.Context, apply func(bridge.Config)) error {
	var last bridge.Config
	first := true
	watch(ctx, f.o.Logger, f.t, f.dirs, func() time.Duration {
		c, pause := f.scan(time.Now())
		if ctx.Err() == nil && (first || !reflect.DeepEqual(c, last)) {
			apply(c)
			first, last = false, c
		}
		return pause
	})
	return nil
}

func (f *Files) dirs() []string {
	dirs := watched(f.o.Path)
	if f.o.DefaultsFile != "" {
		dirs = append(dirs, watched(f.o.DefaultsFile)...)
	}
	return dirs
}

// scan reads everything, and returns the state with the time after which to read again.
func (f *Files) scan(now time.Time) (bridge.Config, time.Duration) {
	pause := f.t.rescan
	var failed []error
	if err := f.readRules(); err != nil {
		failed = append(failed, err)
		pause = f.t.retry
	}
	if err := f.read(now); err != nil {
		failed = append(failed, fmt.Errorf("read the configuration: %w%s", err, stays(len(f.files) > 0)))
		pause = f.t.retry
	} else {
		if f.settle(now) {
			pause = f.t.confirm
		}
		f.complete = f.complete || f.rulesRead && f.known()
	}

	var docs []Document
	var problems []bridge.Problem
	for _, path := range slices.Sorted(maps.Keys(f.files)) {
		file := f.files[path]
		docs = append(docs, file.docs...)
		switch {
		case file.gone:
		case file.err != nil:
			problems = append(problems, bridge.Problem{File: path, Message: fmt.Sprintf("cannot be read: %v", file.err)})
			failed = append(failed, fmt.Errorf("read the configuration: %w%s", file.err, stays(len(file.docs) > 0)))
			pause = min(pause, f.t.retry)
		default:
			problems = append(problems, file.latest.problems...)
			if file.latest.broken != "" {
				failed = append(failed, fmt.Errorf("invalid: %s%s", file.latest.broken, stays(len(file.docs) > 0)))
			} else if file.kept() {
				failed = append(failed, fmt.Errorf("not understood: %s%s", file.latest.vague, stays(true)))
			} else if file.latest.nameless != "" && !file.believed {
				failed = append(failed, fmt.Errorf("not understood: %s (what it was before is not known)", file.latest.nameless))
			}
		}
	}
	if !f.complete && len(failed) == 0 && len(docs) == 0 {
		failed = append(failed, fmt.Errorf("read the configuration: %s: there is no McpBridge in it; "+
			"is a volume not mounted yet? if no registry is meant, write one with `registries: []`", f.o.Path))
		pause = min(pause, f.t.retry)
	}
	c := bridge.Config{Read: f.complete, Err: errors.Join(failed...)}
	c.Problems = append(problems, f.rulesProblems...)
	if f.rulesRead {
		var found []bridge.Problem
		c.Registries, found = build(docs, f.rules)
		c.Problems = append(c.Problems, found...)
	}
	slices.SortStableFunc(c.Problems, comparePlaces)
	return c, pause
}

// stays ends a complaint about what cannot be used now, if it could be before.
func stays(before bool) string {
	if before {
		return " (what was last good stays)"
	}
	return ""
}

// readRules reads the defaults file. Until it has been read there are no registries at all: without what it says of TLS,
// for one, a password could be sent in plain text.
func (f *Files) readRules() error {
	if f.o.DefaultsFile == "" {
		f.rulesRead = true
		return nil
	}
	data, err := regularfile.Read(f.o.DefaultsFile, maxFileSize)
	if err != nil {
		f.rulesErr, f.rulesSum = fmt.Errorf("read the registry defaults: %w%s", err, stays(f.rulesRead)), [sha256.Size]byte{}
		f.rulesProblems = nil
		return f.rulesErr
	}
	if sum := sha256.Sum256(data); sum != f.rulesSum {
		f.rulesSum, f.rulesErr = sum, nil
		var rules []rule
		rules, f.rulesProblems = parseRules(f.o.DefaultsFile, data)
		if len(f.rulesProblems) > 0 {
			f.rulesErr = fmt.Errorf("invalid registry defaults: %s%s", Text(f.rulesProblems[0]), stays(f.rulesRead))
		} else {
			f.rules, f.rulesRead = rules, true
		}
	}
	return f.rulesErr
}

// read reads all files into their latest state. An error means that it is not known which files there are.
func (f *Files) read(now time.Time) error {
	info, err := os.Stat(f.o.Path)
	if err != nil {
		return err
	}
	paths := []string{f.o.Path}
	used := info.Mode().IsRegular() && info.Size() > 0
	if info.IsDir() {
		if paths, err = configFiles(f.o.Path); err != nil {
			return err
		}
		if f.o.DefaultsFile != "" {
			paths = slices.DeleteFunc(paths, func(p string) bool { return p == filepath.Clean(f.o.DefaultsFile) })
		}
		used = len(paths) > 0
	}
	if err := f.location.check(f.o.Path, used); err != nil {
		return err
	}
	for _, path := range paths {
		data, err := regularfile.Read(path, maxFileSize)
		if errors.Is(err, fs.ErrNotExist) && info.IsDir() {
			if _, lerr := os.Lstat(path); errors.Is(lerr, fs.ErrNotExist) {
				continue // deleted since it was listed
			}
		}
		if f.files[path] == nil {
			f.files[path] = &file{}
		}
		f.files[path].update(path, data, err, !info.IsDir(), now)
	}
	for path, file := range f.files {
		if !slices.Contains(paths, path) {
			file.remove(now)
		}
	}
	return nil
}

// update takes in what was read of a file. alone says that it is the whole configuration.
func (f *file) update(path string, data []byte, err error, alone bool, now time.Time) {
	f.gone, f.err, f.empty = false, err, err == nil && len(data) == 0
	if err != nil {
		f.sum, f.latest = [sha256.Size]byte{}, parsed{}
		return
	}
	if sum := sha256.Sum256(data); sum != f.sum {
		f.sum, f.latest, f.changed = sum, parse(path, data, false), now
	}
	if p := &f.latest; len(p.docs) == 0 && p.broken == "" && p.vague == "" {
		// A disk that was full, or a template without values, makes such a file; nobody removes registries that way.
		const nothing = ": there is no McpBridge in it; if no registry is meant, write one with `registries: []`"
		if alone {
			p.broken = path + nothing
		} else if len(f.docs) > 0 {
			p.vague = path + nothing + ", or delete the file from its folder"
		}
	}
}

func (f *file) remove(now time.Time) {
	if !f.gone {
		f.changed = now
	}
	*f = file{gone: true, docs: f.docs, believed: f.believed, doubt: f.doubt, changed: f.changed}
}

// settle decides for each file what of its latest content is believed. It reports whether something is in doubt.
func (f *Files) settle(now time.Time) bool {
	inDoubt := false
	present := f.present()
	for path, file := range f.files {
		if file.err != nil {
			continue
		}
		docs := file.mend(present.docs, false)
		still := keysOf(docs)
		missing := file.empty && !file.believed
		for k := range keysOf(file.docs) {
			missing = missing || !present.registries[k] && !still[k]
		}
		switch {
		case !missing:
			file.doubt = time.Time{}
		case file.doubt.IsZero():
			file.doubt = now
		}
		if missing && (now.Sub(file.doubt) < f.t.confirm || now.Sub(file.changed) < f.t.confirm) { // it may still be written
			inDoubt = true
			if now.Sub(file.doubt) >= f.t.longest {
				file.docs = file.mend(present.docs, true)
			}
			continue
		}
		file.doubt = time.Time{}
		if file.gone {
			delete(f.files, path)
			continue
		}
		file.docs = docs
		file.believed = file.believed || file.latest.broken == "" && file.latest.nameless == ""
	}
	return inDoubt
}

// valid returns the documents of the latest content that can be used.
func (f *file) valid() []Document {
	var docs []Document
	for _, d := range f.latest.docs {
		if !d.invalid {
			docs = append(docs, d)
		}
	}
	return docs
}

// mend returns what the latest content says, completed where it cannot be understood with what was believed before: a
// document that is not among those of any file (elsewhere), if one here is broken, and an entry, if one in its document
// has no type or name. With all, nothing is left out.
func (f *file) mend(elsewhere map[identity]bool, all bool) []Document {
	docs := f.valid()
	for _, old := range f.docs {
		i := slices.IndexFunc(docs, func(d Document) bool { return identify(d) == identify(old) })
		switch {
		case i < 0:
			if (all || f.latest.broken != "" || f.latest.vague != "") && !elsewhere[identify(old)] {
				docs = append(docs, old)
			}
		case all || docs[i].nameless > 0:
			known := keysOf(docs[i : i+1])
			docs[i].Items = slices.Clone(docs[i].Items)
			for _, it := range old.Items {
				if !known[key(old, it)] {
					docs[i].Items = append(docs[i].Items, it)
				}
			}
		}
	}
	return docs
}

// kept reports whether documents are believed that the latest content does not have.
func (f *file) kept() bool {
	return f.doubt.IsZero() && f.latest.vague != "" && len(f.docs) > len(f.valid())
}

// An identity tells one McpBridge from others.
type identity struct{ group, namespace, name string }

func identify(d Document) identity { return identity{d.Group, d.Namespace, d.Name} }

// contents are the documents and registries of all files together, as they were read last.
type contents struct {
	docs       map[identity]bool
	registries map[bridge.Key]bool
}

func (f *Files) present() contents {
	c := contents{docs: map[identity]bool{}, registries: map[bridge.Key]bool{}}
	for _, file := range f.files {
		docs := file.valid()
		if file.err != nil {
			docs = file.docs
		}
		for _, d := range docs {
			c.docs[identify(d)] = true
		}
		maps.Copy(c.registries, keysOf(docs))
	}
	return c
}

// keysOf returns the keys of the documents' entries.
func keysOf(docs []Document) map[bridge.Key]bool {
	keys := map[bridge.Key]bool{}
	for _, d := range docs {
		for _, it := range d.Items {
			keys[key(d, it)] = true
		}
	}
	return keys
}

// known reports whether all of every file is known. Without any McpBridge nothing is: a volume that is not mounted yet, or
// a file that is not written yet, looks so.
func (f *Files) known() bool {
	found := false
	for _, file := range f.files {
		if !file.believed {
			return false
		}
		found = found || len(file.docs) > 0
	}
	return found
}

// comparePlaces orders problems by file and line.
func comparePlaces(a, b bridge.Problem) int {
	return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line))
}
