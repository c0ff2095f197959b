package bridge

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// TestVIPsDependOnTheHostsAlone claims and releases at random and compares with a pool that has only ever seen the hosts
// that are left, in another order.
func TestVIPsDependOnTheHostsAlone(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 5))
		prefix := netip.MustParsePrefix([]string{"240.224.0.0/25", "240.224.0.0/26", "fd00::/120"}[rnd.IntN(3)])
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
		hosts := []string{}
		owner := map[netip.Addr]string{}
		for h, a := range has {
			if !a.IsValid() || !prefix.Contains(a) || a == prefix.Masked().Addr() || owner[a] != "" {
				t.Fatalf("seed %d: %s has %v, as %q", seed, h, a, owner[a])
			}
			owner[a] = h
			hosts = append(hosts, h)
		}
		slices.Sort(hosts)
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

// TestVIPsOfAFullRange holds that no address is given twice when there are more hosts than addresses.
func TestVIPsOfAFullRange(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 6))
		p := newVIPPool(netip.MustParsePrefix("10.0.0.0/29"))
		in := map[string]bool{}
		for range 100 {
			h := fmt.Sprint("host-", rnd.IntN(12))
			if in[h] && rnd.IntN(2) == 0 {
				p.release(h)
				delete(in, h)
			} else {
				p.claim(h)
				in[h] = true
			}
			for h := range in { // who has none tries again, and may displace others
				p.claim(h)
			}
			seen := map[netip.Addr]string{}
			for h := range in {
				if len(p.has[h]) == 0 {
					continue
				}
				a, _ := p.claim(h)
				if a.IsValid() && seen[a] != "" {
					t.Fatalf("seed %d: %s and %s have %v", seed, h, seen[a], a)
				}
				seen[a] = h
			}
		}
	}
}
