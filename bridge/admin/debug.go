package admin

import (
	"cmp"
	"net/http"
	"slices"

	"github.com/regbridge/regbridge/bridge"
)

// registries tells everything about each registry, or about those that have the name asked for.
func (a *Admin) registries(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("registry")
	statuses := a.opts.Bridge.Statuses()
	if name != "" {
		statuses = slices.DeleteFunc(statuses, func(s bridge.Status) bool {
			return name != s.Name && name != s.Type+"/"+s.Name && name != s.Registry
		})
	}
	writeArray(w, slices.Values(statuses))
}

// problems tells what is wrong with the configuration.
func (a *Admin) problems(w http.ResponseWriter, _ *http.Request) {
	found, err := a.opts.Bridge.Problems()
	out := struct {
		// Error is why the last attempt to read failed; empty if it did not.
		Error    string           `json:"error"`
		Problems []bridge.Problem `json:"problems"`
	}{Problems: append([]bridge.Problem{}, found...)}
	if err != nil {
		out.Error = err.Error()
	}
	writeValue(w, out)
}

// clients tells of each xDS stream.
func (a *Admin) clients(w http.ResponseWriter, _ *http.Request) {
	writeArray(w, slices.Values(a.opts.Cache.Clients()))
}

// watcher is one element of /registry/watcherStatus, in the form that Higress documents.
type watcher struct {
	Name string `json:"name"`
	Type string `json:"type"`
	// Healthy says that the registry can be read now.
	Healthy bool `json:"healthy"`
	// Ready says that what it has is known, be it from before an outage or a restart.
	Ready bool `json:"ready"`
}

func (a *Admin) watcherStatus(w http.ResponseWriter, _ *http.Request) {
	var out []watcher
	for _, s := range a.opts.Bridge.Statuses() {
		out = append(out, watcher{
			Name: s.Name, Type: s.Type, Healthy: s.State == bridge.StateSynced,
			Ready: s.Stale || s.LastSync != nil && s.State != bridge.StateConnecting,
		})
	}
	slices.SortStableFunc(out, func(a, b watcher) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Type, b.Type)) })
	writeArray(w, slices.Values(out))
}
