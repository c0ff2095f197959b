package harness

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/regbridge/regbridge/test/servers"
)

// namespaceEnv is set in the process that runs in a namespace, to the file that its test writes its verdict to.
const namespaceEnv = "REGBRIDGE_TEST_NAMESPACE"

// InNamespace runs the rest of a test in a network namespace of its own, in which the IPv4 addresses are the machine's (with a
// prefix length, as in 10.1.0.1/16, all of the network is):
// servers may listen there and be reached there by any process of the test, and by nobody else. Loopback and the harness's
// ports are as everywhere; other networks do not exist, so get servers (servers.Need) before. Where namespaces are not
// permitted the test is skipped, or fails if servers.Required.
//
// What runs there is a process of its own: the test binary, for this one test, up to here and into run. What the test does
// before is thus done twice, and what it does after InNamespace not in the namespace. How it ends in there (passed, failed,
// skipped) is how t ends.
func InNamespace(t *testing.T, run func(t *testing.T), addresses ...string) {
	t.Helper()
	if verdict := os.Getenv(namespaceEnv); verdict != "" {
		inNamespace(t, run, addresses, verdict)
		return
	}
	verdict := filepath.Join(t.TempDir(), "verdict")
	if err := enterNamespace(t, verdict); err != nil {
		t.Fatalf("in its network namespace: %v", err)
	}
	text, err := os.ReadFile(verdict)
	if errors.Is(err, fs.ErrNotExist) {
		t.Fatal("in its network namespace the test was not run")
	}
	if err != nil {
		t.Fatal(err)
	}
	if string(text) == "skipped" {
		t.Skip("skipped in its network namespace, which tells why")
	}
}

// inNamespace is InNamespace in the process that has the namespace.
func inNamespace(t *testing.T, run func(t *testing.T), addresses []string, verdict string) {
	t.Helper()
	t.Cleanup(func() { // after all others
		text := "passed"
		if t.Skipped() {
			text = "skipped"
		}
		if err := os.WriteFile(verdict, []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	})
	err := configureLoopback(addresses)
	if errors.Is(err, unix.EPERM) {
		noNamespace(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t)
}

func noNamespace(t *testing.T, err error) {
	t.Helper()
	if servers.Required() {
		t.Fatalf("network namespaces are not to be had: %v", err)
	}
	t.Skipf("network namespaces are not to be had: %v", err)
}

// enterNamespace runs this test again in a process with a namespace, and returns how it ended. All that is written there
// goes to the test's output.
func enterNamespace(t *testing.T, verdict string) error {
	t.Helper()
	var name []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		name = append(name, "^"+regexp.QuoteMeta(part)+"$")
	}
	args := []string{"-test.run=" + strings.Join(name, "/"), "-test.v", "-test.count=1"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	if end, ok := t.Deadline(); ok { // the inner process is the one that can tell what hangs
		args = append(args, fmt.Sprint("-test.timeout=", (time.Until(end)*9/10).Round(time.Millisecond)))
	}
	output, writer := io.Pipe()
	printed := make(chan struct{})
	go func() {
		defer close(printed)
		lines := bufio.NewScanner(output)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			_, _ = fmt.Fprintln(t.Output(), "| "+lines.Text()) // not to be taken for output of the outer test
		}
		_, _ = io.Copy(io.Discard, output) // after a line that is too long
	}()
	defer func() {
		_ = writer.Close() // of a pipe within the process
		<-printed
	}()

	// A process of root may have a namespace right away; any other one if it becomes the root of a user namespace.
	attributes := func(userToo bool) *syscall.SysProcAttr {
		attr := servers.Tied(syscall.SIGKILL)
		attr.Cloneflags = syscall.CLONE_NEWNET
		if userToo {
			attr.Cloneflags |= syscall.CLONE_NEWUSER
			attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
			attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		}
		return attr
	}
	ended := make(chan error)
	var cmd *exec.Cmd
	start := func() error {
		var failures error
		for _, userToo := range []bool{false, true} {
			cmd = exec.Command(os.Args[0], args...)
			cmd.Env = append(os.Environ(), namespaceEnv+"="+verdict)
			cmd.Stdout, cmd.Stderr = writer, writer
			cmd.WaitDelay = 5 * time.Second // for what it leaves behind
			cmd.SysProcAttr = attributes(userToo)
			err := cmd.Start()
			if err == nil {
				return nil
			}
			failures = errors.Join(failures, err)
		}
		return failures
	}
	go func() {
		runtime.LockOSThread() // see servers.Tied
		defer runtime.UnlockOSThread()
		err := start()
		ended <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-ended; err != nil {
		noNamespace(t, err)
	}
	return <-ended
}

// configureLoopback gives the loopback interface of a new namespace its usual addresses and these.
func configureLoopback(addresses []string) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(socket) // nothing was sent
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	for i, text := range addresses {
		if !strings.Contains(text, "/") {
			text += "/32"
		}
		prefix, err := netip.ParsePrefix(text)
		if err != nil || !prefix.Addr().Is4() {
			return fmt.Errorf("%q is no IPv4 address (%w)", text, err)
		}
		alias, err := unix.NewIfreq(fmt.Sprintf("lo:%d", i+1)) // the old way to give an interface several addresses
		if err != nil {
			return err
		}
		address := prefix.Addr().As4()
		if err := alias.SetInet4Addr(address[:]); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(socket, unix.SIOCSIFADDR, alias); err != nil {
			return fmt.Errorf("add %s to lo: %w", text, err)
		}
		if err := alias.SetInet4Addr(net.CIDRMask(prefix.Bits(), 32)); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(socket, unix.SIOCSIFNETMASK, alias); err != nil {
			return fmt.Errorf("add %s to lo: %w", text, err)
		}
	}
	return nil
}
