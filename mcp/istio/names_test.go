package istio_test

import (
	"regexp"
	"strings"
	"testing"

	networking "istio.io/api/networking/v1alpha3"

	"github.com/regbridge/regbridge/mcp"
	"github.com/regbridge/regbridge/mcp/istio"
)

func TestHost(t *testing.T) {
	long := strings.Repeat("a", 70)
	tests := []struct {
		host string
		// stock and higress are patterns in which # stands for the hash; "" means unchanged.
		stock, higress string
	}{
		{host: "order.DEFAULT-GROUP.public.nacos", stock: "order.default-group.public.nacos"},
		{host: "EUREKA-PROVIDER.eureka", stock: "eureka-provider.eureka"},
		{host: "my-svc.static"},
		{host: "httpbin.dc1.consul"},
		{host: "a.b."},
		{host: "svc_a.my-grp.public.nacos", stock: "svc-a-rb-#.my-grp.public.nacos"},
		{host: "providers:com.foo.Bar:1.0.0:g.zookeeper", stock: "providers-com.foo.bar-1.0.0-g-rb-#.zookeeper"},
		{host: "providers:com.foo.Bar:0.0.0:.zookeeper", stock: "providers-com.foo.bar-0.0.0-rb-#.zookeeper"},
		{
			host:  "providers:com.dubbo.demo.api.DemoService:1.0.0:dev.DEFAULT-GROUP.public.nacos",
			stock: "providers-com.dubbo.demo.api.demoservice-1.0.0-dev-rb-#.default-group.public.nacos",
		},
		{host: "svc..consul", stock: "svc.rb-#.consul"},
		{host: "*.dc1.consul", stock: "rb-#.dc1.consul"},
		{host: "*", stock: "rb-#"},
		{host: "", stock: "rb-#"},
		{host: ".", stock: "rb-#"},
		{host: "123", stock: "123-rb-#"},
		{host: "10.0.0.1", stock: "10.0.0.1-rb-#"},
		{host: "a_b.5.", stock: "a-b.5-rb-#"},
		{host: "訂單.DEFAULT-GROUP.public.nacos", stock: "rb-#.default-group.public.nacos"},
		{host: "a__b- c.x.nacos", stock: "a-b-c-rb-#.x.nacos"},
		{host: long + ".x.nacos", stock: long[:43] + "-rb-#.x.nacos"},
		{host: long + "._", stock: long[:63] + ".rb-#"},
		{host: strings.Repeat(long[:60]+".", 5) + "nacos", stock: long[:43] + "-rb-#" + strings.Repeat("."+long[:60], 3) + ".nacos"},
		{host: "web-rb-0123456789abcdef.x", stock: "web-rb-0123456789abcdef-rb-#.x", higress: "web-rb-0123456789abcdef-rb-#.x"},
		{host: "RB-0123456789ABCDEF.x", stock: "rb-0123456789abcdef-rb-#.x", higress: "RB-0123456789ABCDEF-rb-#.x"},
		{host: "herb-0123456789abcdef.x"},
		{host: "a/b.g.nacos", stock: "a-b-rb-#.g.nacos", higress: "a-b-rb-#.g.nacos"},
		{host: "a\xff:c.g.nacos", stock: "a-c-rb-#.g.nacos", higress: "a-:c-rb-#.g.nacos"},
	}
	check := func(d istio.Dialect, host, pattern string) {
		got := d.Host(host)
		if pattern == "" {
			if got != host {
				t.Errorf("%s: %q became %q", d, host, got)
			}
			return
		}
		re := "^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), "#", "[0-9a-f]{16}") + "$"
		if !regexp.MustCompile(re).MatchString(got) {
			t.Errorf("%s: %q became %q, want %s", d, host, got, pattern)
		}
	}
	for _, test := range tests {
		check(istio.Stock, test.host, test.stock)
		check(istio.Higress("ns"), test.host, test.higress)
	}
	// The one that the documentation of Host shows. It is part of users' routes: it never changes.
	if got := istio.Stock.Host("svc_a.DEFAULT-GROUP.public.nacos"); got != "svc-a-rb-f9fbe5f416beed96.default-group.public.nacos" {
		t.Errorf("the documented example is now %q", got)
	}
	// The spelling that the first registry happens to use does not decide the name.
	if a, b := istio.Stock.Host("Svc_A.x"), istio.Stock.Host("svc_a.X"); a != b {
		t.Errorf("Svc_A.x and svc_a.X became %q and %q", a, b)
	}
}

// FuzzHost holds that every name becomes one that the reader takes, and that no two names become one.
func FuzzHost(f *testing.F) {
	f.Add("svc_a.x.nacos", "svc-a.x.nacos")
	f.Add("a/b", "a-b")
	f.Add("..", ".")
	f.Add("\xff", "\xfe")
	f.Add("10.0.0.1", strings.Repeat("a.", 200))
	f.Add(strings.Repeat("b", 64)+".c", "É_.x")
	f.Add("*", "a_b.c.d.e."+strings.Repeat("f", 250))
	lower := func(s string) string {
		return strings.Map(func(r rune) rune {
			if 'A' <= r && r <= 'Z' {
				return r + 'a' - 'A'
			}
			return r
		}, s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, d := range []istio.Dialect{istio.Stock, istio.Higress("ns")} {
			hosts := []string{d.Host(a), d.Host(b), d.Host(d.Host(a)), d.Host("x" + a), d.Host(a + "."), d.Host(strings.ToValidUTF8(a, "-"))}
			from := []string{a, b, d.Host(a), "x" + a, a + ".", strings.ToValidUTF8(a, "-")}
			for i, h := range hosts {
				s := mcp.Service{Host: from[i], Port: 80, Protocol: mcp.HTTP}
				o := d.Render(s)[0]
				if err := d.Check(o); err != nil && (d == istio.Stock || from[i] != "") {
					t.Errorf("%s: host %q: %v", d, from[i], err)
				}
				if entry := o.Spec.(*networking.ServiceEntry); entry.Hosts[0] != h || o.Name != h {
					t.Errorf("%s: host %q became %q, resource %q", d, h, entry.Hosts[0], o.Name)
				}
				if d == istio.Stock && len(h) > 253 && h != from[i] {
					t.Errorf("%q became %q, which is too long for a lookup", from[i], h)
				}
				for j := range i {
					if lower(h) == lower(hosts[j]) && lower(from[i]) != lower(from[j]) {
						t.Errorf("%s: %q and %q both became %q", d, from[i], from[j], h)
					}
				}
			}
		}
	})
}
