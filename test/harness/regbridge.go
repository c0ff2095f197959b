package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/regbridge/regbridge/test/servers"
)

// RegbridgeOptions says how to start the product. The zero value has an empty configuration folder.
type RegbridgeOptions struct {
	// Config are the files of the configuration folder: name to content.
	Config map[string]string
	// Args are added to `regbridge serve`; --config, --secrets-dir, --state-dir, --xds-address and --admin-address are
	// there.
	Args []string
	// Env is the environment, beside PATH, HOME and TMPDIR.
	Env []string
}

// Regbridge is one process of the product, built from this checkout; with the race detector if the test is.
type Regbridge struct {
	*Process
	// ConfigDir, SecretsDir and StateDir are the folders that it was started with. They stay over restarts.
	ConfigDir, SecretsDir, StateDir string
	// XDS and Admin are host:port, as the process itself tells in its log. They stay the same over restarts.
	XDS, Admin string
	program    string
}

// StartRegbridge starts the product and waits until it serves its admin pages and its xDS port is open; that is before
// it gives first answers (see WaitReady). At the end of the test it must stop on SIGTERM with status 0, unless it was
// ended before.
func StartRegbridge(tb testing.TB, o RegbridgeOptions) *Regbridge {
	tb.Helper()
	b := &Regbridge{ConfigDir: tb.TempDir(), SecretsDir: tb.TempDir(), StateDir: tb.TempDir()}
	b.program = buildProgram(tb, "./cmd/regbridge")
	for name, content := range o.Config {
		write(tb, filepath.Join(b.ConfigDir, name), content)
	}
	b.Process = start(tb, "regbridge", func(p *Process) (command, error) {
		ports, err := freePorts(tb.Context(), 2)
		if err != nil {
			return command{}, err
		}
		return command{
			program: b.program,
			args: append([]string{
				"serve", "--config", b.ConfigDir, "--secrets-dir", b.SecretsDir, "--state-dir", b.StateDir,
				"--xds-address", loopback(ports[0]), "--admin-address", loopback(ports[1]),
			}, o.Args...),
			env:   o.Env,
			ready: func(ctx context.Context) error { return b.ready(ctx, p) },
		}, nil
	})
	tb.Cleanup(func() {
		if b.Running() {
			b.Resume()
			b.Stop()
		}
		if strings.Contains(b.Log(), "WARNING: DATA RACE") {
			tb.Error("regbridge has a data race; see its log")
		}
	})
	return b
}

// ready takes the addresses from the log of the latest start of p, which is b's process.
func (b *Regbridge) ready(ctx context.Context, p *Process) error {
	addresses := map[string]string{}
	for line := range strings.Lines(p.log(true)) {
		var record struct{ Msg, Address string }
		if json.Unmarshal([]byte(line), &record) == nil && record.Address != "" {
			addresses[record.Msg] = record.Address
		}
	}
	b.XDS, b.Admin = addresses["serving xds"], addresses["serving admin"]
	if b.XDS == "" || b.Admin == "" {
		return errors.New(`its log has no "serving xds" and "serving admin" with an address`)
	}
	_, err := getOK(ctx, "http://"+b.Admin+"/livez")
	return err
}

// WaitReady waits until /readyz is 200: first answers may go out.
func (b *Regbridge) WaitReady(timeout time.Duration) {
	b.tb.Helper()
	Eventually(b.tb, timeout, func() error {
		_, err := b.Get("/readyz")
		return err
	})
}

// Stop sends SIGTERM and waits; the test fails if the process does not end with status 0.
func (b *Regbridge) Stop() {
	b.tb.Helper()
	if err := b.Process.Stop(); err != nil {
		b.tb.Error(err)
	}
}

// WriteConfig adds or replaces a file of the configuration folder at once.
func (b *Regbridge) WriteConfig(name, content string) {
	b.tb.Helper()
	write(b.tb, filepath.Join(b.ConfigDir, name), content)
}

// RemoveConfig removes a file of the configuration folder.
func (b *Regbridge) RemoveConfig(name string) {
	b.tb.Helper()
	if err := os.Remove(filepath.Join(b.ConfigDir, name)); err != nil {
		b.tb.Fatal(err)
	}
}

// WriteSecret adds or replaces a Secret.
func (b *Regbridge) WriteSecret(namespace, name string, data map[string]string) {
	b.tb.Helper()
	text, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Secret", "stringData": data,
		"metadata": map[string]string{"namespace": namespace, "name": name},
	})
	if err != nil {
		b.tb.Fatal(err)
	}
	write(b.tb, filepath.Join(b.SecretsDir, namespace+"."+name+".yaml"), string(text))
}

// Get returns an admin page.
func (b *Regbridge) Get(path string) (string, error) {
	return getOK(b.tb.Context(), "http://"+b.Admin+path)
}

// JSON decodes an admin page.
func (b *Regbridge) JSON(path string, out any) error {
	return getJSON(b.tb.Context(), "http://"+b.Admin+path, out)
}

// Metric is the sum over one metric, or over its series that have all the labels (`type="consul"`); 0 if there is none.
func (b *Regbridge) Metric(name string, labels ...string) (float64, error) {
	return metric(b.tb.Context(), "http://"+b.Admin+"/metrics", name, labels)
}

// Run runs another command of the same program, such as "debug", "registryz", to its end.
func (b *Regbridge) Run(args ...string) (stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(b.tb.Context(), readyTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, b.program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.dir, &out, &errs
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + b.dir}
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// buildProgram builds a main package of the product and returns a copy of it that stays what it is for the whole test,
// whatever is built meanwhile. Where nothing changed since the last build it costs a fraction of a second.
func buildProgram(tb testing.TB, pkg string) string {
	tb.Helper()
	root, err := servers.Root()
	if err != nil {
		tb.Fatal(err)
	}
	cache, err := servers.CacheDir()
	if err != nil {
		tb.Fatal(err)
	}
	args := []string{"build", "-buildvcs=false"}
	if raceEnabled() {
		args = append(args, "-race")
	}
	// go build leaves an executable alone that is up to date, so each checkout and kind has a fixed place.
	key := sha256.Sum256([]byte(strings.Join(append(args, root, pkg), "\n")))
	built := filepath.Join(cache, "product-"+hex.EncodeToString(key[:8]))
	unlock, err := servers.Lock(tb.Context(), built+".lock")
	if err != nil {
		tb.Fatalf("wait for another process that builds %s: %v", pkg, err)
	}
	defer unlock()
	cmd := exec.CommandContext(tb.Context(), "go", append(args, "-o", built, pkg)...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %s: %v\n%s", pkg, err, out)
	}
	program := filepath.Join(tb.TempDir(), filepath.Base(pkg))
	if err := os.Link(built, program); err == nil {
		return program
	}
	if err := copyFile(built, program); err != nil { // the folders lie on different file systems
		tb.Fatal(err)
	}
	return program
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close() // only read
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// raceEnabled reports whether the test itself was built with the race detector.
func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}
