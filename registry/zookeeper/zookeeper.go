// Package zookeeper reads the services that Dubbo, Spring Cloud and other users of Curator register in ZooKeeper. README.md
// tells what users see.
//
// zookeeper.go validates the entry and goes from server to server; conn.go is one session with one server; reader.go reads
// its nodes and keeps watches on them; tree.go knows which nodes there are, and turns them into services, and export.go does
// so for what Dubbo's applications export. The other files decode nodes.
package zookeeper

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/regbridge/regbridge/registry"
)

const (
	defaultPort = 2181
	// maxBackoff bounds the pause between two attempts to find a server.
	maxBackoff = 10 * time.Second

	dubboRoot    = "/dubbo"
	servicesRoot = "/services"
)

// zookeeper is a configured source of services.
type zookeeper struct {
	env      registry.Env
	servers  []registry.Server
	chroot   string   // the path under which everything is, empty if there is none
	roots    []string // of services in Curator's form; the root of the tree is empty
	secret   string   // the Secret that must hold user and password, empty where the entry names none
	interval time.Duration
	// timeout is the session's, and bounds each request.
	timeout time.Duration
	// settle is how long an endpoint must be gone to be believed gone, since Dubbo's providers register again when their
	// configuration changes, under another name.
	settle time.Duration
	// move is how long a provider that is gone at interface level may be kept until it is known what it exports at application
	// level.
	move time.Duration
	// repair is the time in which each node is read once more even if nothing tells that it changed.
	repair time.Duration
}

// New validates an entry of type zookeeper. It connects to nothing.
func New(e registry.Entry, env registry.Env) (registry.Registry, error) {
	if env.Budgets == nil || env.Logger == nil {
		return nil, errors.New("zookeeper: Env lacks Budgets or Logger")
	}
	var problems []error
	if e.Port > 65535 {
		problems = append(problems, registry.Fieldf("port", "is %d: write the port of the ZooKeeper servers, 1 to 65535", e.Port))
	}
	list, chroot, err := splitChroot(e.Domain)
	if err != nil {
		return nil, errors.Join(append(problems, err)...)
	}
	servers, err := registry.ParseServers("domain", list, cmp.Or(e.Port, defaultPort))
	if len(servers) == 0 && err == nil {
		err = registry.Fieldf("domain", "names no server: write the addresses of the ZooKeeper servers, such as zk-1:2181,zk-2:2181")
	}
	problems = append(problems, err)
	if len(servers) == 0 {
		return nil, errors.Join(problems...)
	}
	roots, err := serviceRoots(e.ZkServicesPath)
	problems = append(problems, err)
	interval := e.Interval()
	return &zookeeper{
		env:      env,
		servers:  servers,
		chroot:   chroot,
		roots:    roots,
		secret:   e.AuthSecretName,
		interval: interval,
		timeout:  min(max(interval, 2*time.Second), 10*time.Second),
		settle:   100 * time.Millisecond,
		move:     5 * time.Second,
		repair:   10 * time.Minute,
	}, errors.Join(problems...)
}

// splitChroot takes the path off the end of a connect string such as zk-1:2181,zk-2:2181/prod.
func splitChroot(domain string) (servers, chroot string, err error) {
	at := strings.IndexByte(domain, '/')
	if at < 0 || strings.Contains(domain, "://") { // ParseServers tells what is wrong with a URL
		return domain, "", nil
	}
	servers, chroot = domain[:at], strings.TrimRight(strings.TrimSpace(domain[at:]), "/")
	if strings.Contains(chroot, ",") {
		return "", "", registry.Fieldf("domain", "has a path that is not at its end: write it once, behind the last server")
	}
	if err := checkPath(chroot); err != nil {
		return "", "", registry.Fieldf("domain", "the path %q behind the servers %w", chroot, err)
	}
	return servers, chroot, nil
}

// serviceRoots gives the folders of services: /services and those of the entry, each once.
func serviceRoots(paths []string) ([]string, error) {
	roots := []string{servicesRoot}
	known := map[string]bool{servicesRoot: true, dubboRoot: true}
	var problems []error
	for n, path := range paths {
		path = strings.TrimRight(strings.TrimSpace(path), "/")
		if known[path] {
			continue
		}
		known[path] = true
		err := checkPath(path)
		if err == nil && strings.HasPrefix(path, dubboRoot+"/") {
			err = errors.New("is inside of /dubbo, which is read as Dubbo writes it: leave it out")
		}
		if err != nil {
			problems = append(problems, &registry.FieldError{
				Path: fmt.Sprintf("zkServicesPath[%d]", n), Err: fmt.Errorf("%q %w", path, err), Partial: true,
			})
			continue
		}
		roots = append(roots, path)
	}
	return roots, errors.Join(problems...)
}

// checkPath tells what is wrong with a path without a slash at its end. The empty one is the root.
func checkPath(path string) error {
	if path == "" {
		return nil
	}
	if !strings.HasPrefix(path, "/") {
		return errors.New("does not begin with a slash: write a path such as /services")
	}
	for part := range strings.SplitSeq(path[1:], "/") {
		if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, unicode.IsControl) {
			return fmt.Errorf("has the part %q, which no path in ZooKeeper has", part)
		}
	}
	return nil
}

// Run implements registry.Registry. It stays with one server as long as that one answers. With the next session, at
// whichever server, everything is read anew before the next listing is reported.
func (z *zookeeper) Run(ctx context.Context, sink registry.Sink) error {
	var closing sync.WaitGroup // of sessions
	defer closing.Wait()
	t := newTree(z, sink)
	servers := append([]registry.Server(nil), z.servers...)
	rand.Shuffle(len(servers), func(i, j int) { servers[i], servers[j] = servers[j], servers[i] })
	backoff := registry.Backoff{Min: 100 * time.Millisecond, Max: min(z.interval, maxBackoff)}
	for turn := 0; ; turn++ {
		c, err := z.connect(ctx, servers, &turn, sink, &closing)
		if err == nil {
			begun := time.Now()
			err = t.follow(ctx, c)
			if time.Since(begun) > z.interval {
				backoff.Reset()
			}
			if ctx.Err() == nil {
				sink.Fail(err)
			}
		}
		if ctx.Err() != nil || registry.Sleep(ctx, backoff.Next()) != nil {
			return nil
		}
	}
}

// connect tries all servers once, from the one whose turn it is, and reports each that does not work. A name may stand for
// several servers, which are tried in any order.
func (z *zookeeper) connect(ctx context.Context, servers []registry.Server, turn *int, sink registry.Sink,
	closing *sync.WaitGroup,
) (*conn, error) {
	var err error
	for range servers {
		server := servers[*turn%len(servers)]
		var addresses []string
		addresses, err = z.resolve(ctx, server)
		for _, address := range addresses {
			var c *conn
			if c, err = z.open(ctx, server, address, closing); err == nil || ctx.Err() != nil {
				return c, err
			}
			sink.Fail(err)
		}
		if len(addresses) == 0 {
			sink.Fail(err)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		*turn++
	}
	return nil, err
}
