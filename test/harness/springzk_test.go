package harness

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestSpringZooKeeper(t *testing.T) {
	t.Parallel()
	z := StartZooKeeper(t, ZooKeeperOptions{})
	began := time.Now()
	s := StartSpringZooKeeper(t, z.Address, SpringZooKeeperOptions{
		App: "pay.service", InstanceID: "pay-1", SSLPort: 8443, Root: "/apps", InitialStatus: "OUT_OF_SERVICE",
		Metadata: map[string]string{"a.b/c": "ä 1"},
	})
	t.Logf("spring zookeeper ready after %v", time.Since(began))
	if open := wildcards(t, s.PID()); len(open) > 0 {
		t.Errorf("the application can be reached from the network: %v", open)
	}
	conn := z.Client(t)
	node := func(want ...string) (czxid int64) {
		t.Helper()
		Eventually(t, 30*time.Second, func() error {
			data, stat, err := conn.Get("/apps/pay.service/pay-1")
			if err != nil {
				return err
			}
			czxid = stat.Czxid
			for _, text := range want {
				if !strings.Contains(string(data), text) {
					return fmt.Errorf("the node has no %s: %s", text, data)
				}
			}
			return nil
		})
		return czxid
	}
	first := node(`"sslPort":8443`, `"a.b/c":"ä 1"`, `"instance_status":"OUT_OF_SERVICE"`, `"address":"127.0.0.1"`)
	s.SetStatus("UP")
	node(`"instance_status":"UP"`)
	s.SetMetadata(map[string]string{"x": "2"})
	if got := node(`"instance_status":"UP"`, `"x":"2"`, `"a.b/c":"ä 1"`); got != first {
		t.Error("a change makes another node")
	}
	s.Kill()
	began = time.Now()
	has(t, conn, "/apps/pay.service")
	t.Logf("a killed application is gone after %v", time.Since(began))
	address := s.Address
	s.Restart()
	if s.Address != address {
		t.Errorf("restarted at %s, before %s", s.Address, address)
	}
	node(`"instance_status":"OUT_OF_SERVICE"`)
	stops(t, s.Process)
	has(t, conn, "/apps/pay.service")
}
