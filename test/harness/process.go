package harness

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/template"
	"time"

	"github.com/regbridge/regbridge/test/servers"
)

const (
	readyTimeout = 60 * time.Second // machines that test are busy
	stopTimeout  = 20 * time.Second
	startTries   = 5
	tailLines    = 50
)

// A command is how a server is started.
type command struct {
	program string
	args    []string
	// env is added to PATH, HOME and TMPDIR, the only variables taken from our own environment or set; HOME and TMPDIR
	// are the server's folder, which is also its working directory.
	env []string
	// ready returns nil when the server serves; it is asked again and again, for readyTimeout or for within.
	ready  func(context.Context) error
	within time.Duration
	// logs are files in the server's folder that it logs to beside its standard output and error.
	logs []string
	// mishap is what the log says when it was bad luck that the server did not start: it is started again.
	mishap string
}

// A Process is one server of a test. It ends with the test.
type Process struct {
	tb      testing.TB
	name    string
	dir     string // the server's folder
	command command

	mu sync.Mutex
	// current is nil before the first start.
	current *run
}

// A run is one life of a process.
type run struct {
	cmd    *exec.Cmd
	logPos int64         // the log's size at the start
	done   chan struct{} // closed after the exit; err is valid then
	err    error
}

// start starts a server with the command that choose makes, together with the files that it needs in the server's folder.
// choose is called again, so that it takes other ports, when one turns out to be taken. The test fails if the server does
// not get ready.
func start(tb testing.TB, name string, choose func(*Process) (command, error)) *Process {
	tb.Helper()
	p := &Process{tb: tb, name: name, dir: tb.TempDir()}
	tb.Cleanup(func() {
		p.Kill()
		if tb.Failed() {
			tb.Logf("the end of %s's log:\n%s", name, p.tail(false))
		}
	})
	if err := p.start(choose); err != nil {
		tb.Fatal(err)
	}
	return p
}

// portTaken reports whether the log of a server that did not start tells of a port that another process has. Go and Java
// do not begin with the same letter.
func portTaken(log string) bool { return strings.Contains(log, "ddress already in use") }

func (p *Process) start(choose func(*Process) (command, error)) error {
	for try := 1; ; try++ {
		var err error
		if p.command, err = choose(p); err != nil {
			return fmt.Errorf("start %s: %w", p.name, err)
		}
		if err = p.launch(); err == nil {
			return nil
		}
		p.Kill()
		log := p.log(true)
		badLuck := portTaken(log) || p.command.mishap != "" && strings.Contains(log, p.command.mishap)
		if try == startTries || !badLuck {
			return fmt.Errorf("start %s: %w; the end of its log:\n%s", p.name, err, p.tail(true))
		}
	}
}

// launch starts the process and waits until it is ready.
func (p *Process) launch() error {
	log, err := os.OpenFile(p.logPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own handle
	info, err := log.Stat()
	if err != nil {
		return err
	}
	cmd := exec.Command(p.command.program, p.command.args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = p.dir, log, log
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.dir, "TMPDIR=" + p.dir}, p.command.env...)
	cmd.SysProcAttr = servers.Tied(syscall.SIGKILL)

	r := &run{cmd: cmd, logPos: info.Size(), done: make(chan struct{})}
	started := make(chan error)
	go func() { // ends with the process, for which Kill waits
		runtime.LockOSThread() // see servers.Tied
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			r.err = cmd.Wait()
			close(r.done)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	p.mu.Lock()
	p.current = r
	p.mu.Unlock()
	return p.waitReady(r)
}

func (p *Process) waitReady(r *run) error {
	within := cmp.Or(p.command.within, readyTimeout)
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		err := p.command.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-r.done:
			return fmt.Errorf("it ended before it was ready (%v)", r.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("not ready within %v: %w", within, err)
		case <-time.After(pollEvery / 2):
		}
	}
}

func (p *Process) run() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current
}

// Running reports whether the process has not ended. A paused process is running.
func (p *Process) Running() bool {
	r := p.run()
	if r == nil {
		return false
	}
	select {
	case <-r.done:
		return false
	default:
		return true
	}
}

// PID is the process id of the latest start.
func (p *Process) PID() int { return p.run().cmd.Process.Pid }

// Kill ends the process with SIGKILL and waits for its end. It may have ended before.
func (p *Process) Kill() {
	if r := p.run(); r != nil {
		_ = r.cmd.Process.Kill() // fails only after the end
		<-r.done
	}
}

// Stop ends the process with SIGTERM and waits for its end. The error tells that it had ended before, took too long
// (then it was killed), or ended otherwise than with status 0.
func (p *Process) Stop() error {
	r := p.run()
	if !p.Running() {
		return fmt.Errorf("stop %s: it has ended before (%v)", p.name, r.cmd.ProcessState)
	}
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-r.done:
	case <-time.After(stopTimeout):
		p.Kill()
		return fmt.Errorf("stop %s: still running %v after SIGTERM", p.name, stopTimeout)
	}
	if r.err != nil {
		return fmt.Errorf("stop %s: %w", p.name, r.err)
	}
	return nil
}

// Pause stops the process in its tracks (SIGSTOP): its ports stay open and nobody answers. Kill works all the same.
func (p *Process) Pause() { p.signal(syscall.SIGSTOP) }

// Resume ends a Pause.
func (p *Process) Resume() { p.signal(syscall.SIGCONT) }

func (p *Process) signal(sig syscall.Signal) {
	p.tb.Helper()
	if err := p.run().cmd.Process.Signal(sig); err != nil {
		p.tb.Fatalf("send %v to %s: %v", sig, p.name, err)
	}
}

// Restart kills the process if it runs and starts it again with the same ports and folders; the test fails if it does
// not get ready.
func (p *Process) Restart() {
	p.tb.Helper()
	p.Kill()
	if err := p.start(func(*Process) (command, error) { return p.command, nil }); err != nil {
		p.tb.Fatal(err)
	}
}

func (p *Process) logPath() string { return filepath.Join(p.dir, "log") }

// Log is all that the process wrote to its standard output and error, in all its lives.
func (p *Process) Log() string { return p.log(false) }

// log is the log, of the latest life alone or the whole.
func (p *Process) log(latest bool) string {
	log, err := os.ReadFile(p.logPath())
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) { // else it was never started
			p.tb.Errorf("read the log of %s: %v", p.name, err)
		}
		return ""
	}
	if r := p.run(); latest && r != nil {
		log = log[r.logPos:]
	}
	return string(log)
}

// tail is the end of the log, of the latest life alone or the whole, and of the server's other log files.
func (p *Process) tail(latest bool) string {
	all := []string{tail(p.log(latest))}
	for _, name := range p.command.logs {
		log, err := os.ReadFile(filepath.Join(p.dir, name))
		if err != nil {
			log = []byte(err.Error())
		}
		all = append(all, name+":", tail(string(log)))
	}
	return strings.Join(all, "\n")
}

func tail(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
}

// write puts content into a file at once: whoever watches it never sees a part.
func write(tb testing.TB, path, content string) {
	tb.Helper()
	temp := filepath.Join(tb.TempDir(), "new")
	if err := os.WriteFile(temp, []byte(content), 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		tb.Fatal(err)
	}
}

// render executes a template of a server's recipe into a file of the process's folder, whose path it returns.
func render(s servers.Server, name, dir string, data any) (string, error) {
	recipe, err := s.Dir()
	if err != nil {
		return "", err
	}
	tmpl, err := template.New(name).Option("missingkey=error").ParseFiles(filepath.Join(recipe, name))
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	if err := tmpl.Execute(&out, data); err != nil {
		return "", err
	}
	path := filepath.Join(dir, strings.TrimSuffix(name, ".tmpl"))
	return path, os.WriteFile(path, out.Bytes(), 0o600)
}
