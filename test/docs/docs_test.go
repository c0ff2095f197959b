// Package docs runs what the documentation tells a user to run: every command of the README, and every example.
package docs

import (
	"bufio"
	"bytes"

	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"
	"github.com/hashicorp/consul/api"

	"github.com/regbridge/regbridge/test/harness"
	"github.com/regbridge/regbridge/test/servers"
)

func TestMain(m *testing.M) { harness.Main(m) }

func root(t *testing.T) string {
	t.Helper()
	dir, err := servers.Root()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// block is one fenced block of a Markdown file.
type block struct {
	language, text string
}

func blocks(t *testing.T, file string) []block {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(t), file))
	if err != nil {
		t.Fatal(err)
	}
	var all []block
	for _, m := range regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		all = append(all, block{m[1], m[2]})
	}
	return all
}

// TestMakeRun does what a newcomer does first.
func TestMakeRun(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "make", "--silent", "run")
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(),
		fmt.Sprintf("REGBRIDGE_ADMIN_ADDRESS=127.0.0.1:%d", harness.FreePort(t)), fmt.Sprintf("REGBRIDGE_XDS_ADDRESS=127.0.0.1:%d", harness.FreePort(t)))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // make, go run and the daemon
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	watchdog := time.AfterFunc(5*time.Minute, stop) // a cold build takes its time
	defer watchdog.Stop()

	page, pageURL := "", regexp.MustCompile(`a page for people +(http://\S+)`)
	lines := bufio.NewScanner(out)
	for page == "" && lines.Scan() {
		if m := pageURL.FindStringSubmatch(lines.Text()); m != nil {
			page = m[1]
		}
	}
	if page == "" {
		_ = cmd.Wait()
		t.Fatalf("make run did not say where to look:\n%s", &log)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		for path, want := range map[string]string{"": "greeter", "debug/registryz": "greeter.static", "readyz": "ready"} {
			status, body, err := harness.Get(t.Context(), page+path)
			if err != nil {
				return err
			}
			if status != http.StatusOK || !strings.Contains(body, want) {
				return fmt.Errorf("/%s: %d, without %q: %s", path, status, want, body)
			}
		}
		return nil
	})
	stop()
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait() // make ends with the signal's status
}

// TestREADMECommands runs every command of the README's sh blocks, against a regbridge that serves the quickstart.
func TestREADMECommands(t *testing.T) {
	b := harness.StartRegbridge(t, harness.RegbridgeOptions{Config: map[string]string{
		"bridge.yaml": read(t, "examples/quickstart/bridge.yaml"),
	}})
	b.WaitReady(20 * time.Second)
	n := 0
	for _, bl := range blocks(t, "README.md") {
		if bl.language != "sh" {
			continue
		}
		for line := range strings.Lines(bl.text) {
			line = strings.TrimSpace(line)
			n++
			cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", strings.ReplaceAll(line, "localhost:8888", b.Admin))
			cmd.Dir = root(t)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%s: %v\n%s", line, err, out)
			}
			if len(bytes.TrimSpace(out)) == 0 {
				t.Errorf("%s prints nothing", line)
			}
		}
	}
	if n < 5 {
		t.Errorf("the README has only %d commands", n)
	}
	cmd := exec.CommandContext(t.Context(), "make", "-n", "run", "test")
	cmd.Dir = root(t)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("make run, make test: %v\n%s", err, out)
	}
}

// TestREADMEConsul follows the section "Consul into istiod" with what it prints: the McpBridge, the command, and the
// wiring, with addresses of this test.
func TestREADMEConsul(t *testing.T) {
	consul := harness.StartConsul(t, harness.ConsulOptions{})
	consul.Register(api.AgentServiceRegistration{ID: "web-1", Name: "web", Address: "127.0.0.9", Port: 8080})
	var bridge, mesh, serve string
	for _, bl := range blocks(t, "README.md") {
		switch {
		case strings.Contains(bl.text, "kind: McpBridge"):
			bridge = bl.text
		case strings.Contains(bl.text, "configSources"):
			mesh = bl.text
		case strings.HasPrefix(bl.text, "regbridge serve"):
			serve = bl.text
		}
	}
	if !strings.Contains(serve, "--config bridge.yaml --state-dir ") {
		t.Fatalf("the README starts regbridge with %q", serve)
	}
	host, port, _ := strings.Cut(consul.Address, ":")
	bridge = strings.NewReplacer("127.0.0.1", host, "8500", port).Replace(bridge)
	b := harness.StartRegbridge(t, harness.RegbridgeOptions{Config: map[string]string{"bridge.yaml": bridge}})
	b.WaitReady(20 * time.Second)
	istiod := harness.StartIstiod(t, harness.IstiodOptions{Mesh: wired(t, mesh, b.XDS)})
	waitForService(t, istiod, "web.dc1.consul")
}

// wired gives a mesh configuration our address, and takes out what needs Kubernetes.
func wired(t *testing.T, mesh, address string) string {
	t.Helper()
	wired := regexp.MustCompile(`xds://\S+`).ReplaceAllString(mesh, "xds://"+address)
	wired = strings.ReplaceAll(wired, "- address: k8s://\n", "")
	if wired == mesh {
		t.Fatalf("no source in %s", mesh)
	}
	return wired
}

func waitForService(t *testing.T, d *harness.Istiod, host string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		_, body, err := harness.Get(t.Context(), "http://"+d.HTTP+"/debug/registryz")
		if err == nil && !strings.Contains(body, `"`+host+`"`) {
			err = fmt.Errorf("istiod does not have %s", host)
		}
		return err
	})
}

// TestExamples serves each example, with addresses of this test, and looks for the service that it promises.
func TestExamples(t *testing.T) {
	for _, tc := range []struct {
		name, host string
		prepare    func(t *testing.T, text string, b *harness.RegbridgeOptions) string
	}{
		{"quickstart", "greeter.static", nil},
		{"static", "ledger.static", nil},
		{"dns", "search.dns", func(t *testing.T, text string, _ *harness.RegbridgeOptions) string {
			t.Helper()
			dns := harness.StartCoreDNS(t, harness.CoreDNSOptions{Zones: map[string]string{"example.test": strings.Join([]string{
				"_http._tcp.search 60 IN SRV 0 1 8080 a", "a 60 IN A 192.0.2.7",
			}, "\n")}})
			return strings.ReplaceAll(text, "127.0.0.1:53", dns.Address)
		}},
		{"consul", "web.dc1.consul", func(t *testing.T, text string, o *harness.RegbridgeOptions) string {
			t.Helper()
			consul := harness.StartConsul(t, harness.ConsulOptions{ACL: true})
			consul.Register(api.AgentServiceRegistration{ID: "web-1", Name: "web", Address: "192.0.2.9", Port: 8080})
			o.Args = withSecret(t, "examples/consul/secrets/consul-token.yaml", "put-your-token-here", consul.Token)
			return strings.ReplaceAll(text, "127.0.0.1:8500", consul.Address)
		}},
		{"nacos", "web.DEFAULT-GROUP.public.nacos", func(t *testing.T, text string, o *harness.RegbridgeOptions) string {
			t.Helper()
			nacos := harness.StartNacos(t, servers.Nacos2, harness.NacosOptions{Auth: true})
			nacos.Register(harness.NacosInstance{Service: "web", IP: "192.0.2.9", Port: 8080})
			o.Args = append(withSecret(t, "examples/nacos/secrets/nacos-login.yaml", "put-your-password-here", nacos.Password),
				"--first-answer-deadline", "10s") // the old server is away
			return strings.ReplaceAll(text, "port: 8848", "port: "+strconv.Itoa(nacos.Port))
		}},
		{"eureka", "WEB.eureka", func(t *testing.T, text string, o *harness.RegbridgeOptions) string {
			t.Helper()
			eureka := harness.StartEureka(t, harness.EurekaOptions{User: "regbridge", Password: "pw"})
			eureka.Register(harness.EurekaInstance{App: "web", IP: "192.0.2.9", Port: 8080})
			o.Args = withSecret(t, "examples/eureka/secrets/eureka-login.yaml", "put-your-password-here", eureka.Password)
			_, port, _ := strings.Cut(eureka.Address, ":")
			return strings.ReplaceAll(text, "port: 8761", "port: "+port)
		}},
		{"zookeeper", "web.apps-prod.zookeeper", func(t *testing.T, text string, o *harness.RegbridgeOptions) string {
			t.Helper()
			server := harness.StartZooKeeper(t, harness.ZooKeeperOptions{})
			conn := server.Client(t, "app:pw")
			for _, node := range []struct{ path, data string }{
				{"/apps", ""}, {"/apps/prod", ""}, {"/apps/prod/web", ""},
				{"/apps/prod/web/1", `{"name":"web","id":"1","address":"192.0.2.9","port":8080}`},
			} {
				if _, err := conn.Create(node.path, []byte(node.data), 0, zk.DigestACL(zk.PermAll, "app", "pw")); err != nil {
					t.Fatal(err)
				}
			}
			o.Args = withSecret(t, "examples/zookeeper/secrets/zookeeper-login.yaml", "put-your-password-here", "pw")
			_, port, _ := strings.Cut(server.Address, ":")
			return strings.ReplaceAll(text, "port: 2181", "port: "+port)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := read(t, "examples/"+tc.name+"/bridge.yaml")
			var o harness.RegbridgeOptions
			if tc.prepare != nil {
				text = tc.prepare(t, text, &o)
			}
			o.Config = map[string]string{"bridge.yaml": text}
			b := harness.StartRegbridge(t, o)
			b.WaitReady(20 * time.Second)
			if out, _, err := b.Run("validate", filepath.Join(root(t), "examples", tc.name, "bridge.yaml")); err != nil {
				t.Errorf("validate: %v\n%s", err, out)
			}
			harness.Eventually(t, 20*time.Second, func() error {
				page, err := b.Get("/debug/registryz")
				if err != nil {
					return err
				}
				var services []struct{ Hostname string }
				if err := json.Unmarshal([]byte(page), &services); err != nil {
					return err
				}
				if !slices.ContainsFunc(services, func(s struct{ Hostname string }) bool { return s.Hostname == tc.host }) {
					return fmt.Errorf("%s is not among %v", tc.host, services)
				}
				return nil
			})
			if tc.name == "quickstart" {
				istiod := harness.StartIstiod(t, harness.IstiodOptions{Mesh: wired(t, read(t, "examples/istiod/mesh.yaml"), b.XDS)})
				waitForService(t, istiod, tc.host)
			}
		})
	}
	// No example goes untested.
	dirs, err := filepath.Glob(filepath.Join(root(t), "examples", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		if !slices.Contains([]string{"quickstart", "static", "dns", "consul", "eureka", "nacos", "zookeeper", "istiod"}, filepath.Base(d)) {
			t.Errorf("%s is run by no test", d)
		}
	}
}

// withSecret gives the options of regbridge for a folder with the example's Secret, filled in.
func withSecret(t *testing.T, example, placeholder, value string) []string {
	t.Helper()
	secrets := t.TempDir()
	text := read(t, example)
	if !strings.Contains(text, placeholder) {
		t.Fatalf("%s has no %s", example, placeholder)
	}
	if err := os.WriteFile(filepath.Join(secrets, filepath.Base(example)), []byte(strings.ReplaceAll(text, placeholder, value)), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--secrets-dir", secrets}
}

// TestLinksLeadSomewhere checks the relative links of all Markdown files.
func TestLinksLeadSomewhere(t *testing.T) {
	err := filepath.WalkDir(root(t), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".md" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`).FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s: link to %s: %v", path, m[1], err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestMetricsAreDocumented holds docs/metrics.md against what a running regbridge exports.
func TestMetricsAreDocumented(t *testing.T) {
	b := harness.StartRegbridge(t, harness.RegbridgeOptions{Config: map[string]string{"bridge.yaml": read(t, "examples/quickstart/bridge.yaml")}})
	b.WaitReady(20 * time.Second)
	page, err := b.Get("/metrics")
	if err != nil {
		t.Fatal(err)
	}
	table := read(t, "docs/metrics.md")
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (regbridge_\w+)`).FindAllStringSubmatch(page, -1) {
		if !strings.Contains(table, "`"+m[1]+"`") {
			t.Errorf("docs/metrics.md does not have %s", m[1])
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root(t), file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
