package zookeeper

import (
	"path"
	"slices"
	"strings"
	"testing"
)

const rule = "?category=configurators&dynamic=false&enabled=true"

// TestOverrides: a provider of group g1, version 1.0.0 and weight 200, as the rules want it. What providers of Dubbo 2.7.23
// and 3.3.6 really did with such rules decides what is right.
func TestOverrides(t *testing.T) {
	const node = "dubbo://10.0.0.7:20880/a.B?application=pa&group=g1&version=1.0.0&side=provider&release=3.3.6"
	const key = "&group=g1&version=1.0.0"
	const plain = "dubbo 10.0.0.7:20880 weight 2"
	for name, c := range map[string]struct {
		parameters string // of the provider, beside those above
		rules      []string
		want       string
	}{
		"none":                {"&weight=200", nil, plain},
		"weight":              {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"weight 0":            {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&weight=0"}, "dubbo 10.0.0.7:20880 weight 0"},
		"weight for one port": {"&weight=200", []string{"override://0.0.0.0:20880/a.B" + rule + key + "&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"port 0 is all ports": {"&weight=200", []string{"override://0.0.0.0:0/a.B" + rule + key + "&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"disabled": {
			"&weight=200", []string{"override://10.0.0.7:20880/a.B" + rule + key + "&disabled=true"},
			plain + " disabled: is disabled by a configurator",
		},
		"disabled and followed": {
			"&weight=200&disabled=true", []string{"override://10.0.0.7:20880/a.B" + rule + key + "&disabled=true"},
			plain + " disabled: is disabled by its parameter disabled=true",
		},
		"enabled again":         {"&weight=200&disabled=true", []string{"override://10.0.0.7:20880/a.B" + rule + key + "&disabled=false"}, plain},
		"another port":          {"&weight=200", []string{"override://0.0.0.0:20881/a.B" + rule + key + "&weight=50"}, plain},
		"another host":          {"&weight=200", []string{"override://10.0.0.8:20880/a.B" + rule + key + "&weight=50"}, plain},
		"a consumer's host":     {"&weight=200", []string{"override://10.0.0.7/a.B" + rule + key + "&weight=50"}, plain},
		"no group nor version":  {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + "&weight=50"}, plain},
		"* is no wildcard":      {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + "&group=*&version=*&weight=50"}, plain},
		"another version":       {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + "&group=g1&version=2.0.0&weight=50"}, plain},
		"no category":           {"&weight=200", []string{"override://0.0.0.0/a.B?enabled=true&weight=50" + key}, plain},
		"another category":      {"&weight=200", []string{"override://0.0.0.0/a.B?category=routers&weight=50" + key}, plain},
		"switched off":          {"&weight=200", []string{"override://0.0.0.0/a.B?category=configurators&enabled=false&weight=50" + key}, plain},
		"on without saying so":  {"&weight=200", []string{"override://0.0.0.0/a.B?category=configurators&weight=50" + key}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"copy of a YAML rule":   {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&compatible_config=true&weight=50"}, plain},
		"its application":       {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&application=pa&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"any application":       {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&application=*&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"another application":   {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&application=pb&weight=50"}, plain},
		"for providers":         {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&side=provider&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"for consumers":         {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&side=consumer&weight=50"}, plain},
		"its address":           {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&providerAddresses=10.0.0.8:20880,10.0.0.7:20880&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"its host":              {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&providerAddresses=10.0.0.7&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"any address":           {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&providerAddresses=0.0.0.0:*&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"other addresses":       {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&providerAddresses=10.0.0.7:20881,0.0.0.0:1&weight=50"}, plain},
		"its parameter":         {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&~release=3.3.6&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"another parameter":     {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&~release=2.7.23&weight=50"}, plain},
		"absent where it is":    {"&weight=200", []string{"absent://0.0.0.0/a.B" + rule + key + "&weight=50"}, plain},
		"absent where it isn't": {"", []string{"absent://0.0.0.0/a.B" + rule + key + "&weight=50"}, "dubbo 10.0.0.7:20880 weight 0.5"},
		"other parameters":      {"&weight=200", []string{"override://0.0.0.0/a.B" + rule + key + "&timeout=50&weight="}, plain},
		"marker for no rule":    {"&weight=200", []string{"empty://0.0.0.0/a.B?category=configurators"}, plain},
		"a host goes before all hosts": {"&weight=200", []string{
			"override://10.0.0.7:20880/a.B" + rule + key + "&weight=300",
			"override://0.0.0.0/a.B" + rule + key + "&weight=50&priority=9",
		}, "dubbo 10.0.0.7:20880 weight 3"},
		"the greater priority goes before": {"&weight=200", []string{
			"override://0.0.0.0/a.B" + rule + key + "&weight=300&priority=2",
			"override://0.0.0.0/a.B" + rule + key + "&weight=50&priority=-1",
			"override://0.0.0.0/a.B" + rule + key + "&weight=70",
		}, "dubbo 10.0.0.7:20880 weight 3"},
		"each sets its own": {"&weight=200", []string{
			"override://0.0.0.0/a.B" + rule + key + "&weight=50",
			"override://0.0.0.0/a.B" + rule + key + "&disabled=true",
		}, "dubbo 10.0.0.7:20880 weight 0.5 disabled: is disabled by a configurator"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := decodeProvider("a.B", encoded(node+c.parameters))
			if err != nil {
				t.Fatal(err)
			}
			var overrides []override
			for _, r := range c.rules {
				o, err := decodeOverride("a.B", encoded(r))
				if err != nil {
					t.Fatal(err)
				}
				overrides = append(overrides, o)
			}
			slices.Reverse(overrides) // their order in ZooKeeper means nothing
			got := interfaceServices("a.B", []provider{p}, overrides, nil)
			if len(got) != 1 || len(got[0].Instances) != 1 || show(got[0].Instances[0]) != c.want {
				t.Fatalf("got %s, want %s", showAll(got), c.want)
			}
			p.instance = got[0].Instances[0]
			if again := interfaceServices("a.B", []provider{p}, overrides, nil); again[0].Instances[0] != p.instance {
				t.Errorf("applied twice it is %+v, not %+v", again[0].Instances[0], p.instance)
			}
		})
	}
}

// TestFollowedRuleChangesNothing: whether the provider has already registered again, as the rule wants, cannot be seen. What
// it did in the recorded trees is what the rules make of it as it was before.
func TestFollowedRuleChangesNothing(t *testing.T) {
	const before = "dubbo://10.0.0.7:20880/a.B?application=pa&timestamp=5"
	for _, set := range []string{"weight=50", "disabled=true", "weight=0&disabled=false"} {
		o, err := decodeOverride("a.B", encoded("override://0.0.0.0/a.B"+rule+"&"+set))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, node := range []string{before, before + "&" + set} {
			p, err := decodeProvider("a.B", encoded(node))
			if err != nil {
				t.Fatal(err)
			}
			s := interfaceServices("a.B", []provider{p}, []override{o}, nil)
			i := s[0].Instances[0]
			i.Reason = "" // who says it is told
			got = append(got, show(i)+" "+i.Metadata.Encoded())
		}
		if got[0] != got[1] {
			t.Errorf("%s: by us %q, by itself %q", set, got[0], got[1])
		}
	}
}

func TestNoOverride(t *testing.T) {
	for node, want := range map[string]string{
		"":                             "no URL",
		"route://0.0.0.0/a.B?weight=1": "only override:// and absent:// are known",
		"override:///a.B?weight=1":     "no host",
		"override://0.0.0.0:99999/a.B": "no port",
		"override://0.0.0.0:x/a.B":     "no port",
		"override://\x00/a.B":          "no text",
	} {
		o, err := decodeOverride("a.B", encoded(node))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "a.B") {
			t.Errorf("%q became %+v, error %v; want one with %q", node, o, err, want)
		}
	}
}

func FuzzDecodeOverride(f *testing.F) {
	for _, file := range recordings(f) {
		for p := range readRecording(f, file) {
			if path.Base(path.Dir(p)) == "configurators" {
				f.Add(path.Base(p))
			}
		}
	}
	for _, node := range []string{
		"override://0.0.0.0/a.B" + rule + "&~side=*&providerAddresses=[::1]:1,,:&weight=-1", "absent://10.0.0.7:20880/a.B" + rule + "&disabled=x&priority=y",
	} {
		f.Add(encoded(node))
	}
	p, err := decodeProvider("a.B", encoded("dubbo://10.0.0.7:20880/a.B?application=pa"))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, node string) {
		o, err := decodeOverride("a.B", node)
		if err != nil {
			checkError(t, err)
			return
		}
		overrides := []override{o, o}
		got := interfaceServices("a.B", []provider{p}, overrides, nil)
		if len(got) != 1 || len(got[0].Instances) != 1 {
			t.Fatalf("a rule made %+v of one provider", got)
		}
		i := got[0].Instances[0]
		checkInstance(t, i)
		if i.Address != p.instance.Address || i.Port != p.instance.Port || i.Protocol != p.instance.Protocol {
			t.Errorf("a rule moved the provider: %+v", i)
		}
		if again := apply(overrides, p.key, p.application, i); again != i {
			t.Errorf("applied twice: %+v and %+v", i, again)
		}
	})
}
