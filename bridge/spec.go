package bridge

import (
	"context"
	"errors"
	"strings"

	"github.com/regbridge/regbridge/registry"
)

// A Constructor makes a registry of one type from an entry. It validates the entry, with a registry.FieldError for each
// problem, and opens nothing.
type Constructor func(registry.Entry, registry.Env) (registry.Registry, error)

// Key identifies a registry: the McpBridge's namespace and name, and the entry's type and name.
type Key struct {
	Namespace, Bridge, Type, Name string
}

// String gives the form namespace/bridge/type/name.
func (k Key) String() string { return k.Namespace + "/" + k.Bridge + "/" + k.Type + "/" + k.Name }

// bridge gives the form namespace/bridge of the McpBridge.
func (k Key) bridge() string { return k.Namespace + "/" + k.Bridge }

// Config is all that the configuration says. It replaces the Config before as a whole, and is never written again.
type Config struct {
	// Read says that every place of configuration has been read completely at least once. Until then nothing may be
	// concluded from a registry's absence.
	Read bool
	// Registries are the entries in configuration order: namespace, name, index. Keys are unique.
	Registries []RegistryConfig
	// Problems are all findings, errors and warnings alike, in the order of files and lines.
	Problems []Problem
	// Err is why the last read failed, nil if it did not. What failed to be read stands in Registries as it last was.
	Err error
}

// RegistryConfig is one entry of one McpBridge.
type RegistryConfig struct {
	Key   Key
	Entry registry.Entry
	// Path is the entry's place in its document: "spec.registries[2]".
	Path string
	// Origin is where the document was read: "bridge.yaml:12", or "namespace/name" in Kubernetes.
	Origin string
	// Err is why the entry cannot be used; nil if it can. Such an entry is not run; what it published before stays.
	Err error
	// Fields tells where the fields that the configuration sets are written, by their path within the entry; "" is the
	// entry itself. It is nil in Kubernetes.
	Fields map[string]Position
}

// A Position is a place in a file.
type Position struct {
	File string
	Line int
}

// Problems gives what err, a Constructor's answer to this entry, joins or wraps, each with its place in the
// configuration. What is only partly bad is a warning.
func (c RegistryConfig) Problems(err error) []Problem {
	if err == nil {
		return nil
	}
	switch e := err.(type) { //nolint:errorlint // the wrapped ones are what is walked to
	case *registry.FieldError:
		path := c.Path
		if e.Path != "" {
			path += "." + e.Path
		}
		at := c.position(e.Path)
		return []Problem{{File: at.File, Line: at.Line, Path: path, Message: e.Err.Error(), Warning: e.Partial}}
	case interface{ Unwrap() []error }:
		var out []Problem
		for _, one := range e.Unwrap() {
			out = append(out, c.Problems(one)...)
		}
		return out
	case interface{ Unwrap() error }:
		if _, ok := errors.AsType[*registry.FieldError](err); ok {
			return c.Problems(e.Unwrap())
		}
	}
	at := c.position("")
	return []Problem{{File: at.File, Line: at.Line, Path: c.Path, Message: err.Error()}}
}

// position returns where the field is written, or else what it is a part of.
func (c RegistryConfig) position(path string) Position {
	for {
		if at, ok := c.Fields[path]; ok {
			return at
		}
		if path == "" {
			return Position{File: c.Origin}
		}
		path = path[:max(0, strings.LastIndexAny(path, ".["))]
	}
}

// A Problem is one finding in the configuration.
type Problem struct {
	// File and Line are where; Line counts from 1, 0 if unknown.
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
	// Path is the field's path in its document: "spec.registries[2].port".
	Path string `json:"path,omitempty"`
	// Message is what is wrong and what to do about it.
	Message string `json:"message"`
	// Warning says that the configuration works all the same.
	Warning bool `json:"warning,omitempty"`
}

// A Source reads McpBridge resources from where they are kept.
type Source interface {
	// Run reads, calls apply with each new state, and watches for changes until ctx ends; it returns nil then. The
	// first call comes after the first attempt to read, successful or not. Calls do not overlap.
	Run(ctx context.Context, apply func(Config)) error
}

// ErrSecretMissing is wrapped by the error for a Secret, or a key of one, that does not exist.
var ErrSecretMissing = errors.New("secret not found")

// Secrets gives the Secrets that entries name.
type Secrets interface {
	// Get returns the Secret's current content; an error that wraps ErrSecretMissing if there is none. It may be called
	// at any time from any goroutine, and does no slow I/O. The map is the caller's.
	Get(namespace, name string) (registry.Credentials, error)
}
