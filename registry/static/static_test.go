package static

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) { registrytest.Main(m) }

func TestConformance(t *testing.T) {
	registrytest.Run(t, registrytest.Config{
		New: New,
		Start: func(*testing.T) registrytest.Backend {
			return registrytest.Backend{
				Entry:    registry.Entry{Type: "static", Name: "legacy", Domain: "192.0.2.1:8080,192.0.2.2", Port: 80},
				Services: []string{"legacy"},
			}
		},
	})
}

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

func TestNew(t *testing.T) {
	const noPort80 = "is not set: the service gets port 80; set the port that clients use"
	at := func(address string, port uint32) registry.Instance {
		return registry.Instance{Address: address, Port: port, Weight: 1}
	}
	for name, tc := range map[string]struct {
		entry    registry.Entry
		want     registry.Service // without ID and Host; no instances mean that no registry is made
		problems []problem
	}{
		"v4 and v6, blanks and empty items": {
			entry: registry.Entry{Domain: " 192.0.2.1:8080 ,[2001:DB8::1]:8081,, 192.0.2.2,\t2001:db8::2 ,", Port: 80},
			want: registry.Service{Port: 80, Instances: []registry.Instance{
				at("192.0.2.1", 8080), at("2001:db8::1", 8081), at("192.0.2.2", 0), at("2001:db8::2", 0),
			}},
		},
		"an IPv4 address in IPv6 form": {
			entry: registry.Entry{Domain: "[::ffff:192.0.2.1]:8080", Port: 80},
			want:  registry.Service{Port: 80, Instances: []registry.Instance{at("192.0.2.1", 8080)}},
		},
		"bad items harm only themselves": {
			entry: registry.Entry{
				Domain: "192.0.2.1:8080,api.example.com:80,192.0.2.2:0,192.0.2.300:80,fe80::1%eth0,http://192.0.2.3:80,192.0.2.4:80",
				Port:   80,
			},
			want: registry.Service{Port: 80, Instances: []registry.Instance{at("192.0.2.1", 8080), at("192.0.2.4", 80)}},
			problems: []problem{
				{"domain[1]", `"api.example.com" is not an IP address: use type dns for host names`, true},
				{"domain[2]", `port "0" of "192.0.2.2:0" is not a number from 1 to 65535`, true},
				{"domain[3]", `"192.0.2.300" is neither an IP address nor a host name`, true},
				{"domain[4]", `"fe80::1%eth0" has a zone, which has a meaning on one machine only`, true},
				{"domain[5]", `"http://192.0.2.3:80" is a URL: write host:port alone, and use tls for TLS`, true},
			},
		},
		"nothing usable": {
			entry: registry.Entry{Domain: "localhost:80", Port: 80},
			problems: []problem{
				{"domain[0]", `"localhost" is not an IP address: use type dns for host names`, true},
				{"domain", "lists no endpoint: write ip:port, separated by commas", false},
			},
		},
		"no domain": {
			entry:    registry.Entry{Port: 80},
			problems: []problem{{"domain", "lists no endpoint: write ip:port, separated by commas", false}},
		},
		"no port": {
			entry:    registry.Entry{Domain: "192.0.2.1:8080"},
			want:     registry.Service{Port: 80, Instances: []registry.Instance{at("192.0.2.1", 8080)}},
			problems: []problem{{"port", noPort80, true}},
		},
		"no port with TLS": {
			entry: registry.Entry{Domain: "192.0.2.1", Protocol: "GRPCS"},
			want: registry.Service{Port: 443, TLS: &registry.ClientTLS{},
				Instances: []registry.Instance{at("192.0.2.1", 0)}},
			problems: []problem{{"port", "is not set: the service gets port 443; set the port that clients use", true}},
		},
		"port out of range": {
			entry:    registry.Entry{Domain: "192.0.2.1", Port: 65536},
			problems: []problem{{"port", "65536 is not a number from 1 to 65535", false}},
		},
		"TLS": {
			entry: registry.Entry{Domain: "192.0.2.1:8443", Port: 443, Protocol: "https", SNI: "pay.example.com"},
			want: registry.Service{Port: 443, TLS: &registry.ClientTLS{SNI: "pay.example.com"},
				Instances: []registry.Instance{at("192.0.2.1", 8443)}},
		},
		"SNI without TLS": {
			entry: registry.Entry{Domain: "192.0.2.1", Port: 80, Protocol: "http", SNI: "pay.example.com"},
			want:  registry.Service{Port: 80, Instances: []registry.Instance{at("192.0.2.1", 0)}},
		},
		"unknown protocol": {
			entry: registry.Entry{Domain: "192.0.2.1", Port: 80, Protocol: "thrift"},
			problems: []problem{
				{"protocol", `"thrift" is unknown: write tcp, http, http2, https, grpc, grpcs or dubbo`, false},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.entry.Name, tc.want.ID, tc.want.Host = "legacy", "legacy", "legacy.static"
			reg, err := New(tc.entry, registry.Env{})
			if diff := cmp.Diff(tc.problems, problems(err)); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
			if tc.want.Instances == nil {
				if reg != nil {
					t.Errorf("New made a registry of an entry of which nothing is usable")
				}
				return
			}
			if reg == nil {
				t.Fatalf("New made no registry: %v", err)
			}
			got := firstListing(t, reg)
			if diff := cmp.Diff(tc.want, got, cmp.Comparer(func(a, b labels.Set) bool { return a == b })); diff != "" {
				t.Errorf("service (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNewWantsAName(t *testing.T) {
	reg, err := New(registry.Entry{Domain: "192.0.2.1", Port: 80}, registry.Env{})
	want := []problem{{"name", "is empty: it is the first part of the host name", false}}
	if diff := cmp.Diff(want, problems(err)); diff != "" || reg != nil {
		t.Errorf("registry %v, problems (-want +got):\n%s", reg, diff)
	}
}

// firstListing runs the registry until its first listing, which names one service, and returns that.
func firstListing(t *testing.T, reg registry.Registry) registry.Service {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	rec := registrytest.NewRecorder(ctx)
	done := make(chan error)
	go func() { done <- reg.Run(ctx, rec) }()
	s, ok := rec.Wait(10*time.Second, func(s registrytest.State) bool { return s.Loaded })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if !ok || len(s.Services) != 1 {
		t.Fatalf("got %d services, loaded %v; want one", len(s.Services), s.Loaded)
	}
	return s.Services["legacy"]
}

func TestFreshnessIsProvenEachInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg, err := New(registry.Entry{Name: "legacy", Domain: "192.0.2.1", Port: 80}, registry.Env{})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*registry.DefaultRefreshInterval+time.Second)
		defer cancel()
		rec := registrytest.NewRecorder(ctx)
		if err := reg.Run(ctx, rec); err != nil {
			t.Errorf("Run: %v", err)
		}
		listings := 0
		for _, e := range rec.State().Events {
			if e.Kind == registrytest.Synced {
				listings++
			}
		}
		if listings < 6 || listings > 8 {
			t.Errorf("%d listings in five intervals and a second, want 6 or a little more", listings)
		}
	})
}

func FuzzNew(f *testing.F) {
	f.Add("192.0.2.1:8080, [2001:db8::1]:8081,,localhost", "https", uint32(0))
	f.Add("[", "x", uint32(1<<31))
	f.Fuzz(func(t *testing.T, domain, protocol string, port uint32) {
		entry := registry.Entry{Name: "n", Domain: domain, Protocol: protocol, Port: port}
		reg, err := New(entry, registry.Env{})
		usable := true
		for _, p := range problems(err) {
			usable = usable && p.Partial
		}
		if usable != (reg != nil) {
			t.Fatalf("registry %v with problems %v", reg, err)
		}
		if reg == nil {
			return
		}
		s, _ := convert(entry)
		if s.Port < 1 || s.Port > 65535 || len(s.Instances) == 0 {
			t.Fatalf("service %+v", s)
		}
	})
}
