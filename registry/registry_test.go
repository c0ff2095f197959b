package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestInterval(t *testing.T) {
	for in, want := range map[string]time.Duration{
		`30`: 30 * time.Second, `999999`: 999999 * time.Second, `1000000`: time.Millisecond, `30000000000`: 30 * time.Second,
		`3e10`: 30 * time.Second, `"30s"`: 30 * time.Second, `"1m30s"`: 90 * time.Second, `"15"`: 15 * time.Second, `0`: 0, `""`: 0,
		`null`: 0, `"0s"`: 0,
	} {
		var got Interval
		if err := json.Unmarshal([]byte(in), &got); err != nil || time.Duration(got) != want {
			t.Errorf("%s is %v (%v), want %v", in, time.Duration(got), err, want)
		}
	}
	for _, in := range []string{`-1`, `"-5s"`, `"soon"`, `1.5`, `true`, `1e300`, `"NaN"`, `"Inf"`} {
		var got Interval
		if err := json.Unmarshal([]byte(in), &got); err == nil {
			t.Errorf("%s is taken as %v", in, time.Duration(got))
		}
	}
}

func FuzzInterval(f *testing.F) {
	for _, s := range []string{`30`, `"30s"`, `1e9`, `"x"`, `null`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var i, back Interval
		if json.Unmarshal([]byte(s), &i) != nil {
			return
		}
		if i < 0 {
			t.Fatalf("%s is negative: %v", s, time.Duration(i))
		}
		b, err := json.Marshal(i)
		if err == nil {
			err = json.Unmarshal(b, &back)
		}
		if err != nil || back != i {
			t.Fatalf("%v came back as %v (%v)", time.Duration(i), time.Duration(back), err)
		}
	})
}

func TestEntryInterval(t *testing.T) {
	second := Interval(time.Second)
	for want, e := range map[time.Duration]Entry{
		30 * time.Second: {}, time.Second: {ConsulRefreshInterval: second},
		2 * time.Second: {RefreshInterval: 2 * second, ConsulRefreshInterval: second}, 3 * time.Second: {NacosRefreshInterval: 3 * second},
	} {
		if got := e.Interval(); got != want {
			t.Errorf("%+v has interval %v, want %v", e, got, want)
		}
	}
}

func TestParseServers(t *testing.T) {
	got, err := ParseServers("domain", " 10.0.0.1, host.example:9 ,[2001:DB8::1]:80,2001:db8::2, my_host ,,[::1]", 8500)
	want := []Server{{"10.0.0.1", 8500}, {"host.example", 9}, {"2001:db8::1", 80}, {"2001:db8::2", 8500}, {"my_host", 8500}, {"::1", 8500}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	if s := want[2].String() + " " + want[1].String(); s != "[2001:db8::1]:80 host.example:9" {
		t.Errorf("printed as %s", s)
	}

	got, err = ParseServers("domain", "good:1, http://x, a:0, a:70000, [::1, [1.2.3.4]:5, b:, -x, 1.2.3, [::1]x, [::1]:", 1)
	if diff := cmp.Diff([]Server{{"good", 1}}, got); diff != "" {
		t.Errorf("good items beside bad ones: %s", diff)
	}
	var paths []string
	for _, f := range FieldErrors(err) {
		paths = append(paths, f.Path)
		if !f.Partial {
			t.Errorf("%v is not partial", f)
		}
	}
	var all []string
	for i := 1; i <= 10; i++ {
		all = append(all, fmt.Sprintf("domain[%d]", i))
	}
	if diff := cmp.Diff(all, paths); diff != "" {
		t.Errorf("bad items: %s", diff)
	}
}

func TestParseServersRepeatsNoPassword(t *testing.T) {
	for _, item := range []string{"user:hunter2@host:1", "http://user:hunter2@host", "hunter2@"} {
		if _, err := ParseServers("domain", item, 1); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", item, err)
		}
	}
}

func FuzzParseServers(f *testing.F) {
	f.Add("a:1,[::1]:2, 10.0.0.1")
	f.Fuzz(func(t *testing.T, list string) {
		servers, _ := ParseServers("domain", list, 80)
		for _, s := range servers {
			back, err := ParseServers("domain", s.String(), 0)
			if err != nil || len(back) != 1 || back[0] != s {
				t.Fatalf("%+v came back as %+v (%v)", s, back, err)
			}
		}
	})
}

// TestFingerprintTellsEditsApart sets each field of an entry and looks at what changes.
func TestFingerprintTellsEditsApart(t *testing.T) {
	base := Entry{}.Fingerprint()
	typ := reflect.TypeFor[Entry]()
	for i := range typ.NumField() {
		var e Entry
		field := typ.Field(i)
		fill(t, reflect.ValueOf(&e).Elem().Field(i))
		got := e.Fingerprint()
		var changed []string
		for name, differs := range map[string]bool{
			"source": got.Source != base.Source, "identity": got.Identity != base.Identity, "run": got.Run != base.Run,
		} {
			if differs {
				changed = append(changed, name)
			}
		}
		want := []string{field.Tag.Get("edit")}
		switch {
		case want[0] == "assemble":
			want = nil
		case field.Name == "Domain": // in another order it is the same source, and yet used otherwise
			want = []string{"run", "source"}
		}
		slices.Sort(changed)
		if !slices.Equal(changed, want) {
			t.Errorf("an edit of %s changes %v, want %v", field.Name, changed, want)
		}
		if strings.Contains(fmt.Sprint(got), "filled") {
			t.Errorf("the fingerprint shows the value of %s", field.Name)
		}
	}
}

// TestSameDomain has lists of the same servers, and others.
func TestSameDomain(t *testing.T) {
	base := Entry{Domain: "a:1,b:2/prod"}.Fingerprint()
	for _, same := range []string{"a:1, b:2/prod", " b:2 ,a:1,/prod ", "b:2,a:1,b:2/prod"} {
		if got := (Entry{Domain: same}).Fingerprint(); got.Source != base.Source || got.Run == base.Run {
			t.Errorf("%q counts as another source, or as no change", same)
		}
	}
	for _, other := range []string{"a:1,b:2", "a:1,b:2/prod2", "a:1/prod", "a:1,b:3/prod", ""} {
		if got := (Entry{Domain: other}).Fingerprint(); got.Source == base.Source {
			t.Errorf("%q counts as the same source", other)
		}
	}
}

// fill gives a field some value that is not its zero.
func fill(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() { //nolint:exhaustive // what Entry has
	case reflect.String:
		v.SetString("filled")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Uint32:
		v.SetUint(7)
	case reflect.Int64:
		v.SetInt(7)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("k"), reflect.Zero(v.Type().Elem()))
	default:
		t.Fatalf("no value for a %s", v.Kind())
	}
}

func TestSecretIsNotPrinted(t *testing.T) {
	s := Secret("hunter2")
	c := Credentials{"token": s}
	for _, text := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %q", s, c, c, s)} {
		if strings.Contains(text, "hunter2") {
			t.Errorf("printed as %s", text)
		}
	}
	if c.First("none", "token").Reveal() != "hunter2" || c.First("none") != "" {
		t.Error("First does not find the first key that is set")
	}
}

func TestBackoffGrowsToItsBound(t *testing.T) {
	b := Backoff{Min: time.Second, Max: 5 * time.Second}
	for i, want := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second, 5 * time.Second, 5 * time.Second} {
		if got := b.Next(); got > want || got < want*3/4 {
			t.Errorf("pause %d is %v, want at most %v and at least three quarters of it", i, got, want)
		}
	}
	b.Reset()
	if got := b.Next(); got > time.Second {
		t.Errorf("the pause after Reset is %v", got)
	}
}

// said is what a sink was told, in words.
type said []string

func (s *said) Put(v Service)               { *s = append(*s, "put "+v.ID) }
func (s *said) Delete(id string)            { *s = append(*s, "delete "+id) }
func (s *said) Synced(ids []string)         { *s = append(*s, fmt.Sprint("synced ", ids)) }
func (s *said) Fail(err error, _ ...string) { *s = append(*s, "fail "+err.Error()) }

func TestPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var log said
		var calls []time.Duration
		began := time.Now()
		done := make(chan error)
		go func() {
			done <- Poll(ctx, &log, 10*time.Second, 3*time.Second, func(ctx context.Context) ([]Service, error) {
				calls = append(calls, time.Since(began))
				switch len(calls) {
				case 1:
					return []Service{{ID: "a"}, {ID: "b"}}, nil
				case 2:
					<-ctx.Done() // hangs
					return nil, ctx.Err()
				case 3:
					return nil, errors.New("refused")
				default:
					return nil, nil
				}
			})
		}()
		time.Sleep(25 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Poll returned %v", err)
		}
		want := said{"put a", "put b", "synced [a b]", "fail context deadline exceeded", "fail refused", "synced []"}
		if diff := cmp.Diff(want, log[:min(len(log), len(want))]); diff != "" {
			t.Error(diff)
		}
		between := func(i int, lo, hi time.Duration) {
			t.Helper()
			if d := calls[i] - calls[i-1]; d < lo || d > hi {
				t.Errorf("call %d came %v after the one before, want %v to %v", i, d, lo, hi)
			}
		}
		between(1, 9*time.Second, 10*time.Second)
		between(2, 3300*time.Millisecond, 3500*time.Millisecond) // the timeout, and a short pause
		between(3, 750*time.Millisecond, time.Second)
	})
}

func TestBudgetIsSharedByAddress(t *testing.T) {
	var b Budgets
	first, again := b.Of("a:1", 2), b.Of("a:1", 100)
	if first != again || first == b.Of("b:1", 2) {
		t.Error("a budget belongs to an address")
	}
	if !first.TryAcquire(2) || again.TryAcquire(1) {
		t.Error("the budget of 2 did not bound both")
	}
	first.Release(1)
	if err := again.Acquire(t.Context(), 1); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := first.Acquire(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Acquire returned %v", err)
	}
}

func TestLocality(t *testing.T) {
	for want, l := range map[string]Locality{
		"": {}, "r": {Region: "r"}, "r/z": {Region: "r", Zone: "z"}, "r/z/s": {Region: "r", Zone: "z", SubZone: "s"}, "/z": {Zone: "z"},
	} {
		if got := l.String(); got != want {
			t.Errorf("%+v is %q, want %q", l, got, want)
		}
	}
}
