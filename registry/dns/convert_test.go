package dns

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

var sameLabels = cmp.Comparer(func(a, b labels.Set) bool { return a == b })

// problem is a FieldError in comparable form.
type problem struct {
	Path, Message string
	Partial       bool
}

func problems(err error) []problem {
	var out []problem
	for _, f := range registry.FieldErrors(err) {
		out = append(out, problem{f.Path, f.Err.Error(), f.Partial})
	}
	return out
}

func at(address string, port uint32) registry.Instance {
	return registry.Instance{Address: address, Port: port, Weight: 1}
}

func TestPassthrough(t *testing.T) {
	for name, tc := range map[string]struct {
		entry    registry.Entry
		want     []registry.Instance // none means that no registry is made
		port     uint32              // of the service, 80 if not set
		problems []problem
	}{
		"names of all kinds, blanks and empty items": {
			entry: registry.Entry{
				Domain: " api.example.com, localhost,,my_db.internal:5432 ,192.0.2.1, [2001:db8::1]:81,a.example.",
				Port:   80,
			},
			want: []registry.Instance{at("api.example.com", 0), at("localhost", 0), at("my_db.internal", 5432), at("192.0.2.1", 0),
				at("2001:db8::1", 81), at("a.example.", 0)},
		},
		"bad items harm only themselves": {
			entry: registry.Entry{
				Domain: "-x.example.com,api.example.com,*.example.com,a:b:c,https://api.example.com,a.example:0,fe80::1%eth0",
				Port:   80,
			},
			want: []registry.Instance{at("api.example.com", 0)},
			problems: []problem{
				{"domain[0]", `"-x.example.com" is neither an IP address nor a host name`, true},
				{"domain[2]", `"*.example.com" is neither an IP address nor a host name`, true},
				{"domain[3]", `"a:b" is neither an IP address nor a host name`, true},
				{"domain[4]", `"https://api.example.com" is a URL: write host:port alone, and use tls for TLS`, true},
				{"domain[5]", `port "0" of "a.example:0" is not a number from 1 to 65535`, true},
				{"domain[6]", `"fe80::1%eth0" has a zone, which has a meaning on one machine only`, true},
			},
		},
		"nothing usable": {
			entry: registry.Entry{Domain: " , -x", Port: 80},
			problems: []problem{
				{"domain[1]", `"-x" is neither an IP address nor a host name`, true},
				{"domain", "lists no name: write host names, separated by commas", false},
			},
		},
		"the documented example without a port": {
			entry:    registry.Entry{Domain: "example.com", Protocol: "tcp"},
			want:     []registry.Instance{at("example.com", 0)},
			problems: []problem{{"port", "is not set: the service gets port 80; set the port that clients use", true}},
		},
		"without a port, by TLS": {
			entry:    registry.Entry{Domain: "example.com", Protocol: "https"},
			want:     []registry.Instance{at("example.com", 0)},
			port:     443,
			problems: []problem{{"port", "is not set: the service gets port 443; set the port that clients use", true}},
		},
		"an SRV name, which proxies do not look up": {
			entry: registry.Entry{Domain: "_http._tcp.example.com", Port: 80},
			want:  []registry.Instance{at("_http._tcp.example.com", 0)},
			problems: []problem{{"domain[0]", `"_http._tcp.example.com" looks like an SRV record, ` +
				`but the proxies look for addresses of that name: set dnsMode to resolve`, true}},
		},
		"servers that nobody asks": {
			entry:    registry.Entry{Domain: "example.com", Port: 80, DNSServers: []string{"192.0.2.53"}},
			want:     []registry.Instance{at("example.com", 0)},
			problems: []problem{{"dnsServers", "is of use in dnsMode resolve only: the proxies ask their own", true}},
		},
		"unknown mode, protocol and port": {
			entry: registry.Entry{Domain: "example.com", Port: 70000, DNSMode: "Resolve", Protocol: "thrift"},
			problems: []problem{
				{"dnsMode", `"Resolve" is unknown: write passthrough or resolve`, false},
				{"protocol", `"thrift" is unknown: write tcp, http, http2, https, grpc, grpcs or dubbo`, false},
				{"port", "70000 is not a number from 1 to 65535", false},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.entry.Name = "api"
			reg, err := New(tc.entry, registry.Env{})
			if diff := cmp.Diff(tc.problems, problems(err)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if tc.want == nil {
				if reg != nil {
					t.Error("New made a registry of an entry of which nothing is usable")
				}
				return
			}
			got := listing(t, start(t, reg))
			if tc.port == 0 {
				tc.port = 80
			}
			if got.ID != "api" || got.Host != "api.dns" || got.Port != tc.port {
				t.Errorf("service %q at %q:%d", got.ID, got.Host, got.Port)
			}
			if diff := cmp.Diff(tc.want, got.Instances, sameLabels); diff != "" {
				t.Errorf("instances (-want +got):\n%s", diff)
			}
		})
	}
}

func TestResolveProblems(t *testing.T) {
	reg, err := New(registry.Entry{
		Name: "api", Port: 80, DNSMode: "resolve", Domain: "_http._tcp.example.com:80,_sip._udp.example.com",
		DNSServers: []string{"192.0.2.53, [2001:db8::53]:5353", "x:y"},
	}, registry.Env{})
	if diff := cmp.Diff([]problem{
		{"domain[0]", `"_http._tcp.example.com": an SRV record tells the port: leave out :80`, true},
		{"dnsServers[1]", `port "y" of "x:y" is not a number from 1 to 65535`, true},
	}, problems(err)); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	if reg == nil {
		t.Error("New made no registry of the good parts")
	}
	reg, err = New(registry.Entry{Port: 80, DNSMode: "resolve", Domain: "a.test", DNSServers: []string{"?"}}, registry.Env{})
	if diff := cmp.Diff([]problem{
		{"name", "is empty: it is the first part of the host name", false},
		{"dnsServers[0]", `"?" is neither an IP address nor a host name`, true},
		{"dnsServers", "lists no server: write host or host:port", false},
	}, problems(err)); diff != "" || reg != nil {
		t.Errorf("registry %v, problems (-want +got):\n%s", reg, diff)
	}
}

func TestServerName(t *testing.T) {
	for _, tc := range []struct {
		protocol, sni, domain string
		want                  *registry.ClientTLS
	}{
		{"http", "", "api.example.com", nil},
		{"http", "other.example.com", "api.example.com", nil},
		{"https", "", "api.example.com", &registry.ClientTLS{SNI: "api.example.com"}},
		{"GRPCS", "", "api.example.com.", &registry.ClientTLS{SNI: "api.example.com"}},
		{"https", "other.example.com", "api.example.com", &registry.ClientTLS{SNI: "other.example.com"}},
		{"https", "", "a.example.com,b.example.com", &registry.ClientTLS{}},
		{"https", "", "a.example.com:443,A.example.com:8443", &registry.ClientTLS{SNI: "a.example.com"}},
		{"https", "", "192.0.2.1", &registry.ClientTLS{}},
		{"https", "", "_https._tcp.example.com", &registry.ClientTLS{SNI: "example.com"}},
	} {
		s, err := convert(registry.Entry{
			Name: "api", Domain: tc.domain, Port: 443, Protocol: tc.protocol, SNI: tc.sni, DNSMode: "resolve",
		})
		if err != nil {
			t.Errorf("%s %s: %v", tc.protocol, tc.domain, err)
		}
		if diff := cmp.Diff(tc.want, s.service.TLS); diff != "" {
			t.Errorf("%s %s with sni %q (-want +got):\n%s", tc.protocol, tc.domain, tc.sni, diff)
		}
	}
}

func TestServiceWeights(t *testing.T) {
	one := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	two := append(one, netip.MustParseAddr("2001:db8::1"))
	for name, tc := range map[string]struct {
		weights   []uint16
		addresses [][]netip.Addr
		want      []float64 // of each instance
	}{
		"alone":                        {[]uint16{7}, [][]netip.Addr{one}, []float64{1}},
		"equal":                        {[]uint16{10, 10, 10}, [][]netip.Addr{one, one, one}, []float64{1, 1, 1}},
		"all zero":                     {[]uint16{0, 0}, [][]netip.Addr{one, one}, []float64{1, 1}},
		"ratio":                        {[]uint16{10, 30}, [][]netip.Addr{one, one}, []float64{0.5, 1.5}},
		"shared by addresses":          {[]uint16{10, 10}, [][]netip.Addr{two, one}, []float64{0.5, 0.5, 1}},
		"zero gets a little":           {[]uint16{0, 99}, [][]netip.Addr{one, one}, []float64{0.02, 1.98}},
		"zeros share the little":       {[]uint16{0, 99, 0}, [][]netip.Addr{one, one, one}, []float64{0.015, 2.97, 0.015}},
		"without address, not counted": {[]uint16{10, 5, 30}, [][]netip.Addr{one, nil, one}, []float64{0.5, 1, 1.5}},
	} {
		var group []located
		for i, w := range tc.weights {
			group = append(group, located{target{name: "x.test.", port: 80, weight: w}, tc.addresses[i]})
		}
		var got []float64
		for _, i := range serviceInstances(group) {
			got = append(got, i.Weight)
		}
		if diff := cmp.Diff(tc.want, got, cmpopts.EquateApprox(0, 1e-12)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestPause(t *testing.T) {
	for _, tc := range []struct{ ttl, interval, low, high time.Duration }{
		{0, 30 * time.Second, time.Second, 1100 * time.Millisecond},
		{10 * time.Second, 30 * time.Second, 10 * time.Second, 11 * time.Second},
		{29 * time.Second, 30 * time.Second, 27 * time.Second, 30 * time.Second},
		{time.Hour, 30 * time.Second, 27 * time.Second, 30 * time.Second},
		{forever, 30 * time.Second, 27 * time.Second, 30 * time.Second},
		{0, 100 * time.Millisecond, 90 * time.Millisecond, 100 * time.Millisecond},
	} {
		for range 200 {
			if got := pauseFor(tc.ttl, tc.interval); got < tc.low || got > tc.high {
				t.Fatalf("ttl %v, interval %v: pause %v, want %v to %v", tc.ttl, tc.interval, got, tc.low, tc.high)
			}
		}
	}
}

func FuzzNew(f *testing.F) {
	f.Add("api.example.com, a:80,,[2001:db8::1]:8081,_http._tcp.x:1", "https", "resolve", "192.0.2.53", uint32(0))
	f.Add("[", "x", "y", "z:", uint32(1<<31))
	f.Fuzz(func(t *testing.T, domain, protocol, mode, server string, port uint32) {
		e := registry.Entry{Name: "n", Domain: domain, Protocol: protocol, DNSMode: mode, DNSServers: []string{server}, Port: port}
		reg, err := New(e, registry.Env{})
		usable := true
		for _, p := range problems(err) {
			usable = usable && p.Partial
		}
		if usable != (reg != nil) {
			t.Fatalf("registry %v with problems %v", reg, err)
		}
		if p, ok := reg.(*passthrough); ok && (len(p.service.Instances) == 0 || p.service.Port < 1 || p.service.Port > 65535) {
			t.Fatalf("service %+v", p.service)
		}
	})
}
