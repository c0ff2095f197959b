package nacos

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/regbridge/regbridge/registry/registrytest"
)

// book answers requests for pages. Each listing, which begins with page 1, has the next of the editions; the last one stays.
type book struct {
	editions [][]string
	listings int
	pages    int
	count    func(edition []string) int // nil: as many as there are
	fails    map[int]error              // by number of the request
}

func (b *book) read(_ context.Context, group string, page, size int) ([]string, int, error) {
	b.pages++
	if page == 1 {
		b.listings++
	}
	if err := b.fails[b.pages]; err != nil {
		return nil, 0, err
	}
	edition := b.editions[min(b.listings, len(b.editions))-1]
	count := len(edition)
	if b.count != nil {
		count = b.count(edition)
	}
	var out []string
	for _, name := range pageOf(edition, page, size) {
		if name == "full" { // 1.x gives names with or without their group
			name = group + "@@full"
		}
		out = append(out, name)
	}
	return out, count, nil
}

func keysOf(names ...string) []key {
	var out []key
	for _, name := range names {
		out = append(out, key{"G", name})
	}
	return out
}

func TestListing(t *testing.T) {
	for name, c := range map[string]struct {
		known    []string // nil: this is the first listing
		editions [][]string
		count    func([]string) int
		fails    map[int]error
		want     []string
		listings int
		err      string
	}{
		"one page": {
			editions: [][]string{{"b", "a"}}, want: []string{"a", "b"}, listings: 1,
		},
		"nothing": {
			known: []string{"a"}, editions: [][]string{{}}, want: nil, listings: 1,
		},
		"names with their group, and names that are none": {
			editions: [][]string{{"full", "", "consumers:x"}}, want: []string{"full"}, listings: 2,
		},
		"one page, one is gone": {
			known: []string{"a", "b"}, editions: [][]string{{"a"}}, want: []string{"a"}, listings: 1,
		},
		"several pages, first": {
			editions: [][]string{{"a", "b", "c", "d"}, {"b", "c", "d", "e"}}, want: []string{"a", "b", "c", "d", "e"}, listings: 2,
		},
		"several pages, nothing is gone": {
			known: []string{"a", "b", "c"}, editions: [][]string{{"d", "c", "b", "a"}}, want: []string{"a", "b", "c", "d"}, listings: 1,
		},
		"several pages, missing once": {
			known: []string{"a", "b", "c", "d"}, editions: [][]string{{"a", "b", "c", "x"}, {"a", "b", "c", "d"}},
			want: []string{"a", "b", "c", "d", "x"}, listings: 2,
		},
		"several pages, missing twice": {
			known: []string{"a", "b", "c", "d"}, editions: [][]string{{"a", "b", "c"}}, want: []string{"a", "b", "c"}, listings: 2,
		},
		"several pages, the second listing fails": {
			known: []string{"a", "b", "c", "d"}, editions: [][]string{{"a", "b", "c"}}, fails: map[int]error{4: errors.New("boom")},
			err: "boom", listings: 2,
		},
		"a page fails": {
			editions: [][]string{{"a", "b", "c"}}, fails: map[int]error{2: errors.New("boom")}, err: "boom", listings: 1,
		},
		"contradicts itself once": {
			editions: [][]string{{"a", "b", "a"}, {"a", "b"}}, want: []string{"a", "b"}, listings: 2,
		},
		"a name on two pages, always": {
			known: []string{"a", "b"}, editions: [][]string{{"a", "b", "a"}}, err: "contradicts itself", listings: listingTries,
		},
		"a name twice on one page": {
			editions: [][]string{{"a", "a"}}, err: "contradicts itself", listings: listingTries,
		},
		"fewer than it says": {
			editions: [][]string{{"a", "b", "c"}}, count: func(e []string) int { return len(e) + 1 }, err: "contradicts itself", listings: listingTries,
		},
		"more than it says": {
			editions: [][]string{{"a", "b"}}, count: func([]string) int { return 1 }, err: "contradicts itself", listings: listingTries,
		},
		"says that there is nothing": {
			editions: [][]string{{"a"}}, count: func([]string) int { return 0 }, err: "contradicts itself", listings: listingTries,
		},
		"says that there is less than nothing": {
			editions: [][]string{{}}, count: func([]string) int { return -1 }, err: "contradicts itself", listings: listingTries,
		},
		"endless": {
			editions: [][]string{slices.Repeat([]string{"a"}, 1000)}, count: func([]string) int { return 1 << 30 }, err: "contradicts itself",
			listings: listingTries,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &book{editions: c.editions, count: c.count, fails: c.fails}
				s := &settings{groups: []string{"G"}, tenant: "public", pageSize: 2}
				known := keysOf(c.known...)
				got, err := s.list(t.Context(), known, b.read)
				if c.err != "" {
					if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), "group G in namespace public") {
						t.Errorf("got %v, %v", got, err)
					}
				} else if err != nil {
					t.Fatal(err)
				}
				if want := keysOf(c.want...); c.err == "" && !slices.Equal(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
				if b.listings != c.listings {
					t.Errorf("%d listings, not %d", b.listings, c.listings)
				}
				if b.pages > 20 {
					t.Errorf("%d pages", b.pages)
				}
			})
		})
	}
}

func TestListingOfGroups(t *testing.T) {
	s := &settings{groups: []string{"A", "B"}, tenant: "public", pageSize: 2}
	asked := map[string]int{}
	got, err := s.list(t.Context(), nil, func(_ context.Context, group string, _, _ int) ([]string, int, error) {
		asked[group]++
		return []string{"same"}, 1, nil
	})
	if want := []key{{"A", "same"}, {"B", "same"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	// One that fails is not an empty one.
	_, err = s.list(t.Context(), got, func(_ context.Context, group string, _, _ int) ([]string, int, error) {
		if group == "B" {
			return nil, 0, errors.New("boom")
		}
		return []string{"same"}, 1, nil
	})
	if err == nil || !strings.Contains(err.Error(), "group B") {
		t.Errorf("got %v", err)
	}
	if asked["A"] != 1 || asked["B"] != 1 {
		t.Errorf("asked %v", asked)
	}
}

func TestListingEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		b := &book{editions: [][]string{{"a", "a"}}}
		s := &settings{groups: []string{"G"}, pageSize: 2}
		if _, err := s.list(ctx, nil, b.read); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// TestPages is against a server that gives its pages in orders of their own.
func TestPages(t *testing.T) {
	t.Parallel()
	f := newHTTPFake(t)
	f.fill(25)
	r := runHTTP(t, f.entry(), f.env(), func(s *settings) { s.pageSize = 10 })
	if s := r.loaded(); len(s.Services) != 25 {
		t.Fatalf("%d services", len(s.Services))
	}
	listings := func() int {
		n := 0
		for _, q := range f.seen {
			if q.path == listPath && q.size == "10" {
				n++
			}
		}
		return n
	}
	const hidden = "service-0003"
	set := func(listing func(n int, names []string) []string) {
		f.edit(func() {
			n := 0
			f.listing = func(_ string, page, size int, names []string) ([]string, int) {
				if size != 1 && page == 1 {
					n++
				}
				names = listing(n, names)
				return pageOf(names, page, size), len(names)
			}
		})
	}
	without := func(names []string) []string {
		return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == hidden })
	}
	n := len(r.State().Events)
	set(func(n int, names []string) []string { // every other listing
		if n%2 == 1 {
			return without(names)
		}
		return names
	})
	s := r.wait("five more listings", func(s registrytest.State) bool { return since(s, n, registrytest.Synced) >= 5 })
	unchanged(t, s, n, "missing on one of two listings")

	set(func(_ int, names []string) []string { return append(names[:len(names)-1:len(names)-1], names[0]) })
	s = r.wait("a gap", func(s registrytest.State) bool { return s.Gap != nil })
	unchanged(t, s, n, "contradictory pages")
	if !strings.Contains(s.Gap.Error(), "contradicts itself: ") {
		t.Errorf("the gap is %v", s.Gap)
	}
	before := 0
	f.edit(func() { before = listings() })
	set(func(_ int, names []string) []string { return names })
	s = r.wait("the end of the gap", func(s registrytest.State) bool { return s.Gap == nil })
	unchanged(t, s, n, "after contradictory pages")
	f.edit(func() {
		if listings() < before+6 {
			t.Error("the first listing after a gap was made once only")
		}
	})

	n = len(s.Events)
	set(func(_ int, names []string) []string { return without(names) })
	s = r.wait("the service to go", func(s registrytest.State) bool { return len(s.Services) == 24 })
	if since(s, n, registrytest.Fail) > 0 {
		t.Errorf("a gap: %v", s.Gap)
	}
	if got := fmt.Sprint(known(s)); strings.Contains(got, hidden) {
		t.Errorf("left are %s", got)
	}
}

var _ pages = (*book)(nil).read
