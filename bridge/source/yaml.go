package source

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf16"

	"go.yaml.in/yaml/v3"
)

const (
	// maxFileSize bounds a file. Kubernetes allows 1.5 MB for an object.
	maxFileSize = 4 << 20
	// maxDocuments bounds the YAML documents of a file.
	maxDocuments = 10_000
)

// readBounded reads a file of at most limit bytes, which may be a pipe.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: it has more than %d bytes; split it", path, limit)
	}
	return data, nil
}

// isConfigFile reports whether a file of that name in a folder is read.
func isConfigFile(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return true
	}
	return false
}

// configFiles lists the configuration files of a folder, sorted by name. It does not look at what they are, so that one
// that cannot be read is found, and reported, instead of missed.
func configFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		if isConfigFile(e.Name()) {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, nil
}

// location remembers which file or folder was read, to tell a folder that was emptied from one that is gone: where a volume
// was mounted, its mount point remains, empty; and where the source of a mount is missing, an empty folder is made.
type location struct {
	info fs.FileInfo
	used bool
}

// check is called after each listing with whether anything was found. Where something was found before, it returns an
// error if the path is another kind of thing by now, or another folder that holds nothing.
func (l *location) check(path string, used bool) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if l.used {
		switch was := l.info.IsDir(); {
		case was && !info.IsDir():
			return fmt.Errorf("read %s: it was a folder, and is none any more; restart if that is meant", path)
		case !was && info.IsDir():
			return fmt.Errorf("read %s: it was a file, and is a folder now; is the source of a mount missing? restart if that is meant", path)
		case was && !used && !os.SameFile(l.info, info):
			return fmt.Errorf("read %s: the folder was replaced by an empty one; was a volume unmounted?", path)
		}
	}
	l.info, l.used = info, used || l.used && !info.IsDir() // whoever empties a file deletes nothing
	return nil
}

// A chunk is the text of one YAML document of a file, so that an error in one document does not hide the others.
type chunk struct {
	// line is the number of lines before the chunk.
	line int
	text []byte
}

// split cuts a file in front of each line that starts a document, but not within the directives and comments that lead
// a document in.
func split(data []byte) []chunk {
	var chunks []chunk
	begin, beginLine, line := 0, 0, 0
	lead := true // nothing but directives, comments and blank lines since begin
	for at := 0; at < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[at:], '\n'); i >= 0 {
			end = at + i + 1
		}
		text := data[at:end]
		if bytes.HasPrefix(text, []byte("---")) && (len(text) == 3 || strings.IndexByte(" \t\r\n", text[3]) >= 0) {
			if !lead {
				chunks = append(chunks, chunk{beginLine, data[begin:at]})
				begin, beginLine = at, line
			}
			lead = false
		} else if text = bytes.TrimSpace(text); len(text) > 0 && text[0] != '#' && text[0] != '%' {
			lead = false
		}
		at = end
	}
	return append(chunks, chunk{beginLine, data[begin:]})
}

// syntaxError is a YAML error with its line, counted from 1; 0 if unknown.
type syntaxError struct {
	line int
	text string
}

var yamlErrorText = regexp.MustCompile(`^yaml: (?:line (\d+): )?(?s)(.*)$`)

// documents calls visit with the root of each document in the file, and with the number of lines to add to its nodes'.
// A document with an error in its syntax is passed to invalid instead.
func documents(file string, data []byte, visit func(root *yaml.Node, line int), invalid func(syntaxError)) {
	if filepath.Ext(file) == ".json" {
		data = plainEscapes(data)
	}
	count := 0
	for _, c := range split(data) {
		dec := yaml.NewDecoder(bytes.NewReader(c.text))
		for {
			if count++; count > maxDocuments {
				invalid(syntaxError{c.line + 1, fmt.Sprintf("more than %d documents in a file; split it", maxDocuments)})
				return
			}
			var root yaml.Node
			err := dec.Decode(&root)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				invalid(explain(err, c))
				break
			}
			visit(&root, c.line)
		}
	}
}

// explain turns the library's error about a chunk into ours. The only text of the file that the library repeats is the
// name of an alias, which may be a password that wants quotes.
func explain(err error, c chunk) syntaxError {
	out := syntaxError{line: c.line + 1, text: err.Error()}
	if m := yamlErrorText.FindStringSubmatch(err.Error()); m != nil {
		if n, nerr := strconv.Atoi(m[1]); nerr == nil {
			out.line = c.line + n
		}
		out.text = m[2]
	}
	if strings.Contains(out.text, "anchor '") {
		out.text = "an alias has no anchor: put a text that begins with * in quotes"
	}
	return out
}

var jsonEscape = regexp.MustCompile(`\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|.)`)

// plainEscapes writes out what JSON may escape in ways that YAML does not know: characters in two halves, and the slash.
// Lines stay.
func plainEscapes(data []byte) []byte {
	return jsonEscape.ReplaceAllFunc(data, func(esc []byte) []byte {
		switch {
		case string(esc) == `\/`:
			return esc[1:]
		case len(esc) == 12:
			hi, _ := strconv.ParseUint(string(esc[2:6]), 16, 16)
			lo, _ := strconv.ParseUint(string(esc[8:12]), 16, 16)
			return []byte(string(utf16.DecodeRune(rune(hi), rune(lo))))
		}
		return esc
	})
}
