package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshupd/verify"
)

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

func TestHealth(t *testing.T) {
	flag := filepath.Join(t.TempDir(), "ready")
	later := "if test -e " + flag + "; then exit 0; fi; touch " + flag + "; echo not yet >&2; exit 1"
	for _, c := range []struct {
		name    string
		command []string
		code    verify.Code
		detail  string
	}{
		{"no command", nil, "", ""},
		{"healthy", sh("exit 0"), "", ""},
		{"healthy at the second look", sh(later), "", ""},
		{"told what to look at", sh(`test "$MESHUPD_SLOT $MESHUPD_VERSION" = "b 2.0.0"`), "", ""},
		{"sick", sh("echo one >&2; echo the pump is stuck >&2; echo >&2; exit 3"), verify.CodeHealth, "the pump is stuck"},
		{"sick, with an eye to the terminal", sh(`printf 'red\033[31m\007\r\nplain\tline\302\233' >&2; exit 1`), verify.CodeHealth, "plain line"},
		{"not there", []string{"/nonexistent/health"}, verify.CodeHealth, "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := Health{Command: c.command, Deadline: 30 * time.Second, Interval: time.Millisecond}
			if c.code != "" {
				h.Deadline, h.Interval = 300*time.Millisecond, 100*time.Millisecond
			}
			err := h.For(SlotB, "2.0.0").Check(t.Context())
			if verify.CodeOf(err) != c.code || (err == nil) != (c.code == "") {
				t.Fatalf("got %v, want %q", err, c.code)
			}
			if err != nil && (!strings.HasSuffix(err.Error(), c.detail) && c.detail != "no such file" || !strings.Contains(err.Error(), c.detail)) {
				t.Fatalf("got %q, want it to end in %q", err, c.detail)
			}
		})
	}
}

func TestHealthEndsWithTheDaemon(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	started := filepath.Join(t.TempDir(), "started")
	done := make(chan error)
	go func() {
		done <- Health{Command: sh("touch " + started + "; sleep 600"), Timeout: 10 * time.Minute, Deadline: 10 * time.Minute}.Check(ctx)
	}()
	waitForFile(t, started)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || verify.CodeOf(err) != "" {
		t.Fatalf("got %v: a daemon that stops says nothing about the slot", err)
	}
}

// TestTimeoutKillsTheGroup: what the command started must not outlive it.
func TestTimeoutKillsTheGroup(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "alive")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		// Open returns when the child opens the pipe to write, and ReadAll when the last writer is gone.
		_, err := os.ReadFile(fifo)
		ended <- err
	}()
	err := command{argv: sh("(exec sleep 600 >" + fifo + ") & echo stuck >&2; wait"), timeout: 500 * time.Millisecond}.run(t.Context())
	if err == nil || !strings.HasSuffix(err.Error(), ": stuck") || !strings.Contains(err.Error(), "no end after") {
		t.Fatalf("got %v", err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the child of the command still runs")
	}
}

func TestCommandMayLeaveTheApplicationRunning(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	err := command{argv: sh("sleep 600 & echo $! > " + pid), timeout: time.Minute}.run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	for _, c := range strings.TrimSpace(string(data)) {
		n = 10*n + int(c-'0')
	}
	if n < 2 {
		t.Fatalf("the pid is %q", data)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatalf("the application did not survive: %v", err)
	}
}

func TestTailIsBounded(t *testing.T) {
	var said tail
	for range 1000 {
		said.Write([]byte(strings.Repeat("x", 999)))
	}
	said.Write([]byte(strings.Repeat("y", 10*tailSize)))
	if len(said.kept) != tailSize || len(said.lastLine()) != maxReason {
		t.Fatalf("%d bytes kept, %d shown", len(said.kept), len(said.lastLine()))
	}
}

func waitForFile(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s never came", path)
		}
		time.Sleep(time.Millisecond)
	}
}
