package zookeeper

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

// maxName bounds the name of a node that is decoded. Real ones have some hundred bytes.
const maxName = 64 << 10

// defaultWeight is the weight of a Dubbo provider that states none.
const defaultWeight = 100

// serviceKey names a Dubbo service: one interface may be provided in several versions and groups, all in one folder.
type serviceKey struct {
	iface   string
	version string // empty where it is 0.0.0, which is the same
	group   string
}

func newServiceKey(iface, version, group string) serviceKey {
	if version == "0.0.0" {
		version = ""
	}
	return serviceKey{iface, version, group}
}

// id is Higress's name of the service.
func (k serviceKey) id() string {
	return "providers:" + k.iface + ":" + cmp.Or(k.version, "0.0.0") + ":" + k.group
}

// service makes the service of instances; without any it is one that nobody provides any more.
func (k serviceKey) service(instances []registry.Instance) registry.Service {
	return registry.Service{ID: k.id(), Host: k.id() + ".zookeeper", Instances: instances}
}

// internal reports whether the service is one of those that each Dubbo application has for Dubbo itself.
func (k serviceKey) internal() bool { return strings.HasPrefix(k.iface, "org.apache.dubbo.metadata.") }

// provider is a child of /dubbo/<interface>/providers.
type provider struct {
	key         serviceKey
	application string // empty if it names none
	// timestamp is when the provider exported the service, in milliseconds by its own clock; 0 if it does not say. It stays
	// the same when a configurator makes the provider register again, and becomes greater when it restarts.
	timestamp int64
	instance  registry.Instance
}

// decodeProvider reads the name of a provider's node: a URL such as
// dubbo://10.0.0.7:20880/demo.api.Greeter?group=g1&version=1.0.0&weight=200, percent-encoded as a whole and once. iface is
// the folder's name, decoded; it goes before what the URL says. Names that announce no provider are errors too: other
// categories and Dubbo's markers, such as empty://, which stands for "no provider".
func decodeProvider(iface, node string) (provider, error) {
	u, err := parseURL(node)
	if err != nil {
		return provider{}, fmt.Errorf("provider of %s: %w", iface, err)
	}
	if err := u.checkProvider(); err != nil {
		return provider{}, fmt.Errorf("provider %s of %s: %w", u, iface, err)
	}
	metadata := u.parameters
	if metadata["protocol"] == "" {
		metadata["protocol"] = u.scheme // as Higress labels it
	}
	p := provider{
		key:         newServiceKey(iface, u.parameters["version"], u.parameters["group"]),
		application: u.parameters["application"],
		instance: registry.Instance{
			Address: u.host, Port: u.port, Protocol: u.scheme, Weight: weightOf(u.parameters), Metadata: labels.FromMap(metadata),
		},
	}
	p.timestamp, _ = strconv.ParseInt(u.parameters["timestamp"], 10, 64) // 0 where it is none
	p.instance.Disabled, p.instance.Reason = disabledIn(u.parameters)
	return p, nil
}

// weightOf gives the weight in relation to Dubbo's default. A text that is no weight counts as none: it must not cost the
// instance its traffic.
func weightOf(parameters map[string]string) float64 {
	// Dubbo 2.6 and before mark what comes from a provider's defaults.
	w, err := strconv.ParseUint(cmp.Or(parameters["weight"], parameters["default.weight"]), 10, 31)
	if err != nil {
		return 1
	}
	return float64(w) / defaultWeight
}

// disabledIn tells whether a consumer would leave the provider out, and why. The parameter disabled goes before enabled.
func disabledIn(parameters map[string]string) (disabled bool, reason string) {
	if d := parameters["disabled"]; d != "" {
		if strings.EqualFold(d, "true") {
			return true, "is disabled by its parameter disabled=true"
		}
		return false, ""
	}
	if e := parameters["enabled"]; e != "" && !strings.EqualFold(e, "true") {
		return true, "is disabled by its parameter enabled=" + short(e)
	}
	return false, ""
}

// dubboURL is a URL in Dubbo's form.
type dubboURL struct {
	scheme     string // lower case
	host       string // without brackets and zone; may be empty
	port       uint32 // 0 if there is none
	rawPort    string
	parameters map[string]string
}

// parseURL decodes a node's name once, as Dubbo's URL.decode does (a plus in it is a blank, %2B is a plus), and takes it
// apart as Dubbo's URL.valueOf does: values are not encoded a second time. It leaves out user and password, and the
// parameter token.
func parseURL(node string) (dubboURL, error) {
	if len(node) > maxName {
		return dubboURL{}, fmt.Errorf("the node's name has %d bytes: delete the node", len(node))
	}
	decoded, err := url.QueryUnescape(node)
	if err != nil {
		return dubboURL{}, fmt.Errorf("the node's name is not percent-encoded: %w", err)
	}
	if !utf8.ValidString(decoded) || strings.Contains(decoded, "\x00") {
		return dubboURL{}, errors.New("the node's name holds bytes that are no text")
	}
	scheme, rest, ok := strings.Cut(decoded, "://")
	if !ok || scheme == "" || strings.ContainsFunc(scheme, notInScheme) {
		return dubboURL{}, errors.New("the node's name is no URL, such as dubbo://10.0.0.7:20880/com.example.Api")
	}
	u := dubboURL{scheme: strings.ToLower(scheme), parameters: map[string]string{}}
	rest, query, _ := strings.Cut(rest, "?")
	rest, _, _ = strings.Cut(rest, "/")
	u.host, u.rawPort = splitAuthority(rest[strings.LastIndexByte(rest, '@')+1:])
	u.port = portOf(u.rawPort)
	for part := range strings.SplitSeq(query, "&") {
		if k, v, _ := strings.Cut(part, "="); k != "" && k != tokenKey {
			u.parameters[k] = v
		}
	}
	return u, nil
}

// tokenKey is the parameter by which a provider knows that its caller was told of it by the registry: a secret.
const tokenKey = "token"

// notInScheme tells the letters that no name of a protocol has.
func notInScheme(r rune) bool {
	return r > unicode.MaxASCII || !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("+-._", r)
}

// splitAuthority splits host and port. Dubbo writes IPv6 addresses with and without brackets: what stands behind the last
// colon is the port, unless it stands in brackets.
func splitAuthority(s string) (host, port string) {
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, ']') {
		s, port = s[:i], s[i+1:]
	}
	return address(s), port
}

// address gives the form in which facts are stated: no brackets, no zone.
func address(s string) string {
	trimmed := strings.Trim(s, "[] \t\r\n")
	if addr, err := netip.ParseAddr(trimmed); err == nil {
		return addr.WithZone("").String()
	}
	return trimmed
}

// checkAddress tells what is wrong with an address that nobody can be reached at.
func checkAddress(s string) error {
	switch addr, err := netip.ParseAddr(s); {
	case err == nil && addr.IsUnspecified():
		return errors.New("the address is that of all interfaces: configure the address under which the provider is reached")
	case err == nil || registry.ValidHostname(s):
		return nil
	default:
		return fmt.Errorf("%q is neither an IP address nor a host name", short(s))
	}
}

// String gives what errors say of the URL. Its parameters are not part of it: one of them may be a secret.
func (u dubboURL) String() string {
	return short(u.scheme) + "://" + short(net.JoinHostPort(u.host, u.rawPort))
}

// short gives what a message repeats of a registry's text: a bounded part, in one line.
func short(s string) string {
	if len(s) > 100 {
		s = strings.ToValidUTF8(s[:100], "") + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// checkProvider tells why the URL is not that of a provider.
func (u dubboURL) checkProvider() error {
	switch u.scheme {
	case "empty":
		return errors.New("stands for no provider at all")
	case "consumer", "override", "absent", "route", "condition", "script", "tag", "admin":
		return errors.New("announces no provider: the node is in the wrong folder")
	}
	if c := u.parameters["category"]; c != "" && c != "providers" {
		return fmt.Errorf("announces no provider but one of the %s: the node is in the wrong folder", short(c))
	}
	if u.parameters["side"] == "consumer" {
		return errors.New("announces no provider but a consumer: the node is in the wrong folder")
	}
	if err := checkAddress(u.host); err != nil {
		return err
	}
	if u.port == 0 {
		return errors.New("has no port from 1 to 65535")
	}
	return nil
}

// portOf reads a port; 0 means that there is none.
func portOf(s string) uint32 {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 16)
	if err != nil {
		return 0
	}
	return uint32(n)
}

// shortPath gives what a message repeats of a path.
func shortPath(path string) string {
	if len(path) > 300 {
		path = strings.ToValidUTF8(path[:300], "") + "..."
	}
	return path
}
