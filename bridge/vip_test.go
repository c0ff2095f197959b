package bridge

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// TestVIPsDependOnTheHostsAlone claims and releases at random and compares with a pool that has only ever seen the hosts
// that are left, in another order; also when there are more hosts than addresses.
func TestVIPsDependOnTheHostsAlone(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		prefix := netip.MustParsePrefix([]string{"240.224.0.0/25", "240.224.0.0/26", "240.224.0.0/28", "10.0.0.0/29", "fd00::/120"}[rnd.IntN(5)])
		names := 20 + rnd.IntN(20)
		p := newVIPPool(prefix)
		has := map[string]netip.Addr{}
		refresh := func(moved []string) {
			for _, h := range moved {
				if _, ok := has[h]; ok {
					now, more := p.claim(h)
					if len(more) > 0 {
						t.Fatalf("seed %d: asking for the address that %s has moves %v", seed, h, more)
					}
					has[h] = now
				}
			}
		}
		for range 200 {
			h := fmt.Sprintf("host-%d.test", rnd.IntN(names))
			if _, ok := has[h]; ok && rnd.IntN(2) == 0 {
				delete(has, h)
				refresh(p.release(h))
			} else {
				a, moved := p.claim(h)
				has[h] = a
				refresh(moved)
			}
		}
		owner := map[netip.Addr]string{}
		starved := 0
		for h, a := range has {
			if !a.IsValid() {
				starved++
				continue
			}
			if !prefix.Contains(a) || a == prefix.Masked().Addr() || owner[a] != "" {
				t.Fatalf("seed %d: %s has %v, as %q", seed, h, a, owner[a])
			}
			owner[a] = h
		}
		if room := min(len(has), int(p.size)); len(owner) < room-room/4 {
			t.Fatalf("seed %d: %d of %d hosts have none of %d addresses", seed, starved, len(has), p.size)
		}
		hosts := slices.Sorted(maps.Keys(has))
		rnd.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
		fresh := newVIPPool(prefix)
		for _, h := range hosts {
			fresh.claim(h)
		}
		for _, h := range hosts {
			if want, _ := fresh.claim(h); want != has[h] {
				t.Fatalf("seed %d: %s has %v, in a fresh pool %v", seed, h, has[h], want)
			}
		}
		for _, h := range hosts {
			p.release(h)
		}
		if len(p.owners)+len(p.wanted)+len(p.has) != 0 {
			t.Fatalf("seed %d: an empty pool remembers %v %v %v", seed, p.owners, p.wanted, p.has)
		}
	}
}
