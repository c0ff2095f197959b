// Command regbridge brings services registered in service registries into an Istio or Envoy mesh. The package holds
// the flags and sub-commands, and puts the parts together; what they do is in the packages below.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
)

func main() { os.Exit(run(context.Background(), os.Args[1:])) }

// The exit statuses.
const (
	statusFailed = 1
	statusUsage  = 2
)

// errReported ends a command with status 1 when what is wrong has been printed already.
var errReported = errors.New("reported")

// usageError is an error in how the program was called.
type usageError struct {
	err     error
	command string // whose --help tells more
}

func (e usageError) Error() string { return e.err.Error() }

func (e usageError) Unwrap() error { return e.err }

func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errReported):
		return statusFailed
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "regbridge: %v; see %s --help\n", err, usage.command)
		return statusUsage
	default:
		fmt.Fprintf(os.Stderr, "regbridge: %v\n", err)
		return statusFailed
	}
}
