// Package source is where McpBridge resources come from: from files. It reads them with the eyes of Kubernetes, tells what
// is wrong with them and where, keeps what was last good of what cannot be read now, and hands the whole to the bridge as
// a bridge.Config whenever something changes. It reads the Secrets that entries name from files too.
//
// It knows the shape of McpBridge, and nothing of what any type of registry makes of it: that is the constructors' matter,
// whose findings cmd brings together with ours (see Validate, and bridge.RegistryConfig.Problems).
package source

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

// build makes the registries of a configuration from valid documents and the rules of a defaults file.
//
// Of documents with one namespace and name, the one of the first API group counts, and within a group the first one. Of
// entries with one type and name in a document, the last one counts, as in Higress. What does not count is a problem.
func build(docs []Document, rules []rule) ([]bridge.RegistryConfig, []bridge.Problem) {
	docs = slices.Clone(docs)
	slices.SortStableFunc(docs, func(a, b Document) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(rank(a), rank(b)))
	})
	var registries []bridge.RegistryConfig
	var problems []bridge.Problem
	used := make([]bool, len(rules))
	for i, doc := range docs {
		// Documents without a name are invalid, and no copies of each other; only Validate brings them here.
		if i > 0 && doc.Name != "" && docs[i-1].Namespace == doc.Namespace && docs[i-1].Name == doc.Name {
			first := docs[i-1]
			problems = append(problems, bridge.Problem{File: doc.File, Line: doc.Line, Path: "metadata.name",
				Message: fmt.Sprintf("%s McpBridge %s/%s is defined at %s already, as one of %s, and that one counts: "+
					"delete one of the two, or rename it",
					doc.Group, doc.Namespace, doc.Name, place(first), first.Group)})
			docs[i] = first
			continue
		}
		last := map[bridge.Key]Item{}
		for _, it := range doc.Items {
			last[key(doc, it)] = it
		}
		for _, it := range doc.Items {
			if l := last[key(doc, it)]; l.Path != it.Path {
				problems = append(problems, bridge.Problem{File: it.Fields[""].File, Line: it.Fields[""].Line, Path: it.Path,
					Message: fmt.Sprintf("registry %s/%s is defined again on line %d, by %s, and that one counts: "+
						"delete one of the two, or rename it",
						it.Entry.Type, it.Entry.Name, l.Fields[""].Line, l.Path)})
				continue
			}
			rc := bridge.RegistryConfig{
				Key: key(doc, it), Entry: it.Entry, Path: it.Path, Origin: place(doc), Err: it.Err, Fields: it.Fields,
			}
			problems = append(problems, rc.Problems(foreign(rc))...) // before the rules, which may match entries of any type
			applyRules(&rc, rules, used)
			problems = append(problems, rc.Problems(boundIntervals(&rc.Entry))...)
			problems = append(problems, rc.Problems(guardOfZero(rc))...)
			if rc.Entry.ProxyName != "" {
				problems = append(problems, rc.Problems(errProxyUnused)...)
			}
			registries = append(registries, rc)
		}
	}
	for i, r := range rules {
		if !used[i] {
			problems = append(problems, bridge.Problem{File: r.at.File, Line: r.at.Line, Path: r.path,
				Message: "no registry matches this rule", Warning: true})
		}
	}
	return registries, problems
}

// foreign reports the fields of an entry that only registries of another type have.
func foreign(rc bridge.RegistryConfig) error {
	types := map[string]string{ // what their names begin with, by what the fields' names begin with
		"nacos": "nacos", "mcpServer": "nacos", "enableMCPServer": "nacos", "consul": "consul", "zk": "zookeeper", "eureka": "eureka", "dns": "dns",
	}
	var problems []error
	for name := range rc.Fields {
		for prefix, of := range types {
			if strings.HasPrefix(name, prefix) && !strings.HasPrefix(rc.Entry.Type, of) && !strings.ContainsAny(name, ".[") {
				problems = append(problems, warning(name, "is a field of type %s, and this registry is of type %s: delete it",
					of, rc.Entry.Type))
			}
		}
	}
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(problems...)
}

const (
	// minInterval is the shortest refresh interval: no registry is asked more often.
	minInterval = time.Second
	// longInterval is the longest refresh interval that is no reason for a warning.
	longInterval = time.Hour
)

// boundIntervals makes the refresh intervals of an entry what a registry can bear, and reports those that look wrong.
func boundIntervals(e *registry.Entry) error {
	var problems []error
	for _, of := range []struct {
		name     string
		interval *registry.Interval
	}{
		{"refreshInterval", &e.RefreshInterval},
		{"nacosRefreshInterval", &e.NacosRefreshInterval},
		{"consulRefreshInterval", &e.ConsulRefreshInterval},
	} {
		switch d := of.interval.Or(minInterval); {
		case d < minInterval:
			*of.interval = registry.Interval(minInterval)
			problems = append(problems, warning(of.name, "%v is too short, and %v is used", d, minInterval))
		case d > longInterval:
			problems = append(problems, warning(of.name, "%v is long: what the registry does not tell by itself is noticed so late", d))
		}
	}
	return errors.Join(problems...)
}

// guardOfZero reports times of the guard that are written as 0, which is no way to turn it off.
func guardOfZero(rc bridge.RegistryConfig) error {
	g := rc.Entry.Guard
	if g == nil || g.Off || rc.Err != nil { // a field that could not be read looks like 0
		return nil
	}
	var problems []error
	for _, of := range []struct {
		name     string
		interval registry.Interval
		standard time.Duration
	}{
		{"guard.settle", g.Settle, bridge.DefaultSettle},
		{"guard.hold", g.Hold, bridge.DefaultHold},
	} {
		if _, written := rc.Fields[of.name]; written && of.interval == 0 {
			problems = append(problems, warning(of.name, "0 means the default, %v: write off: true to hold nothing", of.standard))
		}
	}
	return errors.Join(problems...)
}

func warning(path, format string, args ...any) error {
	return &registry.FieldError{Path: path, Partial: true, Err: fmt.Errorf(format, args...)}
}

func key(doc Document, it Item) bridge.Key {
	return bridge.Key{Namespace: doc.Namespace, Bridge: doc.Name, Type: it.Entry.Type, Name: it.Entry.Name}
}

func place(d Document) string { return fmt.Sprintf("%s:%d", d.File, d.Line) }

// rank gives the precedence of the document's API group, 0 being the first.
func rank(d Document) int {
	return slices.IndexFunc(apiGroups(), func(g apiGroup) bool { return g.group == d.Group })
}
