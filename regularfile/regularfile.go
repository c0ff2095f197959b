// Package regularfile reads files whose path a user gave, without trusting what is there.
package regularfile

import (
	"fmt"
	"io"
	"os"
	"syscall"
)

// Read returns the content of a file of at most limit bytes. A pipe, a device or a folder is an error, since reading it
// could block or have no end.
func Read(path string, limit int64) ([]byte, error) {
	if info, err := os.Stat(path); err != nil { // before it is opened: merely opening some devices has an effect
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, errIrregular(path)
	}
	// O_NONBLOCK: if it has become a pipe meanwhile that nobody writes to, opening it would wait for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errIrregular(path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: it has more than %d bytes", path, limit)
	}
	return data, nil
}

func errIrregular(path string) error { return fmt.Errorf("read %s: it is no regular file", path) }
