package harness

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/servers"
)

// ZooKeeperOptions says what server to start. The zero value is one for everybody, with sessions of 4 s at most.
type ZooKeeperOptions struct {
	// TLS, if not nil, opens a port for TLS, beside the other one, with a certificate of this CA for 127.0.0.1 and localhost.
	TLS *CA
	// ClientCertificates makes that port ask for certificates of the CA and refuse clients without one.
	ClientCertificates bool
	// TickTime is the unit of the server's times; 0 means 200 ms. Sessions time out after 2 to 20 ticks.
	TickTime time.Duration
	// Heap is the limit of the Java heap in MB; 0 means 64, which is enough for some ten thousand nodes.
	Heap int
	// Properties are added to the server's zoo.cfg, and replace what is there.
	Properties map[string]string
}

// ZooKeeper is one server, by itself or of an ensemble. What it holds outlives a restart, sessions included, unless they
// time out meanwhile.
type ZooKeeper struct {
	*Process
	// Address is host:port of the clients' port, and TLSAddress that of the one for TLS, empty without. They stay the same
	// over restarts.
	Address, TLSAddress string

	tls          *tls.Config  // to ask at TLSAddress
	number, size int          // in the ensemble, from 1, and of it; 0 without one
	others       []*ZooKeeper // of the ensemble
}

// StartZooKeeper starts a server and waits until it serves.
func StartZooKeeper(tb testing.TB, o ZooKeeperOptions) *ZooKeeper {
	tb.Helper()
	java := servers.NeedJava(tb, servers.ZooKeeper)
	z := &ZooKeeper{}
	z.Process = start(tb, "zookeeper", func(p *Process) (command, error) {
		ports, err := freePorts(tb.Context(), 2)
		if err != nil {
			return command{}, err
		}
		return z.command(p, java, o, ports, nil)
	})
	return z
}

// StartEnsemble starts n servers that are one ZooKeeper and waits until all of them serve. They may be killed, paused and
// restarted one by one.
func StartEnsemble(tb testing.TB, n int, o ZooKeeperOptions) []*ZooKeeper {
	tb.Helper()
	java := servers.NeedJava(tb, servers.ZooKeeper)
	ports, err := freePorts(tb.Context(), 4*n) // known to all of them before the first one starts
	if err != nil {
		tb.Fatal(err)
	}
	var nodes []string
	for i := range n {
		nodes = append(nodes, fmt.Sprintf("%d=127.0.0.1:%d:%d", i+1, ports[4*i], ports[4*i+1]))
	}
	var all []*ZooKeeper
	for i := range n {
		z := &ZooKeeper{number: i + 1, size: n, others: all}
		z.Process = start(tb, fmt.Sprintf("zookeeper %d", z.number), func(p *Process) (command, error) {
			return z.command(p, java, o, ports[4*i+2:4*i+4], nodes)
		})
		all = append(all, z)
	}
	for _, z := range all {
		z.others = slices.DeleteFunc(slices.Clone(all), func(other *ZooKeeper) bool { return other == z })
		if err := z.waitReady(z.run()); err != nil { // the first ones were not asked to serve when they started
			tb.Fatal(err)
		}
	}
	return all
}

// Leader is the server that leads the ensemble, nil if there is none at the moment.
func Leader(ensemble []*ZooKeeper) *ZooKeeper {
	i := slices.IndexFunc(ensemble, func(z *ZooKeeper) bool { return z.Mode() == "leader" })
	if i < 0 {
		return nil
	}
	return ensemble[i]
}

func (z *ZooKeeper) command(p *Process, java servers.Java, o ZooKeeperOptions, ports []int, nodes []string) (command, error) {
	z.Address = loopback(ports[0])
	tlsPort, clientAuth := 0, "none"
	if o.TLS != nil {
		tlsPort, z.TLSAddress = ports[1], loopback(ports[1])
		if o.ClientCertificates {
			clientAuth = "need"
		}
		z.tls = o.TLS.ServerTLS(p.tb, "harness") // the certificate is for clients as well
		z.tls.RootCAs = o.TLS.Pool()
		cert, key := o.TLS.Issue(p.tb, "localhost", "127.0.0.1")
		err := errors.Join(os.WriteFile(filepath.Join(p.dir, "server.pem"), []byte(key+cert), 0o600),
			os.WriteFile(filepath.Join(p.dir, "ca.pem"), []byte(o.TLS.PEM), 0o600))
		if err != nil {
			return command{}, err
		}
	}
	config, err := render(servers.ZooKeeper, "zoo.cfg.tmpl", p.dir, map[string]any{
		"Dir": p.dir, "Tick": cmp.Or(o.TickTime, 200*time.Millisecond).Milliseconds(), "Nodes": nodes,
		"Port": ports[0], "TLSPort": tlsPort, "ClientAuth": clientAuth,
	})
	if err != nil {
		return command{}, err
	}
	if err := appendProperties(config, o.Properties); err != nil {
		return command{}, err
	}
	if err := z.empty(p.dir); err != nil {
		return command{}, err
	}
	args := javaFlags(p.dir, cmp.Or(o.Heap, 64))
	args = append(args, "-Dzookeeper.jmx.log4j.disable=true",
		"-Dorg.slf4j.simpleLogger.log.org.apache.zookeeper.server.NIOServerCnxn=warn", // would tell of every four-letter word
		"-Dorg.slf4j.simpleLogger.log.org.apache.zookeeper.server.NettyServerCnxn=warn",
		"-Dorg.slf4j.simpleLogger.log.org.apache.zookeeper.server.command=warn",
		"-cp", filepath.Join(java.Lib, "*"),
		"org.apache.zookeeper.server.quorum.QuorumPeerMain", config)
	return command{program: java.Program, args: args, ready: z.ready}, nil
}

// empty removes all that the server of that folder remembers.
func (z *ZooKeeper) empty(dir string) error {
	data := filepath.Join(dir, "data")
	if err := os.RemoveAll(data); err != nil {
		return err
	}
	if err := os.Mkdir(data, 0o755); err != nil || z.number == 0 {
		return err
	}
	return os.WriteFile(filepath.Join(data, "myid"), []byte(strconv.Itoa(z.number)), 0o600)
}

// ready returns nil if the server serves, or belongs to an ensemble that cannot serve as long as no more of it runs.
func (z *ZooKeeper) ready(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, time.Second) // asked too early it never closes the connection
	defer cancel()
	answer, err := z.fourLetter(short, "srvr")
	if err != nil {
		return err
	}
	if answer == "" {
		return errors.New("zookeeper does not answer srvr yet")
	}
	running := 1
	for _, other := range z.others {
		if other.Running() {
			running++
		}
	}
	if z.tls != nil { // that port is opened after the other one
		dialer := tls.Dialer{Config: z.tls}
		conn, err := dialer.DialContext(short, "tcp", z.TLSAddress)
		if err != nil {
			return err
		}
		if err := conn.Close(); err != nil {
			return err
		}
	}
	if mode(answer) == "" && 2*running > z.size {
		return fmt.Errorf("zookeeper does not serve yet: %s", answer)
	}
	return nil
}

// mode is what srvr says that the server is, empty if it does not serve.
func mode(srvr string) string {
	for line := range strings.Lines(srvr) {
		if mode, ok := strings.CutPrefix(line, "Mode: "); ok {
			return strings.TrimSpace(mode)
		}
	}
	return ""
}

// Mode is "standalone", "leader" or "follower", and empty if the server does not serve: it is dead, paused, or of an
// ensemble without a majority.
func (z *ZooKeeper) Mode() string {
	answer, err := z.fourLetter(z.tb.Context(), "srvr")
	if err != nil {
		return ""
	}
	return mode(answer)
}

// FourLetter asks the server in its plain old way: srvr, mntr, cons, dump, wchs, wchp, stat and so on.
func (z *ZooKeeper) FourLetter(word string) string {
	z.tb.Helper()
	answer, err := z.fourLetter(z.tb.Context(), word)
	if err != nil {
		z.tb.Fatalf("ask %s at %s for %s: %v", z.name, z.Address, word, err)
	}
	return answer
}

func (z *ZooKeeper) fourLetter(ctx context.Context, word string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", z.Address)
	if err != nil {
		return "", err
	}
	defer conn.Close() // nothing is left to be sent
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, word); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// Wipe kills the server and starts it again on the same ports as a new one that holds nothing. A server of an ensemble gets
// all back from the others, if there are enough of them.
func (z *ZooKeeper) Wipe() {
	z.tb.Helper()
	z.Kill()
	if err := z.start(func(p *Process) (command, error) { return p.command, z.empty(p.dir) }); err != nil {
		z.tb.Fatal(err)
	}
}

// Client is a connection to the server that ends with the test; it has a session already. auth are logins for digest
// access lists, as user:password.
func (z *ZooKeeper) Client(tb testing.TB, auth ...string) *zk.Conn {
	tb.Helper()
	return z.connect(tb, z.Address, net.DialTimeout, auth...)
}

// connect opens a session through connections that dial makes.
func (z *ZooKeeper) connect(tb testing.TB, address string, dial zk.Dialer, auth ...string) *zk.Conn {
	tb.Helper()
	conn, closed, err := openZooKeeper(tb.Context(), address, dial, auth...)
	if err != nil {
		tb.Fatalf("%s: %v", z.name, err)
	}
	tb.Cleanup(closed)
	return conn
}

// askZooKeeper does something with a connection to one of the servers, host:port,..., logged in if login is not empty.
func askZooKeeper(ctx context.Context, addresses, login string, ask func(*zk.Conn) error) error {
	var auth []string
	if login != "" {
		auth = append(auth, login)
	}
	conn, closed, err := openZooKeeper(ctx, addresses, net.DialTimeout, auth...)
	if err != nil {
		return err
	}
	defer closed()
	return ask(conn)
}

// openZooKeeper returns a connection that has its session. closed ends both and waits until they have ended.
func openZooKeeper(ctx context.Context, addresses string, dial zk.Dialer, auth ...string) (_ *zk.Conn, closed func(), _ error) {
	impatiently := func(network, address string, timeout time.Duration) (net.Conn, error) {
		conn, err := dial(network, address, timeout)
		return impatient{conn}, err
	}
	conn, events, err := zk.Connect(strings.Split(addresses, ","), clientSession, zk.WithDialer(impatiently),
		zk.WithLogger(quiet{}))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to zookeeper at %s: %w", addresses, err)
	}
	closed = func() {
		conn.Close()
		for range events { // until it has ended
		}
	}
	err = wait(ctx, readyTimeout/2, func() error {
		if state := conn.State(); state != zk.StateHasSession {
			return fmt.Errorf("connect to zookeeper at %s: %v", addresses, state)
		}
		return nil
	})
	for _, login := range auth {
		if err == nil {
			err = conn.AddAuth("digest", []byte(login))
		}
	}
	if err != nil {
		closed()
		return nil, nil, err
	}
	return conn, closed, nil
}

// clientSession is the time after which our clients' sessions end without a sign of life, if the server takes as much.
const clientSession = 10 * time.Second

// impatient is a connection of a client that waits no longer for an answer than a client with a session would. The library
// gives a server ten times as long for its first answer, and a server that is just starting may never give it. It is less than
// the session's time, so that the next attempt finds the session alive.
type impatient struct{ net.Conn }

func (c impatient) SetReadDeadline(t time.Time) error {
	if limit := time.Now().Add(clientSession * 7 / 10); t.After(limit) {
		t = limit
	}
	return c.Conn.SetReadDeadline(t)
}

// quiet logs nothing: what matters comes back as an error.
type quiet struct{}

func (quiet) Printf(string, ...any) {}

// appendProperties adds lines to a file of Java properties, where of two with the same name the last one counts.
func appendProperties(path string, values map[string]string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		_, werr := fmt.Fprintf(f, "\n%s=%s", name, property(values[name]))
		err = errors.Join(err, werr)
	}
	return errors.Join(err, f.Close())
}

// property is a value as it is written in a file of Java properties, which is ISO 8859-1.
func property(value string) string {
	var out strings.Builder
	for i, unit := range utf16.Encode([]rune(value)) {
		switch {
		case unit == '\\', i == 0 && unit == ' ':
			out.WriteByte('\\')
			out.WriteByte(byte(unit))
		case unit < ' ', unit > '~':
			_, _ = fmt.Fprintf(&out, "\\u%04x", unit)
		default:
			out.WriteByte(byte(unit))
		}
	}
	return out.String()
}

// properties is property of each value.
func properties(values map[string]string) map[string]string {
	out := map[string]string{}
	for name, value := range values {
		out[name] = property(value)
	}
	return out
}

// javaFlags keep a server on the Java virtual machine small and quick to start. heap is in MB.
func javaFlags(dir string, heap int) []string {
	return []string{
		"-Xms24m", fmt.Sprintf("-Xmx%dm", heap), "-Xss512k", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
		"-Djava.io.tmpdir=" + dir, "-Duser.home=" + dir,
	}
}
