package consul

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
	"github.com/regbridge/regbridge/test/harness"
	"github.com/regbridge/regbridge/test/servers"
)

// agent is a real Consul server that keeps its data over a restart and denies by default.
type agent struct {
	*harness.Consul
	held map[string]map[string]bool // the ids of each service
}

const (
	agentToken    = "1b2c3d4e-0000-4000-8000-00000000000a"
	agentAccessor = "ab2c3d4e-0000-4000-8000-00000000000a"
)

// permit makes the token, with the least rights that read everything.
func (a *agent) permit() {
	a.Call(http.MethodPut, "/v1/acl/token", api.ACLToken{
		SecretID: agentToken, AccessorID: agentAccessor, Policies: []*api.ACLTokenPolicyLink{{Name: "read"}},
	}, nil)
}

func (a *agent) policy() {
	a.CreatePolicy("read", `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`)
}

// set is Set of the suite. Each instance is on a node of its own.
func (a *agent) set(name string, instances ...registry.Instance) {
	now := map[string]bool{}
	for _, i := range instances {
		node, id := "node-"+i.Address, name+"-"+i.Address
		now[id] = true
		status := api.HealthPassing
		if i.Unhealthy {
			status = api.HealthCritical
		}
		checks := api.HealthChecks{{Node: node, CheckID: "web-" + id, Name: "web", Status: status, ServiceID: id}}
		maintenance := api.ServiceMaintPrefix + id
		if i.Disabled {
			checks = append(checks, &api.HealthCheck{
				Node: node, CheckID: maintenance, Name: "Service Maintenance Mode", Status: api.HealthCritical, ServiceID: id,
			})
		}
		a.Call(http.MethodPut, "/v1/catalog/register", api.CatalogRegistration{
			Node:    node,
			Address: i.Address,
			Service: &api.AgentService{
				ID: id, Service: name, Address: i.Address, Port: int(i.Port), Meta: i.Metadata.Map(),
				Weights: api.AgentWeights{Passing: int(i.Weight), Warning: 1},
			},
			Checks: checks,
		}, nil)
		if !i.Disabled {
			a.Call(http.MethodPut, "/v1/catalog/deregister", api.CatalogDeregistration{Node: node, CheckID: maintenance}, nil)
		}
	}
	for id := range a.held[name] {
		if !now[id] {
			node := "node-" + strings.TrimPrefix(id, name+"-")
			a.Call(http.MethodPut, "/v1/catalog/deregister", api.CatalogDeregistration{Node: node, ServiceID: id}, nil)
		}
	}
	a.held[name] = now
}

// TestAgentConformance runs the suite against a real agent.
func TestAgentConformance(t *testing.T) {
	servers.Need(t, servers.Consul)
	registrytest.Run(t, registrytest.Config{
		New:      New,
		Interval: time.Second,
		Timeout:  time.Minute,
		Start: func(t *testing.T) registrytest.Backend {
			a := &agent{
				Consul: harness.StartConsul(t, harness.ConsulOptions{ACL: true, Keep: true}),
				held:   map[string]map[string]bool{},
			}
			a.policy()
			a.permit()
			entry := func(server string) registry.Entry {
				return registry.Entry{Type: "consul", Name: "test", Domain: server, AuthSecretName: "consul"}
			}
			return registrytest.Backend{
				Entry:       entry(a.Address),
				EntryAt:     entry,
				Credentials: registry.Credentials{"token": agentToken},
				Own:         []string{"consul"},
				Set:         a.set,
				Remove:      func(name string) { a.set(name) },
				Stop:        a.Kill,
				Restart:     func() { a.Restart(false) },
				Wipe: func() {
					a.Restart(true)
					a.held = map[string]map[string]bool{}
					a.policy()
					a.permit()
				},
				Refuse: func(on bool) {
					if on {
						a.DeleteToken(agentAccessor)
					} else {
						a.permit()
					}
				},
				Hang: func(on bool) {
					if on {
						a.Pause()
					} else {
						a.Resume()
					}
				},
			}
		},
	})
}

// TestAgentTokens shows that a real agent's answers to tokens of all kinds are told apart.
func TestAgentTokens(t *testing.T) {
	a := &agent{Consul: harness.StartConsul(t, harness.ConsulOptions{ACL: true}), held: map[string]map[string]bool{}}
	a.set("web", at("10.0.0.1"))
	a.set("pay", at("10.0.0.2"))
	run := func(token string) *registrytest.Recorder {
		e := registry.Entry{Type: "consul", Domain: a.Address, RefreshInterval: registry.Interval(time.Second)}
		return runWith(t, e, testEnv(t, registry.Credentials{"consulToken": registry.Secret(token)}))
	}
	token := func(name, rules string) string {
		a.CreatePolicy(name, rules)
		secret, _ := a.CreateToken(name)
		return secret
	}
	const nodes = ` node_prefix "" { policy = "read" }`
	wait(t, run(""), "the refusal of an anonymous, empty answer", failed("", "not even list consul itself"))
	wait(t, run("99999999-9999-9999-9999-999999999999"), "the refusal of an unknown token", failed("", "403"))
	wait(t, run(token("keys", `key_prefix "" { policy = "read" }`)), "a token for nothing", failed("", "may read no service"))
	wait(t, run(token("services", `service_prefix "" { policy = "read" }`)), "a token without nodes", failed("web", "node read"))

	few := run(token("few", `service "web" { policy = "read" }`+nodes))
	wait(t, few, "the one allowed service", loaded("web"))
	all := run(token("all", `service_prefix "" { policy = "read" }`+nodes))
	wait(t, all, "all services", loaded("consul", "pay", "web"))

	var policy api.ACLPolicy
	a.Call(http.MethodGet, "/v1/acl/policy/name/all", nil, &policy)
	policy.Rules = `service "web" { policy = "read" }` + nodes
	a.Call(http.MethodPut, "/v1/acl/policy/"+policy.ID, policy, nil)
	wait(t, all, "a gap, since the token was narrowed", failed("", "may no longer read all services"))
	wait(t, all, "the hidden service by name", failed("pay", "may not read its instances"))
	noRemoval(t, all)
	a.set("pay")
	wait(t, all, "a true removal", func(s registrytest.State) bool {
		_, ok := s.Services["pay"]
		return !ok
	})
	a.set("web")
	wait(t, few, "the removal of the last visible service", func(s registrytest.State) bool { return len(s.Services) == 0 })
	for _, e := range few.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("a token that may not read all is normal, but: %v", e.Err)
		}
	}
}
