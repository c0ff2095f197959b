package dns

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/registry"
)

// spec is what an entry asks for.
type spec struct {
	service registry.Service // without instances
	resolve bool
	names   []name
	servers []registry.Server
}

// name is one item of an entry's domain.
type name struct {
	host string
	port uint32     // 0: the service's
	addr netip.Addr // valid if host is an IP address
	srv  bool       // host has the form of an SRV record's owner
}

// convert reads an entry, and tells what is wrong with it.
func convert(e registry.Entry) (spec, error) {
	s := spec{service: registry.Service{ID: e.Name, Host: e.Name + ".dns", Port: e.Port}}
	var problems []error
	if e.Name == "" {
		problems = append(problems, registry.Fieldf("name", "is empty: it is the first part of the host name"))
	}
	switch e.DNSMode {
	case "", "passthrough":
	case "resolve":
		s.resolve = true
	default:
		problems = append(problems, registry.Fieldf("dnsMode", "%q is unknown: write passthrough or resolve", e.DNSMode))
	}
	secure, err := clientTLS(e.Protocol)
	if err != nil {
		problems = append(problems, err)
	}
	switch {
	case e.Port > 65535:
		problems = append(problems, registry.Fieldf("port", "%d is not a number from 1 to 65535", e.Port))
	case e.Port == 0:
		s.service.Port = 80
		if secure {
			s.service.Port = 443
		}
		problems = append(problems, partial("port",
			fmt.Errorf("is not set: the service gets port %d; set the port that clients use", s.service.Port)))
	}
	names, bad := parseNames(e.Domain, s.resolve)
	s.names = names
	problems = append(problems, bad...)
	if len(s.names) == 0 {
		problems = append(problems, registry.Fieldf("domain", "lists no name: write host names, separated by commas"))
	}
	if secure {
		s.service.TLS = &registry.ClientTLS{SNI: cmp.Or(e.SNI, serverName(s.names))}
	}
	servers, bad := parseServers(e.DNSServers)
	s.servers = servers
	problems = append(problems, bad...)
	if len(e.DNSServers) > 0 && !s.resolve {
		problems = append(problems, partial("dnsServers",
			errors.New("is of use in dnsMode resolve only: the proxies ask their own")))
	}
	return s, errors.Join(problems...)
}

func partial(path string, err error) error {
	return &registry.FieldError{Path: path, Err: err, Partial: true}
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

// parseNames reads the comma list of names. Each bad item is a Partial FieldError, and does no harm to the others.
func parseNames(domain string, resolve bool) ([]name, []error) {
	var names []name
	var problems []error
	for i, item := range strings.Split(domain, ",") {
		path := fmt.Sprintf("domain[%d]", i)
		servers, err := registry.ParseServers("domain", item, 0)
		if err != nil {
			problems = append(problems, partial(path, registry.FieldErrors(err)[0].Err))
			continue
		}
		if len(servers) == 0 {
			continue
		}
		n := name{host: servers[0].Host, port: servers[0].Port, srv: isService(servers[0].Host)}
		if addr, err := netip.ParseAddr(n.host); err == nil {
			n.addr = addr.Unmap()
			n.host = n.addr.String()
		}
		switch {
		case n.addr.Zone() != "":
			problems = append(problems, partial(path,
				fmt.Errorf("%q has a zone, which has a meaning on one machine only", n.host)))
			continue
		case n.srv && !resolve:
			problems = append(problems, partial(path, fmt.Errorf(
				"%q looks like an SRV record, but the proxies look for addresses of that name: set dnsMode to resolve", n.host)))
		case n.srv && n.port != 0:
			problems = append(problems, partial(path,
				fmt.Errorf("%q: an SRV record tells the port: leave out :%d", n.host, n.port)))
			continue
		}
		names = append(names, n)
	}
	return names, problems
}

// parseServers reads the DNS servers of an entry.
func parseServers(list []string) (servers []registry.Server, problems []error) {
	for i, text := range list {
		more, err := registry.ParseServers("", text, 53)
		for _, f := range registry.FieldErrors(err) {
			problems = append(problems, partial(fmt.Sprintf("dnsServers[%d]", i), f.Err))
		}
		servers = append(servers, more...)
	}
	if len(list) > 0 && len(servers) == 0 {
		problems = append(problems, registry.Fieldf("dnsServers", "lists no server: write host or host:port"))
	}
	return servers, problems
}

// isService reports whether host has the form _service._proto.name (RFC 2782).
func isService(host string) bool {
	labels := strings.SplitN(host, ".", 3)
	return len(labels) == 3 && labels[2] != "" && strings.HasPrefix(labels[0], "_") && strings.HasPrefix(labels[1], "_")
}

// serverName is the name that the servers' certificate must be valid for: the one name that the entry lists. Of an SRV
// record that is the name behind _service._proto, since the targets come from an answer that nobody signed. It is empty
// where the entry lists several names, or an address.
func serverName(names []name) string {
	if len(names) == 0 || names[0].addr.IsValid() {
		return ""
	}
	for _, n := range names[1:] {
		if !strings.EqualFold(n.host, names[0].host) {
			return ""
		}
	}
	host := names[0].host
	if names[0].srv {
		host = strings.SplitN(host, ".", 3)[2]
	}
	return strings.TrimSuffix(host, ".")
}

// passthrough is the service whose instances are the names themselves.
func (s spec) passthrough() registry.Service {
	out := s.service
	for _, n := range s.names {
		out.Instances = append(out.Instances, registry.Instance{Address: n.host, Port: n.port, Weight: 1})
	}
	return out
}

// addressInstances makes an instance of each address.
func addressInstances(addresses []netip.Addr, port uint32) []registry.Instance {
	out := make([]registry.Instance, len(addresses))
	for i, a := range addresses {
		out[i] = registry.Instance{Address: a.String(), Port: port, Weight: 1}
	}
	return out
}

// a located target is one of an SRV record, with its addresses.
type located struct {
	target
	addresses []netip.Addr
}

// serviceInstances makes the instances of a group of SRV targets of one priority. Weights are scaled to an average of 1,
// and a target's weight is shared by its addresses. A target with weight 0 still gets what RFC 2782 leaves it: all of
// them together as much as weight 1.
func serviceInstances(group []located) []registry.Instance {
	var sum, usable, zeros float64
	for _, t := range group {
		if len(t.addresses) > 0 {
			usable++
			sum += float64(t.weight)
			if t.weight == 0 {
				zeros++
			}
		}
	}
	if zeros > 0 {
		sum++
	}
	var out []registry.Instance
	for _, t := range group {
		if len(t.addresses) == 0 {
			reason := "the SRV target has no address"
			if t.port == 0 {
				reason = "the SRV record states port 0"
			}
			out = append(out, t.standby(reason))
			continue
		}
		weight := float64(t.weight)
		if t.weight == 0 {
			weight = 1 / zeros
		}
		for _, a := range t.addresses {
			out = append(out, registry.Instance{
				Address: a.String(),
				Port:    uint32(t.port),
				Weight:  weight * usable / sum / float64(len(t.addresses)),
			})
		}
	}
	return out
}

// standby states a target that gets no traffic.
func (t target) standby(reason string) registry.Instance {
	return registry.Instance{
		Address: strings.TrimSuffix(t.name, "."), Port: uint32(t.port), Weight: 1, Disabled: true, Reason: reason,
	}
}

// ordered puts instances in a fixed order, each once: servers rotate their answers, and names may share addresses.
func ordered(instances []registry.Instance) []registry.Instance {
	slices.SortFunc(instances, func(a, b registry.Instance) int {
		return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(b.Weight, a.Weight),
			cmp.Compare(a.Reason, b.Reason))
	})
	return slices.Compact(instances)
}
