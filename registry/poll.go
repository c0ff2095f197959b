package registry

import (
	"context"
	"math/rand/v2"
	"time"
)

// DefaultRefreshInterval is the refresh interval of a registry whose entry sets none.
const DefaultRefreshInterval = 30 * time.Second

// Backoff gives growing, jittered pauses between retries. The zero value starts at 500 ms and grows to 30 s.
type Backoff struct {
	// Min and Max bound the pause; 0 means 500 ms and 30 s.
	Min, Max time.Duration

	next time.Duration
}

// Next returns the pause to make now, and lets the following one be twice as long. It is never longer than Max.
func (b *Backoff) Next() time.Duration {
	lo, hi := b.Min, b.Max
	if lo <= 0 {
		lo = 500 * time.Millisecond
	}
	if hi <= 0 {
		hi = 30 * time.Second
	}
	if b.next < lo {
		b.next = lo
	}
	d := min(b.next, hi)
	b.next = min(2*d, hi)
	return d - time.Duration(rand.Float64()*0.25*float64(d))
}

// Reset makes the next pause short again. It is called after a success.
func (b *Backoff) Reset() { b.next = 0 }

// Jitter returns d changed by up to a tenth, downward only, so that an interval stays an upper bound and many pollers
// do not fall into step.
func Jitter(d time.Duration) time.Duration {
	return d - time.Duration(rand.Float64()*0.1*float64(d))
}

// Sleep waits for d, or until ctx ends; then it returns ctx's error.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// Poll turns a function that reads everything into an adapter: it calls read at once and then every interval (jittered;
// after a failure with backoff, but never more often than the interval would allow once the backoff has grown to it),
// and reports the services or the failure to sink. Each call of read has timeout to finish; read must return soon after
// its context ends. Poll returns nil when ctx is done.
func Poll(ctx context.Context, sink Sink, interval, timeout time.Duration, read func(context.Context) ([]Service, error)) error {
	backoff := Backoff{Max: interval}
	for {
		pause := Jitter(interval)
		rctx, cancel := context.WithTimeout(ctx, timeout)
		services, err := read(rctx)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			sink.Fail(err)
			pause = backoff.Next()
		default:
			backoff.Reset()
			ids := make([]string, len(services))
			for i, s := range services {
				ids[i] = s.ID
				sink.Put(s)
			}
			sink.Synced(ids)
		}
		if Sleep(ctx, pause) != nil {
			return nil
		}
	}
}
