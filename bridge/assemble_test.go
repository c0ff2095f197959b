package bridge

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

func TestChoosePort(t *testing.T) {
	type ports = map[remembered]int
	http := func(port uint32) remembered { return remembered{port, mcp.HTTP} }
	grpc := func(port uint32) remembered { return remembered{port, mcp.GRPC} }
	none := remembered{}
	for name, c := range map[string]struct {
		prev               remembered
		published, offered ports // offered has the published ones too
		want               remembered
	}{
		"nothing":                                {none, nil, nil, none},
		"nothing any more":                       {http(80), nil, nil, http(80)},
		"only unhealthy from the start":          {none, nil, ports{http(80): 1, http(81): 2}, http(81)},
		"only unhealthy others":                  {http(80), nil, ports{http(81): 1}, http(80)},
		"one":                                    {none, ports{http(80): 1}, ports{http(80): 1}, http(80)},
		"most":                                   {none, ports{http(80): 1, http(81): 2}, nil, http(81)},
		"a tie: the lowest port":                 {none, ports{http(81): 1, http(80): 1}, nil, http(80)},
		"a tie of port: first protocol by name":  {none, ports{http(80): 1, grpc(80): 1}, nil, grpc(80)},
		"what it had stays":                      {http(80), ports{http(80): 1, http(81): 9}, nil, http(80)},
		"what it had stays while unhealthy":      {http(80), ports{http(81): 9}, ports{http(80): 1}, http(80)},
		"what it had is gone":                    {http(80), ports{http(81): 1, http(82): 2}, nil, http(82)},
		"protocol stays, port does not":          {http(80), ports{http(81): 1, grpc(80): 9}, nil, http(81)},
		"protocol needs traffic to stay":         {http(80), ports{grpc(81): 1}, ports{http(80): 1}, grpc(81)},
		"most by protocol before most by port":   {none, ports{http(80): 2, http(81): 2, grpc(82): 3}, nil, http(80)},
		"protocol gone, its port is not":         {http(80), ports{grpc(80): 1, grpc(81): 2}, nil, grpc(80)},
		"protocol stays with an unhealthy port":  {http(80), ports{http(81): 3, grpc(80): 1}, ports{http(80): 1}, http(80)},
		"nothing published, nothing had, a tie ": {none, nil, ports{grpc(90): 1, http(80): 1}, http(80)},
	} {
		t.Run(name, func(t *testing.T) {
			offered := ports{}
			for _, m := range []ports{c.published, c.offered} {
				for k, n := range m {
					offered[k] += n
				}
			}
			if got := choosePort(c.prev, c.published, offered); got != c.want {
				t.Errorf("choosePort = %v, want %v", got, c.want)
			}
		})
	}
}

func TestCleanAddress(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1": "10.0.0.1", " 10.0.0.1 ": "10.0.0.1", "::ffff:10.0.0.1": "10.0.0.1", "[2001:DB8::1]": "2001:db8::1",
		"2001:db8:0:0::1": "2001:db8::1", "127.0.0.1": "127.0.0.1", "order.example": "order.example", "my_host": "my_host",
		"localhost": "localhost", "order.example.": "order.example.",
		"": "", "0.0.0.0": "", "::": "", "fe80::1%eth0": "", "224.0.0.1": "", "ff02::1": "", "10.0.0.256": "", "1.2.3": "", "a b": "",
		"-a.example": "", "/var/run/x.sock": "", "http://a": "", "10.0.0.1:80": "", "::ffff:0.0.0.0": "",
	} {
		got, ok := cleanAddress(in)
		if ok != (want != "") || ok && got != want {
			t.Errorf("cleanAddress(%q) = %q, %v; want %q", in, got, ok, want)
		}
	}
}

// TestAssembleIgnoresOrder holds that a registry's order of instances decides nothing, duplicates included.
func TestAssembleIgnoresOrder(t *testing.T) {
	for seed := range uint64(500) {
		rnd := rand.New(rand.NewPCG(seed, 3))
		s := registry.Service{ID: "order", Host: "order.test", Port: uint32(rnd.IntN(2) * 80)}
		for range rnd.IntN(12) {
			s.Instances = append(s.Instances, registry.Instance{
				Address:   []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "a.example", "0.0.0.0", "::ffff:10.0.0.1"}[rnd.IntN(6)],
				Port:      []uint32{0, 80, 8080, 70000}[rnd.IntN(4)],
				Protocol:  []string{"", "http", "grpc", "dubbo"}[rnd.IntN(4)],
				Weight:    []float64{0, 1, 1, 2, math.NaN()}[rnd.IntN(5)],
				Unhealthy: rnd.IntN(5) == 0,
				Disabled:  rnd.IntN(5) == 0,
				Locality:  registry.Locality{Region: fmt.Sprint(rnd.IntN(2))},
				Metadata:  labels.FromMap(map[string]string{"v": fmt.Sprint(rnd.IntN(2))}),
			})
		}
		prev := []remembered{{}, {80, mcp.HTTP}, {8080, mcp.GRPC}}[rnd.IntN(3)]
		held := []map[remembered]int{nil, {{80, mcp.HTTP}: 2}}[rnd.IntN(2)]
		want := assemble(policy{protocol: mcp.HTTP}, s, prev, held)
		check(t, s, want)
		for range 5 {
			rnd.Shuffle(len(s.Instances), func(i, j int) { s.Instances[i], s.Instances[j] = s.Instances[j], s.Instances[i] })
			got := assemble(policy{protocol: mcp.HTTP}, s, prev, held)
			if got.had != want.had || !slices.Equal(got.endpoints, want.endpoints) {
				t.Fatalf("seed %d: %+v\nin another order: %+v", seed, want, got)
			}
			if diff := cmp.Diff(reasons(want), reasons(got)); diff != "" {
				t.Fatalf("seed %d: left out, in another order: %s", seed, diff)
			}
		}
	}
}

// check holds that each instance is either published or left out, and that what is published is sorted and unique.
func check(t *testing.T, s registry.Service, a assembled) {
	t.Helper()
	if len(a.endpoints)+len(a.leftOut) != len(s.Instances) {
		t.Fatalf("of %d instances %d are published and %d left out", len(s.Instances), len(a.endpoints), len(a.leftOut))
	}
	if !slices.IsSortedFunc(a.endpoints, endpoint.compare) {
		t.Fatalf("not sorted: %v", a.endpoints)
	}
	for i, e := range a.endpoints {
		if e.port == 0 || e.weight <= 0 || i > 0 && a.endpoints[i-1].key() == e.key() {
			t.Fatalf("published: %+v", a.endpoints)
		}
	}
}

func reasons(a assembled) map[Reason]int {
	out := map[Reason]int{}
	for _, l := range a.leftOut {
		out[l.Reason]++
	}
	return out
}

func TestPublishedPort(t *testing.T) {
	p := policy{vport: &registry.VPort{Default: 80, Services: []registry.VPortService{
		{Name: "Order.Test", Value: 81}, {Name: "order.test", Value: 82}, {Name: "pay.test", Value: 0},
	}}}
	for host, want := range map[string]uint32{"order.test": 81, "ORDER.TEST": 81, "pay.test": 80, "other.test": 80} {
		if got := p.publishedPort(host, 9); got != want {
			t.Errorf("publishedPort(%s) = %d, want %d", host, got, want)
		}
	}
	p.vport.Default = 65536
	if got := p.publishedPort("other.test", 9); got != 9 {
		t.Errorf("with a default that is no port: %d", got)
	}
}
