package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// defaultSocket is where a packaged daemon answers.
const defaultSocket = "/run/meshupd/api.sock"

// stdio is where a run reads and writes: Out is the answer, Err is talk.
type stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// env is what every command gets: the streams, the environment, and the flags that all commands share.
type env struct {
	stdio
	getenv func(string) string
	now    func() time.Time

	socket   string
	json     string // "" or "1"
	plain    bool
	quiet    bool
	verbose  bool
	color    string
	timeout  time.Duration
	wantJSON bool // --json was on the command line, also when it could not be parsed

	cancel context.CancelFunc
}

func newEnv(s stdio) *env {
	return &env{stdio: s, getenv: os.Getenv, now: time.Now}
}

func (e *env) close() {
	if e.cancel != nil {
		e.cancel()
	}
}

// asksJSON finds --json without the parser, so that a usage error can be JSON too.
func asksJSON(args []string) bool {
	for _, a := range args {
		if a == "--" {
			return false
		}
		if a == "--json" || strings.HasPrefix(a, "--json=") {
			return true
		}
	}
	return false
}

// prepare checks the shared flags and starts the clock of --timeout.
func (e *env) prepare(ctx context.Context) (context.Context, error) {
	if e.json != "" && e.json != "1" {
		return nil, verify.Refuse(verify.CodeUsage, "this version writes --json=1, not --json=%s", e.json)
	}
	if e.json != "" && e.plain {
		return nil, verify.Refuse(verify.CodeUsage, "--json and --plain are two answers: choose one")
	}
	switch e.color {
	case "auto", "always", "never":
	default:
		return nil, verify.Refuse(verify.CodeUsage, "--color is auto, always or never, not %q", e.color)
	}
	if e.timeout < 0 {
		return nil, verify.Refuse(verify.CodeUsage, "--timeout is less than nothing")
	}
	if e.timeout > 0 {
		ctx, e.cancel = context.WithTimeoutCause(ctx, e.timeout,
			verify.Refuse(verify.CodeTimeout, "not done within %s", e.timeout))
	}
	return ctx, nil
}

// client talks to the daemon that --socket names.
func (e *env) client() *control.Client { return control.NewClient(e.socket) }

// terminal says whether w is a terminal that a person watches.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// live says whether lines on w may be redrawn: on a terminal that can, for a person who wants it.
func (e *env) live(w io.Writer) bool {
	return terminal(w) && e.getenv("TERM") != "dumb" && !e.accessible()
}

// accessible asks for text that is only ever appended, for screen readers.
func (e *env) accessible() bool {
	v := e.getenv("ACCESSIBLE")
	return v != "" && v != "0" && v != "false"
}

// canvas tells how to draw on w.
func (e *env) canvas(w io.Writer) screen.Canvas {
	c := screen.Canvas{Width: 80, Height: 24, ASCII: !utf8Locale(e.getenv), Location: time.Local}
	if f, ok := w.(*os.File); ok && terminal(w) {
		if cols, rows, err := term.GetSize(int(f.Fd())); err == nil && cols > 0 {
			c.Width, c.Height = cols, rows
		}
	}
	if n, err := strconv.Atoi(e.getenv("COLUMNS")); err == nil && n >= 20 && n <= 1000 {
		c.Width = n
	}
	switch e.color {
	case "always":
		c.Color = true
	case "auto":
		c.Color = e.getenv("NO_COLOR") == "" && e.live(w)
	}
	return c
}

// utf8Locale follows the order of the C library: LC_ALL, LC_CTYPE, LANG.
func utf8Locale(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := getenv(name); v != "" {
			v = strings.ToLower(v)
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return false
}

// sayf tells something on the side: not with --quiet.
func (e *env) sayf(format string, args ...any) {
	if !e.quiet {
		fmt.Fprintf(e.Err, format+"\n", args...)
	}
}

// printObject writes fields as one object whose first key is its schema.
func (e *env) printObject(schema string, fields map[string]any) error {
	raw, err := json.Marshal(fields)
	if err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	head := fmt.Sprintf("{%q:%q,", "schema", schema)
	if len(fields) == 0 {
		head = strings.TrimSuffix(head, ",")
	}
	return e.printJSON(json.RawMessage(head+string(raw[1:])), false)
}

// printJSON writes one object as the answer: indented for people, one line a piece in a stream.
func (e *env) printJSON(v any, oneLine bool) error {
	var raw []byte
	var err error
	if oneLine {
		raw, err = json.Marshal(v)
	} else {
		raw, err = json.MarshalIndent(v, "", "  ")
	}
	if err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	_, err = e.Out.Write(append(screen.CleanJSON(raw), '\n'))
	return err
}
