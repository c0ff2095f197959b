package nacos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/regbridge/regbridge/registry"
)

const (
	// directoryPause is the time between two readings of the address server.
	directoryPause = 30 * time.Second
	// maxDirectory bounds its answer.
	maxDirectory = 1 << 20
)

// errMoved ends the reading of a server that the address server no longer lists, or that sends its clients away.
var errMoved = errors.New("moving to another server")

// servers is where an entry's Nacos servers are, and which one is next.
type servers struct {
	settings *settings
	http     *http.Client

	mu      sync.Mutex
	list    []registry.Server
	turn    int
	untried int       // of the list, since one worked
	read    time.Time // when the address server was last asked
}

// parseDirectory reads the base URL of an address server. Higress lets users leave the scheme out.
func parseDirectory(address string) (*url.URL, error) {
	if strings.Contains(address, "@") { // a password, perhaps
		return nil, errors.New("holds a user name or password: write the URL alone")
	}
	if !strings.Contains(address, "://") {
		address = "http://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, errors.New("is no http or https URL: write http://host:port")
	}
	u.RawQuery, u.Fragment = "", ""
	return u.JoinPath("nacos", "serverlist"), nil
}

func newServers(s *settings) (*servers, error) {
	list := slices.Clone(s.servers)
	shuffle(list)
	client, err := newHTTPClient(s)
	if err != nil {
		return nil, err
	}
	return &servers{settings: s, http: client, list: list, untried: len(list)}, nil
}

func (s *servers) close() { s.http.CloseIdleConnections() }

// next returns the server to read now, and whether there is another one that has not been tried since one worked.
func (s *servers) next(ctx context.Context) (registry.Server, bool, error) {
	err := s.refresh(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.list) == 0 {
		return registry.Server{}, false, err
	}
	if s.untried <= 0 {
		s.untried = len(s.list)
	}
	server := s.list[s.turn%len(s.list)]
	s.turn++
	s.untried--
	return server, s.untried > 0, nil
}

// works notes that the current server could be read.
func (s *servers) works() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.untried = len(s.list)
}

// stay runs read until it returns, or until the address server no longer lists the server.
func (s *servers) stay(ctx context.Context, server registry.Server, read func(context.Context) error) error {
	if s.settings.directory == nil {
		return read(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer cancel()
		return read(ctx)
	})
	g.Go(func() error {
		for told := false; registry.Sleep(ctx, registry.Jitter(min(directoryPause, s.settings.interval))) == nil; {
			err := s.refresh(ctx)
			if err != nil && !told && ctx.Err() == nil {
				s.settings.env.Logger.Warn("the address server of Nacos is of no use; the servers that it listed before are used", "error", err)
			}
			told = err != nil
			if !s.lists(server) {
				return fmt.Errorf("server %s is no longer listed by the address server: %w", server, errMoved)
			}
		}
		return nil
	})
	return g.Wait()
}

func (s *servers) lists(server registry.Server) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Contains(s.list, server)
}

// refresh asks the address server, unless that has been done a moment ago. A list that cannot be read, or has nothing
// useful in it, changes nothing. The order of the servers stays.
func (s *servers) refresh(ctx context.Context) error {
	if s.settings.directory == nil {
		return nil
	}
	s.mu.Lock()
	old, again := s.list, time.Since(s.read) < min(time.Second, s.settings.interval) && len(s.list) > 0
	if !again {
		s.read = time.Now()
	}
	s.mu.Unlock()
	if again {
		return nil
	}
	began := time.Now()
	list, err := s.ask(ctx)
	s.settings.env.Observe("address server", time.Since(began), err)
	if err != nil {
		return fmt.Errorf("read the servers of Nacos from the address server %s: %w", s.settings.directory.Host, err)
	}
	added := slices.DeleteFunc(slices.Clone(list), func(server registry.Server) bool { return slices.Contains(old, server) })
	kept := slices.DeleteFunc(slices.Clone(old), func(server registry.Server) bool { return !slices.Contains(list, server) })
	if len(old) > 0 && (len(added) > 0 || len(kept) < len(old)) && !reachable(ctx, list) {
		return fmt.Errorf("the address server %s has a new list, and none of the servers in it can be reached", s.settings.directory.Host)
	}
	shuffle(added)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = append(kept, added...)
	return nil
}

// reachable reports whether any of the servers takes connections. A page that is no list can look like one ("not found").
func reachable(ctx context.Context, list []registry.Server) bool {
	for _, server := range list {
		conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", server.String())
		if err == nil {
			conn.Close()
			return true
		}
	}
	return false
}

// shuffle keeps many instances of regbridge from beginning with the same server.
func shuffle(list []registry.Server) {
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

// ask reads the address server's answer: addresses between blanks or line ends, with or without a port.
func (s *servers) ask(ctx context.Context) ([]registry.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, s.settings.timeout)
	defer cancel()
	u := *s.settings.directory
	u.RawQuery = url.Values{"namespace": {s.settings.tenant}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Request-Module", "Naming")
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, withoutURL(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDirectory+1))
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("it answered %d", resp.StatusCode)
	case len(body) > maxDirectory:
		return nil, fmt.Errorf("its answer has more than %d bytes", maxDirectory)
	}
	list, bad := registry.ParseServers("line", strings.Join(strings.Fields(string(body)), ","), s.settings.port)
	if len(list) == 0 || bad != nil { // half a list, or a page that is something else
		return nil, errors.New("its answer is no list of addresses")
	}
	return list, nil
}
