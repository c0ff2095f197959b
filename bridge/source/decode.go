package source

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

const (
	// maxProblems bounds the problems that are kept of one file.
	maxProblems = 1000
	// maxAliased bounds the nodes of a file that are read through aliases, which can multiply without bound.
	maxAliased = 20_000
	// maxMerges bounds merge keys in merged mappings.
	maxMerges = 20
)

// What becomes of a field that the type does not have.
type unknownFields int

const (
	// Any such field is a problem: a warning, an error where the reading is strict. But a near miss is always an error,
	// since what was meant is missing then.
	refuseNearMiss unknownFields = iota
	// Any such field is a problem, near miss or not.
	reportUnknown
	// Such fields are of no interest.
	ignoreUnknown
)

// A node is a field that is decoded later.
type node struct{ *yaml.Node }

// A decoder reads YAML nodes into Go values as Kubernetes does: the names of fields are those of the json tags, exactly;
// nothing is converted. It does not stop at an error: what is bad is left out of the value and reported with its place.
type decoder struct {
	file   string
	strict bool
	// line is added to the lines of nodes.
	line    int
	unknown unknownFields
	// secretive says that no value may be repeated in a problem.
	secretive bool
	// fields, if not nil, gets the position of each field that is read, by its path without base.
	fields map[string]bridge.Position
	base   string

	problems []bridge.Problem
	// errors counts the problems that make a value unusable, which unknown fields do not.
	errors int
	// budget is how many nodes may still be visited.
	budget int
	byType map[reflect.Type]map[string]int
}

func newDecoder(file string, data []byte, strict bool) *decoder {
	// A file has no more nodes than bytes, and none is visited more than twice but for aliases.
	return &decoder{
		file: file, strict: strict, budget: 2*len(data) + maxAliased,
		byType: map[reflect.Type]map[string]int{},
	}
}

// fail reports what makes the value unusable.
func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	d.errors++
	d.add(n, path, false, format, args...)
}

func (d *decoder) add(n *yaml.Node, path string, warning bool, format string, args ...any) {
	p := bridge.Problem{File: d.file, Path: path, Message: fmt.Sprintf(format, args...), Warning: warning}
	if n != nil {
		p.Line = d.line + n.Line
	}
	if len(d.problems) < maxProblems && (len(d.problems) == 0 || d.problems[len(d.problems)-1] != p) {
		d.problems = append(d.problems, p)
	}
}

// resolve follows an alias and counts the visit. It returns nil where the file is refused for the number of visits.
func (d *decoder) resolve(n *yaml.Node, path string) *yaml.Node {
	if d.budget--; d.budget < 0 {
		if d.budget == -1 {
			d.fail(n, path, "the aliases (*) of this file multiply without measure: write the text out")
		}
		return nil
	}
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// A pair is one key of a mapping with its value.
type pair struct {
	key  string
	at   *yaml.Node
	data *yaml.Node
}

// pairs returns the keys of a mapping, those of merged mappings (<<) after its own. Of a key that is there twice the
// first one is returned.
func (d *decoder) pairs(n *yaml.Node, path string, merges int) []pair {
	var out []pair
	var merged []*yaml.Node
	lines := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := d.resolve(n.Content[i], path)
		switch {
		case key == nil:
			return out
		case key.Kind != yaml.ScalarNode:
			d.fail(n.Content[i], path, "the name of a field must be a text")
		case key.ShortTag() == "!!merge":
			merged = append(merged, n.Content[i+1])
		case lines[key.Value] != 0:
			d.fail(n.Content[i], join(path, key.Value), "this field is there twice, first on line %d: delete one of them",
				lines[key.Value])
		default:
			lines[key.Value] = d.line + n.Content[i].Line
			out = append(out, pair{key.Value, n.Content[i], n.Content[i+1]})
		}
	}
	for len(merged) > 0 {
		m := d.resolve(merged[0], path)
		switch {
		case m == nil:
			return out
		case m.Kind == yaml.SequenceNode && merges < maxMerges:
			merged = slices.Concat(m.Content, merged[1:])
			merges++
			continue
		case m.Kind != yaml.MappingNode || merges >= maxMerges:
			d.fail(merged[0], path, "<< must name a mapping, or a list of mappings, nested at most %d deep", maxMerges)
			return out
		}
		for _, p := range d.pairs(m, path, merges+1) {
			if lines[p.key] == 0 {
				lines[p.key] = d.line + p.at.Line
				out = append(out, p)
			}
		}
		merged = merged[1:]
	}
	return out
}

// join appends a key to a path. One that would not read as a name is written in brackets.
func join(path, key string) string {
	switch {
	case key == "" || strings.ContainsAny(key, ".[]\" \t\r\n"):
		return path + "[" + strconv.Quote(key) + "]"
	case path == "":
		return key
	default:
		return path + "." + key
	}
}

// under appends a path to a path.
func under(path, rest string) string {
	if path == "" {
		return rest
	}
	return path + "." + rest
}

func (d *decoder) record(n, data *yaml.Node, path string) {
	if d.fields == nil || isNull(data) {
		return
	}
	d.fields[strings.TrimPrefix(strings.TrimPrefix(path, d.base), ".")] = bridge.Position{File: d.file, Line: d.line + n.Line}
}

// value reads n into v, which can be set. A null leaves it as it is.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string) {
	if at, ok := reflect.TypeAssert[*node](v.Addr()); ok {
		at.Node = n
		return
	}
	at := n
	n = d.resolve(n, path)
	if n == nil || isNull(n) || v.Kind() == reflect.Interface {
		return
	}
	secret := d.secretive || v.Type() == reflect.TypeFor[registry.Secret]()
	wrong := func(want string) { d.fail(at, path, "want %s, have %s", want, describe(n, secret)) }
	if u, ok := reflect.TypeAssert[json.Unmarshaler](v.Addr()); ok {
		text, ok := scalarJSON(n)
		if !ok {
			wrong("a duration such as 30s")
		} else if err := u.UnmarshalJSON(text); err != nil {
			d.fail(at, path, "%v", err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		e := reflect.New(v.Type().Elem())
		d.value(n, e.Elem(), path)
		v.Set(e)
	case reflect.String:
		switch {
		case n.Kind != yaml.ScalarNode:
			wrong("a text")
		case n.ShortTag() == "!!str" || n.ShortTag() == "!!timestamp":
			v.SetString(n.Value)
		default:
			wrong("a text (write it in quotes)")
		}
	case reflect.Bool:
		var b bool
		if n.Kind != yaml.ScalarNode || n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle) != 0 || n.Decode(&b) != nil {
			wrong("true or false")
			return
		}
		v.SetBool(b)
	case reflect.Uint32: // every number of this type is a port
		if i, ok := integer(n); ok && i >= 0 && i <= math.MaxUint16 {
			v.SetUint(uint64(i))
		} else {
			wrong("a port from 0 to 65535")
		}
	case reflect.Int64:
		if i, ok := integer(n); ok {
			v.SetInt(i)
		} else {
			wrong("a whole number")
		}
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			wrong("a list")
			return
		}
		list := reflect.MakeSlice(v.Type(), 0, 0)
		for i, c := range n.Content {
			if d.budget < 0 {
				return
			}
			p := path + "[" + strconv.Itoa(i) + "]"
			d.record(c, c, p)
			e := reflect.New(v.Type().Elem()).Elem()
			d.value(c, e, p)
			list = reflect.Append(list, e)
		}
		v.Set(list)
	case reflect.Map:
		if n.Kind != yaml.MappingNode {
			wrong("a mapping")
			return
		}
		m := reflect.MakeMap(v.Type())
		for _, p := range d.pairs(n, path, 0) {
			e := reflect.New(v.Type().Elem()).Elem()
			d.record(p.at, p.data, join(path, p.key))
			d.value(p.data, e, join(path, p.key))
			m.SetMapIndex(reflect.ValueOf(p.key), e)
		}
		v.Set(m)
	case reflect.Struct:
		if n.Kind != yaml.MappingNode {
			wrong("a mapping of fields")
			return
		}
		names := d.names(v.Type())
		for _, p := range d.pairs(n, path, 0) {
			to := join(path, p.key)
			i, ok := names[p.key]
			if !ok {
				d.strange(p, to, names)
				continue
			}
			d.record(p.at, p.data, to)
			d.value(p.data, v.Field(i), to)
		}
	default:
		panic("source: cannot decode into a " + v.Type().String()) // a field of ours, found by the first test
	}
}

// strange reports a field that the type does not have.
func (d *decoder) strange(p pair, path string, names map[string]int) {
	if d.unknown == ignoreUnknown {
		return
	}
	near := nearest(p.key, names)
	switch {
	case near == "":
		d.add(p.at, path, !d.strict, "there is no field %q here: it has no effect, delete it", p.key)
	case d.unknown == refuseNearMiss:
		d.fail(p.at, path, "there is no field %q here: write %q", p.key, near)
	default:
		d.add(p.at, path, !d.strict, "there is no field %q here, and it has no effect: write %q", p.key, near)
	}
}

// names returns the fields of a struct by their JSON names.
func (d *decoder) names(t reflect.Type) map[string]int {
	if d.byType[t] == nil {
		d.byType[t] = map[string]int{}
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			d.byType[t][name] = i
		}
	}
	return d.byType[t]
}

// nearest returns the name that was probably meant by key, empty if there is none.
func nearest(key string, names map[string]int) string {
	best, bestDistance := "", min(2, len(key)/3)+1
	if len(key) >= len("registry") { // for registries
		bestDistance = 4
	}
	for name := range names {
		dist := math.MaxInt
		if strings.EqualFold(name, key) {
			dist = 0
		} else if len(key) < 100 {
			dist = distance(strings.ToLower(name), strings.ToLower(key))
		}
		if dist < bestDistance || dist == bestDistance && best != "" && name > best {
			best, bestDistance = name, dist
		}
	}
	return best
}

// distance is the number of characters to add, remove, replace or swap with their neighbour to make a of b.
func distance(a, b string) int {
	var two, one []int // the rows before
	for i := range len(a) + 1 {
		row := make([]int, len(b)+1)
		for j := range row {
			switch {
			case i == 0 || j == 0:
				row[j] = i + j
			case a[i-1] == b[j-1]:
				row[j] = one[j-1]
			default:
				row[j] = 1 + min(one[j-1], one[j], row[j-1])
			}
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], two[j-2]+1)
			}
		}
		two, one = one, row
	}
	return one[len(b)]
}

// describe tells what is there instead of what should be.
func describe(n *yaml.Node, secret bool) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	what := map[string]string{
		"!!str": "the text", "!!int": "the number", "!!float": "the number", "!!bool": "the truth value",
		"!!timestamp": "the date",
	}[n.ShortTag()]
	if what == "" {
		what = "a value with a tag (!)" // the tag may be the beginning of a password that wants quotes
	} else if !secret {
		what += " " + strconv.Quote(shorten(n.Value))
	}
	return what
}

func shorten(s string) string {
	if r := []rune(s); len(r) > 40 {
		return string(r[:40]) + "..."
	}
	return s
}

// integer reads a whole number, also where it is written as 3e10 or 80.0, which reach Kubernetes as whole numbers too.
func integer(n *yaml.Node) (int64, bool) {
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" && n.ShortTag() != "!!float" {
		return 0, false
	}
	var x any
	if n.Decode(&x) != nil {
		return 0, false
	}
	switch x := x.(type) {
	case int:
		return int64(x), true
	case int64:
		return x, true
	case float64:
		if x == math.Trunc(x) && math.Abs(x) < 1<<62 {
			return int64(x), true
		}
	}
	return 0, false
}

// scalarJSON returns a text or number as JSON.
func scalarJSON(n *yaml.Node) ([]byte, bool) {
	if n.Kind != yaml.ScalarNode {
		return nil, false
	}
	var x any = n.Value
	switch n.ShortTag() {
	case "!!str":
	case "!!int", "!!float":
		if n.Decode(&x) != nil {
			return nil, false
		}
	default:
		return nil, false
	}
	text, err := json.Marshal(x)
	return text, err == nil
}
