package harness

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/test/servers"
)

// ConsulOptions says what agent to start. The zero value is an agent without access control.
type ConsulOptions struct {
	// ACL turns access control on: whoever has no token may do nothing.
	ACL bool
	// Keep lets Restart(false) find the data of before, at the price of 2 s more per start.
	Keep bool
	// Datacenter is the data centre's name; empty means dc1.
	Datacenter string
	// Config is further configuration in HCL.
	Config string
}

// Consul is one agent, a server of its own data centre. Its node is named "t".
type Consul struct {
	*Process
	// Address is host:port of the HTTP API. It stays the same over restarts.
	Address string
	// Token may do everything; it is empty without ACL.
	Token string
	keep  bool
}

// StartConsul starts an agent and waits until it has a leader and serves its catalog.
func StartConsul(tb testing.TB, o ConsulOptions) *Consul {
	tb.Helper()
	program := servers.Need(tb, servers.Consul)
	c := &Consul{keep: o.Keep}
	config := o.Config + `
disable_update_check = true
connect { enabled = false }
ports { grpc = -1 grpc_tls = -1 }
`
	if o.ACL {
		c.Token = "3e8e1f0a-5a0e-4b1e-9d4e-6a8f2f7c9b11"
		config += fmt.Sprintf("acl { enabled = true default_policy = \"deny\" tokens { initial_management = %q agent = %q } }\n",
			c.Token, c.Token)
	}
	if o.Keep {
		config += "performance { raft_multiplier = 1 }\n"
	}
	c.Process = start(tb, "consul", func(p *Process) (command, error) {
		ports, err := freePorts(tb.Context(), 3)
		if err != nil {
			return command{}, err
		}
		c.Address = loopback(ports[0])
		args := []string{
			"agent", "-node=t", "-bind=127.0.0.1", "-client=127.0.0.1", "-log-level=warn", "-config-file=c.hcl",
			"-http-port=" + strconv.Itoa(ports[0]), "-server-port=" + strconv.Itoa(ports[1]),
			"-serf-lan-port=" + strconv.Itoa(ports[2]), "-serf-wan-port=-1", "-dns-port=-1",
		}
		if o.Datacenter != "" {
			args = append(args, "-datacenter="+o.Datacenter)
		}
		if o.Keep {
			args = append(args, "-server", "-bootstrap-expect=1", "-data-dir=data")
		} else {
			args = append(args, "-dev")
		}
		err = os.WriteFile(filepath.Join(p.dir, "c.hcl"), []byte(config), 0o600)
		return command{program: program, args: args, ready: c.ready}, err
	})
	return c
}

func (c *Consul) ready(ctx context.Context) error {
	var leader string
	if err := c.call(ctx, http.MethodGet, "/v1/status/leader", nil, &leader); err != nil {
		return err
	}
	if leader == "" {
		return errors.New("consul has no leader yet")
	}
	var self []api.ServiceEntry
	if err := c.call(ctx, http.MethodGet, "/v1/health/service/consul?passing", nil, &self); err != nil {
		return err
	}
	if len(self) == 0 {
		return errors.New("consul does not list itself yet")
	}
	return nil
}

// Restart kills the agent and starts it again on the same ports: with nothing in its catalog if empty, else with what
// it held, for which Keep must be set.
func (c *Consul) Restart(empty bool) {
	c.tb.Helper()
	if !empty && !c.keep {
		c.tb.Fatal("Restart(false) needs ConsulOptions.Keep")
	}
	c.Kill()
	if empty {
		if err := os.RemoveAll(filepath.Join(c.dir, "data")); err != nil {
			c.tb.Fatal(err)
		}
	}
	c.Process.Restart()
}

// Call does one request to the HTTP API with Token. in, if not nil, is sent as JSON; out, if not nil, is decoded from it.
func (c *Consul) Call(method, path string, in, out any) {
	c.tb.Helper()
	if err := c.call(c.tb.Context(), method, path, in, out); err != nil {
		c.tb.Fatal(err)
	}
}

func (c *Consul) call(ctx context.Context, method, path string, in, out any) error {
	status, body, err := call(ctx, method, "http://"+c.Address+path, http.Header{"X-Consul-Token": {c.Token}}, in)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("consul: %s %s: %d %s", method, path, status, body)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal([]byte(body), out); err != nil {
		return fmt.Errorf("consul: %s %s: %w in %s", method, path, err, body)
	}
	return nil
}

// Register adds or replaces an instance. Without checks it gets one that passes until SetHealth says otherwise.
func (c *Consul) Register(s api.AgentServiceRegistration) {
	c.tb.Helper()
	own := s.Check == nil && s.Checks == nil
	if own {
		s.Check = &api.AgentServiceCheck{TTL: "24h", Status: api.HealthPassing}
	}
	c.Call(http.MethodPut, "/v1/agent/service/register?replace-existing-checks=true", s, nil)
	if own { // an agent that restarts with its data keeps only statuses that were set, and takes others for critical
		c.SetHealth(cmp.Or(s.ID, s.Name), api.HealthPassing)
	}
}

// Deregister removes the instance with that id (an instance registered without one has its service's name).
func (c *Consul) Deregister(id string) {
	c.tb.Helper()
	c.Call(http.MethodPut, "/v1/agent/service/deregister/"+id, nil, nil)
}

// SetHealth sets the check that Register made: "passing", "warning" or "critical".
func (c *Consul) SetHealth(id, status string) {
	c.tb.Helper()
	update := map[string]string{"Status": status, "Output": "set to " + status}
	c.Call(http.MethodPut, "/v1/agent/check/update/service:"+id, update, nil)
}

// CreatePolicy adds a policy whose rules are HCL, such as `service_prefix "" { policy = "read" }`.
func (c *Consul) CreatePolicy(name, rules string) {
	c.tb.Helper()
	c.Call(http.MethodPut, "/v1/acl/policy", api.ACLPolicy{Name: name, Rules: rules}, nil)
}

// CreateToken adds a token with policies of these names.
func (c *Consul) CreateToken(policies ...string) (secret, accessor string) {
	c.tb.Helper()
	in, out := api.ACLToken{}, api.ACLToken{}
	for _, name := range policies {
		in.Policies = append(in.Policies, &api.ACLTokenPolicyLink{Name: name})
	}
	c.Call(http.MethodPut, "/v1/acl/token", in, &out)
	return out.SecretID, out.AccessorID
}

// DeleteToken revokes a token by its accessor.
func (c *Consul) DeleteToken(accessor string) {
	c.tb.Helper()
	c.Call(http.MethodDelete, "/v1/acl/token/"+accessor, nil, nil)
}
