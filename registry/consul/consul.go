// Package consul reads the services of HashiCorp Consul. README.md tells what users see.
//
// consul.go validates the entry and goes from agent to agent; session.go reads one agent; client.go makes the requests;
// convert.go turns answers into facts.
package consul

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	defaultPort = 8500
	// maxBackoff bounds the pause between two attempts to reach an agent.
	maxBackoff = 10 * time.Second
)

// consul is a configured source of services.
type consul struct {
	env      registry.Env
	servers  []registry.Server
	query    url.Values // of each request
	filter   filter
	interval time.Duration
	timeout  time.Duration // of a request, beside what it may wait
	// secret is the Secret that must hold the token, empty where the entry names none.
	secret string
	// datacenter is empty where the entry names none: then it is the agent's own.
	datacenter string
	// ownService says that the namespace and partition are those in which the servers register themselves.
	ownService bool
}

// New validates an entry of type consul. It connects to nothing.
func New(e registry.Entry, env registry.Env) (registry.Registry, error) {
	if env.Budgets == nil || env.Logger == nil {
		return nil, errors.New("consul: Env lacks Budgets or Logger")
	}
	var problems []error
	servers, err := registry.ParseServers("domain", e.Domain, cmp.Or(e.Port, defaultPort))
	if len(servers) == 0 {
		if err == nil {
			err = registry.Fieldf("domain", "is empty: write the address of a Consul agent")
		}
		return nil, errors.Join(err, checkPort(e))
	}
	problems = append(problems, err, checkPort(e))
	datacenter := strings.TrimSpace(e.ConsulDatacenter)
	if other := strings.TrimSpace(e.ConsulDataCenter); datacenter == "" {
		datacenter = other
	} else if other != "" && other != datacenter {
		problems = append(problems, &registry.FieldError{
			Path:    "consulDataCenter",
			Err:     fmt.Errorf("is %q, but consulDatacenter is %q, which is used: remove one of the two", other, datacenter),
			Partial: true,
		})
	}
	namespace, partition := strings.TrimSpace(e.ConsulNamespace), strings.TrimSpace(e.ConsulPartition)
	query := url.Values{}
	for key, value := range map[string]string{"dc": datacenter, "ns": namespace, "partition": partition} {
		if value != "" {
			query.Set(key, value)
		}
	}
	interval := e.RefreshInterval.Or(e.ConsulRefreshInterval.Or(registry.DefaultRefreshInterval))
	c := &consul{
		env:     env,
		servers: servers,
		query:   query,
		filter: filter{
			tag:     strings.ToLower(strings.TrimSpace(e.ConsulServiceTag)),
			warning: e.ConsulPassingOnly != nil && !*e.ConsulPassingOnly,
		},
		interval:   interval,
		timeout:    min(max(interval, 2*time.Second), 10*time.Second),
		secret:     e.AuthSecretName,
		datacenter: datacenter,
		ownService: (namespace == "" || namespace == "default") && (partition == "" || partition == "default"),
	}
	return c, errors.Join(problems...)
}

func checkPort(e registry.Entry) error {
	if e.Port > 65535 {
		return registry.Fieldf("port", "is %d: write the port of the Consul agents, 1 to 65535", e.Port)
	}
	return nil
}

// memory is what a Run keeps from one agent to the next.
type memory struct {
	known      map[string]bool // the ids of the last listing
	datacenter string          // of the answers
	consul     bool            // a listing had the servers' own service in it
	listed     bool            // there was a listing
	filtered   bool            // the last listing was cut by the token's policies
	whole      map[string]bool // the services of which all instances were seen once
}

// Run implements registry.Registry. It stays with one agent as long as that one answers. With another agent, and with
// the same one after a broken connection, everything is read anew before the next listing is reported.
func (c *consul) Run(ctx context.Context, sink registry.Sink) error {
	m := &memory{known: map[string]bool{}, whole: map[string]bool{}, datacenter: c.datacenter}
	backoff := registry.Backoff{Max: min(c.interval, maxBackoff)}
	untried := len(c.servers) // in this round
	for server := 0; ; {
		s, err := newSession(c, c.servers[server], m, sink)
		if err != nil {
			return err
		}
		err = s.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		sink.Fail(err)
		if s.synced {
			backoff.Reset()
			untried = len(c.servers)
		}
		if !errors.Is(err, errReset) {
			server = (server + 1) % len(c.servers)
			if untried--; untried > 0 {
				continue
			}
			untried = len(c.servers)
		}
		if registry.Sleep(ctx, backoff.Next()) != nil {
			return nil
		}
	}
}
