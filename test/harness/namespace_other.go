//go:build !linux

package harness

import (
	"testing"

	"github.com/regbridge/regbridge/test/servers"
)

// InNamespace runs the rest of a test in a network namespace of its own, which only Linux has: the test is skipped, or
// fails if servers.Required.
func InNamespace(t *testing.T, _ func(t *testing.T), _ ...string) {
	t.Helper()
	if servers.Required() {
		t.Fatal("network namespaces are not to be had: this is not Linux")
	}
	t.Skip("network namespaces are not to be had: this is not Linux")
}
