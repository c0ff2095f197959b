package eureka

import (
	"cmp"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"unique"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// The values of eurekaSecure.
const (
	secureAuto   = "auto"
	secureAlways = "always"
	secureNever  = "never"
)

const (
	statusUp           = "UP"
	statusOutOfService = "OUT_OF_SERVICE"
)

// choice is what an entry says about what is taken of an instance.
type choice struct {
	secure   string // one of the values of eurekaSecure
	hostName bool   // goes before the IP address
}

// record is what is kept of one instance.
type record struct {
	id                         string // unique within the application
	status                     string // as the server counts it
	updated, dirty, registered int64  // milliseconds; 0 means not told
	deleted                    bool   // in a delta: it was removed
	fact                       registry.Instance
}

// hostOf gives the host name of an application, by Higress's convention.
func hostOf(app string) string { return app + ".eureka" }

func (c choice) record(i *instanceInfo) record {
	return record{
		id: idOf(i), status: unique.Make(string(i.Status)).Value(), deleted: i.Action == "DELETED",
		updated: int64(i.Updated), dirty: int64(i.Dirty), registered: int64(i.Lease.Registered),
		fact: c.instance(i),
	}
}

// idOf gives the key of an instance within its application, which servers choose in the same order. The port is ours, since
// not all servers let only one instance without an id have a host.
func idOf(i *instanceInfo) string {
	if id := cmp.Or(i.ID, i.DataCenter.Metadata.InstanceID); id != "" {
		return string(id)
	}
	return string(cmp.Or(i.HostName, i.IPAddr)) + ":" + strconv.FormatInt(int64(i.Port.Number), 10)
}

func (c choice) instance(i *instanceInfo) registry.Instance {
	out := registry.Instance{Address: c.address(i), Weight: weight(i.Metadata["weight"]), Locality: locality(i)}
	number, secure, reason := c.port(i)
	out.Port = portNumber(number)
	if secure {
		out.Protocol = "https"
	}
	switch status := string(i.Status); {
	case strings.EqualFold(status, statusOutOfService):
		out.Disabled, out.Reason = true, "status "+statusOutOfService
	case reason != "":
		out.Disabled, out.Reason = true, reason
	case status == "":
		out.Unhealthy, out.Reason = true, "has no status"
	case !strings.EqualFold(status, statusUp):
		out.Unhealthy, out.Reason = true, unique.Make("status "+status).Value()
	}
	delete(i.Metadata, "@class") // names a Java type where there is no metadata
	pairs := make(map[string]string, len(i.Metadata))
	for k, v := range i.Metadata {
		pairs[k] = string(v)
	}
	out.Metadata = labels.FromMap(pairs)
	return out
}

// port chooses between an instance's two ports. A port whose flag is missing is what servers take it for: the plain one
// enabled, the secure one disabled. With a reason the instance cannot be used.
func (c choice) port(i *instanceInfo) (n number, secure bool, reason string) {
	plain := i.Port.Number != 0 && !strings.EqualFold(string(i.Port.Enabled), "false")
	tls := i.SecurePort.Number != 0 && strings.EqualFold(string(i.SecurePort.Enabled), "true")
	switch {
	case c.secure == secureAlways && tls, c.secure == secureAuto && tls && !plain:
		return i.SecurePort.Number, true, ""
	case c.secure == secureAlways:
		return i.SecurePort.Number, true, "its secure port is disabled, and eurekaSecure is always"
	case plain:
		return i.Port.Number, false, ""
	case c.secure == secureNever && tls:
		return i.Port.Number, false, "only its secure port is enabled, and eurekaSecure is never"
	default:
		return i.Port.Number, false, "both its ports are disabled"
	}
}

// portNumber keeps a number that is no port out of the range of ports: what is wrong with it is seen later.
func portNumber(n number) uint32 {
	if n < 0 || n > math.MaxUint32 {
		return math.MaxUint32
	}
	return uint32(n)
}

func (c choice) address(i *instanceInfo) string {
	ip, name := addressOf(i.IPAddr), addressOf(i.HostName)
	if c.hostName {
		return cmp.Or(name, ip)
	}
	if a, err := netip.ParseAddr(ip); err == nil && a.IsUnspecified() && name != "" {
		return name
	}
	return cmp.Or(ip, name)
}

// addressOf gives an address in the form in which facts are stated: no brackets, no zone.
func addressOf(t text) string {
	trimmed := strings.Trim(string(t), "[] \t\r\n")
	if a, err := netip.ParseAddr(trimmed); err == nil {
		return a.WithZone("").String()
	}
	return trimmed
}

// weight reads the metadata key weight. Whoever registers may write anything there, so only a weight counts as one.
func weight(t text) float64 {
	w, err := strconv.ParseFloat(strings.TrimSpace(string(t)), 64)
	if err != nil || w < 0 || math.IsNaN(w) || math.IsInf(w, 0) {
		return 1
	}
	return w
}

// locality takes Amazon's zone, whose region is its name without the last letter (us-east-1a), else the metadata key zone.
func locality(i *instanceInfo) registry.Locality {
	zone := string(i.DataCenter.Metadata.Zone)
	if zone == "" {
		return registry.Locality{Zone: unique.Make(string(i.Metadata["zone"])).Value()}
	}
	l := registry.Locality{Zone: unique.Make(zone).Value()}
	if n := len(zone); n > 1 && zone[n-1] >= 'a' && zone[n-1] <= 'z' && zone[n-2] >= '0' && zone[n-2] <= '9' {
		l.Region = unique.Make(zone[:n-1]).Value()
	}
	return l
}
