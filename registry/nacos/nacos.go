// Package nacos reads the services of Nacos: of 1.x servers by polling their HTTP API (type nacos), of 2.x and 3.x servers
// by gRPC, which pushes changes (types nacos2 and nacos3). README.md tells what users see.
//
// nacos.go validates the entry, servers.go knows where the servers are, listing.go finds the services, auth.go logs in,
// convert.go turns answers into facts. Type nacos is poll.go over http.go, the others are push.go over grpc.go.
package nacos

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	// grpcOffset is what Nacos adds to its HTTP port for the gRPC port of clients.
	grpcOffset = 1000
	// defaultTimeout bounds one request.
	defaultTimeout = 5 * time.Second
	// concurrency is how many requests may be on their way to one server at once, from all entries together.
	concurrency = 16
	// maxRate is how many services one entry asks a server for in a second: by HTTP again and again, by gRPC once per
	// connection.
	maxRate, maxSubscribeRate = 500, 2000
	// pageSize is how many services are asked for at once. A server builds each page from the whole list, and in an
	// order of its own, so one big page is cheaper and safer than several.
	pageSize = 10_000
	// steady is how long a server has to be read before its next failure is forgiven at once.
	steady = 10 * time.Second
	// repairPause is the time between two services that are asked for again although the server pushes changes.
	repairPause = time.Second
)

// settings are what the types have in common.
type settings struct {
	env       registry.Env
	servers   []registry.Server // of the entry
	directory *url.URL          // of an address server, without a query; nil means none
	port      uint32            // of the servers that the address server lists
	tenant    string            // the namespace's id
	shown     string            // the namespace in host names
	groups    []string          // sorted
	interval  time.Duration
	timeout   time.Duration
	secret    string // the Secret's name; empty means none
	accessKey string // with secretKey: sign each request
	secretKey registry.Secret
	pageSize  int
	// The pauses of push.go.
	healthPause, repairPause time.Duration
}

// NewHTTP validates an entry of type nacos. It connects to nothing.
func NewHTTP(e registry.Entry, env registry.Env) (registry.Registry, error) {
	s, err := newSettings(e, env)
	if s == nil {
		return nil, err
	}
	return &source{settings: s, read: poll}, err
}

// NewGRPC validates an entry of type nacos2 or nacos3. It connects to nothing.
func NewGRPC(e registry.Entry, env registry.Env) (registry.Registry, error) {
	s, err := newSettings(e, env)
	if s == nil {
		return nil, err
	}
	for _, server := range s.servers {
		if server.Port+grpcOffset > 65535 {
			return nil, errors.Join(err, registry.Fieldf("port", "is %d: write the HTTP port, from which the gRPC port is %d more", server.Port, grpcOffset))
		}
	}
	return &source{settings: s, read: subscribe}, err
}

// newSettings returns nil if nothing of the entry can be used.
func newSettings(e registry.Entry, env registry.Env) (*settings, error) {
	if env.Budgets == nil || env.Logger == nil {
		return nil, errors.New("nacos: Env lacks Budgets or Logger")
	}
	var problems []error
	usable := true
	fatal := func(path, format string, args ...any) {
		problems = append(problems, registry.Fieldf(path, format, args...))
		usable = false
	}
	partial := func(path, format string, args ...any) {
		problems = append(problems, &registry.FieldError{Path: path, Err: fmt.Errorf(format, args...), Partial: true})
	}
	s := &settings{
		env: env, port: cmp.Or(e.Port, 8848), tenant: cmp.Or(strings.TrimSpace(e.NacosNamespaceId), "public"), pageSize: pageSize,
		healthPause: healthPause, repairPause: repairPause,
		interval: e.RefreshInterval.Or(e.NacosRefreshInterval.Or(registry.DefaultRefreshInterval)), timeout: defaultTimeout,
		secret: e.AuthSecretName, accessKey: e.NacosAccessKey, secretKey: e.NacosSecretKey,
	}
	s.shown = cmp.Or(strings.TrimSpace(e.NacosNamespace), s.tenant)
	if e.Port > 65535 {
		fatal("port", "is %d: write the HTTP port of the Nacos servers, 1 to 65535", e.Port)
	}
	var err error
	if s.servers, err = registry.ParseServers("domain", e.Domain, s.port); err != nil {
		problems = append(problems, err)
	}
	if address := strings.TrimSpace(e.NacosAddressServer); address != "" {
		if s.directory, err = parseDirectory(address); err != nil {
			problems = append(problems, &registry.FieldError{Path: "nacosAddressServer", Err: err, Partial: len(s.servers) > 0})
			usable = usable && len(s.servers) > 0
		}
	} else if len(s.servers) == 0 {
		if err == nil {
			fatal("domain", "is empty: write the address of a Nacos server")
		}
		usable = false
	}
	for _, g := range e.NacosGroups {
		if g = strings.TrimSpace(g); g != "" && !slices.Contains(s.groups, g) {
			s.groups = append(s.groups, g)
		}
	}
	if slices.Sort(s.groups); len(s.groups) == 0 {
		s.groups = []string{"DEFAULT_GROUP"}
		partial("nacosGroups", "is empty, so only DEFAULT_GROUP is read: name the groups to read")
	}
	switch {
	case e.NacosTimeout < 0:
		partial("nacosTimeout", "is %d, and %s is used: write a number of milliseconds", e.NacosTimeout, s.timeout)
	case e.NacosTimeout > 0:
		s.timeout = time.Duration(min(max(e.NacosTimeout, 100), 60_000)) * time.Millisecond
	}
	if (e.NacosAccessKey == "") != (e.NacosSecretKey == "") {
		partial("nacosAccessKey", "needs nacosSecretKey, and the reverse: requests are not signed")
	}
	if e.EnableMCPServer != nil && *e.EnableMCPServer {
		partial("enableMCPServer", "is not supported yet: services are read, Model Context Protocol servers are not")
	}
	if !usable {
		return nil, errors.Join(problems...)
	}
	return s, errors.Join(problems...)
}

// source is a configured source of services.
type source struct {
	*settings
	// read reads one server until ctx ends or the server cannot be read any more. It calls fresh when everything has
	// been read once.
	read func(ctx context.Context, s *settings, server registry.Server, sink registry.Sink, fresh func()) error
}

// Run implements registry.Registry. It stays with one server as long as that one answers, and is listed. With another one,
// and with the same one after a broken connection, everything is read anew before the next listing is reported.
func (n *source) Run(ctx context.Context, sink registry.Sink) error {
	servers, err := newServers(n.settings)
	if err != nil {
		return err
	}
	defer servers.close()
	backoff := registry.Backoff{Max: min(n.interval, 10*time.Second)}
	for {
		began := time.Now()
		server, left, err := servers.next(ctx)
		if err == nil {
			err = servers.stay(ctx, server, func(ctx context.Context) error {
				return n.read(ctx, n.settings, server, sink, func() {
					servers.works()
					if time.Since(began) > steady {
						backoff.Reset()
					}
				})
			})
		}
		if ctx.Err() != nil {
			return nil
		}
		sink.Fail(err)
		if left && !final(err) {
			continue // with a server that has not been tried
		}
		if registry.Sleep(ctx, backoff.Next()) != nil {
			return nil
		}
	}
}
