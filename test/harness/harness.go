// Package harness starts real servers, upstreams and the product itself for tests: on loopback, with free ports, in
// temporary folders, and ends them with the test. When a test fails, or a server does not get ready, the end of each
// server's log is in the test's output.
//
// Each server has its type (Consul, Nacos, ZooKeeper, Eureka, CoreDNS, Istiod, Envoy, Regbridge; also real applications of Dubbo
// and Spring Cloud) with what tests do to it: Kill, Pause, Restart on the same ports, and readers of what it ended up with.
// Package servers gets the programs; where one cannot be had the test is skipped by name. Methods fail the test that started
// the server, unless they return an error; only those that do may be called from other goroutines or from its subtests.
package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// pollEvery is the time between two looks at a condition.
const pollEvery = 50 * time.Millisecond

// Main runs the tests of a package that uses the harness: call it from TestMain. Goroutines and processes that outlive
// the tests fail the run.
func Main(m *testing.M, options ...goleak.Option) {
	goleak.VerifyTestMain(m, append(options, goleak.Cleanup(func(code int) {
		for _, child := range children() {
			fmt.Fprintln(os.Stderr, "harness: still running after the tests:", child)
			code = max(code, 1)
		}
		os.Exit(code)
	}))...)
}

// children lists our child processes, on systems with /proc.
func children() []string {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is good
	var found []string
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		// "pid (name) state ppid ...": the name may hold anything.
		name := strings.LastIndexByte(string(stat), ')')
		if fields := strings.Fields(string(stat[name+1:])); len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			found = append(found, string(stat[:name+1]))
		}
	}
	return found
}

// Eventually waits until check returns nil; after timeout the test fails with check's last error.
func Eventually(tb testing.TB, timeout time.Duration, check func() error) {
	tb.Helper()
	if err := wait(tb.Context(), timeout, check); err != nil {
		tb.Fatal(err)
	}
}

func wait(ctx context.Context, timeout time.Duration, check func() error) error {
	for deadline := time.Now().Add(timeout); ; {
		err := check()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not within %v: %w", timeout, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gave up waiting: %w", err)
		case <-time.After(pollEvery):
		}
	}
}

// Always fails the test if check returns an error at any time during d.
func Always(tb testing.TB, d time.Duration, check func() error) {
	tb.Helper()
	start := time.Now()
	for deadline := start.Add(d); ; {
		if err := check(); err != nil {
			tb.Fatalf("after %v of %v: %v", time.Since(start).Round(time.Millisecond), d, err)
		}
		if time.Now().After(deadline) {
			return
		}
		select {
		case <-tb.Context().Done():
			tb.Fatal("the test ended")
		case <-time.After(pollEvery):
		}
	}
}

// Get returns status and body of one GET request on a connection of its own.
func Get(ctx context.Context, url string) (status int, body string, err error) {
	return call(ctx, http.MethodGet, url, nil, nil)
}

func call(ctx context.Context, method, url string, header http.Header, in any) (status int, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var reader io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return 0, "", err
		}
		reader = strings.NewReader(string(b))
	}
	req, err := http.NewRequestWithContext(ctx, method, url, reader)
	if err != nil {
		return 0, "", err
	}
	if header != nil {
		req.Header = header
	}
	transport := &http.Transport{DisableKeepAlives: true} // also without the proxy of the environment
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, "", fmt.Errorf("%s %s: %w", method, url, err)
	}
	defer resp.Body.Close() // only read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, "", fmt.Errorf("%s %s: read the answer: %w", method, url, err)
	}
	return resp.StatusCode, string(b), nil
}

// getOK is Get for pages that must answer 200.
func getOK(ctx context.Context, url string) (string, error) {
	status, body, err := Get(ctx, url)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("GET %s: %d %.300s", url, status, body)
	}
	return body, err
}

// getJSON decodes a page into out.
func getJSON(ctx context.Context, url string, out any) error {
	body, err := getOK(ctx, url)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(body), out); err != nil {
		return fmt.Errorf("GET %s: %w in %.300s", url, err, body)
	}
	return nil
}
