package zookeeper

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The operations, errors and events of ZooKeeper's protocol that the fake knows.
const (
	opExists   = 3
	opGet      = 4
	opSync     = 9
	opPing     = 11
	opChildren = 12
	opClose    = -11
	opAuth     = 100

	codeNoNode        = -101
	codeNoAuth        = -102
	codeUnimplemented = -6

	created         = 1
	deleted         = 2
	dataChanged     = 3
	childrenChanged = 4
)

// fake is a server that speaks ZooKeeper's protocol, as far as the adapter does.
type fake struct {
	t       *testing.T
	address string

	mu       sync.Mutex
	listener net.Listener
	conns    map[*fakeConn]bool
	serving  sync.WaitGroup
	nodes    map[string]*fakeNode
	zxid     int64
	sessions int64
	login    string                 // what may read, empty: everybody
	refused  func(path string) bool // what nobody may read
	hang     bool
	hangIn   int // requests until one hangs, 0: none does
	hung     chan struct{}
	requests int
	reads    map[string]int // by path
	watches  int            // that were asked for
	lost     bool           // events are not sent
}

type fakeNode struct {
	data                string
	czxid, mzxid, pzxid int64
	version, cversion   int32
	children            map[string]bool
}

// fakeConn is a connection with its session.
type fakeConn struct {
	net.Conn
	f     *fake
	login string
	dead  bool // nothing is answered any more
	data  map[string]bool
	child map[string]bool
}

func newFake(t *testing.T) *fake {
	f := &fake{t: t, address: "127.0.0.1:0"}
	f.clear()
	f.start()
	t.Cleanup(f.stop)
	return f
}

func (f *fake) clear() {
	f.nodes = map[string]*fakeNode{"/": {children: map[string]bool{}}}
	f.zxid, f.reads, f.refused = 0, map[string]int{}, nil
}

func (f *fake) start() {
	l, err := net.Listen("tcp", f.address)
	for deadline := time.Now().Add(5 * time.Second); err != nil && time.Now().Before(deadline); {
		l, err = net.Listen("tcp", f.address)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listener, f.address, f.conns = l, l.Addr().String(), map[*fakeConn]bool{}
	f.serving.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			c := &fakeConn{Conn: nc, f: f, data: map[string]bool{}, child: map[string]bool{}}
			f.mu.Lock()
			f.conns[c] = true
			f.mu.Unlock()
			f.serving.Go(c.serve)
		}
	})
}

// stop closes the server with its connections.
func (f *fake) stop() {
	f.mu.Lock()
	f.listener.Close()
	f.mu.Unlock()
	f.cut()
	f.serving.Wait()
}

// cut ends all connections.
func (f *fake) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.conns {
		c.Close()
	}
}

func (f *fake) wipe() {
	f.stop()
	f.clear()
	f.start()
}

// edit changes the fake.
func (f *fake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// set makes a node, with its parents, or changes its data.
func (f *fake) set(p, data string) {
	f.edit(func() { f.put(p, data) })
}

func (f *fake) put(p, data string) {
	if n := f.nodes[p]; n != nil {
		if n.data == data {
			return
		}
		f.zxid++
		n.data, n.mzxid, n.version = data, f.zxid, n.version+1
		f.notify(p, dataChanged)
		return
	}
	parent := path.Dir(p)
	if f.nodes[parent] == nil {
		f.put(parent, "")
	}
	f.zxid++
	f.nodes[p] = &fakeNode{data: data, czxid: f.zxid, mzxid: f.zxid, pzxid: f.zxid, children: map[string]bool{}}
	f.touch(parent, path.Base(p), true)
	f.notify(p, created)
	f.notify(parent, childrenChanged)
}

func (f *fake) touch(parent, name string, there bool) {
	n := f.nodes[parent]
	n.pzxid, n.cversion = f.zxid, n.cversion+1
	if there {
		n.children[name] = true
	} else {
		delete(n.children, name)
	}
}

// remove deletes a node with all below it.
func (f *fake) remove(p string) {
	f.edit(func() { f.delete(p) })
}

func (f *fake) delete(p string) {
	n := f.nodes[p]
	if n == nil {
		return
	}
	for name := range n.children {
		f.delete(path.Join(p, name))
	}
	f.zxid++
	delete(f.nodes, p)
	f.touch(path.Dir(p), path.Base(p), false)
	f.notify(p, deleted)
	f.notify(path.Dir(p), childrenChanged)
}

// notify sends an event to whom it may concern.
func (f *fake) notify(p string, event int32) {
	for c := range f.conns {
		data, child := c.data[p] && event != childrenChanged, c.child[p] && (event == childrenChanged || event == deleted)
		if !data && !child {
			continue
		}
		if data {
			delete(c.data, p)
		}
		if child {
			delete(c.child, p)
		}
		if !f.lost && !f.hang && !c.dead {
			c.send(header(-1, -1, 0), event, int32(3), p)
		}
	}
}

func header(xid int32, zxid int64, code int32) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(xid))
	b = binary.BigEndian.AppendUint64(b, uint64(zxid))
	return binary.BigEndian.AppendUint32(b, uint32(code))
}

// send sends a packet. The fake is locked, so packets do not mix.
func (c *fakeConn) send(parts ...any) {
	var b []byte
	for _, part := range parts {
		b = encode(b, part)
	}
	_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
	_, _ = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)) // if it fails, reading will too
}

func encode(b []byte, part any) []byte {
	switch v := part.(type) {
	case []byte: // encoded already
		return append(b, v...)
	case int32:
		return binary.BigEndian.AppendUint32(b, uint32(v))
	case int64:
		return binary.BigEndian.AppendUint64(b, uint64(v))
	case string:
		return append(binary.BigEndian.AppendUint32(b, uint32(len(v))), v...)
	case []string:
		b = binary.BigEndian.AppendUint32(b, uint32(len(v)))
		for _, s := range v {
			b = encode(b, s)
		}
		return b
	case *fakeNode:
		for _, n := range []int64{v.czxid, v.mzxid, 0, 0} {
			b = encode(b, n)
		}
		for _, n := range []int32{v.version, v.cversion, 0} {
			b = encode(b, n)
		}
		b = encode(b, int64(0))
		b = encode(encode(b, int32(len(v.data))), int32(len(v.children)))
		return encode(b, v.pzxid)
	default:
		panic(fmt.Sprintf("cannot encode %T", part))
	}
}

// packet reads one packet.
func packet(r io.Reader) ([]byte, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(length[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

// fields takes a packet apart.
type fields []byte

func (b *fields) int32() int32 {
	v := binary.BigEndian.Uint32(*b)
	*b = (*b)[4:]
	return int32(v)
}

func (b *fields) int64() int64 {
	v := binary.BigEndian.Uint64(*b)
	*b = (*b)[8:]
	return int64(v)
}

func (b *fields) text() string {
	n := b.int32()
	v := string((*b)[:n])
	*b = (*b)[n:]
	return v
}

func (c *fakeConn) serve() {
	f := c.f
	defer func() {
		c.Close()
		f.mu.Lock()
		delete(f.conns, c)
		f.mu.Unlock()
	}()
	first := true
	for {
		b, err := packet(c)
		if err != nil {
			return
		}
		f.mu.Lock()
		end := c.answer(fields(b), first)
		f.mu.Unlock()
		if end {
			return
		}
		first = false
	}
}

// answer serves a request, and says whether it was the last one.
func (c *fakeConn) answer(b fields, first bool) bool {
	f := c.f
	var xid, op int32
	if !first {
		xid, op = b.int32(), b.int32()
	}
	if op != opPing {
		f.requests++
		if f.hangIn > 0 {
			if f.hangIn--; f.hangIn == 0 {
				close(f.hung)
				return false
			}
		}
	}
	if c.dead = c.dead || f.hang; c.dead {
		return false
	}
	if first {
		b.int32()
		seen, timeout := b.int64(), b.int32()
		if seen > f.zxid {
			return true // as ZooKeeper does
		}
		f.sessions++
		c.send(int32(0), timeout, f.sessions, strings.Repeat("p", 16))
		return false
	}
	fail := func(code int32) bool {
		c.send(header(xid, f.zxid, code))
		return false
	}
	switch op {
	case opPing:
		c.send(header(-2, f.zxid, 0))
		return false
	case opClose:
		c.send(header(xid, f.zxid, 0))
		return true
	case opAuth:
		b.int32()
		if scheme := b.text(); scheme == "digest" {
			c.login = b.text()
		}
		return fail(0)
	case opSync:
		c.send(header(xid, f.zxid, 0), b.text())
		return false
	case opExists, opGet, opChildren:
	default:
		return fail(codeUnimplemented)
	}
	p := b.text()
	watch := b[0] != 0
	f.reads[p]++
	n := f.nodes[p]
	switch {
	case n == nil:
		if op == opExists && watch {
			c.data[p] = true
			f.watches++
		}
		return fail(codeNoNode)
	case op != opExists && (f.login != "" && f.login != c.login || f.refused != nil && f.refused(p)):
		return fail(codeNoAuth)
	}
	if watch {
		f.watches++
		if op == opChildren {
			c.child[p] = true
		} else {
			c.data[p] = true
		}
	}
	h := header(xid, f.zxid, 0)
	switch op {
	case opExists:
		c.send(h, n)
	case opGet:
		c.send(h, n.data, n)
	default:
		names := make([]string, 0, len(n.children))
		for name := range n.children {
			names = append(names, name)
		}
		slices.Sort(names)
		c.send(h, names, n)
	}
	return false
}

// await waits for something about the fake.
func (f *fake) await(what string, ok func() bool) {
	f.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); ; <-tick.C {
		f.mu.Lock()
		done := ok()
		f.mu.Unlock()
		if done {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("waited in vain for %s", what)
		}
	}
}
