package nacos

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
)

func TestNew(t *testing.T) {
	yes := true
	const partly, wholly = "partly: ", "wholly: "
	for name, c := range map[string]struct {
		edit func(*registry.Entry)
		want []string // field errors: whether a part is used, path, and words of the message
	}{
		"good":      {func(*registry.Entry) {}, nil},
		"two":       {func(e *registry.Entry) { e.Domain = "nacos-1, nacos-2:8849 ,[::1]:8848" }, nil},
		"no domain": {func(e *registry.Entry) { e.Domain = " " }, []string{wholly + "domain: is empty"}},
		"bad domain": {
			func(e *registry.Entry) { e.Domain = "nacos:hunter2@10.0.0.1" }, []string{partly + "domain[0]: holds a user name or password"},
		},
		"partly bad": {func(e *registry.Entry) { e.Domain = "10.0.0.1,http://nacos" }, []string{partly + "domain[1]: \"http://nacos\" is a URL"}},
		"port":       {func(e *registry.Entry) { e.Port = 65536 }, []string{wholly + "port: is 65536"}},
		"no groups":  {func(e *registry.Entry) { e.NacosGroups = nil }, []string{partly + "nacosGroups: is empty"}},
		"blank groups": {
			func(e *registry.Entry) { e.NacosGroups = []string{"", "  "} }, []string{partly + "nacosGroups: is empty, so only DEFAULT_GROUP is read"},
		},
		"address server":                   {func(e *registry.Entry) { e.Domain, e.NacosAddressServer = "", "http://directory:8080" }, nil},
		"address server without a scheme":  {func(e *registry.Entry) { e.Domain, e.NacosAddressServer = "", "directory:8080" }, nil},
		"bad address server beside domain": {func(e *registry.Entry) { e.NacosAddressServer = "ftp://x" }, []string{partly + "nacosAddressServer: is no http"}},
		"bad address server alone": {
			func(e *registry.Entry) { e.Domain, e.NacosAddressServer = "", "http://nacos:hunter2@x" },
			[]string{wholly + "nacosAddressServer: holds a user name or password"},
		},
		"password in the address server, escaped": {
			func(e *registry.Entry) { e.Domain, e.NacosAddressServer = "", "http://nacos:hunter2%40x" }, []string{wholly + "nacosAddressServer: is no http"},
		},
		"timeout":         {func(e *registry.Entry) { e.NacosTimeout = -1 }, []string{partly + "nacosTimeout: is -1, and 5s is used"}},
		"key alone":       {func(e *registry.Entry) { e.NacosAccessKey = "LTAI" }, []string{partly + "nacosAccessKey: needs nacosSecretKey"}},
		"secret alone":    {func(e *registry.Entry) { e.NacosSecretKey = "hunter2" }, []string{partly + "nacosAccessKey: needs nacosSecretKey"}},
		"MCP servers":     {func(e *registry.Entry) { e.EnableMCPServer = &yes }, []string{partly + "enableMCPServer: is not supported yet"}},
		"several at once": {func(e *registry.Entry) { e.Domain, e.NacosGroups = "", nil }, []string{wholly + "domain: ", partly + "nacosGroups: "}},
	} {
		for typ, newOne := range map[string]func(registry.Entry, registry.Env) (registry.Registry, error){"nacos": NewHTTP, "nacos2": NewGRPC} {
			e := registry.Entry{Type: typ, Name: "test", Domain: "10.0.0.1", NacosGroups: []string{"G"}}
			c.edit(&e)
			env := (&httpFake{t: t}).env()
			reg, err := newOne(e, env)
			var got []string
			usable := true
			for _, problem := range registry.FieldErrors(err) {
				prefix := partly
				if !problem.Partial {
					prefix, usable = wholly, false
				}
				got = append(got, prefix+problem.Error())
			}
			if !slices.EqualFunc(got, c.want, strings.HasPrefix) {
				t.Errorf("%s %s: got %q, want %q", typ, name, got, c.want)
			}
			if name != "bad domain" && (reg != nil) != usable || name == "bad domain" && reg != nil {
				t.Errorf("%s %s: the registry is %v", typ, name, reg)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s %s: the error repeats a password: %v", typ, name, err)
			}
			if strings.Contains(fmt.Sprintf("%v %+v", reg, reg), "hunter2") && name != "bad domain" {
				t.Errorf("%s %s: the registry prints a secret", typ, name)
			}
		}
	}
	if reg, err := NewHTTP(registry.Entry{Domain: "a"}, registry.Env{}); reg != nil || err == nil {
		t.Error("an empty Env was accepted")
	}
}

func TestSettings(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*registry.Entry)
		ok   func(*settings) bool
	}{
		"defaults": {func(*registry.Entry) {}, func(s *settings) bool {
			return s.interval == 30*time.Second && s.timeout == 5*time.Second && s.tenant == "public" && s.shown == "public" &&
				s.servers[0].String() == "10.0.0.1:8848" && slices.Equal(s.groups, []string{"A", "B"}) && s.directory == nil
		}},
		"port": {func(e *registry.Entry) { e.Port = 8849 }, func(s *settings) bool { return s.servers[0].Port == 8849 && s.port == 8849 }},
		"intervals": {
			func(e *registry.Entry) { e.NacosRefreshInterval, e.RefreshInterval = 20e9, 10e9 },
			func(s *settings) bool { return s.interval == 10*time.Second },
		},
		"nacosRefreshInterval": {func(e *registry.Entry) { e.NacosRefreshInterval = 20e9 }, func(s *settings) bool { return s.interval == 20*time.Second }},
		"timeout":              {func(e *registry.Entry) { e.NacosTimeout = 1500 }, func(s *settings) bool { return s.timeout == 1500*time.Millisecond }},
		"endless timeout":      {func(e *registry.Entry) { e.NacosTimeout = 1 << 62 }, func(s *settings) bool { return s.timeout == time.Minute }},
		"namespace": {
			func(e *registry.Entry) { e.NacosNamespaceId = " id " },
			func(s *settings) bool { return s.tenant == "id" && s.shown == "id" },
		},
		"namespace in host names alone": {
			func(e *registry.Entry) { e.NacosNamespace = "team" },
			func(s *settings) bool { return s.tenant == "public" && s.shown == "team" },
		},
	} {
		e := registry.Entry{Domain: "10.0.0.1", NacosGroups: []string{"B", "A", " B "}}
		c.edit(&e)
		s, err := newSettings(e, (&httpFake{t: t}).env())
		if err != nil || !c.ok(s) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}
