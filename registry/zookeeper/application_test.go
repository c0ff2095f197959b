package zookeeper

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecodeMapping(t *testing.T) {
	for data, want := range map[string][]string{
		"":                      nil,
		"app-a":                 {"app-a"},
		"app-b, app-a,,app-b\n": {"app-a", "app-b"},
		" , ":                   nil,
	} {
		if got := decodeMapping([]byte(data)); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", data, got, want)
		}
	}
}

// TestDecodeMetadata reads both forms that real providers wrote: of 3.3.6 with ports, of 2.7.23 without.
func TestDecodeMetadata(t *testing.T) {
	for file, want := range map[string][]export{
		"testdata/dubbo3/all-dubbo-tri-remote.jsonl": {
			{key: serviceKey{"demo.api.Greeter", "", "g1"}, protocol: "dubbo", port: 20880},
			{key: serviceKey{"demo.api.Greeter", "", "g1"}, protocol: "tri", port: 50051},
			{key: serviceKey{"t.DubboProviderMain$Stock", "2.0.0", ""}, protocol: "dubbo", port: 20880},
			{key: serviceKey{"t.DubboProviderMain$Stock", "2.0.0", ""}, protocol: "tri", port: 50051},
		},
		"testdata/dubbo2/service-local.jsonl": {
			{key: serviceKey{"demo.api.Greeter", "", ""}, protocol: "dubbo"},
			{key: serviceKey{"t.DubboProviderMain$Stock", "2.0.0", ""}, protocol: "dubbo"},
		},
	} {
		for p, data := range readRecording(t, file) {
			if !strings.HasPrefix(data, `{"app":`) {
				continue
			}
			got, err := decodeMetadata([]byte(data))
			if err != nil {
				t.Fatalf("%s: %v", p, err)
			}
			for n := range got {
				if release, _ := got[n].metadata.Get("release"); release == "" {
					t.Errorf("%s: %+v has no parameters", p, got[n])
				}
				got[n].metadata = export{}.metadata
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(export{}, serviceKey{}), equalSets); diff != "" {
				t.Errorf("%s: -want +got:\n%s", p, diff)
			}
		}
	}
}

// TestBadServiceOfMetadata harms only itself.
func TestBadServiceOfMetadata(t *testing.T) {
	got, err := decodeMetadata([]byte(`{"services":{"a":7,"b":{"protocol":"dubbo"},"c":{"name":"a.C","version":"0.0.0","port":"x","params":{"weight":50}},
		"d":{"params":{"interface":"a.D","group":"g","version":"1"}}}}`))
	if err == nil || !strings.Contains(err.Error(), `"a"`) || !strings.Contains(err.Error(), `"b" of the metadata names no interface`) {
		t.Errorf("error %v", err)
	}
	if len(got) != 2 || got[0].key != (serviceKey{iface: "a.C"}) || got[0].port != 0 || got[1].key != (serviceKey{"a.D", "1", "g"}) {
		t.Errorf("got %+v", got)
	}
	if _, err := decodeMetadata([]byte("127.0.0.1")); err == nil {
		t.Error("what is no JSON is no metadata")
	}
}

func TestDecodeDefinition(t *testing.T) {
	want := map[string]serviceKey{
		"/dubbo/metadata/demo.api.Greeter/1.0.0/g1/provider/demo2":         {"demo.api.Greeter", "1.0.0", "g1"},
		"/dubbo/metadata/t.DubboProviderMain%24Stock/2.0.0/provider/demo2": {"t.DubboProviderMain$Stock", "2.0.0", ""},
	}
	for p, data := range readRecording(t, "testdata/dubbo2/interface-two-services.jsonl") {
		if k, ok := want[p]; ok {
			if got, err := decodeDefinition([]byte(data)); err != nil || got != k {
				t.Errorf("%s: got %+v, error %v; want %+v", p, got, err, k)
			}
			delete(want, p)
		}
	}
	if len(want) > 0 {
		t.Errorf("not recorded: %v", want)
	}
	for _, data := range []string{"", "127.0.0.1", "{}", `{"parameters":{"interface":null}}`} {
		if k, err := decodeDefinition([]byte(data)); err == nil {
			t.Errorf("%q became %+v", data, k)
		}
	}
}

func TestExports(t *testing.T) {
	n := mustNode(t, twoEndpoints)
	of, err := decodeMetadata([]byte(`{"services":{
		"1":{"name":"a.B","protocol":"dubbo","port":20880,"params":{"weight":"50","side":"provider"}},
		"2":{"name":"a.B","protocol":"rest","port":8081},
		"3":{"name":"a.C","protocol":"REST","params":{"disabled":"true"}},
		"4":{"name":"a.D","protocol":"tri"},
		"5":{"name":"org.apache.dubbo.metadata.MetadataService","protocol":"dubbo","port":20880}}}`))
	if err != nil {
		t.Fatal(err)
	}
	of = append(of, export{key: serviceKey{iface: "org.apache.dubbo.metadata.MetadataServiceV2"}})
	var got []string
	for _, e := range exports(n, of) {
		got = append(got, e.key.iface+" "+show(e.instance))
		if e.application != "pa" {
			t.Errorf("%+v", e)
		}
		if protocol, _ := e.instance.Metadata.Get("protocol"); protocol != e.instance.Protocol {
			t.Errorf("label protocol is %q: %+v", protocol, e.instance)
		}
	}
	want := []string{
		"a.B dubbo 10.0.0.7:20880 weight 0.5",
		"a.C rest 10.0.0.7:8080 weight 1 disabled: is disabled by its parameter disabled=true",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
