package zookeeper

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// node is a child of a service's folder under /services or another root: an instance in the JSON form of Curator's service
// discovery, written by Spring Cloud, by Dubbo (its application level) or by another.
type node struct {
	dubbo       bool
	application string // Dubbo: its application
	// registered is when the node was written, in milliseconds by the writer's clock; 0 if it does not say.
	registered int64
	// instances is one per endpoint of a Dubbo application, else one.
	instances []registry.Instance
	// port is the node's own: that of the endpoint which goes before the others.
	port uint32
	// revision names what a Dubbo application exports; empty if unknown, as with Dubbo 2.7.
	revision string
	// remoteMetadata says that what it exports is in ZooKeeper, and not only to be had from the provider.
	remoteMetadata bool
}

// text is a JSON value of which writers have different forms: strings, numbers, booleans. null is empty. Arrays and objects
// stay JSON.
type text string

// UnmarshalJSON reads any value.
func (t *text) UnmarshalJSON(b []byte) error {
	var s string
	switch {
	case bytes.HasPrefix(b, []byte(`"`)):
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
	case !bytes.Equal(b, []byte("null")):
		s = string(b)
	}
	*t = text(s)
	return nil
}

// payload is what an application adds to a node.
type payload struct {
	Class    text
	Metadata map[string]*text // null is nil
}

// UnmarshalJSON reads an object; any other payload says nothing to us.
func (p *payload) UnmarshalJSON(b []byte) error {
	var object struct {
		Class    text            `json:"@class"`
		Metadata json.RawMessage `json:"metadata"`
	}
	if json.Unmarshal(b, &object) != nil {
		return nil
	}
	p.Class = object.Class
	_ = json.Unmarshal(object.Metadata, &p.Metadata) // what is no object has no keys
	return nil
}

// curatorNode is the JSON form. https://curator.apache.org/docs/service-discovery/
type curatorNode struct {
	Name                text    `json:"name"`
	Address             text    `json:"address"`
	Port                text    `json:"port"`
	SSLPort             text    `json:"sslPort"`
	Enabled             text    `json:"enabled"`
	RegistrationTimeUTC text    `json:"registrationTimeUTC"`
	Payload             payload `json:"payload"`
}

// The keys of Dubbo's metadata that are no labels.
const (
	endpointsKey = "dubbo.endpoints"
	urlParamsKey = "dubbo.metadata-service.url-params"
)

// decodeNode reads a node's data. Together with an error it may give instances: those of its endpoints that are usable.
//
// The port is port, where there is one, else sslPort, and then the protocol is https. The protocol in the metadata is not
// looked at here.
func decodeNode(data []byte) (node, error) {
	var c curatorNode
	if err := json.Unmarshal(data, &c); err != nil {
		return node{}, fmt.Errorf("the node's data is not the JSON of Curator: %w", err)
	}
	metadata := make(map[string]string, len(c.Payload.Metadata))
	for k, v := range c.Payload.Metadata {
		if v != nil && k != "" && k != "@class" {
			metadata[k] = string(*v)
		}
	}
	endpoints, hasEndpoints := metadata[endpointsKey]
	n := node{dubbo: hasEndpoints || strings.Contains(strings.ToLower(string(c.Payload.Class)), "dubbo"), application: string(c.Name)}
	n.registered, _ = strconv.ParseInt(string(c.RegistrationTimeUTC), 10, 64) // 0 where it is none
	n.port = portOf(string(c.Port))

	i := registry.Instance{Address: address(string(c.Address)), Weight: 1, Locality: registry.Locality{Zone: metadata["zone"]}}
	if i.Address == "" {
		return n, errors.New("the node has no address")
	}
	if err := checkAddress(i.Address); err != nil {
		return n, err
	}
	if strings.EqualFold(string(c.Enabled), "false") {
		i.Disabled, i.Reason = true, "is not enabled (enabled=false)"
	}
	if n.dubbo {
		n.revision = metadata["dubbo.metadata.revision"]
		n.remoteMetadata = metadata["dubbo.metadata.storage-type"] == "remote"
		delete(metadata, endpointsKey)
		delete(metadata, urlParamsKey)
		i.Weight = weightOf(metadata)
		i.Metadata = labels.FromMap(metadata)
		return n.withEndpoints(i, endpoints, cmp.Or(strings.ToLower(metadata["protocol"]), "dubbo"))
	}
	if status := metadata["instance_status"]; !i.Disabled {
		switch {
		case status == "" || strings.EqualFold(status, "UP"):
		case strings.EqualFold(status, "OUT_OF_SERVICE"):
			i.Disabled, i.Reason = true, "instance_status is "+status
		default:
			i.Unhealthy, i.Reason = true, "instance_status is "+status
		}
	}
	// Spring Cloud LoadBalancer takes a weight that is not positive as none.
	if w, err := strconv.ParseFloat(metadata["weight"], 64); err == nil && w > 0 && !math.IsInf(w, 0) {
		i.Weight = w
	}
	i.Metadata = labels.FromMap(metadata)
	if i.Port = n.port; i.Port == 0 {
		if i.Port = portOf(string(c.SSLPort)); i.Port == 0 {
			return n, fmt.Errorf("the node of %s has neither a port nor an sslPort from 1 to 65535", i.Address)
		}
		i.Protocol = "https"
	}
	n.instances = []registry.Instance{i}
	return n, nil
}

// withEndpoints adds an instance, made after i, for each endpoint; without a usable one it is the node's own port. protocol
// is that of endpoints that name none.
func (n node) withEndpoints(i registry.Instance, endpoints, protocol string) (node, error) {
	var bad []error
	var list []json.RawMessage
	if endpoints != "" {
		if err := json.Unmarshal([]byte(endpoints), &list); err != nil {
			bad = append(bad, fmt.Errorf("%s of %s is no JSON array: %w", endpointsKey, i.Address, err))
		}
	}
	for _, raw := range list {
		var e struct {
			Port     text `json:"port"`
			Protocol text `json:"protocol"`
		}
		if err := json.Unmarshal(raw, &e); err != nil {
			bad = append(bad, fmt.Errorf("an element of %s of %s: %w", endpointsKey, i.Address, err))
			continue
		}
		if i.Port = portOf(string(e.Port)); i.Port == 0 {
			bad = append(bad, fmt.Errorf("an element of %s of %s has no port from 1 to 65535", endpointsKey, i.Address))
			continue
		}
		i.Protocol = cmp.Or(strings.ToLower(string(e.Protocol)), protocol)
		n.instances = append(n.instances, i)
	}
	if len(n.instances) == 0 {
		i.Port, i.Protocol = n.port, protocol
		if i.Port == 0 {
			return n, errors.Join(append(bad, fmt.Errorf("the node of %s has no port from 1 to 65535", i.Address))...)
		}
		n.instances = []registry.Instance{i}
	}
	return n, errors.Join(bad...)
}
