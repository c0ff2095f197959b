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
)

func TestWeigher(t *testing.T) {
	for name, c := range map[string]struct {
		in   []float64
		want []uint32
	}{
		"none":                    {nil, nil},
		"one":                     {[]float64{7}, []uint32{0}},
		"equal":                   {[]float64{0.3, 0.3, 0.3}, []uint32{0, 0, 0}},
		"whole":                   {[]float64{1, 2, 3}, []uint32{1, 2, 3}},
		"tenths":                  {[]float64{0.1, 1}, []uint32{1, 10}},
		"tenths that are inexact": {[]float64{0.1 + 0.2, 0.6}, []uint32{3, 6}},
		"quarters":                {[]float64{0.25, 1}, []uint32{25, 100}},
		"thirds":                  {[]float64{1.0 / 3, 2.0 / 3}, []uint32{333, 667}},
		"tiny beside one":         {[]float64{1e-9, 1}, []uint32{1, 1000}},
		"large":                   {[]float64{1e6, 5e5}, []uint32{100_000, 50_000}},
		"large beside small":      {[]float64{1e9, 1}, []uint32{100_000, 1}},
		"the largest numbers":     {[]float64{math.MaxFloat64, math.MaxFloat64 / 2}, []uint32{100_000, 50_000}},
		"the smallest numbers":    {[]float64{math.SmallestNonzeroFloat64, 2 * math.SmallestNonzeroFloat64}, []uint32{1, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			var endpoints []endpoint
			for _, w := range c.in {
				endpoints = append(endpoints, endpoint{weight: w})
			}
			weight := weigher(endpoints)
			var got []uint32
			for _, w := range c.in {
				got = append(got, weight(w))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("%v became %v, want %v", c.in, got, c.want)
			}
		})
	}
}

// TestWeigherStaysBelowEnvoysLimit holds the sum of a huge service's weights below 2^32.
func TestWeigherStaysBelowEnvoysLimit(t *testing.T) {
	endpoints := make([]endpoint, 200_000)
	for i := range endpoints {
		endpoints[i].weight = 100
	}
	endpoints[0].weight = 0.001
	endpoints[1].weight = 50
	weight := weigher(endpoints)
	var sum uint64
	for _, e := range endpoints {
		sum += uint64(weight(e.weight))
	}
	if sum > math.MaxUint32 {
		t.Errorf("the sum is %d", sum)
	}
	if ratio := float64(weight(100)) / float64(weight(50)); math.Abs(ratio-2) > 0.01 {
		t.Errorf("100 to 50 became %v", ratio)
	}
}

// TestMergeIgnoresOrder holds that only the configuration's order counts, not that in which claims came.
func TestMergeIgnoresOrder(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 4))
		var claims []claim
		for order := range 1 + rnd.IntN(3) {
			r := newRegistryState(Key{"ns", "bridge", "test", fmt.Sprint(order)})
			r.order = order
			for id := range 1 + rnd.IntN(2) {
				c := &contribution{
					id: fmt.Sprint(id), host: []string{"a.test", "A.test"}[rnd.IntN(2)],
					port: remembered{[]uint32{0, 80, 81}[rnd.IntN(3)], []mcp.Protocol{mcp.HTTP, mcp.GRPC}[rnd.IntN(2)]},
				}
				for n := range rnd.IntN(4) {
					c.endpoints = append(c.endpoints, endpoint{address: fmt.Sprint("10.0.0.", n+rnd.IntN(2)*10), port: 80, weight: 1 + rnd.Float64()})
				}
				slices.SortFunc(c.endpoints, endpoint.compare)
				claims = append(claims, claim{r, c})
			}
		}
		shuffled := slices.Clone(claims)
		rnd.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		slices.SortFunc(claims, compareClaims)
		slices.SortFunc(shuffled, compareClaims)
		one, leftOne := merge(claims)
		two, leftTwo := merge(shuffled)
		same := cmp.Comparer(func(a, b labels.Set) bool { return a == b })
		noVIP := cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".VIP" }, cmp.Ignore())
		if diff := cmp.Diff(one, two, same, noVIP); diff != "" {
			t.Fatalf("seed %d: %s", seed, diff)
		}
		endpoints, left := len(one.Endpoints), 0
		for _, c := range claims {
			if diff := cmp.Diff(leftOne[c], leftTwo[c]); diff != "" {
				t.Fatalf("seed %d: left out: %s", seed, diff)
			}
			for _, l := range leftOne[c] {
				if l.Address == "" { // the whole claim
					left += len(c.endpoints)
				} else {
					left++
				}
			}
		}
		all := 0
		for _, c := range claims {
			all += len(c.endpoints)
		}
		if endpoints+left != all {
			t.Fatalf("seed %d: of %d endpoints %d are published and %d left out", seed, all, endpoints, left)
		}
	}
}
