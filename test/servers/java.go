package servers

import (
	"context"
	"crypto/sha256"
	_ "embed" // the shim's source
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// javaServer is a server that runs on the Java virtual machine. The recipe's pom.xml pins what it is made of, as Maven
// resolves it, and jars.sha256 every file that comes of that, in the format of sha256sum. The output holds them in lib,
// and the recipe's own Java source, if there is any, compiled into classes.
type javaServer struct {
	// shim also compiles bindlo, for a server that cannot be told to listen on loopback alone.
	shim bool
}

//go:embed bindlo/bindlo.c
var bindlo string

// javaRelease is the version of Java that source is compiled for, and so the oldest that runs it.
const javaRelease = "17"

func (j javaServer) key() string {
	key := "java " + javaRelease
	if j.shim {
		key += "\n" + bindlo
	}
	return key
}

func (j javaServer) build(ctx context.Context, dir, out string) error {
	lib := filepath.Join(out, "lib") // absolute, as out is: Maven resolves other paths against the pom's folder
	err := run(ctx, dir, os.Environ(), "mvn", "-B", "-q", "--strict-checksums", "-f", filepath.Join(dir, "pom.xml"),
		"dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory="+lib)
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("install Maven 3.8 or later, and a JDK %s or later: %w", javaRelease, err)
	}
	if err != nil {
		return err
	}
	if err := verify(lib, filepath.Join(dir, "jars.sha256")); err != nil {
		return err
	}
	source, err := filepath.Glob(filepath.Join(dir, "*.java"))
	if err != nil {
		return err
	}
	if len(source) > 0 {
		args := []string{"-J-XX:TieredStopAtLevel=1", "--release", javaRelease, "-proc:none", "-parameters", "-nowarn",
			"-d", filepath.Join(out, "classes"), "-cp", filepath.Join(lib, "*")}
		err := run(ctx, dir, os.Environ(), javaTool("javac"), append(args, source...)...)
		if errors.Is(err, exec.ErrNotFound) {
			return fmt.Errorf("install a JDK %s or later: %w", javaRelease, err)
		}
		if err != nil {
			return err
		}
	}
	if !j.shim {
		return nil
	}
	return compileShim(ctx, out)
}

func compileShim(ctx context.Context, out string) error {
	source := filepath.Join(out, "bindlo.c")
	if err := os.WriteFile(source, []byte(bindlo), 0o644); err != nil {
		return err
	}
	err := run(ctx, out, os.Environ(), "cc", "-shared", "-fPIC", "-O2", "-o", filepath.Join(out, "bindlo.so"), source, "-ldl")
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("install a C compiler: %w", err)
	}
	return err
}

// verify returns nil if the folder holds exactly the files that the list names, with these hashes.
func verify(dir, list string) error {
	text, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	want := map[string]string{}
	for line := range strings.Lines(string(text)) {
		hash, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if !ok {
			return fmt.Errorf("%s: %q is no line of sha256sum", list, line)
		}
		want[name] = hash
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		hash, ok := want[e.Name()]
		if !ok {
			return fmt.Errorf("%s comes of the pom.xml, and %s does not name it", e.Name(), list)
		}
		got, err := fileHash(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if got != hash {
			return fmt.Errorf("%s has the SHA-256 %s, and %s wants %s", e.Name(), got, list, hash)
		}
		delete(want, e.Name())
	}
	if len(want) > 0 {
		return fmt.Errorf("%v do not come of the pom.xml, and %s names them", slices.Sorted(maps.Keys(want)), list)
	}
	return nil
}

func fileHash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() // only read
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// javaTool is a program of the JDK that JAVA_HOME names, or else of the one in PATH.
func javaTool(name string) string {
	if home := os.Getenv("JAVA_HOME"); home != "" {
		return filepath.Join(home, "bin", name)
	}
	return name
}

// Java is what a server on the Java virtual machine is started with.
type Java struct {
	// Program is the path of java.
	Program string
	// Lib is the folder of the server's jars, and Classes that of what the recipe compiles itself; it may not exist.
	Lib, Classes string
	// Shim is for LD_PRELOAD: it turns wildcard addresses to listen on into loopback. The file is there if the recipe
	// asks for it.
	Shim string
}

// NeedJava is Need for servers on the Java virtual machine: without java they cannot be had either.
func NeedJava(tb testing.TB, s Server) Java {
	tb.Helper()
	lib := Need(tb, s)
	program, err := exec.LookPath(javaTool("java"))
	if err != nil {
		unavailable(tb, s, fmt.Errorf("install Java %s or later: %w", javaRelease, err))
	}
	out := filepath.Dir(lib)
	return Java{Program: program, Lib: lib, Classes: filepath.Join(out, "classes"), Shim: filepath.Join(out, "bindlo.so")}
}
