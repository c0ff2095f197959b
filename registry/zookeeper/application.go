package zookeeper

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// decodeMapping reads the data of /dubbo/mapping/<interface>: the applications that provide it, sorted.
func decodeMapping(data []byte) []string {
	var out []string
	for app := range strings.SplitSeq(string(data), ",") {
		if app = strings.TrimSpace(app); app != "" {
			out = append(out, app)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// export is a service that an application provides.
type export struct {
	key      serviceKey
	protocol string     // empty: unknown
	port     uint32     // 0: unknown
	metadata labels.Set // the service's parameters
}

// decodeMetadata reads the data of /dubbo/metadata/<application>/<revision>: what the instances of that revision provide.
// Dubbo's services for itself are left out. Together with an error it gives the services that are usable.
func decodeMetadata(data []byte) ([]export, error) {
	var m struct {
		Services map[string]json.RawMessage `json:"services"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("the metadata is not Dubbo's JSON: %w", err)
	}
	var out []export
	var bad []error
	for _, name := range slices.Sorted(maps.Keys(m.Services)) {
		var s struct {
			Name     text             `json:"name"`
			Group    text             `json:"group"`
			Version  text             `json:"version"`
			Protocol text             `json:"protocol"`
			Port     text             `json:"port"`
			Params   map[string]*text `json:"params"`
		}
		if err := json.Unmarshal(m.Services[name], &s); err != nil {
			bad = append(bad, fmt.Errorf("service %q of the metadata: %w", short(name), err))
			continue
		}
		params := make(map[string]string, len(s.Params))
		for k, v := range s.Params {
			if v != nil && k != tokenKey {
				params[k] = string(*v)
			}
		}
		e := export{
			key: newServiceKey(cmp.Or(string(s.Name), params["interface"]), cmp.Or(string(s.Version), params["version"]),
				cmp.Or(string(s.Group), params["group"])),
			protocol: strings.ToLower(string(s.Protocol)), port: portOf(string(s.Port)), metadata: labels.FromMap(params),
		}
		if e.key.iface == "" {
			bad = append(bad, fmt.Errorf("service %q of the metadata names no interface", short(name)))
			continue
		}
		if !e.key.internal() {
			out = append(out, e)
		}
	}
	return out, errors.Join(bad...)
}

// decodeDefinition reads the data of /dubbo/metadata/<interface>[/<version>][/<group>]/provider/<application>: a service
// that the application provides.
func decodeDefinition(data []byte) (serviceKey, error) {
	var d struct {
		Parameters map[string]*text `json:"parameters"`
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return serviceKey{}, fmt.Errorf("the service definition is not Dubbo's JSON: %w", err)
	}
	get := func(k string) string {
		if v := d.Parameters[k]; v != nil {
			return string(*v)
		}
		return ""
	}
	if get("interface") == "" {
		return serviceKey{}, errors.New("the service definition names no interface")
	}
	return newServiceKey(get("interface"), get("version"), get("group")), nil
}

// exported is an endpoint of an application under one of the services that it provides.
type exported struct {
	key         serviceKey
	application string
	instance    registry.Instance
	// guessed says that it is not known to serve just this service, but only that its process does.
	guessed bool
	process []registry.Instance // all endpoints of the process
}

// exports tells which endpoints of a node serve which of the services. Where neither protocol nor port are known it is the
// endpoint with the node's own port: Dubbo serves everything there by default, and guessing more could mix protocols. The
// parameters of a service become the labels of the endpoint beside its own, and its weight.
func exports(n node, of []export) []exported {
	var out []exported
	for _, e := range of {
		if e.key.internal() {
			continue
		}
		port, protocol := e.port, e.protocol
		if port == 0 && protocol == "" && slices.ContainsFunc(n.instances, func(i registry.Instance) bool { return i.Port == n.port }) {
			port = n.port
		}
		for _, i := range n.instances {
			if port != 0 && port != i.Port || protocol != "" && protocol != i.Protocol {
				continue
			}
			parameters := i.Metadata.Map()
			if parameters == nil {
				parameters = map[string]string{}
			}
			maps.Insert(parameters, e.metadata.All())
			if parameters["protocol"] == "" {
				parameters["protocol"] = i.Protocol
			}
			i.Weight = weightOf(parameters)
			if disabled, reason := disabledIn(parameters); disabled && !i.Disabled {
				i.Disabled, i.Reason = true, reason
			}
			i.Metadata = labels.FromMap(parameters)
			out = append(out, exported{
				key: e.key, application: n.application, instance: i, guessed: e.port == 0, process: n.instances,
			})
		}
	}
	return out
}
