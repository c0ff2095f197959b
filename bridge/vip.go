package bridge

import (
	"crypto/sha256"
	"encoding/binary"
	"math/big"
	"net/netip"
	"slices"
)

// vipPool gives each host a virtual address of its own. Which one depends on the set of hosts alone, not on the order in
// which they came, so that replicas and restarts agree: every host has a fixed sequence of candidate addresses, and of
// the hosts that want an address the first by name has it; the others go on to their next candidates.
type vipPool struct {
	base   netip.Addr
	size   uint64                  // usable addresses after base
	owners map[netip.Addr]string   // who has it
	wanted map[netip.Addr][]string // who had to go on from it, besides the owner
	has    map[string][]netip.Addr // a host's candidates so far; it has the last, or none if others have them all
}

// maxProbes bounds the candidates of one host; with a range that is not nearly full it is never reached. A host that is
// left without an address waits for any of its candidates.
const maxProbes = 64

func newVIPPool(prefix netip.Prefix) *vipPool {
	prefix = prefix.Masked()
	bits := min(prefix.Addr().BitLen()-prefix.Bits(), 32)
	return &vipPool{
		base: prefix.Addr(), size: max(uint64(1)<<bits, 3) - 2, owners: map[netip.Addr]string{}, wanted: map[netip.Addr][]string{},
		has: map[string][]netip.Addr{},
	}
}

// claim returns the host's address, which is invalid if the range is full, and the hosts that must take another one.
func (p *vipPool) claim(host string) (netip.Addr, []string) {
	var moved []string
	if len(p.has[host]) == 0 {
		p.settle(host, &moved)
	}
	last := p.last(host)
	if p.owners[last] != host {
		return netip.Addr{}, moved
	}
	return last, moved
}

func (p *vipPool) last(host string) netip.Addr { return p.has[host][len(p.has[host])-1] }

// settle gives the host its next candidate, and everybody whom that displaces theirs.
func (p *vipPool) settle(host string, moved *[]string) {
	for probe := len(p.has[host]); probe < maxProbes; probe++ {
		a := p.candidate(host, probe)
		p.has[host] = append(p.has[host], a)
		owner, taken := p.owners[a]
		switch {
		case !taken:
			p.owners[a] = host
			return
		case host < owner:
			p.owners[a] = host
			p.wanted[a] = append(p.wanted[a], owner)
			*moved = append(*moved, owner)
			p.settle(owner, moved)
			return
		default:
			p.wanted[a] = append(p.wanted[a], host)
		}
	}
}

// leave takes all of a host's claims out.
func (p *vipPool) leave(host string) {
	for _, a := range p.has[host] {
		if p.owners[a] == host {
			delete(p.owners, a)
		}
		if p.wanted[a] = slices.DeleteFunc(p.wanted[a], func(h string) bool { return h == host }); len(p.wanted[a]) == 0 {
			delete(p.wanted, a)
		}
	}
	delete(p.has, host)
}

// release takes the host's address back, and returns the hosts that move to an earlier candidate of theirs, or to their first
// address.
func (p *vipPool) release(host string) []string {
	if len(p.has[host]) == 0 {
		return nil
	}
	freed := p.last(host)
	owned := p.owners[freed] == host
	p.leave(host)
	waiting := p.wanted[freed]
	if !owned || len(waiting) == 0 {
		return nil
	}
	first := slices.Min(waiting)
	moved := append(p.release(first), first)
	again := []string{}
	p.settle(first, &again)
	return append(moved, again...)
}

func (p *vipPool) candidate(host string, probe int) netip.Addr {
	sum := sha256.Sum256(binary.BigEndian.AppendUint32([]byte(host), uint32(probe)))
	offset := 1 + binary.BigEndian.Uint64(sum[:])%p.size
	raw := p.base.AsSlice()
	n := new(big.Int).Add(new(big.Int).SetBytes(raw), new(big.Int).SetUint64(offset))
	a, _ := netip.AddrFromSlice(n.FillBytes(raw))
	return a
}
