package registrytest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func service(id string) registry.Service {
	return registry.Service{ID: id, Host: id + ".test", Instances: []registry.Instance{instance(1)}}
}

func TestRecorderKeepsState(t *testing.T) {
	r := NewRecorder(t.Context())
	r.Synced([]string{"a", "b"})
	if s := r.State(); !s.Synced || s.Loaded {
		t.Errorf("listed, nothing stated: %+v", s)
	}
	r.Put(service("a"))
	r.Fail(errors.New("unreadable"), "b")
	s := r.State()
	if !s.Loaded || len(s.Services) != 1 || s.Gaps["b"] == nil || s.Gap != nil {
		t.Errorf("one stated, one failed by name: %+v", s)
	}
	r.Put(service("a"))
	r.Put(service("b"))
	r.Fail(errors.New("down"))
	s = r.State()
	if s.Gap == nil || len(s.Gaps) > 0 || s.Events[3].Changed || !s.Events[4].Changed {
		t.Errorf("a repeated service, a service after its gap, a gap: %+v", s)
	}
	r.Synced([]string{"b"})
	s = r.State()
	if last := s.Events[len(s.Events)-1]; s.Gap != nil || len(last.Removed) != 1 || last.Removed[0] != "a" {
		t.Errorf("a listing without a: %+v", s)
	}
	r.Delete("b")
	if s = r.State(); len(s.Services) > 0 || !s.Loaded {
		t.Errorf("all deleted: %+v", s)
	}
	if v := r.Violations(); len(v) > 0 {
		t.Errorf("violations %q", v)
	}
}

func TestRecorderNotesBreaches(t *testing.T) {
	for want, breach := range map[string]func(*Recorder, context.CancelFunc){
		"was written after": func(r *Recorder, _ context.CancelFunc) {
			s := service("a")
			r.Put(s)
			s.Instances[0].Port++
			r.Returned()
		},
		"after Run had returned": func(r *Recorder, stop context.CancelFunc) {
			stop()
			r.Returned()
			r.Put(service("a"))
		},
		"without an id":    func(r *Recorder, _ context.CancelFunc) { r.Put(registry.Service{Host: "x"}) },
		"without a host":   func(r *Recorder, _ context.CancelFunc) { r.Put(registry.Service{ID: "x"}) },
		"names a twice":    func(r *Recorder, _ context.CancelFunc) { r.Synced([]string{"a", "a"}) },
		"without an error": func(r *Recorder, _ context.CancelFunc) { r.Fail(nil) },
	} {
		ctx, stop := context.WithCancel(t.Context())
		r := NewRecorder(ctx)
		breach(r, stop)
		stop()
		if v := strings.Join(r.Violations(), "; "); !strings.Contains(v, want) {
			t.Errorf("violations %q lack %q", v, want)
		}
	}
}

func TestRecorderIsDeafOnceTheContextEnded(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	r := NewRecorder(ctx)
	r.Put(service("a"))
	stop()
	r.Put(service("b"))
	r.Synced(nil)
	r.Delete("a")
	if s := r.State(); len(s.Services) != 1 || len(s.Events) != 1 || r.Late() != 3 || len(r.Violations()) > 0 {
		t.Errorf("%d late calls, violations %q: %+v", r.Late(), r.Violations(), s)
	}
}

func TestRecorderWaits(t *testing.T) {
	r := NewRecorder(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Put(service("a"))
	}()
	if _, ok := r.Wait(10*time.Second, func(s State) bool { return len(s.Services) == 1 }); !ok {
		t.Error("the service was not seen")
	}
	<-done
	if _, ok := r.Wait(time.Millisecond, func(s State) bool { return len(s.Services) == 2 }); ok {
		t.Error("a service was seen that never came")
	}
}

// TestStrays finds a goroutine of an adapter, which is here this package's own.
func TestStrays(t *testing.T) {
	r := NewRecorder(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = r.Wait(10*time.Second, func(s State) bool { return s.Synced })
	}()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(strays(NewRecorder), "Wait"); {
		if time.Now().After(deadline) {
			t.Fatal("the goroutine was not found")
		}
	}
	r.Synced(nil)
	<-done
}
