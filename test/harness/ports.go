package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/regbridge/regbridge/test/servers"
)

// The ports of servers lie below the range from which systems take the ports of outgoing connections. A port from that
// range could be lost while its server is restarted: even a client that keeps dialling it can end up connected to itself.
const firstPort, endPort = 20000, 32000

// portRange is where ports for one purpose are taken from.
type portRange struct {
	file             string // in the cache folder: the next port
	first, end, step int
	free             func(ctx context.Context, port int) bool
}

var anyPorts = portRange{"next-port", firstPort, endPort, 1, isFree}

// FreePort returns a port that is free on 127.0.0.1, for TCP and UDP. Ports are handed out in turn, to all test
// processes of the user, so that nobody gets the same one soon.
func FreePort(tb testing.TB) int {
	tb.Helper()
	ports, err := freePorts(tb.Context(), 1)
	if err != nil {
		tb.Fatal(err)
	}
	return ports[0]
}

func freePorts(ctx context.Context, n int) ([]int, error) { return anyPorts.take(ctx, n) }

func (r portRange) take(ctx context.Context, n int) ([]int, error) {
	cache, err := servers.CacheDir()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(cache, r.file)
	unlock, err := servers.Lock(ctx, path+".lock")
	if err != nil {
		return nil, fmt.Errorf("find a free port: %w", err)
	}
	defer unlock()
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("find a free port: %w", err)
	}
	next, _ := strconv.Atoi(string(text)) // 0, the first time
	var ports []int
	for tries := 0; len(ports) < n; tries++ {
		if tries == r.end-r.first {
			return nil, fmt.Errorf("no port of 127.0.0.1 from %d to %d is free", r.first, r.end-1)
		}
		if next < r.first || next >= r.end {
			next = r.first
		}
		if r.free(ctx, next) {
			ports = append(ports, next)
		}
		next += r.step
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(next)), 0o644); err != nil {
		return nil, fmt.Errorf("find a free port: %w", err)
	}
	return ports, nil
}

func isFree(ctx context.Context, port int) bool {
	addr := loopback(port)
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", addr)
	if err != nil {
		return false
	}
	defer l.Close() // nothing was sent
	p, err := config.ListenPacket(ctx, "udp", addr)
	if err != nil {
		return false
	}
	return p.Close() == nil
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
