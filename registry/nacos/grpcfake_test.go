package nacos

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "github.com/nacos-group/nacos-sdk-go/v2/api/grpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/registrytest"
)

const (
	pushUser     = "reader-of-the-tests"
	pushPassword = "secret-password-of-the-tests"
	pushGroup    = "DEFAULT_GROUP"
	// pushLimit is how long a test waits for anything.
	pushLimit = 20 * time.Second
)

// pushServer speaks the part of Nacos 2's gRPC protocol that the adapter uses, as a server 2.3.2 was seen to: requests of a
// connection are refused with code 301 until its stream was introduced, and a little longer; a subscription is answered,
// and pushed once more; a change is pushed to all subscribers; disabled instances are not shown; emptied services stay.
type pushServer struct {
	pb.UnimplementedRequestServer
	pb.UnimplementedBiRequestStreamServer
	t    *testing.T
	port int           // of HTTP; gRPC has grpcOffset more
	tls  *tls.Config   // of both ports
	age  time.Duration // of connections, after which they are asked to go; 0 is unlimited

	mu        sync.Mutex
	services  map[key][]registry.Instance
	raw       map[key]string // the JSON of a service in place of what it should be
	clients   map[string]*pushClient
	conns     map[string]net.Conn
	held      []net.Conn // by a black hole
	user      string     // empty: no login is needed
	password  string
	tokens    map[string]bool
	early     int           // how many requests after the introduction come too early
	skew      time.Duration // of the clock
	blackhole bool          // connections are accepted and nothing else
	hanging   bool
	hangAt    int
	hung      chan struct{}
	seen      int
	pushed    int // number of the last push
	detected  int // answers of clients that were asked whether they live
	accepted  int // gRPC connections
	busy      map[string]int
	most      map[string]int // requests at once, by type
	log       []pushRequest
	// answer, if not nil, gives an answer, or an error, in place of the proper one; an empty answer means that one.
	answer func(r pushRequest) (string, error)
	// before, if not nil, is called before an answer is sent that has been made.
	before func(r pushRequest)

	http    *http.Server
	grpc    *grpc.Server
	serving sync.WaitGroup
}

// pushRequest is what a client sent.
type pushRequest struct {
	typ       string
	key       key
	subscribe bool
	client    string
	headers   map[string]string
	body      string
	at        time.Time
}

// pushClient is a connection with a stream.
type pushClient struct {
	early      int
	introduced bool // by its setup request, which was not left unanswered
	lost       bool // the server does not know it any more
	subscribed map[key]bool
	out        []*pb.Payload
	wake       chan struct{} // has room for one
	unacked    map[string]bool
	alive      *time.Timer
}

func newPushServer(t *testing.T) *pushServer {
	t.Helper()
	f := &pushServer{
		t: t, services: map[key][]registry.Instance{}, raw: map[key]string{}, clients: map[string]*pushClient{},
		conns: map[string]net.Conn{}, user: pushUser, password: pushPassword, tokens: map[string]bool{}, early: 1,
		busy: map[string]int{}, most: map[string]int{},
	}
	f.start()
	t.Cleanup(f.stop)
	return f
}

// edit changes settings of the server, or looks at them.
func (f *pushServer) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// listen takes a pair of ports that are both free, or the same ones as before.
func (f *pushServer) listen() (web, rpc net.Listener) {
	f.t.Helper()
	var err error
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		if web, err = net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(f.port)); err != nil {
			continue
		}
		port := web.Addr().(*net.TCPAddr).Port
		if rpc, err = net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port+grpcOffset)); err == nil {
			f.port = port
			return web, rpc
		}
		web.Close()
	}
	f.t.Fatalf("listen: %v", err)
	return nil, nil
}

func (f *pushServer) start() {
	f.t.Helper()
	web, rpc := f.listen()
	options := []grpc.ServerOption{grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(1 << 20)}
	if f.tls != nil {
		config := f.tls.Clone()
		config.NextProtos = []string{"h2"}
		options = append(options, grpc.Creds(credentials.NewTLS(config)))
		web = tls.NewListener(web, f.tls)
	}
	if f.age > 0 {
		options = append(options, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: f.age}))
	}
	f.http = &http.Server{Handler: http.HandlerFunc(f.login), ReadHeaderTimeout: time.Minute}
	f.grpc = grpc.NewServer(options...)
	pb.RegisterRequestServer(f.grpc, f)
	pb.RegisterBiRequestStreamServer(f.grpc, f)
	web2, rpc2 := f.http, f.grpc
	f.serving.Go(func() { _ = web2.Serve(web) })
	f.serving.Go(func() { _ = rpc2.Serve(&pushListener{rpc, f}) })
}

func (f *pushServer) stop() {
	if f.grpc == nil {
		return
	}
	f.http.Close()
	f.grpc.Stop()
	f.edit(func() {
		for _, c := range f.held {
			c.Close()
		}
		f.held, f.grpc = nil, nil
	})
	f.serving.Wait()
}

// pushListener knows the connections, so that they can be cut.
type pushListener struct {
	net.Listener
	f *pushServer
}

func (l *pushListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		l.f.mu.Lock()
		hold := l.f.blackhole
		if hold {
			l.f.held = append(l.f.held, c)
		} else {
			l.f.accepted++
			l.f.conns[c.RemoteAddr().String()] = c
		}
		l.f.mu.Unlock()
		if !hold {
			return c, nil
		}
	}
}

// cut breaks the connections of all clients.
func (f *pushServer) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

// arrive notes a request, and reports whether it is to hang.
func (f *pushServer) arrive(r pushRequest) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen++
	f.log = append(f.log, r)
	hang := f.hanging
	if f.hung != nil {
		if f.hangAt--; f.hangAt == 0 {
			hang = true
			close(f.hung)
			f.hung = nil
		}
	}
	return hang
}

// login is the HTTP side.
func (f *pushServer) login(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if f.arrive(pushRequest{typ: "login", at: time.Now()}) {
		<-r.Context().Done()
		return
	}
	if r.Method != http.MethodPost || !strings.HasPrefix(r.URL.Path, "/nacos/v1/auth/") || r.URL.RawQuery != "" {
		http.NotFound(w, r)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.PostForm.Get("username") != f.user || r.PostForm.Get("password") != f.password {
		http.Error(w, "user not found!", http.StatusForbidden)
		return
	}
	token := fmt.Sprintf("token-%d-of-the-tests", len(f.log))
	f.tokens[token] = true
	fmt.Fprintf(w, `{"accessToken":%q,"tokenTtl":18000,"globalAdmin":false,"username":%q}`, token, f.user)
}

// errorAnswer is an answer that refuses.
func errorAnswer(code int, message string) string {
	return fmt.Sprintf(`{"resultCode":500,"errorCode":%d,"message":%q,"success":false}`, code, message)
}

func clientOf(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	return p.Addr.String()
}

// Request implements the unary side of the protocol.
func (f *pushServer) Request(ctx context.Context, p *pb.Payload) (*pb.Payload, error) {
	var body struct {
		Namespace   string
		GroupName   string
		ServiceName string
		PageNo      int
		PageSize    int
		Subscribe   bool
	}
	if err := json.Unmarshal(p.GetBody().GetValue(), &body); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	r := pushRequest{
		typ: p.GetMetadata().GetType(), key: key{body.GroupName, body.ServiceName}, subscribe: body.Subscribe, client: clientOf(ctx),
		headers: p.GetMetadata().GetHeaders(), body: string(p.GetBody().GetValue()), at: time.Now(),
	}
	f.edit(func() {
		f.busy[r.typ]++
		f.most[r.typ] = max(f.most[r.typ], f.busy[r.typ])
	})
	defer f.edit(func() { f.busy[r.typ]-- })
	if f.arrive(r) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	f.mu.Lock()
	answer, before := f.answer, f.before
	f.mu.Unlock()
	text := ""
	if answer != nil {
		var err error
		if text, err = answer(r); errors.Is(err, errHang) {
			<-ctx.Done()
			return nil, ctx.Err()
		} else if err != nil {
			return nil, err
		}
	}
	if text == "" {
		text = f.respond(r, body.Namespace, body.PageNo, body.PageSize)
	}
	if before != nil {
		before(r)
	}
	typ := strings.TrimSuffix(r.typ, "Request") + "Response"
	if strings.HasPrefix(text, `{"resultCode":500`) {
		typ = "ErrorResponse"
	}
	return &pb.Payload{Metadata: &pb.Metadata{Type: typ}, Body: &anypb.Any{Value: []byte(text)}}, nil
}

var (
	// errHang lets a request go unanswered.
	errHang = errors.New("never answered")
	// errTooLong is what gRPC makes of an answer that is too long.
	errTooLong = status.Error(codes.ResourceExhausted, "grpc: received message larger than max")
)

// respond gives the proper answer.
func (f *pushServer) respond(r pushRequest, namespace string, page, size int) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.typ == "ServerCheckRequest" {
		return fmt.Sprintf(`{"resultCode":200,"errorCode":0,"connectionId":%q,"supportAbilityNegotiation":true,"success":true}`, r.client)
	}
	c := f.clients[r.client]
	if c == nil || !c.introduced || c.lost || c.early > 0 {
		if c != nil {
			c.early--
		}
		return errorAnswer(301, "Connection is unregistered.")
	}
	if r.typ == "HealthCheckRequest" {
		return `{"resultCode":200,"errorCode":0,"success":true}`
	}
	if f.user != "" && !f.tokens[r.headers["accessToken"]] {
		if r.headers["accessToken"] == "" {
			return errorAnswer(403, "user not found!")
		}
		return errorAnswer(403, "token invalid!")
	}
	if namespace != "public" {
		return errorAnswer(400, "the tests have the namespace public alone")
	}
	switch r.typ {
	case "ServiceListRequest":
		names := []string{}
		for k := range f.services {
			if k.group == r.key.group {
				names = append(names, k.name)
			}
		}
		count := len(names)
		slices.Sort(names) // pages agree; what happens if they do not is for the listing's tests
		names = names[min((page-1)*size, count):min(page*size, count)]
		list, err := json.Marshal(names)
		if err != nil {
			panic(err)
		}
		return fmt.Sprintf(`{"resultCode":200,"errorCode":0,"count":%d,"serviceNames":%s,"success":true}`, count, list)
	case "SubscribeServiceRequest":
		first := r.subscribe && !c.subscribed[r.key]
		if r.subscribe {
			c.subscribed[r.key] = true
		} else {
			delete(c.subscribed, r.key)
		}
		text := fmt.Sprintf(`{"resultCode":200,"errorCode":0,"message":"success","serviceInfo":%s,"success":true}`, f.info(r.key, 0))
		if first {
			f.pushTo(c, f.info(r.key, 0))
		}
		return text
	default:
		return errorAnswer(500, "no such request: "+r.typ)
	}
}

// info is the JSON of a service as it is now, by a clock that is age late. f.mu is held.
func (f *pushServer) info(k key, age time.Duration) string {
	if raw := f.raw[k]; raw != "" {
		return raw
	}
	return f.infoOf(k, time.Now().Add(f.skew-age), f.services[k]...)
}

func (f *pushServer) infoOf(k key, at time.Time, instances ...registry.Instance) string {
	hosts := []map[string]any{}
	for _, i := range instances {
		if i.Disabled {
			continue
		}
		hosts = append(hosts, map[string]any{
			"instanceId": i.Address, "ip": i.Address, "port": i.Port, "weight": i.Weight, "healthy": !i.Unhealthy, "enabled": true,
			"ephemeral": true, "clusterName": "DEFAULT", "serviceName": k.id(), "metadata": i.Metadata.Map(),
			"instanceHeartBeatInterval": 5000, "instanceHeartBeatTimeOut": 15000, "ipDeleteTimeout": 30000,
		})
	}
	b, err := json.Marshal(map[string]any{
		"name": k.name, "groupName": k.group, "clusters": "", "cacheMillis": 10000, "hosts": hosts, "lastRefTime": at.UnixMilli(),
		"checksum": "", "allIPs": false, "reachProtectionThreshold": false, "valid": true,
	})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// pushTo pushes a service. f.mu is held.
func (f *pushServer) pushTo(c *pushClient, info string) {
	f.pushed++
	id := strconv.Itoa(f.pushed)
	c.unacked[id] = true
	f.sendTo(c, "NotifySubscriberRequest", fmt.Sprintf(`{"headers":{},"requestId":%q,"serviceInfo":%s,"module":"naming"}`, id, info))
}

// sendTo sends a request to a client. f.mu is held.
func (f *pushServer) sendTo(c *pushClient, typ, body string) {
	c.out = append(c.out, &pb.Payload{Metadata: &pb.Metadata{Type: typ}, Body: &anypb.Any{Value: []byte(body)}})
	c.rouse()
}

func (c *pushClient) rouse() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// RequestBiStream implements the side of the protocol by which the server asks.
func (f *pushServer) RequestBiStream(stream pb.BiRequestStream_RequestBiStreamServer) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	name := clientOf(ctx)
	c := &pushClient{subscribed: map[key]bool{}, wake: make(chan struct{}, 1), unacked: map[string]bool{}}
	f.edit(func() { f.clients[name] = c })
	defer f.edit(func() {
		delete(f.clients, name)
		if c.alive != nil {
			c.alive.Stop()
		}
	})
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel(nil)
	sending.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-c.wake:
			}
			var out []*pb.Payload
			f.edit(func() {
				if !f.hanging {
					out, c.out = c.out, nil
				}
			})
			for _, p := range out {
				if stream.Send(p) != nil {
					return
				}
			}
		}
	})
	for {
		p, err := stream.Recv()
		if err != nil {
			return nil //nolint:nilerr // the client has gone
		}
		var body struct {
			RequestID string
			Success   bool
		}
		if err := json.Unmarshal(p.GetBody().GetValue(), &body); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		switch typ := p.GetMetadata().GetType(); typ {
		case "ConnectionSetupRequest":
			hang := f.arrive(pushRequest{
				typ: typ, client: name, headers: p.GetMetadata().GetHeaders(), body: string(p.GetBody().GetValue()), at: time.Now(),
			})
			f.edit(func() { c.introduced, c.early = !hang, f.early })
		case "NotifySubscriberResponse":
			f.edit(func() {
				if body.Success {
					delete(c.unacked, body.RequestID)
				}
			})
		case "ClientDetectionResponse":
			f.edit(func() {
				if c.alive != nil && c.alive.Stop() {
					f.detected++
				}
			})
		case "ConnectResetResponse":
		default:
			return status.Error(codes.InvalidArgument, "what is a "+typ)
		}
	}
}

// set is Set of the suite.
func (f *pushServer) set(name string, instances ...registry.Instance) {
	f.setKey(key{pushGroup, name}, instances...)
}

func (f *pushServer) setKey(k key, instances ...registry.Instance) {
	f.edit(func() {
		f.services[k] = instances
		f.push(k)
	})
}

// push pushes a service to its subscribers. f.mu is held.
func (f *pushServer) push(k key) { f.pushInfo(k, f.info(k, 0)) }

func (f *pushServer) pushInfo(k key, info string) {
	for _, c := range f.clients {
		if c.subscribed[k] && !c.lost {
			f.pushTo(c, info)
		}
	}
}

// remove removes the service, of which its subscribers learn that it is empty.
func (f *pushServer) remove(name string) {
	k := key{pushGroup, name}
	f.edit(func() {
		delete(f.services, k)
		f.push(k)
	})
}

// detect asks all clients whether they live; who does not answer within a second is cut off.
func (f *pushServer) detect() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, c := range f.clients {
		conn := f.conns[name]
		c.alive = time.AfterFunc(time.Second, func() { conn.Close() })
		f.sendTo(c, "ClientDetectionRequest", `{"headers":{},"requestId":"d","module":"internal"}`)
	}
}

// subscribers counts the subscriptions to a service. f.mu is held.
func (f *pushServer) subscribers(name string) int {
	n := 0
	for _, c := range f.clients {
		if c.subscribed[key{pushGroup, name}] {
			n++
		}
	}
	return n
}

// asked counts the requests of a type, about the service unless that is empty. f.mu is held.
func (f *pushServer) asked(typ, name string) int {
	n := 0
	for _, r := range f.log {
		if r.typ == typ && (name == "" || r.key.name == name) {
			n++
		}
	}
	return n
}

// acknowledged counts the pushes that the clients that are there have acknowledged. f.mu is held.
func (f *pushServer) acknowledged() int {
	n := f.pushed
	for _, c := range f.clients {
		n -= len(c.unacked)
	}
	return n
}

// await waits until ok, which sees the server unchanged, is true.
func (f *pushServer) await(what string, ok func() bool) {
	f.t.Helper()
	if !f.sees(ok) {
		f.t.Fatalf("waited in vain for %s", what)
	}
}

// sees is await for the server's own goroutines.
func (f *pushServer) sees(ok func() bool) bool {
	for deadline := time.Now().Add(pushLimit); ; time.Sleep(time.Millisecond) {
		done := false
		f.edit(func() { done = ok() })
		if done || time.Now().After(deadline) {
			return done
		}
	}
}

func (f *pushServer) entry() registry.Entry {
	return registry.Entry{
		Type: "nacos2", Name: "test", Domain: "127.0.0.1", Port: uint32(f.port), NacosGroups: []string{pushGroup}, AuthSecretName: "nacos",
	}
}

// backend is the server as the suite wants it.
func (f *pushServer) backend() registrytest.Backend {
	hang := func(on bool) {
		f.edit(func() {
			f.hanging = on
			for _, c := range f.clients {
				c.rouse()
			}
		})
	}
	return registrytest.Backend{
		Entry:       f.entry(),
		Credentials: registry.Credentials{"nacosUsername": pushUser, "nacosPassword": pushPassword},
		ID:          func(service string) string { return pushGroup + "@@" + service },
		Fact: func(i registry.Instance) registry.Instance {
			i.Disabled = false // disabled instances are not shown
			return i
		},
		Set:     f.set,
		Remove:  f.remove,
		Stop:    f.stop,
		Restart: f.start,
		Wipe: func() {
			f.stop()
			f.edit(func() { clear(f.services) })
			f.start()
		},
		Refuse: func(on bool) {
			f.edit(func() {
				clear(f.tokens)
				f.password = pushPassword
				if on {
					f.password = "another-one"
				}
			})
		},
		Hang: hang,
		HangAt: func(n int) <-chan struct{} {
			hung := make(chan struct{})
			f.edit(func() { f.hangAt, f.hung = n, hung })
			return hung
		},
		Requests: func() (n int) {
			f.edit(func() { n = f.seen })
			return n
		},
		EntryAt: func(hostport string) registry.Entry {
			e := f.entry()
			e.Domain = hostport
			return e
		},
	}
}
