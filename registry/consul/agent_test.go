package consul

import (
	"net/http"
	"path"
	"slices"
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
	held map[string]map[string]bool // the ids of each service, and whether they are in maintenance
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
	var ops api.TxnOps
	check := func(verb api.CheckOp, c api.HealthCheck) {
		ops = append(ops, &api.TxnOp{Check: &api.CheckTxnOp{Verb: verb, Check: c}})
	}
	for _, i := range instances {
		node, id := "node-"+i.Address, name+"-"+i.Address
		now[id] = i.Disabled
		status := api.HealthPassing
		if i.Unhealthy {
			status = api.HealthCritical
		}
		ops = append(ops,
			&api.TxnOp{Node: &api.NodeTxnOp{Verb: api.NodeSet, Node: api.Node{Node: node, Address: i.Address}}},
			&api.TxnOp{Service: &api.ServiceTxnOp{Verb: api.ServiceSet, Node: node, Service: api.AgentService{
				ID: id, Service: name, Address: i.Address, Port: int(i.Port), Meta: i.Metadata.Map(),
				Weights: api.AgentWeights{Passing: int(i.Weight), Warning: 1},
			}}},
		)
		check(api.CheckSet, api.HealthCheck{Node: node, CheckID: "web-" + id, Name: "web", Status: status, ServiceID: id})
		maintenance := api.HealthCheck{
			Node: node, CheckID: api.ServiceMaintPrefix + id, Name: "Service Maintenance Mode", Status: api.HealthCritical, ServiceID: id,
		}
		switch {
		case i.Disabled:
			check(api.CheckSet, maintenance)
		case a.held[name][id]:
			check(api.CheckDelete, maintenance)
		}
	}
	if len(ops) > 0 {
		a.Call(http.MethodPut, "/v1/txn", ops, nil)
	}
	for id := range a.held[name] {
		if _, ok := now[id]; !ok {
			node := "node-" + strings.TrimPrefix(id, name+"-")
			a.Call(http.MethodPut, "/v1/catalog/deregister", api.CatalogDeregistration{Node: node, ServiceID: id}, nil)
		}
	}
	a.held[name] = now
}

// TestAgentConformance runs the suite against a real agent.
func TestAgentConformance(t *testing.T) {
	servers.Need(t, servers.Consul)
	// An agent that keeps its data takes long to start, so only those do that are restarted with it.
	kept := []string{"outage", "down_at_the_start", "recovery_with_change"}
	registrytest.Run(t, registrytest.Config{
		New:      newHasty,
		Interval: 300 * time.Millisecond,
		Timeout:  time.Minute,
		Start: func(t *testing.T) registrytest.Backend {
			a := startAgent(t, slices.Contains(kept, path.Base(t.Name())))
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

func startAgent(t *testing.T, keep bool) *agent {
	return &agent{
		Consul: harness.StartConsul(t, harness.ConsulOptions{ACL: true, Keep: keep}), held: map[string]map[string]bool{},
	}
}

// TestAgentTokens shows that a real agent's answers to tokens of all kinds are told apart.
func TestAgentTokens(t *testing.T) {
	t.Parallel()
	a := startAgent(t, false)
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

// TestAgentNarrowsToken edits the policy of a token that is in use.
func TestAgentNarrowsToken(t *testing.T) {
	t.Parallel()
	a := startAgent(t, false)
	a.set("web", at("10.0.0.1"), at("10.0.0.2"))
	a.set("pay", at("10.0.0.3"))
	const everything = `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`
	a.CreatePolicy("mine", everything)
	secret, _ := a.CreateToken("mine")
	var policy api.ACLPolicy
	a.Call(http.MethodGet, "/v1/acl/policy/name/mine", nil, &policy)
	allow := func(rules string) {
		policy.Rules = rules
		a.Call(http.MethodPut, "/v1/acl/policy/"+policy.ID, policy, nil)
	}
	rec := runWith(t, quick(registry.Entry{Type: "consul", Domain: a.Address}),
		testEnv(t, registry.Credentials{"consulToken": registry.Secret(secret)}))
	wait(t, rec, "all", loaded("consul", "pay", "web"))
	for _, step := range []struct {
		rules string
		words map[string]string // in the errors, by service
	}{
		{everything + ` node "node-10.0.0.2" { policy = "deny" }`, map[string]string{"web": "may no longer read all its instances"}},
		{
			`service "pay" { policy = "read" } node_prefix "" { policy = "read" }`,
			map[string]string{"": "may no longer read all services", "web": "may not read its instances", "consul": "may not read"},
		},
		{`service_prefix "" { policy = "read" }`, map[string]string{"web": "node read", "pay": "node read"}},
		{`key_prefix "" { policy = "read" }`, map[string]string{"web": "service and node read", "pay": "service and node read"}},
	} {
		allow(step.rules)
		n := len(rec.State().Events)
		for id, words := range step.words {
			wait(t, rec, step.rules, func(s registrytest.State) bool {
				return failed(id, words)(registrytest.State{Events: s.Events[n:]})
			})
		}
		noRemoval(t, rec)
		if in := rec.State().Services["web"].Instances; len(in) != 2 {
			t.Errorf("%s: web has %v", step.rules, in)
		}
	}
	a.set("web", at("10.0.0.1"), at("10.0.0.2"), at("10.0.0.4"))
	a.set("pay")
	allow(everything)
	wait(t, rec, "the widened token", func(s registrytest.State) bool {
		return loaded("consul", "web")(s) && len(s.Services["web"].Instances) == 3 && len(s.Gaps) == 0
	})
}

func TestAgentNames(t *testing.T) {
	t.Parallel()
	a := startAgent(t, false)
	for _, name := range pathlike {
		a.set(name, at("10.0.0.1"))
	}
	rec := runWith(t, registry.Entry{Type: "consul", Domain: a.Address}, testEnv(t, registry.Credentials{"token": registry.Secret(a.Token)}))
	s := wait(t, rec, "all", func(s registrytest.State) bool { return s.Loaded })
	for _, name := range pathlike { // an agent built with a Go before 1.22 would refuse some
		if err := s.Gaps[name]; err != nil && !strings.Contains(err.Error(), "rename") || err == nil && len(s.Services[name].Instances) != 1 {
			t.Errorf("%q has %v, %v", name, s.Services[name].Instances, err)
		}
	}
}

// TestAgentFlaps changes a check as fast as it can, and then leaves it alone.
func TestAgentFlaps(t *testing.T) {
	t.Parallel()
	a := startAgent(t, false)
	a.set("web", at("10.0.0.1"))
	rec := runWith(t, registry.Entry{Type: "consul", Domain: a.Address}, testEnv(t, registry.Credentials{"token": registry.Secret(a.Token)}))
	wait(t, rec, "all", loaded("consul", "web"))
	in := at("10.0.0.1")
	begun, flips := time.Now(), 0
	for ; time.Since(begun) < time.Second || !in.Unhealthy; flips++ {
		in.Unhealthy = !in.Unhealthy
		a.set("web", in)
	}
	s := wait(t, rec, "the last state", func(s registrytest.State) bool { return s.Services["web"].Instances[0].Unhealthy })
	puts := 0
	for _, e := range s.Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("Fail %q: %v", e.IDs, e.Err)
		}
		if e.Kind == registrytest.Put && e.IDs[0] == "web" {
			puts++
		}
	}
	if most := int(time.Since(begun)/minPause) + 2; puts > most {
		t.Errorf("%d of %d flips were stated, more than %d", puts, flips, most)
	}
}
