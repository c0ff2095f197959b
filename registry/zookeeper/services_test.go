package zookeeper

import (
	"math/rand"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mustProviders(t *testing.T, nodes ...string) []provider {
	t.Helper()
	var out []provider
	for _, n := range nodes {
		p, err := decodeProvider("a.B", encoded(n))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func mustNode(t *testing.T, data string) node {
	t.Helper()
	n, err := decodeNode([]byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// twoEndpoints is a process of the application pa that speaks Dubbo and REST.
const twoEndpoints = `{"name":"pa","address":"10.0.0.7","port":20880,"payload":{"metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"},{\"port\":8080,\"protocol\":\"rest\"}]"}}}`

func TestInterfaceServices(t *testing.T) {
	certain := export{key: serviceKey{iface: "a.B"}, protocol: "dubbo", port: 20880}
	guess := export{key: serviceKey{iface: "a.B"}}
	for name, c := range map[string]struct {
		providers []string
		node      string
		of        []export
		want      []string // without any there is no service
	}{
		"nothing": {},
		"by version and group": {
			providers: []string{
				"dubbo://10.0.0.2:1/a.B?version=2.0.0&group=g", "dubbo://10.0.0.1:1/a.B?version=2.0.0&group=g", "tri://10.0.0.1:2/a.B?version=2.0.0&group=g",
				"dubbo://10.0.0.1:1/a.B?version=1.0.0", "dubbo://10.0.0.3:1/a.B", "dubbo://10.0.0.4:1/a.B?version=0.0.0",
			},
			want: []string{
				"providers:a.B:0.0.0:", "  dubbo 10.0.0.3:1 weight 1", "  dubbo 10.0.0.4:1 weight 1",
				"providers:a.B:1.0.0:", "  dubbo 10.0.0.1:1 weight 1",
				"providers:a.B:2.0.0:g", "  dubbo 10.0.0.1:1 weight 1", "  tri 10.0.0.1:2 weight 1", "  dubbo 10.0.0.2:1 weight 1",
			},
		},
		"the later of two nodes of one place": {
			providers: []string{
				"dubbo://10.0.0.1:1/a.B?timestamp=1795457025553&weight=200", "dubbo://10.0.0.1:1/a.B?timestamp=1795457025554&weight=0",
				"dubbo://10.0.0.1:1/a.B?timestamp=999999999999&weight=300", "dubbo://10.0.0.1:1/a.B?weight=400",
			},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.1:1 weight 0"},
		},
		"the application's level alone": {
			node: twoEndpoints, of: []export{certain},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 1"},
		},
		"the application's level alone, guessed": {
			node: twoEndpoints, of: []export{guess},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 1"},
		},
		"the protocol is known, the port is not": {
			node: twoEndpoints, of: []export{{key: serviceKey{iface: "a.B"}, protocol: "rest"}},
			want: []string{"providers:a.B:0.0.0:", "  rest 10.0.0.7:8080 weight 1"},
		},
		"the node's own port is no endpoint": {
			node: strings.Replace(twoEndpoints, `"port":20880,`, `"port":1,`, 1), of: []export{guess},
			want: []string{"providers:a.B:0.0.0:", "  rest 10.0.0.7:8080 weight 1", "  dubbo 10.0.0.7:20880 weight 1"},
		},
		"beside another process": {
			providers: []string{"dubbo://10.0.0.7:20881/a.B"}, node: twoEndpoints, of: []export{certain},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 1", "  dubbo 10.0.0.7:20881 weight 1"},
		},
		"at both levels": {
			providers: []string{"dubbo://10.0.0.7:20880/a.B?weight=50"}, node: twoEndpoints, of: []export{certain},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 0.5"},
		},
		"at both levels, and disabled": {
			providers: []string{"dubbo://10.0.0.7:20880/a.B?disabled=true"}, node: twoEndpoints, of: []export{certain},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 1 disabled: is disabled by its parameter disabled=true"},
		},
		"at both levels, and nothing is guessed": {
			providers: []string{"dubbo://10.0.0.7:20880/a.B"}, node: twoEndpoints, of: []export{guess},
			want: []string{"providers:a.B:0.0.0:", "  dubbo 10.0.0.7:20880 weight 1"},
		},
		"an old definition tells of a version that it does not serve any more": {
			providers: []string{"dubbo://10.0.0.7:20880/a.B?version=2"}, node: twoEndpoints, of: []export{guess},
			want: []string{"providers:a.B:2:", "  dubbo 10.0.0.7:20880 weight 1"},
		},
		"another interface": {
			node: twoEndpoints, of: []export{{key: serviceKey{iface: "a.C"}}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			providers := mustProviders(t, c.providers...)
			var all []exported
			if c.node != "" {
				all = exports(mustNode(t, c.node), c.of)
			}
			got := interfaceServices("a.B", providers, nil, all)
			if diff := cmp.Diff(strings.Join(append(c.want, ""), "\n"), showAll(got)); len(c.want) > 0 && diff != "" || len(c.want) == 0 && len(got) > 0 {
				t.Errorf("-want +got:\n%s", diff)
			}
			for range 10 { // the order of nodes in ZooKeeper means nothing
				rand.Shuffle(len(providers), func(i, k int) { providers[i], providers[k] = providers[k], providers[i] })
				slices.Reverse(all)
				if diff := cmp.Diff(got, interfaceServices("a.B", providers, nil, all), equalSets); diff != "" {
					t.Fatalf("in another order: %s", diff)
				}
			}
		})
	}
}

// TestRuleForApplicationLevel: providers at the application's level do not follow a rule for one of their interfaces. Such a
// rule does not undo what the node says of itself.
func TestRuleForApplicationLevel(t *testing.T) {
	of := []export{{key: serviceKey{iface: "a.B"}, protocol: "dubbo", port: 20880}}
	off := strings.Replace(twoEndpoints, `"port":20880,`, `"port":20880,"enabled":false,`, 1)
	for _, c := range []struct{ node, rule, want string }{
		{twoEndpoints, "override://10.0.0.7:20880/a.B" + rule + "&disabled=true", "dubbo 10.0.0.7:20880 weight 1 disabled: is disabled by a configurator"},
		{twoEndpoints, "override://0.0.0.0/a.B" + rule + "&application=pa&weight=50", "dubbo 10.0.0.7:20880 weight 0.5"},
		{twoEndpoints, "override://0.0.0.0/a.B" + rule + "&application=pb&weight=50", "dubbo 10.0.0.7:20880 weight 1"},
		{off, "override://0.0.0.0/a.B" + rule + "&weight=50&disabled=false", "dubbo 10.0.0.7:20880 weight 0.5 disabled: is not enabled (enabled=false)"},
	} {
		o, err := decodeOverride("a.B", encoded(c.rule))
		if err != nil {
			t.Fatal(err)
		}
		got := interfaceServices("a.B", nil, []override{o}, exports(mustNode(t, c.node), of))
		if len(got) != 1 || len(got[0].Instances) != 1 || show(got[0].Instances[0]) != c.want {
			t.Errorf("%s: got %s, want %s", c.rule, showAll(got), c.want)
		}
	}
}
