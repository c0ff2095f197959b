// Package labels holds the immutable label set that instances and endpoints carry: the metadata of a registry's instance.
//
// A million endpoints usually share a few thousand distinct sets, so equal sets share one piece of memory. The package
// knows nothing of registries nor of the mesh; both sides use it.
package labels

import (
	"encoding/binary"
	"encoding/json"
	"iter"
	"maps"
	"slices"
	"unique"
)

// Set is an immutable set of key-value pairs, sorted by key. The zero Set is empty. Sets are comparable with ==, and
// equal sets share their memory.
type Set struct {
	// enc holds, in key order, uvarint(len(key)) key uvarint(len(value)) value.
	enc unique.Handle[string]
}

// FromMap makes a Set of m, which stays the caller's.
func FromMap(m map[string]string) Set {
	if len(m) == 0 {
		return Set{}
	}
	size := 0
	for k, v := range m {
		size += len(k) + len(v) + 4
	}
	buf := make([]byte, 0, size)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		buf = appendString(buf, k)
		buf = appendString(buf, m[k])
	}
	return Set{enc: unique.Make(string(buf))}
}

func appendString(buf []byte, s string) []byte {
	buf = binary.AppendUvarint(buf, uint64(len(s)))
	return append(buf, s...)
}

func (s Set) encoded() string {
	if s == (Set{}) {
		return ""
	}
	return s.enc.Value()
}

// Encoded returns a canonical form: two sets are equal if and only if their encodings are.
func (s Set) Encoded() string { return s.encoded() }

// All yields the pairs in key order. The strings share the set's memory.
func (s Set) All() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		rest := s.encoded()
		for rest != "" {
			var k, v string
			k, rest = cutString(rest)
			v, rest = cutString(rest)
			if !yield(k, v) {
				return
			}
		}
	}
}

// cutString reads one length-prefixed string. The length is at most ten bytes, and the encoding is our own, so it is valid.
func cutString(s string) (value, rest string) {
	var head [binary.MaxVarintLen64]byte
	n, w := binary.Uvarint(head[:copy(head[:], s)])
	end := w + int(n)
	return s[w:end], s[end:]
}

// Get returns the value of key, and whether the set has it.
func (s Set) Get(key string) (string, bool) {
	for k, v := range s.All() {
		if k == key {
			return v, true
		}
	}
	return "", false
}

// Len returns the number of pairs.
func (s Set) Len() int {
	n := 0
	for range s.All() {
		n++
	}
	return n
}

// Map returns the pairs as a new map, which is the caller's; nil for the empty set.
func (s Set) Map() map[string]string {
	if s == (Set{}) {
		return nil
	}
	return maps.Collect(s.All())
}

// MarshalJSON writes the set as an object.
func (s Set) MarshalJSON() ([]byte, error) {
	m := s.Map()
	if m == nil {
		m = map[string]string{}
	}
	return json.Marshal(m)
}

// UnmarshalJSON reads an object of strings.
func (s *Set) UnmarshalJSON(b []byte) error {
	var m map[string]string
	if err := json.Unmarshal(b, &m); err != nil {
		return err
	}
	*s = FromMap(m)
	return nil
}
