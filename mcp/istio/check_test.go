package istio_test

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/mcp/istio"
)

// entry returns a ServiceEntry that both dialects take, changed by change.
func entry(change func(*networking.ServiceEntry)) istio.Object {
	e := &networking.ServiceEntry{
		Hosts:      []string{"a.example"},
		Ports:      []*networking.ServicePort{{Number: 80, Name: "HTTP", Protocol: "HTTP"}},
		Location:   networking.ServiceEntry_MESH_INTERNAL,
		Resolution: networking.ServiceEntry_STATIC,
		Endpoints: []*networking.WorkloadEntry{{
			Address: "10.0.0.1", Ports: map[string]uint32{"HTTP": 8080}, Labels: map[string]string{"version": "v1"},
		}},
	}
	if change != nil {
		change(e)
	}
	return istio.Object{Kind: istio.ServiceEntryKind, Namespace: "mcp", Name: "a.example", Spec: e}
}

func TestCheckEntry(t *testing.T) {
	type E = networking.ServiceEntry
	host := func(h string) func(*E) { return func(e *E) { e.Hosts = []string{h} } }
	protocol := func(p string) func(*E) { return func(e *E) { e.Ports[0].Protocol = p } }
	port := func(n uint32) func(*E) { return func(e *E) { e.Ports[0].Number = n } }
	portName := func(name string) func(*E) { return func(e *E) { e.Ports[0].Name, e.Endpoints[0].Ports = name, nil } }
	address := func(r networking.ServiceEntry_Resolution, a string) func(*E) {
		return func(e *E) { e.Resolution, e.Endpoints[0].Address = r, a }
	}
	label := func(k, v string) func(*E) { return func(e *E) { e.Endpoints[0].Labels = map[string]string{k: v} } }
	lookup := func(h string) func(*E) {
		return func(e *E) { e.Hosts, e.Resolution, e.Endpoints = []string{h}, networking.ServiceEntry_DNS, nil }
	}
	const static, dns = networking.ServiceEntry_STATIC, networking.ServiceEntry_DNS
	label63, label64 := strings.Repeat("x", 63), strings.Repeat("x", 64)

	tests := []struct {
		name   string
		change func(*E)
		// stock and higress are the paths of the offences, separated by blanks.
		stock, higress string
	}{
		{"fine", nil, "", ""},

		{"no host", func(e *E) { e.Hosts = nil }, "hosts", "hosts"},
		{"empty host", host(""), "hosts[0]", "hosts[0]"},
		{"all hosts", host("*"), "hosts[0]", ""},
		{"wildcard", host("*.example"), "", ""},
		{"wildcard in front", host("*-a.example"), "", ""},
		{"wildcard before a letter", host("*a.example"), "", ""},
		{"wildcard behind", host("a*.example"), "hosts[0]", ""},
		{"wildcard inside", host("a.*.example"), "hosts[0]", ""},
		{"two wildcards", host("**.example"), "hosts[0]", ""},
		{"wildcard and hyphen alone", host("*-.example"), "hosts[0]", ""},
		{"upper case", host("A.Example"), "", ""},
		{"one part", host("a"), "", ""},
		{"one number", host("123"), "", ""},
		{"numeric top level", host("a.123"), "hosts[0]", ""},
		{"huge numeric top level", host("a.12345678901234567890"), "", ""},
		{"final dot", host("a.example."), "", ""},
		{"final dot after a number", host("a.5."), "", ""},
		{"two final dots", host("a.example.."), "hosts[0]", ""},
		{"dot alone", host("."), "hosts[0]", ""},
		{"first part empty", host(".example"), "hosts[0]", ""},
		{"inner part empty", host("a..example"), "hosts[0]", ""},
		{"underscore", host("a_b.example"), "hosts[0]", ""},
		{"colon", host("a:b.example"), "hosts[0]", ""},
		{"leading hyphen", host("-a.example"), "hosts[0]", ""},
		{"trailing hyphen", host("a-.example"), "hosts[0]", ""},
		{"not ASCII", host("訂單.example"), "hosts[0]", ""},
		{"line break", host("a.example\n"), "hosts[0]", ""},
		{"not UTF-8", host("a\xff.example"), "hosts[0]", "hosts[0]"},
		{"63 bytes", host(label63 + ".example"), "", ""},
		{"64 bytes", host(label64 + ".example"), "hosts[0]", ""},
		{"64 bytes behind", host("a." + label64), "hosts[0]", ""},
		{"255 bytes", host(strings.Repeat("a.", 127) + "b"), "", ""},
		{"256 bytes", host(strings.Repeat("a.", 127) + "bc"), "hosts[0]", ""},
		{"second host", func(e *E) { e.Hosts = []string{"a.example", "b_.example"} }, "hosts[1]", ""},
		{"several hosts on TCP", func(e *E) { e.Hosts, e.Ports[0].Protocol = []string{"a", "b"}, "TCP" }, "ports[0].protocol", ""},
		{"several hosts on TLS", func(e *E) { e.Hosts, e.Ports[0].Protocol = []string{"a", "b"}, "TLS" }, "", ""},

		{"no port", func(e *E) { e.Ports, e.Endpoints[0].Ports = nil, nil }, "", ""},
		{"null port", func(e *E) { e.Ports = append(e.Ports, nil) }, "ports[1]", "ports[1]"},
		{"port 0", port(0), "ports[0].number", "ports[0].number"},
		{"port 65535", port(65535), "", ""},
		{"port 65536", port(65536), "ports[0].number", "ports[0].number"},
		{"target port 65536", func(e *E) { e.Ports[0].TargetPort = 65536 }, "ports[0].targetPort", "ports[0].targetPort"},
		{"port name without text", portName(""), "ports[0].name", "ports[0].name"},
		{"port name in lower case", portName("http-1"), "", ""},
		{"port name with a dot", portName("http.1"), "ports[0].name", ""},
		{"port name of 64 bytes", portName(label64), "ports[0].name", ""},
		{"same port name", func(e *E) {
			e.Ports = append(e.Ports, &networking.ServicePort{Number: 81, Name: "HTTP", Protocol: "HTTP"})
		}, "ports[1].name", "ports[1].name"},
		{"same port number", func(e *E) {
			e.Ports = append(e.Ports, &networking.ServicePort{Number: 80, Name: "x", Protocol: "HTTP"})
		}, "ports[1].number", "ports[1].number"},
		{"no protocol", protocol(""), "", "ports[0].protocol"},
		{"protocol in lower case", protocol("grpc-web"), "", ""},
		{"Dubbo", protocol("Dubbo"), "ports[0].protocol", ""},
		{"GRPCS", protocol("GRPCS"), "ports[0].protocol", ""},
		{"UnsupportedProtocol", protocol("UnsupportedProtocol"), "ports[0].protocol", ""},

		{"null endpoint", func(e *E) { e.Endpoints = append(e.Endpoints, nil) }, "endpoints[1]", "endpoints[1]"},
		{"no endpoint", func(e *E) { e.Endpoints = nil }, "", ""},
		{"no address", address(static, ""), "endpoints[0].address", "endpoints[0].address"},
		{"a name", address(static, "web.example"), "endpoints[0].address", "endpoints[0].address"},
		{"v6", address(static, "2001:db8::1"), "", ""},
		{"v6 with a zone", address(static, "fe80::1%eth0"), "endpoints[0].address", "endpoints[0].address"},
		{"v6 in brackets", address(static, "[2001:db8::1]"), "endpoints[0].address", "endpoints[0].address"},
		{"leading zero", address(static, "10.0.0.01"), "endpoints[0].address", "endpoints[0].address"},
		{"unix socket", address(static, "unix:///run/x"), "endpoints[0].address", "endpoints[0].address"},
		{"a name to look up", address(dns, "web.example."), "", ""},
		{"an IP in DNS", address(dns, "10.0.0.1"), "", ""},
		{"underscore to look up", address(dns, "my_host.example"), "endpoints[0].address", ""},
		{"wildcard to look up", address(dns, "*.example"), "endpoints[0].address", ""},
		{"number to look up", address(dns, "123"), "endpoints[0].address", ""},
		{"nothing to look up", address(dns, ""), "endpoints[0].address", "endpoints[0].address"},
		{"host is looked up", lookup("web.example"), "", ""},
		{"number is looked up", lookup("123"), "hosts[0]", ""},
		{"wildcard is looked up", lookup("*.example"), "hosts[0]", ""},
		{"round robin over two", func(e *E) {
			e.Resolution = networking.ServiceEntry_DNS_ROUND_ROBIN
			e.Endpoints = append(e.Endpoints, &networking.WorkloadEntry{Address: "b.example"})
		}, "endpoints", "endpoints"},
		{"resolution none with endpoints", func(e *E) { e.Resolution = networking.ServiceEntry_NONE }, "endpoints", "endpoints"},
		{"dynamic with endpoints", func(e *E) { e.Resolution = networking.ServiceEntry_DYNAMIC_DNS }, "hosts[0] endpoints", "hosts[0] endpoints"},
		{"dynamic with addresses", func(e *E) {
			e.Resolution, e.Hosts, e.Endpoints = networking.ServiceEntry_DYNAMIC_DNS, []string{"*.example"}, nil
			e.Addresses, e.Ports[0].Protocol = []string{"240.0.0.1"}, "TCP"
		}, "addresses ports[0].protocol", "addresses ports[0].protocol"},
		{"unknown resolution", func(e *E) { e.Resolution = 99 }, "resolution", "resolution"},
		{"unknown endpoint port", func(e *E) { e.Endpoints[0].Ports = map[string]uint32{"x": 1} }, `endpoints[0].ports["x"]`, `endpoints[0].ports["x"]`},
		{"endpoint port 0", func(e *E) { e.Endpoints[0].Ports["HTTP"] = 0 }, `endpoints[0].ports["HTTP"]`, `endpoints[0].ports["HTTP"]`},
		{"endpoint port 65536", func(e *E) { e.Endpoints[0].Ports["HTTP"] = 65536 }, `endpoints[0].ports["HTTP"]`, `endpoints[0].ports["HTTP"]`},
		{"weights beyond Envoy's", func(e *E) {
			e.Endpoints[0].Weight = 1 << 31
			e.Endpoints = append(e.Endpoints, &networking.WorkloadEntry{Address: "10.0.0.2", Weight: 1 << 31})
		}, "endpoints", "endpoints"},
		{"locality not UTF-8", func(e *E) { e.Endpoints[0].Locality = "\xff" }, "endpoints[0].locality", "endpoints[0].locality"},

		{"label without value", label("a", ""), "", ""},
		{"label with prefix", label("a.example/b_c.d", "x"), "", ""},
		{"label with upper prefix", label("A.example/b", "x"), "", ""},
		{"label without key", label("", "x"), `endpoints[0].labels[""]`, ""},
		{"label with two slashes", label("a/b/c", "x"), `endpoints[0].labels["a/b/c"]`, ""},
		{"label with empty prefix", label("/b", "x"), `endpoints[0].labels["/b"]`, ""},
		{"label with empty part in prefix", label("a..b/c", "x"), `endpoints[0].labels["a..b/c"]`, ""},
		{"label without name", label("a/", "x"), `endpoints[0].labels["a/"]`, ""},
		{"label name of 63", label("a/"+label63, "x"), "", ""},
		{"label name of 64", label("a/"+label64, "x"), `endpoints[0].labels["a/` + label64 + `"]`, ""},
		{"long part in prefix", label(label64+"/a", "x"), "", ""},
		{"label value with comma", label("a", "b,c"), `endpoints[0].labels["a"]`, ""},
		{"label value with slash", label("a", "/b"), `endpoints[0].labels["a"]`, ""},
		{"label value with line break", label("a", "b\n"), `endpoints[0].labels["a"]`, ""},
		{"label value of 200", label("a", strings.Repeat("b", 200)), "", ""},
		{"label not UTF-8", label("a", "\xff"), `endpoints[0].labels["a"]`, `endpoints[0].labels["a"]`},
		{"several labels", func(e *E) {
			e.Endpoints[0].Labels = map[string]string{"c": ",", "ok": "ok", "a": ",", "b": ",", "d/": "x"}
		}, `endpoints[0].labels["a"] endpoints[0].labels["b"] endpoints[0].labels["c"] endpoints[0].labels["d/"]`, ""},

		{"address", func(e *E) { e.Addresses = []string{"240.0.0.1", "10.0.0.0/8", "2001:db8::/32"} }, "", ""},
		{"bad address", func(e *E) { e.Addresses = []string{"240.0.0.1", "x"} }, "addresses[1]", "addresses[1]"},
		{"range with DNS", func(e *E) {
			e.Resolution, e.Addresses = dns, []string{"10.0.0.0/8"}
		}, "addresses[0]", "addresses[0]"},
		{"selector beside endpoints", func(e *E) { e.WorkloadSelector = &networking.WorkloadSelector{} }, "workloadSelector", "workloadSelector"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			o := entry(test.change)
			checkPaths(t, istio.Stock, o, test.stock)
			checkPaths(t, istio.Higress("ns"), o, test.higress)
		})
	}
}

func checkPaths(t *testing.T, d istio.Dialect, o istio.Object, want string) {
	t.Helper()
	err := d.Check(o)
	var paths []string
	if list, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range list.Unwrap() {
			path, text, _ := strings.Cut(e.Error(), ": ")
			paths = append(paths, path)
			if text == "" || strings.Contains(text, "%!") {
				t.Errorf("%s: offence without a text: %s", d, e)
			}
		}
	}
	if got := strings.Join(paths, " "); got != want || (err == nil) != (want == "") {
		t.Errorf("%s: offences at %q, want %q: %v", d, got, want, err)
	}
	if again := d.Check(o); err != nil && again.Error() != err.Error() {
		t.Errorf("%s: the text changes: %v; %v", d, err, again)
	}
}

func TestCheckRule(t *testing.T) {
	type R = networking.DestinationRule
	tls := func(s *networking.ClientTLSSettings) func(*R) {
		return func(r *R) { r.TrafficPolicy.PortLevelSettings[0].Tls = s }
	}
	const simple, mutual = networking.ClientTLSSettings_SIMPLE, networking.ClientTLSSettings_MUTUAL
	const first = "trafficPolicy.portLevelSettings[0]"
	tests := []struct {
		name           string
		change         func(*R)
		stock, higress string
	}{
		{"fine", func(*R) {}, "", ""},
		{"no host", func(r *R) { r.Host = "" }, "host", "host"},
		{"bad host", func(r *R) { r.Host = "a_b" }, "host", ""},
		{"no policy", func(r *R) { r.TrafficPolicy = nil }, "", ""},
		{"empty policy", func(r *R) { r.TrafficPolicy = &networking.TrafficPolicy{} }, "trafficPolicy", "trafficPolicy"},
		{"null setting", func(r *R) { r.TrafficPolicy.PortLevelSettings[0] = nil }, first, first},
		{"no port", func(r *R) { r.TrafficPolicy.PortLevelSettings[0].Port = nil }, first + ".port", first + ".port"},
		{"port 0", func(r *R) { r.TrafficPolicy.PortLevelSettings[0].Port.Number = 0 }, first + ".port.number", first + ".port.number"},
		{"no setting", tls(nil), first, first},
		{"unknown mode", tls(&networking.ClientTLSSettings{Mode: 9}), first + ".tls.mode", first + ".tls.mode"},
		{"long SNI", tls(&networking.ClientTLSSettings{Mode: simple, Sni: strings.Repeat("a", 256)}), first + ".tls.sni", first + ".tls.sni"},
		{"mutual without certificate", tls(&networking.ClientTLSSettings{Mode: mutual}), first + ".tls", first + ".tls"},
		{
			"verify and not verify",
			tls(&networking.ClientTLSSettings{Mode: simple, CaCertificates: "system", InsecureSkipVerify: wrapperspb.Bool(true)}),
			first + ".tls.insecureSkipVerify", first + ".tls.insecureSkipVerify",
		},
		{
			"two sources of certificates", tls(&networking.ClientTLSSettings{Mode: simple, CredentialName: "x", CaCertificates: "y"}),
			first + ".tls.credentialName", first + ".tls.credentialName",
		},
		{
			"name not UTF-8", tls(&networking.ClientTLSSettings{Mode: simple, SubjectAltNames: []string{"\xff"}}),
			first + ".tls.subjectAltNames[0]", first + ".tls.subjectAltNames[0]",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := &R{Host: "a.example", TrafficPolicy: &networking.TrafficPolicy{
				PortLevelSettings: []*networking.TrafficPolicy_PortTrafficPolicy{{
					Port: &networking.PortSelector{Number: 443}, Tls: &networking.ClientTLSSettings{Mode: simple},
				}},
			}}
			test.change(r)
			o := istio.Object{Kind: istio.DestinationRuleKind, Namespace: "mcp", Name: "a", Spec: r}
			checkPaths(t, istio.Stock, o, test.stock)
			checkPaths(t, istio.Higress("ns"), o, test.higress)
		})
	}
}

func TestCheckMetadata(t *testing.T) {
	tests := []struct {
		name           string
		change         func(*istio.Object)
		stock, higress string
	}{
		{"no namespace", func(o *istio.Object) { o.Namespace = "" }, "metadata.namespace", "metadata.namespace"},
		{"no name", func(o *istio.Object) { o.Name = "" }, "metadata.name", "metadata.name"},
		{"slash", func(o *istio.Object) { o.Name = "a/b" }, "metadata.name", "metadata.name"},
		{"slash in the namespace", func(o *istio.Object) { o.Namespace = "a/b" }, "metadata.namespace", "metadata.namespace"},
		{"name not UTF-8", func(o *istio.Object) { o.Name = "\xff" }, "metadata.name", "metadata.name"},
		{"any other name", func(o *istio.Object) { o.Name = "Bad_Name::x" }, "", ""},
		{"label", func(o *istio.Object) { o.Labels = map[string]string{"a": "b c"} }, `metadata.labels["a"]`, ""},
		{"long labels", func(o *istio.Object) {
			o.Labels = map[string]string{"b": strings.Repeat("x", 64), "a": strings.Repeat("x", 64), "c": ""}
		}, `metadata.labels["a"] metadata.labels["b"]`, ""},
		{"another kind", func(o *istio.Object) { o.Kind = istio.DestinationRuleKind }, "kind", "kind"},
		{"no spec", func(o *istio.Object) { o.Spec = nil }, "spec", "spec"},
		{"another spec", func(o *istio.Object) { o.Spec = &networking.Gateway{} }, "spec", "spec"},
		{"null spec", func(o *istio.Object) { o.Spec = (*networking.ServiceEntry)(nil) }, "hosts", "hosts"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			o := entry(nil)
			test.change(&o)
			checkPaths(t, istio.Stock, o, test.stock)
			checkPaths(t, istio.Higress("ns"), o, test.higress)
		})
	}
}

func TestCheckTextIsBounded(t *testing.T) {
	o := entry(func(e *networking.ServiceEntry) {
		for range 100_000 {
			e.Endpoints = append(e.Endpoints, &networking.WorkloadEntry{Address: "x", Labels: map[string]string{"token": "s3cret!"}})
		}
	})
	text := istio.Stock.Check(o).Error()
	if len(text) > 10_000 || !strings.Contains(text, "and 199980 more") {
		t.Errorf("%d bytes: %.300s", len(text), text)
	}
	if strings.Contains(text, "s3cret") {
		t.Error("the value of a label stands in the error")
	}
}
