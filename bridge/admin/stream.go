package admin

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"iter"
	"net/http"
)

// Answers may be large, so they are written piece by piece: what a slow reader keeps waiting is one piece and the values
// that it is made of, which nobody writes any more. They are indented, as istiod's are.

// writeArray writes a JSON array.
func writeArray[T any](w http.ResponseWriter, elements iter.Seq[T]) {
	writePieces(w, '[', ']', func(write func(key string, value any) bool) {
		for e := range elements {
			if !write("", e) {
				return
			}
		}
	})
}

// writeObject writes a JSON object.
func writeObject[T any](w http.ResponseWriter, members iter.Seq2[string, T]) {
	writePieces(w, '{', '}', func(write func(key string, value any) bool) {
		for k, v := range members {
			if !write(k, v) {
				return
			}
		}
	})
}

// writeValue writes one small value.
func writeValue(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = writePiece(w, "", v, "") // a reader that is gone is of no interest
	_, _ = io.WriteString(w, "\n")
}

func writePieces(w http.ResponseWriter, begin, end byte, pieces func(write func(key string, value any) bool)) {
	w.Header().Set("Content-Type", "application/json")
	out := bufio.NewWriterSize(w, 64<<10)
	out.WriteByte(begin) //nolint:errcheck // bufio keeps the error
	separator := "\n  "
	pieces(func(key string, value any) bool {
		out.WriteString(separator) //nolint:errcheck // see above
		separator = ",\n  "
		return writePiece(out, key, value, "  ") == nil
	})
	if separator != "\n  " {
		out.WriteByte('\n') //nolint:errcheck // see above
	}
	out.WriteByte(end)  //nolint:errcheck // see above
	out.WriteByte('\n') //nolint:errcheck // see above
	_ = out.Flush()     // a reader that is gone is of no interest
}

// writePiece writes a value, with its key if it has one, indented below prefix.
func writePiece(w io.Writer, key string, value any, prefix string) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if key != "" {
		if err := enc.Encode(key); err != nil {
			return err
		}
		b.Truncate(b.Len() - 1)
		b.WriteString(": ")
	}
	enc.SetIndent(prefix, "  ")
	if err := enc.Encode(value); err != nil {
		return err
	}
	_, err := w.Write(bytes.TrimSuffix(b.Bytes(), []byte("\n")))
	return err
}
