package harness

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	nacosgrpc "github.com/nacos-group/nacos-sdk-go/v2/api/grpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/regbridge/regbridge/test/servers"
)

// NacosOptions says what server to start. The zero value is one that asks nobody for a login.
type NacosOptions struct {
	// Auth makes the server ask for a login: User and Password of the Nacos.
	Auth bool
	// TokenTTL is how long a login is valid, in whole seconds; 0 means 5 hours.
	TokenTTL time.Duration
	// Console also starts the console of Nacos 3, on a port of its own. The others have it on the port of their API.
	Console bool
	// Heap is the limit of the Java heap in MB; 0 means 256, which is enough for some thousand services.
	Heap int
	// Properties are added to the server's application.properties.
	Properties map[string]string
}

// Nacos is one server by itself, of version 1.4, 2.3 or 3.1.
//
// Persistent instances, users and namespaces outlive a restart. Ephemeral instances do not: their providers register them
// again.
type Nacos struct {
	*Process
	// Version is 1, 2 or 3.
	Version int
	// Address is host:port of the HTTP API, and Port its port; gRPC is at Port+1000. They stay the same over restarts.
	Address string
	Port    int
	// Console is host:port of the console of Nacos 3, empty without one.
	Console string
	// User and Password are of the user who may do everything; empty without Auth.
	User, Password string

	server servers.Server
	client *http.Client
}

// Until it is changed, this is the password of the first user, whose name is the same.
const nacosUser = "nacos"

// nacosIdentity is name and value of the header by which a server knows another one of its cluster: who sends it may do
// everything, but for changing users. The servers' application.properties have it.
const nacosIdentity = "regbridge-test"

// Nacos takes its other ports from the HTTP port: 1000 below for raft, 1000 and 1001 above for gRPC. None of them is in the
// range of FreePort, so that nobody takes one while the server is restarted.
func nacosPorts() portRange {
	return portRange{"next-nacos-port", 17000, 17998, 2, func(ctx context.Context, port int) bool {
		return isFree(ctx, port) && isFree(ctx, port-1000) && isFree(ctx, port+1000) && isFree(ctx, port+1001)
	}}
}

// StartNacos starts a server, Nacos1, Nacos2 or Nacos3 of package servers, and waits until it takes, lists and gives up an
// instance and answers by gRPC.
func StartNacos(tb testing.TB, server servers.Server, o NacosOptions) *Nacos {
	tb.Helper()
	version := slices.Index([]servers.Server{servers.Nacos1, servers.Nacos2, servers.Nacos3}, server) + 1
	if version == 0 {
		tb.Fatalf("start nacos: %s is no Nacos", server)
	}
	java := servers.NeedJava(tb, server)
	n := &Nacos{Version: version, server: server}
	if o.Auth {
		n.User, n.Password = nacosUser, nacosUser
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 16}
	tb.Cleanup(transport.CloseIdleConnections)
	n.client = &http.Client{Transport: transport, Timeout: 10 * time.Second}
	n.Process = start(tb, string(server), func(p *Process) (command, error) {
		if err := n.choosePorts(tb.Context(), o.Console); err != nil {
			return command{}, err
		}
		if err := n.configure(p.dir, o); err != nil {
			return command{}, err
		}
		args, err := n.arguments(java, p.dir, cmp.Or(o.Heap, 256))
		return command{
			program: java.Program, args: args,
			env:   []string{"LD_PRELOAD=" + java.Shim, "MALLOC_ARENA_MAX=2"},
			ready: n.ready, within: 3 * readyTimeout, logs: []string{"nacos/logs/nacos.log"},
			mishap: "Login timeout exceeded", // its database has 10 s to be made, which a busy machine may need more of
		}, err
	})
	return n
}

func (n *Nacos) choosePorts(ctx context.Context, console bool) error {
	ports, err := nacosPorts().take(ctx, 1)
	if err != nil {
		return err
	}
	n.Port, n.Address = ports[0], loopback(ports[0])
	if !console {
		return nil
	}
	ports, err = freePorts(ctx, 1)
	if err == nil {
		n.Console = loopback(ports[0])
	}
	return err
}

// configure fills the server's folder, from which it removes what an earlier attempt to start left.
func (n *Nacos) configure(dir string, o NacosOptions) error {
	if err := n.empty(dir); err != nil {
		return err
	}
	conf := filepath.Join(dir, "conf")
	if err := os.MkdirAll(conf, 0o755); err != nil {
		return err
	}
	consolePort := "0"
	if n.Console != "" {
		_, consolePort = cutLast(n.Console, ":")
	}
	path, err := render(n.server, "application.properties.tmpl", conf, map[string]any{
		"Port": n.Port, "Console": consolePort, "Auth": o.Auth, "Home": dir,
		"TokenTTL": int(cmp.Or(o.TokenTTL, 5*time.Hour) / time.Second),
	})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(o.Properties)) { // of two lines with the same name the last one counts
		_, werr := fmt.Fprintf(f, "\n%s=%s", name, o.Properties[name])
		err = errors.Join(err, werr)
	}
	return errors.Join(err, f.Close())
}

// empty removes all that the server of that folder remembers.
func (n *Nacos) empty(dir string) error {
	for _, name := range []string{"data", "nacos", "logs", "tmp", "tomcat"} {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(dir, "tmp"), 0o755)
}

// arguments are those of java. Why the class path is in this order, and what else is needed, says the README of the recipe.
func (n *Nacos) arguments(java servers.Java, dir string, heap int) ([]string, error) {
	console, err := filepath.Glob(filepath.Join(java.Lib, "nacos-console-*.jar"))
	if err != nil {
		return nil, err
	}
	classPath := append([]string{java.Classes}, console...)
	classPath = append(classPath, filepath.Join(java.Lib, "hessian-4.0.63.jar"), filepath.Join(java.Lib, "*"))
	args := []string{
		"-Xms64m", fmt.Sprintf("-Xmx%dm", heap), "-XX:MaxMetaspaceSize=192m", "-XX:ReservedCodeCacheSize=64m",
		"-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		"-Djava.io.tmpdir=" + filepath.Join(dir, "tmp"), "-Duser.home=" + dir,
		"-Dnacos.home=" + dir, "-Dnacos.standalone=true", "-Dnacos.local.ip=127.0.0.1", "-Dnacos.server.ip=127.0.0.1",
		"-Dderby.system.durability=test", // waits for no disk
		"-Dnacos.remote.grpc.listen.ip=127.0.0.1", "-Dlogging.config=classpath:META-INF/logback/nacos.xml",
	}
	for _, opened := range []string{"java.io", "java.lang", "java.util", "java.nio", "sun.nio.ch", "java.net"} {
		args = append(args, "--add-opens=java.base/"+opened+"=ALL-UNNAMED")
	}
	main := "com.alibaba.nacos.Nacos"
	if n.Version == 3 {
		main = "Start3"
		args = append(args, "-Dstart3.console="+strconv.FormatBool(n.Console != ""))
	}
	return append(args, "-cp", strings.Join(classPath, ":"), main,
		"--spring.config.additional-location=file:"+filepath.Join(dir, "conf")+"/"), nil
}

// ready asks for what the server's own readiness pages do not tell: that it takes instances, for which it has to have elected
// itself, that it lists them, and that its gRPC server answers. It leaves nothing behind.
func (n *Nacos) ready(ctx context.Context) error {
	if _, err := n.call(ctx, http.MethodGet, n.path("/v1/console/health/readiness", "/v3/admin/core/state/readiness"), nil); err != nil {
		return err
	}
	if n.Console != "" {
		if _, err := getOK(ctx, "http://"+n.Console+"/v3/console/health/readiness"); err != nil {
			return err
		}
	}
	if n.Version == 3 && n.User != "" { // has no users at first; says 200 also if it has
		if _, err := n.call(ctx, http.MethodPost, "/v3/auth/user/admin", url.Values{"password": {n.Password}}); err != nil {
			return err
		}
	}
	probe := NacosInstance{Namespace: "regbridge-probe", Service: "probe", IP: "127.0.0.1", Port: 1}
	if err := n.register(ctx, probe); err != nil {
		return err
	}
	listed, err := n.instances(ctx, probe.Namespace, probe.Group, probe.Service)
	if err != nil {
		return err
	}
	if len(listed) != 1 {
		return errors.New("nacos does not list what was registered yet")
	}
	if err := n.deregister(ctx, probe); err != nil {
		return err
	}
	if err := n.deleteService(ctx, probe.Namespace, probe.Group, probe.Service); err != nil {
		return err
	}
	if err := wait(ctx, 5*time.Second, func() error { // Nacos 1 goes on deleting after its answer
		left, err := n.services(ctx, probe.Namespace, probe.Group)
		if err == nil && len(left) > 0 {
			err = fmt.Errorf("nacos still lists %v, which was deleted", left)
		}
		return err
	}); err != nil || n.Version == 1 {
		return err
	}
	return n.serverCheck(ctx)
}

// serverCheck makes the first request of every gRPC client.
func (n *Nacos) serverCheck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := grpc.NewClient(loopback(n.Port+1000), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close() // nothing is left to be sent
	answer, err := nacosgrpc.NewRequestClient(conn).Request(ctx, &nacosgrpc.Payload{
		Metadata: &nacosgrpc.Metadata{Type: "ServerCheckRequest"}, Body: &anypb.Any{Value: []byte("{}")},
	})
	if err != nil {
		return err
	}
	var check struct{ ConnectionID string }
	if err := json.Unmarshal(answer.GetBody().GetValue(), &check); err != nil || check.ConnectionID == "" {
		return fmt.Errorf("nacos answers a server check with %s %s (%w)", answer.GetMetadata().GetType(), answer.GetBody().GetValue(), err)
	}
	return nil
}

// Restart kills the server and starts it again on the same ports: as new if empty, else with its data.
func (n *Nacos) Restart(empty bool) {
	n.tb.Helper()
	n.Kill()
	n.client.CloseIdleConnections()
	if empty && n.User != "" {
		n.Password = nacosUser
	}
	n.must(n.start(func(p *Process) (command, error) {
		if !empty {
			return p.command, nil
		}
		return p.command, n.empty(p.dir)
	}))
}
