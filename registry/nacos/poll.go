package nacos

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/regbridge/regbridge/registry"
)

const (
	// maxFailures is how many services in a row may fail to be read before the server counts as lost.
	maxFailures = 16
	// watchPause is the time between two questions whether the server is there. It takes longer to be restarted.
	watchPause = 2 * time.Second
)

// poll reads one server of Nacos 1 at each refresh interval: the list of services, then each service, spread over the
// interval.
func poll(ctx context.Context, s *settings, server registry.Server, sink registry.Sink, fresh func()) error {
	a, err := newAPI(s, server)
	if err != nil {
		return err
	}
	defer a.close()
	p := &poller{settings: s, api: a, sink: sink}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.watch(ctx) })
	g.Go(func() error { return p.keep(ctx, fresh) })
	return fmt.Errorf("nacos at %s: %w", server, g.Wait())
}

type poller struct {
	*settings
	api   *api
	sink  registry.Sink
	known []key // the last listing
}

// watch asks the server from time to time whether it is there: one that was restarted between two rounds, and lost what it
// knew, would pass for one whose services are gone.
func (p *poller) watch(ctx context.Context) error {
	for registry.Sleep(ctx, registry.Jitter(min(watchPause, p.interval))) == nil {
		if err := p.check(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// check returns an error if the server is not there.
func (p *poller) check(ctx context.Context) error {
	if _, _, err := p.api.services(ctx, p.groups[0], 1, 1); lost(err) {
		return fmt.Errorf("ask whether the server is there: %w", err)
	}
	return nil
}

// lost reports whether the error is not about what was asked for, but about the server.
func lost(err error) bool {
	a, ok := errors.AsType[*answerError](err)
	switch {
	case err == nil:
		return false
	case !ok || errors.Is(err, errRefused):
		return true
	default: // 503 is what a server says while it starts
		return a.code >= http.StatusBadGateway && a.code <= http.StatusGatewayTimeout || a.code == http.StatusTooManyRequests
	}
}

// keep reads everything at each interval.
func (p *poller) keep(ctx context.Context, fresh func()) error {
	for {
		began := time.Now()
		if err := p.round(ctx); err != nil {
			return err
		}
		fresh()
		// A server that is slower than the interval is left alone for a while, too.
		pause := max(registry.Jitter(p.interval)-time.Since(began), p.interval/20)
		if err := registry.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// round reads everything once: what is new as quickly as a server can be asked, and before the listing is reported, the rest
// over most of the interval.
func (p *poller) round(ctx context.Context) error {
	listed, err := p.list(ctx, p.known, p.api.services)
	if err != nil {
		return err
	}
	var added, kept []key
	ids := make([]string, len(listed))
	for i, k := range listed {
		ids[i] = k.id()
		if _, ok := slices.BinarySearchFunc(p.known, k, key.compare); ok {
			kept = append(kept, k)
		} else {
			added = append(added, k)
		}
	}
	if err := p.readAll(ctx, added, maxRate); err != nil {
		return err
	}
	p.known = listed
	p.sink.Synced(ids)
	return p.readAll(ctx, kept, min(maxRate, rate.Limit(float64(len(kept)+1)/(0.8*p.interval.Seconds()))))
}

// readAll reads services. It returns an error if the server is lost.
func (p *poller) readAll(ctx context.Context, services []key, pace rate.Limit) error {
	limit := rate.NewLimiter(pace, 1)
	var failures atomic.Int32 // in a row
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(concurrency / 2)
	for _, k := range services {
		if err := limit.Wait(gctx); err != nil {
			break
		}
		g.Go(func() error {
			info, err := p.api.instances(gctx, k)
			var s registry.Service
			if err == nil {
				s, err = convert(k, p.shown, info)
			}
			if err == nil {
				failures.Store(0)
				p.sink.Put(s)
				return nil
			}
			if gctx.Err() != nil {
				return gctx.Err()
			}
			err = fmt.Errorf("read %s: %w", k.id(), err)
			if lost(err) && (errors.Is(err, errRefused) || failures.Add(1) >= maxFailures || p.check(gctx) != nil) {
				return err
			}
			p.sink.Fail(err, k.id())
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}
