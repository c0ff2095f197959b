package harness

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/regbridge/regbridge/test/servers"
)

// EurekaOptions says what server to start. The zero value is one for everybody that forgets whoever does not renew his lease.
type EurekaOptions struct {
	// User and Password, if not empty, are asked for by basic authentication. Eureka's own clients, peers among them, take
	// no password with a colon or beyond ASCII.
	User, Password string
	// TLS, if not nil, makes the server speak TLS alone, with a certificate of this CA for 127.0.0.1 and localhost.
	TLS *CA
	// ClientCertificates makes it refuse clients without a certificate of the CA.
	ClientCertificates bool
	// SelfPreservation lets the server keep instances whose leases ran out when too many do at once, as is its default.
	SelfPreservation bool
	// Heap is the limit of the Java heap in MB; 0 means 128, which is enough for some thousand instances.
	Heap int
	// Properties are added to the server's application.properties, and replace what is there.
	Properties map[string]string
}

// Eureka is one server, alone or with a peer. It forgets everything when it ends; clients register again, or a peer tells.
type Eureka struct {
	*Process
	// Address is host:port of the server, and URL its API, without a login, as in http://127.0.0.1:8761/eureka. They stay
	// the same over restarts.
	Address, URL string
	// User and Password are those of the options.
	User, Password string

	client *http.Client
}

// StartEureka starts a server and waits until it answers with its (empty) list.
func StartEureka(tb testing.TB, o EurekaOptions) *Eureka {
	tb.Helper()
	e := newEureka(tb, o)
	e.Process = start(tb, "eureka", func(p *Process) (command, error) {
		ports, err := freePorts(tb.Context(), 1)
		if err != nil {
			return command{}, err
		}
		return e.command(p, o, "localhost", ports[0], ports[0])
	})
	return e
}

// StartEurekaPeers starts two servers that tell each other all that they are told, and waits until they do. Both list
// themselves as instances of the application EUREKA.
func StartEurekaPeers(tb testing.TB, o EurekaOptions) [2]*Eureka {
	tb.Helper()
	if o.TLS != nil {
		tb.Fatal("peers with TLS: not supported")
	}
	ports, err := freePorts(tb.Context(), 2) // known to both before the first one starts
	if err != nil {
		tb.Fatal(err)
	}
	var peers [2]*Eureka
	for i := range peers {
		e := newEureka(tb, o)
		starting := i == 0 // the first one is not waited for: it looks for the other one
		e.Process = start(tb, fmt.Sprintf("eureka %d", i+1), func(p *Process) (command, error) {
			c, err := e.command(p, o, fmt.Sprintf("node%d", i+1), ports[i], ports[1-i])
			c.ready = func(ctx context.Context) error {
				if starting {
					return nil
				}
				return e.ready(ctx)
			}
			return c, err
		})
		starting = false
		peers[i] = e
	}
	if err := peers[0].waitReady(peers[0].run()); err != nil {
		tb.Fatalf("start %s: %v", peers[0].name, err)
	}
	Eventually(tb, readyTimeout, func() error {
		for _, e := range peers {
			all, err := e.Apps()
			if err != nil {
				return err
			}
			all = slices.DeleteFunc(all, func(i EurekaInstance) bool { return i.App != "EUREKA" || i.Status != "UP" })
			if len(all) != len(peers) {
				return fmt.Errorf("%s knows %d of %d servers", e.name, len(all), len(peers))
			}
		}
		return nil
	})
	return peers
}

func newEureka(tb testing.TB, o EurekaOptions) *Eureka {
	tb.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 16}
	if o.TLS != nil {
		transport.TLSClientConfig = o.TLS.ServerTLS(tb, "harness") // the certificate is for clients as well
		transport.TLSClientConfig.RootCAs = o.TLS.Pool()
	}
	tb.Cleanup(transport.CloseIdleConnections)
	return &Eureka{
		User: o.User, Password: o.Password,
		client: &http.Client{Transport: transport, Timeout: 10 * time.Second},
	}
}

// command is for the server of that name, whose peer is itself if it has the same port.
func (e *Eureka) command(p *Process, o EurekaOptions, node string, port, peerPort int) (command, error) {
	java := servers.NeedJava(p.tb, servers.EurekaServer)
	base := url.URL{Scheme: "http", Host: loopback(port), Path: "/eureka"}
	clientAuth := "none"
	if o.TLS != nil {
		base.Scheme = "https"
		o.TLS.WriteFiles(p.tb, p.dir, "localhost", "127.0.0.1")
		if o.ClientCertificates {
			clientAuth = "need"
		}
	}
	e.Address, e.URL = base.Host, base.String()
	peer := base
	peer.Host, peer.Path = loopback(peerPort), "/eureka/"
	if port == peerPort {
		peer.Host = "localhost:" + strconv.Itoa(port) // by its own name it knows itself
	} else if o.User != "" {
		peer.User = url.UserPassword(o.User, o.Password)
	}
	config, err := render(servers.EurekaServer, "application.properties.tmpl", p.dir, map[string]any{
		"Port": port, "Dir": p.dir, "User": property(o.User), "Password": property(o.Password), "TLS": o.TLS != nil, "ClientAuth": clientAuth,
		"SelfPreservation": o.SelfPreservation, "Node": node, "Peer": peer.String(),
	})
	if err != nil {
		return command{}, err
	}
	if err := appendProperties(config, o.Properties); err != nil {
		return command{}, err
	}
	return springBoot(java, p.dir, cmp.Or(o.Heap, 128), "regbridge.EurekaServerMain", config, e.ready), nil
}

// springBoot starts an application of Spring Boot with a file of properties.
func springBoot(java servers.Java, dir string, heap int, main, config string, ready func(context.Context) error) command {
	args := append(javaFlags(dir, heap), "-cp", java.Classes+":"+filepath.Join(java.Lib, "*"), main,
		"--spring.config.location=file:"+config)
	return command{program: java.Program, args: args, ready: ready, within: 2 * readyTimeout}
}

func (e *Eureka) ready(ctx context.Context) error {
	_, err := e.apps(ctx)
	return err
}

// Restart kills the server if it runs and starts it again on the same port. It then knows what its peer tells, or nothing.
func (e *Eureka) Restart() {
	e.tb.Helper()
	e.Kill()
	e.client.CloseIdleConnections()
	e.Process.Restart()
}

// An EurekaInstance is what is registered, and what Apps lists. Only App, IP and Port are needed to register.
type EurekaInstance struct {
	// App is the application's name, which Eureka turns into capitals.
	App string
	// ID is the instance's; empty means IP:app:port.
	ID string
	// IP and Port are where it is reached; HostName is the name for it, the IP if empty.
	IP, HostName string
	Port         int
	// PortDisabled says that Port is not to be used.
	PortDisabled bool
	// SecurePort is its port for TLS; 0 means that there is none.
	SecurePort int
	// Status is UP, DOWN, STARTING, OUT_OF_SERVICE or UNKNOWN; empty means UP.
	Status string
	// Overridden is the status that was set from outside, UNKNOWN without; it is not registered.
	Overridden string
	Metadata   map[string]string
	// Lease is how long it is kept without a heartbeat, in whole seconds; 0 means 90 s. The server doubles it after the
	// first heartbeat.
	Lease time.Duration
	// Zone, if not empty, makes it an instance of Amazon in this availability zone.
	Zone string
}

func (i EurekaInstance) id() string {
	return cmp.Or(i.ID, fmt.Sprintf("%s:%s:%d", i.IP, strings.ToLower(i.App), i.Port))
}

// eurekaPort and the types below are JSON as Eureka reads and writes it.
type eurekaPort struct {
	Number  int    `json:"$"`
	Enabled string `json:"@enabled"`
}

type eurekaDataCenter struct {
	Class    string            `json:"@class"`
	Name     string            `json:"name"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

type eurekaLease struct {
	Duration int `json:"durationInSecs"`
}

type eurekaInstance struct {
	ID         string            `json:"instanceId"`
	App        string            `json:"app"`
	HostName   string            `json:"hostName"`
	IP         string            `json:"ipAddr"`
	Status     string            `json:"status"`
	Overridden string            `json:"overriddenStatus,omitempty"`
	Port       eurekaPort        `json:"port"`
	SecurePort eurekaPort        `json:"securePort"`
	VIP        string            `json:"vipAddress"`
	DataCenter eurekaDataCenter  `json:"dataCenterInfo"`
	Lease      eurekaLease       `json:"leaseInfo"`
	Metadata   map[string]string `json:"metadata"`
}

func (i EurekaInstance) encode() eurekaInstance {
	out := eurekaInstance{
		ID: i.id(), App: i.App, HostName: cmp.Or(i.HostName, i.IP), IP: i.IP, Status: cmp.Or(i.Status, "UP"),
		Port:       eurekaPort{i.Port, strconv.FormatBool(!i.PortDisabled)},
		SecurePort: eurekaPort{cmp.Or(i.SecurePort, 443), strconv.FormatBool(i.SecurePort != 0)},
		VIP:        strings.ToLower(i.App), Metadata: i.Metadata,
		DataCenter: eurekaDataCenter{Class: "com.netflix.appinfo.InstanceInfo$DefaultDataCenterInfo", Name: "MyOwn"},
		Lease:      eurekaLease{int(cmp.Or(i.Lease, 90*time.Second) / time.Second)},
	}
	if i.Zone != "" {
		out.DataCenter = eurekaDataCenter{
			Class: "com.netflix.appinfo.AmazonInfo", Name: "Amazon",
			Metadata: map[string]string{"availability-zone": i.Zone, "local-ipv4": i.IP, "local-hostname": out.HostName},
		}
	}
	return out
}

func (i eurekaInstance) decode() EurekaInstance {
	out := EurekaInstance{
		App: i.App, ID: i.ID, IP: i.IP, HostName: i.HostName, Port: i.Port.Number, PortDisabled: i.Port.Enabled != "true",
		Status: i.Status, Overridden: i.Overridden, Metadata: i.Metadata, Zone: i.DataCenter.Metadata["availability-zone"],
		Lease: time.Duration(i.Lease.Duration) * time.Second,
	}
	if i.SecurePort.Enabled == "true" {
		out.SecurePort = i.SecurePort.Number
	}
	delete(out.Metadata, "@class") // what Eureka says of an empty map
	return out
}

// Call does one request to the API, at a path below /eureka such as "/apps/ORDERS", with the login, and returns what is
// answered. in, if not nil, is sent as JSON, or as it is if it is a string.
func (e *Eureka) Call(method, path string, in any) (status int, body string) {
	e.tb.Helper()
	status, body, err := e.call(e.tb.Context(), method, path, in)
	if err != nil {
		e.tb.Fatal(err)
	}
	return status, body
}

func (e *Eureka) call(ctx context.Context, method, path string, in any) (status int, body string, err error) {
	var reader io.Reader
	switch in := in.(type) {
	case nil:
	case string:
		reader = strings.NewReader(in)
	default:
		b, err := json.Marshal(in)
		if err != nil {
			return 0, "", err
		}
		reader = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, e.URL+path, reader)
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Accept", "application/json")
	if reader != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if e.User != "" {
		req.SetBasicAuth(e.User, e.Password)
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return 0, "", fmt.Errorf("eureka: %w", err)
	}
	defer resp.Body.Close() // only read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, "", fmt.Errorf("eureka: %s %s: read the answer: %w", method, path, err)
	}
	return resp.StatusCode, string(b), nil
}

// do is call for requests that must succeed.
func (e *Eureka) do(ctx context.Context, method, path string, in any) error {
	status, body, err := e.call(ctx, method, path, in)
	if err == nil && status != http.StatusOK && status != http.StatusNoContent {
		err = fmt.Errorf("eureka: %s %s: %d %.300s", method, path, status, body)
	}
	return err
}

func (e *Eureka) must(err error) {
	e.tb.Helper()
	if err != nil {
		e.tb.Fatal(err)
	}
}

// instancePath is the path of an instance of an application; the id may hold anything.
func instancePath(app, id string) string {
	return "/apps/" + url.PathEscape(app) + "/" + url.PathEscape(id)
}

// Register adds or replaces instances.
func (e *Eureka) Register(instances ...EurekaInstance) {
	e.tb.Helper()
	group, ctx := errgroup.WithContext(e.tb.Context())
	group.SetLimit(8)
	for _, i := range instances {
		group.Go(func() error {
			return e.do(ctx, http.MethodPost, "/apps/"+url.PathEscape(i.App), map[string]any{"instance": i.encode()})
		})
	}
	e.must(group.Wait())
}

// Deregister removes instances, each of which must be there.
func (e *Eureka) Deregister(instances ...EurekaInstance) {
	e.tb.Helper()
	for _, i := range instances {
		e.must(e.do(e.tb.Context(), http.MethodDelete, instancePath(i.App, i.id()), nil))
	}
}

// Heartbeat renews the lease of an instance. The error tells if the server does not know it.
func (e *Eureka) Heartbeat(i EurekaInstance) error {
	return e.do(e.tb.Context(), http.MethodPut, instancePath(i.App, i.id()), nil)
}

// KeepAlive registers instances and goes on renewing their leases, and registering those that the server does not know any
// more, as their applications would, until stop is called or the test ends. The server may be down meanwhile.
func (e *Eureka) KeepAlive(every time.Duration, instances ...EurekaInstance) (stop func()) {
	e.tb.Helper()
	e.Register(instances...)
	ctx, cancel := context.WithCancel(e.tb.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(every):
			}
			for _, i := range instances {
				status, _, err := e.call(ctx, http.MethodPut, instancePath(i.App, i.id()), nil)
				if err == nil && status == http.StatusNotFound {
					// Tried again at the next turn if it fails.
					_ = e.do(ctx, http.MethodPost, "/apps/"+url.PathEscape(i.App), map[string]any{"instance": i.encode()})
				}
			}
		}
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	e.tb.Cleanup(stop)
	return stop
}

// SetStatus overrides the status of an instance from outside, which its heartbeats do not undo.
func (e *Eureka) SetStatus(i EurekaInstance, status string) {
	e.tb.Helper()
	e.must(e.do(e.tb.Context(), http.MethodPut, instancePath(i.App, i.id())+"/status?value="+url.QueryEscape(status), nil))
}

// DeleteStatus ends an override. The instance then has the status back, UNKNOWN if that is empty; without one its next
// heartbeat is refused, so that it registers again.
func (e *Eureka) DeleteStatus(i EurekaInstance, back string) {
	e.tb.Helper()
	path := instancePath(i.App, i.id()) + "/status"
	if back != "" {
		path += "?value=" + url.QueryEscape(back)
	}
	e.must(e.do(e.tb.Context(), http.MethodDelete, path, nil))
}

// PutMetadata adds one entry to the metadata of an instance, or replaces it.
func (e *Eureka) PutMetadata(i EurekaInstance, key, value string) {
	e.tb.Helper()
	query := url.Values{key: {value}}.Encode()
	e.must(e.do(e.tb.Context(), http.MethodPut, instancePath(i.App, i.id())+"/metadata?"+query, nil))
}

// Apps lists all instances, sorted by application and id.
func (e *Eureka) Apps() ([]EurekaInstance, error) { return e.apps(e.tb.Context()) }

func (e *Eureka) apps(ctx context.Context) ([]EurekaInstance, error) {
	status, body, err := e.call(ctx, http.MethodGet, "/apps", nil)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("eureka: GET /apps: %d %.300s", status, body)
	}
	var list struct {
		Applications struct {
			Application []struct{ Instance []eurekaInstance }
		}
	}
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		return nil, fmt.Errorf("eureka: GET /apps: %w in %.300s", err, body)
	}
	var all []EurekaInstance
	for _, app := range list.Applications.Application {
		for _, i := range app.Instance {
			all = append(all, i.decode())
		}
	}
	slices.SortFunc(all, func(a, b EurekaInstance) int { return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.ID, b.ID)) })
	return all, nil
}

// EurekaClientOptions says what application to start. Only App is needed.
type EurekaClientOptions struct {
	// App is the application's name.
	App string
	// InstanceID is the instance's id, which it also answers requests with; empty means IP:app:port.
	InstanceID string
	// IP is where it listens and what it registers; empty means 127.0.0.1.
	IP string
	// Port is where it listens; 0 means a free one.
	Port int
	// Metadata is what it registers beside its own.
	Metadata map[string]string
	// User and Password are its login at the servers.
	User, Password string
	// Properties are added to its application.properties, and replace what is there.
	Properties map[string]string
}

// EurekaClient is a Spring Boot application that registers itself in Eureka, renews its lease every second and registers
// again where it is not known.
type EurekaClient struct {
	*Process
	// InstanceID is what GET / answers.
	InstanceID string
	// Address is host:port of the application. It stays the same over restarts.
	Address string
}

// StartEurekaClient starts an application that registers at the servers, whose URLs are those of Eureka without a login,
// separated by commas. It waits until one of them lists it.
func StartEurekaClient(tb testing.TB, urls string, o EurekaClientOptions) *EurekaClient {
	tb.Helper()
	java := servers.NeedJava(tb, servers.EurekaClient)
	c := &EurekaClient{}
	bases := strings.Split(urls, ",")
	var zone []string
	for _, base := range bases {
		u, err := url.Parse(base + "/")
		if err != nil {
			tb.Fatal(err)
		}
		if o.User != "" {
			u.User = url.UserPassword(o.User, o.Password)
		}
		zone = append(zone, u.String())
	}
	c.Process = start(tb, "eureka client "+cmp.Or(o.InstanceID, o.App), func(p *Process) (command, error) {
		port := o.Port
		if port == 0 {
			ports, err := freePorts(tb.Context(), 1)
			if err != nil {
				return command{}, err
			}
			port = ports[0]
		}
		self := EurekaInstance{App: o.App, ID: o.InstanceID, IP: cmp.Or(o.IP, "127.0.0.1"), Port: port}
		c.InstanceID, c.Address = self.id(), fmt.Sprintf("%s:%d", self.IP, port)
		config, err := render(servers.EurekaClient, "application.properties.tmpl", p.dir, map[string]any{
			"App": o.App, "ID": c.InstanceID, "IP": self.IP, "Port": port, "Dir": p.dir, "Metadata": properties(o.Metadata),
			"URLs": strings.Join(zone, ","),
		})
		if err != nil {
			return command{}, err
		}
		if err := appendProperties(config, o.Properties); err != nil {
			return command{}, err
		}
		ready := func(ctx context.Context) error { return c.listed(ctx, o, bases) }
		return springBoot(java, p.dir, 96, "regbridge.EurekaClientMain", config, ready), nil
	})
	return c
}

// listed returns nil if the application answers and one of the servers has it as UP.
func (c *EurekaClient) listed(ctx context.Context, o EurekaClientOptions, bases []string) error {
	body, err := getOK(ctx, "http://"+c.Address+"/")
	if err != nil {
		return err
	}
	if body != c.InstanceID {
		return fmt.Errorf("%s answers as %q, want %q", c.Address, body, c.InstanceID)
	}
	login := &http.Request{Header: http.Header{"Accept": {"application/json"}}}
	if o.User != "" {
		login.SetBasicAuth(o.User, o.Password)
	}
	var failures error
	for _, base := range bases {
		status, body, err := call(ctx, http.MethodGet, base+instancePath(o.App, c.InstanceID), login.Header, nil)
		if err == nil && status == http.StatusOK && strings.Contains(body, `"status":"UP"`) {
			return nil
		}
		failures = errors.Join(failures, err, fmt.Errorf("%s: %d %.300s", base, status, body))
	}
	return fmt.Errorf("no server has %s as UP: %w", c.InstanceID, failures)
}

// SetStatus makes the application register another status of itself: UP, DOWN or STARTING. The server does not believe an
// application that was UP that it is OUT_OF_SERVICE; Eureka.SetStatus sets that.
func (c *EurekaClient) SetStatus(status string) {
	c.tb.Helper()
	c.post("http://"+c.Address+"/status?value="+url.QueryEscape(status), nil)
}

// SetMetadata makes the application add to the metadata that it registers.
func (c *EurekaClient) SetMetadata(metadata map[string]string) {
	c.tb.Helper()
	c.post("http://"+c.Address+"/metadata", metadata)
}

// post tells an application of a test to do something; in, if not nil, is sent as JSON.
func (p *Process) post(url string, in any) {
	p.tb.Helper()
	header := http.Header{"Content-Type": {"application/json"}}
	status, body, err := call(p.tb.Context(), http.MethodPost, url, header, in)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("POST %s: %d %.300s", url, status, body)
	}
	if err != nil {
		p.tb.Fatal(err)
	}
}
