// Package admin is what people and probes see of a running regbridge over HTTP: health, metrics, the debug pages and a
// page that lists them. It only reads, except for the release of what is held. Nothing in it waits for a registry or for
// a client of the mesh, so it answers while everything else is down. There are no secrets in what it shows, since
// statuses and resources hold none.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/mcp/xds"
)

// Options are what an Admin is made of.
type Options struct {
	// Bridge tells of registries, services and readiness.
	Bridge *bridge.Bridge
	// Cache tells of the resources as they are sent, and of the clients.
	Cache *xds.Cache
	// Gatherer has the metrics.
	Gatherer prometheus.Gatherer
	// Version is shown on the page.
	Version string
	// Pprof adds the profiles of Go's runtime under /debug/pprof/.
	Pprof bool
}

// An Admin makes the handlers.
type Admin struct {
	opts     Options
	draining atomic.Bool
}

// New makes an Admin.
func New(opts Options) *Admin { return &Admin{opts: opts} }

// Drain makes /readyz refuse from now on: the process is about to end.
func (a *Admin) Drain() { a.draining.Store(true) }

// A page is one line of the list on "/".
type page struct {
	Path, Text string
	handler    http.HandlerFunc
}

func (a *Admin) healthPages() []page {
	return []page{
		{"/livez", "200 as long as the process answers", a.livez},
		{"/readyz", "200 once first answers may go out to the mesh; else 503 and the reasons", a.readyz},
		{"/metrics", "Prometheus metrics", promhttp.HandlerFor(a.opts.Gatherer, promhttp.HandlerOpts{
			ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 8, EnableOpenMetrics: true,
		}).ServeHTTP},
	}
}

func (a *Admin) debugPages() []page {
	return []page{
		{"/debug/registries", "each registry: state, last sync and error, held endpoints, what is left out and why (?registry=NAME)", a.registries},
		{"/debug/problems", "what is wrong with the configuration, with file, line and field", a.problems},
		{"/debug/registryz", "the services, in istiod's form", a.registryz},
		{"/debug/endpointShardz", "their endpoints, in istiod's form", a.endpointShardz},
		{"/debug/configz", "the resources as they are sent, in istiod's form (?kind=ServiceEntry, ?name=HOST)", a.configz},
		{"/debug/clients", "the xDS clients: what they asked for, were sent, took and refused", a.clients},
		{"/registry/watcherStatus", "each registry in a word", a.watcherStatus},
	}
}

// Handler serves everything. It is meant for a loopback address: who reaches it may read all that is published, and let
// go what is held.
func (a *Admin) Handler() http.Handler {
	mux := http.NewServeMux()
	pages := append(a.debugPages(), a.healthPages()...)
	if a.opts.Pprof {
		pages = append(pages, page{"/debug/pprof/", "profiles of Go's runtime", pprof.Index})
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	for _, p := range pages {
		mux.HandleFunc("GET "+p.Path, p.handler)
	}
	mux.HandleFunc("POST /release", a.release)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { a.index(w, pages) })
	return headers(mux)
}

// HealthHandler serves /livez, /readyz and /metrics alone, and may be reached from anywhere.
func (a *Admin) HealthHandler() http.Handler {
	mux := http.NewServeMux()
	for _, p := range a.healthPages() {
		mux.HandleFunc("GET "+p.Path, p.handler)
	}
	return headers(mux)
}

func headers(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		h.ServeHTTP(w, r)
	})
}

// Serve serves h on l until ctx ends, and returns nil then. It closes l.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      5 * time.Minute, // a profile, or everything that is published over a slow line
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the admin pages at %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if s.Shutdown(grace) != nil {
		_ = s.Close() // who still reads after that second is cut off
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the admin pages at %s: %w", l.Addr(), err)
	}
	return nil
}

func (a *Admin) livez(w http.ResponseWriter, _ *http.Request) { text(w, http.StatusOK, "ok") }

func (a *Admin) readyz(w http.ResponseWriter, _ *http.Request) {
	ready, reasons := a.ready()
	if ready {
		text(w, http.StatusOK, "ready")
		return
	}
	text(w, http.StatusServiceUnavailable, "not ready: "+strings.Join(reasons, "\nnot ready: "))
}

func (a *Admin) ready() (bool, []string) {
	if a.draining.Load() {
		return false, []string{"the process is about to end"}
	}
	return a.opts.Bridge.Ready()
}

// release lets go what is held of a registry. Browsers send one of the two headers with every POST, also to a host that
// is none of the page's, and also where a page made its own name lead to us; nobody else does. We offer no such page.
func (a *Admin) release(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("registry")
	switch {
	case r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "":
		text(w, http.StatusForbidden, "release: requests of browsers are refused, since any page could send them: use regbridge release, or curl")
		return
	case name == "":
		text(w, http.StatusBadRequest, "release: name a registry: POST /release?registry=NAME")
		return
	}
	released, err := a.opts.Bridge.Release(name)
	if err != nil {
		text(w, http.StatusNotFound, err.Error())
		return
	}
	writeValue(w, struct {
		// Released counts the endpoints by registry.
		Released map[string]int `json:"released"`
	}{released})
}

func text(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, body) //nolint:gosec // plain text, which no browser takes for anything else
}
