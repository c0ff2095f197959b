// Command nacosprovider is an application that registers instances at a Nacos server and keeps them alive, as real ones
// do: through Nacos's own client for Go, whose connection is the sign of life; or with -http as applications of Nacos 1 do,
// by requests that it repeats. On SIGTERM it takes its instances back; when it is killed the server has to notice.
//
// It is told what to do by HTTP. POST / has a list of services, each with all instances that this process is to have of it
// (none: take them back). GET /watch?group=G&service=S answers with what the client was last told of that service, and has
// it watch the service from then on. GET / answers 200 when the server can be reached.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// A service is what one process provides of one service.
type service struct {
	Group, Name string
	Instances   []instance
}

type instance struct {
	IP       string
	Port     uint64
	Weight   float64
	Cluster  string
	Metadata map[string]string
	Disabled bool
	// Unhealthy says that the application finds itself unable to work.
	Unhealthy bool
}

// A registry is the way to the server. Its methods may be called at the same time, about different services.
type registry interface {
	// reach returns nil if the server answers.
	reach() error
	// provide registers s.Instances, of which there is at least one, in place of old.
	provide(s service, old []instance) error
	// withdraw takes back all that s has.
	withdraw(s service) error
	// watch returns the instances that the server last told of, and nil before it did.
	watch(group, name string) ([]instance, error)
	close()
}

type options struct {
	server, namespace, user, password string
	dir                               string
	beat                              time.Duration
}

func main() {
	var o options
	listen := flag.String("listen", "127.0.0.1:0", "where to take commands")
	plain := flag.Bool("http", false, "register by HTTP, as with Nacos 1")
	flag.StringVar(&o.server, "server", "127.0.0.1:8848", "the HTTP address of the server")
	flag.StringVar(&o.namespace, "namespace", "public", "the id of the namespace")
	flag.StringVar(&o.user, "user", "", "log in as this user, with the password in NACOS_PASSWORD")
	flag.StringVar(&o.dir, "dir", ".", "a folder for what the client writes")
	flag.DurationVar(&o.beat, "beat", 5*time.Second, "with -http: the time between two signs of life")
	flag.Parse()
	o.password = os.Getenv("NACOS_PASSWORD")
	if err := run(*listen, *plain, o); err != nil {
		fmt.Fprintln(os.Stderr, "nacosprovider:", err)
		os.Exit(1)
	}
}

func run(listen string, plain bool, o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var r registry
	var err error
	if plain {
		r = newHTTPRegistry(o)
	} else if r, err = newSDKRegistry(o); err != nil {
		return err
	}
	defer r.close()
	p := &provider{registry: r, provided: map[[2]string]service{}}
	server := &http.Server{Handler: p.handler(), ReadHeaderTimeout: 10 * time.Second}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	_ = server.Close() // commands that it interrupts come from tests that have ended
	<-failed
	return p.withdrawAll()
}

type provider struct {
	registry registry

	mu       sync.Mutex
	provided map[[2]string]service // by group and name
}

func (p *provider) handler() http.Handler {
	answer := func(w http.ResponseWriter, v any, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(v) // who asked may have gone
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { answer(w, nil, p.registry.reach()) })
	mux.HandleFunc("POST /{$}", func(w http.ResponseWriter, r *http.Request) {
		var all []service
		err := json.NewDecoder(r.Body).Decode(&all)
		if err == nil {
			err = p.provide(all)
		}
		answer(w, nil, err)
	})
	mux.HandleFunc("GET /watch", func(w http.ResponseWriter, r *http.Request) {
		told, err := p.registry.watch(cmp.Or(r.FormValue("group"), "DEFAULT_GROUP"), r.FormValue("service"))
		answer(w, told, err)
	})
	return mux
}

func (p *provider) provide(all []service) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var mu sync.Mutex
	return each(all, func(s service) error {
		s.Group = cmp.Or(s.Group, "DEFAULT_GROUP")
		key := [2]string{s.Group, s.Name}
		mu.Lock()
		old, known := p.provided[key]
		mu.Unlock()
		var err error
		switch {
		case len(s.Instances) > 0:
			err = p.registry.provide(s, old.Instances)
		case known:
			err = p.registry.withdraw(old)
		}
		if err != nil {
			return fmt.Errorf("%s@@%s: %w", s.Group, s.Name, err)
		}
		mu.Lock()
		defer mu.Unlock()
		if p.provided[key] = s; len(s.Instances) == 0 {
			delete(p.provided, key)
		}
		return nil
	})
}

func (p *provider) withdrawAll() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []service
	for _, s := range p.provided {
		all = append(all, s)
	}
	return each(all, p.registry.withdraw)
}

// each does do for all, some at the same time, and returns what the first of each eight failed with.
func each(all []service, do func(service) error) error {
	const workers = 8
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < len(all) && errs[w] == nil; i += workers {
				errs[w] = do(all[i])
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
