package admin

import (
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"time"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
)

// The pages in this file have the form of istiod 1.31's pages of the same names, since Higress Console reads them, and
// people have scripts for them. Services and endpoints are shown as they are published, before the dialect of the mesh is
// applied: the hosts and labels are those of the registries. /debug/configz shows what the mesh gets.

// registryService is one element of /debug/registryz. Fields that never have a value here are written as istiod writes
// them without one.
type registryService struct {
	Attributes     serviceAttributes
	Ports          []servicePort `json:"ports"`
	CreationTime   time.Time     `json:"creationTime"`
	Hostname       string        `json:"hostname"`
	ClusterVIPs    addressMap    `json:"clusterVIPs"`
	DefaultAddress string        `json:"defaultAddress"`
	Resolution     int
	MeshExternal   bool
	// ResourceVersion is that of a Kubernetes Service: none.
	ResourceVersion string
}

type serviceAttributes struct {
	ServiceRegistry          string
	Name                     string
	Namespace                string
	Labels                   map[string]string
	ExportTo                 any
	Visibility               int
	LabelSelectors           any
	Aliases                  any
	ClusterExternalAddresses addressMap
	ClusterExternalPorts     any
	PassthroughTargetPorts   any
	Type                     string
	ExternalName             string
	NodeLocal                bool
	TrafficDistribution      int
	ObjectName               string
	DNSConnectStrategy       int
	PublishNotReadyAddresses bool
}

type servicePort struct {
	Name     string `json:"name"`
	Port     uint32 `json:"port"`
	Protocol string `json:"protocol"`
}

type addressMap struct{ Addresses any }

// Resolutions as istiod numbers them.
const (
	resolutionStatic = 0
	resolutionDNS    = 1
)

// external is what istiod calls services that do not come from Kubernetes, and cluster the only one that it has here.
const (
	external = "External"
	cluster  = "Kubernetes"
)

// created is the creation time that every resource has.
func created() time.Time { return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC) }

// registryz lists the services.
func (a *Admin) registryz(w http.ResponseWriter, _ *http.Request) {
	writeArray(w, func(yield func(registryService) bool) {
		for _, s := range a.opts.Bridge.Services() {
			if !yield(describeService(s.Service)) {
				return
			}
		}
	})
}

func describeService(s mcp.Service) registryService {
	out := registryService{
		Attributes: serviceAttributes{
			ServiceRegistry: external,
			// The Console tells entries of type dns by this name, <entry>.dns.
			Name:       s.Host,
			Namespace:  istio.Namespace,
			Labels:     map[string]string{"higress-registry-type": s.RegistryType, "higress-registry-name": s.RegistryName},
			ObjectName: s.Host,
		},
		Ports:        []servicePort{{Name: string(s.Protocol), Port: s.Port, Protocol: string(s.Protocol)}},
		CreationTime: created(), Hostname: s.Host, DefaultAddress: "0.0.0.0", Resolution: resolutionStatic,
	}
	if s.VIP.IsValid() {
		out.DefaultAddress = s.VIP.String()
	}
	if s.DNS && len(s.Endpoints) > 0 {
		out.Resolution = resolutionDNS
	}
	return out
}

// shards is what /debug/endpointShardz has of one host in one namespace.
type shards struct {
	Shards          map[string][]shardEndpoint
	ServiceAccounts struct{}
}

type shardEndpoint struct {
	Labels                 labels.Set
	Addresses              []string
	ServicePortName        string
	LegacyClusterPortKey   uint32
	ServiceAccount         string
	Network                string
	Locality               shardLocality
	EndpointPort           uint32
	LbWeight               uint32
	TLSMode                string
	Namespace              string
	WorkloadName           string
	HostName               string
	SubDomain              string
	HealthStatus           int
	SendUnhealthyEndpoints bool
	NodeName               string
}

type shardLocality struct{ Label, ClusterID string }

// endpointShardz lists the endpoints of each service. Entries of type dns that the proxies resolve are not here, as at
// istiod: of a service <name>.dns without endpoints the Console shows the entry's own domain. Other services with host
// names, which istiod would leave out too, are here: the Console would show them as if nobody provided them.
func (a *Admin) endpointShardz(w http.ResponseWriter, _ *http.Request) {
	writeObject(w, func(yield func(string, map[string]shards) bool) {
		for _, s := range a.opts.Bridge.Services() {
			if s.DNS && strings.HasSuffix(strings.ToLower(s.Host), ".dns") {
				continue
			}
			if !yield(s.Host, map[string]shards{istio.Namespace: {Shards: describeEndpoints(s)}}) {
				return
			}
		}
	})
}

func describeEndpoints(s bridge.PublishedService) map[string][]shardEndpoint {
	if len(s.Endpoints) == 0 {
		return map[string][]shardEndpoint{}
	}
	out := make([]shardEndpoint, len(s.Endpoints))
	for i, e := range s.Endpoints {
		out[i] = shardEndpoint{
			Labels: e.Labels, Addresses: []string{e.Address}, ServicePortName: string(s.Protocol), LegacyClusterPortKey: s.Port,
			Locality: shardLocality{Label: e.Locality, ClusterID: cluster}, EndpointPort: cmp.Or(e.Port, s.Port),
			LbWeight: max(1, e.Weight), // what the proxies make of no weight
			TLSMode:  "disabled", Namespace: istio.Namespace, WorkloadName: fmt.Sprintf("%s-%d", s.Host, i),
		}
	}
	return map[string][]shardEndpoint{external + "/" + cluster: out}
}

// configz lists the resources as they are sent, optionally of one kind, or of one name.
func (a *Admin) configz(w http.ResponseWriter, r *http.Request) {
	kind, name := r.URL.Query().Get("kind"), r.URL.Query().Get("name")
	writeArray(w, func(yield func(json.RawMessage) bool) {
		for _, typ := range istio.Published() {
			if _, short, _ := strings.Cut(typ, "/"); kind != "" && !strings.EqualFold(kind, short) && !strings.EqualFold(kind, typ) {
				continue
			}
			for text := range a.resources(typ, name) {
				if !yield(text) {
					return
				}
			}
		}
	})
}

func (a *Admin) resources(typ, name string) iter.Seq[json.RawMessage] {
	return func(yield func(json.RawMessage) bool) {
		for _, res := range a.opts.Cache.Resources(typ) {
			if _, short, _ := strings.Cut(res.Name, "/"); name != "" && name != res.Name && name != short {
				continue
			}
			if !yield(describeResource(res)) {
				return
			}
		}
	}
}

func describeResource(res xds.Resource) json.RawMessage {
	o, version, err := istio.Decode(res.Body)
	if err == nil {
		var text []byte
		if text, err = istio.JSON(o, version); err == nil {
			return text
		}
	}
	// Ours to mend; the others are shown all the same.
	text, _ := json.Marshal(map[string]string{"kind": res.Type, "name": res.Name, "error": err.Error()}) // strings always can be
	return text
}
