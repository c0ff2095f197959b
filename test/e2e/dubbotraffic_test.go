//go:build linux

package e2e

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/regbridge/regbridge/test/harness"
)

// TestDubboTraffic calls two real providers through a sidecar that takes over all connections, as Istio's do. Both serve the
// same interface on the same port, and differ in the group alone: the sidecar tells them apart by their virtual addresses.
// Dubbo refuses to register loopback addresses, so that all runs in a network of its own.
func TestDubboTraffic(t *testing.T) {
	harness.InNamespace(t, func(t *testing.T) {
		redirect(t, 15001)
		z := harness.StartZooKeeper(t, harness.ZooKeeperOptions{})
		w := newWorld(t)
		w.startBridge(t, harness.RegbridgeOptions{Config: map[string]string{"zk.yaml": mcpBridge("zk", fmt.Sprintf(
			"{type: zookeeper, name: z, domain: %s, refreshInterval: %v, guard: {settle: 2s, hold: 20m}}", z.Address, interval))}})
		client := startReader(t, w.bridge.XDS)
		w.startMesh(t, harness.IstiodOptions{}, harness.SidecarOptions{
			Delta: true, SDS: startSDS(t, harness.NewCA(t, "mesh")), Metadata: map[string]any{"INTERCEPTION_MODE": "REDIRECT"},
		})
		const port = 20880
		providers := map[string]*harness.Dubbo{}
		for group, ip := range map[string]string{"red": "10.0.0.7", "blue": "10.0.0.8"} {
			providers[group] = harness.StartDubbo(t, harness.DubboOptions{
				Version: map[string]int{"red": 2, "blue": 3}[group], ZooKeeper: z.Address, App: group, Mode: "interface", Group: group,
				Protocols: []harness.DubboProtocol{{Name: "dubbo", Port: port}}, Address: ip, Bind: ip,
			})
		}
		virtual := map[string]string{}
		for group := range providers {
			harness.Eventually(t, patience, func() error {
				host, address := client.virtualAddress("providers-demo.api.greeter-0.0.0-" + group)
				if address == "" {
					return fmt.Errorf("the group %s has no virtual address", group)
				}
				virtual[group] = net.JoinHostPort(address, "20880")
				return w.has(host, fmt.Sprintf("%s:%d", map[string]string{"red": "10.0.0.7", "blue": "10.0.0.8"}[group], port))
			})
		}
		if virtual["red"] == virtual["blue"] {
			t.Fatalf("both groups are at %s", virtual["red"])
		}
		for group, address := range virtual {
			other := map[string]string{"red": "blue", "blue": "red"}[group]
			harness.Eventually(t, patience, func() error {
				said, err := dubboCall(address, group, "", "you")
				if err == nil && said != providers[group].ID+" greets you" {
					err = fmt.Errorf("the provider says %q", said)
				}
				return err
			})
			if said, err := dubboCall(address, other, "", "you"); err == nil {
				t.Errorf("%s, where %s is, serves %s, and says %q", address, group, other, said)
			}
		}
		// The one that is gone is gone, and the other one is not.
		providers["red"].Kill()
		harness.Eventually(t, patience, func() error {
			if said, err := dubboCall(virtual["red"], "red", "", "you"); err == nil {
				return fmt.Errorf("the group red says %q", said)
			}
			return nil
		})
		host, _ := client.virtualAddress("providers-demo.api.greeter-0.0.0-red")
		client.has(t, host)
		if said, err := dubboCall(virtual["blue"], "blue", "", "you"); err != nil || said != providers["blue"].ID+" greets you" {
			t.Errorf("the group blue says %q, %v", said, err)
		}
		providers["red"].Restart()
		harness.Eventually(t, patience, func() error {
			_, err := dubboCall(virtual["red"], "red", "", "you")
			return err
		})
	}, "10.0.0.7", "10.0.0.8", "240.224.0.1/11")
}

// virtualAddress finds the service whose host begins so, and its address, which is empty if there is none.
func (r *reader) virtualAddress(prefix string) (host, address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for host, s := range r.services {
		if strings.HasPrefix(host, prefix) && len(s.Addresses) == 1 {
			return host, s.Addresses[0]
		}
	}
	return "", ""
}

// redirect sends all connections to virtual addresses to a port of this machine, which is what Istio's rules for a workload's
// network do with all connections.
func redirect(t *testing.T, port uint16) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	const destination, tcp = 16, 6 // the address's place in the IPv4 header; the protocol's number
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "sidecar"})
	chain := c.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: destination, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.IPv4(255, 224, 0, 0).To4(), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: net.IPv4(240, 224, 0, 0).To4()},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{tcp}},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Redir{RegisterProtoMin: 1},
	}})
	if err := errors.Join(c.Flush(), c.CloseLasting()); err != nil {
		t.Fatalf("redirect connections: %v", err)
	}
}
