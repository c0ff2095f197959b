// Package quickstart is the example that `regbridge serve --quickstart` serves: the folder itself, in the program.
package quickstart

import "embed"

// Files holds the configuration files of the example.
//
//go:embed *.yaml
var Files embed.FS
