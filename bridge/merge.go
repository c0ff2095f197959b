package bridge

import (
	"cmp"
	"math"
	"net/netip"
	"slices"

	"github.com/regbridge/regbridge/mcp"
)

// contribution is what one registry gives to one host. It is a value: never written once made.
type contribution struct {
	id        string // of the service, in its registry
	host      string // as the registry's convention writes it
	port      remembered
	tls       *mcp.TLS
	endpoints []endpoint // sorted by address and port, unique
	lingers   bool       // the registry deleted the service
}

// equal reports whether two contributions publish the same.
func (c *contribution) equal(o *contribution) bool {
	if c == nil || o == nil {
		return c == o
	}
	sameTLS := c.tls == o.tls || c.tls != nil && o.tls != nil && *c.tls == *o.tls
	return c.id == o.id && c.host == o.host && c.port == o.port && c.lingers == o.lingers && sameTLS &&
		slices.Equal(c.endpoints, o.endpoints)
}

// claim is a contribution and whose it is.
type claim struct {
	registry *registryState
	*contribution
}

// merge makes one service of what all registries say about its host. The claims are in configuration order, within a
// registry by id. It returns false, and why, if there is nothing to publish. What is left out is reported per claim.
//
// Within one registry two services with the same host are different services: the first is published. Across
// registries they are one: the first gives the host and its name, the first that has endpoints port and protocol.
func merge(claims []claim) (mcp.Service, map[claim][]LeftOut) {
	left := map[claim][]LeftOut{}
	var used []claim
	for _, c := range claims {
		if n := len(used); n > 0 && used[n-1].registry == c.registry {
			if !c.lingers {
				left[c] = append(left[c], LeftOut{Service: c.id, Reason: ReasonSameHost,
					Detail: "host " + c.host + " belongs to service " + used[n-1].id})
			}
			continue
		}
		if c.port.port == 0 {
			left[c] = append(left[c], LeftOut{Service: c.id, Reason: ReasonNoPort, Detail: "no instance with a port was ever listed"})
			continue
		}
		used = append(used, c)
	}
	if len(used) == 0 {
		return mcp.Service{}, left
	}
	lead := used[0]
	if i := slices.IndexFunc(used, func(c claim) bool { return len(c.endpoints) > 0 }); i >= 0 {
		lead = used[i]
	}
	s := mcp.Service{
		Host: used[0].host, Port: lead.port.port, Protocol: lead.port.protocol, TLS: lead.tls,
		RegistryType: used[0].registry.key.Type, RegistryName: used[0].registry.key.Name,
	}
	all := used[0].endpoints
	if len(used) > 1 || lead.port.protocol != used[0].port.protocol {
		all = mergeEndpoints(used, lead.port.protocol, left)
	}
	weight := weigher(all)
	s.Endpoints = make([]mcp.Endpoint, len(all))
	for i, e := range all {
		s.DNS = s.DNS || !isIP(e.address)
		s.Endpoints[i] = mcp.Endpoint{Address: e.address, Port: e.port, Weight: weight(e.weight), Locality: e.locality, Labels: e.labels}
		if e.implicit && e.port == s.Port {
			s.Endpoints[i].Port = 0
		}
	}
	return s, left
}

func isIP(address string) bool {
	_, err := netip.ParseAddr(address)
	return err == nil
}

// mergeEndpoints joins the endpoints of several registries, each address and port once: the first registry's.
func mergeEndpoints(used []claim, protocol mcp.Protocol, left map[claim][]LeftOut) []endpoint {
	var all []endpoint
	seen := map[endpointKey]bool{}
	for _, c := range used {
		for _, e := range c.endpoints {
			reason, detail := Reason(""), ""
			switch {
			case c.port.protocol != protocol:
				reason, detail = ReasonOtherProtocol, "speaks "+string(c.port.protocol)+", the service "+string(protocol)
			case seen[e.key()]:
				reason, detail = ReasonDuplicate, "another registry has it too"
			}
			if reason != "" {
				left[c] = append(left[c], LeftOut{Service: c.id, Address: e.address, Port: e.port, Reason: reason, Detail: detail})
				continue
			}
			seen[e.key()] = true
			all = append(all, e)
		}
	}
	slices.SortFunc(all, endpoint.compare)
	return all
}

// maxWeight bounds one weight, maxWeights roughly the sum of a service's weights, which Envoy limits to 2^32-1.
const (
	maxWeight  = 100_000
	maxWeights = 1 << 31
)

// weigher returns a function from relative to published weights. Equal weights are not published (0); otherwise all are
// scaled by one factor: the smallest power of ten that makes them whole, as far as that goes.
func weigher(endpoints []endpoint) func(float64) uint32 {
	var largest, sum float64
	equal := true
	for _, e := range endpoints {
		largest = max(largest, e.weight)
		equal = equal && e.weight == endpoints[0].weight
	}
	if equal {
		return func(float64) uint32 { return 0 }
	}
	factor := 1.0
	for _, e := range endpoints {
		for factor < 1000 && !isWhole(e.weight*factor) {
			factor *= 10
		}
	}
	if largest*factor > maxWeight {
		factor = maxWeight / largest
	}
	for _, e := range endpoints {
		sum += e.weight * factor
	}
	if sum > maxWeights {
		factor *= maxWeights / sum
	}
	return func(w float64) uint32 { return max(1, uint32(math.Round(w*factor))) }
}

// isWhole reports whether w is a whole number from 1, but for what decimal fractions lose in binary.
func isWhole(w float64) bool {
	whole := math.Round(w)
	return whole >= 1 && math.Abs(w-whole) <= 1e-9*whole
}

// compareClaims orders claims on one host. A service that only lingers does not stand in the way of another one of its
// registry, which may be the same under a new name.
func compareClaims(a, b claim) int {
	switch order := cmp.Compare(a.registry.order, b.registry.order); {
	case order != 0:
		return order
	case a.lingers != b.lingers && b.lingers:
		return -1
	case a.lingers != b.lingers:
		return 1
	}
	return cmp.Compare(a.id, b.id)
}
