package dns

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/regbridge/regbridge/registry"
)

// parallel bounds how many names, and how many targets of one SRV record, are resolved at once. What one server is asked
// at once is bounded for all entries together, by its budget.
const parallel = 8

// resolve reads all names. It fails as a whole where one of them does.
func (r *resolver) resolve(ctx context.Context) (found, error) {
	conf, err := r.config()
	if err != nil {
		return found{}, fmt.Errorf("read which DNS servers to ask: %w", err)
	}
	round := &round{client: r.client, conf: conf, from: map[string]bool{}}
	parts := make([]part, len(r.names))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, n := range r.names {
		g.Go(func() (err error) {
			parts[i], err = round.name(gctx, n)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return found{}, err
	}
	out := found{
		service: r.service,
		ttl:     forever,
		from:    strings.Join(slices.Sorted(maps.Keys(round.from)), ", "),
	}
	for _, p := range parts {
		out.service.Instances = append(out.service.Instances, p.instances...)
		out.ttl = min(out.ttl, p.ttl)
	}
	out.service.Instances = ordered(out.service.Instances)
	return out, nil
}

// a round is one reading of all names of an entry.
type round struct {
	client client
	conf   config

	mu   sync.Mutex
	from map[string]bool // the servers that answered
}

// part is what one name of the entry resolves to. Nothing at all is an authoritative answer too.
type part struct {
	instances []registry.Instance
	ttl       time.Duration
}

func (r *round) name(ctx context.Context, n name) (part, error) {
	switch {
	case n.addr.IsValid():
		return part{addressInstances([]netip.Addr{n.addr}, n.port), forever}, nil
	case n.srv:
		return r.service(ctx, n.host)
	default:
		a, err := r.search(n.host, func(full string) (answer, error) { return r.addresses(ctx, full) })
		return part{addressInstances(a.addresses, n.port), a.ttl}, err
	}
}

// search looks a name up as the search list says: the first form of it that has data. A form that fails ends the search,
// since a later one may be the name of something else.
func (r *round) search(host string, lookup func(full string) (answer, error)) (answer, error) {
	none := answer{ttl: forever}
	for _, full := range r.conf.names(host) {
		a, err := lookup(full)
		if err != nil || len(a.addresses) > 0 || len(a.targets) > 0 {
			return a, err
		}
		none.ttl = min(none.ttl, a.ttl)
	}
	return none, nil
}

// addresses looks up the addresses of a full name, of both families.
func (r *round) addresses(ctx context.Context, full string) (answer, error) {
	var v4, v6 answer
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { v4, err = r.lookup(ctx, full, typeA); return err })
	g.Go(func() (err error) { v6, err = r.lookup(ctx, full, typeAAAA); return err })
	if err := g.Wait(); err != nil {
		return answer{}, err
	}
	switch { // the absence of one family is asked for again together with the other
	case len(v6.addresses) == 0 && len(v4.addresses) > 0:
		return v4, nil
	case len(v4.addresses) == 0 && len(v6.addresses) > 0:
		return v6, nil
	default:
		return answer{addresses: append(v4.addresses, v6.addresses...), ttl: min(v4.ttl, v6.ttl)}, nil
	}
}

// service looks up SRV records and the addresses of the targets with the best priority. The further priorities are for
// clients that find none of these reachable: they are stated as out of service.
func (r *round) service(ctx context.Context, host string) (part, error) {
	a, err := r.search(host, func(full string) (answer, error) { return r.lookup(ctx, full, typeSRV) })
	if err != nil {
		return part{}, err
	}
	out := part{ttl: a.ttl}
	targets := slices.DeleteFunc(a.targets, func(t target) bool { return t.name == "." }) // "decidedly not available"
	slices.SortFunc(targets, func(a, b target) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.name, b.name), cmp.Compare(a.port, b.port))
	})
	served := false
	for len(targets) > 0 {
		best := targets[0].priority
		n := slices.IndexFunc(targets, func(t target) bool { return t.priority != best })
		if n < 0 {
			n = len(targets)
		}
		group := targets[:n]
		targets = targets[n:]
		if served {
			for _, t := range group {
				out.instances = append(out.instances, t.standby(fmt.Sprintf("SRV priority %d is for failover", best)))
			}
			continue
		}
		located, ttl, err := r.locate(ctx, group, a.extra)
		if err != nil {
			return part{}, err
		}
		for _, t := range located {
			served = served || len(t.addresses) > 0
		}
		out.instances = append(out.instances, serviceInstances(located)...)
		out.ttl = min(out.ttl, ttl)
	}
	return out, nil
}

// locate finds the addresses of targets: as the SRV answer brought them along, else by asking.
func (r *round) locate(ctx context.Context, group []target, extra map[string]answer) ([]located, time.Duration, error) {
	out := make([]located, len(group))
	ttls := make([]time.Duration, len(group))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, t := range group {
		g.Go(func() error {
			a, ok := extra[t.name]
			if t.port == 0 {
				a = answer{ttl: forever} // nobody listens there, wherever it is
			} else if !ok {
				var err error
				if a, err = r.addresses(ctx, t.name); err != nil {
					return err
				}
			}
			out[i], ttls[i] = located{t, a.addresses}, a.ttl
			return nil
		})
	}
	err := g.Wait()
	return out, slices.Min(ttls), err
}

func (r *round) lookup(ctx context.Context, full string, t recordType) (answer, error) {
	a, servers, err := r.client.lookup(ctx, r.conf, full, t)
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range servers {
		r.from[s] = true
	}
	return a, err
}
