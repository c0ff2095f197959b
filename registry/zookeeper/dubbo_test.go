package zookeeper

import (
	"maps"
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// encoded encodes a URL as Dubbo does: as a whole, a blank as a plus.
func encoded(u string) string { return url.QueryEscape(u) }

func TestDecodeProvider(t *testing.T) {
	for name, c := range map[string]struct {
		node string // not yet encoded
		key  serviceKey
		want string
	}{
		"plain":              {"dubbo://10.0.0.7:20880/a.B", serviceKey{}, "dubbo 10.0.0.7:20880 weight 1"},
		"triple":             {"tri://10.0.0.7:50051/a.B?side=provider", serviceKey{}, "tri 10.0.0.7:50051 weight 1"},
		"rest":               {"rest://10.0.0.7:8080/context/a.B", serviceKey{}, "rest 10.0.0.7:8080 weight 1"},
		"grpc":               {"grpc://10.0.0.7:50052/a.B", serviceKey{}, "grpc 10.0.0.7:50052 weight 1"},
		"http":               {"http://10.0.0.7:80/a.B", serviceKey{}, "http 10.0.0.7:80 weight 1"},
		"case of the scheme": {"DUBBO://10.0.0.7:20880/a.B", serviceKey{}, "dubbo 10.0.0.7:20880 weight 1"},
		"IPv6":               {"dubbo://[2001:db8::7]:20880/a.B", serviceKey{}, "dubbo 2001:db8::7:20880 weight 1"},
		"IPv6 without brackets": {
			"dubbo://2001:db8:0:0:0:0:0:7:20880/a.B", serviceKey{}, "dubbo 2001:db8::7:20880 weight 1",
		},
		"IPv6 with a zone": {"dubbo://[fe80::7%eth0]:20880/a.B", serviceKey{}, "dubbo fe80::7:20880 weight 1"},
		"host name":        {"dubbo://pod-0.order.svc:20880/a.B", serviceKey{}, "dubbo pod-0.order.svc:20880 weight 1"},
		"user":             {"dubbo://app:s3cret@10.0.0.7:20880/a.B", serviceKey{}, "dubbo 10.0.0.7:20880 weight 1"},
		"no path":          {"dubbo://10.0.0.7:20880", serviceKey{}, "dubbo 10.0.0.7:20880 weight 1"},
		"no path but parameters": {
			"dubbo://10.0.0.7:20880?version=1.0.0", serviceKey{version: "1.0.0"}, "dubbo 10.0.0.7:20880 weight 1",
		},
		"group and version": {"dubbo://10.0.0.7:1/a.B?group=g&version=2", serviceKey{version: "2", group: "g"}, "dubbo 10.0.0.7:1 weight 1"},
		"version 0.0.0":     {"dubbo://10.0.0.7:1/a.B?version=0.0.0", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"another interface": {"dubbo://10.0.0.7:1/other?interface=other", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"weight":            {"dubbo://10.0.0.7:1/a.B?weight=200", serviceKey{}, "dubbo 10.0.0.7:1 weight 2"},
		"weight 0":          {"dubbo://10.0.0.7:1/a.B?weight=0", serviceKey{}, "dubbo 10.0.0.7:1 weight 0"},
		"weight 1":          {"dubbo://10.0.0.7:1/a.B?weight=1&warmup=600000", serviceKey{}, "dubbo 10.0.0.7:1 weight 0.01"},
		"weight of Dubbo 2.6": {
			"dubbo://10.0.0.7:1/a.B?default.weight=50", serviceKey{}, "dubbo 10.0.0.7:1 weight 0.5",
		},
		"negative weight": {"dubbo://10.0.0.7:1/a.B?weight=-5", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"no weight":       {"dubbo://10.0.0.7:1/a.B?weight=heavy", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"disabled":        {"dubbo://10.0.0.7:1/a.B?disabled=true", serviceKey{}, "dubbo 10.0.0.7:1 weight 1 disabled: is disabled by its parameter disabled=true"},
		"not enabled":     {"dubbo://10.0.0.7:1/a.B?enabled=false", serviceKey{}, "dubbo 10.0.0.7:1 weight 1 disabled: is disabled by its parameter enabled=false"},
		"disabled goes before enabled": {
			"dubbo://10.0.0.7:1/a.B?enabled=false&disabled=false", serviceKey{}, "dubbo 10.0.0.7:1 weight 1",
		},
		"not disabled":     {"dubbo://10.0.0.7:1/a.B?disabled=&enabled=True", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"persistent":       {"dubbo://10.0.0.7:1/a.B?dynamic=false&category=providers", serviceKey{}, "dubbo 10.0.0.7:1 weight 1"},
		"plus and percent": {"dubbo://10.0.0.7:1/a.B?version=1.0+b%31", serviceKey{version: "1.0+b%31"}, "dubbo 10.0.0.7:1 weight 1"},
		"odd parameters":   {"dubbo://10.0.0.7:1/a.B?&&=x&flag&a=b=c&version=1", serviceKey{version: "1"}, "dubbo 10.0.0.7:1 weight 1"},
		"line break":       {"dubbo://10.0.0.7:1/a.B?owner=a\n\tb&version=1", serviceKey{version: "1"}, "dubbo 10.0.0.7:1 weight 1"},
		"question mark":    {"dubbo://10.0.0.7:1/a.B?mock=x?y&version=1", serviceKey{version: "1"}, "dubbo 10.0.0.7:1 weight 1"},
	} {
		t.Run(name, func(t *testing.T) {
			c.key.iface = "a.B"
			p, err := decodeProvider("a.B", encoded(c.node))
			if err != nil {
				t.Fatal(err)
			}
			if p.key != c.key || show(p.instance) != c.want {
				t.Errorf("got %+v %s, want %+v %s", p.key, show(p.instance), c.key, c.want)
			}
		})
	}
}

// TestProviderLabels: all parameters, decoded once, and the protocol.
func TestProviderLabels(t *testing.T) {
	for node, want := range map[string]map[string]string{
		"dubbo%3A%2F%2F10.0.0.7%3A1%2Fa.B%24C%3Fmethods%3Da%2Cb%26note%3Da%2Bb+c%2520d%26empty%3D%26flag": {
			"methods": "a,b", "note": "a+b c%20d", "empty": "", "flag": "", "protocol": "dubbo",
		},
		"tri://10.0.0.7:1/a.B?a=1&a=2":       {"a": "2", "protocol": "tri"},
		"tri://10.0.0.7:1/a.B?protocol=grpc": {"protocol": "grpc"},
	} {
		p, err := decodeProvider("a.B$C", node)
		if err != nil {
			t.Errorf("%s: %v", node, err)
		}
		if diff := cmp.Diff(want, p.instance.Metadata.Map()); diff != "" {
			t.Errorf("%s: -want +got:\n%s", node, diff)
		}
	}
}

func TestNoProvider(t *testing.T) {
	for node, want := range map[string]string{
		"":                                                   "no URL",
		"10.0.0.7:20880":                                     "no URL",
		"://10.0.0.7:1/a.B":                                  "no URL",
		"a b://10.0.0.7:1/a.B":                               "no URL",
		"dubbo://":                                           "neither an IP address nor a host name",
		"dubbo:///a.B":                                       "neither an IP address nor a host name",
		"dubbo://:20880/a.B":                                 "neither an IP address nor a host name",
		"dubbo://10.0.0.7/a.B":                               "no port from 1 to 65535",
		"injvm://127.0.0.1/a.B?side=provider":                "no port from 1 to 65535",
		"dubbo://10.0.0.7:0/a.B":                             "no port from 1 to 65535",
		"dubbo://10.0.0.7:65536/a.B":                         "no port from 1 to 65535",
		"dubbo://10.0.0.7:-1/a.B":                            "no port from 1 to 65535",
		"dubbo://10.0.0.7:x/a.B":                             "no port from 1 to 65535",
		"dubbo://10.0.0.999:1/a.B":                           "neither an IP address nor a host name",
		"dubbo://2001:db8::7/a.B":                            "neither an IP address nor a host name", // 7 is the port
		"dubbo://0.0.0.0:20880/a.B":                          "that of all interfaces",
		"dubbo://[::]:20880/a.B":                             "that of all interfaces",
		"empty://0.0.0.0/a.B?category=providers":             "no provider at all",
		"consumer://10.0.0.7:1/a.B":                          "wrong folder",
		"override://0.0.0.0/a.B":                             "wrong folder",
		"dubbo://10.0.0.7:1/a.B?category=consumers":          "one of the consumers",
		"dubbo://10.0.0.7:1/a.B?side=consumer":               "a consumer",
		"dubbo://10.0.0.7:1/a.B\x00?version=1":               "no text",
		"dubbo://10.0.0\n.7:1/a.B":                           "host name",
		"dubbo://10.0.0.7:1/a.B?version=\xff":                "no text",
		"dubbo://10.0.0.7:1/" + strings.Repeat("a", maxName): "bytes",
		"dubbo://" + strings.Repeat("a", 1000) + ":1/a.B":    "neither an IP address nor a host name",
	} {
		p, err := decodeProvider("a.B", encoded(node))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "a.B") || len(err.Error()) > 400 {
			t.Errorf("%.50s became %+v, error %v; want one with %q", node, p, err, want)
		}
	}
	if _, err := decodeProvider("a.B", "dubbo%3A%2F%2F10.0.0.7%3A1%ZZ"); err == nil || !strings.Contains(err.Error(), "percent-encoded") {
		t.Errorf("half an escape: %v", err)
	}
}

// TestNoSecretInErrors: the parameters of a URL are not repeated, nor who it logs in as.
func TestNoSecretInErrors(t *testing.T) {
	for _, node := range []string{"dubbo://app:s3cret@10.0.0.7:0/a.B?token=s3cret", "s3cret://app:x@h:1/a.B?side=consumer&token=y"} {
		_, err := decodeProvider("a.B", encoded(node))
		if err == nil || strings.Contains(err.Error(), "app") || strings.Contains(err.Error(), "token") {
			t.Errorf("%s: %v", node, err)
		}
	}
}

// TestTokenIsNoLabel: who knows a provider's token may call it without being told by the registry that it may.
func TestTokenIsNoLabel(t *testing.T) {
	p, err := decodeProvider("a.B", encoded("dubbo://10.0.0.7:1/a.B?token=s3cret&side=provider"))
	if err != nil || !maps.Equal(p.instance.Metadata.Map(), map[string]string{"protocol": "dubbo", "side": "provider"}) {
		t.Errorf("the labels are %v, error %v", p.instance.Metadata, err)
	}
	all, err := decodeMetadata([]byte(`{"services":{"a.B:dubbo":{"name":"a.B","protocol":"dubbo","params":{"token":"s3cret","side":"provider"}}}}`))
	if err != nil || len(all) != 1 || !maps.Equal(all[0].metadata.Map(), map[string]string{"side": "provider"}) {
		t.Errorf("exported are %+v, error %v", all, err)
	}
}

func TestServiceKey(t *testing.T) {
	for want, k := range map[string]serviceKey{
		"providers:com.foo.Bar:1.0.0:g": newServiceKey("com.foo.Bar", "1.0.0", "g"),
		"providers:com.foo.Bar:0.0.0:":  newServiceKey("com.foo.Bar", "", ""),
		"providers:a.B$C:0.0.0:g/h":     newServiceKey("a.B$C", "0.0.0", "g/h"),
	} {
		s := k.service(nil)
		if s.ID != want || s.Host != want+".zookeeper" || len(s.Instances) != 0 {
			t.Errorf("got %+v, want %s", s, want)
		}
	}
}

func FuzzDecodeProvider(f *testing.F) {
	for _, file := range recordings(f) {
		for p := range readRecording(f, file) {
			if path.Base(path.Dir(p)) == "providers" {
				f.Add(path.Base(p))
			}
		}
	}
	for _, node := range []string{"dubbo://[fe80::1%eth0]:1/a?weight=0&disabled=true", "tri://u:p@h_1:65535?timestamp=9", "empty://0.0.0.0/a", "a:://:@:"} {
		f.Add(encoded(node))
	}
	f.Fuzz(func(t *testing.T, node string) {
		p, err := decodeProvider("a.B", node)
		again, _ := decodeProvider("a.B", node)
		if p != again {
			t.Errorf("read twice: %+v and %+v", p, again)
		}
		if err != nil {
			checkError(t, err)
			return
		}
		checkInstance(t, p.instance)
		if p.key.iface != "a.B" || p.instance.Protocol == "" || p.instance.Protocol != strings.ToLower(p.instance.Protocol) {
			t.Errorf("%+v", p)
		}
		other := p
		other.timestamp++
		got := interfaceServices("a.B", []provider{p, other, p}, nil, nil)
		if len(got) != 1 || len(got[0].Instances) != 1 || got[0].Instances[0] != p.instance {
			t.Errorf("three nodes of one provider gave %+v", got)
		}
	})
}
