package nacos

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
	"github.com/regbridge/regbridge/test/harness"
	recipes "github.com/regbridge/regbridge/test/servers"
)

type constructor = func(registry.Entry, registry.Env) (registry.Registry, error)

// TestServers reads each version of Nacos, without authentication, in all ways that it has: groups, namespaces, listings of
// several pages, and what is left out. What needs more than the adapter is in test/e2e.
func TestServers(t *testing.T) {
	for server, ways := range map[recipes.Server]map[string]constructor{
		recipes.Nacos1: {"HTTP": NewHTTP},
		recipes.Nacos2: {"HTTP": NewHTTP, "gRPC": NewGRPC},
		recipes.Nacos3: {"HTTP": NewHTTP, "gRPC": NewGRPC},
	} {
		t.Run(string(server), func(t *testing.T) {
			n := harness.StartNacos(t, server, harness.NacosOptions{})
			n.CreateNamespace("dev")
			for _, how := range slices.Sorted(maps.Keys(ways)) {
				t.Run(how, func(t *testing.T) { testServer(t, n, how, ways[how]) })
			}
		})
	}
}

// realLimit is how long is waited for what a server does.
const realLimit = 30 * time.Second

func testServer(t *testing.T, n *harness.Nacos, how string, construct constructor) {
	group := "group_" + how // each way has services of its own
	var all []harness.NacosInstance
	for i := range 7 {
		all = append(all, harness.NacosInstance{Group: group, Service: fmt.Sprintf("svc_%d", i), IP: fmt.Sprintf("10.0.0.%d", i+1), Port: 80})
	}
	guarded := harness.NacosInstance{
		Group: group, Service: "svc_0", IP: "10.0.1.1", Port: 80, Metadata: map[string]string{"register-resource": "mcp-bridge"},
	}
	n.Register(all...)
	n.Register(guarded,
		harness.NacosInstance{Group: group, Service: "kept", IP: "127.0.0.1", Port: n.Port, Persistent: true}, // something listens there
		harness.NacosInstance{Group: group, Service: "consumers:svc", IP: "10.0.2.1", Port: 80},
		harness.NacosInstance{Group: "unread", Service: "svc_0", IP: "10.0.3.1", Port: 80},
		harness.NacosInstance{Namespace: "dev", Group: group, Service: "svc_dev", IP: "10.0.4.1", Port: 80},
	)
	env := pushEnv(t)
	env.Credentials = nil
	entry := registry.Entry{Type: "nacos", Name: "real", Domain: n.Address, NacosGroups: []string{group, "no_such_group"}}
	p := run(t, construct, entry, env, every(time.Second), func(s *settings) { s.pageSize = 3 })
	wait := func(what string, ok func(registrytest.State) bool) registrytest.State {
		t.Helper()
		s, got := p.Wait(realLimit, ok)
		if !got {
			t.Fatalf("waited in vain for %s: %v, gap %v, gaps %v", what, slices.Sorted(maps.Keys(s.Services)), s.Gap, s.Gaps)
		}
		return s
	}
	s := wait("all services", func(s registrytest.State) bool { return s.Synced && s.Loaded && len(s.Services) == 8 })
	for _, i := range all {
		id := group + "@@" + i.Service
		if got := s.Services[id]; got.Host != i.Service+".group-"+how+".public.nacos" || !slices.ContainsFunc(got.Instances,
			func(got registry.Instance) bool { return got.Address == i.IP && !got.Disabled && !got.Unhealthy }) {
			t.Errorf("%s is %+v", id, got)
		}
	}
	if got := s.Services[group+"@@svc_0"].Instances; len(got) != 2 || !got[1].Disabled {
		t.Errorf("what a bridge registered is not left out: %+v", got)
	}
	if got := s.Services[group+"@@kept"].Instances; len(got) != 1 || got[0].Unhealthy {
		t.Errorf("the persistent instance: %+v", got)
	}

	t.Run("services come and go", func(*testing.T) {
		late := harness.NacosInstance{Group: group, Service: "late", IP: "10.0.5.1", Port: 80}
		n.Register(late)
		wait("a new service", func(s registrytest.State) bool { return len(s.Services[group+"@@late"].Instances) == 1 })
		n.Deregister(late)
		wait("its last instance to go", func(s registrytest.State) bool {
			late, known := s.Services[group+"@@late"]
			return !known || len(late.Instances) == 0
		})
		n.DeleteService("", group, "late")
		wait("the service to go", func(s registrytest.State) bool { return len(s.Services) == 8 && s.Gap == nil })
	})
	t.Run("another namespace", func(t *testing.T) {
		dev := entry
		dev.NacosNamespaceId, dev.NacosNamespace = "dev", "shown_name"
		p := run(t, construct, dev, env, every(time.Second))
		s, ok := p.Wait(realLimit, func(s registrytest.State) bool { return s.Synced && len(s.Services) == 1 })
		if got := s.Services[group+"@@svc_dev"]; !ok || got.Host != "svc_dev.group-"+how+".shown-name.nacos" || len(got.Instances) != 1 {
			t.Errorf("the services are %+v", s.Services)
		}
	})
	if how == "gRPC" {
		t.Run("nothing is left at the server", func(t *testing.T) {
			begin := func() *pushRun {
				r := run(t, construct, entry, env, every(time.Second))
				if _, ok := r.Wait(realLimit, func(s registrytest.State) bool { return s.Loaded }); !ok {
					t.Fatal("it does not read")
				}
				return r
			}
			subscribers := func(want int) {
				t.Helper()
				harness.Eventually(t, realLimit, func() error {
					got, err := n.Subscribers("", group, "svc_0")
					if err == nil && got != want {
						err = fmt.Errorf("%d subscribers, want %d", got, want)
					}
					return err
				})
			}
			t.Run("while it runs", func(*testing.T) {
				begin()
				subscribers(1)
			})
			n.Deregister(harness.NacosInstance{Group: group, Service: "svc_6", IP: "10.0.0.7", Port: 80})
			n.DeleteService("", group, "svc_6")
			wait("the service to go", func(s registrytest.State) bool { return len(s.Services) == 7 })
			harness.Eventually(t, realLimit, func() error {
				got, err := n.Subscribers("", group, "svc_6")
				if err == nil && got != 0 {
					err = fmt.Errorf("%d subscribers of a service that is gone", got)
				}
				return err
			})
			subscribers(1)
		})
	}
}
