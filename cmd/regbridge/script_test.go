package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"
)

// patience bounds every wait; a busy machine may need long.
const patience = 60 * time.Second

// leakChecked runs the tests, and looks for goroutines that they left.
type leakChecked struct{ m *testing.M }

// Run implements testscript.TestingM.
func (l leakChecked) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, "goroutines left:", err)
		code = 1
	}
	return code
}

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){"regbridge": main})
}

// TestScripts runs the program as its users do: each script in testdata/script is a terminal session. Beside the usual
// commands there are
//
//	start [NAME=VALUE...] ARGS...   run `regbridge ARGS` in the background until it serves; sets ADMIN, HEALTH, XDS and
//	                                SHARDS to its addresses. Its log is in the file log, its standard output in out
//	quit SIGNAL...                  send it signals, the last one TERM or INT; it must end with status 0
//	request METHOD URL STATUS       call an admin page; the body is the standard output
//	await URL TEXT                  wait until a page answers 200 with the text in it
//	awaitlog TEXT                   wait until the log has the text
//	status STATUS ARGS...           run a command that must end with this status
//	subscribe TYPE COUNT            be an xDS client: the first answer must have COUNT resources; the stream stays open
//	ended                           wait until the server has ended the stream
//	busy NAME                       sets NAME to an address that is in use
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"start": start, "quit": quit, "request": request, "await": await, "awaitlog": awaitLog, "busy": busy, "status": status, "subscribe": subscribe, "ended": ended,
		},
		Setup: func(e *testscript.Env) error {
			e.Values[daemonKey{}], e.Values[clientKey{}] = &running{}, &client{}
			return nil
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

type daemonKey struct{}

type clientKey struct{}

// running is the daemon of a script.
type running struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended; err is valid then
	err  error
}

func (r *running) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

func start(ts *testscript.TestScript, _ bool, args []string) {
	r := ts.Value(daemonKey{}).(*running)
	env := []string{"HOME=" + ts.Getenv("HOME"), "TMPDIR=" + ts.Getenv("TMPDIR"), "GORACE=" + os.Getenv("GORACE")}
	for len(args) > 0 && strings.Contains(args[0], "=") {
		env, args = append(env, args[0]), args[1:]
	}
	log, err := os.Create(ts.MkAbs("log"))
	ts.Check(err)
	defer log.Close()
	out, err := os.Create(ts.MkAbs("out"))
	ts.Check(err)
	defer out.Close()
	r.cmd = exec.Command(program(ts), args...)
	r.cmd.Dir, r.cmd.Env, r.cmd.Stdout, r.cmd.Stderr = ts.MkAbs("."), env, out, log
	ts.Check(r.cmd.Start())
	r.done = make(chan struct{})
	go func() {
		r.err = r.cmd.Wait()
		close(r.done)
	}()
	ts.Defer(func() {
		if !r.ended() {
			_ = r.cmd.Process.Kill()
			<-r.done
		}
		if text := readLog(ts); strings.Contains(text, "DATA RACE") {
			ts.Logf("%s", text)
			ts.Fatalf("the daemon has a data race")
		}
	})
	wait(ts, "the daemon does not serve", func() error {
		if r.ended() {
			ts.Fatalf("the daemon ended: %v\n%s", r.err, readLog(ts))
		}
		addresses := logged(readLog(ts))
		if addresses["serving xds"] == "" || addresses["serving admin"] == "" {
			return errors.New("its addresses are not in the log")
		}
		ts.Setenv("XDS", addresses["serving xds"])
		ts.Setenv("ADMIN", addresses["serving admin"])
		ts.Setenv("HEALTH", addresses["serving health"])
		ts.Setenv("SHARDS", addresses["serving xds shards"])
		return nil
	})
}

// logged returns the addresses in a JSON log, by message.
func logged(text string) map[string]string {
	addresses := map[string]string{}
	for line := range strings.Lines(text) {
		var record struct{ Msg, Address string }
		if json.Unmarshal([]byte(line), &record) == nil && record.Address != "" {
			addresses[record.Msg] = record.Address
		}
	}
	return addresses
}

// program is the regbridge in the script's PATH.
func program(ts *testscript.TestScript) string {
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		path := filepath.Join(dir, "regbridge")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	ts.Fatalf("no regbridge in PATH")
	return ""
}

func readLog(ts *testscript.TestScript) string {
	text, err := os.ReadFile(ts.MkAbs("log"))
	ts.Check(err)
	return string(text)
}

func wait(ts *testscript.TestScript, what string, check func() error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%s within %s: %v\n%s", what, patience, err, readLog(ts))
		}
	}
}

func quit(ts *testscript.TestScript, _ bool, args []string) {
	r := ts.Value(daemonKey{}).(*running)
	for _, name := range args {
		sig := map[string]os.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}[name]
		ts.Check(r.cmd.Process.Signal(sig))
	}
	select {
	case <-r.done:
	case <-time.After(patience):
		ts.Fatalf("the daemon did not end on %s\n%s", args[0], readLog(ts))
	}
	if r.err != nil {
		ts.Fatalf("the daemon ended with %v on %s\n%s", r.err, args[0], readLog(ts))
	}
}

func call(method, url string) (int, string, error) {
	req, err := http.NewRequest(method, url, nil) //nolint:noctx // the client has a timeout
	if err != nil {
		return 0, "", err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	_, err = io.Copy(&body, resp.Body)
	return resp.StatusCode, body.String(), err
}

func request(ts *testscript.TestScript, _ bool, args []string) {
	status, body, err := call(args[0], args[1])
	ts.Check(err)
	if fmt.Sprint(status) != args[2] {
		ts.Fatalf("%s %s: %d, want %s: %s", args[0], args[1], status, args[2], body)
	}
	_, err = io.WriteString(ts.Stdout(), body)
	ts.Check(err)
}

func await(ts *testscript.TestScript, _ bool, args []string) {
	wait(ts, args[0]+" does not show "+args[1], func() error {
		status, body, err := call(http.MethodGet, args[0])
		if err == nil && (status != http.StatusOK || !strings.Contains(body, args[1])) {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
}

func awaitLog(ts *testscript.TestScript, _ bool, args []string) {
	wait(ts, "the log does not have "+args[0], func() error {
		if !strings.Contains(readLog(ts), args[0]) {
			return errors.New("not yet")
		}
		return nil
	})
}

func busy(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { _ = l.Close() })
	ts.Setenv(args[0], l.Addr().String())
}

func status(ts *testscript.TestScript, _ bool, args []string) {
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || fmt.Sprint(exit.ExitCode()) != args[0] {
		ts.Fatalf("%v: %v, want status %s", args[1:], err, args[0])
	}
}

// client is the xDS client of a script.
type client struct {
	stream discovery.AggregatedDiscoveryService_StreamAggregatedResourcesClient
}

func subscribe(ts *testscript.TestScript, _ bool, args []string) {
	conn, err := grpc.NewClient(ts.Getenv("XDS"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	ts.Defer(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	ts.Defer(cancel)
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	ts.Check(err)
	ts.Check(stream.Send(&discovery.DiscoveryRequest{TypeUrl: args[0], Node: &core.Node{Id: "script"}}))
	answer, err := stream.Recv()
	ts.Check(err)
	if got := fmt.Sprint(len(answer.Resources)); got != args[1] {
		ts.Fatalf("the first answer has %s resources, want %s", got, args[1])
	}
	ts.Value(clientKey{}).(*client).stream = stream
}

func ended(ts *testscript.TestScript, _ bool, _ []string) {
	_, err := ts.Value(clientKey{}).(*client).stream.Recv()
	if got := grpcstatus.Code(err); got != codes.Unavailable {
		ts.Fatalf("the stream ended with %v, want Unavailable, which makes clients connect again", err)
	}
}
