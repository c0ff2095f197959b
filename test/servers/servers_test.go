package servers

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestTable(t *testing.T) {
	root, err := Root()
	if err != nil {
		t.Fatal(err)
	}
	readmes, err := filepath.Glob(filepath.Join(root, "test/servers/*/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	folders := map[Server]bool{}
	for _, path := range readmes {
		folders[Server(filepath.Base(filepath.Dir(path)))] = true
	}
	for _, s := range All() {
		if !folders[s] {
			t.Errorf("%s has no folder with a README", s)
		}
		if s.ColdTime() == 0 {
			t.Errorf("%s: nothing says how long it takes", s)
		}
		delete(folders, s)
	}
	if len(folders) > 0 {
		t.Errorf("folders that no server is made from: %v", folders)
	}
	if _, err := Server("nothing").Get(t.Context()); err == nil || !strings.Contains(err.Error(), "consul") {
		t.Errorf("an unknown server: %v, want an error that lists the known ones", err)
	}
}

// counted is a method that writes a file and counts how often.
type counted struct {
	count *atomic.Int32
	err   *error // what building fails with
}

func (counted) key() string { return "counted" }

func (c counted) build(_ context.Context, dir, out string) error {
	c.count.Add(1)
	if *c.err != nil {
		return *c.err
	}
	version, err := os.ReadFile(filepath.Join(dir, "version"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "program"), version, 0o755)
}

type fixture struct {
	recipe
	counted
	dir, cache string
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	c := counted{new(atomic.Int32), new(error)}
	f := &fixture{recipe{Server("thing"), "program", time.Second, c}, c, t.TempDir(), t.TempDir()}
	f.write(t, "version", "1")
	return f
}

func (f *fixture) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) expect(t *testing.T, content string, builds int32) {
	t.Helper()
	path, err := f.get(t.Context(), f.dir, f.cache, false)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != content || f.count.Load() != builds {
		t.Errorf("the program is %q (%v) after %d builds, want %q after %d", got, err, f.count.Load(), content, builds)
	}
}

func TestBuiltOnce(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := f.get(t.Context(), f.dir, f.cache, false); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f.expect(t, "1", 1)
	f.write(t, "version", "2")
	f.expect(t, "2", 2)
	f.write(t, "version", "1") // both outputs are kept
	f.expect(t, "1", 2)
	f.write(t, "go.sum", "")
	f.expect(t, "1", 3)
}

// A process that is killed while it builds leaves half a folder behind.
func TestLeftovers(t *testing.T) {
	f := newFixture(t)
	key, err := f.hash(f.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, suffix := range []string{"", ".tmp"} {
		if err := os.MkdirAll(filepath.Join(f.cache, "thing-"+key+suffix, "half"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	f.expect(t, "1", 1)
	for _, left := range []string{"thing-" + key + ".tmp", "thing-" + key + "/half"} {
		if _, err := os.Stat(filepath.Join(f.cache, left)); err == nil {
			t.Errorf("%s is still there", left)
		}
	}
}

func TestFailureIsRemembered(t *testing.T) {
	f := newFixture(t)
	fails := func(again bool, builds int32) {
		t.Helper()
		_, err := f.get(t.Context(), f.dir, f.cache, again)
		if err == nil || !strings.Contains(err.Error(), "no network") || f.count.Load() != builds {
			t.Errorf("error %v after %d builds, want the first one after %d", err, f.count.Load(), builds)
		}
	}
	*f.err = errors.New("no network")
	fails(false, 1)
	fails(false, 1)
	fails(true, 2)
	failed, err := filepath.Glob(filepath.Join(f.cache, "*.failed"))
	if err != nil || len(failed) != 1 {
		t.Fatalf("%v, %v", failed, err)
	}
	old := time.Now().Add(-retryAfter)
	if err := os.Chtimes(failed[0], old, old); err != nil {
		t.Fatal(err)
	}
	fails(false, 3)

	*f.err = nil
	if _, err := f.get(t.Context(), f.dir, f.cache, true); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "1", 4)
	if _, err := os.Stat(failed[0]); err == nil {
		t.Error("the failure is remembered beside the program")
	}
}

func TestInterruptionIsNoFailure(t *testing.T) {
	f := newFixture(t)
	*f.err = context.Canceled
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.get(ctx, f.dir, f.cache, false); err == nil {
		t.Error("no error")
	}
	*f.err = nil
	f.expect(t, "1", 2)
}

func TestGoProgram(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	for name, content := range map[string]string{
		"go.mod":  "module example.test/hello\n\ngo 1.26\n",
		"main.go": "package main\n\nfunc main() { println(\"hello\") }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("GOFLAGS", "-mod=vendor") // the user's own flags have no say
	t.Setenv("GOWORK", "/nowhere/go.work")
	if err := (goProgram{pkg: ".", file: "hello"}).build(t.Context(), dir, out); err != nil {
		t.Fatal(err)
	}
	if got, err := exec.Command(filepath.Join(out, "hello")).CombinedOutput(); err != nil || string(got) != "hello\n" {
		t.Errorf("the program says %q, %v", got, err)
	}
	err := goProgram{pkg: "./missing", file: "hello"}.build(t.Context(), dir, out)
	if err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("the error of go build is %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("no time left"))
	if err := (goProgram{pkg: ".", file: "hello"}).build(ctx, dir, out); err == nil || !strings.Contains(err.Error(), "no time left") {
		t.Errorf("an interrupted build says %v", err)
	}
}

// jars makes a folder of files, and the list of their hashes.
func jars(t *testing.T, files map[string]string) (dir, list string) {
	t.Helper()
	dir, list = t.TempDir(), filepath.Join(t.TempDir(), "jars.sha256")
	var lines strings.Builder
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&lines, "%x  %s\n", sha256.Sum256([]byte(content)), name)
	}
	if err := os.WriteFile(list, []byte(lines.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir, list
}

func TestVerify(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(dir string) error
		want  string
	}{
		"right":   {func(string) error { return nil }, ""},
		"changed": {func(dir string) error { return os.WriteFile(filepath.Join(dir, "a.jar"), []byte("x"), 0o644) }, "a.jar has the SHA-256 2d711642"},
		"more":    {func(dir string) error { return os.WriteFile(filepath.Join(dir, "c.jar"), nil, 0o644) }, "c.jar comes of the pom.xml"},
		"less":    {func(dir string) error { return os.Remove(filepath.Join(dir, "b.jar")) }, "[b.jar] do not come"},
	} {
		dir, list := jars(t, map[string]string{"a.jar": "1", "b.jar": "2"})
		if err := test.spoil(dir); err != nil {
			t.Fatal(err)
		}
		err := verify(dir, list)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// fakeTool puts a program of that name, a shell script, before all others.
func fakeTool(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// A recipe of jars, Java source and the shim, with a Maven that has a file at hand.
func TestJavaServer(t *testing.T) {
	for _, tool := range []string{"javac", "cc"} {
		if _, err := exec.LookPath(tool); err != nil && !Required() {
			t.Skipf("not available: %v", err)
		}
	}
	dir, out := t.TempDir(), t.TempDir()
	_, list := jars(t, map[string]string{"a.pom": "1"})
	if err := os.Rename(list, filepath.Join(dir, "jars.sha256")); err != nil {
		t.Fatal(err)
	}
	source := "public class Hello { public static void main(String[] a) { System.out.println(\"hello\"); } }"
	if err := os.WriteFile(filepath.Join(dir, "Hello.java"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	fakeTool(t, "mvn", "for a; do case $a in -DoutputDirectory=*) out=${a#*=};; esac; done; mkdir $out; printf 1 > $out/a.pom")
	if err := (javaServer{shim: true}).build(t.Context(), dir, out); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"lib/a.pom", "classes/Hello.class", "bindlo.so"} {
		if _, err := os.Stat(filepath.Join(out, file)); err != nil {
			t.Error(err)
		}
	}
	if got, err := exec.Command(javaTool("java"), "-cp", filepath.Join(out, "classes"), "Hello").CombinedOutput(); err != nil || string(got) != "hello\n" {
		t.Errorf("the program says %q, %v", got, err)
	}
	if (javaServer{}).key() == (javaServer{shim: true}).key() {
		t.Error("with and without the shim the key is the same")
	}

	fakeTool(t, "mvn", "echo no such artifact >&2; exit 1")
	err := javaServer{}.build(t.Context(), dir, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "no such artifact") {
		t.Errorf("a Maven that fails: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	err = javaServer{}.build(t.Context(), dir, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "install Maven") {
		t.Errorf("without Maven: %v", err)
	}
}

// The shim must not leave a server open to the network: neither over IPv4 nor over IPv6.
func TestShim(t *testing.T) {
	if _, err := exec.LookPath("cc"); err != nil && !Required() {
		t.Skipf("not available: %v", err)
	}
	python, err := exec.LookPath("python3")
	if err != nil && Required() {
		t.Fatal(err)
	}
	if err != nil {
		t.Skipf("not available: %v", err)
	}
	dir := t.TempDir()
	if err := compileShim(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	for family, want := range map[string]string{
		"socket.AF_INET, '0.0.0.0'": "127.0.0.1", "socket.AF_INET6, '::'": "::ffff:127.0.0.1", "socket.AF_INET, '127.0.0.2'": "127.0.0.2",
	} {
		cmd := exec.Command(python, "-c", "import socket; f, a = "+family+"; s = socket.socket(f); s.bind((a, 0)); print(s.getsockname()[0])")
		cmd.Env = append(os.Environ(), "LD_PRELOAD="+filepath.Join(dir, "bindlo.so"))
		if got, err := cmd.CombinedOutput(); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is bound to %s (%v), want %s", family, got, err, want)
		}
	}
}

func TestUnzip(t *testing.T) {
	dir := t.TempDir()
	archive := filepath.Join(dir, "a.whl")
	f, err := os.Create(archive)
	if err != nil {
		t.Fatal(err)
	}
	z := zip.NewWriter(f)
	w, err := z.Create("bin/hello")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(w, "#!/bin/sh\necho hello\n"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(z.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "hello")
	if err := unzip(archive, "bin/hello", program); err != nil {
		t.Fatal(err)
	}
	if got, err := exec.Command(program).Output(); err != nil || string(got) != "hello\n" {
		t.Errorf("the program says %q, %v", got, err)
	}
	if err := unzip(archive, "bin/other", filepath.Join(dir, "other")); err == nil || !strings.Contains(err.Error(), "bin/other") {
		t.Errorf("a missing member: %v", err)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a held lock: %v", err)
	}
	unlock()
	unlock, err = Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestRootOutsideCheckout(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, err := Root(); err == nil || !strings.Contains(err.Error(), "inside the checkout") {
		t.Errorf("outside: %v", err)
	}
}

// verdict records how a test ended.
type verdict struct {
	testing.TB
	skipped, failed string
}

func (v *verdict) Skipf(format string, args ...any) {
	v.skipped = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (v *verdict) Fatalf(format string, args ...any) {
	v.failed = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func TestNeed(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Consul.recipe()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := Consul.Dir()
	if err != nil {
		t.Fatal(err)
	}
	key, err := r.hash(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(cache, "consul-"+key)
	if err := os.WriteFile(out+".failed", []byte("no network"), 0o644); err != nil {
		t.Fatal(err)
	}
	need := func(required string) (*verdict, string) {
		t.Helper()
		t.Setenv("REQUIRE_SERVERS", required)
		v := &verdict{TB: t}
		var path string
		var wg sync.WaitGroup
		wg.Go(func() { path = Need(v, Consul) })
		wg.Wait()
		return v, path
	}
	const want = "consul: not available: no network"
	if v, _ := need(""); v.skipped != want || v.failed != "" {
		t.Errorf("skipped %q, failed %q; want skipped %q", v.skipped, v.failed, want)
	}
	if v, _ := need("1"); v.skipped != "" || v.failed != want {
		t.Errorf("skipped %q, failed %q; want failed %q", v.skipped, v.failed, want)
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(out, "consul")
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if v, path := need(""); path != program || v.skipped+v.failed != "" {
		t.Errorf("got %q, %+v; want %q", path, v, program)
	}
}

func TestNeedJava(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	t.Setenv("JAVA_HOME", "")
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	r, err := Nacos1.recipe()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := Nacos1.Dir()
	if err != nil {
		t.Fatal(err)
	}
	key, err := r.hash(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(cache, "nacos1-"+key)
	if err := os.MkdirAll(filepath.Join(out, "lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	need := func() (v *verdict, j Java) {
		t.Helper()
		v = &verdict{TB: t}
		var wg sync.WaitGroup
		wg.Go(func() { j = NeedJava(v, Nacos1) })
		wg.Wait()
		return v, j
	}
	t.Setenv("REQUIRE_SERVERS", "")
	t.Setenv("PATH", t.TempDir())
	if v, _ := need(); !strings.HasPrefix(v.skipped, "nacos1: not available: install Java 17") {
		t.Errorf("without Java: %+v", v)
	}
	fakeTool(t, "java", "")
	v, j := need()
	if v.skipped+v.failed != "" || filepath.Base(j.Program) != "java" || j.Lib != filepath.Join(out, "lib") || filepath.Dir(j.Shim) != out {
		t.Errorf("got %+v, %+v", j, v)
	}
}
