package zookeeper

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// override is a child of /dubbo/<interface>/configurators: a rule that changes parameters of providers.
type override struct {
	node     string // tells rules apart that are otherwise equal in rank
	off      bool   // it concerns no provider
	ifAbsent bool   // absent:// instead of override://
	key      serviceKey
	host     string // 0.0.0.0 means all
	port     uint32 // 0 means all
	priority int64
	// conditions are what a provider's own parameters must be, without those that hold for all.
	conditions map[string]string
	addresses  []string // providerAddresses; empty means all
	set        map[string]string
}

// anyHost is how rules say all hosts.
const anyHost = "0.0.0.0"

// decodeOverride reads the name of a rule's node, such as
// override://0.0.0.0/demo.api.Greeter?category=configurators&weight=50, percent-encoded as a provider's. iface is the
// folder's name, decoded. What a rule means is told by Dubbo's AbstractConfigurator.
func decodeOverride(iface, node string) (override, error) {
	u, err := parseURL(node)
	if err != nil {
		return override{}, fmt.Errorf("configurator of %s: %w", iface, err)
	}
	o := override{
		node:       node,
		off:        u.parameters["category"] != "configurators", // Dubbo looks at no others, not even without a category
		ifAbsent:   u.scheme == "absent",
		key:        newServiceKey(iface, u.parameters["version"], u.parameters["group"]),
		host:       u.host,
		port:       u.port,
		conditions: map[string]string{},
		set:        map[string]string{},
	}
	switch {
	case u.scheme == "empty": // Dubbo's marker for "no rule"
		o.off = true
		return o, nil
	case u.scheme != "override" && u.scheme != "absent":
		return override{}, fmt.Errorf("configurator %s of %s: only override:// and absent:// are known", u, iface)
	case u.host == "":
		return override{}, fmt.Errorf("configurator %s of %s has no host: write 0.0.0.0 for all", u, iface)
	case u.rawPort != "" && u.port == 0 && u.rawPort != "0":
		return override{}, fmt.Errorf("configurator %s of %s has no port from 1 to 65535: write one, or none for all", u, iface)
	}
	o.priority, _ = strconv.ParseInt(u.parameters["priority"], 10, 64) // 0 where it is none
	if a := u.parameters["providerAddresses"]; a != "" {
		o.addresses = strings.Split(a, ",")
	}
	for k, v := range u.parameters {
		switch {
		case k == "enabled":
			o.off = o.off || !strings.EqualFold(v, "true") && v != ""
		case k == "compatible_config":
			// Stands beside a rule in YAML, for those who do not know YAML. Dubbo's consumers since 2.7 do not look at it.
			o.off = o.off || v != ""
		case k == "side" || k == "application" || strings.HasPrefix(k, "~"):
			if v != "*" {
				o.conditions[strings.TrimPrefix(k, "~")] = v
			}
		case (k == "weight" || k == "disabled") && v != "":
			o.set[k] = v
		}
	}
	if o.host != anyHost && o.port == 0 {
		o.off = true // the address of a consumer
	}
	return o, nil
}

// matches reports whether the rule concerns a provider. Version and group must be the provider's, as for Dubbo: a rule
// without them concerns only providers without, and * is no wildcard there.
func (o override) matches(key serviceKey, application string, i registry.Instance) bool {
	if o.off || o.key != key || o.host != anyHost && o.host != i.Address || o.port != 0 && o.port != i.Port {
		return false
	}
	for k, v := range o.conditions {
		var has string
		switch k {
		case "side":
			has = "provider"
		case "application":
			has = application
		default:
			has, _ = i.Metadata.Get(k)
		}
		if has != v {
			return false
		}
	}
	if len(o.addresses) == 0 {
		return true
	}
	return slices.ContainsFunc(o.addresses, func(a string) bool {
		host, port := splitAuthority(strings.TrimSpace(a))
		return (host == anyHost || host == i.Address) && (port == "" || port == "*" || portOf(port) == i.Port)
	})
}

// compareOverrides orders rules as Dubbo does, the later one wins: by host, so that those for all hosts come first, then by
// priority.
func compareOverrides(a, b override) int {
	return cmp.Or(strings.Compare(a.host, b.host), cmp.Compare(a.priority, b.priority), strings.Compare(a.node, b.node))
}

// apply gives the instance as the rules, which are sorted, want it. Where the provider has followed them itself nothing
// changes.
func apply(overrides []override, key serviceKey, application string, i registry.Instance) registry.Instance {
	var parameters map[string]string
	changed := false
	for _, o := range overrides {
		if !o.matches(key, application, i) {
			continue
		}
		if parameters == nil {
			parameters = i.Metadata.Map()
		}
		if parameters == nil {
			parameters = map[string]string{}
		}
		for k, v := range o.set {
			if has := parameters[k]; has != v && (has == "" || !o.ifAbsent) {
				parameters[k], changed = v, true
			}
		}
	}
	if !changed {
		return i
	}
	before, _ := disabledIn(i.Metadata.Map())
	after, _ := disabledIn(parameters)
	switch {
	case after && !i.Disabled:
		i.Disabled, i.Reason = true, "is disabled by a configurator"
	case before && !after:
		i.Disabled, i.Reason = false, ""
	}
	i.Weight = weightOf(parameters)
	i.Metadata = labels.FromMap(parameters)
	return i
}
