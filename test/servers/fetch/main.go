// Command fetch gets the servers that tests run against, all or those named, so that no test has to wait for it. It says
// which it could not get and why; that is an error only with REQUIRE_SERVERS=1.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/regbridge/regbridge/test/servers"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	wanted := servers.All()
	if len(os.Args) > 1 {
		wanted = nil
		for _, name := range os.Args[1:] {
			wanted = append(wanted, servers.Server(name))
		}
	}
	if missing := fetch(ctx, wanted); missing > 0 && (servers.Required() || ctx.Err() != nil) {
		os.Exit(1)
	}
}

// fetch returns how many of the servers could not be had.
func fetch(ctx context.Context, wanted []servers.Server) (missing int) {
	for _, s := range wanted {
		start := time.Now()
		slow := time.AfterFunc(time.Second, func() {
			fmt.Printf("%s: making it; about %v where nothing is cached\n", s, s.ColdTime())
		})
		path, err := s.Fetch(ctx)
		slow.Stop()
		if err != nil {
			missing++
			fmt.Printf("%s: not available: %v\n", s, err)
			if ctx.Err() != nil {
				return missing
			}
			continue
		}
		fmt.Printf("%s: %s (%v)\n", s, path, time.Since(start).Round(10*time.Millisecond))
	}
	return missing
}
