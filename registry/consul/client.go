package consul

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	dialTimeout = 5 * time.Second
	// maxContact bounds the age of a server's last contact with its leader: an answer that may be older proves nothing.
	maxContact = 10 * time.Second

	// What follows bounds what is taken of an answer, whatever sends it.

	// maxInstances is the number of instances of one service.
	maxInstances = 100_000
	// maxInstance is the length of one of them, with all its checks. A check has at most 4 KB of output, if not configured
	// otherwise.
	maxInstance = 512 << 10
	// maxNames is the number of services.
	maxNames = 200_000
	// maxTags is the length of the tags of all instances of a service.
	maxTags = 8 << 20
	// maxChecks is the number of all checks.
	maxChecks = 500_000
	// maxBody is the length of the answer: 50,000 instances with 2.5 KB each.
	maxBody = 128 << 20
)

// client asks one Consul agent. It takes its types from Consul's own library, but not its client: that one fills each
// unset field, the token and its file among them, from the environment, and does not tell an answer without Consul's
// headers from one that has them.
type client struct {
	*consul
	server registry.Server
	// http is made once the first answer to list tells whether requests can share a connection.
	http *http.Client
	// list has a connection of its own, for the list of services. It is never idle for long, so that it ends only when the
	// agent, or the way to it, does.
	list *http.Client
	base url.URL
	// brief says that each answer to list announces the end of its connection, as some proxies do. Then a new connection
	// tells nothing. Only the goroutine that lists uses it.
	brief bool
	// decoding lets one element of an answer be decoded at a time: it may take a hundred times its length.
	decoding sync.Mutex

	mu     sync.Mutex
	conns  map[*conn]bool // those that are open
	closed bool
}

// conn is a connection that its client can close at any time.
type conn struct {
	net.Conn
	client *client
}

func (c *conn) Close() error {
	c.client.mu.Lock()
	delete(c.client.conns, c)
	c.client.mu.Unlock()
	return c.Conn.Close()
}

// meta is what the headers of an answer say.
type meta struct {
	// index is the state's version, above 0.
	index uint64
	// filtered says that the token was not allowed to see all. Consul never says so to an anonymous request.
	filtered bool
	// anonymous says that the request had no token and the agent denies by default.
	anonymous bool
	// streamed says that the agent answered by itself, from a stream of events.
	streamed bool
	// http2 says that requests share a connection.
	http2 bool
	// closing says that the connection ends with this answer.
	closing bool
	// size is the length of the body.
	size int
}

// statusError is an answer of the agent that is no success.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string {
	switch e.code {
	case http.StatusForbidden:
		return fmt.Sprintf("refused (403 %s): check the token in the entry's Secret, key consulToken", e.text)
	case http.StatusTooManyRequests:
		return fmt.Sprintf("too many requests or connections (429 %s): raise limits.http_max_conns_per_client of the agent, "+
			"or let fewer programs of this host use it", e.text)
	default:
		return fmt.Sprintf("answered %d %s", e.code, e.text)
	}
}

var (
	// errUnproven is wrapped by errors about answers that arrived but prove nothing about the present.
	errUnproven = errors.New("the answer is not believed")
	// errLost is wrapped by the error of a query whose connection did not last: what answers on another one may be another
	// agent, which knows other services.
	errLost = errors.New("the connection was lost")
)

func newClient(settings *consul, server registry.Server) (*client, error) {
	c := &client{consul: settings, server: server, conns: map[*conn]bool{}}
	c.base = url.URL{Scheme: "http", Host: server.String()}
	config, err := c.clientTLS()
	if err != nil {
		return nil, err
	}
	if config != nil {
		c.base.Scheme = "https"
	}
	c.list = c.newHTTP(&http.Transport{})
	return c, nil
}

// newHTTP makes a client of a transport that has no Proxy, since the environment has no say.
func (c *client) newHTTP(transport *http.Transport) *http.Client {
	transport.DialContext = c.dial
	if c.base.Scheme == "https" {
		transport.ForceAttemptHTTP2 = true
		transport.DialTLSContext = c.dialTLS
	}
	return &http.Client{
		Transport: transport,
		// A redirect would carry the token to who knows where.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func (c *client) clientTLS() (*tls.Config, error) {
	if c.env.ClientTLS == nil {
		return nil, nil
	}
	config, err := c.env.ClientTLS()
	if err != nil {
		return nil, fmt.Errorf("prepare TLS to consul at %s: %w", c.server, err)
	}
	return config, nil
}

func (c *client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	raw, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errors.Join(net.ErrClosed, raw.Close())
	}
	wrapped := &conn{Conn: raw, client: c}
	c.conns[wrapped] = true
	return wrapped, nil
}

func (c *client) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	config, err := c.clientTLS() // current files and Secrets
	if err != nil {
		return nil, err
	}
	if config == nil {
		return nil, errors.New("TLS was turned off")
	}
	config.NextProtos = []string{"h2", "http/1.1"}
	if config.ServerName == "" {
		config.ServerName = c.server.Host
	}
	raw, err := c.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	secured := tls.Client(raw, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return secured, nil
}

// close ends all connections. It is called after the last request has returned: the transport alone would keep
// a connection of HTTP/2 for as long as it has not finished to abandon the requests that shared it.
func (c *client) close() {
	c.list.CloseIdleConnections()
	if c.http != nil {
		c.http.CloseIdleConnections()
	}
	c.mu.Lock()
	c.closed = true
	open := slices.Collect(maps.Keys(c.conns))
	c.mu.Unlock()
	for _, conn := range open {
		_ = conn.Close()
	}
}

// request is one question to the agent, and how its answer is taken.
type request struct {
	operation string // for Observe
	list      bool   // goes over the connection of list
	path      string
	name      string        // of a service, the last part of the path; empty if there is none
	index     uint64        // that an earlier answer gave: waits for a newer one. 0 waits for nothing
	wait      time.Duration // but not longer than this

	opening json.Delim // of the answer, an array or an object
	what    string     // its elements are
	most    int        // how many it may have
	longest int64      // how long each may be, in bytes
	// take takes an element, and of an object its key. It must not keep value.
	take func(key string, value []byte) error
}

// services lists the names of all services, and whether any of its instances has the tag that is asked for. With an index
// that an earlier answer gave, it waits for a newer one, but not longer than wait.
func (c *client) services(ctx context.Context, index uint64, wait time.Duration) (map[string]bool, meta, error) {
	out := map[string]bool{}
	m, err := c.get(ctx, request{
		operation: "list", list: true, path: "/v1/catalog/services", index: index, wait: wait,
		opening: '{', what: "services", most: maxNames, longest: maxTags,
		take: func(name string, value []byte) error {
			var tags []string
			err := json.Unmarshal(value, &tags)
			out[name] = carries(tags, c.filter.tag)
			return err
		},
	})
	if index == 0 {
		c.brief = m.closing
	}
	if err == nil && m.closing != c.brief {
		err = errLost
	}
	if err != nil {
		return nil, m, fmt.Errorf("list services of consul at %s: %w", c.server, err)
	}
	if c.http == nil {
		transport := &http.Transport{MaxIdleConnsPerHost: idleConns, IdleConnTimeout: 30 * time.Second}
		if m.http2 {
			// That is, of those that can take one more request. Otherwise each request that finds none would dial one.
			transport.MaxConnsPerHost = 1
		}
		c.http = c.newHTTP(transport)
	}
	return out, m, nil
}

// health reads one service's instances with their checks, and waits like services.
//
// An agent answers a blocking query about a service from a stream that it keeps itself (use_streaming_backend, the default
// from 1.10 on). Such an answer tells neither that policies cut it nor whether there is a leader: a narrowed token looks
// like a service without instances. Sorting by distance keeps the agent from doing so. An answer from a stream that
// arrives all the same only tells that it is time to ask.
func (c *client) health(ctx context.Context, name string, index uint64, wait time.Duration) (*entries, meta, error) {
	out := &entries{filter: c.filter}
	r := request{
		operation: "service", path: "/v1/health/service/", name: name, index: index, wait: wait,
		opening: '[', what: "instances", most: maxInstances, longest: maxInstance,
		take: out.take,
	}
	m, err := c.get(ctx, r)
	if err == nil && m.streamed {
		*out, r.index = entries{filter: c.filter}, 0
		m, err = c.get(ctx, r)
	}
	if status, ok := errors.AsType[*statusError](err); ok && status.code/100 == 3 && path.Clean("/"+name) != "/"+name {
		err = fmt.Errorf("the agent, or what is in between, takes this name for a path (%w): rename the service", err)
	}
	if err != nil {
		return nil, m, fmt.Errorf("read service %s of consul at %s: %w", name, c.server, err)
	}
	return out, m, nil
}

// check is what is used of a check in the list of all checks.
type check struct {
	Node, CheckID, ServiceID, ServiceName string
	ModifyIndex                           uint64
}

// checks lists all checks, and waits like services.
func (c *client) checks(ctx context.Context, index uint64, wait time.Duration) ([]check, meta, error) {
	var out []check
	m, err := c.get(ctx, request{
		operation: "checks", path: "/v1/health/state/any", index: index, wait: wait,
		opening: '[', what: "checks", most: maxChecks, longest: maxInstance,
		take: func(_ string, value []byte) error {
			var one check
			if err := json.Unmarshal(value, &one); err != nil {
				return err
			}
			if one.Node == "" || one.CheckID == "" {
				return fmt.Errorf("check %d has no node or no id", len(out))
			}
			out = append(out, one)
			return nil
		},
	})
	if err != nil {
		return nil, m, fmt.Errorf("list checks of consul at %s: %w", c.server, err)
	}
	return out, m, nil
}

// get makes one request. Its result counts only if the agent knows a leader and has heard of it recently.
func (c *client) get(ctx context.Context, r request) (m meta, err error) {
	limit := c.timeout
	query := url.Values{"stale": {""}} // any server may answer; maxContact bounds how stale
	maps.Copy(query, c.query)
	operation := r.operation
	if r.index > 0 {
		operation += "-wait"        // so that waiting is not measured as working
		query.Set("near", "_agent") // not for the order, see health
		query.Set("index", strconv.FormatUint(r.index, 10))
		query.Set("wait", strconv.FormatInt(max(r.wait.Milliseconds(), 1), 10)+"ms")
		limit += r.wait + r.wait/16 // the agent adds up to a sixteenth
	}
	begun := time.Now()
	defer func() {
		if c.env.Observe != nil && ctx.Err() == nil {
			c.env.Observe(operation, time.Since(begun), err)
		}
	}()
	rctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v", limit.Round(time.Millisecond)))
	defer cancel()
	rctx, lose := context.WithCancelCause(rctx)
	defer lose(nil)
	if r.index > 0 { // the index is worth nothing to another agent
		conns := 0
		rctx = httptrace.WithClientTrace(rctx, &httptrace.ClientTrace{GotConn: func(conn httptrace.GotConnInfo) {
			conns++ // the transport by itself repeats a request whose connection broke
			if conns > 1 || r.list && !conn.Reused && !c.brief {
				lose(errLost)
			}
		}})
	}
	m, err = c.do(rctx, r, query)
	if cause := context.Cause(rctx); cause != nil && ctx.Err() == nil {
		err = cause
	}
	return m, err
}

// escape makes a service's name a part of a path that no router takes for more than one part, or for none.
func escape(name string) string {
	if name == "." || name == ".." {
		return strings.ReplaceAll(name, ".", "%2E")
	}
	return url.PathEscape(name)
}

func (c *client) do(ctx context.Context, r request, query url.Values) (meta, error) {
	u := c.base
	u.Path, u.RawPath, u.RawQuery = r.path+r.name, r.path+escape(r.name), query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), http.NoBody)
	if err != nil {
		return meta{}, err
	}
	token, err := c.token()
	if err != nil {
		return meta{}, err
	}
	if token != "" {
		req.Header.Set("X-Consul-Token", token)
	}
	client := c.http
	if r.list {
		client = c.list
	}
	resp, err := client.Do(req)
	if err != nil {
		if ue, ok := errors.AsType[*url.Error](err); ok { // its text repeats the URL
			err = ue.Err
		}
		return meta{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 300))
		if err != nil && ctx.Err() != nil {
			return meta{}, err
		}
		status := &statusError{code: resp.StatusCode, text: clean(string(text), token)}
		if strings.HasPrefix(status.text, "<") { // a page for people, of whatever is in between
			status.text = http.StatusText(status.code)
		}
		return meta{}, status
	}
	body := &body{r: resp.Body}
	if err := c.decode(body, r); err != nil {
		return meta{}, fmt.Errorf("decode the answer: %w", err)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64)) // the last line break, so that the connection can be used again
	m, err := readMeta(resp.Header)
	m.anonymous = token == "" && resp.Header.Get("X-Consul-Default-Acl-Policy") == "deny"
	m.http2 = resp.ProtoMajor == 2
	m.closing = resp.Close
	m.size = int(body.n)
	return m, err
}

// decode takes an answer element by element, and gives up at the first one that is bad or too much.
func (c *client) decode(body *body, r request) error {
	body.end = r.longest
	dec := json.NewDecoder(body)
	if t, err := dec.Token(); err != nil {
		return err
	} else if t != r.opening {
		return fmt.Errorf("it does not begin with %v", r.opening)
	}
	var value json.RawMessage
	for n := 0; ; n++ {
		body.end = min(dec.InputOffset()+r.longest, maxBody)
		if !dec.More() {
			break
		}
		if n == r.most {
			return fmt.Errorf("it has more than %d %s, which is more than we take", r.most, r.what)
		}
		key := ""
		if r.opening == '{' {
			t, err := dec.Token()
			if err != nil {
				return err
			}
			key = t.(string) // the decoder takes nothing else there
		}
		if err := dec.Decode(&value); err != nil {
			return err
		}
		c.decoding.Lock()
		err := r.take(key, value)
		c.decoding.Unlock()
		if err != nil {
			return err
		}
	}
	_, err := dec.Token() // the end, unless the answer was cut
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// token gives the token for a request, empty only where the entry names no Secret: with a Secret that lacks it, an answer
// to nobody in particular would pass for all that there is.
func (c *client) token() (string, error) {
	if c.env.Credentials == nil {
		return "", nil
	}
	credentials, err := c.env.Credentials()
	if err != nil {
		return "", fmt.Errorf("get the token: %w", err)
	}
	token := strings.TrimSpace(credentials.First("consulToken", "token").Reveal())
	if token == "" && c.secret != "" {
		return "", fmt.Errorf("the Secret %q has no token under the key consulToken or token: add it, or remove authSecretName "+
			"to read as anonymous", c.secret)
	}
	return token, nil
}

// readMeta reads the headers that every answer of Consul has (developer.hashicorp.com/consul/api-docs/features/blocking
// and .../consistency).
func readMeta(h http.Header) (meta, error) {
	index, err := strconv.ParseUint(h.Get("X-Consul-Index"), 10, 64)
	if err != nil || index == 0 {
		return meta{}, fmt.Errorf("%w: it has no X-Consul-Index: is this a Consul agent, and is nothing in between?", errUnproven)
	}
	if h.Get("X-Consul-Query-Backend") == "streaming" {
		return meta{index: index, streamed: true}, nil
	}
	if h.Get("X-Consul-Knownleader") != "true" {
		return meta{}, fmt.Errorf("%w: the cluster has no leader", errUnproven)
	}
	contact, err := strconv.ParseUint(h.Get("X-Consul-Lastcontact"), 10, 32)
	if err != nil {
		return meta{}, fmt.Errorf("%w: it has no X-Consul-LastContact", errUnproven)
	}
	if age := time.Duration(contact) * time.Millisecond; age > maxContact {
		return meta{}, fmt.Errorf("%w: the server that answered last heard of the leader %v ago", errUnproven, age)
	}
	return meta{index: index, filtered: h.Get("X-Consul-Results-Filtered-By-Acls") == "true"}, nil
}

// clean makes a server's text fit for an error: one line, without the token.
func clean(text, token string) string {
	text = strings.Join(strings.Fields(text), " ")
	if token != "" {
		text = strings.ReplaceAll(text, token, "***")
	}
	return text
}

// body is what is read of an answer, up to its end, which moves along.
type body struct {
	r      io.Reader
	n, end int64
}

func (b *body) Read(p []byte) (int, error) {
	if b.n >= b.end {
		return 0, fmt.Errorf("it, or a part of it, is longer than we take: it goes on after %d bytes", b.n)
	}
	n, err := b.r.Read(p)
	b.n += int64(n)
	return n, err
}
