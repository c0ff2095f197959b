package bridge

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/registry"
)

// Construct makes the adapter of an entry. It checks the fields that mean the same for every type, and has the type's
// constructor check the rest; it opens nothing. The error joins a registry.FieldError for each problem. If all of them
// are Partial the adapter serves the rest of the entry; otherwise it is nil.
func Construct(types map[string]Constructor, e registry.Entry, env registry.Env) (registry.Registry, error) {
	construct := types[e.Type]
	if construct == nil {
		return nil, registry.Fieldf("type", "unknown registry type %q: known are %q", e.Type, slices.Sorted(maps.Keys(types)))
	}
	common := checkCommon(e)
	adapter, err := construct(e, env)
	own := registry.FieldErrors(err)
	if err != nil && len(own) == 0 {
		return nil, errors.Join(append(common, err)...)
	}
	common = slices.DeleteFunc(common, func(c error) bool { // the type's word on a field is the better one
		return slices.ContainsFunc(own, func(f *registry.FieldError) bool { return f.Path == registry.FieldErrors(c)[0].Path })
	})
	err = errors.Join(append(common, err)...)
	fatal := slices.ContainsFunc(registry.FieldErrors(err), func(f *registry.FieldError) bool { return !f.Partial })
	if adapter == nil && !fatal {
		err = errors.Join(err, registry.Fieldf("", "nothing of the entry can be used"))
	}
	if adapter == nil || fatal {
		return nil, err
	}
	return adapter, err
}

// checkCommon checks the fields that mean the same for every type. What is bad of them is left out, and no reason to do
// without the registry; but a connection that is to be secure must not be made otherwise.
func checkCommon(e registry.Entry) []error {
	var problems []error
	partial := func(path, format string, args ...any) {
		problems = append(problems, &registry.FieldError{Path: path, Err: fmt.Errorf(format, args...), Partial: true})
	}
	if mcp.ParseProtocol(e.Protocol) == mcp.Unsupported {
		partial("protocol", "%q is unknown, and HTTP is used: write tcp, http, http2, https, grpc, grpcs or dubbo", e.Protocol)
	}
	if v := e.VPort; v != nil {
		if v.Default != 0 && !validPort(v.Default) {
			partial("vport.default", "%d is not a number from 1 to 65535", v.Default)
		}
		seen := map[string]bool{}
		for i, s := range v.Services {
			switch name := strings.ToLower(s.Name); {
			case name == "":
				partial(fmt.Sprintf("vport.services[%d].name", i), "is empty: write the full host name of the service")
			case seen[name]:
				partial(fmt.Sprintf("vport.services[%d].name", i), "%q is there twice: the first one counts", s.Name)
			case !validPort(s.Value):
				partial(fmt.Sprintf("vport.services[%d].value", i), "%d is not a number from 1 to 65535", s.Value)
			}
			seen[strings.ToLower(s.Name)] = true
		}
	}
	if t := e.TLS; t.On() && (t.CertFile == "") != (t.KeyFile == "") {
		problems = append(problems, registry.Fieldf("tls", "a client certificate needs both certFile and keyFile"))
	}
	return problems
}
