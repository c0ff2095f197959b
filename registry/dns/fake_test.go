package dns

import (
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"
)

// fake is a DNS server on loopback, by UDP and TCP on one port, with the authority over its records.
type fake struct {
	t    *testing.T
	addr string // stays the same over stop and start

	mu       sync.Mutex
	records  []mdns.RR
	negative uint32 // TTL of what is not there, in seconds
	noExtra  bool   // do not add the addresses of SRV targets
	special  func(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) (handled bool)
	hang     bool
	hangAt   int // counts down to the request that hangs
	hung     chan struct{}
	asked    []string // "A name." or "A name. by TCP" of each request

	servers []*mdns.Server
	ended   sync.WaitGroup
}

// newFake starts a server with records in the form of a zone file.
func newFake(t *testing.T, records ...string) *fake {
	t.Helper()
	f := &fake{t: t, addr: "127.0.0.1:0", negative: 60}
	f.set(records...)
	f.start()
	t.Cleanup(f.stop)
	return f
}

func (f *fake) start() {
	f.t.Helper()
	var udp net.PacketConn
	var tcp net.Listener
	var err error
	for range 20 { // the port may be free for one of the two only
		if udp, err = net.ListenPacket("udp", f.addr); err != nil {
			continue
		}
		if tcp, err = net.Listen("tcp", udp.LocalAddr().String()); err == nil {
			break
		}
		_ = udp.Close()
	}
	if err != nil {
		f.t.Fatalf("listen on %s: %v", f.addr, err)
	}
	f.addr = udp.LocalAddr().String()
	for _, s := range []*mdns.Server{{PacketConn: udp}, {Listener: tcp}} {
		s.Handler = mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) { f.serve(w, q, s.Listener != nil) })
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		f.ended.Go(func() {
			if err := s.ActivateAndServe(); err != nil {
				f.t.Errorf("fake server: %v", err)
			}
		})
		<-started
		f.servers = append(f.servers, s)
	}
}

func (f *fake) stop() {
	for _, s := range f.servers {
		if err := s.Shutdown(); err != nil {
			f.t.Errorf("stop the fake server: %v", err)
		}
	}
	f.ended.Wait()
	f.servers = nil
}

// set replaces all records.
func (f *fake) set(records ...string) {
	f.t.Helper()
	var rrs []mdns.RR
	for _, text := range records {
		rr, err := mdns.NewRR(text)
		if err != nil {
			f.t.Fatalf("record %q: %v", text, err)
		}
		rrs = append(rrs, rr)
	}
	f.do(func() { f.records = rrs })
}

// do changes settings.
func (f *fake) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// requests are all questions so far.
func (f *fake) requests() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked)
}

func (f *fake) serve(w mdns.ResponseWriter, q *mdns.Msg, tcp bool) {
	f.mu.Lock()
	asked := mdns.TypeToString[q.Question[0].Qtype] + " " + q.Question[0].Name
	if tcp {
		asked += " by TCP"
	}
	f.asked = append(f.asked, asked)
	hangs := f.hang
	if f.hangAt > 0 {
		if f.hangAt--; f.hangAt == 0 {
			hangs = true
			close(f.hung)
		}
	}
	special := f.special
	m := f.answer(q)
	f.mu.Unlock()
	if hangs || special != nil && special(w, q, tcp) {
		return
	}
	size := mdns.MaxMsgSize
	if !tcp {
		size = mdns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
			m.SetEdns0(ednsSize, false)
		}
	}
	m.Truncate(size)
	_ = w.WriteMsg(m) // the client may be gone
}

// answer is what an authoritative server says.
func (f *fake) answer(q *mdns.Msg) *mdns.Msg {
	m := new(mdns.Msg).SetReply(q)
	m.Authoritative = true
	name, qtype := mdns.CanonicalName(q.Question[0].Name), q.Question[0].Qtype
	for range 20 {
		data, alias := f.find(name, qtype), f.find(name, mdns.TypeCNAME)
		if len(data) > 0 || len(alias) == 0 {
			m.Answer = append(m.Answer, data...)
			break
		}
		m.Answer = append(m.Answer, alias...)
		name = mdns.CanonicalName(alias[0].(*mdns.CNAME).Target)
	}
	for _, rr := range m.Answer {
		if srv, ok := rr.(*mdns.SRV); ok && !f.noExtra {
			target := mdns.CanonicalName(srv.Target)
			m.Extra = append(m.Extra, append(f.find(target, mdns.TypeA), f.find(target, mdns.TypeAAAA)...)...)
		}
	}
	if n := len(m.Answer); n > 0 && m.Answer[n-1].Header().Rrtype != mdns.TypeCNAME {
		return m
	}
	exists := false
	for _, rr := range f.records {
		exists = exists || mdns.IsSubDomain(name, mdns.CanonicalName(rr.Header().Name))
	}
	if !exists {
		m.Rcode = mdns.RcodeNameError
	}
	m.Ns = []mdns.RR{&mdns.SOA{
		Hdr: mdns.RR_Header{Name: "test.", Rrtype: mdns.TypeSOA, Class: mdns.ClassINET, Ttl: 3600},
		Ns:  "ns.test.", Mbox: "admin.test.", Serial: 1, Minttl: f.negative,
	}}
	return m
}

func (f *fake) find(name string, t uint16) (out []mdns.RR) {
	for _, rr := range f.records {
		if rr.Header().Rrtype == t && strings.EqualFold(rr.Header().Name, name) {
			out = append(out, rr)
		}
	}
	return out
}

// rcode is a special that answers a code to each question of the types, or of all.
func rcode(code int, types ...uint16) func(mdns.ResponseWriter, *mdns.Msg, bool) bool {
	return func(w mdns.ResponseWriter, q *mdns.Msg, _ bool) bool {
		if len(types) > 0 && !slices.Contains(types, q.Question[0].Qtype) {
			return false
		}
		_ = w.WriteMsg(new(mdns.Msg).SetRcode(q, code))
		return true
	}
}
