package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
)

// shellTool puts a shell script in front of PATH, in dir.
func shellTool(t *testing.T, dir, name, script string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestUnitOnTrial(t *testing.T) {
	never := func(ctx context.Context) error { <-ctx.Done(); return context.Cause(ctx) }
	soon := func(context.Context) error { return nil }
	// A systemctl that answers is-active with $1 and show with $2; each answer counts the looks in the file n.
	for _, c := range []struct {
		name, active, show string
		check              func(context.Context) error
		want               string // "": healthy
	}{
		{"stays up", "echo active", "echo r1", soon, ""},
		{"failed", "echo failed; exit 3", "echo r1", never, "unit x.service is failed: said by r1"},
		{"waits for its restart", "echo activating; exit 3", "echo r1", never, "unit x.service is activating: said by r1"},
		{"was started again", "echo active", "echo r$(wc -l <n)", never, "unit x.service ended and was started again: said by r1"},
		{"never ran", "echo inactive; exit 3", "", never, "unit x.service is inactive"},
		{"systemd is away once", "test $(wc -l <n) -gt 1 || exit 1; echo active", "echo r1", soon, ""},
		{"its health check fails", "echo active", "echo r1", func(context.Context) error { return verify.Refuse(verify.CodeHealth, "no paper") }, "no paper"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			shellTool(t, dir, "systemctl", "cd "+dir+"\ncase $1 in is-active) echo >>n; "+c.active+";; show) "+c.show+"\n;; esac\n")
			shellTool(t, dir, "journalctl", `echo "said by ${4#_SYSTEMD_INVOCATION_ID=}"`+"\n")
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			u := &unit{name: "x.service", timeout: time.Minute, settle: time.Millisecond}
			err := u.stays(t.Context(), c.check)
			if c.want == "" && err == nil {
				return
			}
			if err == nil || err.Error() != c.want || verify.CodeOf(err) != verify.CodeHealth {
				t.Fatalf("got %v (%s), want %q", err, verify.CodeOf(err), c.want)
			}
		})
	}
}

// The end of the daemon says nothing about the unit.
func TestUnitCheckIsStopped(t *testing.T) {
	dir := t.TempDir()
	shellTool(t, dir, "systemctl", "case $1 in is-active) echo active;; *) echo r1;; esac\n")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	ctx, cancel := context.WithCancelCause(t.Context())
	asked, stop := false, errors.New("told to stop")
	u := &unit{name: "x.service", timeout: time.Minute, settle: time.Hour}
	err := u.stays(ctx, func(context.Context) error { asked = true; cancel(stop); return nil })
	if !errors.Is(err, stop) || verify.CodeOf(err) != "" || !asked {
		t.Fatalf("got %v, and the check was asked: %v", err, asked)
	}
}

// What systemctl does to start a unit, and what it says when that fails.
func TestUnitRestart(t *testing.T) {
	dir := t.TempDir()
	shellTool(t, dir, "systemctl", `echo "$*" >>`+dir+`/log; test $1 != restart -o ! -e `+dir+`/fail || { echo "Job for x.service failed." >&2; exit 1; }`+"\n")
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	cfg := FilesConfig{Dir: filepath.Join(dir, "slots"), Unit: "x.service", BootID: func() (string, error) { return "1", nil }}
	f, err := OpenFiles(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	log, _ := os.ReadFile(filepath.Join(dir, "log"))
	if want := "reset-failed -- x.service\nrestart -- x.service\n"; string(log) != want {
		t.Fatalf("it ran %q, want %q", log, want)
	}
	shellTool(t, dir, "fail", "")
	err = f.Restart(t.Context())
	if verify.CodeOf(err) != verify.CodeRestart || !strings.HasSuffix(err.Error(), "Job for x.service failed.") {
		t.Fatalf("got %v", err)
	}
	cfg.Restart = []string{"true"}
	if _, err := OpenFiles(cfg); verify.CodeOf(err) != verify.CodeConfig {
		t.Fatalf("a unit and a command: %v", err)
	}
}
