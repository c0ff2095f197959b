package dns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	mdns "github.com/miekg/dns"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

func TestMain(m *testing.M) { registrytest.Main(m) }

const soon = 15 * time.Second

func newEnv() registry.Env {
	return registry.Env{Budgets: &registry.Budgets{}, Observe: func(string, time.Duration, error) {}}
}

// start runs the registry until the end of the test.
func start(t *testing.T, reg registry.Registry) *registrytest.Recorder {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	rec := registrytest.NewRecorder(ctx)
	done := make(chan error)
	go func() { done <- reg.Run(ctx, rec) }()
	t.Cleanup(func() {
		begun := time.Now()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if took := time.Since(begun); took > time.Second {
			t.Errorf("Run took %v to return once its context had ended", took)
		}
		rec.Returned()
		for _, v := range rec.Violations() {
			t.Errorf("against the contract: %s", v)
		}
	})
	return rec
}

// resolve runs a resolver of the names with the servers.
func resolve(t *testing.T, domain string, servers ...*fake) *registrytest.Recorder {
	t.Helper()
	return start(t, newResolver(t, domain, servers...))
}

func newResolver(t *testing.T, domain string, servers ...*fake) *resolver {
	t.Helper()
	e := registry.Entry{Name: "api", Port: 80, Domain: domain, DNSMode: "resolve"}
	for _, f := range servers {
		e.DNSServers = append(e.DNSServers, f.addr)
	}
	reg, err := New(e, newEnv())
	if err != nil {
		t.Fatal(err)
	}
	r := reg.(*resolver)
	r.interval = 100 * time.Millisecond
	return r.impatient()
}

// impatient makes the resolver wait for servers, which are on this machine, only shortly.
func (r *resolver) impatient() *resolver {
	given := r.config
	r.config = func() (config, error) {
		c, err := given()
		c.timeout = 300 * time.Millisecond
		return c, err
	}
	return r
}

// newImpatient is New for the conformance suite, which looks for goroutines by the constructor's package.
func newImpatient(e registry.Entry, env registry.Env) (registry.Registry, error) {
	reg, err := New(e, env)
	if r, ok := reg.(*resolver); ok {
		r.impatient()
	}
	return reg, err
}

// listing waits for the first listing, which names one service, and returns that.
func listing(t *testing.T, rec *registrytest.Recorder) registry.Service {
	t.Helper()
	s, ok := rec.Wait(soon, func(s registrytest.State) bool { return s.Loaded && s.Gap == nil })
	if !ok || len(s.Services) != 1 {
		t.Fatalf("%d services, loaded %v, gap %v; want one service", len(s.Services), s.Loaded, s.Gap)
	}
	return s.Services["api"]
}

// becomes waits until the service has these instances.
func becomes(t *testing.T, rec *registrytest.Recorder, want ...registry.Instance) {
	t.Helper()
	for n := range want {
		want[n].Metadata = labels.Set{}
	}
	var last registrytest.State
	if _, ok := rec.Wait(soon, func(s registrytest.State) bool {
		last = s
		return s.Loaded && s.Gap == nil && slices.Equal(want, s.Services["api"].Instances)
	}); !ok {
		t.Fatalf("loaded %v, gap %v; instances (-want +got):\n%s", last.Loaded, last.Gap,
			cmp.Diff(want, last.Services["api"].Instances, sameLabels))
	}
}

// fails waits for a failure, and checks that it says this.
func fails(t *testing.T, rec *registrytest.Recorder, say string) {
	t.Helper()
	s, ok := rec.Wait(soon, func(s registrytest.State) bool { return s.Gap != nil })
	if !ok {
		t.Fatalf("no failure; the service is %+v", s.Services["api"])
	}
	if !strings.Contains(s.Gap.Error(), say) {
		t.Errorf("failure %q does not say %q", s.Gap, say)
	}
}

// neverSynced checks that nothing was listed.
func neverSynced(t *testing.T, rec *registrytest.Recorder) {
	t.Helper()
	if s := rec.State(); s.Synced || len(s.Services) > 0 {
		t.Errorf("a failure was taken for an answer: %+v", s.Services)
	}
}

func out(address string, port uint32, reason string) registry.Instance {
	return registry.Instance{Address: address, Port: port, Weight: 1, Disabled: true, Reason: reason}
}

func weighing(i registry.Instance, weight float64) registry.Instance {
	i.Weight = weight
	return i
}

func TestAnswers(t *testing.T) {
	many, instances := []string(nil), []registry.Instance(nil)
	for n := range 120 {
		many = append(many, fmt.Sprintf("many.test. 60 IN A 192.0.2.%d", 100+n))
		instances = append(instances, at(fmt.Sprintf("192.0.2.%d", 100+n), 0))
	}
	for name, tc := range map[string]struct {
		domain  string
		records []string
		noExtra bool
		want    []registry.Instance
		tcp     bool
	}{
		"v4": {domain: "a.test", records: []string{"a.test. 60 IN A 192.0.2.2", "a.test. 60 IN A 192.0.2.1"},
			want: []registry.Instance{at("192.0.2.1", 0), at("192.0.2.2", 0)}},
		"v6": {domain: "a.test", records: []string{"a.test. 60 IN AAAA 2001:db8::1"},
			want: []registry.Instance{at("2001:db8::1", 0)}},
		"both": {domain: "a.test", records: []string{"a.test. 60 IN AAAA 2001:db8::1", "a.test. 60 IN A 192.0.2.1"},
			want: []registry.Instance{at("192.0.2.1", 0), at("2001:db8::1", 0)}},
		"another case": {domain: "A.Test", records: []string{"a.tesT. 60 IN A 192.0.2.1"},
			want: []registry.Instance{at("192.0.2.1", 0)}},
		"several names, with ports, addresses and what they share": {domain: "a.test:81,b.test,192.0.2.9:82,c.test:81",
			records: []string{"a.test. 60 IN A 192.0.2.1", "b.test. 60 IN A 192.0.2.1", "c.test. 60 IN A 192.0.2.1"},
			want:    []registry.Instance{at("192.0.2.1", 0), at("192.0.2.1", 81), at("192.0.2.9", 82)}},
		"one of the names has nothing": {domain: "a.test,none.test", records: []string{"a.test. 60 IN A 192.0.2.1"},
			want: []registry.Instance{at("192.0.2.1", 0)}},
		"no such name":    {domain: "none.test", records: []string{"a.test. 60 IN A 192.0.2.1"}},
		"no such records": {domain: "a.test", records: []string{`a.test. 60 IN TXT "x"`}},
		"aliases": {domain: "a.test", records: []string{
			"a.test. 60 IN CNAME B.test.", "b.test. 60 IN CNAME c.test.", "c.test. 60 IN A 192.0.2.1", "x.test. 60 IN A 192.0.2.9"},
			want: []registry.Instance{at("192.0.2.1", 0)}},
		"an alias of nothing":   {domain: "a.test", records: []string{"a.test. 60 IN CNAME none.test."}},
		"more than UDP carries": {domain: "many.test", records: many, want: instances, tcp: true},
		"SRV": {domain: "_http._tcp.a.test", records: []string{
			"_http._tcp.a.test. 60 IN SRV 10 10 8081 one.test.", "_http._tcp.a.test. 60 IN SRV 10 30 8082 Two.test.",
			"one.test. 60 IN A 192.0.2.1", "two.test. 60 IN AAAA 2001:db8::1"},
			want: []registry.Instance{weighing(at("192.0.2.1", 8081), 0.5), weighing(at("2001:db8::1", 8082), 1.5)}},
		"SRV without the targets' addresses": {domain: "_http._tcp.a.test", noExtra: true, records: []string{
			"_http._tcp.a.test. 60 IN SRV 10 0 8081 one.test.", "_http._tcp.a.test. 60 IN SRV 10 0 8081 two.test.",
			"one.test. 60 IN A 192.0.2.1", "two.test. 60 IN CNAME three.test.", "three.test. 60 IN A 192.0.2.3"},
			want: []registry.Instance{at("192.0.2.1", 8081), at("192.0.2.3", 8081)}},
		"SRV by an alias": {domain: "_http._tcp.a.test", records: []string{
			"_http._tcp.a.test. 60 IN CNAME _http._tcp.b.test.", "_http._tcp.b.test. 60 IN SRV 0 0 8081 one.test.",
			"one.test. 60 IN A 192.0.2.1"},
			want: []registry.Instance{at("192.0.2.1", 8081)}},
		"SRV for failover": {domain: "_http._tcp.a.test", records: []string{
			"_http._tcp.a.test. 60 IN SRV 20 5 8082 two.test.", "_http._tcp.a.test. 60 IN SRV 10 5 8081 one.test.",
			"one.test. 60 IN A 192.0.2.1", "two.test. 60 IN A 192.0.2.2"},
			want: []registry.Instance{at("192.0.2.1", 8081), out("two.test", 8082, "SRV priority 20 is for failover")}},
		"SRV whose best targets do not exist": {domain: "_http._tcp.a.test", records: []string{
			"_http._tcp.a.test. 60 IN SRV 10 5 8081 none.test.", "_http._tcp.a.test. 60 IN SRV 20 5 8082 two.test.",
			"two.test. 60 IN A 192.0.2.2"},
			want: []registry.Instance{at("192.0.2.2", 8082), out("none.test", 8081, "the SRV target has no address")}},
		"SRV that says no": {domain: "_http._tcp.a.test", records: []string{"_http._tcp.a.test. 60 IN SRV 0 0 0 ."}},
		"SRV without a port": {domain: "_http._tcp.a.test", records: []string{
			"_http._tcp.a.test. 60 IN SRV 0 0 0 one.test.", "one.test. 60 IN A 192.0.2.1"},
			want: []registry.Instance{out("one.test", 0, "the SRV record states port 0")}},
		"no such SRV": {domain: "_http._tcp.a.test", records: []string{"a.test. 60 IN A 192.0.2.1"}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, tc.records...)
			f.do(func() { f.noExtra = tc.noExtra })
			rec := resolve(t, tc.domain, f)
			s := listing(t, rec)
			if diff := cmp.Diff(tc.want, s.Instances, sameLabels); diff != "" {
				t.Errorf("instances (-want +got):\n%s", diff)
			}
			for _, e := range rec.State().Events {
				if e.Kind == registrytest.Fail {
					t.Errorf("failure: %v", e.Err)
				}
			}
			if tcp := slices.Contains(f.requests(), "A many.test. by TCP"); tcp != tc.tcp {
				t.Errorf("asked by TCP: %v, want %v", tcp, tc.tcp)
			}
		})
	}
}

// special answers a question in a special way, or leaves it to the server.
type special func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool

func TestOddServers(t *testing.T) {
	record := "a.test. 60 IN A 192.0.2.1"
	reply := func(w mdns.ResponseWriter, q *mdns.Msg, edit func(*mdns.Msg)) {
		m := new(mdns.Msg).SetReply(q)
		m.Authoritative = true
		if q.Question[0].Qtype == mdns.TypeA {
			rr, _ := mdns.NewRR("a.test. 60 IN A 192.0.2.66")
			m.Answer = []mdns.RR{rr}
		}
		edit(m)
		_ = w.WriteMsg(m)
	}
	for name, odd := range map[string]special{
		"does not know EDNS": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			return q.IsEdns0() != nil && rcode(mdns.RcodeFormatError)(w, q, false)
		},
		"does not know EDNS, and does not repeat the question": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			if q.IsEdns0() == nil {
				return false
			}
			m := new(mdns.Msg).SetRcode(q, mdns.RcodeNotImplemented)
			m.Question = nil
			_ = w.WriteMsg(m)
			return true
		},
		"another question's reply first": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			reply(w, q, func(m *mdns.Msg) { m.Question[0].Name = "b.test." })
			reply(w, q, func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeTXT })
			reply(w, q, func(m *mdns.Msg) { m.Question = nil })
			return false
		},
		"another client's reply first": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			reply(w, q, func(m *mdns.Msg) { m.Id++ })
			return false
		},
		"no reply at all first, but our own question": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			_ = w.WriteMsg(q)
			return false
		},
		"rubbish first": func(w mdns.ResponseWriter, _ *mdns.Msg, tcp bool) bool {
			if !tcp {
				_, _ = w.Write([]byte("rubbish"))
				_, _ = w.Write([]byte("and a longer piece of rubbish, longer than a header"))
			}
			return false
		},
		"says that the answer is too long, without a part of it": func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
			if !tcp {
				reply(w, q, func(m *mdns.Msg) { m.Answer, m.Truncated = nil, true })
			}
			return !tcp
		},
		"says that the answer is too long, and cuts a record": func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
			if tcp || q.Question[0].Qtype != mdns.TypeA {
				return false
			}
			m := new(mdns.Msg).SetReply(q)
			rr, _ := mdns.NewRR("a.test. 60 IN A 192.0.2.66")
			m.Answer, m.Truncated = []mdns.RR{rr}, true
			b, _ := m.Pack()
			_, _ = w.Write(b[:len(b)-2])
			return true
		},
		"fails once": func() special {
			failed := map[uint16]bool{}
			return func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
				if t := q.Question[0].Qtype; !failed[t] {
					failed[t] = true
					return rcode(mdns.RcodeServerFailure)(w, q, false)
				}
				return false
			}
		}(),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, record)
			f.do(func() { f.special = serialised(odd) })
			rec := resolve(t, "a.test", f)
			becomes(t, rec, at("192.0.2.1", 0))
			for _, e := range rec.State().Events {
				if e.Kind == registrytest.Fail {
					t.Errorf("failure: %v", e.Err)
				}
			}
		})
	}
}

// serialised lets one call at a time in.
func serialised(f special) special {
	turn := make(chan struct{}, 1)
	return func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
		turn <- struct{}{}
		defer func() { <-turn }()
		return f(w, q, tcp)
	}
}

func TestFailureIsNoAnswer(t *testing.T) {
	write := func(edit func(m *mdns.Msg)) special {
		return func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			if q.Question[0].Qtype == mdns.TypeAAAA {
				return false
			}
			m := new(mdns.Msg).SetReply(q)
			edit(m)
			_ = w.WriteMsg(m)
			return true
		}
	}
	answer := func(records ...string) func(*mdns.Msg) {
		return func(m *mdns.Msg) {
			for _, text := range records {
				rr, err := mdns.NewRR(text)
				if err != nil {
					t.Error(err)
				}
				m.Answer = append(m.Answer, rr)
			}
		}
	}
	for name, tc := range map[string]struct {
		special special
		domain  string
		say     string
	}{
		"SERVFAIL":        {rcode(mdns.RcodeServerFailure), "a.test", "the server answered SERVFAIL"},
		"REFUSED":         {rcode(mdns.RcodeRefused), "a.test", "the server answered REFUSED"},
		"FORMERR":         {rcode(mdns.RcodeFormatError), "a.test", "the server answered FORMERR"},
		"an unknown code": {rcode(15), "a.test", "the server answered code 15"},
		"only IPv6 fails": {rcode(mdns.RcodeServerFailure, mdns.TypeAAAA), "a.test", "look up AAAA of a.test.: 127."},
		"one name of two": {failing("b.test."), "a.test,b.test", "of b.test.: 127."},
		"a target of SRV": {failing("one.test."), "_http._tcp.a.test", "of one.test.: 127."},
		"SRV":             {rcode(mdns.RcodeServerFailure, mdns.TypeSRV), "_http._tcp.a.test", "SRV of _http._tcp.a.test.: 127."},
		"silence":         {func(mdns.ResponseWriter, *mdns.Msg, bool) bool { return true }, "a.test", "no answer within 300ms"},
		"only wrong ones": {write(func(m *mdns.Msg) { m.Id++ }), "a.test", "no answer within 300ms"},
		"lame":            {write(func(*mdns.Msg) {}), "a.test", "the server knows nothing of the name's zone"},
		"lame, and sure": {write(func(m *mdns.Msg) { m.Rcode = mdns.RcodeNameError }), "a.test",
			"the server knows nothing of the name's zone"},
		"sure of an alias": {write(func(m *mdns.Msg) {
			answer("a.test. 1 IN CNAME none.test.")(m)
			m.Rcode = mdns.RcodeNameError
		}), "a.test", "the server knows nothing of the name's zone"},
		"cut by TCP too":  {write(func(m *mdns.Msg) { m.Truncated = true }), "a.test", "cut off, over TCP too"},
		"cut at a record": {shortened(0), "a.test", "ends after 1 of 2 records"},
		"cut in a record": {shortened(3), "a.test", "read the reply: "},
		"wrong by TCP":    {wrongByTCP, "a.test", "the reply is to another question"},
		"TCP is closed":   {closedTCP, "a.test", "of a.test.: 127."},
		"endless aliases": {endlessAliases(), "a.test", "more than 8 aliases to follow"},
		"a circle":        {write(answer("a.test. 1 IN CNAME b.test.", "b.test. 1 IN CNAME a.test.")), "a.test", "in a circle"},
		"a small circle":  {write(answer("a.test. 1 IN CNAME a.test.")), "a.test", "in a circle"},
		"a referral": {write(func(m *mdns.Msg) {
			answer("test. 60 IN NS ns.test.")(m)
			m.Answer, m.Ns, m.Authoritative = nil, m.Answer, true
		}), "a.test", "knows nothing of the name's zone"},
		"a record without content": {write(func(m *mdns.Msg) {
			m.Answer = []mdns.RR{&mdns.RR_Header{Name: "a.test.", Rrtype: mdns.TypeA, Class: mdns.ClassINET}}
		}), "a.test", "has no valid address"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, "a.test. 60 IN A 192.0.2.1", "b.test. 60 IN A 192.0.2.2", "_http._tcp.a.test. 60 IN SRV 0 0 80 one.test.",
				"_http._tcp.a.test. 60 IN SRV 0 0 80 two.test.", "two.test. 60 IN A 192.0.2.3")
			f.do(func() { f.special, f.noExtra = tc.special, true })
			rec := resolve(t, tc.domain, f)
			fails(t, rec, tc.say)
			neverSynced(t, rec)
			f.do(func() { f.special = nil })
			if s := listing(t, rec); len(s.Instances) == 0 {
				t.Error("nothing was found once the server was healthy")
			}
		})
	}
}

// failing answers SERVFAIL for one name.
func failing(name string) special {
	return func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
		return q.Question[0].Name == name && rcode(mdns.RcodeServerFailure)(w, q, tcp)
	}
}

// endlessAliases makes each name an alias of another one.
func endlessAliases() special {
	n := 0
	return serialised(func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
		n++
		m := new(mdns.Msg).SetReply(q)
		rr, _ := mdns.NewRR(fmt.Sprintf("%s 60 IN CNAME a%d.test.", q.Question[0].Name, n))
		m.Answer = []mdns.RR{rr}
		_ = w.WriteMsg(m)
		return true
	})
}

// shortened answers with the second of two records missing (0), or cut by some bytes.
func shortened(by int) special {
	return func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
		if q.Question[0].Qtype != mdns.TypeA {
			return false
		}
		m := new(mdns.Msg).SetReply(q)
		a, _ := mdns.NewRR("a.test. 60 IN A 192.0.2.1")
		b, _ := mdns.NewRR("a.test. 60 IN A 192.0.2.2")
		m.Answer = []mdns.RR{a, b}
		raw, _ := m.Pack()
		if by == 0 {
			by = mdns.Len(b)
		}
		_, _ = w.Write(raw[:len(raw)-by])
		return true
	}
}

func wrongByTCP(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
	m := new(mdns.Msg).SetReply(q)
	m.Truncated = !tcp
	if tcp {
		m.Question[0].Name = "b.test."
	}
	_ = w.WriteMsg(m)
	return true
}

func closedTCP(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
	if tcp {
		_ = w.Close()
		return true
	}
	m := new(mdns.Msg).SetReply(q)
	rr, _ := mdns.NewRR("a.test. 60 IN A 192.0.2.1")
	m.Answer, m.Truncated = []mdns.RR{rr}, true
	_ = w.WriteMsg(m)
	return true
}

func TestAliasIsFollowedBeyondTheServersAnswer(t *testing.T) {
	f := newFake(t, "b.test. 60 IN A 192.0.2.1")
	f.do(func() {
		f.special = func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			if q.Question[0].Name != "a.test." {
				return false
			}
			m := new(mdns.Msg).SetReply(q)
			rr, _ := mdns.NewRR("a.test. 60 IN CNAME b.test.")
			m.Answer = []mdns.RR{rr}
			_ = w.WriteMsg(m)
			return true
		}
	})
	becomes(t, resolve(t, "a.test", f), at("192.0.2.1", 0))
}

// That a name does not exist is believed of whoever knows the zone, or asks those who do.
func TestAbsenceIsBelievedOfWhoKnows(t *testing.T) {
	for name, knows := range map[string]func(*mdns.Msg){
		"the zone's SOA": func(m *mdns.Msg) {
			m.Ns = []mdns.RR{&mdns.SOA{Hdr: mdns.RR_Header{Name: "test.", Rrtype: mdns.TypeSOA, Class: mdns.ClassINET}, Ns: ".", Mbox: "."}}
		},
		"authority":  func(m *mdns.Msg) { m.Authoritative = true },
		"a resolver": func(m *mdns.Msg) { m.RecursionAvailable = true },
		"authority, with name servers": func(m *mdns.Msg) { // RFC 2308, 2.1, type 4
			m.Authoritative = true
			m.Ns = []mdns.RR{&mdns.NS{Hdr: mdns.RR_Header{Name: "test.", Rrtype: mdns.TypeNS, Class: mdns.ClassINET}, Ns: "ns.test."}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.do(func() {
				f.special = func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
					m := new(mdns.Msg).SetRcode(q, mdns.RcodeNameError)
					knows(m)
					_ = w.WriteMsg(m)
					return true
				}
			})
			if s := listing(t, resolve(t, "a.test", f)); len(s.Instances) != 0 {
				t.Errorf("instances %v", s.Instances)
			}
		})
	}
}

func TestServersAreAskedInOrder(t *testing.T) {
	for name, special := range map[string]special{
		"SERVFAIL": rcode(mdns.RcodeServerFailure),
		"REFUSED":  rcode(mdns.RcodeRefused),
		"silent":   func(mdns.ResponseWriter, *mdns.Msg, bool) bool { return true },
		"lame": func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
			_ = w.WriteMsg(new(mdns.Msg).SetReply(q))
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			first, second := newFake(t, "a.test. 60 IN A 192.0.2.1"), newFake(t, "a.test. 60 IN A 192.0.2.2")
			first.do(func() { first.special = special })
			rec := resolve(t, "a.test", first, second)
			becomes(t, rec, at("192.0.2.2", 0))

			// The first one's answers go before the other's, and the change of servers is a gap.
			events := len(rec.State().Events)
			first.do(func() { first.special = nil })
			becomes(t, rec, at("192.0.2.1", 0))
			after := rec.State().Events[events:]
			i := slices.IndexFunc(after, func(e registrytest.Event) bool { return e.Kind == registrytest.Fail })
			j := slices.IndexFunc(after, func(e registrytest.Event) bool { return e.Changed })
			if i < 0 || i > j {
				t.Fatalf("no gap before the change: %+v", after)
			}
			if want := "answers come from " + first.addr + " now"; !strings.Contains(after[i].Err.Error(), want) {
				t.Errorf("failure %q does not say %q", after[i].Err, want)
			}
		})
	}
	t.Run("none is there", func(t *testing.T) {
		first, second := newFake(t), newFake(t)
		first.stop()
		second.stop()
		rec := resolve(t, "a.test", first, second)
		fails(t, rec, first.addr+": read: connection refused; "+second.addr+": read: connection refused")
		neverSynced(t, rec)
	})
}

func TestOutageChangesNothing(t *testing.T) {
	f := newFake(t, "a.test. 60 IN A 192.0.2.1", "b.test. 60 IN A 192.0.2.2")
	rec := resolve(t, "a.test,b.test", f)
	becomes(t, rec, at("192.0.2.1", 0), at("192.0.2.2", 0))
	events := len(rec.State().Events)
	f.do(func() { f.special = failing("b.test.") })
	fails(t, rec, "look up")
	f.do(func() { f.special = nil })
	becomes(t, rec, at("192.0.2.1", 0), at("192.0.2.2", 0))
	for _, e := range rec.State().Events[events:] {
		if e.Changed || len(e.Removed) > 0 {
			t.Errorf("%s %v changed something", e.Kind, e.IDs)
		}
	}
	// An authoritative absence is believed.
	f.set("b.test. 60 IN A 192.0.2.2")
	becomes(t, rec, at("192.0.2.2", 0))
	f.set("a.test. 60 IN A 192.0.2.1")
	becomes(t, rec, at("192.0.2.1", 0))
	f.set(`a.test. 60 IN TXT "no address"`)
	becomes(t, rec)
}

func TestTimeToLive(t *testing.T) {
	for name, tc := range map[string]struct {
		domain  string
		records []string
		edit    func(*fake)
		want    time.Duration
	}{
		"the shortest": {"a.test", []string{"a.test. 60 IN A 192.0.2.1", "a.test. 5 IN A 192.0.2.2"}, nil, 5 * time.Second},
		"of both families": {"a.test", []string{"a.test. 60 IN A 192.0.2.1", "a.test. 5 IN AAAA 2001:db8::1"}, nil,
			5 * time.Second},
		"of all names": {"a.test,b.test", []string{"a.test. 60 IN A 192.0.2.1", "b.test. 5 IN A 192.0.2.2"}, nil,
			5 * time.Second},
		"of an alias": {"a.test", []string{"a.test. 5 IN CNAME b.test.", "b.test. 60 IN A 192.0.2.1"}, nil, 5 * time.Second},
		"of a target": {"_x._tcp.test", []string{"_x._tcp.test. 60 IN SRV 0 0 80 b.test.", "b.test. 5 IN A 192.0.2.1"}, nil,
			5 * time.Second},
		"of a target, asked for": {"_x._tcp.test", []string{"_x._tcp.test. 60 IN SRV 0 0 80 b.test.", "b.test. 5 IN A 192.0.2.1"},
			func(f *fake) { f.noExtra = true }, 5 * time.Second},
		"of an absence":       {"a.test", []string{"b.test. 5 IN A 192.0.2.1"}, nil, 60 * time.Second},
		"of a short absence":  {"a.test", []string{"b.test. 60 IN A 192.0.2.1"}, func(f *fake) { f.negative = 3 }, 3 * time.Second},
		"of an absent record": {"a.test", []string{`a.test. 1 IN TXT "x"`}, func(f *fake) { f.negative = 3 }, 3 * time.Second},
		"not of an absent family": {"a.test", []string{"a.test. 60 IN A 192.0.2.1"}, func(f *fake) { f.negative = 3 },
			60 * time.Second},
		"of an address": {"192.0.2.1", nil, nil, forever},
		"too large":     {"a.test", []string{"a.test. 4294967295 IN A 192.0.2.1"}, nil, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, tc.records...)
			if tc.edit != nil {
				f.do(func() { tc.edit(f) })
			}
			got, err := newResolver(t, tc.domain, f).resolve(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got.ttl != tc.want {
				t.Errorf("holds for %v, want %v", got.ttl, tc.want)
			}
		})
	}
}

func TestNamesAreReadAgainWhenTheirTimeIsOver(t *testing.T) {
	f := newFake(t, "a.test. 1 IN A 192.0.2.1")
	r := newResolver(t, "a.test", f)
	r.interval = time.Hour
	rec := start(t, r)
	becomes(t, rec, at("192.0.2.1", 0))
	first := time.Now()
	f.set("a.test. 3600 IN A 192.0.2.2")
	becomes(t, rec, at("192.0.2.2", 0))
	if took := time.Since(first); took < 900*time.Millisecond {
		t.Errorf("asked again after %v, within the record's time to live", took)
	}
}

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
		defer cancel()
		rec := registrytest.NewRecorder(ctx)
		begun := time.Now()
		service := registry.Service{ID: "api", Host: "api.dns"}
		err := watch(ctx, rec, 30*time.Second, func(context.Context) (found, error) {
			switch now := time.Since(begun); {
			case now < 5*time.Minute:
				return found{service: service, ttl: 5 * time.Second, from: "a"}, nil
			case now < 10*time.Minute:
				return found{service: service, ttl: time.Hour, from: "a"}, nil
			case now < 15*time.Minute:
				return found{}, errors.New("down")
			default:
				return found{service: service, ttl: 0, from: "a"}, nil
			}
		})
		if err != nil {
			t.Errorf("Run: %v", err)
		}
		last := map[registrytest.Kind]time.Time{}
		pauses := map[int]time.Duration{} // the longest, by minutes
		shortest := map[int]time.Duration{}
		for _, e := range rec.State().Events {
			if e.Kind == registrytest.Put {
				continue
			}
			if before, ok := last[e.Kind]; ok {
				period := int(before.Sub(begun).Minutes()) / 5
				if end := int(e.At.Sub(begun).Minutes()) / 5; end == period {
					pauses[period] = max(pauses[period], e.At.Sub(before))
					if s, ok := shortest[period]; !ok || e.At.Sub(before) < s {
						shortest[period] = e.At.Sub(before)
					}
				}
			}
			last[e.Kind] = e.At
		}
		for period, want := range map[int][2]time.Duration{
			0: {5 * time.Second, 5500 * time.Millisecond},
			1: {27 * time.Second, 30 * time.Second},
			2: {375 * time.Millisecond, 30 * time.Second},
			3: {time.Second, 1100 * time.Millisecond},
		} {
			if shortest[period] < want[0] || pauses[period] > want[1] {
				t.Errorf("minutes %d to %d: pauses of %v to %v, want %v to %v", 5*period, 5*period+5, shortest[period], pauses[period],
					want[0], want[1])
			}
		}
	})
}

// useResolvConf makes the resolver read a file, and reach the fakes at the addresses that stand there.
func (r *resolver) useResolvConf(path string, fakes map[string]*fake) {
	r.config = func() (config, error) {
		c, err := readResolvConf(path)
		for i, s := range c.servers {
			if f := fakes[strings.TrimSuffix(s, ":53")]; f != nil {
				c.servers[i] = f.addr
			}
		}
		return c, err
	}
}

func TestResolvConf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(text string) {
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	one := newFake(t, "api.blue.test. 1 IN A 192.0.2.1", "api.two.red.test. 1 IN A 192.0.2.2", "api. 1 IN A 192.0.2.3")
	two := newFake(t, "api.blue.test. 1 IN A 192.0.2.11")
	r := newResolver(t, "api")
	r.useResolvConf(path, map[string]*fake{"192.0.2.53": one, "[2001:db8::53]": two})
	rec := start(t, r)
	fails(t, rec, "resolv.conf: no such file")
	neverSynced(t, rec)

	write("nameserver 192.0.2.53\nsearch green.test blue.test .\noptions timeout:1 attempts:1\n")
	becomes(t, rec, at("192.0.2.1", 0))
	write("nameserver 192.0.2.53\n")
	becomes(t, rec, at("192.0.2.3", 0))
	write("nameserver not-an-address\nnameserver 2001:db8::53\nsearch blue.test\n")
	becomes(t, rec, at("192.0.2.11", 0))

	// A failure of one name of the search list is not passed over: the next one may be something else.
	one.do(func() { one.special = failing("api.blue.test.") })
	write("nameserver 192.0.2.53\nsearch blue.test two.red.test\n")
	fails(t, rec, "of api.blue.test.: "+one.addr)
	one.do(func() { one.special = nil })
	write("nameserver 192.0.2.53\nsearch two.red.test\n")
	becomes(t, rec, at("192.0.2.2", 0))
}

func TestSearchList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	long := strings.Repeat(strings.Repeat("l", 60)+".", 4)
	for name, tc := range map[string]struct{ conf, host, want string }{
		"as it is first with enough dots": {"search x.test", "a.b", "a.b. a.b.x.test."},
		"as it is last":                   {"search x.test y.test\noptions ndots:2", "a.b", "a.b.x.test. a.b.y.test. a.b."},
		"a full name":                     {"search x.test", "a.b.", "a.b."},
		"without a list":                  {"", "a", "a."},
		"the root":                        {"search .", "a", "a."},
		"rubbish, and what gets too long": {"search x..y " + long + " x.test", "a", "a.x.test. a."},
	} {
		if err := os.WriteFile(path, []byte(tc.conf), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := readResolvConf(path)
		if err != nil {
			t.Fatal(err)
		}
		if name == "rubbish, and what gets too long" {
			tc.host = strings.Repeat("a", 50)
			tc.want = strings.ReplaceAll(tc.want, "a", tc.host)
		}
		if got := strings.Join(c.names(tc.host), " "); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
		if diff := cmp.Diff([]string{"127.0.0.1:53"}, c.servers); diff != "" {
			t.Errorf("servers (-want +got):\n%s", diff)
		}
		if c.timeout != 5*time.Second || c.attempts != 2 {
			t.Errorf("timeout %v, %d attempts", c.timeout, c.attempts)
		}
	}
	if err := os.WriteFile(path, []byte("options timeout:30 attempts:99"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := readResolvConf(path); err != nil || c.timeout != maxTimeout || c.attempts != maxAttempts {
		t.Errorf("timeout %v, %d attempts, error %v", c.timeout, c.attempts, err)
	}
}

func TestServersOfTheEntryGetNamesAsTheyAre(t *testing.T) {
	f := newFake(t, "a. 60 IN A 192.0.2.1")
	entry := registry.Entry{Name: "api", Port: 80, Domain: "a", DNSMode: "resolve", DNSServers: []string{f.addr}}
	reg, err := New(entry, newEnv())
	if err != nil {
		t.Fatal(err)
	}
	becomes(t, start(t, reg), at("192.0.2.1", 0))
	for _, q := range f.requests() {
		if q != "A a." && q != "AAAA a." {
			t.Errorf("asked for %s", q)
		}
	}
}

func TestCancelWhileServersHang(t *testing.T) {
	for name, special := range map[string]special{
		"by UDP": func(mdns.ResponseWriter, *mdns.Msg, bool) bool { return true },
		"by TCP": func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
			if !tcp {
				m := new(mdns.Msg).SetReply(q)
				m.Truncated = true
				_ = w.WriteMsg(m)
			}
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			arrived := make(chan bool, 1000)
			f.do(func() {
				f.special = func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) bool {
					defer func() { arrived <- tcp }()
					return special(w, q, tcp)
				}
			})
			r := newResolver(t, "a.test,b.test,_x._tcp.test", f)
			conf, _ := r.config()
			conf.timeout = time.Hour
			r.config = func() (config, error) { return conf, nil }
			rec := start(t, r) // the end of the test cancels, and checks that Run returns at once
			for hangs := false; !hangs; {
				select {
				case tcp := <-arrived:
					hangs = tcp == (name == "by TCP")
				case <-time.After(soon):
					t.Fatal("no question hangs")
				}
			}
			neverSynced(t, rec)
		})
	}
}

// Other servers may know less, whether they answer in place of ours or an edit names them: that is a gap, as other
// credentials are.
func TestOtherServersAreAnotherView(t *testing.T) {
	before := registry.Entry{Type: "dns", Name: "api", Domain: "a.test", DNSMode: "resolve"}
	after := before
	after.DNSServers = []string{"192.0.2.53"}
	was, is := before.Fingerprint(), after.Fingerprint()
	if was.Source != is.Source || was.Identity == is.Identity {
		t.Errorf("an edit of dnsServers makes %+v of %+v: want the same source, seen by somebody else", is, was)
	}
}

func TestEveryQuestionIsObserved(t *testing.T) {
	f := newFake(t, "a.test. 60 IN A 192.0.2.1")
	type call struct {
		operation string
		failed    bool
	}
	seen := make(chan call, 1000)
	env := newEnv()
	env.Observe = func(operation string, took time.Duration, err error) {
		if took <= 0 {
			t.Errorf("%s took %v", operation, took)
		}
		seen <- call{operation, err != nil}
	}
	entry := registry.Entry{Name: "api", Port: 80, Domain: "a.test", DNSMode: "resolve", DNSServers: []string{f.addr}}
	reg, err := New(entry, env)
	if err != nil {
		t.Fatal(err)
	}
	f.do(func() { f.special = rcode(mdns.RcodeServerFailure, mdns.TypeAAAA) })
	start(t, reg)
	want := map[call]bool{{"A", false}: true, {"AAAA", true}: true}
	for len(want) > 0 {
		select {
		case c := <-seen:
			delete(want, c)
		case <-time.After(soon):
			t.Fatalf("not observed: %v", want)
		}
	}
}

func TestConformance(t *testing.T) {
	for name, record := range map[string]func(i registry.Instance, n int) []string{
		"addresses": func(i registry.Instance, _ int) []string {
			return []string{"api.test. 60 IN A " + i.Address}
		},
		"SRV": func(i registry.Instance, n int) []string {
			return []string{
				fmt.Sprintf("_api._tcp.test. 60 IN SRV 0 0 %d n%d.test.", i.Port, n), fmt.Sprintf("n%d.test. 60 IN A %s", n, i.Address),
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			registrytest.Run(t, registrytest.Config{
				New:      newImpatient,
				Interval: 200 * time.Millisecond,
				Start: func(t *testing.T) registrytest.Backend {
					return backend(newFake(t, "test. 60 IN NS ns.test."), name == "SRV", record)
				},
			})
		})
	}
	t.Run("passthrough", func(t *testing.T) {
		registrytest.Run(t, registrytest.Config{
			New:      New,
			Interval: 200 * time.Millisecond,
			Start: func(*testing.T) registrytest.Backend {
				return registrytest.Backend{
					Entry:    registry.Entry{Type: "dns", Name: "api", Domain: "api.example.com,localhost:81", Port: 80},
					Services: []string{"api"},
				}
			},
		})
	})
}

// backend is a DNS server for the suite. It cannot come back empty: a server without the zone refuses to answer.
func backend(f *fake, srv bool, record func(registry.Instance, int) []string) registrytest.Backend {
	domain := "api.test"
	if srv {
		domain = "_api._tcp.test"
	}
	set := func(_ string, instances ...registry.Instance) {
		records := []string{"test. 60 IN NS ns.test."}
		for n, i := range instances {
			records = append(records, record(i, n)...)
		}
		f.set(records...)
	}
	return registrytest.Backend{
		Entry: registry.Entry{Type: "dns", Name: "api", Domain: domain, Port: 80, DNSMode: "resolve",
			DNSServers: []string{f.addr}},
		Services: []string{"api"},
		Fact: func(i registry.Instance) registry.Instance {
			fact := registry.Instance{Address: i.Address, Weight: 1}
			if srv {
				fact.Port = i.Port
			}
			return fact
		},
		Set:     set,
		Remove:  func(name string) { set(name) },
		Stop:    f.stop,
		Restart: f.start,
		Refuse: func(on bool) {
			f.do(func() {
				if f.special = nil; on {
					f.special = rcode(mdns.RcodeRefused)
				}
			})
		},
		Hang: func(on bool) { f.do(func() { f.hang = on }) },
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.do(func() { f.hangAt, f.hung = n, hung })
			return hung
		},
		Requests: func() int { return len(f.requests()) },
	}
}
