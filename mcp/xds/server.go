package xds

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	xdsstream "github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	clusterservice "github.com/envoyproxy/go-control-plane/envoy/service/cluster/v3"
	endpointservice "github.com/envoyproxy/go-control-plane/envoy/service/endpoint/v3"
	listenerservice "github.com/envoyproxy/go-control-plane/envoy/service/listener/v3"
	routeservice "github.com/envoyproxy/go-control-plane/envoy/service/route/v3"
)

// ServerOptions are the settings of a Server.
type ServerOptions struct {
	// Address is the base port, "host:port", which serves everything. Port 0 takes a free one.
	Address string
	// Shards are further ports, each of which serves a share.
	Shards []ShardListen
	// TLS secures all ports.
	TLS TLS
	// MaxConnectionAge is how long a connection lives, give or take a tenth; 0 means 12 hours. A client that connects
	// anew may be sent everything again.
	MaxConnectionAge time.Duration
	// DrainTimeout is how long Run waits, when its context ends, for what is still being sent; 0 means 5 seconds.
	DrainTimeout time.Duration
	// Logger takes the server's own messages; nil discards them.
	Logger *slog.Logger
}

// ShardListen is one set of shard ports: port i serves the resources whose Shard hashes to i.
type ShardListen struct {
	// Count is the number of shards, at least 2, and one of the cache's Options.ShardCounts.
	Count int
	// Address is the first port, "host:port"; the others follow it. Port 0 takes free ones.
	Address string
}

// A Server serves a Cache over gRPC.
type Server struct {
	cache *Cache
	opts  ServerOptions
	log   *slog.Logger
	ports []*port
	tls   *tlsFiles
}

// A port is one listening address. The first one is the base.
type port struct {
	part     partition
	address  string
	listener net.Listener
}

// String names the port in messages and to /debug/clients.
func (p *port) String() string {
	if p.part.count == 0 {
		return "base"
	}
	return fmt.Sprintf("%d/%d", p.part.index, p.part.count)
}

// NewServer checks the options; it opens nothing.
func NewServer(cache *Cache, opts ServerOptions) (*Server, error) {
	s := &Server{cache: cache, opts: opts, log: opts.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.opts.MaxConnectionAge <= 0 {
		s.opts.MaxConnectionAge = 12 * time.Hour
	}
	if s.opts.DrainTimeout <= 0 {
		s.opts.DrainTimeout = 5 * time.Second
	}
	if err := opts.TLS.validate(); err != nil {
		return nil, fmt.Errorf("xDS server: %w", err)
	}
	if _, _, err := splitPort(opts.Address); err != nil {
		return nil, fmt.Errorf("xDS server: address: %w", err)
	}
	s.ports = []*port{{address: opts.Address}}
	counts := map[int]bool{}
	taken := map[string]bool{opts.Address: true}
	for _, set := range opts.Shards {
		host, first, err := splitPort(set.Address)
		switch {
		case err != nil:
			return nil, fmt.Errorf("xDS server: address of %d shards: %w", set.Count, err)
		case set.Count < 2:
			return nil, fmt.Errorf("xDS server: %d shards at %s: a set has at least 2", set.Count, set.Address)
		case first != 0 && first+set.Count-1 > 65535:
			return nil, fmt.Errorf("xDS server: %d shards at %s: the ports end at 65535", set.Count, set.Address)
		case counts[set.Count]:
			return nil, fmt.Errorf("xDS server: %d shards are asked for twice", set.Count)
		case !slices.Contains(cache.shards, set.Count):
			return nil, fmt.Errorf("xDS server: the cache is not divided into %d shards", set.Count)
		}
		counts[set.Count] = true
		for i := range set.Count {
			number := first
			if first != 0 {
				number += i
			}
			address := net.JoinHostPort(host, strconv.Itoa(number))
			if number != 0 && taken[address] {
				return nil, fmt.Errorf("xDS server: %d shards at %s: address %s is used twice", set.Count, set.Address, address)
			}
			taken[address] = true
			s.ports = append(s.ports, &port{part: partition{set.Count, i}, address: address})
		}
	}
	return s, nil
}

func splitPort(address string) (host string, number int, err error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, fmt.Errorf("%q is not host:port: %w", address, err)
	}
	number, err = strconv.Atoi(text)
	if err != nil || number < 0 || number > 65535 {
		return "", 0, fmt.Errorf("%q does not have a port from 0 to 65535", address)
	}
	return host, number, nil
}

// Listen opens all ports and reads the TLS files. If one port cannot be opened, none is. Run closes them.
func (s *Server) Listen() error {
	if s.opts.TLS.CertFile != "" {
		var err error
		if s.tls, err = newTLSFiles(s.opts.TLS, s.log); err != nil {
			return err
		}
	}
	for i, p := range s.ports {
		var err error
		if p.listener, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", p.address); err != nil {
			for _, opened := range s.ports[:i] {
				_ = opened.listener.Close()
				opened.listener = nil
			}
			return fmt.Errorf("opening the xDS port %s: %w", p, err)
		}
	}
	return nil
}

// Addresses returns the addresses of the ports that Listen opened: the base, and of each set of shards those of shards
// 0, 1 and so on.
func (s *Server) Addresses() (base net.Addr, shards map[int][]net.Addr) {
	shards = map[int][]net.Addr{}
	for _, p := range s.ports {
		switch {
		case p.listener == nil:
		case p.part.count == 0:
			base = p.listener.Addr()
		default:
			shards[p.part.count] = append(shards[p.part.count], p.listener.Addr())
		}
	}
	return base, shards
}

// Run serves until ctx ends, and returns nil then, or until a port fails. It calls Listen if nobody has, and can be called
// once. Before it returns it ends all streams, lets what is being sent go out for DrainTimeout, and closes the ports.
func (s *Server) Run(ctx context.Context) error {
	if s.ports[0].listener == nil {
		if err := s.Listen(); err != nil {
			return err
		}
	}
	streams, endStreams := context.WithCancel(context.WithoutCancel(ctx))
	defer endStreams()
	var handlers sync.WaitGroup
	var servers []*grpc.Server
	var listeners []*listener
	serving, ctx := errgroup.WithContext(ctx)
	for _, p := range s.ports {
		g := s.newGRPC(&endpoint{cache: s.cache, port: p, ctx: streams, handlers: &handlers})
		l := &listener{Listener: p.listener, conns: map[*conn]struct{}{}}
		servers, listeners = append(servers, g), append(listeners, l)
		serving.Go(func() error {
			if err := g.Serve(l); err != nil { // which closes it
				return fmt.Errorf("serving the xDS port %s: %w", p, err)
			}
			return nil
		})
	}
	if s.tls != nil {
		serving.Go(func() error { s.tls.watch(ctx); return nil })
	}
	<-ctx.Done()

	var stopping sync.WaitGroup
	for _, g := range servers {
		stopping.Go(g.GracefulStop)
	}
	endStreams()
	late := time.AfterFunc(s.opts.DrainTimeout, func() {
		for _, l := range listeners {
			l.closeConns()
		}
	})
	stopping.Wait()
	if !late.Stop() {
		s.log.Warn("xDS connections were closed that did not end in time", "timeout", s.opts.DrainTimeout)
	}
	handlers.Wait()
	return serving.Wait()
}

// A listener can close the connections that it accepted. gRPC's own Stop waits for those that have not said anything yet.
type listener struct {
	net.Listener

	mu     sync.Mutex
	conns  map[*conn]struct{}
	closed bool
}

type conn struct {
	net.Conn
	listener *listener
}

// Accept implements net.Listener.
func (l *listener) Accept() (net.Conn, error) {
	accepted, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{accepted, l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return c, accepted.Close()
	}
	l.conns[c] = struct{}{}
	return c, nil
}

func (l *listener) closeConns() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for c := range l.conns {
		_ = c.Conn.Close()
	}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.listener.mu.Lock()
	delete(c.listener.conns, c)
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

// newGRPC makes the server of one port.
func (s *Server) newGRPC(e *endpoint) *grpc.Server {
	opts := []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		// istiod pings every 30 seconds, which gRPC by default takes for abuse.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time:                  30 * time.Second, // our own pings notice a dead client within 40 s
			Timeout:               10 * time.Second,
			MaxConnectionAge:      s.opts.MaxConnectionAge, // gRPC adds the jitter
			MaxConnectionAgeGrace: time.Minute,
		}),
		grpc.MaxConcurrentStreams(128), // per connection; a client needs one or a few
		grpc.MaxHeaderListSize(64 << 10),
		grpc.MaxRecvMsgSize(maxHeld),
		grpc.ConnectionTimeout(20 * time.Second),
	}
	if s.tls != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(s.tls.server())))
	}
	g := grpc.NewServer(opts...)
	discovery.RegisterAggregatedDiscoveryServiceServer(g, e)
	clusterservice.RegisterClusterDiscoveryServiceServer(g, e)
	endpointservice.RegisterEndpointDiscoveryServiceServer(g, e)
	listenerservice.RegisterListenerDiscoveryServiceServer(g, e)
	routeservice.RegisterRouteDiscoveryServiceServer(g, e)
	reflection.Register(g)
	return g
}

// An endpoint is the xDS services of one port. Their unary Fetch methods are not offered.
type endpoint struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	clusterservice.UnimplementedClusterDiscoveryServiceServer
	endpointservice.UnimplementedEndpointDiscoveryServiceServer
	listenerservice.UnimplementedListenerDiscoveryServiceServer
	routeservice.UnimplementedRouteDiscoveryServiceServer

	cache    *Cache
	port     *port
	ctx      context.Context //nolint:containedctx // ends all streams; gRPC gives handlers none of ours
	handlers *sync.WaitGroup
}

var errStopping = status.Error(codes.Unavailable, "the server is stopping: connect again")

// serve runs one stream on go-control-plane's server, until that returns or the stream is cut off. A goroutine of its own
// runs it since a client that takes nothing keeps it waiting in Send, which only the return of the handler ends.
func (e *endpoint) serve(ctx context.Context, protocol, typeURL string, run func(context.Context, *stream) error) error {
	info := streamInfo{protocol: protocol, typeURL: typeURL, listener: e.port.String(), part: e.port.part}
	if p, ok := peer.FromContext(ctx); ok {
		info.peer = p.Addr.String()
	}
	st := e.cache.join(info)
	running, stop := context.WithCancel(e.ctx) //nolint:contextcheck // the stream's own context ends what it waits for
	done := make(chan error, 1)
	e.handlers.Go(func() {
		defer stop()
		err := run(running, st)
		st.leave()
		done <- cmp.Or(err, st.failure())
	})
	select {
	case err := <-done:
		if err == nil && e.ctx.Err() != nil {
			return errStopping
		}
		return err
	case <-st.cut:
		stop()
		return status.Error(codes.Aborted, errTooSlow.Error())
	}
}

func (e *endpoint) sotw(str xdsstream.Stream, typeURL string) error {
	return e.serve(str.Context(), protocolSotw, typeURL, func(ctx context.Context, st *stream) error {
		return sotw.NewServer(ctx, st, st).StreamHandler(sotwStream{str, st}, typeURL)
	})
}

func (e *endpoint) delta(str xdsstream.DeltaStream, typeURL string) error {
	return e.serve(str.Context(), protocolDelta, typeURL, func(ctx context.Context, st *stream) error {
		return delta.NewServer(ctx, st, st).DeltaStreamHandler(deltaStream{str, st}, typeURL)
	})
}
