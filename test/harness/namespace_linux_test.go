package harness

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// outsideEnv tells the process in the namespace of a server outside of it.
const outsideEnv = "REGBRIDGE_TEST_OUTSIDE"

func TestInNamespace(t *testing.T) {
	inside := os.Getenv(namespaceEnv) != ""
	if !inside {
		t.Setenv(outsideEnv, StartUpstream(t, UpstreamOptions{Name: "outside"}).Address())
	}
	// At the end, in and out of the namespace.
	defer func() {
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "10.0.0.7:0")
		if err == nil {
			_ = l.Close()
		}
		if inside && err != nil || !inside && !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("listen on 10.0.0.7, in the namespace %v: %v", inside, err)
		}
	}()
	InNamespace(t, func(t *testing.T) {
		for _, ip := range []string{"10.0.0.7", "10.0.0.8", "127.0.0.1", "127.0.0.2"} {
			u := StartUpstream(t, UpstreamOptions{Name: ip, IP: ip})
			if body, err := getOK(t.Context(), "http://"+u.Address()+"/"); err != nil || body != ip {
				t.Errorf("%s answers %q (%v)", u.Address(), body, err)
			}
		}
		if _, _, err := Get(t.Context(), "http://"+os.Getenv(outsideEnv)+"/"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a server outside of the namespace: %v", err)
		}
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(t.Context(), "tcp", "10.0.0.9:80")
		if err == nil {
			_ = conn.Close()
		}
		if !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("an address that was not asked for: %v", err)
		}
		t.Run("sub", func(t *testing.T) { t.Log("a subtest in the namespace") })
	}, "10.0.0.7", "10.0.0.8")
}

// verdictEnv names the case of TestNamespaceVerdict that is to be run.
const verdictEnv = "REGBRIDGE_TEST_VERDICT"

// How a test ends in its namespace is how it ends outside.
func TestNamespaceVerdicts(t *testing.T) {
	t.Parallel()
	InNamespace(t, func(*testing.T) {}) // skips where there are none
	if os.Getenv(namespaceEnv) != "" {
		return
	}
	var wg sync.WaitGroup
	for name, want := range map[string]string{
		"passes":  "--- PASS: TestNamespaceVerdict/a.case",
		"fails":   "--- FAIL: TestNamespaceVerdict/a.case",
		"skips":   "--- SKIP: TestNamespaceVerdict/a.case",
		"panics":  "--- FAIL: TestNamespaceVerdict/a.case",
		"leaks":   "--- FAIL: TestNamespaceVerdict/a.case",
		"forgets": "--- FAIL: TestNamespaceVerdict/a.case",
		"hangs":   "--- FAIL: TestNamespaceVerdict/a.case",
	} {
		timeout := "-test.timeout=1m"
		if name == "hangs" {
			timeout = "-test.timeout=10s"
		}
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestNamespaceVerdict$", "-test.v", timeout)
			cmd.Env = append(os.Environ(), verdictEnv+"="+name)
			out, err := cmd.CombinedOutput()
			if failed := strings.Contains(want, "FAIL"); failed != (err != nil) ||
				!strings.Contains(string(out), "\n    "+want) || !strings.Contains(string(out), "| here: "+name) {
				t.Errorf("%s: %v; want %q and what is said inside:\n%s", name, err, want, out)
			}
		})
	}
	wg.Wait()
}

func TestNamespaceVerdict(t *testing.T) {
	name := os.Getenv(verdictEnv)
	if name == "" {
		t.Skip("only for TestNamespaceVerdicts")
	}
	t.Run("a.case", func(t *testing.T) {
		if name == "forgets" && os.Getenv(namespaceEnv) != "" {
			fmt.Println("here:", name)
			os.Exit(0)
		}
		InNamespace(t, func(t *testing.T) {
			fmt.Println("here:", name)
			switch name {
			case "fails":
				t.Error("no")
			case "skips":
				t.Skip("not today")
			case "panics":
				panic("no")
			case "leaks":
				go func() { select {} }()
			case "hangs":
				<-make(chan struct{})
			}
		})
	})
}
