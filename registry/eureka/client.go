package eureka

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const dialTimeout = 5 * time.Second

// What follows bounds what is taken of an answer, whatever sends it. Lengths are those without compression.
const (
	// maxBody is the length of an answer: 250,000 instances with 1 KB each.
	maxBody = 256 << 20
	// maxStep is how much of it may pass without a whole instance or application: one, and what is read ahead.
	maxStep = 1 << 20
	// maxInstances is the number of instances.
	maxInstances = 500_000
)

var (
	// errNoDelta is wrapped by the error of a server that tells no changes.
	errNoDelta = errors.New("the server tells no changes")
	// errOddDelta is wrapped by the error of changes that cannot be read.
	errOddDelta = errors.New("what the server tells of changes cannot be read")
	// errSlow is the cause of the end of a request that took too long.
	errSlow = errors.New("no answer in time")
)

// client asks Eureka servers.
type client struct {
	*settings
	http   *http.Client
	scheme string
}

// newClient makes a client that the environment has no say in.
func newClient(s *settings) (*client, error) {
	c := &client{settings: s, scheme: "http"}
	config, err := s.clientTLS()
	if err != nil {
		return nil, err
	}
	if config != nil {
		c.scheme = "https"
	}
	c.http = &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			DialTLSContext:      c.dialTLS,
			MaxIdleConnsPerHost: 1,
			IdleConnTimeout:     90 * time.Second,
		},
		// A redirect would carry the credentials to who knows where.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

func (c *client) close() { c.http.CloseIdleConnections() }

func (s *settings) clientTLS() (*tls.Config, error) {
	if s.env.ClientTLS == nil {
		return nil, nil //nolint:nilnil // plain text
	}
	config, err := s.env.ClientTLS()
	if err != nil {
		return nil, fmt.Errorf("prepare TLS to eureka: %w", err)
	}
	return config, nil
}

// dialTLS connects with what files and Secrets hold now.
func (c *client) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	config, err := c.clientTLS()
	if err != nil {
		return nil, err
	}
	if config == nil {
		return nil, errors.New("TLS was turned off")
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return (&tls.Dialer{Config: config}).DialContext(ctx, network, address) // takes the server's name from the address
}

// apps asks for everything.
func (c *client) apps(ctx context.Context, server registry.Server) (*answer, error) {
	a, err := c.get(ctx, server, "apps", "/apps")
	if err == nil && a.size == 0 && a.hash != "" {
		return nil, &answerError{code: http.StatusOK, odd: fmt.Errorf("it counts %q, and lists nothing", a.hash)}
	}
	return a, err
}

// delta asks for what has changed within the last minutes.
func (c *client) delta(ctx context.Context, server registry.Server) (*answer, error) {
	d, err := c.get(ctx, server, "delta", "/apps/delta")
	if refused, ok := errors.AsType[*answerError](err); ok {
		switch refused.code {
		// 403 is what a server answers whose deltas are switched off; if it means us, the next request tells.
		case http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone, http.StatusNotImplemented:
			return nil, fmt.Errorf("%w: /apps/delta: %d", errNoDelta, refused.code)
		case http.StatusOK:
			return nil, fmt.Errorf("%w: %w", errOddDelta, err)
		}
	}
	return d, err
}

func (c *client) get(ctx context.Context, server registry.Server, operation, path string) (*answer, error) {
	budget := c.env.Budgets.Of("eureka "+server.String(), concurrency)
	if err := budget.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer budget.Release(1)
	began := time.Now()
	a, err := c.ask(ctx, server, path)
	if c.env.Observe != nil {
		c.env.Observe(operation, time.Since(began), err)
	}
	return a, err
}

// ask sends one request, and decodes the answer as it comes.
func (c *client) ask(ctx context.Context, server registry.Server, path string) (*answer, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	idle := time.AfterFunc(c.timeout, func() { cancel(errSlow) })
	defer idle.Stop()
	whole := time.AfterFunc(maxRequest, func() { cancel(errSlow) })
	defer whole.Stop()

	u := url.URL{Scheme: c.scheme, Host: server.String(), Path: c.path + path}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, withoutURL(ctx, err)
	}
	user, err := c.authorise(req)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "regbridge")
	resp, err := c.http.Do(req) // asks for gzip and takes it off again, by itself
	if err != nil {
		return nil, withoutURL(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &answerError{code: resp.StatusCode, anonymous: user == "", secret: c.secret}
	}
	body := &bounded{r: resp.Body, left: maxBody, arrived: func() { idle.Reset(c.timeout) }}
	a, err := decode(body, c.choice, body.next)
	if err != nil {
		switch {
		case body.err != nil:
			return nil, fmt.Errorf("read the answer: %w", withoutURL(ctx, body.err))
		case errors.Is(err, errCut):
			return nil, err
		default:
			return nil, &answerError{code: resp.StatusCode, odd: err}
		}
	}
	return a, nil
}

// authorise adds the Secret's user and password, and returns the user. A Secret without them is an error: without them we
// might be shown less, and never notice.
func (c *client) authorise(req *http.Request) (user registry.Secret, err error) {
	var secret registry.Credentials
	if c.env.Credentials != nil {
		if secret, err = c.env.Credentials(); err != nil {
			return "", err
		}
	}
	user, password := secret.First("eurekaUsername", "username"), secret.First("eurekaPassword", "password")
	switch {
	case user != "" && password != "":
		req.SetBasicAuth(user.Reveal(), password.Reveal())
	case c.secret != "" || user != "":
		return "", fmt.Errorf("secret %s lacks eurekaUsername or eurekaPassword", c.secret)
	}
	return user, nil
}

// answerError is an answer of the server that is not what was asked for. Of its body nothing is repeated.
type answerError struct {
	code      int
	anonymous bool   // no credentials were sent
	secret    string // the Secret's name
	odd       error  // what is wrong with the body
}

func (e *answerError) Error() string {
	switch {
	case e.odd != nil:
		return fmt.Sprintf("the answer is no list of applications: %v", e.odd)
	case e.code == http.StatusUnauthorized && e.anonymous:
		return "refused (401): it needs credentials, and the entry has none: name a Secret in authSecretName"
	case e.code == http.StatusUnauthorized:
		return fmt.Sprintf("refused (401): check user and password in the Secret %s, keys eurekaUsername and eurekaPassword", e.secret)
	case e.code == http.StatusForbidden:
		return "refused (403): the server has just started and waits for its peers, or the entry's user may not read"
	case e.code == http.StatusNotFound:
		return "answered 404: check eurekaContextPath, which is /eureka for servers of Spring Cloud and /eureka/v2 for Netflix's own"
	case e.code >= 300 && e.code < 400:
		return fmt.Sprintf("answered with a redirect (%d), which is not followed: check domain, port, tls and authSecretName", e.code)
	default:
		return fmt.Sprintf("answered %d %s", e.code, http.StatusText(e.code))
	}
}

// withoutURL takes the URL, which the error is told with anyway, out of an error of package http.
func withoutURL(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errSlow) {
		return errSlow
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// bounded reads a body up to a length, and tells when something arrives.
type bounded struct {
	r       io.Reader
	left    int64 // of the whole
	step    int64 // since the last instance
	arrived func()
	err     error // why it could not be read to its end
}

// next says that a whole instance was read.
func (b *bounded) next() { b.step = 0 }

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	b.left -= int64(n)
	b.step += int64(n)
	switch {
	case b.left < 0:
		n, err = 0, fmt.Errorf("it has more than %d bytes", maxBody)
	case b.step > maxStep:
		n, err = 0, fmt.Errorf("it has an instance of more than %d bytes", maxStep)
	case n > 0:
		b.arrived()
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.err = err
	}
	return n, err
}
