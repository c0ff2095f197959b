package bridge

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

// Reason says in one word why an instance is not published.
type Reason string

// The reasons, in the order in which they are looked for.
const (
	ReasonDisabled      Reason = "disabled"
	ReasonUnhealthy     Reason = "unhealthy"
	ReasonWeightZero    Reason = "weight-0"
	ReasonBadAddress    Reason = "bad-address"
	ReasonBadPort       Reason = "bad-port"
	ReasonBadWeight     Reason = "bad-weight"
	ReasonDuplicate     Reason = "duplicate"
	ReasonOtherProtocol Reason = "other-protocol"
	ReasonSameHost      Reason = "same-host"
	ReasonNoPort        Reason = "no-port"
	ReasonQuarantined   Reason = "quarantined"
	ReasonNoVIP         Reason = "no-vip" // the service is published, but without the address that it needs
)

// A LeftOut is an instance, or with an empty address a whole service, that is not published, and why.
type LeftOut struct {
	Service string `json:"service"`
	Address string `json:"address,omitempty"`
	Port    uint32 `json:"port,omitempty"`
	Reason  Reason `json:"reason"`
	// Detail is the registry's or the rule's own words.
	Detail string `json:"detail,omitempty"`
}

// policy is what an entry says about making services of facts.
type policy struct {
	protocol mcp.Protocol // of instances that name none
	vport    *registry.VPort
	guard    guardSettings
}

func policyOf(e registry.Entry) policy {
	p := policy{protocol: mcp.ParseProtocol(e.Protocol), vport: e.VPort, guard: guardOf(e.Guard)}
	if p.protocol == "" || p.protocol == mcp.Unsupported {
		p.protocol = mcp.HTTP
	}
	return p
}

// remembered is the port and protocol that a service had when it last had instances. They outlive the instances, since
// a service without ports cannot be published.
type remembered struct {
	port     uint32
	protocol mcp.Protocol
}

// endpoint is one publishable instance. Its weight is still relative to the registry's default.
type endpoint struct {
	address  string
	port     uint32
	implicit bool // the registry gives the instance no port of its own: port is the service's
	weight   float64
	locality string
	labels   labels.Set
}

type endpointKey struct {
	address string
	port    uint32
}

func (e endpoint) key() endpointKey { return endpointKey{e.address, e.port} }

func (e endpoint) compare(o endpoint) int {
	if c := strings.Compare(e.address, o.address); c != 0 {
		return c
	}
	return cmp.Compare(e.port, o.port)
}

// assembled is what is to be published of one service's facts.
type assembled struct {
	had       remembered
	endpoints []endpoint // sorted by address and port, unique
	leftOut   []LeftOut
}

// assemble decides, for every registry alike, which instances of a service are published and under which port and
// protocol. prev is what the service had before: a port and a protocol stay while any instance has them, so that the
// order or the rolling replacement of instances does not change what routes refer to. held counts endpoints that stay
// published although they are no longer listed; they have a say like instances.
func assemble(p policy, s registry.Service, prev remembered, held map[remembered]int) assembled {
	type candidate struct {
		endpoint
		protocol mcp.Protocol
	}
	out := assembled{had: prev}
	leave := func(i registry.Instance, reason Reason, detail string) {
		out.leftOut = append(out.leftOut, LeftOut{Service: s.ID, Address: i.Address, Port: i.Port, Reason: reason, Detail: detail})
	}
	usable := make([]candidate, 0, len(s.Instances))
	offered := map[remembered]int{} // by every instance with a valid port, healthy or not
	for _, i := range s.Instances {
		c := candidate{protocol: protocolOf(i, p.protocol)}
		if i.Port > 65535 || i.Port == 0 && s.Port == 0 {
			leave(i, ReasonBadPort, "a port is a number from 1 to 65535")
			continue
		}
		offered[remembered{cmp.Or(s.Port, i.Port), c.protocol}]++
		key, ok := keyOf(s, i)
		switch {
		case i.Disabled:
			leave(i, ReasonDisabled, i.Reason)
		case i.Unhealthy:
			leave(i, ReasonUnhealthy, i.Reason)
		case i.Weight == 0:
			leave(i, ReasonWeightZero, "")
		case i.Weight < 0 || math.IsNaN(i.Weight) || math.IsInf(i.Weight, 0):
			leave(i, ReasonBadWeight, "a weight is a number from 0")
		case !ok:
			leave(i, ReasonBadAddress, "neither a reachable IP address nor a host name")
		default:
			c.endpoint = endpoint{
				address: key.address, port: key.port, implicit: i.Port == 0, weight: i.Weight, locality: i.Locality.String(), labels: i.Metadata,
			}
			usable = append(usable, c)
		}
	}
	slices.SortFunc(usable, func(a, b candidate) int { // to the last detail: the registry's order decides nothing
		return cmp.Or(a.compare(b.endpoint), cmp.Compare(a.protocol, b.protocol), cmp.Compare(b.weight, a.weight),
			cmp.Compare(a.locality, b.locality), cmp.Compare(a.labels.Encoded(), b.labels.Encoded()), compareBool(a.implicit, b.implicit))
	})

	published := map[remembered]int{}
	for _, c := range usable {
		published[remembered{cmp.Or(s.Port, c.port), c.protocol}]++
	}
	for k, n := range held {
		published[k] += n
		offered[k] += n
	}
	out.had = choosePort(prev, published, offered)
	out.endpoints = make([]endpoint, 0, len(usable))
	for _, c := range usable {
		asInstance := registry.Instance{Address: c.address, Port: c.port}
		switch n := len(out.endpoints); {
		case c.protocol != out.had.protocol:
			leave(asInstance, ReasonOtherProtocol, "speaks "+string(c.protocol)+", the service "+string(out.had.protocol))
		case n > 0 && out.endpoints[n-1].key() == c.key():
			leave(asInstance, ReasonDuplicate, "")
		default:
			out.endpoints = append(out.endpoints, c.endpoint)
		}
	}
	return out
}

// choosePort picks a service's port and protocol: prev as far as instances still have it, else what most have (ties: the
// lowest port, then the name of the protocol). published counts the instances that get traffic, offered all of them. A
// protocol needs an instance with traffic to stay, since it decides who is left out; a port any instance at all.
func choosePort(prev remembered, published, offered map[remembered]int) remembered {
	if len(published) == 0 {
		if prev.port != 0 {
			return prev
		}
		published = offered
	}
	perProtocol := map[mcp.Protocol]int{}
	for k, n := range published {
		perProtocol[k.protocol] += n
	}
	protocol := prev.protocol
	if perProtocol[protocol] == 0 {
		protocol = mostCommon(published, func(k remembered) int { return perProtocol[k.protocol] }).protocol
	}
	if kept := (remembered{prev.port, protocol}); offered[kept] > 0 {
		return kept
	}
	return mostCommon(published, func(k remembered) int {
		if k.protocol != protocol {
			return -1
		}
		return published[k]
	})
}

// mostCommon returns the key with the highest score; ties go to the lowest port, then to the first protocol by name.
func mostCommon(keys map[remembered]int, score func(remembered) int) remembered {
	var best remembered
	for k := range keys {
		if best == (remembered{}) || cmp.Or(-cmp.Compare(score(k), score(best)), cmp.Compare(k.port, best.port),
			cmp.Compare(k.protocol, best.protocol)) < 0 {
			best = k
		}
	}
	return best
}

func protocolOf(i registry.Instance, byDefault mcp.Protocol) mcp.Protocol {
	named := i.Protocol
	if named == "" {
		named, _ = i.Metadata.Get("protocol")
	}
	return cmp.Or(mcp.ParseProtocol(named), byDefault)
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

// keyOf returns where an instance of s is reached. It is not ok if the address cannot be published.
func keyOf(s registry.Service, i registry.Instance) (key endpointKey, ok bool) {
	address, ok := cleanAddress(i.Address)
	return endpointKey{address, cmp.Or(i.Port, s.Port)}, ok
}

// cleanAddress gives an address in its one canonical form. Addresses that no proxy can reach, or that Envoy would refuse
// together with all others of the cluster, are not ok.
func cleanAddress(s string) (string, bool) {
	s = strings.TrimSpace(s)
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil {
		a = a.Unmap()
		return a.String(), a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
	}
	return s, registry.ValidHostname(s)
}

// publishedPort is the port under which a service is published: its vport, if the entry gives it one.
func (p policy) publishedPort(host string, own uint32) uint32 {
	if p.vport == nil {
		return own
	}
	for _, s := range p.vport.Services {
		if strings.EqualFold(s.Name, host) && validPort(s.Value) {
			return s.Value
		}
	}
	if validPort(p.vport.Default) {
		return p.vport.Default
	}
	return own
}

func validPort(p uint32) bool { return p >= 1 && p <= 65535 }
