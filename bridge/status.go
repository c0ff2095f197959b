package bridge

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/regbridge/regbridge/mcp"
)

// State is what a registry is doing, in a word.
type State string

// The states of a registry.
const (
	// StateInvalid is an entry that cannot be used. What it published before stays.
	StateInvalid State = "invalid"
	// StateBlocked cannot run: a Secret or a file is missing, or the registry says that the configuration is wrong.
	StateBlocked State = "blocked"
	// StateConnecting has not been read completely yet, or is connected anew after an edit, or with other credentials.
	StateConnecting State = "connecting"
	// StateFailing cannot be read. What it had stays.
	StateFailing State = "failing"
	// StateSynced is read and up to date.
	StateSynced State = "synced"
)

// Status is what is to be known of one registry.
type Status struct {
	Registry string `json:"registry"` // namespace/bridge/type/name
	Type     string `json:"type"`
	Name     string `json:"name"`
	// Origin and Path tell where its entry stands.
	Origin string `json:"origin"`
	Path   string `json:"path"`
	State  State  `json:"state"`
	// Stale says that what is published may be out of date: the registry cannot be read, or it comes from before our start or
	// from a source that an edit replaced.
	Stale bool `json:"stale"`
	// RefreshInterval is the effective one.
	RefreshInterval string `json:"refreshInterval"`
	// LastSync is the time of the last complete, successful reading.
	LastSync *time.Time `json:"lastSync"`
	// LastError is the newest failure since then.
	LastError     string     `json:"lastError,omitempty"`
	LastErrorTime *time.Time `json:"lastErrorTime,omitempty"`
	// ConfigError is why the newest entry is not used, Warnings which parts of it are not.
	ConfigError string   `json:"configError,omitempty"`
	Warnings    []string `json:"warnings,omitempty"`
	// Services and Instances are what the registry lists, Published and Held endpoints that the mesh has: those that are
	// listed, and those that are only held. LeftOut counts the others by reason.
	Services  int            `json:"services"`
	Instances int            `json:"instances"`
	Published int            `json:"published"`
	Held      int            `json:"held"`
	LeftOut   map[Reason]int `json:"leftOut,omitempty"`
	// HeldEndpoints, LeftOutInstances and FailedServices are the details.
	HeldEndpoints    []HeldEndpoint    `json:"heldEndpoints,omitempty"`
	LeftOutInstances []LeftOut         `json:"leftOutInstances,omitempty"`
	FailedServices   map[string]string `json:"failedServices,omitempty"`

	Key Key `json:"-"`
}

// HeldEndpoint is an endpoint that is published although its registry no longer lists it.
type HeldEndpoint struct {
	Service string    `json:"service"`
	Address string    `json:"address"`
	Port    uint32    `json:"port"`
	Why     HoldKind  `json:"why"`
	Since   time.Time `json:"since"`
	// Until is when it goes, if nothing happens; nil while the registry, or the service, cannot be read.
	Until *time.Time `json:"until"`
}

// Statuses tells of every registry, in configuration order.
func (b *Bridge) Statuses() []Status {
	merged := b.publisher.leftOut()
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []Status
	for _, r := range b.store.all() {
		run := b.runners[r.key]
		if run == nil {
			continue
		}
		s := run.status()
		r.mu.Lock()
		r.describe(&s, merged[r])
		r.mu.Unlock()
		out = append(out, s)
	}
	return out
}

func (run *runner) status() Status {
	run.mu.Lock()
	defer run.mu.Unlock()
	s := Status{
		Key: run.key, Registry: run.key.String(), Type: run.key.Type, Name: run.key.Name, Origin: run.config.Origin, Path: run.config.Path,
		RefreshInterval: run.config.Entry.Interval().String(), Warnings: slices.Concat(run.warnings, slices.Sorted(maps.Values(run.lost))),
	}
	if run.config.Err != nil {
		s.ConfigError = run.config.Err.Error()
	}
	switch {
	case run.invalid():
		s.State = StateInvalid
	case run.problem != nil:
		s.State, s.LastError = StateBlocked, run.problem.Error()
	}
	return s
}

func (r *registryState) describe(s *Status, merged []LeftOut) {
	s.State = cmp.Or(s.State, r.state())
	s.Stale = r.restored && !r.loaded || r.failing() && len(r.services) > 0
	if !r.lastSync.IsZero() {
		at := r.lastSync
		s.LastSync = &at
	}
	if r.lastErr != nil {
		s.LastError = cmp.Or(s.LastError, r.lastErr.Error())
		at := r.lastErrAt
		s.LastErrorTime = &at
	}
	s.FailedServices = make(map[string]string, len(r.errs))
	for id, err := range r.errs {
		s.FailedServices[id] = err.Error()
	}
	for _, id := range slices.Sorted(maps.Keys(r.services)) {
		st := r.services[id]
		s.Stale = s.Stale || st.old
		if st.known {
			s.Services++
		}
		s.Instances += len(st.facts.Instances)
		s.Published += len(st.live)
		s.Held += len(st.held)
		s.LeftOutInstances = append(s.LeftOutInstances, st.leftOut...)
		for _, h := range st.held {
			e := HeldEndpoint{Service: id, Address: h.address, Port: h.port, Why: h.kind, Since: h.since}
			if until := h.until; !r.frozen(st) {
				e.Until = &until
			}
			s.HeldEndpoints = append(s.HeldEndpoints, e)
		}
	}
	slices.SortFunc(s.HeldEndpoints, func(a, b HeldEndpoint) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port))
	})
	s.LeftOutInstances = append(s.LeftOutInstances, merged...)
	s.LeftOut = map[Reason]int{}
	for _, l := range s.LeftOutInstances {
		s.LeftOut[l.Reason]++
	}
}

func (r *registryState) state() State {
	switch {
	case r.failing():
		return StateFailing
	case !r.loaded:
		return StateConnecting
	case r.gap.open(): // connecting anew, as somebody else
		return StateConnecting
	default:
		return StateSynced
	}
}

// leftOut returns what merging and checking left out, by registry, in order of services.
func (p *publisher) leftOut() map[*registryState][]LeftOut {
	out := map[*registryState][]LeftOut{}
	for _, h := range p.services() {
		for c, left := range h.left {
			out[c.registry] = append(out[c.registry], left...)
		}
	}
	for _, left := range out {
		slices.SortStableFunc(left, func(a, b LeftOut) int { return cmp.Compare(a.Service, b.Service) })
	}
	return out
}

// PublishedService is one service as the mesh has it.
type PublishedService struct {
	mcp.Service
	// Quarantined is why the mesh would refuse what the registries say now; nil if it would not. The Service is then the
	// last good shape, without endpoints that are gone; its Host is empty if there never was one.
	Quarantined error
}

// Services returns all published services, by host.
func (b *Bridge) Services() []PublishedService {
	var out []PublishedService
	for _, h := range b.publisher.services() {
		if h.service.Host != "" {
			out = append(out, PublishedService{h.service, h.quarantined})
		}
	}
	return out
}

// Problems returns what is wrong with the configuration, entries that cannot be used among it, and why the last reading
// failed, if it did.
func (b *Bridge) Problems() ([]Problem, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := slices.Clone(b.config.Problems)
	for _, rc := range b.config.Registries {
		run := b.runners[rc.Key]
		var found []Problem
		if rc.Err == nil { // else the reader has told it
			found = run.config.Problems(run.config.Err)
		}
		for _, w := range run.warnings {
			at := run.config.position("")
			found = append(found, Problem{File: at.File, Line: at.Line, Path: run.config.Path, Message: w, Warning: true})
		}
		all = append(all, found...)
	}
	return all, b.config.Err
}
