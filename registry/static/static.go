// Package static is the registry type "static": one service whose endpoints stand in the entry itself.
package static

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

type static struct {
	service  registry.Service
	interval time.Duration
}

// New makes a registry of an entry of type static. Its error joins a registry.FieldError for each problem of the entry.
// If all of them are Partial the registry serves the rest of the entry; otherwise it is nil.
func New(e registry.Entry, _ registry.Env) (registry.Registry, error) {
	service, err := convert(e)
	if slices.ContainsFunc(registry.FieldErrors(err), func(f *registry.FieldError) bool { return !f.Partial }) {
		return nil, err
	}
	return &static{service: service, interval: e.Interval()}, err
}

// Run states the service at once, and again each refresh interval, as the contract asks for.
func (s *static) Run(ctx context.Context, sink registry.Sink) error {
	return registry.Poll(ctx, sink, s.interval, s.interval, func(context.Context) ([]registry.Service, error) {
		return []registry.Service{s.service}, nil
	})
}

// convert makes the entry's service, and tells what is wrong with the entry.
func convert(e registry.Entry) (registry.Service, error) {
	s := registry.Service{ID: e.Name, Host: e.Name + ".static", Port: e.Port}
	var problems []error
	if e.Name == "" {
		problems = append(problems, registry.Fieldf("name", "is empty: it is the first part of the host name"))
	}
	secure, err := clientTLS(e.Protocol)
	if err != nil {
		problems = append(problems, err)
	}
	if secure {
		s.TLS = &registry.ClientTLS{SNI: e.SNI}
	}
	switch {
	case e.Port > 65535:
		problems = append(problems, registry.Fieldf("port", "%d is not a number from 1 to 65535", e.Port))
	case e.Port == 0:
		s.Port = 80
		if secure {
			s.Port = 443
		}
		problems = append(problems, &registry.FieldError{Path: "port", Partial: true,
			Err: fmt.Errorf("is not set: the service gets port %d; set the port that clients use", s.Port)})
	}
	instances, bad := endpoints(e.Domain)
	s.Instances = instances
	problems = append(problems, bad...)
	if len(instances) == 0 {
		problems = append(problems, registry.Fieldf("domain", "lists no endpoint: write ip:port, separated by commas"))
	}
	return s, errors.Join(problems...)
}

// endpoints reads a comma list of endpoints. Each bad item is a Partial FieldError, and does no harm to the others.
func endpoints(domain string) ([]registry.Instance, []error) {
	var good []registry.Instance
	var bad []error
	for i, item := range strings.Split(domain, ",") {
		instance, ok, err := endpoint(item)
		if err != nil {
			bad = append(bad, &registry.FieldError{Path: fmt.Sprintf("domain[%d]", i), Err: err, Partial: true})
		} else if ok {
			good = append(good, instance)
		}
	}
	return good, bad
}

// endpoint reads one item of the list. ok is false for a blank one.
func endpoint(item string) (i registry.Instance, ok bool, err error) {
	servers, err := registry.ParseServers("domain", item, 0)
	if err != nil {
		return i, false, registry.FieldErrors(err)[0].Err
	}
	if len(servers) == 0 {
		return i, false, nil
	}
	addr, err := netip.ParseAddr(servers[0].Host)
	switch {
	case err != nil:
		return i, false, fmt.Errorf("%q is not an IP address: use type dns for host names", servers[0].Host)
	case addr.Zone() != "":
		return i, false, fmt.Errorf("%q has a zone, which has a meaning on one machine only", servers[0].Host)
	}
	return registry.Instance{Address: addr.Unmap().String(), Port: servers[0].Port, Weight: 1}, true, nil
}

// clientTLS tells whether clients reach a service of the protocol by TLS.
func clientTLS(protocol string) (bool, error) {
	switch strings.ToLower(strings.TrimSpace(protocol)) {
	case "https", "grpcs":
		return true, nil
	case "", "tcp", "http", "http2", "grpc", "tri", "triple", "dubbo":
		return false, nil
	default:
		return false, registry.Fieldf("protocol",
			"%q is unknown: write tcp, http, http2, https, grpc, grpcs or dubbo", protocol)
	}
}
