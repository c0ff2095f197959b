// Package regbridge_test holds what is true of the whole tree.
package regbridge_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/regbridge/regbridge/"

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports,Deps", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestImportsGoOneWay holds the directions of docs/architecture.md: cmd -> bridge -> {registry, mcp} -> labels.
func TestImportsGoOneWay(t *testing.T) {
	// The first rule whose prefix a package has is the one that counts: what of this module it may import.
	rules := []struct {
		prefix string
		may    []string
	}{
		{"cmd/", []string{"bridge", "mcp", "registry", "labels", "examples"}},
		{"bridge/admin", []string{"bridge", "mcp", "labels"}},
		{"bridge/source", []string{"bridge", "registry", "regularfile"}},
		{"bridge", []string{"registry", "mcp", "labels", "regularfile"}},
		{"registry/builtin", []string{"registry"}},
		{"registry/registrytest", []string{"registry", "labels"}},
		{"registry/", []string{"registry", "labels"}},
		{"registry", []string{"labels"}},
		{"mcp/xds", []string{"regularfile"}},
		{"mcp/istio", []string{"mcp", "labels"}},
		{"mcp", []string{"labels"}},
		{"labels", nil},
		{"regularfile", nil},
		{"test/", []string{"test"}},
		{"examples", nil},
	}
	for _, p := range packages(t) {
		path := strings.TrimPrefix(p.ImportPath+"/", module)
		path = strings.TrimSuffix(path, "/")
		i := slices.IndexFunc(rules, func(r struct {
			prefix string
			may    []string
		}) bool {
			return strings.HasPrefix(path+"/", r.prefix)
		})
		if path == "" {
			continue // this test
		}
		if i < 0 {
			t.Errorf("%s: no rule tells what it may import", path)
			continue
		}
		for _, imported := range p.Imports {
			ours, ok := strings.CutPrefix(imported, module)
			if !ok || strings.HasPrefix(ours, path+"/") {
				continue
			}
			if !slices.ContainsFunc(rules[i].may, func(m string) bool { return ours == m || strings.HasPrefix(ours, m+"/") }) {
				t.Errorf("%s imports %s", path, ours)
			}
		}
		if strings.HasPrefix(path, "registry/") && path != "registry/builtin" {
			for _, imported := range p.Imports {
				if ours, ok := strings.CutPrefix(imported, module+"registry/"); ok && ours != "registrytest" {
					t.Errorf("adapter %s imports %s", path, imported)
				}
			}
		}
	}
}

// TestNotLinked keeps packages out of the program that act behind its back, or are heavy for what they give.
func TestNotLinked(t *testing.T) {
	for _, p := range packages(t) {
		if p.ImportPath != module+"cmd/regbridge" {
			continue
		}
		for _, d := range p.Deps {
			for _, banned := range []string{
				"istio.io/istio", "istio.io/client-go", "k8s.io/client-go/informers", "k8s.io/client-go/dynamic/dynamicinformer",
				"github.com/hashicorp/consul/api/watch", "github.com/envoyproxy/go-control-plane/pkg/integration",
				module + "registry/registrytest", module + "test",
			} {
				if d == banned || strings.HasPrefix(d, banned+"/") {
					t.Errorf("the program links %s", d)
				}
			}
		}
		return
	}
	t.Error("cmd/regbridge was not found")
}
