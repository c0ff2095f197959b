package harness

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/servers"
)

// The interfaces that Dubbo providers provide. Greeter's one method, greet, takes a name and answers with ID of the
// provider, " greets " and the name. Stock is there with DubboOptions.Two, in version 2.0.0.
const (
	DubboGreeter = "demo.api.Greeter"
	DubboStock   = "regbridge.DubboProvider$Stock"
)

// A DubboProtocol is what a provider speaks on a port: "dubbo", "tri" and so on.
type DubboProtocol struct {
	Name string
	// Port is where it listens; 0 means a free one.
	Port int
}

// DubboOptions says what provider to start. Only ZooKeeper is needed.
type DubboOptions struct {
	// Version is that of Dubbo, 3 (3.3) or 2 (2.7); 0 means 3.
	Version int
	// ZooKeeper is host:port of the servers, separated by commas.
	ZooKeeper string
	// App is the application's name; empty means demo.
	App string
	// Mode is what is registered, and where: "interface" below /dubbo, "instance" below /services, or "all"; with 2.7
	// "interface" or "service", which is below /services. Empty means "interface".
	Mode string
	// Protocols are what the services are provided by; none means "dubbo" on a free port.
	Protocols []DubboProtocol
	// Group, ServiceVersion and Weight are those of Greeter; Dubbo registers none that is empty, and no weight of 0.
	Group, ServiceVersion string
	Weight                int
	// Two provides Stock beside Greeter.
	Two bool
	// Metadata is "local", where consumers ask the provider, or "remote", where it is in ZooKeeper; empty means "local".
	Metadata string
	// User and Password, if not empty, are its login at ZooKeeper. With 3.3 they are needed to read what it registers; 2.7
	// leaves that open to everybody.
	User, Password string
	// SessionTimeout is how long ZooKeeper waits for a provider that is dead; 0 means 2 s. The server has its own limits.
	SessionTimeout time.Duration
	// Address is what it registers, an IPv4 address that is not loopback, which Dubbo refuses; empty means 10.0.0.7.
	Address string
	// Bind is the address that it listens on; empty means 127.0.0.1, where it cannot be reached as registered. In a
	// namespace (see InNamespace) the two can be the same.
	Bind string
}

// Dubbo is one provider, an application of Dubbo's.
type Dubbo struct {
	*Process
	// ID is what greet answers with: Address and port of the first protocol.
	ID string
	// Address is what is registered. It stays the same over restarts, as the ports do.
	Address string
	// Protocols have their ports.
	Protocols []DubboProtocol

	options DubboOptions
}

// StartDubbo starts a provider and waits until its services are in ZooKeeper.
func StartDubbo(tb testing.TB, o DubboOptions) *Dubbo {
	tb.Helper()
	o.Version, o.App, o.Mode = cmp.Or(o.Version, 3), cmp.Or(o.App, "demo"), cmp.Or(o.Mode, "interface")
	o.Metadata, o.SessionTimeout = cmp.Or(o.Metadata, "local"), cmp.Or(o.SessionTimeout, 2*time.Second)
	o.Address, o.Bind = cmp.Or(o.Address, "10.0.0.7"), cmp.Or(o.Bind, "127.0.0.1")
	if len(o.Protocols) == 0 {
		o.Protocols = []DubboProtocol{{Name: "dubbo"}}
	}
	modes := map[int][]string{2: {"interface", "service"}, 3: {"interface", "instance", "all"}}
	if !slices.Contains(modes[o.Version], o.Mode) {
		tb.Fatalf("start dubbo: version %d with mode %q: the modes are %v", o.Version, o.Mode, modes)
	}
	if ip := net.ParseIP(o.Address); ip == nil || ip.IsLoopback() {
		tb.Fatalf("start dubbo: address %q: it registers no loopback address and no name", o.Address)
	}
	server := servers.Dubbo3
	if o.Version == 2 {
		server = servers.Dubbo2
	}
	java := servers.NeedJava(tb, server)
	d := &Dubbo{Address: o.Address, options: o}
	d.Process = start(tb, fmt.Sprintf("dubbo %s of %s", o.Address, o.App), func(p *Process) (command, error) {
		d.Process = p // ready reads its log
		ports, err := freePorts(tb.Context(), len(o.Protocols))
		if err != nil {
			return command{}, err
		}
		d.Protocols = nil
		for i, protocol := range o.Protocols {
			protocol.Port = cmp.Or(protocol.Port, ports[i])
			d.Protocols = append(d.Protocols, protocol)
		}
		d.ID = fmt.Sprintf("%s:%d", o.Address, d.Protocols[0].Port)
		args, err := d.arguments(java, p.dir)
		return command{program: java.Program, args: args, ready: d.ready, within: 2 * readyTimeout}, err
	})
	return d
}

// arguments are those of java. Dubbo does not want to listen on loopback: an address that it has from a name of ours it takes.
func (d *Dubbo) arguments(java servers.Java, dir string) ([]string, error) {
	const name = "bind.test"
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	hosts := filepath.Join(dir, "hosts")
	text := fmt.Sprintf("127.0.0.1 localhost %s\n%s %s\n", host, d.options.Bind, name)
	if err := os.WriteFile(hosts, []byte(text), 0o600); err != nil {
		return nil, err
	}
	var protocols []string
	for _, protocol := range d.Protocols {
		protocols = append(protocols, fmt.Sprintf("%s:%d", protocol.Name, protocol.Port))
	}
	o := d.options
	first, others, _ := strings.Cut(o.ZooKeeper, ",")
	registry := "zookeeper://" + first
	if others != "" {
		registry += "?backup=" + others
	}
	args := append(javaFlags(dir, 96), "--add-opens=java.base/java.lang=ALL-UNNAMED", "-Djava.net.preferIPv4Stack=true",
		"-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
		"-Djdk.net.hosts.file="+hosts, "-DDUBBO_IP_TO_BIND="+name, "-DDUBBO_IP_TO_REGISTRY="+o.Address,
		"-Dapp="+o.App, "-Dregistry="+registry, "-Dmode="+o.Mode, "-Dmetadata="+o.Metadata, "-Did="+d.ID,
		"-Dprotocols="+strings.Join(protocols, ","), fmt.Sprintf("-Dsession=%d", o.SessionTimeout.Milliseconds()),
		fmt.Sprintf("-Dtwo=%v", o.Two))
	for name, value := range map[string]string{"group": o.Group, "version": o.ServiceVersion, "user": o.User, "password": o.Password} {
		if value != "" {
			args = append(args, "-D"+name+"="+value)
		}
	}
	if o.Weight != 0 {
		args = append(args, fmt.Sprintf("-Dweight=%d", o.Weight))
	}
	return append(args, "-cp", java.Classes+":"+filepath.Join(java.Lib, "*"), "regbridge.DubboProvider"), nil
}

// ready returns nil when the provider says that it is, and is in ZooKeeper.
func (d *Dubbo) ready(ctx context.Context) error {
	if !strings.Contains(d.log(true), "READY\n") {
		return errors.New("dubbo does not say READY yet")
	}
	login := ""
	if d.options.User != "" {
		login = d.options.User + ":" + d.options.Password
	}
	return askZooKeeper(ctx, d.options.ZooKeeper, login, d.listed)
}

// listed returns nil if ZooKeeper has every node of Greeter's.
func (d *Dubbo) listed(conn *zk.Conn) error {
	if d.options.Mode == "interface" || d.options.Mode == "all" {
		return d.provided(conn)
	}
	children, _, err := conn.Children("/services/" + d.options.App)
	if err == nil && !slices.Contains(children, d.ID) {
		err = fmt.Errorf("the instances of %s are %v, without %s", d.options.App, children, d.ID)
	}
	return err
}

// provided returns nil if ZooKeeper has all URLs of Greeter's.
func (d *Dubbo) provided(conn *zk.Conn) error {
	children, _, err := conn.Children("/dubbo/" + DubboGreeter + "/providers")
	if err != nil {
		return fmt.Errorf("look for the providers of %s: %w", DubboGreeter, err)
	}
	var all []string
	for _, child := range children {
		provider, err := url.QueryUnescape(child)
		if err != nil {
			return fmt.Errorf("provider %q: %w", child, err)
		}
		all = append(all, provider)
	}
	text := strings.Join(all, "\n")
	for _, protocol := range d.Protocols {
		want := fmt.Sprintf("%s://%s:%d/", protocol.Name, d.Address, protocol.Port)
		if !strings.Contains(text, want) {
			return fmt.Errorf("no provider of %s is %s: %s", DubboGreeter, want, text)
		}
	}
	return nil
}
