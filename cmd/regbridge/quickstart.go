package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/regbridge/regbridge/examples/quickstart"
)

// extractQuickstart writes the built-in example below dir, where it can be edited while it is served.
func extractQuickstart(dir string) (string, error) {
	folder := filepath.Join(dir, "quickstart")
	if err := os.CopyFS(folder, quickstart.Files); err != nil {
		return "", fmt.Errorf("write the built-in example: %w", err)
	}
	return folder, nil
}

// hints says where to look.
func (d *daemon) hints() string {
	admin := "http://" + reachable(d.adminPort.Addr().String())
	return fmt.Sprintf(`
regbridge serves its built-in example, from %[2]s
  a page for people    %[1]s/
  the services         curl -s %[1]s/debug/registryz
  what the mesh gets   curl -s %[1]s/debug/configz
Edit the file to see it follow; press Ctrl-C to end.

`, admin, d.config)
}
