package admin

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// The pages in istiod's form, as a whole.
func TestGolden(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		for _, page := range []string{"registryz", "endpointShardz", "configz"} {
			got := w.get("/debug/" + page)
			if !json.Valid([]byte(got)) {
				t.Errorf("%s is no JSON: %s", page, got)
			}
			file := filepath.Join("testdata", page+".json")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got; -update rewrites the files):\n%s", page, diff)
			}
		}
	})
}

// Each page has exactly the fields that a real istiod prints, of the same JSON types.
func TestFormOfIstiod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		for _, page := range []string{"registryz", "endpointShardz", "configz"} {
			recorded, err := os.ReadFile(filepath.Join("testdata", "istiod", page+".json"))
			if err != nil {
				t.Fatal(err)
			}
			want, got := form(t, recorded), form(t, []byte(w.get("/debug/"+page)))
			for _, optional := range []string{ // configz leaves out what is not set
				"[].spec.ports[].targetPort number",
			} {
				delete(want, optional)
			}
			for _, ours := range []string{ // a virtual address, and the DestinationRule
				"[].spec.addresses array", "[].spec.addresses[] string", "[].spec.host string", "[].spec.trafficPolicy object",
				"[].spec.trafficPolicy.portLevelSettings array", "[].spec.trafficPolicy.portLevelSettings[] object",
				"[].spec.trafficPolicy.portLevelSettings[].port object", "[].spec.trafficPolicy.portLevelSettings[].port.number number",
				"[].spec.trafficPolicy.portLevelSettings[].tls object", "[].spec.trafficPolicy.portLevelSettings[].tls.mode string",
				"[].spec.trafficPolicy.portLevelSettings[].tls.sni string",
				"[].spec.trafficPolicy.portLevelSettings[].tls.caCertificates string",
				"[].spec.trafficPolicy.portLevelSettings[].tls.subjectAltNames array",
				"[].spec.trafficPolicy.portLevelSettings[].tls.subjectAltNames[] string",
			} {
				delete(got, ours)
			}
			if diff := cmp.Diff(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))); diff != "" {
				t.Errorf("%s (-istiod +ours):\n%s", page, diff)
			}
		}
	})
}

// form returns the paths of all fields with their JSON types. Keys that are data count as one.
func form(t *testing.T, text []byte) map[string]bool {
	t.Helper()
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		typ := fmt.Sprintf("%T", v)
		switch v := v.(type) {
		case map[string]any:
			typ = "object"
			data := path == "" || path == ".*" || strings.HasSuffix(path, "abels") || strings.HasSuffix(path, "Shards") ||
				strings.HasSuffix(path, "endpoints[].ports")
			for k, e := range v {
				if data {
					k = "*"
				}
				walk(path+"."+k, e)
			}
		case []any:
			typ = "array"
			for _, e := range v {
				walk(path+"[]", e)
			}
		case float64:
			typ = "number"
		}
		out[path+" "+typ] = true
	}
	walk("", v)
	return out
}

// What Higress Console reads of the pages: without these its service list fails, or is empty.
func TestConsole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		// As the Console's own classes have it: absent objects are null there, and not checked before use.
		var services []struct {
			Attributes *struct{ ServiceRegistry, Name, Namespace string }
			Hostname   string `json:"hostname"`
			Ports      []struct {
				Name     string `json:"name"`
				Port     int    `json:"port"`
				Protocol string `json:"protocol"`
			} `json:"ports"`
		}
		var endpoints map[string]map[string]struct {
			Shards map[string][]struct {
				Addresses []string
				Labels    map[string]string
			}
		}
		w.decode("/debug/registryz", &services)
		w.decode("/debug/endpointShardz", &endpoints)
		got := map[string]string{}
		for _, s := range services {
			if s.Attributes == nil || len(s.Ports) != 1 || s.Ports[0].Port == 0 || s.Ports[0].Protocol == "" {
				t.Fatalf("the Console cannot read %+v", s)
			}
			var addresses []string
			for _, shard := range endpoints[s.Hostname][s.Attributes.Namespace].Shards {
				for _, e := range shard {
					if e.Addresses == nil || e.Labels == nil {
						t.Errorf("%s has an endpoint without addresses or labels", s.Hostname)
					}
					addresses = append(addresses, e.Addresses...)
				}
			}
			if len(addresses) == 0 && s.Attributes.Namespace == "mcp" && strings.HasSuffix(s.Attributes.Name, ".dns") {
				addresses = []string{"the domain of " + strings.TrimSuffix(s.Attributes.Name, ".dns")}
			}
			got[s.Hostname] = fmt.Sprint(s.Attributes.Namespace, " ", s.Ports[0].Port, " ", s.Ports[0].Protocol, " ", addresses)
		}
		want := map[string]string{
			"Order_Service.consul": "mcp 8080 HTTP [10.0.0.5 10.0.0.6]",
			"named.consul":         "mcp 9000 HTTP [node-1.example.com]",
			"empty.consul":         "mcp 80 HTTP []",
			"db.consul":            "mcp 5432 TCP [10.0.0.9]",
			"shop.dns":             "mcp 443 HTTPS [the domain of shop]",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the Console would show (-want +got):\n%s", diff)
		}
	})
}

func TestConfigzFilters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, entries("consul/main", "dns/shop"))
		w.fill()
		for query, want := range map[string]string{
			"?kind=DestinationRule":                                    "DestinationRule mcp/shop.dns",
			"?kind=destinationrule&name=shop.dns":                      "DestinationRule mcp/shop.dns",
			"?kind=networking.istio.io/ServiceEntry&name=mcp/shop.dns": "ServiceEntry mcp/shop.dns",
			"?name=shop.dns":                                           "ServiceEntry mcp/shop.dns, DestinationRule mcp/shop.dns",
			"?name=nobody":                                             "",
			"?kind=EnvoyFilter":                                        "",
			"?name=empty.consul":                                       "ServiceEntry mcp/empty.consul",
		} {
			var resources []struct {
				Kind     string
				Metadata struct{ Namespace, Name string }
			}
			w.decode("/debug/configz"+query, &resources)
			var got []string
			for _, r := range resources {
				got = append(got, r.Kind+" "+r.Metadata.Namespace+"/"+r.Metadata.Name)
			}
			if strings.Join(got, ", ") != want {
				t.Errorf("%s: got %v, want %s", query, got, want)
			}
		}
		// The creation time of services is that of their resources.
		var resources []struct {
			Metadata struct{ CreationTimestamp string }
		}
		var services []struct{ CreationTime string }
		w.decode("/debug/configz", &resources)
		w.decode("/debug/registryz", &services)
		if resources[0].Metadata.CreationTimestamp != services[0].CreationTime {
			t.Errorf("a service was created %s, its resource %s", services[0].CreationTime, resources[0].Metadata.CreationTimestamp)
		}
	})
}
