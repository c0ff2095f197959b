package harness

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/regbridge/regbridge/test/servers"
)

// CoreDNSOptions says what the server serves.
type CoreDNSOptions struct {
	// Zones holds the records of each zone, by its name without a trailing dot: lines of a zone file, relative to the
	// zone. SOA and NS are added. Records without a TTL get 1 s.
	Zones map[string]string
	// Extra is put into the Corefile's server block. The plugins bind, reload, ready, health, errors, log, template,
	// hosts and file are there.
	Extra string
}

// CoreDNS is one DNS server with authority over its zones; other names it refuses.
type CoreDNS struct {
	*Process
	// Address is host:port for UDP and TCP. It stays the same over restarts.
	Address string
	serials map[string]uint32
}

// StartCoreDNS starts a server and waits until it serves the zones.
func StartCoreDNS(tb testing.TB, o CoreDNSOptions) *CoreDNS {
	tb.Helper()
	program := servers.Need(tb, servers.CoreDNS)
	c := &CoreDNS{serials: map[string]uint32{}}
	c.Process = start(tb, "coredns", func(p *Process) (command, error) {
		ports, err := freePorts(tb.Context(), 2)
		if err != nil {
			return command{}, err
		}
		c.Address = loopback(ports[0])
		var b strings.Builder
		fmt.Fprintf(&b, ".:%d {\nbind 127.0.0.1\nready %s\nerrors\nlog\n%s\n", ports[0], loopback(ports[1]), o.Extra)
		for _, zone := range slices.Sorted(maps.Keys(o.Zones)) {
			fmt.Fprintf(&b, "file %s %s {\nreload 100ms\n}\n", zoneFile(p.dir, zone), zone)
			c.serials[zone] = 1
			if err := os.WriteFile(zoneFile(p.dir, zone), []byte(zoneText(zone, 1, o.Zones[zone])), 0o600); err != nil {
				return command{}, err
			}
		}
		b.WriteString("}\n")
		return command{program: program, args: []string{"-conf", "Corefile"}, ready: func(ctx context.Context) error {
			_, err := getOK(ctx, "http://"+loopback(ports[1])+"/ready")
			return err
		}}, os.WriteFile(filepath.Join(p.dir, "Corefile"), []byte(b.String()), 0o600)
	})
	return c
}

func zoneFile(dir, zone string) string { return filepath.Join(dir, "db."+zone) }

// zoneText is a zone file. CoreDNS takes a changed one only with a higher serial.
func zoneText(zone string, serial uint32, records string) string {
	return fmt.Sprintf("$ORIGIN %s.\n$TTL 1\n@ SOA ns hostmaster %d 60 60 600 1\n@ NS ns\nns A 127.0.0.1\n%s\n",
		zone, serial, records)
}

// SetZone replaces the records of a zone that the server was started with, and waits until they are served.
func (c *CoreDNS) SetZone(zone, records string) {
	c.tb.Helper()
	if c.serials[zone] == 0 {
		c.tb.Fatalf("zone %q is not among CoreDNSOptions.Zones", zone)
	}
	c.serials[zone]++
	write(c.tb, zoneFile(c.dir, zone), zoneText(zone, c.serials[zone], records))
	Eventually(c.tb, 10*time.Second, func() error {
		query := new(dns.Msg).SetQuestion(dns.Fqdn(zone), dns.TypeSOA)
		answer, err := dns.ExchangeContext(c.tb.Context(), query, c.Address)
		if err != nil {
			return fmt.Errorf("ask for the serial of %s: %w", zone, err)
		}
		for _, rr := range answer.Answer {
			if soa, ok := rr.(*dns.SOA); ok && soa.Serial == c.serials[zone] {
				return nil
			}
		}
		return fmt.Errorf("serial %d of %s is not served: %v; coredns says:\n%s",
			c.serials[zone], zone, answer.Answer, tail(c.log(true)))
	})
}
