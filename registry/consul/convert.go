package consul

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// filter is what an entry says about which instances count, and how.
type filter struct {
	// tag selects instances that carry it; it is lower case and trimmed, and empty selects all.
	tag string
	// warning admits instances with warnings as healthy.
	warning bool
}

// hostOf gives the host name of a service. Higress's convention replaces each underscore, wherever it stands.
func hostOf(name, datacenter string) string {
	return strings.ReplaceAll(name+"."+datacenter+".consul", "_", "-")
}

// carries reports whether one of tags is the wanted one, compared without case and blanks. An empty one is in any list.
func carries(tags []string, wanted string) bool {
	return wanted == "" || slices.ContainsFunc(tags, func(t string) bool {
		return strings.ToLower(strings.TrimSpace(t)) == wanted
	})
}

// entries takes the answer to "health of service name" in, entry by entry. It keeps nothing of an entry but strings.
type entries struct {
	filter     filter
	all        int // instances, before they were selected by tag
	datacenter string
	nodes      []string // of all instances
	selected   []selected
}

type selected struct {
	registry.Instance
	node, id string
}

// take takes one entry as it came.
func (r *entries) take(_ string, value []byte) error {
	var e *api.ServiceEntry
	if err := json.Unmarshal(value, &e); err != nil {
		return err
	}
	return r.add(e)
}

// add takes one entry. It fails on one that no Consul sends, since the rest of such an answer is not worth more.
func (r *entries) add(e *api.ServiceEntry) error {
	if e == nil || e.Node == nil || e.Service == nil {
		return fmt.Errorf("instance %d has no node or no service", r.all)
	}
	r.all++
	r.datacenter = e.Node.Datacenter
	r.nodes = append(r.nodes, e.Node.Node)
	if carries(e.Service.Tags, r.filter.tag) {
		r.selected = append(r.selected, selected{instance(e, r.filter), e.Node.Node, e.Service.ID})
	}
	return nil
}

// instances gives what was selected, in a fixed order that does not depend on the answer's.
func (r *entries) instances() []registry.Instance {
	slices.SortFunc(r.selected, func(a, b selected) int {
		return cmp.Or(
			strings.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port),
			strings.Compare(a.node, b.node), strings.Compare(a.id, b.id),
		)
	})
	out := make([]registry.Instance, len(r.selected))
	for n, k := range r.selected {
		out[n] = k.Instance
	}
	return out
}

func instance(e *api.ServiceEntry, f filter) registry.Instance {
	i := registry.Instance{
		Address:  cmp.Or(e.Service.Address, e.Node.Address),
		Port:     uint32(e.Service.DefaultPort()), // a negative one becomes one above 65535, as bad as it was
		Weight:   1,
		Metadata: labels.FromMap(e.Service.Meta),
	}
	for _, l := range []*api.Locality{e.Service.Locality, e.Node.Locality} {
		if l != nil && (l.Region != "" || l.Zone != "") {
			i.Locality = registry.Locality{Region: l.Region, Zone: l.Zone}
			break
		}
	}
	// Consul refuses a passing weight of 0: where it is 0 the agent is too old to know weights, or the instance was put
	// straight into the catalog.
	weights := e.Service.Weights
	if weights.Passing > 0 {
		i.Weight = float64(weights.Passing)
	}
	check := worst(e.Checks)
	switch status := rank(check); {
	case status == maintenance:
		i.Disabled, i.Reason = true, reasonOf(check)
	case status == warning && f.warning:
		if weights.Passing > 0 {
			i.Weight = float64(weights.Warning)
		}
	case status != passing:
		i.Unhealthy, i.Reason = true, reasonOf(check)
	}
	if e.Service.SocketPath != "" {
		i.Disabled, i.Reason = true, "listens on a Unix socket, which only its own node can reach"
	}
	return i
}

// The statuses of checks, from the best to the worst. The worst check decides.
const (
	passing = iota
	warning
	critical // and whatever else is no known status
	maintenance
)

func rank(c *api.HealthCheck) int {
	switch {
	case c == nil || c.Status == api.HealthPassing && !isMaintenance(c):
		return passing
	case isMaintenance(c):
		return maintenance
	case c.Status == api.HealthWarning:
		return warning
	default:
		return critical
	}
}

func isMaintenance(c *api.HealthCheck) bool {
	return c.CheckID == api.NodeMaint || strings.HasPrefix(c.CheckID, api.ServiceMaintPrefix)
}

// worst returns the check that decides: of equally bad ones that with the lowest id, so that the answer's order does not
// matter. An instance without checks has none, and is passing.
func worst(checks api.HealthChecks) *api.HealthCheck {
	var out *api.HealthCheck
	for _, c := range checks {
		if c == nil {
			continue
		}
		if out == nil || rank(c) > rank(out) || rank(c) == rank(out) && c.CheckID < out.CheckID {
			out = c
		}
	}
	return out
}

// reasonOf names the check that decided. A check's output is not part of it: it differs from probe to probe, and may
// hold anything.
func reasonOf(c *api.HealthCheck) string {
	switch {
	case c.CheckID == api.NodeMaint:
		return strings.TrimSuffix("its node is in maintenance: "+c.Notes, ": ")
	case isMaintenance(c):
		return strings.TrimSuffix("in maintenance: "+c.Notes, ": ")
	default:
		return fmt.Sprintf("check %s is %s", cmp.Or(c.Name, c.CheckID), cmp.Or(c.Status, "without a status"))
	}
}
