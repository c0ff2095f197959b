package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func bridge(name, registries string) string {
	return "apiVersion: networking.higress.io/v1\nkind: McpBridge\n" +
		"metadata: {name: " + name + ", namespace: higress-system}\nspec:\n  registries:\n" + registries
}

func TestRegbridge(t *testing.T) {
	began := time.Now()
	b := StartRegbridge(t, RegbridgeOptions{
		Config: map[string]string{"a.yaml": bridge("a", "  - {type: static, name: web, domain: \"127.0.0.2:80\", port: 80}\n")},
	})
	t.Logf("regbridge built and serving after %v", time.Since(began))
	b.WaitReady(30 * time.Second)
	lists := func(host string, want bool) {
		t.Helper()
		Eventually(t, 30*time.Second, func() error {
			page, err := b.Get("/debug/registryz")
			if err == nil && strings.Contains(page, host) != want {
				err = fmt.Errorf("/debug/registryz lists %s: %v, want %v, in %s", host, !want, want, page)
			}
			return err
		})
	}
	lists("web.static", true)
	b.WriteConfig("b.yaml", bridge("b", "  - {type: static, name: more, domain: \"127.0.0.3:80\", port: 80}\n"))
	lists("more.static", true)
	b.RemoveConfig("b.yaml")
	lists("more.static", false)

	xds, admin := b.XDS, b.Admin
	began = time.Now()
	b.Restart()
	t.Logf("regbridge serving again after %v", time.Since(began))
	if b.XDS != xds || b.Admin != admin {
		t.Errorf("restarted at %s and %s, before %s and %s", b.XDS, b.Admin, xds, admin)
	}
	lists("web.static", true)
	if stdout, stderr, err := b.Run("version"); err != nil || stdout == "" {
		t.Errorf("regbridge version: %q, %q, %v", stdout, stderr, err)
	}
	b.Pause() // the end of the test must cope
}

func TestRegbridgeStop(t *testing.T) {
	b := StartRegbridge(t, RegbridgeOptions{})
	b.Stop()
	if _, err := b.Get("/livez"); err == nil {
		t.Error("a stopped process answers")
	}
	if got := failures(t, func(tb testing.TB) {
		tb.Helper()
		again := &Regbridge{Process: &Process{tb: tb, name: "regbridge", current: b.run()}}
		again.Stop()
	}); !strings.Contains(got, "ended before") {
		t.Errorf("stopping what has ended says %q", got)
	}
}

// A build that comes later, of changed source, must not exchange the program under a test's feet.
func TestBuildProgram(t *testing.T) {
	first := buildProgram(t, "./test/servers/fetch")
	second := buildProgram(t, "./test/servers/fetch")
	if first == second || filepath.Base(first) != "fetch" {
		t.Errorf("programs %s and %s", first, second)
	}
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(first); err != nil || info.Mode()&0o100 == 0 {
		t.Errorf("the first program: %v, %v", info, err)
	}
	if got := failures(t, func(tb testing.TB) { tb.Helper(); buildProgram(tb, "./no/such") }); !strings.Contains(got, "no/such") {
		t.Errorf("a build that fails says %q", got)
	}
	copied := filepath.Join(t.TempDir(), "copy")
	if err := copyFile(first, copied); err != nil {
		t.Fatal(err)
	}
	if err := copyFile(first, copied); !errors.Is(err, os.ErrExist) {
		t.Errorf("copying over a program: %v", err)
	}
}
