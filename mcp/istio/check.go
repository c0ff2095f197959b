package istio

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	networking "istio.io/api/networking/v1alpha3"
)

// Check applies the reader's own rules to o, and ours where the proxies would suffer: istiod acknowledges what it refuses,
// and says so in its log alone. The error lists every offence with the path of its field, in a fixed order; Unwrap gives
// them one by one. Values of labels are not repeated in it, since registrants put all sorts of things there.
//
// The rules of Stock are those of istiod 1.31 (ValidateServiceEntry, ValidateDestinationRule) for the fields that exist
// here, and stricter in two points: an address may have no zone and be no Unix socket. Those of Higress, whose istiod
// does not validate, are what keeps names unique and Envoy working.
func (d Dialect) Check(o Object) error {
	var f findings
	d.checkMetadata(&f, o)
	switch spec := o.Spec.(type) {
	case *networking.ServiceEntry:
		f.kind(o.Kind, ServiceEntryKind)
		d.checkEntry(&f, spec)
	case *networking.DestinationRule:
		f.kind(o.Kind, DestinationRuleKind)
		d.checkRule(&f, spec)
	default:
		f.add("spec", "is a %T, which is not published", o.Spec)
	}
	return f.err()
}

func (d Dialect) checkMetadata(f *findings, o Object) {
	for _, part := range []struct{ path, value string }{
		{"metadata.namespace", o.Namespace}, {"metadata.name", o.Name},
	} {
		if part.value == "" || strings.Contains(part.value, "/") || !utf8.ValidString(part.value) {
			f.add(part.path, "%q must be a text without slashes: istiod reads namespace/name", part.value)
		}
	}
	f.labels("metadata.labels", o.Labels, func(key, value string) string {
		if !d.higress && len(value) > maxLabel {
			return fmt.Sprintf("the value is longer than %d bytes", maxLabel)
		}
		return d.labelError(key, value)
	})
}

func (d Dialect) checkEntry(f *findings, e *networking.ServiceEntry) {
	if len(e.GetHosts()) == 0 {
		f.add("hosts", "at least one host is needed")
	}
	for i, h := range e.GetHosts() {
		path := fmt.Sprintf("hosts[%d]", i)
		d.checkHost(f, path, h)
		if !d.higress && h == "*" {
			f.add(path, "%q would catch all hosts", h)
		}
	}
	ports := d.checkPorts(f, e)
	checkAddresses(f, e)
	if e.GetWorkloadSelector() != nil && len(e.GetEndpoints()) > 0 {
		f.add("workloadSelector", "cannot be set beside endpoints")
	}
	d.checkResolution(f, e)

	weights := uint64(0)
	for i, we := range e.GetEndpoints() {
		if we == nil {
			f.add(fmt.Sprintf("endpoints[%d]", i), "is null")
			continue
		}
		weights += uint64(max(we.Weight, 1))
		d.checkEndpoint(f, i, we, e.Resolution, ports)
	}
	if weights > math.MaxUint32 {
		f.add("endpoints", "the sum %d of the weights is more than %d, which Envoy refuses", weights, uint32(math.MaxUint32))
	}
}

func (d Dialect) checkHost(f *findings, path, host string) {
	if d.higress {
		if host == "" || !utf8.ValidString(host) {
			f.add(path, "%q is empty or not UTF-8", host)
		}
		return
	}
	if err := hostError(host); err != nil {
		f.add(path, "%q is refused by istiod: %v", host, err)
	}
}

// checkPorts checks the service's ports, and returns their names.
func (d Dialect) checkPorts(f *findings, e *networking.ServiceEntry) []string {
	var names []string
	var numbers []uint32
	for i, p := range e.GetPorts() {
		path := fmt.Sprintf("ports[%d]", i)
		if p == nil {
			f.add(path, "is null")
			continue
		}
		f.port(path+".number", p.Number)
		if p.TargetPort != 0 {
			f.port(path+".targetPort", p.TargetPort)
		}
		if slices.Contains(names, p.Name) {
			f.add(path+".name", "%q stands twice", p.Name)
		}
		if slices.Contains(numbers, p.Number) {
			f.add(path+".number", "%d stands twice", p.Number)
		}
		names, numbers = append(names, p.Name), append(numbers, p.Number)
		d.checkPortName(f, path+".name", p.Name)
		switch {
		case d.higress:
			if !isText(p.Protocol) {
				f.add(path+".protocol", "%q is empty or not a text", p.Protocol)
			}
		case p.Protocol != "" && !isProtocol(p.Protocol):
			f.add(path+".protocol", "%q is not known to istiod", p.Protocol)
		case len(e.Hosts) > 1 && e.Resolution != networking.ServiceEntry_NONE && !tellsHosts(p.Protocol):
			f.add(path+".protocol", "several hosts can share HTTP and TLS ports only")
		}
	}
	return names
}

func (d Dialect) checkPortName(f *findings, path, name string) {
	if d.higress && !isText(name) {
		f.add(path, "%q is empty or not a text", name)
	} else if !d.higress && !isDNSLabel(name) {
		f.add(path, "%q is not 1 to %d letters, digits and inner hyphens", name, maxLabel)
	}
}

// isProtocol reports whether istiod knows the protocol, in any case of letters.
func isProtocol(s string) bool {
	switch strings.ToLower(s) {
	case "tcp", "udp", "grpc", "grpc-web", "http", "http_proxy", "http2", "https", "tls", "mongo", "redis", "mysql":
		return true
	}
	return false
}

// tellsHosts reports whether connections of the protocol name the host that they are for.
func tellsHosts(protocol string) bool {
	switch strings.ToLower(protocol) {
	case "grpc", "grpc-web", "http", "http_proxy", "http2", "https", "tls":
		return true
	}
	return false
}

func checkAddresses(f *findings, e *networking.ServiceEntry) {
	for i, a := range e.GetAddresses() {
		path := fmt.Sprintf("addresses[%d]", i)
		if isIP(a) {
			continue
		}
		if _, err := netip.ParsePrefix(a); err != nil {
			f.add(path, "%q is neither an IP address nor a range of them", a)
		} else if e.Resolution != networking.ServiceEntry_NONE && e.Resolution != networking.ServiceEntry_STATIC {
			f.add(path, "ranges go with the resolutions NONE and STATIC only")
		}
	}
}

// checkResolution checks what goes together with the resolution.
func (d Dialect) checkResolution(f *findings, e *networking.ServiceEntry) {
	switch e.GetResolution() {
	case networking.ServiceEntry_STATIC:
	case networking.ServiceEntry_NONE:
		if len(e.GetEndpoints()) > 0 {
			f.add("endpoints", "there can be none with resolution NONE")
		}
	case networking.ServiceEntry_DNS, networking.ServiceEntry_DNS_ROUND_ROBIN:
		if e.Resolution == networking.ServiceEntry_DNS_ROUND_ROBIN && len(e.Endpoints) > 1 {
			f.add("endpoints", "there can be one at most with resolution DNS_ROUND_ROBIN")
		}
		if len(e.Endpoints) > 0 || d.higress {
			break
		}
		for i, h := range e.Hosts { // which are looked up themselves
			if err := fqdnError(h); err != nil {
				f.add(fmt.Sprintf("hosts[%d]", i), "%q cannot be looked up, and there are no endpoints: %v", h, err)
			}
		}
	case networking.ServiceEntry_DYNAMIC_DNS:
		checkDynamic(f, e)
	default:
		f.add("resolution", "%d is unknown", e.Resolution)
	}
}

// checkDynamic checks an entry whose endpoints are looked up by the host of each request.
func checkDynamic(f *findings, e *networking.ServiceEntry) {
	for i, h := range e.Hosts {
		if !strings.HasPrefix(h, "*") {
			f.add(fmt.Sprintf("hosts[%d]", i), "%q must begin with a wildcard with resolution DYNAMIC_DNS", h)
		}
	}
	if len(e.Addresses) > 0 {
		f.add("addresses", "there can be none with resolution DYNAMIC_DNS")
	}
	if len(e.Endpoints) > 0 {
		f.add("endpoints", "there can be none with resolution DYNAMIC_DNS")
	}
	for i, p := range e.Ports {
		switch strings.ToLower(p.GetProtocol()) {
		case "http", "http2", "grpc", "tls":
		default:
			f.add(fmt.Sprintf("ports[%d].protocol", i), "must be HTTP, HTTP2, GRPC or TLS with resolution DYNAMIC_DNS")
		}
	}
}

func (d Dialect) checkEndpoint(f *findings, i int, we *networking.WorkloadEntry,
	resolution networking.ServiceEntry_Resolution, ports []string,
) {
	dns := resolution == networking.ServiceEntry_DNS || resolution == networking.ServiceEntry_DNS_ROUND_ROBIN
	if err := d.addressError(we.Address, dns); err != nil {
		f.add(fmt.Sprintf("endpoints[%d].address", i), "%v", err)
	}
	before := len(f.list)
	for name, port := range we.Ports {
		known := slices.Contains(ports, name)
		if known && port >= 1 && port <= maxPort { // the name was checked as the service port's
			continue
		}
		path := fmt.Sprintf("endpoints[%d].ports[%q]", i, name)
		f.port(path, port)
		if !known {
			f.add(path, "no port of the service has this name")
			d.checkPortName(f, path, name)
		}
	}
	f.sort(len(f.list) - before)
	if !d.labelsFine(we.Labels) {
		f.labels(fmt.Sprintf("endpoints[%d].labels", i), we.Labels, d.labelError)
	}
	for _, text := range []struct{ field, value string }{
		{"locality", we.Locality}, {"network", we.Network}, {"serviceAccount", we.ServiceAccount},
	} {
		if !utf8.ValidString(text.value) {
			f.add(fmt.Sprintf("endpoints[%d].%s", i, text.field), "is not UTF-8")
		}
	}
}

// checkRule checks the parts of a DestinationRule that Render writes.
func (d Dialect) checkRule(f *findings, r *networking.DestinationRule) {
	d.checkHost(f, "host", r.GetHost())
	policy := r.GetTrafficPolicy()
	if policy == nil {
		return
	}
	if policy.Tls == nil && len(policy.PortLevelSettings) == 0 && policy.ConnectionPool == nil && policy.LoadBalancer == nil &&
		policy.OutlierDetection == nil && policy.Tunnel == nil && policy.ProxyProtocol == nil && policy.RetryBudget == nil {
		f.add("trafficPolicy", "is empty")
	}
	checkTLS(f, "trafficPolicy.tls", policy.Tls)
	for i, p := range policy.PortLevelSettings {
		path := fmt.Sprintf("trafficPolicy.portLevelSettings[%d]", i)
		switch {
		case p == nil:
			f.add(path, "is null")
			continue
		case p.Port == nil:
			f.add(path+".port", "is missing")
		default:
			f.port(path+".port.number", p.Port.Number)
		}
		if p.Tls == nil && p.ConnectionPool == nil && p.LoadBalancer == nil && p.OutlierDetection == nil {
			f.add(path, "says nothing beside the port")
		}
		checkTLS(f, path+".tls", p.Tls)
	}
}

func checkTLS(f *findings, path string, t *networking.ClientTLSSettings) {
	if t == nil {
		return
	}
	if _, ok := networking.ClientTLSSettings_TLSmode_name[int32(t.Mode)]; !ok {
		f.add(path+".mode", "%d is unknown", t.Mode)
	}
	if t.Sni != "" && !isServerName(t.Sni) {
		f.add(path+".sni", "%q is not a text of at most %d bytes", t.Sni, maxServerName)
	}
	for i, san := range t.SubjectAltNames {
		if !utf8.ValidString(san) {
			f.add(fmt.Sprintf("%s.subjectAltNames[%d]", path, i), "%q is not UTF-8", san)
		}
	}
	simple := t.Mode == networking.ClientTLSSettings_SIMPLE
	mutual := t.Mode == networking.ClientTLSSettings_MUTUAL
	if t.GetInsecureSkipVerify().GetValue() && (simple || mutual) &&
		(t.CaCertificates != "" || len(t.SubjectAltNames) > 0 || simple && t.CredentialName != "") {
		f.add(path+".insecureSkipVerify", "cannot be set beside what to verify")
	}
	if t.CredentialName != "" {
		if (simple || mutual) && t.ClientCertificate+t.PrivateKey+t.CaCertificates+t.CaCrl != "" {
			f.add(path+".credentialName", "cannot be set beside certificates")
		}
	} else if mutual && (t.ClientCertificate == "" || t.PrivateKey == "") {
		f.add(path, "mode MUTUAL needs a client certificate and its key")
	}
}

// labelsFine reports whether pairs offend in nothing, without the cost of a path.
func (d Dialect) labelsFine(pairs map[string]string) bool {
	for k, v := range pairs {
		if d.labelError(k, v) != "" {
			return false
		}
	}
	return true
}

// labelError tells why the reader cannot take a label; "" if it can.
func (d Dialect) labelError(key, value string) string {
	if d.higress {
		if !utf8.ValidString(key) || !utf8.ValidString(value) {
			return "is not UTF-8"
		}
		return ""
	}
	if err := labelKeyError(key); err != nil {
		return "istiod refuses the key: " + err.Error()
	}
	if !isLabelValue(value) {
		return "istiod refuses the value: it is not made of letters, digits and inner hyphens, underscores and dots"
	}
	return ""
}

// findings collects the offences of one object.
type findings struct{ list []error }

func (f *findings) add(path, format string, args ...any) {
	f.list = append(f.list, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...))) //nolint:err113 // a text for people
}

func (f *findings) kind(got, want string) {
	if got != want {
		f.add("kind", "is %q, but the spec is that of %s", got, want)
	}
}

func (f *findings) port(path string, n uint32) {
	if n < 1 || n > maxPort {
		f.add(path, "%d is not a number from 1 to %d", n, maxPort)
	}
}

func (f *findings) labels(path string, pairs map[string]string, offence func(key, value string) string) {
	before := len(f.list)
	for k, v := range pairs {
		if text := offence(k, v); text != "" {
			f.add(fmt.Sprintf("%s[%q]", path, k), "%s", text)
		}
	}
	f.sort(len(f.list) - before)
}

// sort orders the last n findings, which come from a map.
func (f *findings) sort(n int) {
	slices.SortFunc(f.list[len(f.list)-n:], func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
}

func (f *findings) err() error {
	if len(f.list) == 0 {
		return nil
	}
	return offences(f.list)
}

// offences is the error of Check.
type offences []error

// maxListed bounds the offences in the text of one error: a service may have 100,000 endpoints.
const maxListed = 20

func (o offences) Error() string {
	var b strings.Builder
	for i, err := range o {
		if i == maxListed {
			fmt.Fprintf(&b, "; and %d more", len(o)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(err.Error())
	}
	return b.String()
}

// Unwrap returns all offences.
func (o offences) Unwrap() []error { return o }
