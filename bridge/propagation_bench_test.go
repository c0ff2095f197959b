package bridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/regbridge/regbridge/mcp/xds"
)

// BenchmarkPropagation is one changed instance, from the adapter's Put until the change has been received by the last of
// so many delta clients, each on a connection of its own.
func BenchmarkPropagation(b *testing.B) {
	for _, services := range []int{10_000, 100_000} {
		for _, clients := range []int{1, 100} {
			b.Run(fmt.Sprintf("%dx10/clients=%d", services, clients), func(b *testing.B) {
				br := newBenchBridge(b)
				br.opts.Coalesce = 0
				br.load(services, 10)
				cache := br.opts.Mesh.(*xds.Cache)
				cache.Open()
				server, err := xds.NewServer(cache, xds.ServerOptions{Address: "127.0.0.1:0"})
				if err == nil {
					err = server.Listen()
				}
				if err != nil {
					b.Fatal(err)
				}
				ctx, cancel := context.WithCancel(b.Context())
				var running sync.WaitGroup
				defer running.Wait()
				defer cancel()
				running.Go(func() {
					if err := server.Run(ctx); err != nil {
						b.Error(err)
					}
				})
				running.Go(func() { _ = br.publishLoop(ctx) })

				address, _ := server.Addresses()
				received := make(chan int, clients) // resources in one response
				for range clients {                 // one after the other: each is first sent everything
					running.Go(func() {
						if err := follow(ctx, address.String(), received); err != nil {
							b.Error(err)
						}
					})
					if n := <-received; n != services {
						b.Fatalf("the first answer has %d resources", n)
					}
				}
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					began := time.Now()
					br.put(benchService(i%services, 10, 1+i/services))
					for range clients {
						if n := <-received; n != 1 {
							b.Fatalf("a change was sent as %d resources", n)
						}
					}
					took = append(took, time.Since(began))
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2])/1e6, "p50-ms")
				b.ReportMetric(float64(took[len(took)*99/100])/1e6, "p99-ms")
			})
		}
	}
}

// follow is a delta client that wants all ServiceEntries and takes every response.
func follow(ctx context.Context, address string, received chan<- int) error {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	request := &discovery.DeltaDiscoveryRequest{TypeUrl: "networking.istio.io/v1/ServiceEntry"}
	for {
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		response, err := stream.Recv()
		if status.Code(err) == codes.Canceled {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case received <- len(response.GetResources()):
		case <-ctx.Done():
			return nil
		}
		request = &discovery.DeltaDiscoveryRequest{TypeUrl: response.GetTypeUrl(), ResponseNonce: response.GetNonce()}
	}
}
