package regularfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"github.com/regbridge/regbridge/regularfile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRead(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("four"), []byte("four"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("four", path("link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"four", "link"} {
		if data, err := regularfile.Read(path(name), 4); err != nil || string(data) != "four" {
			t.Errorf("read %s: %q, %v", name, data, err)
		}
	}
	for name, want := range map[string]string{"four": "more than 3 bytes", "pipe": "no regular file", ".": "no regular file", "/dev/zero": "no regular file"} {
		file := path(name)
		if filepath.IsAbs(name) {
			file = name
		}
		if data, err := regularfile.Read(file, 3); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("read %s: %q, %v; the error should say %q and name the file", name, data, err, want)
		}
	}
	if _, err := regularfile.Read(path("absent"), 3); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read a file that is not there: %v", err)
	}
}
