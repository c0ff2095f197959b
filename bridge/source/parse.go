package source

import (
	"errors"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
)

// The API groups of McpBridge. Both mean the same.
const (
	GroupHigress = "networking.higress.io"
	GroupMCP     = "mcp.higress.io"
)

const (
	kind             = "McpBridge"
	listKind         = "McpBridgeList"
	defaultNamespace = "default"
)

// apiGroup is an API group with the version in it that has McpBridge.
type apiGroup struct{ apiVersion, group string }

// apiGroups gives the API groups in the order of precedence.
func apiGroups() []apiGroup {
	return []apiGroup{{GroupHigress + "/v1", GroupHigress}, {GroupMCP + "/v1alpha1", GroupMCP}}
}

// A Document is one McpBridge. It is a value: once parsed it is never written.
type Document struct {
	// File and Line tell where it begins.
	File string
	Line int
	// Group is GroupHigress or GroupMCP.
	Group string
	// Namespace and Name identify the McpBridge.
	Namespace, Name string
	// Annotations are those of the metadata.
	Annotations map[string]string
	// Items are the elements of spec.registries that can be identified by type and name, in their order.
	Items []Item
	// Proxies are the elements of spec.proxies.
	Proxies []Proxy

	// nameless counts the elements of spec.registries that have no type or name.
	nameless int
	// invalid says that the document is not to be used.
	invalid bool
}

// An Item is one element of spec.registries.
type Item struct {
	// Path is its place in the document: "spec.registries[2]".
	Path  string
	Entry registry.Entry
	// Fields tells where the fields that are set are written, by their path within the entry; "" is the entry itself.
	Fields map[string]bridge.Position
	// Err is why the entry cannot be used; nil if it can.
	Err error
}

// A Proxy is one element of spec.proxies.
type Proxy struct {
	// Type is the kind of proxy; only "http" has a meaning.
	Type string `json:"type"`
	// Name is what proxyName of an entry refers to.
	Name string `json:"name"`
	// ServerAddress is the proxy's IP address or host name, ServerPort its port.
	ServerAddress string `json:"serverAddress"`
	ServerPort    uint32 `json:"serverPort"`
	// ListenerPort is the port on the gateway's loopback that leads to the proxy.
	ListenerPort uint32 `json:"listenerPort,omitempty"`
	// ConnectTimeout is in milliseconds.
	ConnectTimeout int64 `json:"connectTimeout,omitempty"`
}

// object is a McpBridge with all that Kubernetes adds to it.
type object struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   metadata `json:"metadata"`
	Spec       spec     `json:"spec"`
	Status     any      `json:"status"`
}

type metadata struct {
	Name        string            `json:"name"`
	Namespace   string            `json:"namespace"`
	Annotations map[string]string `json:"annotations"`

	ClusterName                any `json:"clusterName"`
	CreationTimestamp          any `json:"creationTimestamp"`
	DeletionGracePeriodSeconds any `json:"deletionGracePeriodSeconds"`
	DeletionTimestamp          any `json:"deletionTimestamp"`
	Finalizers                 any `json:"finalizers"`
	GenerateName               any `json:"generateName"`
	Generation                 any `json:"generation"`
	Labels                     any `json:"labels"`
	ManagedFields              any `json:"managedFields"`
	OwnerReferences            any `json:"ownerReferences"`
	ResourceVersion            any `json:"resourceVersion"`
	SelfLink                   any `json:"selfLink"`
	UID                        any `json:"uid"`
}

type spec struct {
	Registries node `json:"registries"`
	Proxies    node `json:"proxies"`
}

// Parse reads the McpBridges in a YAML or JSON file, which may hold several documents, and lists of them. Objects of
// other kinds are passed over. What is wrong in one entry harms that entry alone (Item.Err); a document that is wrong
// outside of its entries is left out. Unknown fields are problems, warnings unless strict is set.
func Parse(file string, data []byte, strict bool) ([]Document, []bridge.Problem) {
	p := parse(file, data, strict)
	return slices.DeleteFunc(p.docs, func(d Document) bool { return d.invalid }), p.problems
}

// parsed is all that was found in a file.
type parsed struct {
	// docs has the invalid ones too.
	docs     []Document
	problems []bridge.Problem
	// broken, if not empty, tells of a document that is, or may be, a McpBridge and cannot be used: which ones the file
	// defines is not known then.
	broken string
	// nameless, if not empty, tells of an entry without type or name: which one it is is not known then.
	nameless string
	// vague, if not empty, tells of a document that says nothing of what it is. What is left of a file that was cut off
	// can look so, but files that have nothing to do with us too.
	vague string
}

func parse(file string, data []byte, strict bool) parsed {
	p := parser{decoder: newDecoder(file, data, strict)}
	documents(file, data, func(root *yaml.Node, line int) {
		p.line = line
		if root.Kind == yaml.DocumentNode && len(root.Content) > 0 {
			p.document(root.Content[0], "", false)
		}
	}, func(e syntaxError) {
		p.line = e.line
		p.fail(&yaml.Node{}, "", "this is no valid YAML, here or a little below: %s", e.text)
		p.setBroken()
	})
	p.out.problems = p.problems
	slices.SortStableFunc(p.out.problems, func(a, b bridge.Problem) int { return a.Line - b.Line })
	return p.out
}

type parser struct {
	*decoder
	out parsed
}

// setBroken notes the last problem as the reason why a document cannot be used.
func (p *parser) setBroken() {
	if p.out.broken == "" {
		p.out.broken = p.file + ": too many problems"
		for _, problem := range slices.Backward(p.problems) {
			if !problem.Warning && len(p.problems) < maxProblems {
				p.out.broken = Text(problem)
				break
			}
		}
	}
}

// Text gives a problem in one line: "bridge.yaml:12: spec.registries[0].port: want ...".
func Text(p bridge.Problem) string {
	text := p.Message
	if p.Path != "" {
		text = p.Path + ": " + text
	}
	switch {
	case p.File != "" && p.Line != 0:
		return p.File + ":" + strconv.Itoa(p.Line) + ": " + text
	case p.File != "":
		return p.File + ": " + text
	}
	return text
}

// document reads one document, or one item of a list.
func (p *parser) document(at *yaml.Node, path string, item bool) {
	n := p.resolve(at, path)
	if n == nil || isNull(n) {
		return
	}
	if n.Kind != yaml.MappingNode {
		p.add(at, path, !p.strict, "this is no Kubernetes object, and is passed over")
		p.out.vague = Text(bridge.Problem{File: p.file, Line: p.line + at.Line, Message: "no Kubernetes object"})
		return
	}
	apiVersion, have := field(n, "apiVersion").Value, field(n, "kind").Value
	group, known := "", false
	groups := apiGroups()
	for _, g := range groups {
		if apiVersion == g.apiVersion {
			group, known = g.group, true
		}
	}
	ours := known || strings.HasPrefix(apiVersion, GroupHigress+"/") || strings.HasPrefix(apiVersion, GroupMCP+"/")
	switch {
	case have == "" && !ours && field(field(n, "spec"), "registries").Kind == 0:
		p.add(at, path, !p.strict, "this is no Kubernetes object, since it has no kind, and is passed over")
		p.out.vague = Text(bridge.Problem{File: p.file, Line: p.line + at.Line, Message: "no kind"})
	case have == "":
		p.fail(at, join(path, "kind"), "this looks like a McpBridge: add kind: McpBridge and apiVersion: %s", groups[0].apiVersion)
		p.setBroken()
	case have == "List" && apiVersion == "v1" && !item, have == listKind && known && !item:
		p.list(n, path)
	case have == kind && known:
		p.bridge(at, n, path, group)
	case have == kind:
		p.fail(field(n, "apiVersion", at), join(path, "apiVersion"), "McpBridge has no version %q: write %s or %s",
			shorten(apiVersion), groups[0].apiVersion, groups[1].apiVersion)
		p.setBroken()
	case have == listKind && !item:
		p.fail(field(n, "apiVersion", at), join(path, "apiVersion"), "McpBridgeList has no version %q: write %s or %s",
			shorten(apiVersion), groups[0].apiVersion, groups[1].apiVersion)
		p.setBroken()
	case ours && nearest(have, map[string]int{kind: 0, listKind: 0}) != "", strings.EqualFold(have, kind):
		p.fail(field(n, "kind", at), join(path, "kind"), "there is no kind %q: write %q", have,
			nearest(have, map[string]int{kind: 0, listKind: 0}))
		p.setBroken()
	}
}

// field returns the value of a mapping's own field. Where there is none it returns the first of otherwise, or else a
// node of no kind.
func field(n *yaml.Node, name string, otherwise ...*yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind == yaml.MappingNode {
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value != name {
				continue
			}
			if n.Content[i+1].Kind == yaml.AliasNode {
				return n.Content[i+1].Alias
			}
			return n.Content[i+1]
		}
	}
	if len(otherwise) > 0 {
		return otherwise[0]
	}
	return &yaml.Node{}
}

func (p *parser) list(n *yaml.Node, path string) {
	items := field(n, "items")
	if items.Kind != yaml.SequenceNode {
		if items.Kind != 0 && !isNull(items) {
			p.fail(items, join(path, "items"), "want a list, have %s", describe(items, false))
			p.setBroken()
		}
		return
	}
	for i, item := range items.Content {
		if p.budget < 0 {
			return
		}
		p.document(item, join(path, "items")+"["+strconv.Itoa(i)+"]", true)
	}
}

var (
	// What Kubernetes accepts as the name of an object, and of a namespace.
	objectName    = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
)

func (p *parser) bridge(at, n *yaml.Node, path, group string) {
	failed := p.errors
	p.unknown, p.fields = refuseNearMiss, nil
	var o object
	p.value(n, reflect.ValueOf(&o).Elem(), path)

	meta := field(n, "metadata", at)
	doc := Document{
		File: p.file, Line: p.line + at.Line, Group: group,
		Namespace: o.Metadata.Namespace, Name: o.Metadata.Name, Annotations: o.Metadata.Annotations,
	}
	if doc.Namespace == "" {
		doc.Namespace = defaultNamespace
	}
	if p.errors == failed { // else the name may be there, and be reported
		switch {
		case doc.Name == "":
			p.fail(meta, under(path, "metadata.name"), "the McpBridge has no name")
		case len(doc.Name) > 253 || !objectName.MatchString(doc.Name):
			p.fail(field(meta, "name", meta), under(path, "metadata.name"),
				"%q is no name for an object: use lower case letters, digits, hyphens and dots", shorten(doc.Name))
		case len(doc.Namespace) > 63 || !namespaceName.MatchString(doc.Namespace):
			p.fail(field(meta, "namespace", meta), under(path, "metadata.namespace"),
				"%q is no name for a namespace: use lower case letters, digits and hyphens", shorten(doc.Namespace))
		}
	}
	registries := p.elements(o.Spec.Registries, path, "spec.registries")
	proxies := p.elements(o.Spec.Proxies, path, "spec.proxies")
	if registries == nil && p.errors == failed { // cut off or misspelled: nobody removes all registries that way
		where := field(n, "spec", at)
		p.fail(field(where, "registries", where), under(path, "spec.registries"),
			"there is no list of registries: write `registries: []` if no registry is meant")
	}
	if doc.invalid = p.errors != failed; doc.invalid {
		p.setBroken()
	}

	p.unknown = reportUnknown
	for i, r := range registries {
		if p.budget < 0 {
			break
		}
		p.item(&doc, r, under(path, "spec.registries")+"["+strconv.Itoa(i)+"]")
	}
	for i, r := range proxies {
		var proxy Proxy
		p.value(r, reflect.ValueOf(&proxy).Elem(), under(path, "spec.proxies")+"["+strconv.Itoa(i)+"]")
		doc.Proxies = append(doc.Proxies, proxy)
	}
	if p.budget < 0 && !doc.invalid {
		doc.invalid = true
		p.setBroken()
	}
	p.out.docs = append(p.out.docs, doc)
}

// elements returns the elements of a list that are decoded one by one; nil if there is no list.
func (p *parser) elements(n node, path, name string) []*yaml.Node {
	if n.Node == nil {
		return nil
	}
	list := p.resolve(n.Node, under(path, name))
	switch {
	case list == nil || isNull(list):
		return nil
	case list.Kind != yaml.SequenceNode:
		p.fail(n.Node, under(path, name), "want a list, have %s: begin each element with a hyphen", describe(list, false))
		return nil
	}
	return append([]*yaml.Node{}, list.Content...)
}

func (p *parser) item(doc *Document, at *yaml.Node, path string) {
	failed, first := p.errors, len(p.problems)
	it := Item{Path: path, Fields: map[string]bridge.Position{}}
	p.fields, p.base = it.Fields, path
	p.record(at, &yaml.Node{}, path)
	p.value(at, reflect.ValueOf(&it.Entry).Elem(), path)
	p.fields = nil

	missing := ""
	switch {
	case it.Entry.Type == "":
		missing = "type"
	case it.Entry.Name == "":
		missing = "name"
	}
	if missing != "" {
		doc.nameless++
		if p.errors == failed {
			p.fail(at, join(path, missing), "the registry has no %s", missing)
		}
		p.out.nameless = Text(bridge.Problem{
			File: p.file, Line: p.line + at.Line, Path: join(path, missing), Message: "the registry has no " + missing,
		})
		return
	}
	if p.errors != failed {
		texts := []string{path + " is wrong"}
		for _, problem := range p.problems[first:] {
			if !problem.Warning {
				texts = append(texts, Text(bridge.Problem{Path: problem.Path, Message: problem.Message}))
			}
		}
		it.Err = errors.New(strings.Join(texts, "; "))
	}
	doc.Items = append(doc.Items, it)
}
