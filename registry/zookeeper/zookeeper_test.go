package zookeeper

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

const (
	goodUser     = "app"
	goodPassword = "pw1:with-a-colon"
)

// A layout writes a service as providers of one kind do.
type layout struct {
	id     func(service string) string
	folder func(service string) string // what is removed with the service
	// nodes are the paths below which the instances are, and their data.
	nodes func(service string, instances []registry.Instance) (folder string, nodes map[string]string)
	fact  func(registry.Instance) registry.Instance
}

// spring is how Spring Cloud registers.
var spring = layout{
	id:     func(s string) string { return "/services/" + s },
	folder: func(s string) string { return "/services/" + s },
	nodes: func(s string, instances []registry.Instance) (string, map[string]string) {
		nodes := map[string]string{}
		for _, i := range instances {
			data, err := json.Marshal(map[string]any{
				"name": s, "id": i.Address, "address": i.Address, "port": i.Port, "sslPort": nil, "serviceType": "DYNAMIC",
				"payload": map[string]any{
					"@class": "org.springframework.cloud.zookeeper.discovery.ZookeeperInstance", "name": s,
					"metadata": springMetadata(i),
				},
			})
			if err != nil {
				panic(err)
			}
			nodes[i.Address] = string(data)
		}
		return "/services/" + s, nodes
	},
	fact: func(i registry.Instance) registry.Instance {
		i.Metadata = labels.FromMap(springMetadata(i))
		i.Unhealthy = i.Unhealthy && !i.Disabled
		return i
	},
}

func springMetadata(i registry.Instance) map[string]string {
	m := i.Metadata.Map()
	if m == nil {
		m = map[string]string{}
	}
	if i.Weight != 1 {
		m["weight"] = strconv.FormatFloat(i.Weight, 'f', -1, 64)
	}
	m["instance_status"] = "UP"
	if i.Unhealthy {
		m["instance_status"] = "DOWN"
	}
	if i.Disabled {
		m["instance_status"] = "OUT_OF_SERVICE"
	}
	return m
}

// dubbo is how Dubbo registers at interface level.
var dubbo = layout{
	id:     func(s string) string { return "providers:" + s + ":0.0.0:" },
	folder: func(s string) string { return "/dubbo/" + s },
	nodes: func(s string, instances []registry.Instance) (string, map[string]string) {
		nodes := map[string]string{}
		for _, i := range instances {
			nodes[dubboNode(s, i)] = ""
		}
		return "/dubbo/" + s + "/providers", nodes
	},
	fact: func(i registry.Instance) registry.Instance {
		i.Protocol, i.Unhealthy = "dubbo", false
		m := dubboMetadata(i)
		m["protocol"] = "dubbo"
		i.Metadata = labels.FromMap(m)
		return i
	},
}

func dubboNode(iface string, i registry.Instance) string {
	var query []string
	for _, k := range slices.Sorted(maps.Keys(dubboMetadata(i))) {
		query = append(query, k+"="+dubboMetadata(i)[k])
	}
	authority := net.JoinHostPort(i.Address, fmt.Sprint(i.Port))
	return url.QueryEscape(fmt.Sprintf("dubbo://%s/%s?%s", authority, iface, strings.Join(query, "&")))
}

func dubboMetadata(i registry.Instance) map[string]string {
	m := map[string]string{"application": "app-of-" + i.Address}
	for k, v := range i.Metadata.All() {
		m["x-"+k] = v // version is Dubbo's own
	}
	if i.Weight != 1 {
		m["weight"] = strconv.Itoa(int(100 * i.Weight))
	}
	if i.Disabled {
		m["disabled"] = "true"
	}
	return m
}

// register makes these the instances of the service.
func (f *fake) register(l layout, service string, instances ...registry.Instance) {
	f.edit(func() {
		folder, nodes := l.nodes(service, instances)
		f.put(folder, "")
		for _, name := range slices.Sorted(maps.Keys(f.nodes[folder].children)) {
			if _, ok := nodes[name]; !ok {
				f.delete(folder + "/" + name)
			}
		}
		for name, data := range nodes {
			f.put(folder+"/"+name, data)
		}
	})
}

func (f *fake) entry() registry.Entry {
	return registry.Entry{Type: "zookeeper", Name: "test", Domain: f.address, AuthSecretName: "zk"}
}

func credentials() registry.Credentials {
	return registry.Credentials{"username": goodUser, "password": goodPassword}
}

// backend is the fake as the suite uses it.
func (f *fake) backend(l layout) registrytest.Backend {
	f.edit(func() { f.login = goodUser + ":" + goodPassword })
	return registrytest.Backend{
		Entry:       f.entry(),
		Credentials: credentials(),
		ID:          l.id,
		Fact:        l.fact,
		Set:         func(s string, instances ...registry.Instance) { f.register(l, s, instances...) },
		Remove:      func(s string) { f.remove(l.folder(s)) },
		Stop:        f.stop,
		Restart:     f.start,
		Wipe:        f.wipe,
		Refuse: func(on bool) {
			f.edit(func() {
				if f.login = goodUser + ":" + goodPassword; on {
					f.login = "other:" + goodPassword
				}
			})
		},
		Hang: func(on bool) { f.edit(func() { f.hang = on }) },
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.edit(func() { f.hangIn, f.hung = n, hung })
			return hung
		},
		Requests: func() (n int) {
			f.edit(func() { n = f.requests })
			return n
		},
		EntryAt: func(server string) registry.Entry {
			e := f.entry()
			e.Domain = server
			return e
		},
	}
}

// newHasty is New, but gives up sooner.
func newHasty(e registry.Entry, env registry.Env) (registry.Registry, error) {
	r, err := New(e, env)
	if z, ok := r.(*zookeeper); ok && z.interval < time.Second {
		z.timeout = time.Second
	}
	return r, err
}

func TestConformance(t *testing.T) {
	for name, l := range map[string]layout{"Spring Cloud": spring, "Dubbo": dubbo} {
		t.Run(name, func(t *testing.T) {
			skip := map[string]string{}
			if name == "Dubbo" {
				skip["one call hangs"] = "takes long, and the other layout has shown it"
			}
			registrytest.Run(t, registrytest.Config{
				New:   newHasty,
				Start: func(t *testing.T) registrytest.Backend { return newFake(t).backend(l) },
				Skip:  skip,
			})
		})
	}
}

// testEnv is an Env with credentials.
func testEnv(t *testing.T, credentials registry.Credentials) registry.Env {
	t.Helper()
	return registry.Env{
		Credentials: func() (registry.Credentials, error) { return credentials, nil },
		ClientTLS:   func() (*tls.Config, error) { return nil, nil },
		Logger:      slog.New(slog.DiscardHandler),
		Observe:     func(string, time.Duration, error) {},
		Budgets:     &registry.Budgets{},
	}
}

const limit = 15 * time.Second

// run runs the adapter until the test ends.
func run(t *testing.T, e registry.Entry, env registry.Env, adjust ...func(*zookeeper)) *registrytest.Recorder {
	t.Helper()
	r, err := New(e, env)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range adjust {
		a(r.(*zookeeper))
	}
	ctx, cancel := context.WithCancel(context.Background())
	rec, done := registrytest.NewRecorder(ctx), make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx, rec); err != nil {
			t.Errorf("Run: %v", err)
		}
		rec.Returned()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, v := range rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
	})
	return rec
}

func wait(t *testing.T, rec *registrytest.Recorder, what string, ok func(registrytest.State) bool) registrytest.State {
	t.Helper()
	s, got := rec.Wait(limit, ok)
	if !got {
		names := slices.Sorted(maps.Keys(s.Services))
		t.Fatalf("waited in vain for %s; synced %v, gap %v, gaps %v, %d services, %q first", what, s.Synced, s.Gap, s.Gaps, len(names),
			names[:min(9, len(names))])
	}
	return s
}

func at(address string) registry.Instance {
	return registry.Instance{Address: address, Port: 8080, Weight: 1}
}

// has tells whether a service has exactly these instances, and nothing is in a gap.
func has(id string, addresses ...string) func(registrytest.State) bool {
	return func(s registrytest.State) bool {
		service, ok := s.Services[id]
		var got []string
		for _, i := range service.Instances {
			got = append(got, i.Address)
		}
		slices.Sort(got)
		return ok && s.Synced && s.Gap == nil && s.Gaps[id] == nil && slices.Equal(got, addresses)
	}
}

// noRemovalInGap checks that nothing was removed, after the first n events, between a failure and the next listing.
func noRemovalInGap(t *testing.T, rec *registrytest.Recorder, n int) {
	t.Helper()
	gap := false
	for _, e := range rec.State().Events[n:] {
		switch e.Kind {
		case registrytest.Fail:
			gap = gap || len(e.IDs) == 0
		case registrytest.Synced:
			gap = false
		default:
			if gap && len(e.Removed) > 0 {
				t.Errorf("%v removed in a gap", e.Removed)
			}
		}
	}
}
