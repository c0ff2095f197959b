package consul

import (
	"bytes"
	"encoding/json"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// equalSets lets cmp compare label sets.
var equalSets = cmp.Comparer(func(a, b labels.Set) bool { return a == b })

func TestConvertRecordedAnswers(t *testing.T) {
	spring := registry.Instance{
		Address: "127.0.0.1", Port: 18101, Weight: 1,
		Metadata: labels.FromMap(map[string]string{"secure": "false", "version": "v1", "zone": "z1"}),
	}
	critical := spring
	critical.Unhealthy, critical.Reason = true, "check Service 'order-service' check is critical"
	ttl := registry.Instance{
		Address: "127.0.0.1", Port: 18102, Weight: 1,
		Metadata: labels.FromMap(map[string]string{"group": "g1", "secure": "true", "version": "v1", "zone": "zone-a"}),
	}
	for file, want := range map[string][]registry.Instance{
		"health-service.json":           {spring},
		"health-service-critical.json":  {critical},
		"health-service-ttl-https.json": {critical, ttl},
	} {
		b, err := os.ReadFile(filepath.Join("testdata", file))
		if err != nil {
			t.Fatal(err)
		}
		got, err := convertJSON(b, filter{})
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if diff := cmp.Diff(want, got, equalSets); diff != "" {
			t.Errorf("%s: -want +got:\n%s", file, diff)
		}
	}
}

func convertJSON(b []byte, f filter) ([]registry.Instance, error) {
	r := &entries{filter: f}
	err := new(client).decode(&body{r: bytes.NewReader(b)}, request{
		opening: '[', what: "instances", most: maxInstances, longest: maxInstance, take: r.take,
	})
	if err != nil {
		return nil, err
	}
	return r.instances(), nil
}

func convert(list []*api.ServiceEntry, f filter) ([]registry.Instance, error) {
	r := &entries{filter: f}
	for _, e := range list {
		if err := r.add(e); err != nil {
			return nil, err
		}
	}
	return r.instances(), nil
}

func TestConvert(t *testing.T) {
	service := func(edit func(*api.ServiceEntry)) *api.ServiceEntry {
		e := &api.ServiceEntry{
			Node:    &api.Node{Node: "n", Address: "10.0.0.9", Datacenter: "dc1"},
			Service: &api.AgentService{ID: "a", Service: "web", Address: "10.0.0.1", Port: 80, Weights: api.AgentWeights{Passing: 5, Warning: 2}},
		}
		edit(e)
		return e
	}
	checks := func(list ...*api.HealthCheck) func(*api.ServiceEntry) {
		return func(e *api.ServiceEntry) { e.Checks = list }
	}
	web := func(status string) *api.HealthCheck {
		return &api.HealthCheck{CheckID: "w", Name: "web", Status: status, Output: "noise"}
	}
	base := registry.Instance{Address: "10.0.0.1", Port: 80, Weight: 5}
	with := func(edit func(*registry.Instance)) []registry.Instance {
		i := base
		edit(&i)
		return []registry.Instance{i}
	}
	unhealthy := func(reason string) []registry.Instance {
		return with(func(i *registry.Instance) { i.Unhealthy, i.Reason = true, reason })
	}
	disabled := func(reason string) []registry.Instance {
		return with(func(i *registry.Instance) { i.Disabled, i.Reason = true, reason })
	}
	for name, c := range map[string]struct {
		edit   func(*api.ServiceEntry)
		filter filter
		want   []registry.Instance
	}{
		"no checks":  {checks(), filter{}, []registry.Instance{base}},
		"passing":    {checks(web("passing")), filter{}, []registry.Instance{base}},
		"critical":   {checks(web("passing"), &api.HealthCheck{CheckID: "x", Status: "critical"}), filter{}, unhealthy("check x is critical")},
		"odd status": {checks(web("burning")), filter{warning: true}, unhealthy("check web is burning")},
		"no status":  {checks(web("")), filter{}, unhealthy("check web is without a status")},
		"warning":    {checks(web("warning")), filter{}, unhealthy("check web is warning")},
		"warning admitted": {
			checks(web("warning")), filter{warning: true}, with(func(i *registry.Instance) { i.Weight = 2 }),
		},
		"critical beside an admitted warning": {
			checks(web("warning"), &api.HealthCheck{CheckID: "x", Status: "critical"}), filter{warning: true}, unhealthy("check x is critical"),
		},
		"service in maintenance": {
			checks(web("passing"), &api.HealthCheck{CheckID: "_service_maintenance:a", Status: "critical", Notes: "upgrade"}),
			filter{}, disabled("in maintenance: upgrade"),
		},
		"node in maintenance": {
			checks(&api.HealthCheck{CheckID: "_node_maintenance", Status: "critical"}, web("critical")), filter{}, disabled("its node is in maintenance"),
		},
		"address of the node": {
			func(e *api.ServiceEntry) { e.Service.Address = "" }, filter{}, with(func(i *registry.Instance) { i.Address = "10.0.0.9" }),
		},
		"no weights": {
			func(e *api.ServiceEntry) { e.Service.Weights = api.AgentWeights{} }, filter{}, with(func(i *registry.Instance) { i.Weight = 1 }),
		},
		"no traffic on warning": {
			func(e *api.ServiceEntry) {
				e.Service.Weights.Warning = 0
				e.Checks = api.HealthChecks{web("warning")}
			}, filter{warning: true}, with(func(i *registry.Instance) { i.Weight = 0 }),
		},
		"several ports": {
			func(e *api.ServiceEntry) {
				e.Service.Port, e.Service.Ports = 0, api.ServicePorts{{Name: "admin", Port: 81}, {Name: "http", Port: 82, Default: true}}
			}, filter{}, with(func(i *registry.Instance) { i.Port = 82 }),
		},
		"negative port": {
			func(e *api.ServiceEntry) { e.Service.Port = -5 }, filter{}, with(func(i *registry.Instance) { i.Port = 1<<32 - 5 }),
		},
		"Unix socket": {
			func(e *api.ServiceEntry) { e.Service.SocketPath = "/run/x" }, filter{},
			disabled("listens on a Unix socket, which only its own node can reach"),
		},
		"locality of the node": {
			func(e *api.ServiceEntry) { e.Node.Locality = &api.Locality{Region: "r", Zone: "n"} }, filter{},
			with(func(i *registry.Instance) { i.Locality = registry.Locality{Region: "r", Zone: "n"} }),
		},
		"locality of the service goes first": {
			func(e *api.ServiceEntry) {
				e.Node.Locality = &api.Locality{Region: "r", Zone: "n"}
				e.Service.Locality = &api.Locality{Region: "r", Zone: "s"}
			}, filter{},
			with(func(i *registry.Instance) { i.Locality = registry.Locality{Region: "r", Zone: "s"} }),
		},
		"metadata": {
			func(e *api.ServiceEntry) { e.Service.Meta = map[string]string{"zone": "z"} }, filter{},
			with(func(i *registry.Instance) { i.Metadata = labels.FromMap(map[string]string{"zone": "z"}) }),
		},
		"tag":       {func(e *api.ServiceEntry) { e.Service.Tags = []string{"x", " Blue "} }, filter{tag: "blue"}, []registry.Instance{base}},
		"other tag": {func(e *api.ServiceEntry) { e.Service.Tags = []string{"blueish"} }, filter{tag: "blue"}, []registry.Instance{}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := convert([]*api.ServiceEntry{service(c.edit)}, c.filter)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got, equalSets); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestConvertRefusesWhatNoConsulSends(t *testing.T) {
	for _, body := range []string{`[null]`, `[{}]`, `[{"Node":{}}]`, `[{"Service":{}}]`, ``, `null`, `{}`, `[`, `[1]`,
		`[{"Node":{},"Service":{}}`, `[{"Node":{},"Service":{}},`, `[{"Node":{},"Service":{}},]`, `[{"Node":{},"Service":{}}}`} {
		if got, err := convertJSON([]byte(body), filter{}); err == nil {
			t.Errorf("%s became %v", body, got)
		}
	}
}

func TestHostOf(t *testing.T) {
	for _, c := range [][3]string{
		{"httpbin", "dc1", "httpbin.dc1.consul"},
		{"user_api", "dc1", "user-api.dc1.consul"},
		{"a_b", "my_dc", "a-b.my-dc.consul"},
	} {
		if got := hostOf(c[0], c[1]); got != c[2] {
			t.Errorf("hostOf(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

// FuzzConvert feeds answers to the decoder and checks that the facts do not depend on the order of the answer.
func FuzzConvert(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal("no recorded answers", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, "blue", true)
	}
	f.Add([]byte(`[{"Node":{"Node":"n"},"Service":{"Ports":[{"Port":-1,"Default":true}]},"Checks":[null,{"Status":"warning"}]}]`), "", false)
	f.Fuzz(func(t *testing.T, body []byte, tag string, admit bool) {
		var entries []*api.ServiceEntry
		if json.Unmarshal(body, &entries) != nil {
			return
		}
		flt := filter{tag: strings.ToLower(strings.TrimSpace(tag)), warning: admit}
		a, err := convert(entries, flt)
		if err != nil {
			return
		}
		if !bytes.Equal(bytes.TrimSpace(body), []byte("null")) {
			if streamed, err := convertJSON(body, flt); err != nil || !slices.Equal(a, streamed) {
				t.Errorf("entry by entry it is %v (%v), not %v", streamed, err, a)
			}
		}
		if len(a) > len(entries) {
			t.Fatalf("%d instances of %d entries", len(a), len(entries))
		}
		for _, i := range a {
			if (i.Unhealthy || i.Disabled) != (i.Reason != "") {
				t.Errorf("instance %+v is out of service without a reason, or in service with one", i)
			}
		}
		// Entries that differ only in what is no part of the order (node, id, address, port) cannot occur.
		keys := map[string]bool{}
		for _, e := range entries {
			keys[e.Node.Node+"\x00"+e.Service.ID] = true
		}
		if len(keys) < len(entries) {
			return
		}
		rand.New(rand.NewSource(1)).Shuffle(len(entries), func(i, j int) { entries[i], entries[j] = entries[j], entries[i] })
		b, err := convert(entries, flt)
		if err != nil || !slices.Equal(a, b) {
			t.Errorf("the order of the answer matters: %v, %v (%v)", a, b, err)
		}
	})
}
