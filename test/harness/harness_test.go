package harness

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

func TestMain(m *testing.M) { Main(m) }

// failures runs f as a test of its own and returns what made it fail; cleanups are t's.
func failures(t *testing.T, f func(testing.TB)) string {
	t.Helper()
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r.text
}

type recorder struct {
	testing.TB
	text string
}

func (r *recorder) Errorf(format string, args ...any) { r.text += fmt.Sprintf(format, args...) }
func (r *recorder) Error(args ...any)                 { r.text += fmt.Sprintln(args...) }
func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Fatal(args ...any) {
	r.Error(args...)
	runtime.Goexit()
}

func TestEventually(t *testing.T) {
	tries := 0
	Eventually(t, time.Minute, func() error {
		if tries++; tries < 3 {
			return errors.New("not yet")
		}
		return nil
	})
	got := failures(t, func(tb testing.TB) {
		tb.Helper()
		Eventually(tb, 10*time.Millisecond, func() error { return errors.New("the sun is up") })
	})
	if !strings.Contains(got, "the sun is up") || !strings.Contains(got, "10ms") {
		t.Errorf("a wait in vain says %q", got)
	}
}

func TestAlways(t *testing.T) {
	tries := 0
	check := func() error {
		if tries++; tries == 3 {
			return errors.New("the sun is down")
		}
		return nil
	}
	got := failures(t, func(tb testing.TB) { tb.Helper(); Always(tb, time.Minute, check) })
	if !strings.Contains(got, "the sun is down") {
		t.Errorf("a broken condition says %q", got)
	}
	Always(t, 10*time.Millisecond, check)
}

// Ports asked for at the same time must differ, though nothing listens on them yet.
func TestFreePort(t *testing.T) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	seen := map[int]bool{}
	for range 50 {
		wg.Go(func() {
			port := FreePort(t)
			mu.Lock()
			defer mu.Unlock()
			if seen[port] || port < firstPort || port >= endPort {
				t.Errorf("port %d: seen before %v, or out of range", port, seen[port])
			}
			seen[port] = true
		})
	}
	wg.Wait()
}

// shell is a server made of a shell script that is ready when it says "up".
func shell(p **Process, script string) command {
	return command{program: "/bin/sh", args: []string{"-c", script}, ready: func(context.Context) error {
		if *p == nil || !strings.Contains((*p).log(true), "up") {
			return errors.New("it has not said up")
		}
		return nil
	}}
}

func process(t *testing.T, scripts ...string) (p *Process, starts int, err error) {
	t.Helper()
	p = &Process{tb: t, name: "it", dir: t.TempDir()}
	t.Cleanup(p.Kill)
	err = p.start(func(*Process) (command, error) {
		script := scripts[min(starts, len(scripts)-1)]
		starts++
		return shell(&p, script), nil
	})
	return p, starts, err
}

func TestProcess(t *testing.T) {
	const inUse = "echo 'bind: address already in use'; exit 1"
	t.Run("ends early", func(t *testing.T) {
		p, starts, err := process(t, "echo out of luck; exit 3")
		if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "out of luck") {
			t.Errorf("the error is %v, want the status and the log", err)
		}
		if starts != 1 || p.Running() {
			t.Errorf("%d starts, running %v", starts, p.Running())
		}
	})
	t.Run("port taken", func(t *testing.T) {
		p, starts, err := process(t, inUse, inUse, "echo up; exec sleep 600")
		if err != nil || starts != 3 || !p.Running() {
			t.Errorf("error %v, %d starts, running %v; want success at the third start", err, starts, p.Running())
		}
	})
	t.Run("port always taken", func(t *testing.T) {
		if _, starts, err := process(t, inUse); err == nil || starts != startTries {
			t.Errorf("error %v after %d starts, want one after %d", err, starts, startTries)
		}
	})
	t.Run("stop", func(t *testing.T) {
		p, _, err := process(t, "trap 'kill $!; exit 0' TERM; echo up; sleep 600 & wait")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Stop(); err != nil || p.Running() {
			t.Errorf("stop: %v, running %v", err, p.Running())
		}
		if p.Stop() == nil {
			t.Error("stopping what has ended is no error")
		}
	})
	t.Run("stop with another status", func(t *testing.T) {
		p, _, err := process(t, "trap 'kill $!; exit 4' TERM; echo up; sleep 600 & wait")
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Stop(); err == nil || !strings.Contains(err.Error(), "exit status 4") {
			t.Errorf("stop: %v, want the exit status", err)
		}
	})
	t.Run("restart", func(t *testing.T) {
		p, _, err := process(t, "echo up; echo again >> count; exec sleep 600")
		if err != nil {
			t.Fatal(err)
		}
		before := p.PID()
		p.Pause()
		p.Restart()
		count, _ := os.ReadFile(filepath.Join(p.dir, "count")) // the comparison tells
		if string(count) != "again\nagain\n" || alive(before) || !alive(p.PID()) {
			t.Errorf("started %q; old process alive: %v, new: %v", count, alive(before), alive(p.PID()))
		}
		if strings.Count(p.Log(), "up") != 2 || strings.Count(p.log(true), "up") != 1 {
			t.Errorf("the log is %q, of the last life %q", p.Log(), p.log(true))
		}
	})
	t.Run("pause", func(t *testing.T) {
		p, _, err := process(t, "echo up; exec sleep 600")
		if err != nil {
			t.Fatal(err)
		}
		p.Pause()
		Eventually(t, time.Minute, func() error { return inState(p.PID(), "T") })
		p.Resume()
		Eventually(t, time.Minute, func() error { return inState(p.PID(), "S") })
	})
	t.Run("environment", func(t *testing.T) {
		t.Setenv("CONSUL_HTTP_TOKEN", "rubbish")
		p, _, err := process(t, "env; pwd; echo up; exec sleep 600")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(p.Log(), "rubbish") || !strings.Contains(p.Log(), "HOME="+p.dir+"\n") {
			t.Errorf("the environment is\n%s", p.Log())
		}
	})
}

// state is the letter that the kernel gives for a process, empty if there is none.
func state(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest := cutLast(string(stat), ")")
	return strings.Fields(rest)[0]
}

func inState(pid int, want string) error {
	if got := state(pid); got != want {
		return fmt.Errorf("process %d is in state %q, want %q", pid, got, want)
	}
	return nil
}

func alive(pid int) bool { return state(pid) != "" && state(pid) != "Z" }

// A test binary that is killed, or panics, runs no cleanup; its servers must end all the same.
func TestServersEndWithKilledTest(t *testing.T) {
	if os.Getenv("HARNESS_TEST_BE_KILLED") != "" {
		p, _, err := process(t, "echo up; exec sleep 600")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("server %d\n", p.PID())
		<-t.Context().Done()
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestServersEndWithKilledTest$", "-test.v", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), "HARNESS_TEST_BE_KILLED=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	server := 0
	for lines := bufio.NewScanner(out); server == 0 && lines.Scan(); {
		_, _ = fmt.Sscanf(lines.Text(), "server %d", &server)
	}
	if server == 0 || !alive(server) {
		t.Errorf("the test that is to be killed has no server: pid %d", server)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed
	Eventually(t, time.Minute, func() error {
		if alive(server) {
			return fmt.Errorf("server %d outlives the test that started it", server)
		}
		return nil
	})
}

func TestChildren(t *testing.T) {
	p, _, err := process(t, "echo up; exec sleep 600")
	if err != nil {
		t.Fatal(err)
	}
	listed := func() bool { return strings.Contains(strings.Join(children(), "\n"), strconv.Itoa(p.PID())+" (sleep)") }
	if !listed() {
		t.Errorf("process %d is not among %v", p.PID(), children())
	}
	p.Kill()
	if listed() {
		t.Errorf("process %d is among %v after its end", p.PID(), children())
	}
}

func TestUpstream(t *testing.T) {
	ca := NewCA(t, "upstreams")
	plain := StartUpstream(t, UpstreamOptions{Name: "plain", IP: "127.0.0.2"})
	secure := StartUpstream(t, UpstreamOptions{Name: "secure", TLS: ca.ServerTLS(t, "secure.test", "127.0.0.1")})
	client := &tls.Config{RootCAs: ca.Pool(), ServerName: "secure.test", MinVersion: tls.VersionTLS12}
	transport := &http.Transport{TLSClientConfig: client}
	defer transport.CloseIdleConnections()
	for url, u := range map[string]*Upstream{"http://" + plain.Address(): plain, "https://" + secure.Address(): secure} {
		resp, err := (&http.Client{Transport: transport}).Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(body) != u.Name || u.Requests() != 1 {
			t.Errorf("%s answers %q, %v after %d requests", url, body, err, u.Requests())
		}
	}
	for _, u := range []*Upstream{plain, secure} {
		creds := insecure.NewCredentials()
		if u == secure {
			creds = credentials.NewTLS(client.Clone())
		}
		conn, err := grpc.NewClient(u.Address(), grpc.WithTransportCredentials(creds))
		if err != nil {
			t.Fatal(err)
		}
		var header metadata.MD
		_, err = grpc_health_v1.NewHealthClient(conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.Header(&header))
		_ = conn.Close()
		if err != nil || len(header["upstream"]) != 1 || header["upstream"][0] != u.Name {
			t.Errorf("%s answers gRPC with %v, %v", u.Name, header, err)
		}
	}
	plain.Stop()
	if _, _, err := Get(t.Context(), "http://"+plain.Address()); err == nil {
		t.Error("a stopped upstream answers")
	}
}
