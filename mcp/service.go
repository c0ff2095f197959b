// Package mcp is what the mesh is told: the value type Service, and the protocols that it may have. What a Service looks
// like as Istio's or Envoy's resources is decided below, in packages mcp/istio and mcp/envoy; how it gets there in mcp/xds.
package mcp

import (
	"net/netip"
	"strings"

	"github.com/regbridge/regbridge/labels"
)

// A Service is one published service. It is a value: once made it is never written.
type Service struct {
	// Host is the service's name as the registry's convention gives it; dialects may rewrite it.
	Host string
	// Port is the service port, 1 to 65535.
	Port uint32
	// Protocol is what the port speaks.
	Protocol Protocol
	// DNS says that at least one endpoint's address is a host name, which the proxies have to resolve.
	DNS bool
	// Endpoints are sorted by address and port, without duplicates. None at all is allowed: the mesh then answers 503.
	Endpoints []Endpoint
	// RegistryType and RegistryName tell the first registry, in configuration order, that contributes.
	RegistryType, RegistryName string
	// VIP is the service's virtual address. It is invalid for services that need none.
	VIP netip.Addr
	// TLS is how clients must reach the endpoints; nil means as the protocol says, without further settings.
	TLS *TLS
}

// TLS is how clients reach the endpoints of an HTTPS or GRPCS service.
type TLS struct {
	// SNI is the server name to ask for and to verify; empty means none is known.
	SNI string
}

// An Endpoint is one address that gets traffic.
type Endpoint struct {
	// Address is an IP address, or a host name where the service has DNS set.
	Address string
	// Port is the endpoint's own port; 0 means the service's.
	Port uint32
	// Weight is at least 1; 0 means that all endpoints of the service weigh the same.
	Weight uint32
	// Locality is "region/zone/subzone", or a part of that from the left, or empty.
	Locality string
	// Labels are all metadata of the instance, unchanged; dialects leave out what their reader refuses.
	Labels labels.Set
}

// Protocol is what a service's port speaks. Its text is Higress's spelling, which is also the name of the port there.
type Protocol string

// The protocols of Higress's McpBridge. Unsupported is the protocol of instances that name one that is not among them.
const (
	TCP         Protocol = "TCP"
	HTTP        Protocol = "HTTP"
	HTTP2       Protocol = "HTTP2"
	HTTPS       Protocol = "HTTPS"
	GRPC        Protocol = "GRPC"
	GRPCS       Protocol = "GRPCS"
	Dubbo       Protocol = "Dubbo"
	Unsupported Protocol = "UnsupportedProtocol"
)

// ParseProtocol reads a protocol's name as registries and configurations write it, without regard to case. Triple is
// gRPC on the wire, Dubbo's rest HTTP. An unknown name is Unsupported; an empty one is empty.
func ParseProtocol(s string) Protocol {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "":
		return ""
	case "tcp":
		return TCP
	case "http", "rest":
		return HTTP
	case "http2":
		return HTTP2
	case "https":
		return HTTPS
	case "grpc", "tri", "triple":
		return GRPC
	case "grpcs":
		return GRPCS
	case "dubbo":
		return Dubbo
	default:
		return Unsupported
	}
}
