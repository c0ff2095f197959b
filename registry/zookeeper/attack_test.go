package zookeeper

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

// TestMissingIsNotStated: while a node that is gone may come again, its service is not stated once more with it. That would
// say that it was seen.
func TestMissingIsNotStated(t *testing.T) {
	t.Parallel()
	for name, l := range map[string]layout{"spring": spring, "dubbo": dubbo} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.register(l, "order.Api", at("10.0.0.1"), at("10.0.0.2"))
			rec := run(t, f.plainEntry(), testEnv(t, nil))
			id := l.id("order.Api")
			wait(t, rec, "both", has(id, "10.0.0.1", "10.0.0.2"))
			puts := func() int {
				n := 0
				for _, e := range rec.State().Events {
					if e.Kind == registrytest.Put && e.IDs[0] == id {
						n++
					}
				}
				return n
			}
			before := puts()
			f.register(l, "order.Api", at("10.0.0.2"))
			wait(t, rec, "one", has(id, "10.0.0.2"))
			if n := puts() - before; n != 1 {
				t.Errorf("the service was stated %d times", n)
			}
		})
	}
}

// TestProviderChangesLevel has a provider end its registration at interface level, which is followed by one at application
// level, as when it is restarted in another mode.
func TestProviderChangesLevel(t *testing.T) {
	t.Parallel()
	for _, remote := range []bool{false, true} {
		t.Run(fmt.Sprintf("remote=%v", remote), func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			const iface, id = "demo.Api", "providers:demo.Api:0.0.0:"
			old := "/dubbo/demo.Api/providers/" + url.QueryEscape("dubbo://10.0.0.1:20880/demo.Api?application=shop&interface=demo.Api&side=provider")
			f.set(old, "")
			rec := run(t, f.plainEntry(), testEnv(t, nil))
			wait(t, rec, "the provider", has(id, "10.0.0.1"))
			metadata := map[string]string{"dubbo.endpoints": `[{"port":20880,"protocol":"dubbo"}]`, "dubbo.metadata.storage-type": "local"}
			f.set("/dubbo/mapping/demo.Api", "shop")
			f.set("/dubbo/metadata/demo.Api/provider/shop", `{"parameters":{"interface":"demo.Api","application":"shop"}}`)
			if remote {
				metadata["dubbo.metadata.storage-type"], metadata["dubbo.metadata.revision"] = "remote", "r1"
				f.set("/dubbo/metadata/shop/r1", `{"app":"shop","revision":"r1","services":{"demo.Api:dubbo":`+
					`{"name":"demo.Api","protocol":"dubbo","port":20880,"path":"demo.Api","params":{}}}}`)
			}
			data, err := json.Marshal(map[string]any{"name": "shop", "id": "10.0.0.1:20880", "address": "10.0.0.1", "port": 20880,
				"payload": map[string]any{"@class": "org.apache.dubbo.registry.zookeeper.ZookeeperInstance", "name": "shop", "metadata": metadata}})
			if err != nil {
				t.Fatal(err)
			}
			f.set("/services/shop/10.0.0.1:20880", string(data))
			wait(t, rec, "the application", has("/services/shop", "10.0.0.1"))
			f.remove(old)
			wait(t, rec, "the instance at application level", func(s registrytest.State) bool {
				i := s.Services[id].Instances
				_, labelled := instanceLabel(i, "side")
				return len(i) == 1 && !labelled // what only the provider's URL has
			})
			changes := 0
			for _, e := range rec.State().Events {
				if e.Kind == registrytest.Put && e.IDs[0] == id && e.Changed {
					changes++
				}
			}
			if changes != 2 { // the provider, and the instance in its place
				t.Errorf("the service changed %d times", changes)
			}
			f.remove("/services/shop/10.0.0.1:20880")
			wait(t, rec, "nobody", has(id))
		})
	}
}

// TestProviderEndsOneInterface has an application that registers at both levels, and ends one of its interfaces.
func TestProviderEndsOneInterface(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	node := func(iface string) string {
		return "/dubbo/" + iface + "/providers/" + url.QueryEscape("dubbo://10.0.0.1:20880/"+iface+"?application=shop&side=provider")
	}
	f.set(node("demo.A"), "")
	f.set(node("demo.B"), "")
	f.set("/services/shop/10.0.0.1:20880", `{"name":"shop","address":"10.0.0.1","port":20880,"payload":{"@class":`+
		`"org.apache.dubbo.registry.zookeeper.ZookeeperInstance","metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"}]"}}}`)
	rec := run(t, f.plainEntry(), testEnv(t, nil), func(z *zookeeper) { z.move = time.Hour })
	wait(t, rec, "the first", has("providers:demo.A:0.0.0:", "10.0.0.1"))
	wait(t, rec, "the second", has("providers:demo.B:0.0.0:", "10.0.0.1"))
	wait(t, rec, "the application", has("/services/shop", "10.0.0.1"))
	f.remove(node("demo.B"))
	wait(t, rec, "the end of the second", has("providers:demo.B:0.0.0:"))
}

// TestStatedAgainAfterListing: what is stated before a session's first listing is no evidence of what is there after the gap
// before it. What is there at the next listing is stated again, once.
func TestStatedAgainAfterListing(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.register(dubbo, "demo.Api", at("10.0.0.2"))
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	s := wait(t, rec, "four listings", func(s registrytest.State) bool { return listings(s) >= 4 })
	before, after, listed := 0, 0, false
	for _, e := range s.Events {
		switch {
		case e.Kind == registrytest.Synced:
			listed = true
		case e.Kind == registrytest.Put && listed:
			after++
		case e.Kind == registrytest.Put:
			before++
		}
	}
	if before != 2 || after != 2 {
		t.Errorf("two services were stated %d times before the first listing, and %d times after it", before, after)
	}
}

// listings counts those that were reported.
func listings(s registrytest.State) (n int) {
	for _, e := range s.Events {
		if e.Kind == registrytest.Synced {
			n++
		}
	}
	return n
}

func instanceLabel(i []registry.Instance, key string) (string, bool) {
	if len(i) == 0 {
		return "", false
	}
	return i[0].Metadata.Get(key)
}

// TestTwoSpellings has the folder of one interface under two names. One of them is read; the other one when that goes.
func TestTwoSpellings(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	provider := func(folder, ip string) {
		f.set("/dubbo/"+folder+"/providers/"+url.QueryEscape("dubbo://"+ip+":20880/demo.Outer$Inner?side=provider"), "")
	}
	provider("demo.Outer%24Inner", "10.0.0.1")
	warnings := newCounter()
	env := testEnv(t, nil)
	env.Logger = slog.New(warnings)
	rec := run(t, f.plainEntry(), env)
	const id = "providers:demo.Outer$Inner:0.0.0:"
	wait(t, rec, "the first", has(id, "10.0.0.1"))
	provider("demo.Outer$Inner", "10.0.0.2")
	wait(t, rec, "a warning", func(registrytest.State) bool {
		warnings.mu.Lock()
		defer warnings.mu.Unlock()
		return warnings.paths["/dubbo/demo.Outer$Inner"] == 1
	})
	f.remove("/dubbo/demo.Outer%24Inner")
	wait(t, rec, "the other one", has(id, "10.0.0.2"))
	provider("demo.Outer$Inner", "10.0.0.3")
	wait(t, rec, "a further one", has(id, "10.0.0.2", "10.0.0.3"))
}

// TestOverlongName has a node whose path is longer than any request may be.
func TestOverlongName(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.register(spring, "order", at("10.0.0.1"))
	f.set("/services/order/"+strings.Repeat("x", 200_000), "{}")
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	wait(t, rec, "the instance", has("/services/order", "10.0.0.1"))
	f.register(spring, "order", at("10.0.0.1"), at("10.0.0.2"))
	wait(t, rec, "another one", has("/services/order", "10.0.0.1", "10.0.0.2"))
	for _, e := range rec.State().Events {
		if e.Kind == registrytest.Fail {
			t.Errorf("failed: %.300v", e.Err)
		}
	}
}

// TestMetadataIsMended has remote metadata that cannot be used at first. The next session finds it mended.
func TestMetadataIsMended(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.set("/dubbo/metadata/shop/r1", "")
	f.set("/services/shop/10.0.0.1:20880", `{"name":"shop","address":"10.0.0.1","port":20880,"payload":{"@class":`+
		`"org.apache.dubbo.registry.zookeeper.ZookeeperInstance","metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"}]",`+
		`"dubbo.metadata.storage-type":"remote","dubbo.metadata.revision":"r1"}}}`)
	rec := run(t, f.plainEntry(), testEnv(t, nil))
	wait(t, rec, "the application", has("/services/shop", "10.0.0.1"))
	f.set("/dubbo/metadata/shop/r1", `{"app":"shop","revision":"r1","services":{"demo.Api:dubbo":{"name":"demo.Api","protocol":"dubbo","port":20880}}}`)
	f.cut()
	wait(t, rec, "the interface", has("providers:demo.Api:0.0.0:", "10.0.0.1"))
}
