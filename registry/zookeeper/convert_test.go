package zookeeper

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/regbridge/regbridge/labels"
	"github.com/regbridge/regbridge/registry"
)

var update = flag.Bool("update", false, "write the golden files anew")

// equalSets lets cmp compare label sets.
var equalSets = cmp.Comparer(func(a, b labels.Set) bool { return a == b })

// recording is a recorded ZooKeeper: data by path.
type recording map[string]string

func readRecording(t testing.TB, file string) recording {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := recording{}
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var n struct{ Path, Data string }
		if err := json.Unmarshal(s.Bytes(), &n); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		out[n.Path] = n.Data
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

func recordings(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*/*.jsonl")
	if err != nil || len(files) == 0 {
		t.Fatal("no recorded trees", err)
	}
	return files
}

// children gives the names of a path's children, sorted.
func (tr recording) children(p string) []string {
	var out []string
	for k := range tr {
		if path.Dir(k) == p && k != "/" {
			out = append(out, path.Base(k))
		}
	}
	slices.Sort(out)
	return out
}

// services reads a whole tree, as the adapter does, but without its connection. withApplications false leaves out what
// registered at the application's level.
func (tr recording) services(t testing.TB, withApplications bool) []registry.Service {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Error(err)
		}
	}
	var out []registry.Service
	applications := map[string][]node{}
	for _, root := range []string{"/services", "/myroot"} {
		for _, name := range tr.children(root) {
			var nodes []node
			for _, child := range tr.children(path.Join(root, name)) {
				n, err := decodeNode([]byte(tr[path.Join(root, name, child)]))
				must(err)
				nodes = append(nodes, n)
			}
			applications[name] = nodes
			out = append(out, rootService(root, name, nodes))
		}
	}
	all := map[string][]exported{} // by interface
	if withApplications {
		all = tr.exported(t, applications)
	}
	for _, folder := range tr.children("/dubbo") {
		if folder == "config" || folder == "mapping" || folder == "metadata" {
			continue
		}
		iface, err := url.QueryUnescape(folder)
		must(err)
		var providers []provider
		for _, child := range tr.children(path.Join("/dubbo", folder, "providers")) {
			p, err := decodeProvider(iface, child)
			must(err)
			providers = append(providers, p)
		}
		var overrides []override
		for _, child := range tr.children(path.Join("/dubbo", folder, "configurators")) {
			o, err := decodeOverride(iface, child)
			must(err)
			overrides = append(overrides, o)
		}
		out = append(out, interfaceServices(iface, providers, overrides, all[iface])...)
		delete(all, iface)
	}
	for iface, e := range all {
		out = append(out, interfaceServices(iface, nil, nil, e)...)
	}
	slices.SortFunc(out, func(a, b registry.Service) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// exported gives what applications provide: by the metadata of the revision; else by the mapping and the definitions.
func (tr recording) exported(t testing.TB, applications map[string][]node) map[string][]exported {
	t.Helper()
	out := map[string][]exported{}
	for app, nodes := range applications {
		for _, n := range nodes {
			if !n.dubbo {
				continue
			}
			var of []export
			if data := tr[path.Join("/dubbo/metadata", app, n.revision)]; n.remoteMetadata && n.revision != "" && data != "" {
				var err error
				if of, err = decodeMetadata([]byte(data)); err != nil {
					t.Error(err)
				}
			} else {
				for p, data := range tr {
					if strings.HasSuffix(p, "/provider/"+app) && strings.HasPrefix(p, "/dubbo/metadata/") {
						k, err := decodeDefinition([]byte(data))
						if err != nil {
							t.Error(err)
						}
						if slices.Contains(decodeMapping([]byte(tr["/dubbo/mapping/"+k.iface])), app) ||
							tr["/dubbo/config/mapping/"+k.iface+"/"+app] != "" {
							of = append(of, export{key: k})
						}
					}
				}
			}
			for _, e := range exports(n, of) {
				out[e.key.iface] = append(out[e.key.iface], e)
			}
		}
	}
	return out
}

// TestRecordedTrees reads what real Dubbo and Spring Cloud applications wrote.
func TestRecordedTrees(t *testing.T) {
	for _, file := range recordings(t) {
		t.Run(filepath.Base(filepath.Dir(file))+"/"+filepath.Base(file), func(t *testing.T) {
			var b strings.Builder
			for _, s := range readRecording(t, file).services(t, true) {
				fmt.Fprintf(&b, "%s\n  host %s\n", s.ID, s.Host)
				for _, i := range s.Instances {
					fmt.Fprintf(&b, "  %s\n", show(i))
					for k, v := range i.Metadata.All() {
						fmt.Fprintf(&b, "    %s=%s\n", k, v)
					}
				}
			}
			golden := strings.TrimSuffix(file, ".jsonl") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), b.String()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// show gives an instance in one line, without its labels.
func show(i registry.Instance) string {
	s := fmt.Sprintf("%s %s:%d weight %v", i.Protocol, i.Address, i.Port, i.Weight)
	if i.Locality != (registry.Locality{}) {
		s += " in " + i.Locality.String()
	}
	if i.Disabled {
		s += " disabled"
	}
	if i.Unhealthy {
		s += " unhealthy"
	}
	if i.Reason != "" {
		s += ": " + i.Reason
	}
	return strings.TrimSpace(s)
}

func showAll(services []registry.Service) string {
	var b strings.Builder
	for _, s := range services {
		fmt.Fprintln(&b, s.ID)
		for _, i := range s.Instances {
			fmt.Fprintln(&b, "  "+show(i))
		}
	}
	return b.String()
}

// TestBothLevelsCountOnce: a provider that registered at both levels has one instance for each of its ports under its
// interface, with the labels of the interface's level, whatever the application's level adds.
func TestBothLevelsCountOnce(t *testing.T) {
	for _, file := range recordings(t) {
		tr := readRecording(t, file)
		if len(tr.children("/services")) == 0 || len(tr.children("/dubbo")) < 4 { // config, mapping, metadata and an interface
			continue
		}
		if diff := cmp.Diff(tr.services(t, false), tr.services(t, true), equalSets); diff != "" {
			t.Errorf("%s: -without +with the application's level:\n%s", file, diff)
		}
	}
}

// checkInstance is what must hold of any instance, whatever it was read from.
func checkInstance(t *testing.T, i registry.Instance) {
	t.Helper()
	if checkAddress(i.Address) != nil || i.Port < 1 || i.Port > 65535 || !(i.Weight >= 0) || i.Weight > 1e300 {
		t.Errorf("%+v", i)
	}
	if (i.Disabled || i.Unhealthy) != (i.Reason != "") {
		t.Errorf("%+v: disabled or unhealthy, and a reason, come together", i)
	}
}

// checkError is what must hold of any error: it is one readable line of a bounded length.
func checkError(t *testing.T, err error) {
	t.Helper()
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			checkError(t, e)
		}
		return
	}
	if len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\n\x00") {
		t.Errorf("error %q", err)
	}
}

func FuzzDecodeNode(f *testing.F) {
	for _, file := range recordings(f) {
		for p, data := range readRecording(f, file) {
			if strings.HasPrefix(p, "/services/") || strings.HasPrefix(p, "/myroot/") {
				f.Add([]byte(data))
			}
		}
	}
	f.Add([]byte(`{"address":"::1%eth0","port":"1e3","sslPort":8443,"enabled":false,"payload":["x",{"metadata":{"weight":"NaN"}}]}`))
	f.Add([]byte(`{"address":"a","port":70000,"payload":{"@class":"Dubbo","metadata":{"dubbo.endpoints":"[{},1,{\"port\":\"1\"}]"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := decodeNode(data)
		again, _ := decodeNode(data)
		if diff := cmp.Diff(n, again, equalSets, cmp.AllowUnexported(node{})); diff != "" {
			t.Errorf("read twice: %s", diff)
		}
		if err != nil {
			checkError(t, err)
		}
		if len(n.instances) == 0 && err == nil || len(n.instances) > 1 && !n.dubbo {
			t.Errorf("%d instances, %v", len(n.instances), err)
		}
		for _, i := range n.instances {
			checkInstance(t, i)
			if _, ok := i.Metadata.Get(endpointsKey); ok {
				t.Error("has a label that is none")
			}
		}
		s := rootService("/services", "a", []node{n, n})
		if len(s.Instances) > len(n.instances) || len(n.instances) > 0 && len(s.Instances) == 0 {
			t.Errorf("twice the same node gives %d instances of %d", len(s.Instances), len(n.instances))
		}
	})
}

func FuzzDecodeMetadata(f *testing.F) {
	for _, file := range recordings(f) {
		for p, data := range readRecording(f, file) {
			if strings.HasPrefix(p, "/dubbo/metadata/") || strings.HasPrefix(p, "/dubbo/mapping") {
				f.Add([]byte(data))
			}
		}
	}
	f.Add([]byte(`{"services":{"a":null,"b":{"name":"i","port":"1","params":{"weight":"-1","disabled":true}}},"parameters":{"interface":"i"}}`))
	n, err := decodeNode([]byte(`{"address":"10.0.0.1","port":1,"payload":{"metadata":{"dubbo.endpoints":"[{\"port\":1,\"protocol\":\"dubbo\"}]"}}}`))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		of, err := decodeMetadata(data)
		again, _ := decodeMetadata(data)
		if !slices.Equal(of, again) {
			t.Errorf("read twice: %v and %v", of, again)
		}
		if err != nil {
			checkError(t, err)
		}
		all := exports(n, of)
		for _, e := range all {
			checkInstance(t, e.instance)
			if e.key.iface == "" || e.key.internal() {
				t.Errorf("exported %+v", e.key)
			}
			if got := interfaceServices(e.key.iface, nil, nil, all); len(got) == 0 {
				t.Errorf("%+v is no service", e.key)
			}
		}
		if k, err := decodeDefinition(data); err != nil {
			checkError(t, err)
		} else if k.iface == "" || k.version == "0.0.0" {
			t.Errorf("definition of %+v", k)
		}
		if apps := decodeMapping(data); !slices.IsSorted(apps) || slices.Contains(apps, "") {
			t.Errorf("mapped to %q", apps)
		}
	})
}
