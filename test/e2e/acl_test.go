package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

const readAll = `service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }`

// TestToken takes regbridge's token away, narrows it, and gives it another one. Nothing may leave the mesh for that.
func TestToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.startConsul(t, harness.ConsulOptions{ACL: true},
		"refreshInterval: 1s, guard: {settle: 3s, hold: 2s}, authSecretName: consul")
	t.Run("no Secret", func(t *testing.T) {
		w.inState(t, "c", "blocked")
		if s, err := w.status("c"); err != nil || !strings.Contains(s.LastError, "prod/consul") {
			t.Errorf("the missing Secret is not named: %+v, %v", s, err)
		}
	})
	w.consul.CreatePolicy("all", readAll)
	w.consul.CreatePolicy("some", `service "open" { policy = "read" } node_prefix "" { policy = "read" }`)
	token, accessor := w.consul.CreateToken("all")
	use := func(token string) { w.bridge.WriteSecret("prod", "consul", map[string]string{"consulToken": token}) }
	use(token)
	w.inState(t, "c", "synced")
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})
	open, closed := w.start(t, "open", "open-1"), w.start(t, "closed", "closed-1")
	kept := func() error {
		if err := w.has(inConsul("open"), open.Address()); err != nil {
			return err
		}
		return w.has(inConsul("closed"), closed.Address())
	}
	w.serves(t, inConsul("open"), open)
	w.serves(t, inConsul("closed"), closed)

	t.Run("revoked", func(t *testing.T) {
		flow := w.traffic(t, inConsul("closed"))
		w.consul.DeleteToken(accessor)
		w.inState(t, "c", "failing")
		harness.Always(t, 6*time.Second, kept) // longer than settle and hold
		s, err := w.status("c")
		if err != nil || !strings.Contains(s.LastError, "403") || strings.Contains(s.LastError, token) {
			t.Errorf("a revoked token is shown as %+v, %v", s, err)
		}
		flow.end(t)
	})
	t.Run("rotated", func(t *testing.T) {
		flow := w.traffic(t, inConsul("closed"))
		token, accessor = w.consul.CreateToken("all")
		use(token)
		began := time.Now()
		w.inState(t, "c", "synced")
		t.Logf("measured: a new token in --secrets-dir to synced: %v", time.Since(began).Round(time.Millisecond))
		extra := w.start(t, "closed", "closed-2")
		w.serves(t, inConsul("closed"), closed, extra)
		w.consul.Deregister("closed-2")
		w.serves(t, inConsul("closed"), closed)
		harness.Always(t, time.Second, kept)
		flow.end(t)
	})
	t.Run("narrowed in place", func(t *testing.T) {
		flow := w.traffic(t, inConsul("closed"))
		w.narrow(t, accessor, "some")
		w.failsFor(t, "closed")
		harness.Always(t, 6*time.Second, kept)
		extra := w.start(t, "open", "open-2") // what it may still read goes on
		w.serves(t, inConsul("open"), open, extra)
		w.consul.Deregister("open-2")
		w.serves(t, inConsul("open"), open)
		w.narrow(t, accessor, "all")
		w.inState(t, "c", "synced")
		flow.end(t)
	})
	narrow, _ := w.consul.CreateToken("some")
	t.Run("replaced by a more restrictive one, by mistake", func(t *testing.T) {
		flow := w.traffic(t, inConsul("closed"))
		use(narrow)
		w.holds(t, "c", 2) // with Consul itself: as somebody else, what is missing waits for settle
		harness.Always(t, time.Second, kept)
		extra := w.start(t, "open", "open-3")
		w.serves(t, inConsul("open"), open, extra)
		w.consul.Deregister("open-3")
		w.serves(t, inConsul("open"), open)
		use(token)
		w.holds(t, "c", 0)
		harness.Always(t, 4*time.Second, kept)
		w.inState(t, "c", "synced")
		flow.end(t)
	})
	t.Run("no token at all", func(t *testing.T) { // Consul answers with an empty catalog and no error
		flow := w.traffic(t, inConsul("closed"))
		w.bridge.WriteSecret("prod", "consul", map[string]string{"consulToken": ""})
		w.inState(t, "c", "failing")
		harness.Always(t, 6*time.Second, kept)
		use(token)
		w.inState(t, "c", "synced")
		flow.end(t)
	})
	t.Run("replaced by a more restrictive one, for good", func(t *testing.T) {
		use(narrow)
		w.serves503(t, inConsul("closed"))
		w.serves(t, inConsul("open"), open)
		use(token)
	})
	t.Run("healed", func(t *testing.T) {
		w.serves(t, inConsul("open"), open)
		w.serves(t, inConsul("closed"), closed)
		w.consul.Deregister("closed-1")
		w.serves503(t, inConsul("closed"))
	})
	for _, secret := range []string{token, w.consul.Token} {
		pages := []string{w.bridge.Log()}
		for _, path := range []string{"/debug/registries", "/debug/configz", "/metrics", "/"} {
			page, err := w.bridge.Get(path)
			if err != nil {
				t.Fatal(err)
			}
			pages = append(pages, page)
		}
		if slices.ContainsFunc(pages, func(p string) bool { return strings.Contains(p, secret) }) {
			t.Error("a token is shown in a log or a page")
		}
	}
}

// narrow gives a token another policy.
func (w *world) narrow(t *testing.T, accessor, policy string) {
	t.Helper()
	w.consul.Call("PUT", "/v1/acl/token/"+accessor, map[string]any{
		"AccessorID": accessor, "Policies": []map[string]string{{"Name": policy}},
	}, nil)
}

// failsFor waits until regbridge says that it cannot read a service.
func (w *world) failsFor(t *testing.T, service string) {
	t.Helper()
	harness.Eventually(t, patience, func() error {
		s, err := w.status("c")
		if err == nil && s.FailedServices[service] == "" {
			err = fmt.Errorf("%s is not among the services that fail: %+v", service, s)
		}
		return err
	})
}
