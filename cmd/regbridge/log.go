package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/pflag"
)

// logFlags say what is logged, and how.
type logFlags struct {
	level  slog.Level
	format string
}

func (l *logFlags) add(flags *pflag.FlagSet) {
	flags.TextVar(&l.level, "log-level", slog.LevelInfo, "least `level` of what is logged: debug, info, warn or error")
	flags.StringVar(&l.format, "log-format", "auto", "`format` of the log: text, json, or auto, which is text on a terminal")
}

// logger makes the logger that writes to w.
func (l *logFlags) logger(w io.Writer) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: l.level, ReplaceAttr: readable}
	switch {
	case l.format == "text" || l.format == "auto" && isTerminal(w):
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case l.format == "json" || l.format == "auto":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	default:
		return nil, fmt.Errorf("--log-format %q: write auto, text or json", l.format)
	}
}

// readable writes durations as "1.5s" in JSON too.
func readable(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
