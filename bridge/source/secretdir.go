package source

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/regularfile"
)

// maxKeySize bounds the file of one key. Kubernetes allows 1 MiB for a whole Secret.
const maxKeySize = 1 << 20

// SecretDirOptions are the settings of SecretDir.
type SecretDirOptions struct {
	// Dir is the folder with the Secrets.
	Dir string
	// Logger gets what is wrong with them, without any value.
	Logger *slog.Logger
}

// SecretDir gives the Secrets in a folder, in two shapes:
//
//   - DIR/*.yaml, *.yml and *.json hold objects of kind Secret (v1), with data in base64 and stringData in plain text, in
//     the namespace that their metadata gives, or else in default. Objects of other kinds are passed over.
//   - DIR/NAME/KEY is a file with the value of a key of the Secret NAME in namespace default, as a Secret is mounted;
//     DIR/NAMESPACE/NAME/KEY is one in another namespace. It is the depth alone that decides.
//
// Names that begin with a dot are passed over, but for keys, which are passed over when they begin with two: such are the
// links of a mount. One line break at the end of a value is left out, in both shapes. Of a Secret that is there twice the
// one whose path sorts first counts.
//
// What cannot be read or parsed stays as it was. A Secret, or a key of one, that is gone or became empty must be so for
// a second to be believed, since files are emptied before they are written.
type SecretDir struct {
	o SecretDirOptions
	t timing

	// mu guards what follows. It is not held while files are read.
	mu      sync.Mutex
	secrets map[secretName]*secret
	err     error // why the folder could not be read at the last attempt

	// scanning is held while files are read. What follows belongs to the one who holds it.
	scanning   sync.Mutex
	location   location
	complaints []string
}

type secretName struct{ namespace, name string }

func (n secretName) String() string { return n.namespace + "/" + n.name }

// secret is what is known of one Secret.
type secret struct {
	// origin is the file or folder that defines it.
	origin string
	// values is the last good content; nil if there was none.
	values registry.Credentials
	// err is why the present content is not good; it has no values.
	err error
	// doubt is since when something of values is missing, zero if nothing is.
	doubt time.Time
}

// NewSecretDir returns the Secrets of a folder. It touches none before Load or Run.
func NewSecretDir(o SecretDirOptions) *SecretDir {
	return &SecretDir{o: o, t: defaultTiming(), secrets: map[secretName]*secret{}}
}

// Load reads the folder once, so that Get works before Run. The error is about the folder as a whole: what is wrong with
// single Secrets is what Get returns.
func (s *SecretDir) Load() error {
	s.scan(time.Now())
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Run reads the folder, again whenever it changes, and calls changed after what Get returns became different, until ctx
// ends. Then it returns nil.
func (s *SecretDir) Run(ctx context.Context, changed func()) error {
	watch(ctx, s.o.Logger, s.t, s.dirs, func() time.Duration {
		different, pause := s.scan(time.Now())
		if different && ctx.Err() == nil {
			changed()
		}
		return pause
	})
	return nil
}

// Get implements bridge.Secrets.
func (s *SecretDir) Get(namespace, name string) (registry.Credentials, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := secretName{namespace, name}
	switch known := s.secrets[n]; {
	case known != nil && known.values != nil:
		return maps.Clone(known.values), nil
	case known != nil:
		return nil, known.err
	case s.err != nil:
		return nil, fmt.Errorf("secret %s: %w", n, s.err)
	default:
		return nil, fmt.Errorf("%w: there is no secret %s in %s: add a file of kind Secret, or the folder %s with "+
			"a file for each key",
			bridge.ErrSecretMissing, n, s.o.Dir, s.folderOf(n))
	}
}

func (s *SecretDir) folderOf(n secretName) string {
	if n.namespace == defaultNamespace {
		return filepath.Join(s.o.Dir, n.name)
	}
	return filepath.Join(s.o.Dir, n.namespace, n.name)
}

// dirs returns the folders to watch: all that are looked into.
func (s *SecretDir) dirs() []string {
	dirs := watched(s.o.Dir)
	_, first := subfolders(s.o.Dir)
	dirs = append(dirs, first...)
	for _, dir := range first {
		_, second := subfolders(dir)
		dirs = append(dirs, second...)
	}
	return dirs
}

// subfolders returns the visible files and folders in a folder, links followed. What it cannot tell counts as a file.
func subfolders(dir string) (files, folders []string) {
	entries, _ := os.ReadDir(dir) // a folder that cannot be read is reported when its content is
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		switch {
		case err == nil && info.IsDir() && !strings.HasPrefix(e.Name(), "."):
			folders = append(folders, path)
		case err == nil && info.IsDir(), strings.HasPrefix(e.Name(), ".."):
		default:
			files = append(files, path)
		}
	}
	return files, folders
}

// found is what one reading of the folder brought.
type found struct {
	secrets map[secretName]*secret
	// unread are the files and folders whose content is not known now.
	unread []string
	// retry says that reading may succeed later though no file changes.
	retry bool
	// complaints tell what is wrong, without values.
	complaints []string
}

func (f *found) add(n secretName, s *secret) {
	if first := f.secrets[n]; first != nil {
		f.complaints = append(f.complaints,
			fmt.Sprintf("secret %s of %s is defined by %s already, which counts", n, s.origin, first.origin))
		return
	}
	if s.err != nil {
		f.complaints = append(f.complaints, s.err.Error())
	}
	f.secrets[n] = s
}

func (f *found) fail(origin string, err error) {
	f.unread = append(f.unread, origin)
	f.complaints = append(f.complaints, err.Error())
}

// unreadable notes what could not be read, in contrast to what could, and is wrong.
func (f *found) unreadable(origin string, err error) {
	f.retry = true
	f.fail(origin, err)
}

// isUnread reports whether the content of origin is not known now.
func (f *found) isUnread(origin string) bool {
	return slices.ContainsFunc(f.unread, func(u string) bool {
		return origin == u || strings.HasPrefix(origin, u+string(filepath.Separator))
	})
}

// scan reads the folder, and reports whether Get has become different, and when to read again.
func (s *SecretDir) scan(now time.Time) (different bool, pause time.Duration) {
	s.scanning.Lock()
	defer s.scanning.Unlock()
	f, err := s.read()
	if err != nil {
		err = fmt.Errorf("read the secrets: %w (what was read before stays)", err)
		f.complaints = []string{err.Error()}
	}
	s.complain(f.complaints)
	s.mu.Lock()
	defer s.mu.Unlock()
	different = (err == nil) != (s.err == nil)
	s.err = err
	if err != nil {
		return different, s.t.retry
	}
	changed, inDoubt := s.merge(f, now)
	switch {
	case inDoubt:
		pause = s.t.confirm
	case f.retry:
		pause = s.t.retry
	default:
		pause = s.t.rescan
	}
	return different || changed, pause
}

// complain logs what is wrong, once for each thing.
func (s *SecretDir) complain(complaints []string) {
	for _, c := range complaints {
		if !slices.Contains(s.complaints, c) {
			s.o.Logger.Warn("a secret is not used as it is now", "problem", c)
		}
	}
	s.complaints = complaints
}

// merge takes over what was read. It is called with mu held.
func (s *SecretDir) merge(f found, now time.Time) (different, inDoubt bool) {
	for n, known := range s.secrets {
		next := f.secrets[n]
		switch {
		case next == nil && f.isUnread(known.origin):
			known.doubt = time.Time{} // it may still be there
		case next == nil || next.err == nil && loses(known.values, next.values):
			if known.doubt.IsZero() {
				known.doubt = now
			}
			if now.Sub(known.doubt) < s.t.confirm {
				inDoubt = true
				continue
			}
			different = true
			if next == nil {
				delete(s.secrets, n)
			} else {
				s.secrets[n] = next
			}
		case next.err != nil:
			different = different || known.values == nil && known.err.Error() != next.err.Error()
			known.err, known.origin, known.doubt = next.err, next.origin, time.Time{}
		default:
			different = different || !reflect.DeepEqual(known.values, next.values)
			s.secrets[n] = next
		}
	}
	for n, next := range f.secrets {
		if s.secrets[n] == nil {
			different = true
			s.secrets[n] = next
		}
	}
	return different, inDoubt
}

// loses reports whether a key with a value in before has none in after.
func loses(before, after registry.Credentials) bool {
	for k, v := range before {
		if v != "" && after[k] == "" {
			return true
		}
	}
	return false
}

// read reads all Secrets. An error is about the folder as a whole.
func (s *SecretDir) read() (found, error) {
	f := found{secrets: map[secretName]*secret{}}
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return f, err
	}
	used := false
	for _, e := range entries {
		path := filepath.Join(s.o.Dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		info, err := os.Stat(path)
		switch {
		case err == nil && info.IsDir() && !isConfigFile(e.Name()):
			used = true
			readFolder(&f, path)
		case isConfigFile(e.Name()):
			used = true
			readObjects(&f, path)
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			f.unreadable(path, err)
		case err != nil: // a link to nowhere: perhaps to a folder that is being replaced
			f.unread, f.retry = append(f.unread, path), true
		}
	}
	return f, s.location.check(s.o.Dir, used)
}

// readFolder reads DIR/NAME, a Secret of its own if it has files, and the Secrets in the folders below.
func readFolder(f *found, dir string) {
	if _, err := os.ReadDir(dir); err != nil {
		f.unreadable(dir, err)
		return
	}
	files, folders := subfolders(dir)
	if len(files) > 0 {
		f.add(secretName{defaultNamespace, filepath.Base(dir)}, readKeys(dir, files))
	}
	for _, sub := range folders {
		if _, err := os.ReadDir(sub); err != nil {
			f.unreadable(sub, err)
			continue
		}
		if files, _ := subfolders(sub); len(files) > 0 {
			f.add(secretName{filepath.Base(dir), filepath.Base(sub)}, readKeys(sub, files))
		}
	}
}

// readKeys reads a Secret with one file for each key.
func readKeys(dir string, files []string) *secret {
	s := &secret{origin: dir, values: registry.Credentials{}}
	for _, path := range files {
		data, err := regularfile.Read(path, maxKeySize)
		if err != nil {
			return &secret{origin: dir, err: fmt.Errorf("secret in %s: %w", dir, err)}
		}
		s.values[filepath.Base(path)] = registry.Secret(trimBreak(string(data)))
	}
	return s
}

func trimBreak(s string) string { return strings.TrimSuffix(strings.TrimSuffix(s, "\n"), "\r") }

// secretObject is what is read of a Secret in YAML.
type secretObject struct {
	Metadata struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Data       map[string]registry.Secret `json:"data"`
	StringData map[string]registry.Secret `json:"stringData"`
}

// readObjects reads the Secrets in a YAML or JSON file.
func readObjects(f *found, path string) {
	data, err := regularfile.Read(path, maxFileSize)
	if err != nil {
		f.unreadable(path, err)
		return
	}
	d := newDecoder(path, data, false)
	d.unknown, d.secretive = ignoreUnknown, true
	documents(path, data, func(root *yaml.Node, line int) {
		d.line = line
		if root.Kind != yaml.DocumentNode || len(root.Content) == 0 {
			return
		}
		n := root.Content[0]
		if field(n, "kind").Value == "List" || field(n, "kind").Value == "SecretList" {
			for _, item := range field(n, "items").Content {
				d.secret(f, item)
			}
			return
		}
		d.secret(f, n)
	}, func(e syntaxError) {
		f.fail(path, fmt.Errorf("%s:%d: this is no valid YAML: %s", path, e.line, e.text))
	})
}

func (d *decoder) secret(f *found, at *yaml.Node) {
	n := d.resolve(at, "")
	if n == nil || isNull(n) {
		return
	}
	switch what := field(n, "kind").Value; {
	case what == "" || n.Kind != yaml.MappingNode: // perhaps what is left of a file that was cut off
		f.fail(d.file, fmt.Errorf("%s:%d: this is no Kubernetes object", d.file, d.line+at.Line))
		return
	case what != "Secret":
		return
	}
	failed, first := d.errors, len(d.problems)
	var o secretObject
	d.value(n, reflect.ValueOf(&o).Elem(), "")
	name := secretName{o.Metadata.Namespace, o.Metadata.Name}
	if name.namespace == "" {
		name.namespace = defaultNamespace
	}
	s := &secret{origin: d.file, values: registry.Credentials{}}
	for k, encoded := range o.Data {
		plain, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded.Reveal()))
		if err != nil { // whose text would tell of the value
			d.fail(field(field(n, "data"), k, at), join("data", k), "this is no base64: write plain text into stringData")
		}
		s.values[k] = registry.Secret(trimBreak(string(plain)))
	}
	for k, plain := range o.StringData {
		s.values[k] = registry.Secret(trimBreak(plain.Reveal()))
	}
	if name.name == "" && d.errors == failed {
		d.fail(at, "metadata.name", "the secret has no name")
	}
	if d.errors > failed {
		text := d.file + ": too many problems"
		if len(d.problems) > first {
			text = Text(d.problems[first])
		}
		s.values, s.err = nil, fmt.Errorf("secret %s: %s", name, text)
	}
	if name.name == "" {
		f.fail(d.file, s.err)
		return
	}
	f.add(name, s)
}
