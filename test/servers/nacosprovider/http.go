package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// httpRegistry registers by requests, and repeats signs of life as applications of Nacos 1 do. What the server does not know
// any more it registers again.
type httpRegistry struct {
	options
	client http.Client
	stop   context.CancelFunc
	done   chan struct{} // closed when no sign of life is sent any more

	mu    sync.Mutex
	token string
	alive map[[2]string]service // by group and name
}

func newHTTPRegistry(o options) *httpRegistry {
	ctx, stop := context.WithCancel(context.Background())
	r := &httpRegistry{
		options: o, stop: stop, done: make(chan struct{}), alive: map[[2]string]service{},
		client: http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 8}},
	}
	go func() {
		defer close(r.done)
		for tick := time.NewTicker(o.beat); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				r.beatAll()
			}
		}
	}()
	return r
}

func (r *httpRegistry) close() {
	r.stop()
	<-r.done
}

// beatAll leaves out what fails until the next time: a server that is away finds everything again when it is back.
func (r *httpRegistry) beatAll() {
	r.mu.Lock()
	all := slices.Collect(maps.Values(r.alive))
	r.mu.Unlock()
	if err := each(all, func(s service) error { return r.eachInstance(s, s.Instances, r.beatOnce) }); err != nil {
		fmt.Println("give a sign of life:", err)
	}
}

func (r *httpRegistry) beatOnce(s service, i instance) error {
	q := r.query(s, i)
	q.Set("serviceName", s.Group+"@@"+s.Name)
	body, err := r.call(http.MethodPut, "/v1/ns/instance/beat", q)
	if err != nil {
		return err
	}
	var answer struct{ Code int }
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		return err
	}
	const notFound = 20404
	if answer.Code != notFound {
		return nil
	}
	r.mu.Lock()
	_, still := r.alive[[2]string{s.Group, s.Name}]
	r.mu.Unlock()
	if !still {
		return nil
	}
	return r.register(s, i)
}

func (r *httpRegistry) register(s service, i instance) error {
	q := r.query(s, i)
	q.Set("enabled", strconv.FormatBool(!i.Disabled))
	q.Set("healthy", strconv.FormatBool(!i.Unhealthy))
	q.Set("weight", strconv.FormatFloat(i.Weight, 'g', -1, 64))
	metadata, err := json.Marshal(i.Metadata)
	if err != nil {
		return err
	}
	if i.Metadata != nil {
		q.Set("metadata", string(metadata))
	}
	_, err = r.call(http.MethodPost, "/v1/ns/instance", q)
	return err
}

func (r *httpRegistry) deregister(s service, i instance) error {
	_, err := r.call(http.MethodDelete, "/v1/ns/instance", r.query(s, i))
	return err
}

func (r *httpRegistry) provide(s service, old []instance) error {
	r.mu.Lock()
	r.alive[[2]string{s.Group, s.Name}] = s
	r.mu.Unlock()
	gone := slices.DeleteFunc(slices.Clone(old), func(o instance) bool {
		return slices.ContainsFunc(s.Instances, func(i instance) bool {
			return i.IP == o.IP && i.Port == o.Port && cmp.Or(i.Cluster, "DEFAULT") == cmp.Or(o.Cluster, "DEFAULT")
		})
	})
	if err := r.eachInstance(s, gone, r.deregister); err != nil {
		return err
	}
	return r.eachInstance(s, s.Instances, r.register)
}

func (r *httpRegistry) withdraw(s service) error {
	r.mu.Lock()
	delete(r.alive, [2]string{s.Group, s.Name})
	r.mu.Unlock()
	return r.eachInstance(s, s.Instances, r.deregister)
}

func (r *httpRegistry) eachInstance(s service, all []instance, do func(service, instance) error) error {
	for _, i := range all {
		if err := do(s, i); err != nil {
			return err
		}
	}
	return nil
}

func (r *httpRegistry) reach() error {
	_, err := r.call(http.MethodGet, "/v1/ns/service/list", url.Values{"pageNo": {"1"}, "pageSize": {"1"}})
	return err
}

func (r *httpRegistry) watch(string, string) ([]instance, error) {
	return nil, errors.New("by HTTP nothing can be watched")
}

func (r *httpRegistry) query(s service, i instance) url.Values {
	return url.Values{
		"namespaceId": {r.namespace}, "groupName": {s.Group}, "serviceName": {s.Name}, "ephemeral": {"true"},
		"ip": {i.IP}, "port": {strconv.FormatUint(i.Port, 10)}, "clusterName": {cmp.Or(i.Cluster, "DEFAULT")},
	}
}

// call does a request, if need be after a login.
func (r *httpRegistry) call(method, path string, q url.Values) (string, error) {
	r.mu.Lock()
	token := r.token
	r.mu.Unlock()
	status, body, err := r.request(method, path, q, token)
	if err != nil || status != http.StatusForbidden || r.user == "" {
		return checked(method, path, status, body, err)
	}
	status, body, err = r.request(http.MethodPost, "/v1/auth/users/login", url.Values{"username": {r.user}, "password": {r.password}}, "")
	if body, err = checked(http.MethodPost, "login", status, body, err); err != nil {
		return "", err
	}
	var answer struct{ AccessToken string }
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		return "", fmt.Errorf("log in: %w", err)
	}
	r.mu.Lock()
	r.token = answer.AccessToken
	r.mu.Unlock()
	status, body, err = r.request(method, path, q, answer.AccessToken)
	return checked(method, path, status, body, err)
}

func checked(method, path string, status int, body string, err error) (string, error) {
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%s %s: %d %.200s", method, path, status, body)
	}
	return body, err
}

func (r *httpRegistry) request(method, path string, q url.Values, token string) (int, string, error) {
	if token != "" {
		q = maps.Clone(q)
		q.Set("accessToken", token)
	}
	target, body := "http://"+r.server+"/nacos"+path, io.Reader(nil)
	if method == http.MethodPost {
		body = strings.NewReader(q.Encode())
	} else {
		target += "?" + q.Encode()
	}
	req, err := http.NewRequest(method, target, body)
	if err != nil {
		return 0, "", err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}
