package source

import (
	"errors"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

// A defaults file gives settings to entries that do not have them: where Higress's CRD drops our fields, or its Console
// rewrites the object. It is one YAML document with a list of rules:
//
//	defaults:
//	- match:                        # all of it must match; what is left out, or "*", matches anything
//	    namespace: higress-system   # the McpBridge's
//	    bridge: default             # the McpBridge's name
//	    type: consul                # the entry's
//	    name: my-consul             # the entry's
//	  set:                          # any field of spec.registries[] but type and name
//	    refreshInterval: 15s
//	    tls:
//	      caFile: /etc/consul/ca.pem
//	- set:
//	    guard: {hold: 10m}
//
// What an entry sets itself stays, whatever its value. Else the first rule counts that matches the entry and sets the
// field. Fields are taken as a whole: the tls of an entry is not completed from a rule's tls. Three of ours give way to
// what Higress has for the same: refreshInterval to the interval of the registry's type, and each spelling of
// consulDatacenter to the other.
//
// The file counts as a whole: if anything is wrong with it, the last good one stays.
type rule struct {
	match match
	entry registry.Entry
	// fields tells where the fields of entry are written, as Item.Fields does.
	fields map[string]bridge.Position
	// path and at are the rule's place.
	path string
	at   bridge.Position
}

type match struct {
	Namespace string `json:"namespace"`
	Bridge    string `json:"bridge"`
	Type      string `json:"type"`
	Name      string `json:"name"`
}

func (m match) matches(k bridge.Key) bool {
	is := func(pattern, s string) bool { return pattern == "" || pattern == "*" || pattern == s }
	return is(m.Namespace, k.Namespace) && is(m.Bridge, k.Bridge) && is(m.Type, k.Type) && is(m.Name, k.Name)
}

// standIns lists the fields that, where an entry sets them, keep a default for the named field away.
func standIns(field string) []string {
	switch field {
	case "refreshInterval":
		return []string{"nacosRefreshInterval", "consulRefreshInterval"}
	case "consulDatacenter":
		return []string{"consulDataCenter"}
	case "consulDataCenter":
		return []string{"consulDatacenter"}
	}
	return nil
}

// parseRules reads a defaults file.
func parseRules(file string, data []byte) ([]rule, []bridge.Problem) {
	d := newDecoder(file, data, true)
	d.unknown = reportUnknown
	var rules []rule
	seen := 0
	documents(file, data, func(root *yaml.Node, line int) {
		d.line = line
		if root.Kind != yaml.DocumentNode || len(root.Content) == 0 || isNull(root.Content[0]) {
			return
		}
		top := root.Content[0]
		if seen++; seen > 1 {
			d.fail(top, "", "a second document: put all rules into the first one")
			return
		}
		rules = d.rules(top)
	}, func(e syntaxError) {
		d.line = e.line
		d.fail(&yaml.Node{}, "", "this is no valid YAML, here or a little below: %s", e.text)
	})
	if seen == 0 && len(d.problems) == 0 {
		d.fail(nil, "", "the file is empty: write defaults: [] if there shall be none")
	}
	return rules, d.problems
}

func (d *decoder) rules(top *yaml.Node) []rule {
	var file struct {
		Defaults []node `json:"defaults"`
	}
	d.value(top, reflect.ValueOf(&file).Elem(), "")
	if field(top, "defaults").Kind == 0 {
		d.fail(top, "defaults", "the file has no list of defaults")
	}
	var rules []rule
	for i, n := range file.Defaults {
		r := rule{
			path: "defaults[" + strconv.Itoa(i) + "]", at: bridge.Position{File: d.file, Line: d.line + n.Line},
			fields: map[string]bridge.Position{},
		}
		var parts struct {
			Match match `json:"match"`
			Set   node  `json:"set"`
		}
		d.fields = nil
		d.value(n.Node, reflect.ValueOf(&parts).Elem(), r.path)
		r.match = parts.Match
		for _, pattern := range []string{r.match.Namespace, r.match.Bridge, r.match.Type, r.match.Name} {
			if pattern != "*" && strings.Contains(pattern, "*") {
				d.fail(n.Node, r.path+".match", "%q: only * alone has a meaning, and matches anything", shorten(pattern))
			}
		}
		if parts.Set.Node == nil {
			d.fail(n.Node, r.path+".set", "the rule sets nothing")
			continue
		}
		d.fields, d.base = r.fields, r.path+".set"
		d.value(parts.Set.Node, reflect.ValueOf(&r.entry).Elem(), d.base)
		d.fields = nil
		for _, name := range []string{"type", "name"} {
			if _, ok := r.fields[name]; ok {
				d.fail(field(parts.Set.Node, name, n.Node), d.base+"."+name, "an entry's %s has no default", name)
			}
		}
		rules = append(rules, r)
	}
	return rules
}

// applyRules sets the fields of the entry that it does not set itself, and marks the rules that matched.
func applyRules(rc *bridge.RegistryConfig, rules []rule, used []bool) {
	cloned := false
	entry := reflect.ValueOf(&rc.Entry).Elem()
	own := rc.Fields
	for i, r := range rules {
		if !r.match.matches(rc.Key) {
			continue
		}
		used[i] = true
		for f := range entry.NumField() {
			name, _, _ := strings.Cut(entry.Type().Field(f).Tag.Get("json"), ",")
			_, sets := r.fields[name]
			_, has := rc.Fields[name]
			if !sets || has || slices.ContainsFunc(standIns(name), func(s string) bool { _, ok := own[s]; return ok }) {
				continue
			}
			if !cloned {
				rc.Fields, cloned = maps.Clone(own), true
			}
			entry.Field(f).Set(reflect.ValueOf(r.entry).Field(f))
			for path, at := range r.fields {
				if path == name || strings.HasPrefix(path, name+".") || strings.HasPrefix(path, name+"[") {
					rc.Fields[path] = at
				}
			}
		}
	}
}

var errProxyUnused = &registry.FieldError{
	Path: "proxyName", Partial: true,
	Err: errors.New("spec.proxies has no effect yet: the service is reached directly"),
}
