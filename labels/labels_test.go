package labels

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSetKeepsWhatItWasGiven(t *testing.T) {
	for name, in := range map[string]map[string]string{
		"nil":         nil,
		"one":         {"version": "v1"},
		"empty parts": {"": "", "a": ""},
		"long":        {strings.Repeat("k", 300): strings.Repeat("v", 70000), "z": "ü\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			s := FromMap(in)
			if diff := cmp.Diff(maps.Clone(in), s.Map(), cmp.Comparer(func(a, b map[string]string) bool { return maps.Equal(a, b) })); diff != "" {
				t.Error(diff)
			}
			if s.Len() != len(in) {
				t.Errorf("Len = %d, want %d", s.Len(), len(in))
			}
		})
	}
}

func TestEqualSetsCompareEqual(t *testing.T) {
	a, b := FromMap(map[string]string{"a": "1", "b": "2"}), FromMap(map[string]string{"b": "2", "a": "1"})
	if a != b {
		t.Error("sets of the same pairs differ")
	}
	if a == FromMap(map[string]string{"a": "1b", "b": "2"}) || FromMap(nil) != (Set{}) {
		t.Error("sets of different pairs are equal, or the empty set is not the zero Set")
	}
	if v, ok := a.Get("b"); v != "2" || !ok {
		t.Errorf("Get(b) = %q, %v", v, ok)
	}
	if _, ok := a.Get("c"); ok {
		t.Error("Get found a key that is not there")
	}
}

func FuzzSetRoundTrip(f *testing.F) {
	f.Add("k", "v", "k2", "")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		in := map[string]string{k1: v1, k2: v2}
		s := FromMap(in)
		if !maps.Equal(in, s.Map()) {
			t.Fatalf("%q became %q", in, s.Map())
		}
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back Set
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
	})
}
