package zookeeper

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/regbridge/regbridge/registry/registrytest"
)

// deaf is a connection that takes what is written, and is read elsewhere.
type deaf struct{ net.Conn }

func (deaf) Write(p []byte) (int, error) { return len(p), nil }

// ask writes a request as the library does.
func ask(t testing.TB, w *wire, xid, op int32) {
	t.Helper()
	if _, err := w.Write(frame(xid, op, "/a", []byte{0})); err != nil {
		t.Fatal(err)
	}
}

// frame is a packet with its length.
func frame(parts ...any) []byte {
	var b []byte
	for _, part := range parts {
		b = encode(b, part)
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// newWire is a wire whose server sends the stream, and which is asked for a session and then, with the xids 1 to 8, for
// children (1, 5), children with a stat (2, 6), data (3, 7) and whether a node exists (4, 8).
func newWire(t testing.TB, stream io.Reader) *wire {
	w := &wire{Conn: deaf{}, in: bufio.NewReaderSize(stream, 64<<10)}
	if _, err := w.Write(frame(int32(0), int64(0), int32(10_000), int64(0), make([]byte, 20))); err != nil {
		t.Fatal(err)
	}
	for xid, op := range []int32{8, opChildren, opGet, opExists, 8, opChildren, opGet, opExists} {
		ask(t, w, int32(xid+1), op)
	}
	ask(t, w, -2, opPing)
	return w
}

func greeting(timeout int32, session int64, password int32) []byte {
	return frame(int32(0), timeout, session, password, make([]byte, 17))
}

func TestWireChecksCounts(t *testing.T) {
	t.Parallel()
	const whole = "" // all is passed on
	begin, stat := greeting(10_000, 1, 16), make([]byte, 68)
	names := []string{"a", "bc"}
	for name, c := range map[string]struct {
		stream [][]byte
		want   string // in the error
	}{
		"a session":             {[][]byte{begin}, whole},
		"no password":           {[][]byte{greeting(10_000, 1, -1)}, whole},
		"a refused session":     {[][]byte{greeting(0, 0, 16)}, whole},
		"the password too long": {[][]byte{greeting(10_000, 1, 18)}, "password of 18 bytes"},
		"a password of 2 GB":    {[][]byte{greeting(10_000, 1, 1<<31-1)}, "password of 2147483647 bytes"},
		"no time":               {[][]byte{greeting(0, 1, 16)}, "session of 0 ms"},
		"negative time":         {[][]byte{greeting(-5, 1, 16)}, "session of -5 ms"},
		"a short session":       {[][]byte{frame(make([]byte, 19))}, "answer of 19 bytes"},

		"children":                     {[][]byte{begin, frame(header(1, 5, 0), names)}, whole},
		"children and stat":            {[][]byte{begin, frame(header(2, 5, 0), names, stat)}, whole},
		"no children":                  {[][]byte{begin, frame(header(2, 5, 0), []string{}, stat)}, whole},
		"data":                         {[][]byte{begin, frame(header(3, 5, 0), "data", stat)}, whole},
		"no data":                      {[][]byte{begin, frame(header(3, 5, 0), int32(-1), stat)}, whole},
		"empty data":                   {[][]byte{begin, frame(header(3, 5, 0), int32(0), stat)}, whole},
		"an error, with anything":      {[][]byte{begin, frame(header(3, 5, -101), int32(1<<30))}, whole},
		"an error alone":               {[][]byte{begin, frame(header(2, 5, codeNoNode))}, whole},
		"what has no count":            {[][]byte{begin, frame(header(4, 5, 0), int32(1<<30), stat)}, whole},
		"a ping and an event":          {[][]byte{begin, frame(header(-2, 5, 0)), frame(header(-1, -1, 0), int32(1), int32(3), "/a")}, whole},
		"answers in another order":     {[][]byte{begin, frame(header(7, 5, 0), "x", stat), frame(header(1, 5, 0), names)}, whole},
		"billions of children":         {[][]byte{begin, frame(header(2, 5, 0), int32(1<<31-1), stat)}, "of 2147483647 elements"},
		"negative children":            {[][]byte{begin, frame(header(2, 5, 0), int32(-1), stat)}, "of 4294967295 elements"},
		"a child too many":             {[][]byte{begin, frame(header(2, 5, 0), int32(3), "", "", stat)}, "of 3 elements"},
		"a child too many, no stat":    {[][]byte{begin, frame(header(1, 5, 0), int32(3), "", "")}, "of 3 elements"},
		"more data than the frame has": {[][]byte{begin, frame(header(3, 5, 0), int32(5), []byte("data"), stat)}, "of 5 elements"},
		"data of 2 GB":                 {[][]byte{begin, frame(header(3, 5, 0), int32(1<<31-1), stat)}, "of 2147483647 elements"},
		"the last of many": {
			[][]byte{begin, frame(header(1, 5, 0), names), frame(header(3, 5, 0), "x", stat), frame(header(5, 5, 0), int32(1<<30))}, "of 1073741824 elements",
		},
		"no count":                {[][]byte{begin, frame(header(1, 5, 0), []byte{0, 0, 0})}, "answer of 19 bytes"},
		"no stat":                 {[][]byte{begin, frame(header(3, 5, 0), "data")}, "answer of 24 bytes"},
		"what nobody asked for":   {[][]byte{begin, frame(header(99, 5, 0), int32(1<<30))}, "was not made"},
		"answered twice":          {[][]byte{begin, frame(header(4, 5, 0), stat), frame(header(4, 5, 0), stat)}, "was not made"},
		"an answer to the hello":  {[][]byte{begin, frame(header(0, 5, 0), stat)}, "was not made"},
		"more children than 64 K": {[][]byte{begin, frame(header(2, 5, 0), make([]string, 100_000), stat)}, whole}, // the reader's buffer does not hold it
	} {
		for _, slow := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, slow %v", name, slow), func(t *testing.T) {
				t.Parallel()
				stream := bytes.Join(c.stream, nil)
				var in io.Reader = bytes.NewReader(stream)
				if slow {
					in = &halting{in: in}
				}
				w := newWire(t, in)
				got, err := io.ReadAll(w)
				if c.want == whole {
					if err != nil || len(got) != len(stream) {
						t.Errorf("read %d bytes of %d: %v", len(got), len(stream), err)
					}
					return
				}
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("read %d bytes of %d, error %v, want one with %q", len(got), len(stream), err, c.want)
				}
				before := len(stream) - len(c.stream[len(c.stream)-1])
				if len(got) != before {
					t.Errorf("%d bytes were passed on, want the %d before the bad answer", len(got), before)
				}
				if w.failure() == nil {
					t.Error("the reason is not kept")
				}
			})
		}
	}
}

// halting gives one byte at a time, for the first ones.
type halting struct {
	in   io.Reader
	read int
}

func (h *halting) Read(p []byte) (int, error) {
	if h.read++; h.read < 1000 {
		p = p[:1]
	}
	return h.in.Read(p)
}

// TestWireForgets has a session of many requests: only those without an answer are kept.
func TestWireForgets(t *testing.T) {
	t.Parallel()
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	const n = 1000
	go func() { // what answers
		defer there.Close()
		if _, err := packet(there); err != nil {
			return
		}
		_, _ = there.Write(greeting(10_000, 1, 16))
		for range n {
			b, err := packet(there)
			if err != nil {
				return
			}
			f := fields(b)
			if _, err := there.Write(frame(header(f.int32(), 5, 0), "data", make([]byte, 68))); err != nil {
				return
			}
		}
	}()
	w := &wire{Conn: here, in: bufio.NewReader(here)}
	var writing sync.WaitGroup
	writing.Go(func() { // as in the library, one goroutine writes and one reads
		_, _ = w.Write(frame(int32(0), int64(0), int32(10_000), int64(0), make([]byte, 20)))
		for xid := range int32(n) {
			_, _ = w.Write(frame(xid+1, int32(opGet), "/a", []byte{0}))
		}
	})
	for i := range n + 1 {
		if _, err := packet(w); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
	}
	writing.Wait()
	if len(w.asked) != 0 {
		t.Errorf("%d requests are kept that were answered", len(w.asked))
	}
}

// FuzzWire reads what any server may send. Whatever passes has counts that fit, or the library would believe it.
func FuzzWire(f *testing.F) {
	begin, stat := greeting(10_000, 1, 16), make([]byte, 68)
	add := func(parts ...[]byte) { f.Add(bytes.Join(parts, nil)) }
	add(begin, frame(header(1, 5, 0), []string{"a"}), frame(header(2, 5, 0), []string{"b"}, stat), frame(header(3, 5, 0), "c", stat))
	add(begin, frame(header(2, 5, 0), int32(-1), stat))
	add(begin, frame(header(3, 5, 0), int32(-1), stat), frame(header(7, 5, 0), int32(90), stat))
	add(begin, frame(header(99, 5, 0), int32(1<<30)), frame(header(-1, -1, 0), int32(1), int32(3), "/a"))
	add(greeting(0, 1, 17), frame(header(6, 5, -101)))
	f.Fuzz(func(t *testing.T, stream []byte) {
		w := newWire(t, bytes.NewReader(stream))
		asked := map[int32]int32{1: 8, 2: opChildren, 3: opGet, 4: opExists, 5: 8, 6: opChildren, 7: opGet, 8: opExists}
		got, _ := io.ReadAll(w)
		// The stream may end within an answer, of which the library then decodes nothing: whole answers count.
		for first := true; len(got) >= 4; first = false {
			length := uint64(binary.BigEndian.Uint32(got))
			if length > maxAnswer {
				t.Fatalf("an answer of %d bytes", length)
			}
			if uint64(len(got)-4) < length {
				return
			}
			b := fields(got[4 : 4+length])
			got = got[4+length:]
			if first {
				b.int32()
				timeout, session, password := b.int32(), b.int64(), b.int32()
				if session != 0 && timeout <= 0 || int(password) > len(b) {
					t.Fatalf("session %d of %d ms, a password of %d bytes in %d", session, timeout, password, len(b))
				}
				continue
			}
			xid := b.int32()
			if zxid := b.int64(); zxid != 0 {
				t.Fatalf("zxid %d", zxid)
			}
			code := b.int32()
			op, ok := asked[xid]
			if xid >= 0 && !ok {
				t.Fatalf("answers %d", xid)
			}
			delete(asked, xid)
			if code != 0 {
				continue
			}
			switch op {
			case 8, opChildren:
				if n := uint64(uint32(b.int32())); n*4 > uint64(len(b)) {
					t.Fatalf("%d children in %d bytes", n, len(b))
				}
			case opGet:
				if n := b.int32(); int(n) > len(b) {
					t.Fatalf("%d bytes of data in %d", n, len(b))
				}
			}
		}
	})
}

// spoiler is between the adapter and the fake, and may change what the fake sends.
type spoiler struct {
	address string
	mu      sync.Mutex
	spoil   func(op int32, answer []byte) []byte
	times   int // that something was spoilt
}

// hello is what a spoiler calls the request for a session.
const hello = -1000

func newSpoiler(t *testing.T, f *fake) *spoiler {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &spoiler{address: l.Addr().String()}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { s.serve(client, f.address) })
		}
	})
	t.Cleanup(func() { // before the adapter ends, or the fake
		l.Close()
		f.cut()
		serving.Wait()
	})
	return s
}

func (s *spoiler) serve(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	var both sync.WaitGroup
	defer both.Wait()
	var mu sync.Mutex
	ops := map[int32]int32{}
	both.Go(func() {
		defer server.Close()
		for first := true; ; first = false {
			b, err := packet(client)
			if err != nil {
				return
			}
			if f := fields(b); !first {
				mu.Lock()
				ops[f.int32()] = f.int32()
				mu.Unlock()
			}
			if _, err := server.Write(frame(b)); err != nil {
				return
			}
		}
	})
	defer client.Close()
	for first := true; ; first = false {
		b, err := packet(server)
		if err != nil {
			return
		}
		op := int32(hello)
		if f := fields(b); !first {
			mu.Lock()
			op = ops[f.int32()]
			mu.Unlock()
		}
		out := frame(b)
		s.mu.Lock()
		if s.spoil != nil {
			if spoilt := s.spoil(op, b); spoilt != nil {
				out = spoilt
				s.times++
			}
		}
		s.mu.Unlock()
		if _, err := client.Write(out); err != nil {
			return
		}
	}
}

// change sets what is spoilt from now on, and returns how often something was.
func (s *spoiler) change(spoil func(op int32, answer []byte) []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spoil = spoil
	return s.times
}

// overwrite puts a number into answers to an operation that have room for it.
func overwrite(of int32, at int, number uint32) func(op int32, answer []byte) []byte {
	return func(op int32, answer []byte) []byte {
		if op != of || len(answer) < at+4 {
			return nil
		}
		binary.BigEndian.PutUint32(answer[at:], number)
		return frame(answer)
	}
}

// TestGarbageInAnswers has a server whose answers have the right length and are corrupt inside. The adapter says so, keeps
// what it knows, and goes on as soon as the answers are right.
func TestGarbageInAnswers(t *testing.T) {
	t.Parallel()
	// The numbers are harmless to a library that believes them, where it only takes memory.
	for name, c := range map[string]struct {
		spoil func(op int32, answer []byte) []byte
		want  string // in the error
	}{
		"children": {overwrite(opChildren, 16, 1<<20), "of 1048576 elements"},
		"data":     {overwrite(opGet, 16, 1<<20), "of 1048576 elements"},
		"password": {overwrite(hello, 16, 1<<20), "password of 1048576 bytes"},
		"time":     {overwrite(hello, 4, 0), "session of 0 ms"},
		"an event of the library's own": {func(op int32, answer []byte) []byte {
			if op != opSync {
				return nil
			}
			const hasSession = 101 // no server tells this
			return append(frame(header(-1, -1, 0), int32(-1), int32(hasSession), ""), frame(header(12345, 0, 0), answer)...)
		}, "was not made"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.register(spring, "order", at("10.0.0.1"))
			s := newSpoiler(t, f)
			e := f.plainEntry()
			e.Domain = s.address
			rec := run(t, e, testEnv(t, nil))
			wait(t, rec, "the service", has("/services/order", "10.0.0.1"))

			s.change(c.spoil)
			n := len(rec.State().Events)
			f.cut()
			wait(t, rec, "the failure", func(st registrytest.State) bool {
				return st.Gap != nil && strings.Contains(st.Gap.Error(), c.want)
			})
			if s.change(nil) == 0 {
				t.Error("nothing was spoilt")
			}
			f.register(spring, "order", at("10.0.0.1"), at("10.0.0.2"))
			wait(t, rec, "the change", has("/services/order", "10.0.0.1", "10.0.0.2"))
			noRemovalInGap(t, rec, n)
		})
	}
}
