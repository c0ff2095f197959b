package nacos

import (
	"cmp"
	"encoding/json"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// clusterLabel carries the cluster of an instance, unless that is the one that every instance is in by default. The key is
// that of Spring Cloud Alibaba.
const (
	clusterLabel   = "nacos.cluster"
	defaultCluster = "DEFAULT"
)

// key names a service of a namespace.
type key struct{ group, name string }

// id is Nacos's own form of the key.
func (k key) id() string { return k.group + "@@" + k.name }

func (k key) compare(o key) int {
	return cmp.Or(strings.Compare(k.group, o.group), strings.Compare(k.name, o.name))
}

// serviceInfo is what Nacos says about one service: by gRPC, and from /nacos/v1/ns/instance/list.
// https://nacos.io/docs/v2.3/open-api/
type serviceInfo struct {
	Name      string `json:"name"` // in HTTP answers with the group: GROUP@@name
	GroupName string `json:"groupName"`
	// Hosts is nil in answers that are not about a service.
	Hosts []host `json:"hosts"`
	// LastRefTime is when the answer was made, in milliseconds by the server's clock.
	LastRefTime int64 `json:"lastRefTime"`
}

type host struct {
	IP          string            `json:"ip"`
	Port        int64             `json:"port"`
	Weight      weight            `json:"weight"`
	Healthy     bool              `json:"healthy"`
	Enabled     bool              `json:"enabled"`
	ClusterName string            `json:"clusterName"`
	Metadata    map[string]string `json:"metadata"`
}

// weight is a number, or a text such as "NaN", which servers take from whoever registers; that counts as a negative one, which
// nobody can have.
type weight float64

// UnmarshalJSON reads both.
func (w *weight) UnmarshalJSON(b []byte) error {
	var f float64
	if err := json.Unmarshal(b, &f); err != nil {
		f = -1
	}
	*w = weight(f)
	return nil
}

// hostOf gives the host name of a service. Higress's convention replaces underscores, but not in the service's name.
func hostOf(k key, namespace string) string {
	return k.name + "." + strings.ReplaceAll(k.group+"."+namespace+".nacos", "_", "-")
}

// skipped reports whether the name is not that of a service that anybody could call: Dubbo registers consumers too.
func skipped(name string) bool { return name == "" || strings.HasPrefix(name, "consumers:") }

// convert turns an answer into facts, in an order that does not depend on the answer's.
func convert(k key, namespace string, info serviceInfo) (registry.Service, error) {
	if info.Hosts == nil {
		return registry.Service{}, &answerError{message: "without instances, not even an empty list of them"}
	}
	if name := strings.TrimPrefix(info.Name, k.group+"@@"); name != "" && name != k.name {
		return registry.Service{}, &answerError{message: "about another service, " + short(name)}
	}
	s := registry.Service{ID: k.id(), Host: hostOf(k, namespace), Instances: make([]registry.Instance, len(info.Hosts))}
	for n, h := range info.Hosts {
		s.Instances[n] = instance(h)
	}
	slices.SortStableFunc(s.Instances, func(a, b registry.Instance) int {
		return cmp.Or(strings.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port),
			strings.Compare(a.Metadata.Encoded(), b.Metadata.Encoded()), strings.Compare(a.Reason, b.Reason), cmp.Compare(a.Weight, b.Weight))
	})
	return s, nil
}

// address gives the form in which facts are stated: no brackets, no zone.
func address(ip string) string {
	trimmed := strings.Trim(ip, "[] \t\r\n")
	if addr, err := netip.ParseAddr(trimmed); err == nil {
		return addr.WithZone("").String()
	}
	return trimmed
}

// port keeps a number that is no port out of the range of ports: what is wrong with it is seen later.
func port(n int64) uint32 {
	if n < 0 || n > math.MaxUint32 {
		return math.MaxUint32
	}
	return uint32(n)
}

func instance(h host) registry.Instance {
	i := registry.Instance{
		Address: address(h.IP),
		Port:    port(h.Port),
		Weight:  float64(h.Weight),
		Locality: registry.Locality{
			Region: cmp.Or(h.Metadata["region"], h.Metadata["topology.kubernetes.io/region"]),
			Zone:   cmp.Or(h.Metadata["zone"], h.Metadata["topology.kubernetes.io/zone"]),
		},
	}
	switch {
	case h.Metadata["register-resource"] == "mcp-bridge": // Higress's own registration of what it read: no way in circles
		i.Disabled, i.Reason = true, "was registered by a bridge (metadata register-resource=mcp-bridge)"
	case !h.Enabled:
		i.Disabled, i.Reason = true, "is disabled in Nacos"
	case !h.Healthy:
		i.Unhealthy, i.Reason = true, "is unhealthy for Nacos"
	}
	metadata := h.Metadata
	if h.ClusterName != "" && h.ClusterName != defaultCluster && metadata[clusterLabel] == "" {
		metadata = maps.Clone(metadata)
		if metadata == nil {
			metadata = map[string]string{}
		}
		metadata[clusterLabel] = h.ClusterName
	}
	i.Metadata = labels.FromMap(metadata)
	return i
}
