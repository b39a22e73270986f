package main

import (
	"context"
	"io"
	"log/slog"
	"sync"
)

// newLogger writes to standard error, as a service does.
func newLogger(e *env, cfg LogConfig) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.Level)) // Validate has seen it
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.Format {
	case "json":
		return slog.New(slog.NewJSONHandler(e.Err, opts))
	case "journal":
		return slog.New(newJournalHandler(e.Err, opts))
	}
	return slog.New(slog.NewTextHandler(e.Err, opts))
}

// journalHandler puts the level before each line as systemd reads it ("<6>"), so
// that `journalctl -p err` works without a journal library. The journal knows the time.
type journalHandler struct {
	slog.Handler
	line *journalLine
}

// journalLine writes one record's line with its prefix.
type journalLine struct {
	w io.Writer

	mu     sync.Mutex // held from choosing the prefix until the line is written
	prefix string
}

func (l *journalLine) Write(p []byte) (int, error) {
	if _, err := l.w.Write(append([]byte(l.prefix), p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

func newJournalHandler(w io.Writer, opts *slog.HandlerOptions) slog.Handler {
	line := &journalLine{w: w}
	bare := *opts
	bare.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}
	return &journalHandler{slog.NewTextHandler(line, &bare), line}
}

// Handle implements slog.Handler.
func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.line.mu.Lock()
	defer h.line.mu.Unlock()
	switch {
	case r.Level >= slog.LevelError:
		h.line.prefix = "<3>"
	case r.Level >= slog.LevelWarn:
		h.line.prefix = "<4>"
	case r.Level >= slog.LevelInfo:
		h.line.prefix = "<6>"
	default:
		h.line.prefix = "<7>"
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &journalHandler{h.Handler.WithAttrs(attrs), h.line}
}

// WithGroup implements slog.Handler.
func (h *journalHandler) WithGroup(name string) slog.Handler {
	return &journalHandler{h.Handler.WithGroup(name), h.line}
}
