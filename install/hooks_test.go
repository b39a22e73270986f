package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

func TestHook(t *testing.T) {
	dir := t.TempDir()
	child := filepath.Join(dir, "child")
	for _, c := range []struct {
		name, script string
		make         func(path string) error // in the place of script
		want         string                  // "": consent
	}{
		{"nothing there", "", func(string) error { return nil }, ""},
		{"consents", "exit 0", nil, ""},
		{"refuses", "echo one >&2; echo battery at 8 % >&2; exit 3", nil, "hook pre-install: exit status 3: battery at 8 %"},
		{"refuses without a word", "exit 1", nil, "hook pre-install: exit status 1"},
		{"is told", `test "$MESHUPD_HOOK $MESHUPD_PRODUCT $MESHUPD_SLOT" = "pre-install kiosk b"`, nil, ""},
		{"has no input", "read x && exit 1; exit 0", nil, ""},
		{"hangs", "echo asks the till >&2; sleep 600 & sleep 600", nil, "hook pre-install: no end after 200ms: asks the till"},
		{"floods", "head -c 20000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo enough >&2; exit 1", nil, "hook pre-install: exit status 1: enough"},
		{"leaves a child that holds its output", "sleep 600 & echo $! >" + child + "; exit 0", nil, ""},
		{"is killed", "kill -9 $$", nil, "hook pre-install: signal: killed"},
		{"cannot be executed", "", func(path string) error { return os.WriteFile(path, []byte("#!/bin/sh\n"), 0o644) }, "hook pre-install: it is not executable"},
		{"is no program", "", func(path string) error { return os.WriteFile(path, []byte{0, 1, 2}, 0o755) }, "hook pre-install: fork/exec"},
		{"has no interpreter", "", func(path string) error { return os.WriteFile(path, []byte("#!/none\n"), 0o755) }, "hook pre-install: fork/exec"},
		{"is a folder", "", func(path string) error { return os.Mkdir(path, 0o755) }, "hook pre-install: it is no regular file"},
		{"is a pipe", "", func(path string) error { return syscall.Mkfifo(path, 0o755) }, "hook pre-install: it is no regular file"},
		{"leads nowhere", "", func(path string) error { return os.Symlink("none", path) }, "hook pre-install: stat"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "pre-install")
			if c.make == nil {
				c.make = func(string) error { shellTool(t, dir, "pre-install", c.script+"\n"); return nil }
			}
			if err := c.make(path); err != nil {
				t.Fatal(err)
			}
			h := Hooks{Dir: dir, Timeout: time.Minute, Env: []string{"MESHUPD_PRODUCT=kiosk"}}
			if c.name == "hangs" {
				h.Timeout = 200 * time.Millisecond
			}
			err := h.Run(t.Context(), HookPreInstall, "MESHUPD_SLOT=b")
			switch {
			case c.want == "" && err != nil:
				t.Fatal(err)
			case c.want != "" && (verify.CodeOf(err) != verify.CodeHook || !strings.HasPrefix(err.Error(), c.want) || len(err.Error()) > 300):
				t.Fatalf("got %v (%s), want %q", err, verify.CodeOf(err), c.want)
			}
		})
	}
	// What a hook leaves in the background is its own business.
	pid, err := os.ReadFile(child)
	if err != nil {
		t.Fatal(err)
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(pid)))
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatalf("the child of a hook is gone: %v", err)
	}
}

// At the timeout everything that the hook started ends with it.
func TestHookIsKilledWithItsChildren(t *testing.T) {
	dir := t.TempDir()
	pids := filepath.Join(dir, "pid")
	shellTool(t, dir, "health", "sleep 600 & echo $! >"+pids+"; wait\n")
	var pid []byte
	for timeout := 300 * time.Millisecond; len(pid) == 0; timeout *= 2 { // on a busy machine a hook may not even begin in time
		h := Hooks{Dir: dir, Timeout: timeout}
		if err := h.Run(t.Context(), HookHealth); verify.CodeOf(err) != verify.CodeHook {
			t.Fatalf("got %v", err)
		}
		pid, _ = os.ReadFile(pids)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(pid)))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(n, 0)
	if errors.Is(err, unix.ESRCH) {
		return // ended, and reaped
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// Readable when the process has ended, whether somebody reaps it or not.
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// The end of the daemon is no refusal.
func TestHookEndsWithTheDaemon(t *testing.T) {
	dir := t.TempDir()
	started := filepath.Join(dir, "started")
	shellTool(t, dir, "pre-reboot", "touch "+started+"; sleep 600\n")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Hooks{Dir: dir, Timeout: time.Hour}.Run(ctx, HookPreReboot) }()
	waitForFile(t, started)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || verify.CodeOf(err) != "" {
		t.Fatalf("got %v", err)
	}
}

func TestHooksOfOthersAreNotRunAsRoot(t *testing.T) {
	if os.Getuid() != 0 {
		CannotRun(t, "give files away: not root")
	}
	const other = 65534
	for name, c := range map[string]struct {
		change func(dir, hook string) error
		want   string
	}{
		"root's": {func(dir, hook string) error { return nil }, ""},
		"another's file": {func(dir, hook string) error { return os.Chown(hook, other, other) },
			"health can be changed by others than root (owner 65534, mode 700)"},
		"a file that others write": {func(dir, hook string) error { return os.Chmod(hook, 0o777) },
			"health can be changed by others than root (owner 0, mode 777)"},
		"a file that its group writes": {func(dir, hook string) error { return os.Chmod(hook, 0o775) }, "mode 775"},
		"another's folder":             {func(dir, hook string) error { return os.Chown(dir, other, other) }, "(owner 65534"},
		"a folder that others write":   {func(dir, hook string) error { return os.Chmod(dir, 0o777) }, "mode 777"},
		"a folder above it":            {func(dir, hook string) error { return os.Chmod(filepath.Dir(dir), 0o777) }, "mode 777"},
		"a link to another's": {func(dir, hook string) error {
			out := filepath.Join(filepath.Dir(dir), "out")
			return errors.Join(os.Rename(hook, out), os.Chown(out, other, other), os.Symlink(out, hook))
		}, "(owner 65534"},
		"a link into another's folder": {func(dir, hook string) error {
			out := filepath.Join(filepath.Dir(dir), "theirs")
			return errors.Join(os.Mkdir(out, 0o755), os.Rename(hook, filepath.Join(out, "x")), os.Chown(out, other, other),
				os.Symlink(filepath.Join(out, "x"), hook))
		}, "(owner 65534"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "hooks.d")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			ran := filepath.Join(t.TempDir(), "ran")
			shellTool(t, dir, "health", "touch "+ran+"\n")
			if err := c.change(dir, filepath.Join(dir, "health")); err != nil {
				t.Fatal(err)
			}
			h := Hooks{Dir: dir, Guard: true}
			err, all := h.Run(t.Context(), HookHealth), h.Check()
			_, did := os.Stat(ran)
			switch {
			case c.want == "" && (err != nil || all != nil || did != nil):
				t.Fatalf("root's own hook: %v, %v, %v", err, all, did)
			case c.want != "" && (verify.CodeOf(err) != verify.CodeHook || !strings.Contains(err.Error(), c.want) || verify.CodeOf(all) != verify.CodeHook || did == nil):
				t.Fatalf("got %v and %v, want %q; it ran: %v", err, all, c.want, did == nil)
			}
		})
	}
}

func TestStrangeHooksAreNamed(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"preinstall", "state", ".swp", "health.sh"} {
		shellTool(t, dir, name, "")
	}
	if got := strings.Join(Hooks{Dir: dir}.Strange(), " "); got != "health.sh preinstall" {
		t.Fatalf("got %q", got)
	}
	if got := (Hooks{Dir: dir + "/none"}).Strange(); got != nil {
		t.Fatalf("got %q", got)
	}
}

// The hook is one check of a round like any other.
func TestHealthHook(t *testing.T) {
	dir := t.TempDir()
	h := quick(Health{Command: sh("exit 0"), Hooks: Hooks{Dir: dir}, Env: []string{"MESHUPD_SERVICES=web"}}).For(SlotB, "2.0.0")
	if err := h.Check(t.Context()); err != nil {
		t.Fatalf("without a hook: %v", err)
	}
	shellTool(t, dir, "health", `echo "$MESHUPD_SLOT $MESHUPD_VERSION $MESHUPD_SERVICES is sick" >&2; exit 1`+"\n")
	err := h.Check(t.Context())
	if want := "not healthy in 2 rounds: hook health: exit status 1: b 2.0.0 web is sick"; err == nil || err.Error() != want || verify.CodeOf(err) != verify.CodeHealth {
		t.Fatalf("got %v, want %q", err, want)
	}
	h.Command, h.Timeout = nil, 50*time.Millisecond
	shellTool(t, dir, "health", "sleep 600\n")
	if err := h.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "hook health: no end after 50ms") {
		t.Fatalf("got %v: the time of a check bounds the hook too", err)
	}
}

func FuzzHookNotes(f *testing.F) {
	good, err := seal(hookSchema, hookNotes{verify.Digest{1}: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"schema":"meshupd.hooks/1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		notes, err := parseHookNotes(data)
		if err != nil {
			return
		}
		again, err := seal(hookSchema, notes)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseHookNotes(again); err != nil && len(again) <= maxHookNotes {
			t.Fatal(err)
		}
	})
}
