// Package builtin is the one table of the registry types that this version of regbridge has. Only the program imports it.
package builtin

import (
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/consul"
	"github.com/regbridge/regbridge/registry/dns"
	"github.com/regbridge/regbridge/registry/eureka"
	"github.com/regbridge/regbridge/registry/nacos"
	"github.com/regbridge/regbridge/registry/static"
	"github.com/regbridge/regbridge/registry/zookeeper"
)

// Types returns the constructors by the name of the type, as spec.registries[].type of a McpBridge has it.
func Types() map[string]func(registry.Entry, registry.Env) (registry.Registry, error) {
	return map[string]func(registry.Entry, registry.Env) (registry.Registry, error){
		"consul":    consul.New,
		"dns":       dns.New,
		"eureka":    eureka.New,
		"nacos":     nacos.NewHTTP,
		"nacos2":    nacos.NewGRPC,
		"nacos3":    nacos.NewGRPC,
		"static":    static.New,
		"zookeeper": zookeeper.New,
	}
}
