package harness

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"
)

func TestZooKeeper(t *testing.T) {
	t.Parallel()
	began := time.Now()
	z := StartZooKeeper(t, ZooKeeperOptions{TickTime: time.Second}) // sessions survive a slow restart
	t.Logf("zookeeper ready after %v", time.Since(began))
	if open := wildcards(t, z.PID()); len(open) > 0 {
		t.Errorf("the server can be reached from the network: %v", open)
	}
	if got := z.Mode(); got != "standalone" {
		t.Errorf("mode %q", got)
	}
	conn := z.Client(t, "app:secret")
	for _, node := range []struct {
		path  string
		flags int32
		acl   []zk.ACL
	}{
		{"/kept", 0, zk.WorldACL(zk.PermAll)},
		{"/secret", 0, zk.DigestACL(zk.PermAll, "app", "secret")},
		{"/kept/mortal", zk.FlagEphemeral, zk.WorldACL(zk.PermAll)},
	} {
		if _, err := conn.Create(node.path, []byte("x"), node.flags, node.acl); err != nil {
			t.Fatal(node.path, err)
		}
	}
	if _, _, err := conn.Get("/secret"); err != nil {
		t.Error("with the login:", err)
	}
	if _, _, err := z.Client(t).Get("/secret"); !errors.Is(err, zk.ErrNoAuth) {
		t.Errorf("without a login: %v", err)
	}

	address := z.Address
	z.Restart()
	if z.Address != address {
		t.Errorf("restarted at %s, before %s", z.Address, address)
	}
	other := z.Client(t)
	if _, _, err := other.Get("/kept"); err != nil {
		t.Error("after a restart:", err)
	}
	// The session of before goes on, and takes its node with it when it ends.
	Eventually(t, readyTimeout, func() error {
		if conn.State() != zk.StateHasSession {
			return fmt.Errorf("the first client is not back: %v", conn.State())
		}
		return nil
	})
	if found, _, err := other.Exists("/kept/mortal"); err != nil || !found {
		t.Errorf("an ephemeral node of a living session after a restart: found %v (%v)", found, err)
	}
	conn.Close()
	Eventually(t, 10*time.Second, func() error {
		found, _, err := other.Exists("/kept/mortal")
		if err == nil && found {
			err = errors.New("an ephemeral node outlives its session")
		}
		return err
	})

	z.Wipe()
	if children, _, err := z.Client(t).Children("/"); err != nil || !slices.Equal(children, []string{"zookeeper"}) || z.Address != address {
		t.Errorf("an empty server has %v (%v) at %s", children, err, z.Address)
	}
	stops(t, z.Process)
	if z.Mode() != "" {
		t.Errorf("stopped, and %s", z.Mode())
	}
}

func TestZooKeeperEnsemble(t *testing.T) {
	t.Parallel()
	began := time.Now()
	all := StartEnsemble(t, 3, ZooKeeperOptions{})
	t.Logf("three zookeepers ready after %v", time.Since(began))
	leader := Leader(all)
	if leader == nil {
		t.Fatal("no leader")
	}
	for _, z := range all {
		if open := wildcards(t, z.PID()); len(open) > 0 {
			t.Errorf("%s can be reached from the network: %v", z.name, open)
		}
		if z != leader && z.Mode() != "follower" {
			t.Errorf("%s is %q", z.name, z.Mode())
		}
	}
	if _, err := leader.Client(t).Create("/a", nil, 0, zk.WorldACL(zk.PermAll)); err != nil {
		t.Fatal(err)
	}
	leader.Kill()
	began = time.Now()
	Eventually(t, readyTimeout, func() error {
		if next := Leader(all); next == nil || next == leader {
			return errors.New("no other leader")
		}
		return nil
	})
	t.Logf("another leader after %v", time.Since(began))
	next := Leader(all)
	if found, _, err := next.Client(t).Exists("/a"); err != nil || !found {
		t.Errorf("the other leader has the node: %v (%v)", found, err)
	}
	next.Kill()
	Eventually(t, readyTimeout, func() error {
		for _, z := range all {
			if mode := z.Mode(); mode != "" {
				return fmt.Errorf("without a majority %s is a %s", z.name, mode)
			}
		}
		return nil
	})
	leader.Wipe() // two of three again
	Eventually(t, readyTimeout, func() error {
		if Leader(all) == nil {
			return errors.New("no leader")
		}
		return nil
	})
	next.Restart()
	for _, z := range all {
		if found, _, err := z.Client(t).Exists("/a"); err != nil || !found {
			t.Errorf("%s has the node: %v (%v)", z.name, found, err)
		}
	}
}

func TestZooKeeperTLS(t *testing.T) {
	t.Parallel()
	ca := NewCA(t, "zookeeper")
	began := time.Now()
	z := StartZooKeeper(t, ZooKeeperOptions{TLS: ca, ClientCertificates: true})
	t.Logf("zookeeper with TLS ready after %v", time.Since(began))
	if open := wildcards(t, z.PID()); len(open) > 0 {
		t.Errorf("the server can be reached from the network: %v", open)
	}
	if _, err := z.Client(t).Create("/a", nil, 0, zk.WorldACL(zk.PermAll)); err != nil {
		t.Fatal(err)
	}
	serves := func(z *ZooKeeper, config *tls.Config) error {
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: config}
		conn, err := dialer.DialContext(t.Context(), "tcp", z.TLSAddress)
		if err != nil {
			return err
		}
		defer conn.Close() // nothing is left to be sent
		if _, err := io.WriteString(conn, "srvr"); err != nil {
			return err
		}
		answer, err := io.ReadAll(conn) // TLS 1.3 tells only here that the server does not want us
		if err == nil && mode(string(answer)) == "" {
			err = fmt.Errorf("the answer is %q", answer)
		}
		return err
	}
	trust := ca.Pool()
	with := func(ca *CA) *tls.Config {
		config := ca.ServerTLS(t, "client")
		config.RootCAs = trust
		return config
	}
	if err := serves(z, with(ca)); err != nil {
		t.Error("with a client's certificate:", err)
	}
	if err := serves(z, &tls.Config{RootCAs: ca.Pool()}); err == nil {
		t.Error("a client without a certificate is let in")
	}
	if err := serves(z, with(NewCA(t, "stranger"))); err == nil {
		t.Error("a client of another CA is let in")
	}
	conn := z.connect(t, z.TLSAddress, func(_, address string, timeout time.Duration) (net.Conn, error) {
		return tls.DialWithDialer(&net.Dialer{Timeout: timeout}, "tcp", address, with(ca))
	})
	if found, _, err := conn.Exists("/a"); err != nil || !found {
		t.Errorf("by TLS a node of the other port is found: %v (%v)", found, err)
	}

	open := StartZooKeeper(t, ZooKeeperOptions{TLS: ca})
	if err := serves(open, &tls.Config{RootCAs: ca.Pool()}); err != nil {
		t.Error("without a certificate, where nobody asks for one:", err)
	}
	if err := serves(open, &tls.Config{RootCAs: NewCA(t, "other").Pool()}); err == nil {
		t.Error("the server's certificate is good for another CA")
	}
}
