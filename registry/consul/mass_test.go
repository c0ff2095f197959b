package consul

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// TestMassLossIsOneListing has most services go at once. However many there are, one call says so: only then does whoever
// listens see it as one loss.
func TestMassLossIsOneListing(t *testing.T) {
	t.Parallel()
	const n, left = 300, 30
	name := func(i int) string { return fmt.Sprintf("service-%03d", i) }
	for what, p := range map[string]policy{
		"a token that reads all": readAll,
		"a token that does not":  {services: func(n string) bool { return n != "consul" }, nodes: true},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.edit(func() { f.policies[goodToken] = p })
			for i := range n {
				f.set(name(i), at(fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)))
			}
			rec := runWith(t, f.entry(), testEnv(t, good))
			s := wait(t, rec, "all", func(s registrytest.State) bool { return s.Loaded && len(s.Services) >= n })
			before, listed := len(s.Events), len(s.Services)
			f.edit(func() {
				f.index++
				f.catalog = f.index
				for i := left; i < n; i++ {
					delete(f.services, name(i))
				}
				f.services["new"] = &fakeService{index: f.index, instances: f.services[name(0)].instances}
				f.wake()
			})
			s = wait(t, rec, "the loss, and a new service", func(s registrytest.State) bool {
				return len(s.Services) == listed-(n-left)+1 && s.Services["new"].ID != ""
			})
			var shorter []int
			for _, e := range s.Events[before:] {
				switch {
				case e.Kind == registrytest.Delete:
					t.Errorf("%q was deleted by itself", e.IDs)
				case e.Kind == registrytest.Synced && len(e.IDs) < listed:
					shorter = append(shorter, len(e.IDs))
				}
			}
			if rest := listed - (n - left); len(shorter) == 0 || shorter[0] < rest || shorter[0] > rest+1 {
				t.Errorf("listings named %v services, want %d at once, or one more", shorter, rest)
			}
		})
	}
}

// TestAllServicesAreReplaced has the only service go as another one comes. In between nothing may say that there is none.
func TestAllServicesAreReplaced(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	tagged := fakeInstance{node: "n", nodeAddress: "10.0.0.1", Instance: at("10.0.0.1"), tags: []string{"blue"}}
	f.setInstances("old", tagged)
	e := f.entry()
	e.ConsulServiceTag = "blue"
	rec := runWith(t, e, testEnv(t, good))
	wait(t, rec, "the old service", loaded("old"))
	f.edit(func() {
		f.index++
		f.catalog = f.index
		delete(f.services, "old")
		f.services["new"] = &fakeService{index: f.index, instances: []fakeInstance{tagged}}
		f.wake()
	})
	for _, e := range wait(t, rec, "the new service", loaded("new")).Events {
		if e.Kind == registrytest.Synced && len(e.IDs) == 0 {
			t.Error("a listing named nothing")
		}
	}
}

// TestAllServicesChangeAtOnce has 10,000 services with 10 instances each on 1,000 nodes lose most of their instances, and
// then most services go. Comparing each service with each other, and its nodes with theirs, would take minutes.
func TestAllServicesChangeAtOnce(t *testing.T) {
	t.Parallel()
	const n, left, each, nodes, patience = 10_000, 1_000, 10, 1_000, 20 * time.Second
	r, err := New(registry.Entry{Domain: "127.0.0.1"}, testEnv(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	rec := registrytest.NewRecorder(context.Background())
	c := r.(*consul)
	s, err := newSession(c, c.servers[0], &memory{known: map[string]bool{}, whole: map[string]bool{}}, rec)
	if err != nil {
		t.Fatal(err)
	}
	name := func(i int) string { return fmt.Sprintf("service-%05d", i) }
	index := uint64(0)
	list := func(n int) {
		index++
		names := map[string]bool{"consul": true}
		for i := range n {
			names[name(i)] = true
		}
		s.listed(names, meta{index: index}, index-1, true)
		s.report()
	}
	read := func(instances int) {
		index++
		at := 0
		for _, sv := range s.services {
			at++
			a := answer{meta: meta{index: index}, all: instances, datacenter: "dc1"}
			for j := range instances {
				a.nodes = append(a.nodes, fmt.Sprintf("node-%04d", (at*7+j*13)%nodes))
			}
			slices.Sort(a.nodes)
			s.answered(sv, a)
			s.report()
		}
	}
	list(n)
	read(each)
	begun := time.Now()
	read(1)
	if took := time.Since(begun); took > patience {
		t.Errorf("that each service lost instances took %v", took)
	} else {
		t.Logf("that each service lost instances took %v", took)
	}
	begun = time.Now()
	list(left)
	if took := time.Since(begun); took > patience {
		t.Errorf("that most services are gone took %v", took)
	} else {
		t.Logf("that most services are gone took %v", took)
	}
	events := rec.State().Events
	if last := events[len(events)-1]; last.Kind != registrytest.Synced || len(last.IDs) != left+1 {
		t.Errorf("the last call was %s with %d names", last.Kind, len(last.IDs))
	}
	if len(s.services) != left+1 {
		t.Errorf("%d services are still read", len(s.services))
	}
}

// TestEndlessAnswers has a hostile agent answer without an end. Little of it is taken, and nothing is lost.
func TestEndlessAnswers(t *testing.T) {
	t.Parallel()
	same := func(text string) func(int) string {
		text = strings.Repeat(text, 1000)
		return func(int) string { return text }
	}
	const web = "/v1/health/service/web"
	for name, c := range map[string]struct {
		path  string
		body  endless
		words []string
		most  int // bytes, without what the way holds back
	}{
		"empty instances": {web, endless{first: "[", more: same("{},")}, []string{"instance 0 has no node"}, 1 << 20},
		"instances":       {web, endless{first: "[", more: same(`{"Node":{},"Service":{}},`)}, []string{"more than 100000 instances"}, 4 << 20},
		"checks of an instance": {
			web, endless{first: `[{"Node":{},"Service":{},"Checks":[`, more: same("{},")}, []string{"longer than we take"}, 2 << 20,
		},
		"an address": {web, endless{first: `[{"Node":{"Address":"`, more: same("10.")}, []string{"longer than we take"}, 2 << 20},
		"blanks":     {web, endless{first: "[", more: same("\n")}, []string{"longer than we take"}, 2 << 20},
		"services": {
			catalogPath, endless{first: `{"consul":[]`, more: func(n int) string { return fmt.Sprintf(`,"%x":[]`, n) }},
			[]string{"more than 200000 services"}, 4 << 20,
		},
		"tags":   {catalogPath, endless{first: `{"consul":["a"`, more: same(`,""`)}, []string{"longer than we take"}, 20 << 20},
		"a name": {catalogPath, endless{first: `{"`, more: same("consul")}, []string{"longer than we take"}, 20 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.set("web", at("10.0.0.1"))
			r, err := New(f.entry(), testEnv(t, good))
			if err != nil {
				t.Fatal(err)
			}
			r.(*consul).timeout = time.Minute // so that no lack of time ends an answer
			rec := runRegistry(t, r)
			wait(t, rec, "all", loaded("consul", "web"))
			f.await("queries that wait", func() bool { return f.waiting == 3 })
			f.edit(func() {
				f.endless = map[string]endless{c.path: c.body}
				f.index++
				f.catalog, f.services["web"].index = f.index, f.index
				f.wake()
			})
			failing := ""
			if c.path == web {
				failing = "web"
			}
			wait(t, rec, "a clear message", failed(failing, c.words...))
			noRemoval(t, rec)
			f.edit(func() {
				f.endless = nil
				f.wake()
			})
			wait(t, rec, "recovery", func(s registrytest.State) bool {
				return loaded("consul", "web")(s) && len(s.Gaps) == 0
			})
			noRemoval(t, rec)
			f.await("the end of such an answer", func() bool { return f.longest > 0 })
			f.edit(func() {
				if most := c.most + 8<<20; f.longest > most {
					t.Errorf("%d bytes were taken, more than %d", f.longest, most)
				}
			})
		})
	}
}

// TestEndlessChecks has a hostile agent list checks without an end. Changes are noticed late then, and nothing else.
func TestEndlessChecks(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	for i := range watches + 10 {
		f.set(fmt.Sprintf("service-%d", i), at("10.0.0.1"))
	}
	text := strings.Repeat("{},", 1000)
	f.edit(func() {
		f.endless = map[string]endless{"/v1/health/state/any": {first: "[", more: func(int) string { return text }}}
	})
	told := make(lines, 100)
	env := testEnv(t, good)
	env.Logger = slog.New(slog.NewTextHandler(told, nil))
	rec := runWith(t, f.entry(), env)
	timeout := time.After(limit)
	for found := false; !found; {
		select {
		case line := <-told:
			found = strings.Contains(line, "noticed late") && strings.Contains(line, "check 0 has no node")
		case <-timeout:
			t.Fatal("waited in vain for a message about checks")
		}
	}
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("Fail %q: %v", e.IDs, e.Err)
		}
	}
}

// lines takes a log line by line, as far as there is room.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	select {
	case l <- string(p):
	default:
	}
	return len(p), nil
}
