package zookeeper

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-zookeeper/zk"
	"golang.org/x/time/rate"

	"github.com/regbridge/regbridge/registry"
)

const (
	dialTimeout = 5 * time.Second
	// inFlight is the number of requests that all entries together have under way at one server. It is smaller than what the
	// library queues, so that its Close never waits for room.
	inFlight = 12
	// readsPerSecond and readBurst bound the requests of one session.
	readsPerSecond = 4000
	readBurst      = 1000
	// maxAnswer bounds an answer. By default ZooKeeper stores no more than 1 MB in a node; the names of a node's children
	// may be more together.
	maxAnswer = 64 << 20
	// maxRequest bounds a request: a path, in general.
	maxRequest = 128 << 10
	// goodbye is how long a server may take to take note that we leave.
	goodbye = 500 * time.Millisecond
	// closeTime is what the library's Close may need to queue its message.
	closeTime = 10 * time.Millisecond
)

// errEnded is wrapped by the errors of requests that were under way when their session ended.
var errEnded = errors.New("the session ended")

// watches are kinds of watches, as the library keeps them for a path.
type watches int

const (
	existWatch watches = 1 << iota
	dataWatch
	childWatch
)

// conn is one session with one server. It ends with its connection: a session holds nothing of ours, and to resume one
// would save nothing. The library then renews the watches without telling whether that worked, so everything would have
// to be read again all the same; and a ZooKeeper whose data was wiped refuses for ever whoever has seen more of it.
type conn struct {
	z      *zookeeper
	server string // for messages
	raw    net.Conn
	wire   *wire
	zk     *zk.Conn
	over   <-chan zk.Event // closed once nothing of the library is left
	budget *registry.Budget
	rate   *rate.Limiter

	greeted sync.Once     // closes begun
	begun   chan struct{} // closed once there is a session
	ended   chan struct{} // closed once there is none any more
	left    chan struct{} // closed when we want no more of it
	asked   chan struct{} // closed when the library asks for another server
	closes  chan struct{} // closed when its Close is about to be called
	wake    chan struct{} // has an element while there are events

	mu     sync.Mutex
	err    error              // why it ended
	events map[string]watches // the watches that fired, by path
	quiet  map[string]bool    // paths of which only the data changed
}

// resolve gives the addresses of a server, in any order.
func (z *zookeeper) resolve(ctx context.Context, server registry.Server) ([]string, error) {
	port := strconv.FormatUint(uint64(server.Port), 10)
	if _, err := netip.ParseAddr(server.Host); err == nil {
		return []string{net.JoinHostPort(server.Host, port)}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	list, err := net.DefaultResolver.LookupNetIP(ctx, "ip", server.Host)
	if err != nil {
		return nil, fmt.Errorf("connect to zookeeper at %s: %w", server, err)
	}
	addresses := make([]string, 0, len(list))
	for _, a := range list {
		addresses = append(addresses, net.JoinHostPort(a.Unmap().String(), port))
	}
	rand.Shuffle(len(addresses), func(i, j int) { addresses[i], addresses[j] = addresses[j], addresses[i] })
	return addresses, nil
}

// open begins a session, which the caller releases. closing counts what is left of those that are over.
func (z *zookeeper) open(ctx context.Context, server registry.Server, address string, closing *sync.WaitGroup) (*conn, error) {
	begun := time.Now()
	c, err := z.tryOpen(ctx, server, address, closing)
	if ctx.Err() == nil {
		z.env.Observe("session", time.Since(begun), err)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to zookeeper at %s: %w", server, err)
	}
	return c, nil
}

func (z *zookeeper) tryOpen(ctx context.Context, server registry.Server, address string, closing *sync.WaitGroup,
) (*conn, error) {
	digest, err := z.digest()
	if err != nil {
		return nil, err
	}
	raw, stream, err := z.dial(ctx, server, address)
	if err != nil {
		return nil, err
	}
	c := &conn{
		z:      z,
		server: server.String(),
		raw:    raw,
		wire:   &wire{Conn: stream, in: bufio.NewReaderSize(stream, 64<<10)},
		budget: z.env.Budgets.Of("zookeeper "+server.String(), inFlight),
		rate:   rate.NewLimiter(readsPerSecond, readBurst),
		begun:  make(chan struct{}),
		ended:  make(chan struct{}),
		left:   make(chan struct{}),
		closes: make(chan struct{}),
		asked:  make(chan struct{}),
		wake:   make(chan struct{}, 1),
	}
	c.zk, c.over, err = zk.Connect([]string{c.server}, z.timeout,
		zk.WithHostProvider(&once{asked: c.asked, closes: c.closes}), zk.WithDialer(c.hand()), zk.WithEventCallback(c.event),
		zk.WithLogger(logger{z.env}), zk.WithLogInfo(false),
		zk.WithMaxBufferSize(maxAnswer), zk.WithMaxConnBufferSize(maxRequest))
	if err != nil {
		raw.Close()
		return nil, err
	}
	closing.Go(c.close)
	stop := context.AfterFunc(ctx, func() { c.fail(ctx.Err()) }) // the library's calls know no context
	defer stop()
	if err := c.greet(ctx, digest); err != nil {
		c.fail(err)
		c.release()
		return nil, err
	}
	return c, nil
}

// greet waits for the session, tells who we are, and has the server catch up with its leader: else a server that lags
// behind the one before would show us the past.
func (c *conn) greet(ctx context.Context, digest string) error {
	timer := time.NewTimer(c.z.timeout)
	defer timer.Stop()
	select {
	case <-c.begun:
	case <-c.ended:
		return c.reason()
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("it took the connection, but gave no session within %v: does it hang?", c.z.timeout)
	}
	if digest != "" {
		if err := c.do(ctx, "auth", "", func(string) error { return c.zk.AddAuth("digest", []byte(digest)) }); err != nil {
			return fmt.Errorf("log in: %w", err)
		}
	}
	err := c.do(ctx, "sync", "/", func(path string) error {
		_, err := c.zk.Sync(path)
		return err
	})
	if err != nil {
		return fmt.Errorf("catch up with its leader: %w", err)
	}
	if c.z.chroot == "" {
		return nil
	}
	there, _, err := c.exists(ctx, "/", false)
	if err == nil && !there {
		c.z.env.Logger.Warn("the path behind the servers in domain does not exist in ZooKeeper: nothing is read until it does",
			"path", c.z.chroot)
	}
	return err
}

// digest gives user:password of the entry's Secret, empty if it names none.
func (z *zookeeper) digest() (string, error) {
	if z.secret == "" {
		return "", nil
	}
	secret, err := z.env.Credentials()
	if err != nil {
		return "", err
	}
	user, password := secret.First("zkUsername", "username").Reveal(), secret.First("zkPassword", "password").Reveal()
	switch {
	case user == "" || password == "": // else we would be nobody, who may see less
		return "", fmt.Errorf("secret %s lacks zkUsername or zkPassword (or username or password), or they are empty", z.secret)
	case strings.Contains(user, ":"):
		return "", fmt.Errorf("the user name in secret %s has a colon, which ZooKeeper takes for the end of the name", z.secret)
	}
	return user + ":" + password, nil
}

// dial returns the connection itself, and what is to be read and written, which is TLS if the entry says so.
func (z *zookeeper) dial(ctx context.Context, server registry.Server, address string) (raw, stream net.Conn, err error) {
	config, err := z.env.ClientTLS()
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, min(dialTimeout, z.timeout))
	defer cancel()
	raw, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil || config == nil {
		return raw, raw, err
	}
	if config.ServerName == "" {
		config.ServerName = strings.TrimSuffix(server.Host, ".")
	}
	secure := tls.Client(raw, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, nil, fmt.Errorf("TLS: %w", err)
	}
	return raw, secure, nil
}

// hand gives the library the connection, and no second one.
func (c *conn) hand() zk.Dialer {
	used := false
	return func(string, string, time.Duration) (net.Conn, error) { // called by one goroutine
		if used {
			return nil, errEnded
		}
		used = true
		return c.wire, nil
	}
}

// once is the library's list of servers: one server, to be connected to once. When the connection is lost the library asks
// for another one, and is held up until its Close was called; it then hears that all were tried, and gives up what waits
// for a connection. Close's own message is among that, or else Close would wait for an answer for a second.
type once struct {
	server string
	tried  bool
	asked  chan<- struct{} // closed when another server is asked for
	closes <-chan struct{} // closed when Close is about to be called
}

func (o *once) Init(servers []string) error {
	o.server = servers[0]
	return nil
}

func (o *once) Len() int   { return 1 }
func (o *once) Connected() {}

func (o *once) Next() (server string, allTried bool) {
	allTried, o.tried = o.tried, true
	if allTried && o.asked != nil {
		close(o.asked)
		o.asked = nil
		<-o.closes
		time.Sleep(closeTime)
	}
	return o.server, allTried
}

// logger takes the library's messages, which say nothing that is not in an error too.
type logger struct{ env registry.Env }

func (l logger) Printf(format string, args ...any) {
	l.env.Logger.Debug("zookeeper library: " + fmt.Sprintf(format, args...))
}

// event takes what the library tells. It is called by goroutines of the library, which it must not hold up.
func (c *conn) event(e zk.Event) {
	var fired watches
	switch e.Type {
	case zk.EventSession:
		switch e.State {
		case zk.StateHasSession:
			c.greeted.Do(func() { close(c.begun) }) // a corrupt event of the server may say so once more
		case zk.StateDisconnected, zk.StateExpired:
			c.fail(c.lost())
		default: // on the way to a session
		}
		return
	case zk.EventNodeCreated:
		fired = existWatch
	case zk.EventNodeDataChanged:
		fired = existWatch | dataWatch
	case zk.EventNodeChildrenChanged:
		fired = childWatch
	case zk.EventNodeDeleted:
		fired = existWatch | dataWatch | childWatch
	default: // the end of the session
		return
	}
	path := strings.TrimPrefix(e.Path, c.z.chroot)
	if path == "" {
		path = "/"
	}
	c.mu.Lock()
	if c.events == nil {
		c.events, c.quiet = map[string]watches{}, map[string]bool{}
	}
	_, known := c.events[path]
	c.quiet[path] = (!known || c.quiet[path]) && e.Type == zk.EventNodeDataChanged
	c.events[path] |= fired
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// fired returns the watches that fired since it was last called, and of which paths only the data changed.
func (c *conn) fired() (events map[string]watches, quiet map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	events, quiet = c.events, c.quiet
	c.events, c.quiet = nil, nil
	return events, quiet
}

// lost tells why the connection ended.
func (c *conn) lost() error {
	err := c.wire.failure()
	select {
	case <-c.begun:
	default:
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return errors.New("it closed the connection before there was a session: it has no quorum, or too many connections " +
				"(maxClientCnxns), or wants TLS")
		}
		return err
	}
	switch {
	case err == nil:
		return errors.New("the connection ended")
	case errors.Is(err, io.EOF):
		return errors.New("the server closed the connection")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the server is silent: it does not even answer pings")
	default:
		return err
	}
}

// fail ends the session, for the first reason that is given.
func (c *conn) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = err
		close(c.ended)
	}
	c.mu.Unlock()
	c.raw.Close()
}

// reason tells why the session ended.
func (c *conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// release ends the session, which takes a moment.
func (c *conn) release() { close(c.left) }

// close waits until the session has ended or was released, and then until nothing of it is left. A server that works is
// told.
func (c *conn) close() {
	select {
	case <-c.left:
	case <-c.ended:
	}
	if c.reason() != nil {
		<-c.asked
	}
	timer := time.AfterFunc(goodbye, func() { c.fail(errEnded) })
	defer timer.Stop()
	close(c.closes)
	c.zk.Close()
	c.fail(errEnded)
	for range c.over { // until it is closed
	}
}

// do makes a request about a path, within the budget. An answer that does not come ends the session.
func (c *conn) do(ctx context.Context, operation, path string, request func(path string) error) error {
	if err := c.rate.Wait(ctx); err != nil {
		return err
	}
	if err := c.budget.Acquire(ctx, 1); err != nil {
		return err
	}
	defer c.budget.Release(1)
	begun := time.Now()
	timer := time.AfterFunc(c.z.timeout, func() {
		c.fail(fmt.Errorf("the request %q about %q got no answer within %v", operation, path, c.z.timeout))
	})
	err := request(c.full(path))
	timer.Stop()
	_, broken := errors.AsType[net.Error](err) // it could not even be sent
	switch {
	case broken, errors.Is(err, zk.ErrConnectionClosed), errors.Is(err, zk.ErrClosing), errors.Is(err, zk.ErrNoServer):
		err = errEnded
		if reason := c.reason(); reason != nil {
			err = fmt.Errorf("%w: %w", errEnded, reason)
		}
	case errors.Is(err, zk.ErrSessionExpired), errors.Is(err, zk.ErrSessionMoved):
		c.fail(err)
		err = fmt.Errorf("%w: %w", errEnded, err)
	}
	switch {
	case errors.Is(err, zk.ErrNoNode):
		c.z.env.Observe(operation, time.Since(begun), nil)
	case err == nil || ctx.Err() == nil: // what our own end cuts short is no failure
		c.z.env.Observe(operation, time.Since(begun), err)
	}
	return err
}

// full gives the path as the server knows it.
func (c *conn) full(path string) string {
	if path == "/" && c.z.chroot != "" {
		return c.z.chroot
	}
	return c.z.chroot + path
}

// versions tell whether a node is the same as before: when it was created, and when what was asked for last changed.
type versions struct{ created, changed int64 }

// children lists the children of a node, and watches them if watch is set.
func (c *conn) children(ctx context.Context, path string, watch bool) (names []string, v versions, err error) {
	err = c.do(ctx, "children", path, func(path string) error {
		var stat *zk.Stat
		var err error
		if watch {
			names, stat, _, err = c.zk.ChildrenW(path)
		} else {
			names, stat, err = c.zk.Children(path)
		}
		if err == nil {
			v = versions{stat.Czxid, stat.Pzxid}
		}
		return err
	})
	return names, v, err
}

// get reads the data of a node, and watches it if watch is set.
func (c *conn) get(ctx context.Context, path string, watch bool) (data []byte, v versions, err error) {
	err = c.do(ctx, "get", path, func(path string) error {
		var stat *zk.Stat
		var err error
		if watch {
			data, stat, _, err = c.zk.GetW(path)
		} else {
			data, stat, err = c.zk.Get(path)
		}
		if err == nil {
			v = versions{stat.Czxid, stat.Mzxid}
		}
		return err
	})
	return data, v, err
}

// exists tells whether a node is there, and if watch is set watches for its appearance, or else for changes of its data.
func (c *conn) exists(ctx context.Context, path string, watch bool) (there bool, v versions, err error) {
	err = c.do(ctx, "exists", path, func(path string) error {
		var stat *zk.Stat
		var err error
		if watch {
			there, stat, _, err = c.zk.ExistsW(path)
		} else {
			there, stat, err = c.zk.Exists(path)
		}
		if err == nil && there {
			v = versions{stat.Czxid, stat.Mzxid}
		}
		return err
	})
	return there, v, err
}

// wire is the connection as the library reads it. It looks at what the library believes: the length of each answer, and
// the count of what is inside. An answer that is too short would end the process, and so would one that speaks of gigabytes,
// since the library makes room before it looks whether they are there. It checks the lengths of strings itself.
//
// It also takes out of each answer how far the server is (its zxid). The library notes that to resume sessions, which is not
// done here, and at the beginning of a session it reads the note while it may be writing it.
type wire struct {
	net.Conn
	in      *bufio.Reader
	left    int  // of the answer that is being read
	greeted bool // the session was asked for, which has no xid
	begun   bool // the session's answer was read, which has no zxid

	mu    sync.Mutex
	asked map[int32]int32 // the operations of what has no answer yet, by xid: not many, for each is waited for
	err   error           // the first one
}

// The lengths of parts of answers.
const (
	headLength    = 16                      // xid, zxid and error
	statLength    = 6*8 + 5*4               // what is known of a node, behind its data or children
	countLength   = 4                       // of children or bytes
	sessionLength = 4 + 4 + 8 + countLength // version, timeout, session and the length of its password
	nameLength    = 4                       // of a name in a list: its length
)

// The operations whose answers begin with a count.
const (
	readData             = 4
	readChildren         = 8
	readChildrenWithStat = 12
)

// Write sends one request: the library writes each by one call, and not by several goroutines at once.
func (w *wire) Write(p []byte) (int, error) {
	if w.greeted && len(p) >= 12 { // length, xid and operation
		if xid := int32(binary.BigEndian.Uint32(p[4:])); xid >= 0 {
			w.mu.Lock()
			if w.asked == nil {
				w.asked = map[int32]int32{}
			}
			w.asked[xid] = int32(binary.BigEndian.Uint32(p[8:]))
			w.mu.Unlock()
		}
	}
	w.greeted = true
	return w.Conn.Write(p)
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.read(p)
	if err != nil {
		w.mu.Lock()
		if w.err == nil {
			w.err = err
		}
		w.mu.Unlock()
	}
	return n, err
}

func (w *wire) read(p []byte) (int, error) {
	if w.left == 0 {
		length, err := w.length()
		if err != nil {
			return 0, err
		}
		if w.begun {
			err = w.answer(length)
		} else {
			err = w.session(length)
		}
		if err != nil {
			return 0, err
		}
		w.begun = true
		w.left = 4 + length
	}
	n, err := w.in.Read(p[:min(len(p), w.left)])
	w.left -= n
	return n, err
}

// length gives the length of the next answer.
func (w *wire) length() (int, error) {
	head, err := w.in.Peek(4)
	if err != nil {
		return 0, err
	}
	length, least := binary.BigEndian.Uint32(head), uint32(headLength)
	if !w.begun {
		least = sessionLength
	}
	if length < least || length > maxAnswer {
		return 0, strange("an answer of %d bytes", length)
	}
	return int(length), nil
}

// session looks at the first answer.
func (w *wire) session(length int) error {
	head, err := w.in.Peek(4 + sessionLength)
	if err != nil {
		return err
	}
	head = head[4:]
	timeout, session := int32(binary.BigEndian.Uint32(head[4:])), binary.BigEndian.Uint64(head[8:])
	if session != 0 && timeout <= 0 { // without a session it is 0; else the library would end the process
		return strange("a session of %d ms", timeout)
	}
	if password := int32(binary.BigEndian.Uint32(head[16:])); int(password) > length-sessionLength {
		return strange("a password of %d bytes in an answer of %d bytes", password, length)
	}
	return nil
}

// answer looks at any further answer.
func (w *wire) answer(length int) error {
	head, err := w.in.Peek(4 + headLength)
	if err != nil {
		return err
	}
	head = head[4:]
	clear(head[4:12])
	xid, failed := int32(binary.BigEndian.Uint32(head)), binary.BigEndian.Uint32(head[12:]) != 0
	if xid < 0 { // an event, or the answer to a ping
		return nil
	}
	w.mu.Lock()
	operation, asked := w.asked[xid]
	delete(w.asked, xid)
	w.mu.Unlock()
	if !asked { // or it might be made while this is read, and be taken for answered
		return strange("an answer to a request that was not made, %d", xid)
	}
	if failed {
		return nil
	}
	room, size := length-headLength-countLength, nameLength
	switch operation {
	case readChildren:
	case readChildrenWithStat:
		room -= statLength
	case readData:
		room, size = room-statLength, 1
	default: // nothing is counted
		return nil
	}
	if room < 0 {
		return strange("an answer of %d bytes to operation %d", length, operation)
	}
	head, err = w.in.Peek(4 + headLength + countLength)
	if err != nil {
		return err
	}
	count := binary.BigEndian.Uint32(head[4+headLength:])
	if operation == readData && int32(count) < 0 { // the node has no data; for children the library knows no such thing
		return nil
	}
	if uint64(count) > uint64(room/size) {
		return strange("an answer of %d bytes to operation %d that speaks of %d elements", length, operation, count)
	}
	return nil
}

// strange is the error of a server that sends what no ZooKeeper does.
func strange(format string, args ...any) error {
	return fmt.Errorf("it sends "+format+": is it a ZooKeeper?", args...)
}

func (w *wire) failure() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}
