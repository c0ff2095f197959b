// Package registry is the contract between regbridge and the service registries that it reads: what an adapter must
// implement (Registry), what it may report and how (Sink), and the facts that it reports (Service, Instance).
//
// Adapters import this package and their registry's client library, nothing else of regbridge. They report facts as
// the registry has them and decide nothing: what is published of a service, and why an instance is left out, is decided
// in package bridge, the same way for every registry. README.md in this folder tells how to add a registry.
package registry

import (
	"context"
	"errors"

	"github.com/regbridge/regbridge/labels"
)

// A Registry is one configured source of services.
type Registry interface {
	// Run connects and reports to sink until ctx ends; it releases everything it started, goroutines included, before
	// it returns. It returns nil only when ctx is done. Any error is retried by the supervisor with backoff, unless it
	// wraps ErrConfig. Run may be called again, after it has returned.
	Run(ctx context.Context, sink Sink) error
}

// A Sink takes what an adapter learned. Calls never wait for consumers, and do nothing once Run's context is done:
// each Run has its own epoch, so a late callback of a client library cannot bring anything back. Calls about different
// ids may be concurrent; the adapter orders those about one id, and has stopped an id's worker before it deletes or
// omits that id.
//
// Error, empty and unknown are three things. A failed or partial read is a Fail, never a shorter list; a refused login
// is never an empty registry; nothing is inferred from silence.
type Sink interface {
	// Put states one service, complete: it replaces what was known of it. The value is handed over: neither side
	// writes to it again. Stating the same again costs little and publishes nothing.
	Put(s Service)
	// Delete says that the registry no longer knows the service.
	Delete(id string)
	// Synced reports a full, successful listing: the registry knows exactly these services. It is repeated at least
	// once per refresh interval, also where nothing changed, since it is the proof of freshness. The slice is handed
	// over.
	Synced(ids []string)
	// Fail reports a gap, in which changes may have been missed: for these services, or with no ids for the whole
	// registry. It changes no service. The gap ends with the next Synced (of one service: with its next Put). Every
	// discontinuity is a gap: a failed read, a session that expired, an index that went back, a reconnect, a failover.
	Fail(err error, ids ...string)
}

// ErrConfig marks an error of Run that no retry can cure; only an edit of the entry or of its Secret can.
var ErrConfig = errors.New("configuration")

// A Service is what a registry states about one service. It is a value: once handed to a Sink it is never written.
type Service struct {
	// ID is the registry's own key of the service, unique within the registry.
	ID string
	// Host is the host name that the registry's convention gives the service, for example
	// "order.DEFAULT-GROUP.public.nacos". Whether the mesh accepts the name is not the adapter's concern.
	Host string
	// Port is the service port where the configuration or the registry itself states one; 0 lets the instances decide.
	Port uint32
	// TLS, if not nil, states that clients reach the instances by TLS, and how.
	TLS *ClientTLS
	// Instances may be empty: the registry knows the service, and says that nobody provides it.
	Instances []Instance
}

// ClientTLS is how the mesh must reach a service whose protocol is HTTPS or GRPCS.
type ClientTLS struct {
	// SNI is the server name to ask for and to verify; empty means none is known.
	SNI string
}

// An Instance is one provider of a service, as the registry states it, whatever its health.
type Instance struct {
	// Address is an IP address without brackets or zone, or a host name.
	Address string
	// Port is the provider's port; 0 means the service's port.
	Port uint32
	// Protocol is what the provider speaks, as the registry writes it ("http", "dubbo", "tri"); empty if the registry
	// has no field for it. The metadata key "protocol" and the entry's default protocol are applied by the bridge.
	Protocol string
	// Weight is relative to the registry's default weight, which is 1. 0 means that the instance gets no traffic.
	Weight float64
	// Unhealthy says that the registry considers the instance as failing.
	Unhealthy bool
	// Disabled says that the registry, or its user, took the instance out of service.
	Disabled bool
	// Reason tells why the instance is unhealthy or disabled, in the registry's words ("check web is critical").
	Reason string
	// Locality is where the instance runs, if the registry tells.
	Locality Locality
	// Metadata is all that the registry knows beside the fields above.
	Metadata labels.Set
}

// Locality names where an instance runs. Empty parts are unknown.
type Locality struct {
	Region, Zone, SubZone string
}

// String gives the form "region/zone/subzone", without trailing empty parts.
func (l Locality) String() string {
	switch {
	case l.SubZone != "":
		return l.Region + "/" + l.Zone + "/" + l.SubZone
	case l.Zone != "":
		return l.Region + "/" + l.Zone
	default:
		return l.Region
	}
}
