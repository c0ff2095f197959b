package xds

import (
	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
)

// StreamAggregatedResources serves ADS, state of the world.
func (e *endpoint) StreamAggregatedResources(s discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return e.sotw(s, resource.AnyType)
}

// DeltaAggregatedResources serves ADS, delta.
func (e *endpoint) DeltaAggregatedResources(s discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return e.delta(s, resource.AnyType)
}

// StreamClusters serves CDS, state of the world.
func (e *endpoint) StreamClusters(s clusterservice.ClusterDiscoveryService_StreamClustersServer) error {
	return e.sotw(s, resource.ClusterType)
}

// DeltaClusters serves CDS, delta.
func (e *endpoint) DeltaClusters(s clusterservice.ClusterDiscoveryService_DeltaClustersServer) error {
	return e.delta(s, resource.ClusterType)
}

// StreamEndpoints serves EDS, state of the world.
func (e *endpoint) StreamEndpoints(s endpointservice.EndpointDiscoveryService_StreamEndpointsServer) error {
	return e.sotw(s, resource.EndpointType)
}

// DeltaEndpoints serves EDS, delta.
func (e *endpoint) DeltaEndpoints(s endpointservice.EndpointDiscoveryService_DeltaEndpointsServer) error {
	return e.delta(s, resource.EndpointType)
}

// StreamListeners serves LDS, state of the world.
func (e *endpoint) StreamListeners(s listenerservice.ListenerDiscoveryService_StreamListenersServer) error {
	return e.sotw(s, resource.ListenerType)
}

// DeltaListeners serves LDS, delta.
func (e *endpoint) DeltaListeners(s listenerservice.ListenerDiscoveryService_DeltaListenersServer) error {
	return e.delta(s, resource.ListenerType)
}

// StreamRoutes serves RDS, state of the world.
func (e *endpoint) StreamRoutes(s routeservice.RouteDiscoveryService_StreamRoutesServer) error {
	return e.sotw(s, resource.RouteType)
}

// DeltaRoutes serves RDS, delta.
func (e *endpoint) DeltaRoutes(s routeservice.RouteDiscoveryService_DeltaRoutesServer) error {
	return e.delta(s, resource.RouteType)
}
