package harness

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"testing"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/servers"
)

// SpringZooKeeperOptions says what application to start. Only App is needed.
type SpringZooKeeperOptions struct {
	// App is the application's name.
	App string
	// InstanceID is the instance's id, which it also answers requests with; empty means App and port, joined by a hyphen.
	InstanceID string
	// IP is where it listens and what it registers; empty means 127.0.0.1.
	IP string
	// Port is where it listens; 0 means a free one.
	Port int
	// SSLPort, if not 0, is a port for TLS that it registers without listening there.
	SSLPort int
	// Root is where in the tree applications are; empty means /services.
	Root string
	// InitialStatus is the status that it registers at first: UP, which empty means, or OUT_OF_SERVICE.
	InitialStatus string
	// Metadata is what it registers beside its own.
	Metadata map[string]string
	// Properties are added to its application.properties, and replace what is there.
	Properties map[string]string
}

// SpringZooKeeper is a Spring Boot application that registers itself in ZooKeeper. When it is killed its node stays as long
// as its session, 4 s with the harness's ZooKeeper.
type SpringZooKeeper struct {
	*Process
	// InstanceID is what GET / answers, and Path its node in ZooKeeper.
	InstanceID, Path string
	// Address is host:port of the application. It stays the same over restarts.
	Address string
}

// StartSpringZooKeeper starts an application that registers in the ZooKeeper at addresses, host:port,..., and waits until it
// has.
func StartSpringZooKeeper(tb testing.TB, addresses string, o SpringZooKeeperOptions) *SpringZooKeeper {
	tb.Helper()
	java := servers.NeedJava(tb, servers.SpringZooKeeper)
	s := &SpringZooKeeper{}
	s.Process = start(tb, "spring zookeeper "+cmp.Or(o.InstanceID, o.App), func(p *Process) (command, error) {
		port := o.Port
		if port == 0 {
			ports, err := freePorts(tb.Context(), 1)
			if err != nil {
				return command{}, err
			}
			port = ports[0]
		}
		ip, root := cmp.Or(o.IP, "127.0.0.1"), cmp.Or(o.Root, "/services")
		s.InstanceID = cmp.Or(o.InstanceID, fmt.Sprintf("%s-%d", o.App, port))
		s.Path = root + "/" + o.App + "/" + s.InstanceID
		s.Address = fmt.Sprintf("%s:%d", ip, port)
		config, err := render(servers.SpringZooKeeper, "application.properties.tmpl", p.dir, map[string]any{
			"App": o.App, "ID": s.InstanceID, "IP": ip, "Port": port, "SSLPort": o.SSLPort, "Root": root,
			"Status": cmp.Or(o.InitialStatus, "UP"), "ZooKeeper": addresses, "Dir": p.dir, "Metadata": properties(o.Metadata),
		})
		if err != nil {
			return command{}, err
		}
		if err := appendProperties(config, o.Properties); err != nil {
			return command{}, err
		}
		ready := func(ctx context.Context) error { return s.listed(ctx, addresses) }
		return springBoot(java, p.dir, 96, "regbridge.SpringZooKeeperMain", config, ready), nil
	})
	return s
}

// listed returns nil if the application answers and ZooKeeper has its node.
func (s *SpringZooKeeper) listed(ctx context.Context, addresses string) error {
	body, err := getOK(ctx, "http://"+s.Address+"/")
	if err != nil {
		return err
	}
	if body != s.InstanceID {
		return fmt.Errorf("%s answers as %q, want %q", s.Address, body, s.InstanceID)
	}
	return askZooKeeper(ctx, addresses, "", func(conn *zk.Conn) error {
		found, _, err := conn.Exists(s.Path)
		if err == nil && !found {
			err = errors.New("zookeeper does not have " + s.Path)
		}
		return err
	})
}

// SetStatus makes the application register another status of itself: UP or OUT_OF_SERVICE. Its node stays the same one.
func (s *SpringZooKeeper) SetStatus(status string) {
	s.tb.Helper()
	s.post("http://"+s.Address+"/status?value="+url.QueryEscape(status), nil)
}

// SetMetadata makes the application add to the metadata that it registers. Its node stays the same one.
func (s *SpringZooKeeper) SetMetadata(metadata map[string]string) {
	s.tb.Helper()
	s.post("http://"+s.Address+"/metadata", metadata)
}
