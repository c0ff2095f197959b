package harness

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// UpstreamOptions says what to serve. Only Name is needed.
type UpstreamOptions struct {
	// Name is what the server answers with.
	Name string
	// IP is the address to listen on, 127.0.0.1 to 127.255.255.254; empty means 127.0.0.1.
	IP string
	// Port is the port to listen on; 0 means a free one.
	Port int
	// TLS, if not nil, makes the server speak TLS alone.
	TLS *tls.Config
	// Handler, if not nil, answers HTTP requests in place of the name.
	Handler http.Handler
}

// Upstream is an HTTP server in the test's process: an instance of some service. It answers HTTP/1.1 and HTTP/2, with
// and without TLS, with its name as the body; and gRPC health checks, with its name in the header metadata "upstream".
type Upstream struct {
	Name string
	IP   string
	Port int
	// requests counts also those that Handler answers.
	requests atomic.Int64
	server   *http.Server
	done     chan struct{} // closed when nothing is served any more
}

// StartUpstream starts an upstream, which serves until Stop, or the end of the test.
func StartUpstream(tb testing.TB, o UpstreamOptions) *Upstream {
	tb.Helper()
	u := &Upstream{Name: o.Name, IP: cmp.Or(o.IP, "127.0.0.1"), Port: o.Port, done: make(chan struct{})}
	if u.Port == 0 {
		u.Port = FreePort(tb)
	}
	var config net.ListenConfig
	l, err := config.Listen(tb.Context(), "tcp", u.Address())
	if err != nil {
		tb.Fatalf("start upstream %s: %v", o.Name, err)
	}
	answer := o.Handler
	if answer == nil {
		answer = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = fmt.Fprint(w, u.Name) })
	}
	rpc := grpc.NewServer(grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs("upstream", u.Name)); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}))
	grpc_health_v1.RegisterHealthServer(rpc, health.NewServer())
	u.server = &http.Server{
		TLSConfig: o.TLS, Protocols: new(http.Protocols),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			u.requests.Add(1)
			if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
				rpc.ServeHTTP(w, r)
				return
			}
			answer.ServeHTTP(w, r)
		}),
	}
	u.server.Protocols.SetHTTP1(true)
	u.server.Protocols.SetHTTP2(true)
	u.server.Protocols.SetUnencryptedHTTP2(true)
	go func() {
		defer close(u.done)
		serve := u.server.Serve
		if o.TLS != nil {
			serve = func(l net.Listener) error { return u.server.ServeTLS(l, "", "") }
		}
		if err := serve(l); !errors.Is(err, http.ErrServerClosed) {
			tb.Errorf("upstream %s: %v", o.Name, err)
		}
		rpc.Stop()
	}()
	tb.Cleanup(u.Stop)
	return u
}

// Address is host:port.
func (u *Upstream) Address() string { return net.JoinHostPort(u.IP, strconv.Itoa(u.Port)) }

// Requests is the number of requests so far.
func (u *Upstream) Requests() int64 { return u.requests.Load() }

// Stop closes the port and all connections. It may be called again.
func (u *Upstream) Stop() {
	_ = u.server.Close() // its error is the listener's, which is closed all the same
	<-u.done
}
