package bridge

import (
	"fmt"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
)

// IstioRenderer makes services into Istio's resources, in one dialect, and holds each against the dialect's rules.
type IstioRenderer struct {
	Dialect istio.Dialect
}

// EndpointError implements Renderer.
func (r IstioRenderer) EndpointError(s mcp.Service, e mcp.Endpoint) error {
	return r.Dialect.EndpointError(s, e)
}

// NeedsVIP implements Renderer.
func (r IstioRenderer) NeedsVIP(s mcp.Service) bool { return r.Dialect.NeedsVIP(s) }

// Render implements Renderer.
func (r IstioRenderer) Render(s mcp.Service) ([]xds.Resource, error) {
	objects := r.Dialect.Render(s)
	resources := make([]xds.Resource, 0, len(objects))
	for _, o := range objects {
		if err := r.Dialect.Check(o); err != nil {
			return nil, fmt.Errorf("%s %s/%s: %w", o.Kind, o.Namespace, o.Name, err)
		}
		name, version, body, err := istio.Encode(o)
		if err != nil {
			return nil, fmt.Errorf("encode %s %s/%s: %w", o.Kind, o.Namespace, o.Name, err)
		}
		resources = append(resources, xds.Resource{Type: o.Kind, Name: name, Version: version, Shard: s.Host, Body: body})
	}
	return resources, nil
}
