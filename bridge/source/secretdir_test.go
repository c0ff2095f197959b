package source

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/regbridge/regbridge/bridge"
)

var _ bridge.Secrets = (*SecretDir)(nil)

// A vault runs a SecretDir.
type vault struct {
	*SecretDir
	t       *testing.T
	changed chan struct{}
	log     *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func open(t *testing.T, dir string, tm timing) *vault {
	t.Helper()
	log := &lockedBuffer{}
	v := &vault{
		SecretDir: NewSecretDir(SecretDirOptions{Dir: dir, Logger: slog.New(slog.NewTextHandler(log, nil))}),
		t:         t, changed: make(chan struct{}, 1), log: log,
	}
	v.SecretDir.t = tm
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- v.Run(ctx, func() {
			select {
			case v.changed <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if strings.Contains(log.String(), "hunter") {
			t.Errorf("a secret is logged: %s", log)
		}
	})
	return v
}

// value returns what the key has, or the error.
func value(s *SecretDir, name, key string) string {
	namespace, name, _ := strings.Cut(name, "/")
	c, err := s.Get(namespace, name)
	switch {
	case errors.Is(err, bridge.ErrSecretMissing):
		return "missing"
	case err != nil:
		return "error: " + err.Error()
	}
	v, ok := c[key]
	if !ok {
		return "no key"
	}
	return v.Reveal()
}

// until waits until the key has the value; the answer of value may also only contain want, if that ends with an ellipsis.
func (v *vault) until(name, key, want string) {
	v.t.Helper()
	deadline := time.After(10 * time.Second)
	part, inexact := strings.CutSuffix(want, "...")
	for {
		got := value(v.SecretDir, name, key)
		if strings.Contains(got, "error:") && strings.Contains(got, "hunter") {
			v.t.Fatalf("a secret is in an error: %s", got)
		}
		if got == want || inexact && strings.Contains(got, part) {
			return
		}
		select {
		case <-v.changed:
		case <-deadline:
			v.t.Fatalf("%s %s: want %q, have %q", name, key, want, got)
		}
	}
}

func TestSecretDirShapes(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "s.yaml"), `
apiVersion: v1
kind: Secret
metadata: {name: plain, namespace: prod, labels: {a: b}}
type: Opaque
immutable: true
stringData: {nacosUsername: joe, nacosPassword: "hunter2\n"}
data: {nacosUsername: aWdub3JlZA==, token: aHVudGVyMw==}
---
kind: ConfigMap
---
kind: Secret
metadata: {name: wrapped}
data:
  long: |
    aHVu
    dGVyNA==
---
apiVersion: v1
kind: List
items:
- {kind: Secret, metadata: {name: listed}, stringData: {a: hunter5}}
`)
	write(t, filepath.Join(dir, "notes.txt"), "hunter6")
	must(t, os.MkdirAll(filepath.Join(dir, "mounted"), 0o700))
	write(t, filepath.Join(dir, "mounted", "token"), "hunter7\r\n")
	write(t, filepath.Join(dir, "mounted", ".dockerconfigjson"), "hunter8\n\n")
	write(t, filepath.Join(dir, "mounted", "..old"), "hunter9")
	must(t, os.MkdirAll(filepath.Join(dir, "prod", "mounted"), 0o700))
	write(t, filepath.Join(dir, "prod", "mounted", "token"), "hunter10")
	must(t, os.MkdirAll(filepath.Join(dir, "prod", "mounted", "deeper"), 0o700))
	must(t, os.MkdirAll(filepath.Join(dir, "prod", "hollow"), 0o700))

	s := NewSecretDir(SecretDirOptions{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	must(t, s.Load())
	for _, c := range [][3]string{
		{"prod/plain", "nacosUsername", "joe"},
		{"prod/plain", "nacosPassword", "hunter2"},
		{"prod/plain", "token", "hunter3"},
		{"default/plain", "token", "missing"},
		{"default/wrapped", "long", "hunter4"},
		{"default/listed", "a", "hunter5"},
		{"default/mounted", "token", "hunter7"},
		{"default/mounted", ".dockerconfigjson", "hunter8\n"},
		{"default/mounted", "..old", "no key"},
		{"prod/mounted", "token", "hunter10"},
		{"prod/mounted", "deeper", "no key"},
		{"prod/hollow", "token", "missing"},
		{"default/prod", "mounted", "missing"},
		{"default/notes.txt", "", "missing"},
	} {
		if got := value(s, c[0], c[1]); got != c[2] {
			t.Errorf("%s %s: want %q, have %q", c[0], c[1], c[2], got)
		}
	}
	first, err := s.Get("prod", "plain")
	must(t, err)
	first["token"] = "changed"
	if got := value(s, "prod/plain", "token"); got != "hunter3" {
		t.Error("the map is not the caller's")
	}
	_, err = s.Get("default", "nobody")
	if !errors.Is(err, bridge.ErrSecretMissing) || !strings.Contains(err.Error(), "default/nobody") {
		t.Error(err)
	}
}

func TestSecretDirRotates(t *testing.T) {
	dir := t.TempDir()
	mount := func(path, version string, keys map[string]string) {
		must(t, os.MkdirAll(filepath.Join(path, ".."+version), 0o700))
		for name, content := range keys {
			write(t, filepath.Join(path, ".."+version, name), content)
		}
		must(t, os.Symlink(".."+version, filepath.Join(path, "..data_tmp")))
		must(t, os.Rename(filepath.Join(path, "..data_tmp"), filepath.Join(path, "..data")))
		for name := range keys {
			if _, err := os.Lstat(filepath.Join(path, name)); err != nil {
				must(t, os.Symlink(filepath.Join("..data", name), filepath.Join(path, name)))
			}
		}
	}
	v := open(t, dir, quick())
	v.until("default/a", "token", "missing")
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "prod", "b")
	mount(a, "v1", map[string]string{"token": "hunter1"})
	mount(b, "v1", map[string]string{"token": "hunter1"})
	v.until("default/a", "token", "hunter1")
	v.until("prod/b", "token", "hunter1")
	mount(a, "v2", map[string]string{"token": "hunter2"})
	mount(b, "v2", map[string]string{"token": "hunter2"})
	v.until("default/a", "token", "hunter2")
	v.until("prod/b", "token", "hunter2")
	write(t, filepath.Join(dir, "c.yaml"), "kind: Secret\nmetadata: {name: c}\nstringData: {token: hunter1}\n")
	v.until("default/c", "token", "hunter1")
	write(t, filepath.Join(dir, "c.yaml"), "kind: Secret\nmetadata: {name: c}\nstringData: {token: hunter2}\n")
	v.until("default/c", "token", "hunter2")
	must(t, os.RemoveAll(a))
	must(t, os.Remove(filepath.Join(dir, "c.yaml")))
	v.until("default/a", "token", "missing")
	v.until("default/c", "token", "missing")
}

func TestSecretDirKeepsWhatCannotBeRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "secrets")
	v := open(t, dir, quick())
	v.until("default/c", "token", "no such file...")
	must(t, os.Mkdir(dir, 0o700))
	v.until("default/c", "token", "missing")
	file := filepath.Join(dir, "c.yaml")
	for _, bad := range []string{
		"kind: Secret\nmetadata: {name: c}\nstringData: {token: *hunter9}\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: {token: !hunter9}\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: {token: \"hunter9\\q\"}\n",
		"kind: Secret\nmetadata: {name: c}\ndata: {token: hunter9!}\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: [hunter9]\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: {token: hunter9, token: hunter10}\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: {token: &hunter9 [a]}\n",
		"kind: Secret\nmetadata: {name: c}\nstringData: hunter9\n",
		"kind: Sec",
		"kin",
	} {
		_ = os.RemoveAll(dir)
		must(t, os.Mkdir(dir, 0o700))
		write(t, file, bad)
		if got := value(load(dir), "default/c", "token"); strings.Contains(got, "hunter") || got == "no key" {
			t.Errorf("%q alone: %s", bad, got)
		}
		write(t, file, "kind: Secret\nmetadata: {name: c}\nstringData: {token: hunter1}\n")
		v.until("default/c", "token", "hunter1")
		write(t, file, bad)
		write(t, filepath.Join(dir, "d.yaml"), "kind: Secret\nmetadata: {name: d}\nstringData: {token: x}\n")
		v.until("default/d", "token", "x")
		v.until("default/c", "token", "hunter1")
	}
	must(t, os.Remove(file))
	must(t, os.Mkdir(file, 0o700)) // cannot be read
	write(t, filepath.Join(dir, "d.yaml"), "kind: Secret\nmetadata: {name: d}\nstringData: {token: y}\n")
	v.until("default/d", "token", "y")
	v.until("default/c", "token", "hunter1")
	must(t, os.Rename(dir, dir+".old"))
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Mkdir(filepath.Join(dir, "e"), 0o700))
	write(t, filepath.Join(dir, "e", "token"), "z")
	v.until("default/e", "token", "z")
}

func load(dir string) *SecretDir {
	s := NewSecretDir(SecretDirOptions{Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	_ = s.Load() // what is wrong is what Get says
	return s
}

// A key is emptied before it is written.
func TestSecretDirDoesNotBelieveAMoment(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "a"), 0o700))
	key, other := filepath.Join(dir, "a", "token"), filepath.Join(dir, "d.yaml")
	write(t, key, "hunter1")
	tm := quick()
	tm.confirm = time.Hour
	v := open(t, dir, tm)
	v.until("default/a", "token", "hunter1")
	for i, moment := range []func(){
		func() { write(t, key, "") },
		func() { must(t, os.Remove(key)) },
		func() { must(t, os.Remove(filepath.Dir(key))) },
	} {
		moment()
		n := string(rune('a' + i))
		write(t, other, "kind: Secret\nmetadata: {name: d}\nstringData: {token: "+n+"}\n")
		v.until("default/d", "token", n)
		v.until("default/a", "token", "hunter1")
	}
}

func TestSecretDirNamesDuplicates(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "a"), 0o700))
	write(t, filepath.Join(dir, "a", "token"), "hunter1")
	write(t, filepath.Join(dir, "b.yaml"), "kind: Secret\nmetadata: {name: a}\nstringData: {token: hunter2}\n")
	v := open(t, dir, quick())
	v.until("default/a", "token", "hunter1")
	if !strings.Contains(v.log.String(), "b.yaml is defined by") {
		t.Error(v.log)
	}
}
