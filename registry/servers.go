package registry

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// A Server is one server address of an entry's comma list.
type Server struct {
	// Host is a host name or an IP address without brackets.
	Host string
	// Port is 0 where the list names none and no default was given.
	Port uint32
}

// String gives host:port, with brackets around IPv6.
func (s Server) String() string {
	port := strconv.FormatUint(uint64(s.Port), 10)
	if strings.Contains(s.Host, ":") {
		return "[" + s.Host + "]:" + port
	}
	return s.Host + ":" + port
}

// ParseServers reads a comma list of host, host:port, v6 or [v6]:port with blanks around the items. Items without a port
// get defaultPort. The good items are returned also where others are bad; the error joins one FieldError per bad item,
// whose path is path with the item's index in the list.
func ParseServers(path, list string, defaultPort uint32) ([]Server, error) {
	var servers []Server
	var bad []error
	for i, item := range strings.Split(list, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		s, err := parseServer(item, defaultPort)
		if err != nil {
			bad = append(bad, &FieldError{Path: fmt.Sprintf("%s[%d]", path, i), Err: err, Partial: true})
			continue
		}
		servers = append(servers, s)
	}
	return servers, errors.Join(bad...)
}

func parseServer(item string, defaultPort uint32) (Server, error) {
	if strings.Contains(item, "@") { // what stands before it may be a password, so the item is not repeated
		return Server{}, errors.New("holds a user name or password: write host:port alone, and name a Secret in authSecretName")
	}
	if strings.Contains(item, "://") {
		return Server{}, fmt.Errorf("%q is a URL: write host:port alone, and use tls for TLS", item)
	}
	if addr, err := netip.ParseAddr(item); err == nil { // a bare v4 or v6
		return Server{Host: addr.String(), Port: defaultPort}, nil
	}
	host, port := item, ""
	switch i := strings.LastIndexByte(item, ':'); {
	case strings.HasPrefix(item, "["):
		end := strings.IndexByte(item, ']')
		if end < 0 {
			return Server{}, fmt.Errorf("%q has no closing bracket: write [v6]:port", item)
		}
		addr, err := netip.ParseAddr(item[1:end])
		if err != nil || !addr.Is6() {
			return Server{}, fmt.Errorf("%q is no IPv6 address in brackets: write [v6]:port", item)
		}
		host, port = addr.String(), item[end+1:]
		if port != "" && !strings.HasPrefix(port, ":") {
			return Server{}, fmt.Errorf("%q: write [v6]:port", item)
		}
		port = strings.TrimPrefix(port, ":")
		if item[end+1:] == ":" {
			return Server{}, fmt.Errorf("%q has no port after the colon", item)
		}
	case i >= 0:
		host, port = item[:i], item[i+1:]
		if port == "" {
			return Server{}, fmt.Errorf("%q has no port after the colon", item)
		}
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		host = addr.String()
	} else if !ValidHostname(host) {
		return Server{}, fmt.Errorf("%q is neither an IP address nor a host name", host)
	}
	if port == "" {
		return Server{Host: host, Port: defaultPort}, nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return Server{}, fmt.Errorf("port %q of %q is not a number from 1 to 65535", port, item)
	}
	return Server{Host: host, Port: uint32(n)}, nil
}

// ValidHostname reports whether s can be looked up: labels of letters, digits, hyphens and underscores, 1 to 63
// characters each, at most 253 in all, not beginning or ending with a hyphen, the last one not all digits (RFC 1123,
// with the underscores that service names have). One trailing dot is allowed.
func ValidHostname(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	parts := strings.Split(s, ".")
	for _, p := range parts {
		if p == "" || len(p) > 63 || p[0] == '-' || p[len(p)-1] == '-' {
			return false
		}
		for _, c := range []byte(p) {
			if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	_, err := strconv.ParseUint(parts[len(parts)-1], 10, 64)
	return err != nil
}
