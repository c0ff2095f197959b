package nacos

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// equalSets lets cmp compare label sets.
var equalSets = cmp.Comparer(func(a, b labels.Set) bool { return a == b })

func convertJSON(k key, b []byte) (registry.Service, error) {
	var info serviceInfo
	if err := json.Unmarshal(b, &info); err != nil {
		return registry.Service{}, err
	}
	return convert(k, "public", info)
}

// TestConvertRecordedAnswers: what 1.4.1 and 2.3.2 said of the same service.
func TestConvertRecordedAnswers(t *testing.T) {
	for _, version := range []string{"1.4.1", "2.3.2"} {
		a := registry.Service{ID: "DEFAULT_GROUP@@svc-a", Host: "svc-a.DEFAULT-GROUP.public.nacos", Instances: []registry.Instance{
			{
				Address: "10.1.0.1", Port: 8080, Weight: 0.5,
				Metadata: labels.FromMap(map[string]string{"protocol": "http", "version": "v1", "nacos.cluster": "c1"}),
			},
			{Address: "10.1.0.3", Port: 8080, Weight: 1, Unhealthy: true, Reason: "is unhealthy for Nacos"},
		}}
		none := registry.Service{ID: "DEFAULT_GROUP@@nope", Host: "nope.DEFAULT-GROUP.public.nacos", Instances: []registry.Instance{}}
		for file, want := range map[string]registry.Service{"list-a": a, "list-none": none} {
			b, err := os.ReadFile(filepath.Join("testdata", version+"-"+file+".json"))
			if err != nil {
				t.Fatal(err)
			}
			_, name, _ := strings.Cut(want.ID, "@@")
			got, err := convertJSON(key{"DEFAULT_GROUP", name}, b)
			if err != nil {
				t.Fatalf("%s %s: %v", version, file, err)
			}
			if diff := cmp.Diff(want, got, equalSets); diff != "" {
				t.Errorf("%s %s: -want +got:\n%s", version, file, diff)
			}
		}
	}
}

// TestRecordedLists: of page 1 of 2 with one name each.
func TestRecordedLists(t *testing.T) {
	for _, version := range []string{"1.4.1", "2.3.2"} {
		b, err := os.ReadFile(filepath.Join("testdata", version+"-svc-list-p1.json"))
		if err != nil {
			t.Fatal(err)
		}
		f := newHTTPFake(t)
		f.edit(func() { f.bodies[listPath] = string(b) })
		names, count, err := f.api(f.settings(f.env())).services(t.Context(), "G2", 1, 1)
		if err != nil || count != 2 || len(names) != 1 || names[0] != "svc-a" {
			t.Errorf("%s: %v of %d, %v", version, names, count, err)
		}
	}
}

func TestHostOf(t *testing.T) {
	for want, k := range map[string][3]string{
		"order.DEFAULT-GROUP.public.nacos":                                  {"DEFAULT_GROUP", "order", "public"},
		"svc_a.my-grp.d8ac64f3-37f9-4857-a1a9-47a814ecf358.nacos":           {"my_grp", "svc_a", "d8ac64f3-37f9-4857-a1a9-47a814ecf358"},
		"providers:com.dubbo.demo.api.DemoService:1.0.0:dev.G.team-x.nacos": {"G", "providers:com.dubbo.demo.api.DemoService:1.0.0:dev", "team_x"},
		"Weather::1.0.0.mcp-endpoints.public.nacos":                         {"mcp-endpoints", "Weather::1.0.0", "public"},
		"a.b_c.d-e.public.nacos":                                            {"d_e", "a.b_c", "public"},
	} {
		if got := hostOf(key{k[0], k[1]}, k[2]); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestInstance(t *testing.T) {
	base := host{IP: "10.0.0.1", Port: 8080, Weight: 1, Healthy: true, Enabled: true, ClusterName: "DEFAULT"}
	plain := registry.Instance{Address: "10.0.0.1", Port: 8080, Weight: 1}
	for name, c := range map[string]struct {
		edit func(*host)
		want func(*registry.Instance)
	}{
		"plain":                  {func(*host) {}, func(*registry.Instance) {}},
		"unhealthy":              {func(h *host) { h.Healthy = false }, func(i *registry.Instance) { i.Unhealthy, i.Reason = true, "is unhealthy for Nacos" }},
		"disabled":               {func(h *host) { h.Enabled = false }, func(i *registry.Instance) { i.Disabled, i.Reason = true, "is disabled in Nacos" }},
		"disabled and unhealthy": {func(h *host) { h.Enabled, h.Healthy = false, false }, func(i *registry.Instance) { i.Disabled, i.Reason = true, "is disabled in Nacos" }},
		"weight 0":               {func(h *host) { h.Weight = 0 }, func(i *registry.Instance) { i.Weight = 0 }},
		"weight 0.4":             {func(h *host) { h.Weight = 0.4 }, func(i *registry.Instance) { i.Weight = 0.4 }},
		"weight 10000":           {func(h *host) { h.Weight = 10000 }, func(i *registry.Instance) { i.Weight = 10000 }},
		"no cluster":             {func(h *host) { h.ClusterName = "" }, func(*registry.Instance) {}},
		"cluster": {
			func(h *host) { h.ClusterName = "hz" },
			func(i *registry.Instance) { i.Metadata = labels.FromMap(map[string]string{"nacos.cluster": "hz"}) },
		},
		"cluster of its own": {
			func(h *host) { h.ClusterName, h.Metadata = "hz", map[string]string{"nacos.cluster": "bj"} },
			func(i *registry.Instance) { i.Metadata = labels.FromMap(map[string]string{"nacos.cluster": "bj"}) },
		},
		"zone": {
			func(h *host) { h.Metadata = map[string]string{"zone": "z1", "region": "r1"} },
			func(i *registry.Instance) {
				i.Locality = registry.Locality{Region: "r1", Zone: "z1"}
				i.Metadata = labels.FromMap(map[string]string{"zone": "z1", "region": "r1"})
			},
		},
		"zone of Kubernetes": {
			func(h *host) {
				h.Metadata = map[string]string{"topology.kubernetes.io/zone": "z1", "topology.kubernetes.io/region": "r1"}
			},
			func(i *registry.Instance) {
				i.Locality = registry.Locality{Region: "r1", Zone: "z1"}
				i.Metadata = labels.FromMap(map[string]string{"topology.kubernetes.io/zone": "z1", "topology.kubernetes.io/region": "r1"})
			},
		},
		"loop guard": {
			func(h *host) { h.Metadata = map[string]string{"register-resource": "mcp-bridge"} },
			func(i *registry.Instance) {
				i.Disabled, i.Reason = true, "was registered by a bridge (metadata register-resource=mcp-bridge)"
				i.Metadata = labels.FromMap(map[string]string{"register-resource": "mcp-bridge"})
			},
		},
		"no loop guard": {func(h *host) { h.Metadata = map[string]string{"register-resource": "other"} }, func(i *registry.Instance) {
			i.Metadata = labels.FromMap(map[string]string{"register-resource": "other"})
		}},
		"IPv6":             {func(h *host) { h.IP = "2001:DB8::1" }, func(i *registry.Instance) { i.Address = "2001:db8::1" }},
		"IPv6 in brackets": {func(h *host) { h.IP = "[2001:db8::1]" }, func(i *registry.Instance) { i.Address = "2001:db8::1" }},
		"IPv6 with a zone": {func(h *host) { h.IP = "[fe80::1%eth0]" }, func(i *registry.Instance) { i.Address = "fe80::1" }},
		"host name":        {func(h *host) { h.IP = " pay.example.org " }, func(i *registry.Instance) { i.Address = "pay.example.org" }},
		"no address":       {func(h *host) { h.IP = "" }, func(i *registry.Instance) { i.Address = "" }},
		"port 0":           {func(h *host) { h.Port = 0 }, func(i *registry.Instance) { i.Port = 0 }},
		"port -1":          {func(h *host) { h.Port = -1 }, func(i *registry.Instance) { i.Port = math.MaxUint32 }},
		"port 65536":       {func(h *host) { h.Port = 65536 }, func(i *registry.Instance) { i.Port = 65536 }},
		"port 2^32 + 8080": {func(h *host) { h.Port = 1<<32 + 8080 }, func(i *registry.Instance) { i.Port = math.MaxUint32 }},
		"port 8080 - 2^32": {func(h *host) { h.Port = 8080 - 1<<32 }, func(i *registry.Instance) { i.Port = math.MaxUint32 }},
	} {
		h, want := base, plain
		c.edit(&h)
		c.want(&want)
		if diff := cmp.Diff(want, instance(h), equalSets); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}

func TestConvertNames(t *testing.T) {
	for name, ok := range map[string]bool{"": true, "order": true, "G@@order": true, "other": false, "H@@order": false, "G@@other": false} {
		_, err := convert(key{"G", "order"}, "public", serviceInfo{Name: name, Hosts: []host{}})
		if (err == nil) != ok {
			t.Errorf("an answer about %q: %v", name, err)
		}
	}
	if _, err := convert(key{"G", "order"}, "public", serviceInfo{Name: "order"}); err == nil || !isAnswer(err) {
		t.Errorf("an answer without hosts: %v", err)
	}
}

// TestConvertOrder: facts do not depend on the order of an answer, and the answer is not written to.
func TestConvertOrder(t *testing.T) {
	hosts := []host{
		{IP: "10.0.0.2", Port: 1, Enabled: true, Healthy: true}, {IP: "10.0.0.1", Port: 2}, {IP: "10.0.0.1", Port: 1},
		{IP: "10.0.0.1", Port: 1, ClusterName: "b", Metadata: map[string]string{"k": "v"}}, {IP: "10.0.0.1", Port: 1, ClusterName: "a"},
		{IP: "10.0.0.1", Port: 1, Weight: 2}, {IP: "10.0.0.1", Port: 1, Enabled: true},
	}
	want, err := convert(key{"G", "s"}, "public", serviceInfo{Hosts: hosts})
	if err != nil {
		t.Fatal(err)
	}
	if len(hosts[3].Metadata) != 1 {
		t.Error("the answer's metadata was written to")
	}
	for range 50 {
		rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
		got, _ := convert(key{"G", "s"}, "public", serviceInfo{Hosts: hosts})
		if diff := cmp.Diff(want, got, equalSets); diff != "" {
			t.Fatalf("-want +got:\n%s", diff)
		}
	}
}

func FuzzConvert(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"hosts":[{"ip":"[fe80::1%eth0]","port":-1,"weight":1e308,"metadata":{"":""}},null]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		k := key{"DEFAULT_GROUP", "svc-a"}
		got, err := convertJSON(k, b)
		if err != nil {
			return
		}
		if got.ID != k.id() || got.Host == "" || got.Instances == nil {
			t.Errorf("%s became %+v", b, got)
		}
		for _, i := range got.Instances {
			if strings.Contains(i.Address, "%") && strings.Contains(i.Address, ":") && address(i.Address) != i.Address {
				t.Errorf("address %q", i.Address)
			}
			if i.Disabled != (i.Reason != "" && !i.Unhealthy) {
				t.Errorf("%+v has no reason, or one too many", i)
			}
		}
		again, err := convertJSON(k, b)
		if diff := cmp.Diff(got, again, equalSets); err != nil || diff != "" {
			t.Errorf("another time: %v %s", err, diff)
		}
	})
}

// TestWeightThatIsNone holds that a weight which is no number harms its instance alone.
func TestWeightThatIsNone(t *testing.T) {
	var info serviceInfo
	text := `{"hosts":[{"ip":"10.0.0.1","port":80,"weight":"NaN","healthy":true,"enabled":true},
		{"ip":"10.0.0.2","port":80,"weight":0.5,"healthy":true,"enabled":true}]}`
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		t.Fatal(err)
	}
	s, err := convert(key{"g", "s"}, "public", info)
	if err != nil || len(s.Instances) != 2 || s.Instances[0].Weight != -1 || s.Instances[1].Weight != 0.5 {
		t.Errorf("the service is %+v, %v", s, err)
	}
}

// TestRefusalsOfOneServer holds that another server is tried where the answer to a login may be this server's own trouble.
func TestRefusalsOfOneServer(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{{errRefused, true}, {fmt.Errorf("log in: %w", errUnclear), false}, {errContradiction, false}} {
		if got := final(c.err); got != c.want {
			t.Errorf("final(%v) = %t", c.err, got)
		}
	}
}
