package nacos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

const (
	dialTimeout = 3 * time.Second
	// maxAnswer bounds one answer. A service with 50,000 instances takes about 20 MB.
	maxAnswer = 64 << 20
)

// newHTTPClient makes a client that the environment has no say in.
func newHTTPClient(s *settings) (*http.Client, error) {
	config, err := s.env.ClientTLS()
	if err != nil {
		return nil, fmt.Errorf("prepare TLS to nacos: %w", err)
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSClientConfig:     config,
			TLSHandshakeTimeout: dialTimeout,
			MaxIdleConnsPerHost: concurrency,
			IdleConnTimeout:     30 * time.Second,
		},
		// A redirect would carry the credentials to who knows where.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// api is the HTTP API of one server, version 1, which 2.x and 3.x servers have too.
type api struct {
	*settings
	server registry.Server
	http   *http.Client
	base   url.URL
	auth   *auth
}

func newAPI(s *settings, server registry.Server) (*api, error) {
	client, err := newHTTPClient(s)
	if err != nil {
		return nil, err
	}
	a := &api{settings: s, server: server, http: client, base: url.URL{Scheme: "http", Host: server.String(), Path: "/nacos"}}
	if client.Transport.(*http.Transport).TLSClientConfig != nil {
		a.base.Scheme = "https"
	}
	a.auth = &auth{api: a}
	return a, nil
}

func (a *api) close() { a.http.CloseIdleConnections() }

// services asks for one page of a group's services.
func (a *api) services(ctx context.Context, group string, page, size int) (names []string, count int, err error) {
	var answer struct {
		Count *int     `json:"count"`
		Doms  []string `json:"doms"`
	}
	err = a.get(ctx, "list", key{group, ""}, "/v1/ns/service/list", url.Values{
		"groupName": {group}, "pageNo": {strconv.Itoa(page)}, "pageSize": {strconv.Itoa(size)},
	}, &answer)
	if err == nil && answer.Count == nil {
		err = &answerError{code: http.StatusOK, message: "without the number of services"}
	}
	if err != nil {
		return nil, 0, err
	}
	return answer.Doms, *answer.Count, nil
}

// instances asks for one service.
func (a *api) instances(ctx context.Context, k key) (info serviceInfo, err error) {
	err = a.get(ctx, "instances", k, "/v1/ns/instance/list", url.Values{
		"serviceName": {k.id()}, "groupName": {k.group}, "healthyOnly": {"false"},
	}, &info)
	return info, err
}

// get asks with credentials; if the server refuses them, once more with new ones.
func (a *api) get(ctx context.Context, operation string, k key, path string, query url.Values, into any) error {
	query.Set("namespaceId", a.tenant)
	return a.auth.retry(ctx, k, func(headers map[string]string) error {
		for _, name := range []string{"ak", "data", "signature"} {
			if headers[name] != "" {
				query.Set(name, headers[name])
			}
		}
		u := a.base.JoinPath(path)
		u.RawQuery = query.Encode()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return withoutURL(err)
		}
		if token := headers[tokenHeader]; token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		budget := a.env.Budgets.Of("nacos "+a.server.String(), concurrency)
		if err := budget.Acquire(ctx, 1); err != nil {
			return err
		}
		defer budget.Release(1)
		return a.do(req, operation, into, headers[tokenHeader], headers["signature"])
	})
}

// do sends a request, and decodes the answer. An answer that repeats one of the secrets is not quoted in the error. No budget
// is asked for here: a request can have its part of it already when it logs in.
func (a *api) do(req *http.Request, operation string, into any, secrets ...string) error {
	ctx, cancel := context.WithTimeout(req.Context(), a.timeout)
	defer cancel()
	req.Header.Set("User-Agent", "regbridge")
	began := time.Now()
	err := func() error {
		resp, err := a.http.Do(req.WithContext(ctx))
		if err != nil {
			return withoutURL(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
		switch {
		case err != nil:
			return fmt.Errorf("read the answer: %w", err)
		case len(body) > maxAnswer:
			return &answerError{code: resp.StatusCode, message: fmt.Sprintf("with more than %d bytes", maxAnswer)}
		case resp.StatusCode != http.StatusOK:
			return &answerError{code: resp.StatusCode, message: messageOf(body, secrets)}
		}
		if err := json.Unmarshal(body, into); err != nil {
			return &answerError{code: resp.StatusCode, message: "with something that is not what it should be: " + err.Error()}
		}
		return nil
	}()
	a.env.Observe(operation, time.Since(began), err)
	return err
}

// answerError is an answer of the server that is no success.
type answerError struct {
	code    int // HTTP's, or Nacos's error code, which is like it
	message string
}

func (e *answerError) Error() string {
	switch e.code {
	case http.StatusForbidden, http.StatusUnauthorized:
		return fmt.Sprintf("refused (%d %s): check the entry's Secret, keys nacosUsername and nacosPassword, and that the user may read the namespace",
			e.code, e.message)
	case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return fmt.Sprintf("answered with a redirect (%d), which is not followed", e.code)
	case 0:
		return "answered " + e.message
	default:
		return strings.TrimSpace(fmt.Sprintf("answered %d %s", e.code, e.message))
	}
}

// messageOf makes one short line of the body of an answer that is no success: a text, or JSON with a message. It is empty if
// one of the secrets is in it.
func messageOf(body []byte, secrets []string) string {
	var answer struct {
		Message string `json:"message"`
	}
	text := string(body)
	if json.Unmarshal(body, &answer) == nil && answer.Message != "" {
		text = answer.Message
	}
	for _, secret := range secrets {
		if secret != "" && strings.Contains(text, secret) {
			return ""
		}
	}
	return short(text)
}

// short cuts a text of the server's to one line. What looks like a page of HTML is left out.
func short(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if strings.HasPrefix(text, "<") {
		return ""
	}
	if len(text) > 200 {
		text = strings.ToValidUTF8(text[:200], "") + "..."
	}
	return text
}

// withoutURL takes the URL, whose query may hold a signature, out of an error of package http.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		if u.Timeout() {
			return fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)
		}
		return u.Err
	}
	return err
}
