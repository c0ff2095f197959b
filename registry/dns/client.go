package dns

// This file alone knows the DNS library: how to ask servers, and what a message says.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/regbridge/regbridge/registry"
)

const (
	// serverBudget is how many questions all entries together ask one server at once.
	serverBudget = 16
	// ednsSize is the size of UDP answers that we ask for: what crosses any network in one piece.
	ednsSize = 1232
	// maxAliases bounds how often the end of a CNAME chain is asked for separately.
	maxAliases = 8
	// maxTimeout and maxAttempts bound what resolv.conf says.
	maxTimeout  = 5 * time.Second
	maxAttempts = 3
)

type recordType uint16

const (
	typeA    = recordType(mdns.TypeA)
	typeAAAA = recordType(mdns.TypeAAAA)
	typeSRV  = recordType(mdns.TypeSRV)
)

func (t recordType) String() string { return mdns.TypeToString[uint16(t)] }

// config is whom to ask and how.
type config struct {
	servers  []string // host:port, the preferred first
	timeout  time.Duration
	attempts int
	search   mdns.ClientConfig
}

// givenServers is the configuration for servers of the entry: names are looked up there as they are, without the search
// list of this machine, which such servers need not know.
func givenServers(servers []registry.Server) config {
	c := config{timeout: 2 * time.Second, attempts: 2}
	for _, s := range servers {
		c.servers = append(c.servers, s.String())
	}
	return c
}

// readResolvConf reads a file as resolv.conf(5) describes it.
func readResolvConf(path string) (config, error) {
	file, err := mdns.ClientConfigFromFile(path)
	if err != nil {
		return config{}, err
	}
	c := config{
		timeout:  min(time.Duration(file.Timeout)*time.Second, maxTimeout),
		attempts: min(file.Attempts, maxAttempts),
		search:   *file,
	}
	// The root stands for the name itself, which is tried anyway.
	c.search.Search = slices.DeleteFunc(file.Search, func(s string) bool { return s == "." })
	for _, s := range file.Servers {
		if _, err := netip.ParseAddr(s); err == nil { // others are ignored, as the C library does
			c.servers = append(c.servers, net.JoinHostPort(s, file.Port))
		}
	}
	if len(c.servers) == 0 {
		c.servers = []string{net.JoinHostPort("127.0.0.1", file.Port)}
	}
	return c, nil
}

// names are the full names to try for a name, in order.
func (c config) names(name string) []string {
	return slices.DeleteFunc(c.search.NameList(name), func(full string) bool {
		_, ok := mdns.IsDomainName(full)
		return !ok || len(full) > 254 // with a search domain it may be longer than a name can be
	})
}

// answer is what the servers say with authority. Without addresses and targets it says that there are none.
type answer struct {
	addresses []netip.Addr
	targets   []target
	extra     map[string]answer // addresses of targets, by name
	ttl       time.Duration     // for how long this holds; forever if unknown
}

// target is one SRV record. Its name is a full name in lower case.
type target struct {
	name                   string
	port, priority, weight uint16
}

// client asks DNS servers.
type client struct {
	budgets *registry.Budgets
	observe func(operation string, took time.Duration, err error)
}

// lookup finds the records of a full name, and tells which servers answered. An error says that nobody answered as one
// who knows: it is never the same as an answer without records.
func (c client) lookup(ctx context.Context, conf config, full string, t recordType) (answer, []string, error) {
	var servers []string
	ttl := forever
	name := full
	for range maxAliases {
		a, alias, server, err := c.askServers(ctx, conf, mdns.Question{Name: name, Qtype: uint16(t), Qclass: mdns.ClassINET})
		if err != nil {
			return answer{}, servers, fmt.Errorf("look up %s of %s: %w", t, full, err)
		}
		servers = append(servers, server)
		ttl = min(ttl, a.ttl)
		if alias == "" {
			a.ttl = ttl
			return a, servers, nil
		}
		name = alias
	}
	return answer{}, servers, fmt.Errorf("look up %s of %s: more than %d aliases to follow", t, full, maxAliases)
}

// askServers asks one server after the other, several times, until one answers.
func (c client) askServers(ctx context.Context, conf config, q mdns.Question) (a answer, alias, server string, err error) {
	failures := make([]string, len(conf.servers)) // the last of each server
	for n := 0; n < conf.attempts && ctx.Err() == nil; n++ {
		for i, server := range conf.servers {
			a, alias, err := c.askServer(ctx, conf.timeout, server, q)
			if err == nil {
				return a, alias, server, nil
			}
			if ctx.Err() == nil || failures[i] == "" {
				failures[i] = server + ": " + err.Error()
			}
			if ctx.Err() != nil {
				break
			}
		}
	}
	failures = slices.DeleteFunc(failures, func(f string) bool { return f == "" })
	return answer{}, "", "", errors.New(strings.Join(failures, "; "))
}

// askServer asks one server once.
func (c client) askServer(
	ctx context.Context, timeout time.Duration, server string, q mdns.Question,
) (a answer, alias string, err error) {
	budget := c.budgets.Of(server, serverBudget)
	if err := budget.Acquire(ctx, 1); err != nil {
		return answer{}, "", err
	}
	defer budget.Release(1)
	begun := time.Now()
	actx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	m, err := exchange(actx, server, q)
	if err == nil {
		a, alias, err = read(m, q)
	} else if actx.Err() != nil {
		err = fmt.Errorf("no answer within %v", timeout)
	} else if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err // without our own port, which makes each error another one
	}
	if ctx.Err() == nil {
		c.observe(recordType(q.Qtype).String(), time.Since(begun), err)
	}
	return a, alias, err
}

// exchange sends a question and returns the reply: by TCP where UDP is too small, and without EDNS to a server that does
// not know that.
func exchange(ctx context.Context, server string, q mdns.Question) (*mdns.Msg, error) {
	query := newQuery(q).SetEdns0(ednsSize, false)
	m, err := send(ctx, "udp", server, query)
	plain := []int{mdns.RcodeFormatError, mdns.RcodeNotImplemented, mdns.RcodeBadVers}
	if err == nil && slices.Contains(plain, m.Rcode) {
		query = newQuery(q)
		m, err = send(ctx, "udp", server, query)
	}
	if err == nil && m.Truncated {
		m, err = send(ctx, "tcp", server, query)
	}
	return m, err
}

func newQuery(q mdns.Question) *mdns.Msg {
	m := new(mdns.Msg)
	m.Id = mdns.Id()
	m.RecursionDesired = true
	m.Question = []mdns.Question{q}
	return m
}

// send sends one query and waits for its reply until ctx ends.
func send(ctx context.Context, network, server string, query *mdns.Msg) (*mdns.Msg, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = conn.SetDeadline(time.Unix(1, 0)) // fails only on a closed connection
	})
	defer func() {
		if !stop() {
			<-interrupted
		}
		_ = conn.Close() // nothing is left to be sent
	}()
	// Servers may send more than they were asked to: a cut datagram would be a malformed one.
	wire := &mdns.Conn{Conn: conn, UDPSize: 4 * ednsSize}
	if err := wire.WriteMsg(query); err != nil {
		return nil, err
	}
	for {
		b, err := wire.ReadMsgHeader(nil)
		if err != nil && (network != "udp" || !errors.Is(err, mdns.ErrShortRead)) {
			return nil, err
		}
		m, ok, err := parseReply(query, b)
		if ok {
			return m, err
		}
		if network != "udp" {
			return nil, errors.New("the reply is to another question")
		}
	}
}

// parseReply reads a message. ok is false for one that is not the reply to query: over UDP anybody can send those. A reply
// of which only a part can be read is an error, but for one that says so: that one has no content.
func parseReply(query *mdns.Msg, b []byte) (m *mdns.Msg, ok bool, err error) {
	m = new(mdns.Msg)
	err = m.Unpack(b)
	if m.Id != query.Id || !m.Response || m.Opcode != query.Opcode {
		return nil, false, nil
	}
	switch failure := m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError; {
	case len(m.Question) == 0 && failure && err == nil: // a refusal need not repeat the question
	case len(m.Question) != 1 || !sameQuestion(m.Question[0], query.Question[0]):
		return nil, false, nil
	}
	if m.Truncated {
		m.Answer, m.Ns, m.Extra = nil, nil, nil
		return m, true, nil
	}
	if err != nil {
		return nil, true, fmt.Errorf("read the reply: %w", err)
	}
	// The library takes a message that ends between two records for a shorter one.
	for i, section := range [][]mdns.RR{m.Answer, m.Ns, m.Extra} {
		if announced := binary.BigEndian.Uint16(b[6+2*i:]); len(section) != int(announced) {
			return nil, true, fmt.Errorf("read the reply: it ends after %d of %d records of a section", len(section), announced)
		}
	}
	return m, true, nil
}

func sameQuestion(a, b mdns.Question) bool {
	return a.Qtype == b.Qtype && a.Qclass == b.Qclass && strings.EqualFold(a.Name, b.Name)
}

// read tells what a reply says of the question: an answer, or with alias the further name to ask for, since the server
// followed the name's CNAMEs only up to there.
func read(m *mdns.Msg, q mdns.Question) (a answer, alias string, err error) {
	if m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError {
		text, ok := mdns.RcodeToString[m.Rcode]
		if !ok {
			text = fmt.Sprintf("code %d", m.Rcode)
		}
		return answer{}, "", fmt.Errorf("the server answered %s", text)
	}
	if m.Truncated {
		return answer{}, "", errors.New("the answer is cut off, over TCP too")
	}
	owner := mdns.CanonicalName(q.Name)
	a.ttl = forever
	for hops := 0; ; hops++ {
		if hops > len(m.Answer) {
			return answer{}, "", fmt.Errorf("the CNAMEs of %s run in a circle", q.Name)
		}
		data, next, err := recordsOf(m.Answer, owner, q.Qtype)
		if err != nil {
			return answer{}, "", err
		}
		a.ttl = min(a.ttl, data.ttl)
		if len(data.addresses) > 0 || len(data.targets) > 0 {
			a.addresses, a.targets = data.addresses, data.targets
			if a.targets != nil {
				a.extra, err = extraAddresses(m.Extra)
			}
			return a, "", err
		}
		if next == "" {
			break
		}
		owner = next
	}
	soa, referral := absence(m.Ns)
	exists := m.Rcode == mdns.RcodeSuccess // that it does not may come with the zone's name servers
	switch {
	case soa != nil:
		a.ttl = min(a.ttl, lifetime(soa.Hdr.Ttl), lifetime(soa.Minttl))
	case exists && owner != mdns.CanonicalName(q.Name):
		return a, owner, nil
	case exists && referral || !m.Authoritative && !m.RecursionAvailable:
		return answer{}, "", errors.New("the server knows nothing of the name's zone")
	}
	return a, "", nil
}

// recordsOf collects the records of one owner: those of the type asked for, else the target of its CNAME.
func recordsOf(rrs []mdns.RR, owner string, qtype uint16) (a answer, cname string, err error) {
	a.ttl = forever
	aliasTTL := forever
	for _, rr := range rrs {
		h := rr.Header()
		if h.Class != mdns.ClassINET || mdns.CanonicalName(h.Name) != owner || h.Rrtype != qtype && h.Rrtype != mdns.TypeCNAME {
			continue
		}
		switch rr := rr.(type) {
		case *mdns.A, *mdns.AAAA:
			addr, ok := address(rr)
			if !ok {
				return answer{}, "", fmt.Errorf("a record of %s has no valid address", owner)
			}
			a.addresses = append(a.addresses, addr)
		case *mdns.SRV:
			if rr.Target == "" {
				return answer{}, "", fmt.Errorf("an SRV record of %s has no target", owner)
			}
			a.targets = append(a.targets, target{
				name: mdns.CanonicalName(rr.Target), port: rr.Port, priority: rr.Priority, weight: rr.Weight,
			})
		case *mdns.CNAME:
			if rr.Target == "" {
				return answer{}, "", fmt.Errorf("the CNAME record of %s has no target", owner)
			}
			cname, aliasTTL = mdns.CanonicalName(rr.Target), lifetime(h.Ttl)
			continue
		default:
			return answer{}, "", fmt.Errorf("a record of %s has no content", owner)
		}
		a.ttl = min(a.ttl, lifetime(h.Ttl))
	}
	if len(a.addresses) == 0 && len(a.targets) == 0 {
		a.ttl = aliasTTL
	}
	return a, cname, nil
}

// extraAddresses collects the addresses that came along with SRV records.
func extraAddresses(rrs []mdns.RR) (map[string]answer, error) {
	out := map[string]answer{}
	for _, rr := range rrs {
		h := rr.Header()
		if h.Class != mdns.ClassINET || h.Rrtype != mdns.TypeA && h.Rrtype != mdns.TypeAAAA {
			continue
		}
		addr, ok := address(rr)
		if !ok {
			return nil, fmt.Errorf("a record of %s has no valid address", h.Name)
		}
		owner := mdns.CanonicalName(h.Name)
		a, ok := out[owner]
		if !ok {
			a.ttl = forever
		}
		a.addresses = append(a.addresses, addr)
		a.ttl = min(a.ttl, lifetime(h.Ttl))
		out[owner] = a
	}
	return out, nil
}

// absence reads the authority section of an answer without data: the SOA record, which tells for how long that holds, or
// whether the server only refers to others.
func absence(rrs []mdns.RR) (soa *mdns.SOA, referral bool) {
	for _, rr := range rrs {
		switch rr := rr.(type) {
		case *mdns.SOA:
			soa = rr
		case *mdns.NS:
			referral = true
		}
	}
	return soa, referral && soa == nil
}

// address returns the address of an A or AAAA record. A record may have no content.
func address(rr mdns.RR) (addr netip.Addr, ok bool) {
	switch rr := rr.(type) {
	case *mdns.A:
		return netip.AddrFromSlice(rr.A.To4())
	case *mdns.AAAA:
		return netip.AddrFromSlice(rr.AAAA)
	}
	return netip.Addr{}, false
}

// lifetime converts a TTL; one with the highest bit set counts as 0 (RFC 2181, 8).
func lifetime(ttl uint32) time.Duration {
	if ttl > 1<<31-1 {
		return 0
	}
	return time.Duration(ttl) * time.Second
}
