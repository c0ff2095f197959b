package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-zookeeper/zk"

	"github.com/regbridge/regbridge/test/harness"
)

// zkWorld is regbridge reading one ZooKeeper as "z", and an xDS client. Hosts are as in Higress, since Dubbo's are no names of
// DNS, which istiod wants.
type zkWorld struct {
	*world
	client *reader
	zk     []*harness.ZooKeeper
}

func startZKWorld(t *testing.T, settings string, nodes ...*harness.ZooKeeper) *zkWorld {
	t.Helper()
	w := &zkWorld{world: newWorld(t), zk: nodes}
	var addresses []string
	for _, z := range nodes {
		addresses = append(addresses, z.Address)
	}
	w.startBridge(t, harness.RegbridgeOptions{
		Config: map[string]string{"zk.yaml": mcpBridge("zk", fmt.Sprintf(
			"{type: zookeeper, name: z, domain: '%s', refreshInterval: %v, guard: {settle: 8s, hold: 20m}%s}",
			strings.Join(addresses, ","), interval, settings))},
		Args: []string{"--dialect", "higress"},
	})
	w.client = startReader(t, w.bridge.XDS)
	return w
}

// servers is the connect string of the ensemble.
func (w *zkWorld) servers() string {
	var all []string
	for _, z := range w.zk {
		all = append(all, z.Address)
	}
	return strings.Join(all, ",")
}

// dubbo starts a provider, which registers an address that nobody can reach.
func (w *zkWorld) dubbo(t *testing.T, o harness.DubboOptions) (d *harness.Dubbo, endpoint string) {
	t.Helper()
	o.ZooKeeper = w.servers()
	if o.Address == "" {
		o.Address = "10.0.0.7"
	}
	o.Protocols = append([]harness.DubboProtocol{{Name: "dubbo"}}, o.Protocols...)
	for i := range o.Protocols {
		o.Protocols[i].Port = harness.FreePort(t)
	}
	return harness.StartDubbo(t, o), net.JoinHostPort(o.Address, strconv.Itoa(o.Protocols[0].Port))
}

// greeter is the host of the interface of all providers.
func greeter(version, group string) string {
	return "providers:demo.api.Greeter:" + version + ":" + group + ".zookeeper"
}

func inServices(app string) string { return app + ".services.zookeeper" }

// TestDubbo follows real providers of both generations of Dubbo through their lives.
func TestDubbo(t *testing.T) {
	t.Parallel()
	w := startZKWorld(t, "", harness.StartZooKeeper(t, harness.ZooKeeperOptions{}))
	w.inState(t, "z", "synced") // nothing is there, not even the roots
	for _, version := range []int{2, 3} {
		t.Run(fmt.Sprintf("%d interface level", version), func(t *testing.T) { w.testInterfaceLevel(t, version) })
		t.Run(fmt.Sprintf("%d application level", version), func(t *testing.T) { w.testApplicationLevel(t, version) })
	}
	t.Run("3 at both levels", w.testBothLevels)
	t.Run("killed, and back", w.testZooKeeperBack)
	t.Run("frozen", w.testZooKeeperFrozen)
	t.Run("back without anything", w.testZooKeeperWiped)
}

func (w *zkWorld) testInterfaceLevel(t *testing.T, version int) {
	host := greeter("1.0.0", fmt.Sprintf("g%d", version))
	o := harness.DubboOptions{
		Version: version, App: fmt.Sprintf("if%d", version), Mode: "interface", Group: fmt.Sprintf("g%d", version), ServiceVersion: "1.0.0", Two: true,
	}
	first, at7 := w.dubbo(t, o)
	w.client.has(t, host, at7)
	w.client.has(t, "providers:"+harness.DubboStock+":2.0.0:.zookeeper", at7)
	if e := w.client.service(host).Endpoints[0]; e.Labels["application"] != o.App || w.client.service(host).Ports[0].Protocol != "Dubbo" {
		t.Errorf("the endpoint is %v, the port %v", e, w.client.service(host).Ports[0])
	}
	o.Address, o.Two = "10.0.0.8", false
	o.Weight = 50
	second, at8 := w.dubbo(t, o)
	w.client.has(t, host, at7+"=10", at8+"=5")

	// A provider takes a rule, and registers anew: its node goes, and another comes.
	stay := w.client.keep(host)
	conn := w.zk[0].Client(t)
	rule := func(change string) (remove func()) {
		t.Helper()
		path := "/dubbo/demo.api.Greeter/configurators/" + url.QueryEscape("override://"+at8+"/demo.api.Greeter?category=configurators"+
			"&dynamic=false&enabled=true&group="+o.Group+"&version=1.0.0&"+change)
		if _, err := conn.Create(path, nil, 0, zk.WorldACL(zk.PermAll)); err != nil {
			t.Fatal(err)
		}
		return func() {
			t.Helper()
			if err := conn.Delete(path, -1); err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := rule("weight=100")
	w.client.has(t, host, at7, at8)
	remove()
	w.client.has(t, host, at7+"=10", at8+"=5")
	stay(t)
	stay = w.client.keepThese(map[string][]string{host: {at7}})
	remove = rule("disabled=true")
	w.client.has(t, host, at7)
	remove()
	w.client.has(t, host, at7+"=10", at8+"=5")

	// Killed, and started again with the same address, before its session has ended and after.
	second.Kill()
	second.Restart()
	w.client.has(t, host, at7+"=10", at8+"=5")
	second.Kill()
	began := time.Now()
	w.client.has(t, host, at7)
	t.Logf("measured: a provider is killed to the client knows, sessions of 2 s: %v", time.Since(began).Round(time.Millisecond))
	second.Restart()
	w.client.has(t, host, at7+"=10", at8+"=5")
	stay(t)

	if err := second.Stop(); err != nil {
		t.Log(err) // a JVM ends with the signal's status
	}
	w.client.has(t, host, at7)
	first.Kill()
	w.client.has(t, host) // the service is still there, and answers 503
}

func (w *zkWorld) testApplicationLevel(t *testing.T, version int) {
	mode := map[int]string{2: "service", 3: "instance"}[version]
	for _, metadata := range []string{"local", "remote"} {
		app, group := fmt.Sprintf("app%d%s", version, metadata), fmt.Sprintf("app%d%s", version, metadata)
		d, endpoint := w.dubbo(t, harness.DubboOptions{
			Version: version, App: app, Mode: mode, Metadata: metadata, Group: group, ServiceVersion: "1.0.0", Two: true,
		})
		w.client.has(t, inServices(app), endpoint)
		w.client.has(t, greeter("1.0.0", group), endpoint)
		harness.Eventually(t, patience, func() error {
			for _, e := range endpointsOf(w.client.service("providers:" + harness.DubboStock + ":2.0.0:.zookeeper")) {
				if strings.HasPrefix(e, endpoint) {
					return nil
				}
			}
			return errors.New("the second interface is not served by " + endpoint)
		})
		d.Kill()
		w.client.has(t, inServices(app))
		w.client.has(t, greeter("1.0.0", group))
	}
}

func (w *zkWorld) testBothLevels(t *testing.T) {
	d, endpoint := w.dubbo(t, harness.DubboOptions{
		Version: 3, App: "both", Mode: "all", Group: "both", ServiceVersion: "1.0.0", Metadata: "remote",
		Protocols: []harness.DubboProtocol{{Name: "tri"}},
	})
	host := greeter("1.0.0", "both")
	other := net.JoinHostPort("10.0.0.7", strconv.Itoa(d.Protocols[1].Port))
	w.client.has(t, inServices("both"), endpoint)
	one := func() error { // which of the two protocols it is is up to the node that came first
		return errors.Join(w.client.check(inServices("both"), endpoint),
			either(w.client.check(host, endpoint), w.client.check(host, other)))
	}
	harness.Eventually(t, patience, one)
	harness.Always(t, 2*interval, one)
	s, err := w.status("z")
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, l := range s.LeftOutInstances {
		if strings.HasSuffix(l.Service, ":both") && l.Reason == "other-protocol" {
			left++
		}
	}
	if left != 1 {
		t.Errorf("the instance of the other protocol is left out %d times, want once: %+v", left, s.LeftOutInstances)
	}
	d.Kill()
	w.client.has(t, host)
	w.client.has(t, inServices("both"))
}

// either returns nil if one of the two is nil.
func either(a, b error) error {
	if a == nil || b == nil {
		return nil
	}
	return errors.Join(a, b)
}

// testZooKeeperBack kills the server for a while. Its data, and with them the nodes of living providers, come back.
func (w *zkWorld) testZooKeeperBack(t *testing.T) {
	d, endpoint := w.dubbo(t, harness.DubboOptions{Version: 3, App: "back", Mode: "interface", Group: "back", SessionTimeout: 4 * time.Second})
	host := greeter("0.0.0", "back")
	w.client.has(t, host, endpoint)
	stay := w.client.keep(host)
	w.zk[0].Kill()
	w.inState(t, "z", "failing")
	w.zk[0].Restart()
	w.inState(t, "z", "synced")
	harness.Always(t, 10*time.Second, func() error { return w.client.check(host, endpoint) }) // past settle
	stay(t)
	d.Kill()
	w.client.has(t, host)
}

func (w *zkWorld) testZooKeeperFrozen(t *testing.T) {
	d, endpoint := w.dubbo(t, harness.DubboOptions{Version: 2, App: "frozen", Mode: "interface", Group: "frozen"})
	host := greeter("0.0.0", "frozen")
	w.client.has(t, host, endpoint)
	stay := w.client.keep(host)
	w.zk[0].Pause()
	w.inState(t, "z", "failing")
	w.zk[0].Resume()
	w.inState(t, "z", "synced")
	harness.Always(t, 10*time.Second, func() error { return w.client.check(host, endpoint) })
	stay(t)
	d.Kill()
	w.client.has(t, host)
}

// testZooKeeperWiped lets the server lose everything. What it had is kept as a mass loss; what is registered then is served.
func (w *zkWorld) testZooKeeperWiped(t *testing.T) {
	conn := w.zk[0].Client(t)
	for n := range 12 { // a mass loss begins at 10
		w.curator(t, conn, "many", fmt.Sprintf("10.3.0.%d", n+1), "")
	}
	var all []string
	for n := range 12 {
		all = append(all, fmt.Sprintf("10.3.0.%d:80", n+1))
	}
	w.client.has(t, inServices("many"), all...)
	stay := w.client.keep(inServices("many"))
	// Additions are set off against losses for 10 s.
	harness.Always(t, 11*time.Second, func() error { return w.client.check(inServices("many"), all...) })
	conn.Close()
	w.zk[0].Wipe()
	w.holds(t, "z", 12)
	w.inState(t, "z", "synced")
	harness.Always(t, 10*time.Second, func() error { return w.client.check(inServices("many"), all...) })
	stay(t)
	conn = w.zk[0].Client(t)
	w.curator(t, conn, "fresh", "10.3.1.1", "")
	w.client.has(t, inServices("fresh"), "10.3.1.1:80")
	for n := range 12 {
		w.curator(t, conn, "many", fmt.Sprintf("10.3.0.%d", n+1), "")
	}
	w.holds(t, "z", 0)
	w.client.has(t, inServices("many"), all...)
}

// curator makes an instance's node below /services, as long as the connection's session lasts.
func (w *zkWorld) curator(t *testing.T, conn *zk.Conn, app, ip, metadata string) (path string) {
	t.Helper()
	for _, parent := range []string{"/services", "/services/" + app} {
		if _, err := conn.Create(parent, nil, 0, zk.WorldACL(zk.PermAll)); err != nil && !errors.Is(err, zk.ErrNodeExists) {
			t.Fatal(err)
		}
	}
	path = "/services/" + app + "/" + ip
	if _, err := conn.Create(path, curatorNode(app, ip, metadata), zk.FlagEphemeral, zk.WorldACL(zk.PermAll)); err != nil {
		t.Fatal(err)
	}
	return path
}

// curatorNode is what Curator writes for an instance; metadata are the members of a JSON object.
func curatorNode(app, ip, metadata string) []byte {
	return fmt.Appendf(nil, `{"name":%q,"id":%q,"address":%q,"port":80,"sslPort":null,"payload":{"@class":`+
		`"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":%q,"name":%q,"metadata":{%s}},`+
		`"registrationTimeUTC":1,"serviceType":"DYNAMIC","uriSpec":null}`, app, ip, ip, app, app, metadata)
}

// TestZooKeeperAccess has a provider that protects its nodes.
func TestZooKeeperAccess(t *testing.T) {
	t.Parallel()
	w := startZKWorld(t, ", authSecretName: zk", harness.StartZooKeeper(t, harness.ZooKeeperOptions{}))
	d, endpoint := w.dubbo(t, harness.DubboOptions{Version: 3, App: "acl", Mode: "all", User: "app", Password: "pw-of-the-app", Metadata: "remote"})
	w.inState(t, "z", "blocked") // there is no Secret yet
	login := func(password string) {
		w.bridge.WriteSecret("prod", "zk", map[string]string{"zkUsername": "app", "zkPassword": password})
	}
	login("not-the-password")
	harness.Eventually(t, patience, func() error {
		s, err := w.status("z")
		if err == nil && (s.State != "failing" || !strings.Contains(s.LastError, "/dubbo") && !strings.Contains(s.LastError, "/services")) {
			err = fmt.Errorf("a refused login shows as %+v", s)
		}
		return err
	})
	login("pw-of-the-app")
	w.client.has(t, greeter("0.0.0", ""), endpoint)
	w.client.has(t, inServices("acl"), endpoint)
	w.inState(t, "z", "synced")
	stay := w.client.keep(greeter("0.0.0", ""), inServices("acl"))
	login("not-the-password")
	w.inState(t, "z", "failing")
	harness.Always(t, 10*time.Second, func() error { return w.client.check(greeter("0.0.0", ""), endpoint) })
	login("pw-of-the-app")
	w.inState(t, "z", "synced")
	stay(t)
	if err := d.Stop(); err != nil {
		t.Log(err)
	}
	w.client.has(t, greeter("0.0.0", ""))
	for _, page := range []string{"/debug/registries", "/debug/configz", "/metrics"} {
		if body, err := w.bridge.Get(page); err != nil || strings.Contains(body, "pw-of-the-app") || strings.Contains(body, "not-the-password") {
			t.Errorf("%s shows a password: %v", page, err)
		}
	}
	if strings.Contains(w.bridge.Log(), "the-") {
		t.Error("the log shows a password")
	}
}

// TestSpringCloudZooKeeper follows a real Spring Cloud application, at the client's end and through a mesh.
func TestSpringCloudZooKeeper(t *testing.T) {
	t.Parallel()
	z := harness.StartZooKeeper(t, harness.ZooKeeperOptions{})
	w := newWorld(t)
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"zk.yaml": mcpBridge("zk", fmt.Sprintf(
		"{type: zookeeper, name: z, domain: %s, zkServicesPath: [/services, /dubbo, /apps/prod], refreshInterval: %v, guard: {settle: 2s, hold: 20m}}",
		z.Address, interval))}})
	client := startReader(t, w.bridge.XDS)
	w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{Delta: true})
	start := func(app, id string, o harness.SpringZooKeeperOptions) *harness.SpringZooKeeper {
		w.lastIP = max(w.lastIP, 1) + 1
		o.App, o.InstanceID, o.Port, o.IP = app, id, w.port, fmt.Sprintf("127.0.0.%d", w.lastIP)
		return harness.StartSpringZooKeeper(t, z.Address, o)
	}
	answers := func(host string, want ...string) {
		t.Helper()
		harness.Eventually(t, patience, func() error { return w.answers(host, want...) })
	}
	one := start("shop", "one", harness.SpringZooKeeperOptions{Metadata: map[string]string{"zone": "z1", "version": "v1"}})
	client.has(t, inServices("shop"), one.Address)
	if e := client.service(inServices("shop")).Endpoints[0]; e.Labels["version"] != "v1" || e.Locality != "/z1" {
		t.Errorf("the endpoint is %v", e)
	}
	two := start("shop", "two", harness.SpringZooKeeperOptions{})
	client.has(t, inServices("shop"), one.Address, two.Address)
	answers(inServices("shop"), "one", "two")

	two.SetStatus("OUT_OF_SERVICE") // in place: the node stays
	client.has(t, inServices("shop"), one.Address)
	answers(inServices("shop"), "one")
	two.SetStatus("UP")
	client.has(t, inServices("shop"), one.Address, two.Address)
	answers(inServices("shop"), "one", "two")

	one.SetMetadata(map[string]string{"version": "v2"})
	harness.Eventually(t, patience, func() error {
		for _, e := range client.service(inServices("shop")).GetEndpoints() {
			if e.Labels["version"] == "v2" {
				return nil
			}
		}
		return errors.New("no endpoint has the new label")
	})

	asleep := start("asleep", "asleep", harness.SpringZooKeeperOptions{InitialStatus: "OUT_OF_SERVICE", Root: "/apps/prod"})
	client.has(t, "asleep.apps-prod.zookeeper")
	asleep.SetStatus("UP")
	client.has(t, "asleep.apps-prod.zookeeper", asleep.Address)
	asleep.Kill()
	client.has(t, "asleep.apps-prod.zookeeper")

	flow := w.traffic(t, inServices("shop"))
	if err := two.Stop(); err != nil {
		t.Log(err) // the JVM ends with the signal's status
	}
	client.has(t, inServices("shop"), one.Address)
	two.Restart()
	client.has(t, inServices("shop"), one.Address, two.Address)
	flow.cancel()
	<-flow.done
	two.Kill()
	client.has(t, inServices("shop"), one.Address)
	answers(inServices("shop"), "one")
	one.Kill()
	client.has(t, inServices("shop"))
	w.serves503(t, inServices("shop"))
}

// TestZooKeeperEnsemble takes servers of three away, under a real application.
func TestZooKeeperEnsemble(t *testing.T) {
	t.Parallel()
	nodes := harness.StartEnsemble(t, 3, harness.ZooKeeperOptions{})
	w := startZKWorld(t, "", nodes...)
	app := harness.StartSpringZooKeeper(t, w.servers(), harness.SpringZooKeeperOptions{App: "shop", InstanceID: "one"})
	host := inServices("shop")
	w.client.has(t, host, app.Address)
	stay := w.client.keep(host)

	leader := harness.Leader(nodes)
	if leader == nil {
		t.Fatal("the ensemble has no leader")
	}
	leader.Kill()
	harness.Eventually(t, patience, func() error {
		if harness.Leader(nodes) == nil {
			return errors.New("no new leader")
		}
		return nil
	})
	w.inState(t, "z", "synced")
	// What changes now still arrives.
	second := harness.StartSpringZooKeeper(t, w.servers(), harness.SpringZooKeeperOptions{App: "shop", InstanceID: "two"})
	w.client.has(t, host, app.Address, second.Address)

	next := harness.Leader(nodes)
	next.Kill() // one of three is left, which serves nobody
	w.inState(t, "z", "failing")
	harness.Always(t, 3*time.Second, func() error { return w.client.check(host, app.Address, second.Address) })
	next.Restart()
	leader.Restart()
	w.inState(t, "z", "synced")
	harness.Always(t, 10*time.Second, func() error { return w.client.check(host, app.Address, second.Address) })
	stay(t)
	second.Kill()
	w.client.has(t, host, app.Address)
}

// TestZooKeeperTLS reads a ZooKeeper that wants a client certificate.
func TestZooKeeperTLS(t *testing.T) {
	t.Parallel()
	ca := harness.NewCA(t, "zookeeper")
	z := harness.StartZooKeeper(t, harness.ZooKeeperOptions{TLS: ca, ClientCertificates: true})
	files := t.TempDir()
	ca.WriteFiles(t, files, "regbridge")
	w := newWorld(t)
	entry := func(tls string) string {
		return mcpBridge("zk", fmt.Sprintf("{type: zookeeper, name: z, domain: %s, refreshInterval: %v%s}", z.TLSAddress, interval, tls))
	}
	w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"zk.yaml": entry(
		fmt.Sprintf(", tls: {caFile: %[1]s/ca.crt, certFile: %[1]s/tls.crt, keyFile: %[1]s/tls.key}", files))}})
	client := startReader(t, w.bridge.XDS)
	zw := &zkWorld{world: w, client: client, zk: []*harness.ZooKeeper{z}}
	zw.curator(t, z.Client(t), "shop", "10.4.0.1", "")
	client.has(t, inServices("shop"), "10.4.0.1:80")
	stay := client.keep(inServices("shop"))
	w.bridge.WriteConfig("zk.yaml", entry(fmt.Sprintf(", tls: {caFile: %s/ca.crt}", files))) // no certificate of ours
	w.inState(t, "z", "failing")
	harness.Always(t, 3*time.Second, func() error { return client.check(inServices("shop"), "10.4.0.1:80") })
	stay(t)
}
