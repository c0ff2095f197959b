// Package builtin is the one table of the registry types that this version of regbridge has. Only the program imports it.
package builtin

import (
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/consul"
	"github.com/regbridge/regbridge/registry/dns"
	"github.com/regbridge/regbridge/registry/static"
)

// Types returns the constructors by the name of the type, as spec.registries[].type of a McpBridge has it.
func Types() map[string]func(registry.Entry, registry.Env) (registry.Registry, error) {
	return map[string]func(registry.Entry, registry.Env) (registry.Registry, error){
		"consul": consul.New,
		"dns":    dns.New,
		"static": static.New,
	}
}
