package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// consequence adds what the error means for the user's things: "nothing was copied".
type consequence struct {
	err  error
	text string
}

func (c *consequence) Error() string { return c.err.Error() }
func (c *consequence) Unwrap() error { return c.err }

// nothingWas wraps err, if there is one, with what did not happen.
func nothingWas(done string, err error) error {
	if err == nil {
		return nil
	}
	return &consequence{err, "nothing was " + done}
}

// failure is an error as it is told: the JSON schema meshupd.error/1.
type failure struct {
	Code      verify.Code `json:"code"`
	Exit      int         `json:"exit"`
	Detail    string      `json:"detail"`
	Fix       string      `json:"fix"`
	NeedBytes int64       `json:"need_bytes,omitempty"`
	picture   string
	result    string // of a consequence
}

// explain is the one switch from errors to code, words and exit number.
func explain(ctx context.Context, err error) failure {
	f := failure{Code: codeOf(ctx, err), Detail: err.Error()}
	if errors.Is(err, context.DeadlineExceeded) {
		// The cause knows how long was too long; the error only knows that it was.
		if cause := context.Cause(ctx); verify.CodeOf(cause) != "" {
			f.Detail = cause.Error()
		}
	}
	text, known := codeTexts[f.Code]
	if !known { // a code of a newer daemon
		text = codeText{fix: codeTexts[codeFailed].fix, exit: exitFailed}
	}
	if f.Detail == "" {
		f.Detail = text.sentence
	}
	f.Exit, f.Fix = text.exit, text.fix
	var refusal *verify.Refusal
	if errors.As(err, &refusal) {
		f.NeedBytes = refusal.NeedBytes
		if f.NeedBytes > 0 {
			f.Detail += " (" + screen.Bytes(f.NeedBytes) + " short)"
		}
	}
	var with *consequence
	if errors.As(err, &with) {
		f.result = with.text
	}
	var placed *placedError
	if errors.As(err, &placed) {
		f.picture = placed.picture
	}
	return f
}

// codeOf finds the code of any error; errors of the system have one too.
func codeOf(ctx context.Context, err error) verify.Code {
	if code := verify.CodeOf(err); code != "" {
		return code
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return verify.CodeTimeout
	case errors.Is(err, context.Canceled) || ctx.Err() != nil:
		return codeInterrupted
	case errors.Is(err, fs.ErrNotExist):
		return verify.CodeNotFound
	case errors.Is(err, fs.ErrPermission):
		return verify.CodePermission
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return verify.CodeSpace
	case errors.Is(err, syscall.EIO), errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.EROFS):
		return verify.CodeIO
	}
	return codeFailed
}

// headline is the first word of a message.
func headline(exit int) string {
	switch exit {
	case exitUsage:
		return "Unusable"
	case exitNotAllowed, exitRefused, exitNoSpace:
		return "Refused"
	case exitTimeout:
		return "Gave up"
	case exitInterrupted:
		return "Stopped"
	}
	return "Failed"
}

// readerGone reports that the reader of our output went away (`meshupd status | head`): no error to tell. A broken pipe
// elsewhere is one: the daemon closes the socket on an image that it has no room for.
func readerGone(err error) bool {
	var at *fs.PathError
	return errors.As(err, &at) && at.Path == os.Stdout.Name() && errors.Is(at, syscall.EPIPE)
}

// report tells an error, if there is one, and returns the exit code.
func (e *env) report(ctx context.Context, err error) int {
	if err == nil || readerGone(err) {
		return exitOK
	}
	if x, ok := asExit(err); ok {
		return int(x)
	}
	f := explain(ctx, err)
	if e.wantJSON {
		_ = e.printJSON(struct {
			Schema string  `json:"schema"`
			Error  failure `json:"error"`
		}{control.ErrorSchema, f}, true)
		return f.Exit
	}
	c := e.canvas(e.Err)
	detail := c.Clean(strings.TrimRight(f.Detail, "."))
	if !strings.HasSuffix(detail, "?") {
		detail += "."
	}
	if f.result != "" && f.Exit != exitInterrupted {
		detail = strings.TrimSuffix(detail, ".") + "; " + f.result + "."
	}
	fmt.Fprintf(e.Err, "%s  %s  [%s, exit %d]\n", c.Paint("31", headline(f.Exit)), detail, f.Code, f.Exit)
	if f.picture != "" {
		fmt.Fprint(e.Err, c.CleanLines(f.picture))
	}
	fmt.Fprintf(e.Err, "fix: %s\n", f.Fix)
	return f.Exit
}

// placedError is an error at a place in a file, with a picture of it.
type placedError struct {
	err     error
	picture string // lines that end with a line end
}

func (p *placedError) Error() string { return p.err.Error() }
func (p *placedError) Unwrap() error { return p.err }

// usage makes an error about the command line.
func usage(format string, args ...any) error {
	return verify.Refuse(verify.CodeUsage, format, args...)
}

// openError words the failure to open a file that the user named.
func openError(what string, err error) error {
	if verify.CodeOf(err) != "" {
		return err
	}
	var path *os.PathError
	if errors.As(err, &path) {
		return fmt.Errorf("%s %s: %w", what, path.Path, path.Err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
