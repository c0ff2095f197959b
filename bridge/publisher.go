package bridge

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/xds"
)

// A Mesh takes what is published. *xds.Cache is one.
type Mesh interface {
	// Apply takes one version step: resources that are new or changed, and those that are gone.
	Apply(changed []xds.Resource, removed []xds.Ref)
	// Open lets first answers out: what is there is complete.
	Open()
}

// A Renderer makes a published service into the resources of the mesh.
type Renderer interface {
	// Render returns the service's resources; an error if the reader would refuse one of them, which says why.
	Render(s mcp.Service) ([]xds.Resource, error)
	// EndpointError tells why the reader cannot take an endpoint of the service; nil if it can. Render leaves it out.
	EndpointError(s mcp.Service, e mcp.Endpoint) error
	// NeedsVIP reports whether the service has to have a virtual address.
	NeedsVIP(s mcp.Service) bool
}

// publisher turns claims into resources. Its methods are called by one goroutine, except those that read.
type publisher struct {
	mesh     Mesh
	renderer Renderer
	vips     *vipPool

	mu    sync.RWMutex // guards hosts, for readers
	hosts map[string]*published
}

// published is what the mesh has of one host. It is a value.
type published struct {
	service     mcp.Service // as it is published
	good        mcp.Service // as the reader last took it; Host is empty if it never did
	resources   []xds.Ref
	versions    []string // of resources
	left        map[claim][]LeftOut
	quarantined error // why the reader would refuse what the registries say now; service is then the last good shape
}

// publish brings the dirty hosts to the mesh in one version step. more returns the claims of a host that has to be
// published again because another one took its virtual address.
func (p *publisher) publish(dirty map[string][]claim, more func(host string) []claim) {
	changes := map[string][]xds.Resource{} // by host; a host that is renewed twice counts as it is last
	next := map[string]*published{}
	for len(dirty) > 0 {
		displaced := map[string][]claim{}
		for _, host := range slices.Sorted(maps.Keys(dirty)) {
			now, resources, moved := p.renew(host, dirty[host], p.hosts[host])
			next[host] = now
			for _, h := range moved {
				displaced[h] = more(h)
			}
			changes[host] = resources
		}
		dirty = displaced
	}
	var changed []xds.Resource
	var removed []xds.Ref
	for _, host := range slices.Sorted(maps.Keys(next)) {
		now := next[host]
		changed = append(changed, changes[host]...)
		if before := p.hosts[host]; before != nil {
			for _, ref := range before.resources {
				if now == nil || !slices.Contains(now.resources, ref) {
					removed = append(removed, ref)
				}
			}
		}
	}

	p.mu.Lock()
	for host, now := range next {
		if now == nil {
			delete(p.hosts, host)
		} else {
			p.hosts[host] = now
		}
	}
	p.mu.Unlock()
	if len(changed)+len(removed) > 0 {
		p.mesh.Apply(changed, removed)
	}
}

// renew makes what is to be published of one host, and returns the resources that changed, and the hosts whose virtual
// address has to move.
func (p *publisher) renew(host string, claims []claim, before *published) (now *published, changed []xds.Resource, moved []string) {
	service, left := merge(claims)
	now = &published{service: service, left: left}
	if service.Host == "" { // nothing to publish
		if before != nil {
			moved = p.vips.release(host)
		}
		if len(left) == 0 {
			return nil, nil, moved
		}
		return now, nil, moved
	}
	now.service = p.withoutRefused(service, claims, left)
	resources, moved, err := p.render(host, &now.service)
	if err == nil {
		now.good = now.service
	} else {
		now.quarantined = err
		tell(claims, left, ReasonQuarantined, err.Error())
		now.service, resources = mcp.Service{}, nil
		if before != nil && before.good.Host != "" {
			now.good = before.good
			now.service = lastGood(before.good, service)
			var more []string
			if resources, more, err = p.render(host, &now.service); err != nil {
				now.service, resources = mcp.Service{}, nil
			}
			moved = append(moved, more...)
		}
	}
	if now.service.Host == "" {
		moved = append(moved, p.vips.release(host)...)
	} else if p.renderer.NeedsVIP(now.service) && !now.service.VIP.IsValid() {
		tell(claims, left, ReasonNoVIP, "the range of virtual addresses is full, so sidecars cannot tell it from other TCP services "+
			"on its port: set a larger --vip-range")
	}
	for i, r := range resources {
		now.resources = append(now.resources, xds.Ref{Type: r.Type, Name: r.Name})
		now.versions = append(now.versions, r.Version)
		if before == nil || !before.has(r) {
			changed = append(changed, resources[i])
		}
	}
	return now, changed, moved
}

// render gives a service its virtual address, if it needs one, and makes its resources. It returns the hosts whose virtual
// address has to move.
func (p *publisher) render(host string, s *mcp.Service) (resources []xds.Resource, moved []string, err error) {
	if p.renderer.NeedsVIP(*s) {
		s.VIP, moved = p.vips.claim(host)
	} else {
		s.VIP, moved = netip.Addr{}, p.vips.release(host)
	}
	resources, err = p.renderer.Render(*s)
	return resources, moved, err
}

// tell notes something about the services that are published under one host.
func tell(claims []claim, left map[claim][]LeftOut, reason Reason, detail string) {
	for _, c := range claims {
		whole := slices.ContainsFunc(left[c], func(l LeftOut) bool { return l.Address == "" })
		if !whole {
			left[c] = append(left[c], LeftOut{Service: c.id, Reason: reason, Detail: detail})
		}
	}
}

// withoutRefused leaves out, by name, endpoints that the reader cannot take.
func (p *publisher) withoutRefused(s mcp.Service, claims []claim, left map[claim][]LeftOut) mcp.Service {
	refused := map[int]error{}
	for i, e := range s.Endpoints {
		if err := p.renderer.EndpointError(s, e); err != nil {
			refused[i] = err
		}
	}
	if len(refused) == 0 {
		return s
	}
	var kept []mcp.Endpoint
	for i, e := range s.Endpoints {
		err := refused[i]
		if err == nil {
			kept = append(kept, e)
			continue
		}
		port := cmp.Or(e.Port, s.Port)
		whose := slices.IndexFunc(claims, func(c claim) bool {
			return slices.ContainsFunc(c.endpoints, func(o endpoint) bool { return o.key() == endpointKey{e.Address, port} })
		})
		c := claims[whose]
		left[c] = append(left[c], LeftOut{Service: c.id, Address: e.Address, Port: port, Reason: ReasonBadAddress, Detail: err.Error()})
	}
	s.Endpoints = kept
	s.DNS = slices.ContainsFunc(kept, func(e mcp.Endpoint) bool { return !isIP(e.Address) })
	return s
}

func (p *published) has(r xds.Resource) bool {
	i := slices.Index(p.resources, xds.Ref{Type: r.Type, Name: r.Name})
	return i >= 0 && p.versions[i] == r.Version
}

// lastGood is the shape that the reader took, with those of its endpoints that are still to be published.
func lastGood(good, wanted mcp.Service) mcp.Service {
	live := map[endpointKey]bool{}
	for _, e := range wanted.Endpoints {
		live[endpointKey{e.Address, cmp.Or(e.Port, wanted.Port)}] = true
	}
	endpoints := make([]mcp.Endpoint, 0, len(good.Endpoints))
	for _, e := range good.Endpoints {
		if live[endpointKey{e.Address, cmp.Or(e.Port, good.Port)}] {
			endpoints = append(endpoints, e)
		}
	}
	good.Endpoints = endpoints
	return good
}

// services returns what is published, by host in order.
func (p *publisher) services() []*published {
	p.mu.RLock()
	defer p.mu.RUnlock()
	out := make([]*published, 0, len(p.hosts))
	for _, host := range slices.Sorted(maps.Keys(p.hosts)) {
		out = append(out, p.hosts[host])
	}
	return out
}
