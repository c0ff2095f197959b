package builtin_test

import (
	"log/slog"
	"maps"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/builtin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Each type takes a plain entry of its own, and tells which fields of an empty one are wrong.
func TestTypes(t *testing.T) {
	good := map[string]registry.Entry{
		"consul":    {Type: "consul", Name: "main", Domain: "consul.example.com", Port: 8500},
		"dns":       {Type: "dns", Name: "shop", Domain: "shop.example.com", Port: 80},
		"eureka":    {Type: "eureka", Name: "main", Domain: "eureka.example.com", Port: 8761},
		"nacos":     {Type: "nacos", Name: "old", Domain: "nacos.example.com", NacosGroups: []string{"DEFAULT_GROUP"}},
		"nacos2":    {Type: "nacos2", Name: "main", Domain: "nacos.example.com", Port: 8848, NacosGroups: []string{"DEFAULT_GROUP"}},
		"nacos3":    {Type: "nacos3", Name: "new", Domain: "nacos.example.com", NacosGroups: []string{"DEFAULT_GROUP"}},
		"static":    {Type: "static", Name: "web", Domain: "192.0.2.1:8080", Port: 80},
		"zookeeper": {Type: "zookeeper", Name: "main", Domain: "zk-0.example.com,zk-1.example.com/prod", Port: 2181},
	}
	types := builtin.Types()
	if got, want := slices.Sorted(maps.Keys(types)), slices.Sorted(maps.Keys(good)); !slices.Equal(got, want) {
		t.Fatalf("types %q, want %q", got, want)
	}
	for name, construct := range types {
		env := registry.Env{
			Logger: slog.New(slog.DiscardHandler), Observe: func(string, time.Duration, error) {},
			Budgets: &registry.Budgets{},
		}
		if r, err := construct(good[name], env); r == nil || err != nil {
			t.Errorf("%s: %v", name, err)
		}
		r, err := construct(registry.Entry{Type: name, Name: "empty"}, env)
		fields := registry.FieldErrors(err)
		if r != nil || !slices.ContainsFunc(fields, func(f *registry.FieldError) bool { return f.Path == "domain" && !f.Partial }) {
			t.Errorf("%s without a domain: %v, %v", name, r, err)
		}
	}
}
