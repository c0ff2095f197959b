package nacos

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/regbridge/regbridge/registry"
)

// pages asks for one page, counted from 1, of the services of a group. It returns how many services the group has.
type pages func(ctx context.Context, group string, page, size int) (names []string, count int, err error)

// listingTries is how often a listing is begun anew that contradicts itself.
const listingTries = 4

// list returns the services of all groups, sorted. known is the last listing. A server makes each page from whatever
// services it has by then, in an order of its own: where a listing needs several pages, a service that is there all the
// time can be on none of them. So one that is known is gone only if two listings in a row do not have it, and the first
// listing is made twice: what was known before, at another server perhaps, is not known here.
func (s *settings) list(ctx context.Context, known []key, read pages) ([]key, error) {
	var all []key
	for _, group := range s.groups {
		names, several, err := s.listGroup(ctx, group, read)
		missing := func(k key) bool { return k.group == group && !names[k.name] }
		if err == nil && several && (known == nil || slices.ContainsFunc(known, missing)) {
			var again map[string]bool
			again, _, err = s.listGroup(ctx, group, read)
			maps.Copy(names, again)
		}
		if err != nil {
			return nil, fmt.Errorf("list the services of group %s in namespace %s: %w", group, s.tenant, err)
		}
		for name := range names {
			if !skipped(name) {
				all = append(all, key{group, name})
			}
		}
	}
	slices.SortFunc(all, key.compare)
	return all, nil
}

// listGroup reads all pages of one group, until they agree with each other. several says that there was more than one.
func (s *settings) listGroup(ctx context.Context, group string, read pages) (names map[string]bool, several bool, err error) {
	for try := 0; ; try++ {
		names, several, err = s.readPages(ctx, group, read)
		if !errors.Is(err, errContradiction) || try+1 == listingTries {
			return names, several, err
		}
		if err := registry.Sleep(ctx, registry.Jitter(time.Duration(try+1)*100*time.Millisecond)); err != nil {
			return nil, false, err
		}
	}
}

var errContradiction = errors.New("the listing contradicts itself")

func (s *settings) readPages(ctx context.Context, group string, read pages) (names map[string]bool, several bool, err error) {
	names = map[string]bool{}
	total := 0 // names on all pages, with repetitions
	for page := 1; ; page++ {
		some, count, err := read(ctx, group, page, s.pageSize)
		if err != nil {
			return nil, false, err
		}
		for _, name := range some {
			names[strings.TrimPrefix(name, group+"@@")] = true
		}
		total += len(some)
		switch {
		case total < count && len(some) > 0 && len(names) == total:
			continue
		case total != count || len(names) != total:
			return nil, false, fmt.Errorf("%w: %d names, %d different ones, and it says %d", errContradiction, total, len(names), count)
		}
		return names, page > 1, nil
	}
}
