package dns

import (
	"bytes"
	"testing"

	mdns "github.com/miekg/dns"
)

func queryFor(qtype uint16) *mdns.Msg {
	q := newQuery(mdns.Question{Name: "a.test.", Qtype: qtype, Qclass: mdns.ClassINET})
	q.Id = 1
	return q
}

// packed makes a reply with these records in the answer and, behind "-", in the additional section.
func packed(t testing.TB, qtype uint16, edit func(*mdns.Msg), records ...string) []byte {
	t.Helper()
	m := new(mdns.Msg).SetReply(queryFor(qtype))
	m.RecursionAvailable = true
	section := &m.Answer
	for _, text := range records {
		if text == "-" {
			section = &m.Extra
			continue
		}
		rr, err := mdns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		*section = append(*section, rr)
	}
	if edit != nil {
		edit(m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// No piece of a message is a shorter list, wherever it was cut off.
func TestPieceOfAReplyIsNoAnswer(t *testing.T) {
	for _, tc := range []struct {
		qtype   uint16
		records []string
	}{
		{mdns.TypeA, []string{"a.test. 60 IN A 192.0.2.1", "a.test. 60 IN A 192.0.2.2", "a.test. 60 IN A 192.0.2.3"}},
		{mdns.TypeSRV, []string{"a.test. 60 IN SRV 1 2 80 b.test.", "-", "b.test. 60 IN A 192.0.2.1", "b.test. 60 IN A 192.0.2.2"}},
	} {
		b := packed(t, tc.qtype, nil, tc.records...)
		for n := range b {
			m, ok, err := parseReply(queryFor(tc.qtype), b[:n:n])
			if ok && err == nil {
				t.Errorf("the first %d of %d bytes of %q were taken for a reply: %v", n, len(b), tc.records, m)
			}
		}
		m, ok, err := parseReply(queryFor(tc.qtype), b)
		if !ok || err != nil {
			t.Fatalf("the whole reply: ok %v, error %v", ok, err)
		}
		if _, alias, err := read(m, queryFor(tc.qtype).Question[0]); alias != "" || err != nil {
			t.Errorf("the whole reply: alias %q, error %v", alias, err)
		}
	}
}

func FuzzReply(f *testing.F) {
	add := func(qtype uint16, edit func(*mdns.Msg), records ...string) {
		f.Add(packed(f, qtype, edit, records...), qtype)
	}
	add(mdns.TypeA, nil, "a.test. 60 IN A 192.0.2.1", "A.TEST. 5 IN A 192.0.2.2")
	add(mdns.TypeAAAA, nil, "a.test. 60 IN CNAME b.test.", "b.test. 60 IN AAAA 2001:db8::1", "a.test. 60 IN A 192.0.2.1")
	add(mdns.TypeSRV, nil, "a.test. 60 IN SRV 1 2 80 b.test.", "a.test. 60 IN SRV 1 0 0 .", "-", "b.test. 60 IN A 192.0.2.1")
	add(mdns.TypeA, func(m *mdns.Msg) { m.Rcode = mdns.RcodeServerFailure })
	add(mdns.TypeA, func(m *mdns.Msg) { m.Truncated = true }, "a.test. 60 IN A 192.0.2.1")
	add(mdns.TypeA, func(m *mdns.Msg) { m.SetEdns0(ednsSize, false) }, "a.test. 4294967295 IN A 192.0.2.1")
	add(mdns.TypeA, func(m *mdns.Msg) {
		rr, _ := mdns.NewRR("test. 60 IN SOA ns.test. admin.test. 1 2 3 4 5")
		m.Ns, m.Rcode = []mdns.RR{rr}, mdns.RcodeNameError
	}, "a.test. 60 IN CNAME b.test.")
	add(mdns.TypeA, func(m *mdns.Msg) { m.Rcode, m.RecursionAvailable = mdns.RcodeNameError, false })
	add(mdns.TypeA, nil, "a.test. 60 IN CNAME a.test.")
	add(mdns.TypeA, nil, `a\.b\009.test. 60 IN A 192.0.2.1`)
	f.Fuzz(func(t *testing.T, b []byte, qtype uint16) {
		if qtype != mdns.TypeAAAA && qtype != mdns.TypeSRV {
			qtype = mdns.TypeA
		}
		query := queryFor(qtype)
		m, ok, err := parseReply(query, bytes.Clone(b))
		if !ok || err != nil {
			return
		}
		a, alias, err := read(m, query.Question[0])
		if err != nil {
			return
		}
		switch {
		case m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError || m.Truncated:
			t.Fatalf("a failure was taken for an answer: %v", m)
		case a.ttl < 0:
			t.Fatalf("holds for %v", a.ttl)
		case alias == "" && len(a.addresses)+len(a.targets) == 0 && !m.Authoritative && !m.RecursionAvailable && !hasSOA(m):
			t.Fatalf("an absence was believed of who knows nothing: %v", m)
		case alias != "" && (mdns.CanonicalName(alias) != alias || len(a.addresses)+len(a.targets) > 0):
			t.Fatalf("alias %q of %+v", alias, a)
		case len(a.addresses)+len(a.targets) > len(m.Answer):
			t.Fatalf("%+v of %v", a, m)
		case qtype == mdns.TypeSRV && len(a.addresses) > 0 || qtype != mdns.TypeSRV && (len(a.targets) > 0 || len(a.extra) > 0):
			t.Fatalf("records that were not asked for: %+v", a)
		}
		for _, addr := range a.addresses {
			if !addr.IsValid() || addr.Is4() != (qtype == mdns.TypeA) {
				t.Fatalf("address %v of %v", addr, m)
			}
		}
		for _, target := range a.targets {
			if target.name == "" {
				t.Fatalf("a target without a name: %v", m)
			}
		}
		for owner, extra := range a.extra {
			if len(extra.addresses) == 0 || mdns.CanonicalName(owner) != owner {
				t.Fatalf("addresses %+v of %q", extra, owner)
			}
		}
		// All records of the name itself are read.
		owned := 0
		for _, rr := range m.Answer {
			if rr.Header().Rrtype == qtype && mdns.CanonicalName(rr.Header().Name) == "a.test." && rr.Header().Class == mdns.ClassINET {
				owned++
			}
		}
		if owned > 0 && len(a.addresses)+len(a.targets) != owned {
			t.Fatalf("%d of %d records were read: %v", len(a.addresses)+len(a.targets), owned, m)
		}
	})
}

func hasSOA(m *mdns.Msg) bool {
	soa, _ := absence(m.Ns)
	return soa != nil
}
