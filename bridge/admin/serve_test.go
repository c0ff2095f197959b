package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/mcp/xds"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Serve ends with its context, also while a client has not taken its answer, and a request has not come to its end.
func TestServe(t *testing.T) {
	l := listen(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	writing := make(chan struct{})
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/endless" {
			close(writing)
			for {
				if _, err := w.Write(make([]byte, 1<<20)); err != nil {
					return
				}
			}
		}
		fmt.Fprint(w, "here")
	})
	go func() { done <- Serve(ctx, l, handler, slog.New(slog.DiscardHandler)) }()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + l.Addr().String() + "/")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	for _, request := range []string{"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n", "GET / HT"} {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte(request)); err != nil {
			t.Fatal(err)
		}
	}
	<-writing
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Serve: %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Serve did not end with its context")
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("the port is still open")
	}
}

func TestServeFails(t *testing.T) {
	l := listen(t)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	err := Serve(t.Context(), l, http.NotFoundHandler(), slog.New(slog.DiscardHandler))
	if !errors.Is(err, net.ErrClosed) || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Errorf("got %v, want an error that tells which port failed", err)
	}
}

// The page shows a real client, with what it asked for and took.
func TestClients(t *testing.T) {
	w := newWorld(t, bridge.Config{Read: true})
	server, err := xds.NewServer(w.cache, xds.ServerOptions{Address: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Listen(); err != nil {
		t.Fatal(err)
	}
	base, _ := server.Addresses()
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("the xDS server ended with: %v", err)
		}
	}()
	conn, err := grpc.NewClient(base.String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	request := &discovery.DiscoveryRequest{TypeUrl: "networking.istio.io/v1/ServiceEntry", Node: &core.Node{Id: "istiod-1"}}
	if err := stream.Send(request); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	request.ResponseNonce, request.VersionInfo = answer.Nonce, answer.VersionInfo
	if err := stream.Send(request); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var clients []xds.Client
		text := w.get("/debug/clients")
		if err := json.Unmarshal([]byte(text), &clients); err != nil {
			t.Fatal(err)
		}
		if len(clients) == 1 && clients[0].Node == "istiod-1" && len(clients[0].Types) == 1 && clients[0].Types[0].TypeURL == request.TypeUrl &&
			clients[0].Types[0].Acked == answer.VersionInfo {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the page never showed the client with what it took: %s", text)
		}
	}
}
