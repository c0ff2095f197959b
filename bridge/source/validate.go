package source

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/regularfile"
)

// ValidateOptions are the settings of Validate.
type ValidateOptions struct {
	// DefaultsFile is a file with settings for entries that do not have them; empty means none.
	DefaultsFile string
	// Check runs the constructor of the entry's type. Its error is what the constructor returns; nil skips the check.
	Check func(bridge.RegistryConfig) error
}

// Validate returns every problem in the files, with file, line and path. Each of paths is a configuration of its own, as
// in FilesOptions.Path; one that is a file may be a pipe too. Unknown fields are errors. What is only partly bad is a
// warning, and so is a TLS file that cannot be read here.
func Validate(paths []string, o ValidateOptions) []bridge.Problem {
	var problems []bridge.Problem
	var rules []rule
	if o.DefaultsFile != "" {
		if data, err := readBounded(o.DefaultsFile, maxFileSize); err != nil {
			problems = append(problems, bridge.Problem{File: o.DefaultsFile, Message: fmt.Sprintf("cannot be read: %v", err)})
		} else {
			rules, problems = parseRules(o.DefaultsFile, data)
		}
	}
	for _, path := range paths {
		problems = append(problems, validate(path, o.DefaultsFile, rules, o.Check)...)
	}
	return problems
}

func validate(path, defaultsFile string, rules []rule, check func(bridge.RegistryConfig) error) []bridge.Problem {
	unreadable := func(path string, err error) bridge.Problem {
		return bridge.Problem{File: path, Message: fmt.Sprintf("cannot be read: %v", err)}
	}
	info, err := os.Stat(path)
	if err != nil {
		return []bridge.Problem{unreadable(path, err)}
	}
	files := []string{path}
	read := readBounded
	if info.IsDir() {
		read = regularfile.Read
		if files, err = configFiles(path); err != nil {
			return []bridge.Problem{unreadable(path, err)}
		}
	}
	var docs []Document
	var problems []bridge.Problem
	for _, file := range files {
		if info.IsDir() && defaultsFile != "" && file == filepath.Clean(defaultsFile) {
			continue
		}
		data, err := read(file, maxFileSize)
		if err != nil {
			problems = append(problems, unreadable(file, err))
			continue
		}
		p := parse(file, data, true)
		docs = append(docs, p.docs...)
		problems = append(problems, p.problems...)
	}
	if len(docs) == 0 && len(problems) == 0 {
		problems = append(problems, bridge.Problem{File: path, Message: "there is no McpBridge in it: serve would wait for one", Warning: true})
	}
	registries, found := build(docs, rules)
	problems = append(problems, found...)
	for _, rc := range registries {
		problems = append(problems, rc.Problems(unreadableTLS(rc.Entry.TLS))...)
		if check == nil {
			continue
		}
		for _, p := range rc.Problems(check(rc)) {
			// A field that could not be read looks to the constructor as if it were not set.
			if rc.Err == nil || !slices.ContainsFunc(problems, func(q bridge.Problem) bool {
				return !q.Warning && q.File == p.File && (q.Path == p.Path || within(p.Path, q.Path))
			}) {
				problems = append(problems, p)
			}
		}
	}
	slices.SortStableFunc(problems, comparePlaces)
	return problems
}

// unreadableTLS reports the files that a registry's TLS needs and that cannot be read here. They may be there where
// regbridge runs, so these are warnings.
func unreadableTLS(t *registry.TLS) error {
	if !t.On() {
		return nil
	}
	var problems []error
	for _, f := range []struct{ name, file string }{{"caFile", t.CAFile}, {"certFile", t.CertFile}, {"keyFile", t.KeyFile}} {
		if f.file == "" {
			continue
		}
		if _, err := regularfile.Read(f.file, maxFileSize); err != nil {
			problems = append(problems, warning("tls."+f.name, "cannot be used unless it is there where regbridge runs: %v", err))
		}
	}
	return errors.Join(problems...)
}

// within reports whether the field is a part of the other one.
func within(path, other string) bool {
	return strings.HasPrefix(path, other+".") || strings.HasPrefix(path, other+"[")
}
