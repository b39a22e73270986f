package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// command runs a program of the integrator in a process group of its own.
type command struct {
	argv    []string
	env     []string // in addition to the daemon's
	timeout time.Duration
	blame   string    // the first line of standard error with this in it is the reason, not the last line
	stdin   io.Reader // nil: empty
	stdout  io.Writer // nil: thrown away
	stderr  io.Writer // nil: only its last line is kept, for the error
}

const (
	tailSize  = 4 << 10 // bytes of standard error that are kept
	maxReason = 200     // characters of its last line that are shown
	// pipeWait is how long a program that went into the background may hold standard error open after the command ended.
	pipeWait = 500 * time.Millisecond
)

// errNoEnd is a program that was killed because its time was over.
var errNoEnd = errors.New("no end")

// killed says that a program did not end by itself: what it says is no verdict on what it was given.
func killed(err error) bool {
	var exit interface{ Exited() bool }
	return errors.Is(err, errNoEnd) || errors.As(err, &exit) && !exit.Exited()
}

// run returns nil when the program exits with 0 in time. Its error ends with the last line of standard error. At the
// timeout, and when ctx ends, the whole process group is killed.
func (c command) run(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var said tail
	cmd := exec.CommandContext(limited, c.argv[0], c.argv[1:]...)
	cmd.Env = append(os.Environ(), c.env...)
	cmd.Stderr = &said
	if c.stderr != nil {
		cmd.Stderr = io.MultiWriter(&said, c.stderr)
	}
	cmd.Stdin, cmd.Stdout = c.stdin, c.stdout
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
			return err
		}
		return os.ErrProcessDone
	}
	cmd.WaitDelay = pipeWait
	err := cmd.Run()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if limited.Err() != nil {
		err = fmt.Errorf("%w after %s", errNoEnd, c.timeout.Round(time.Millisecond))
	}
	if line := said.line(c.blame); line != "" {
		return fmt.Errorf("%w: %s", err, line)
	}
	return err
}

func slotEnv(slot SlotName, version string) []string {
	// A version is signed, but NUL would end the environment variable with an error nobody understands.
	return []string{"MESHUPD_SLOT=" + string(slot), "MESHUPD_VERSION=" + printable(version, maxVersion)}
}

// tail keeps the end of what is written to it.
type tail struct{ kept []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p[max(0, len(p)-tailSize):]...)
	if extra := len(t.kept) - tailSize; extra > 0 {
		t.kept = append(t.kept[:0], t.kept[extra:]...)
	}
	return len(p), nil
}

// line returns the first line with blame in it, or the last line.
func (t *tail) line(blame string) string {
	for line := range bytes.Lines(t.kept) {
		if blame != "" && bytes.Contains(line, []byte(blame)) {
			return printable(string(line), maxReason)
		}
	}
	return t.lastLine()
}

// lastLine returns the last line with something in it, fit to be shown on a terminal.
func (t *tail) lastLine() string {
	lines := bytes.Split(t.kept, []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		if line := printable(string(lines[i]), maxReason); line != "" {
			return line
		}
	}
	return ""
}

// printable drops control and other invisible characters, by which a program could redraw a terminal or a log, and
// returns at most limit characters.
func printable(s string, limit int) string {
	clean := []rune(strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return -1
		}
		return r
	}, s)))
	return string(clean[:min(len(clean), limit)])
}
