package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/peer"
	"meshupd/verify"
)

func TestWindows(t *testing.T) {
	at := func(clock string) time.Time {
		now, err := time.Parse("15:04:05", clock)
		if err != nil {
			t.Fatal(err)
		}
		return now
	}
	for _, c := range []struct {
		now, windows string
		wait         time.Duration
		why          string
	}{
		{"02:00:00", "02:00-05:00", 0, ""},
		{"04:59:59", "02:00-05:00", 0, ""},
		{"05:00:00", "02:00-05:00", 21 * time.Hour, "waits for the window 02:00-05:00"},
		{"01:59:30", "02:00-05:00", 30 * time.Second, "waits for the window 02:00-05:00"},
		{"23:30:00", "23:00-01:00", 0, ""},
		{"00:30:00", "23:00-01:00", 0, ""},
		{"01:00:00", "23:00-01:00", 22 * time.Hour, "waits for the window 23:00-01:00"},
		{"11:00:00", "02:00-05:00 12:00-13:00", time.Hour, "waits for the window 12:00-13:00"},
	} {
		p := PolicyConfig{Restart: "window", Window: strings.Fields(c.windows)}
		hold, why, again := p.hold(at(c.now))
		if (hold == peer.HoldAll) != (c.wait > 0) || why != c.why || again != c.wait {
			t.Errorf("%s in %s: %v %q %v", c.now, c.windows, hold, why, again)
		}
	}
	for _, text := range []string{"", "2", "02:00", "02:00-25:00", "02:00-02:00", "02:00-03:00-04:00"} {
		_, err := parse(t, sixLines+"[policy]\nrestart = \"window\"\nwindow = [\""+text+"\"]\n")
		if verify.CodeOf(err) != verify.CodeConfig || !strings.HasPrefix(err.Error(), "a.toml:9:1: policy.window has ") {
			t.Errorf("window %q: %v", text, err)
		}
	}
}

func TestInhibitorsHoldTheRestart(t *testing.T) {
	p := PolicyConfig{Restart: "auto", InhibitDir: t.TempDir()}
	if hold, why, _ := p.hold(time.Now()); hold != peer.HoldNone {
		t.Fatal(hold, why)
	}
	if err := os.Mkdir(filepath.Join(p.InhibitDir, "a-folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(p.InhibitDir, "pos-app")
	if err := os.WriteFile(file, []byte("sale in\x1b progress\nmore\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if hold, why, again := p.hold(time.Now()); hold != peer.HoldAll || why != "inhibited by pos-app: sale in progress" || again != holdAgain {
		t.Fatal(hold, why, again)
	}
	p.Restart = "never"
	if hold, why, _ := p.hold(time.Now()); hold != peer.HoldRestart || why != "waits for a restart of the device" {
		t.Fatal(hold, why)
	}
}

// The integrator's program decides when, after everything else; it is not asked more often than every few seconds.
func TestProgramDecidesWhen(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("answer", "75")
	h := &holder{policy: PolicyConfig{Restart: "command", InhibitDir: path("inhibit.d"), MayTimeout: Duration(time.Minute),
		MayRestart: []string{"/bin/sh", "-c", `echo "$MESHUPD_VERSION" >>` + path("asked") + `; echo "a patient is in" >&2; exit $(cat ` + path("answer") + `)`}}, log: slog.New(slog.DiscardHandler)}
	asked := func() int {
		data, _ := os.ReadFile(path("asked"))
		return strings.Count(string(data), "2.4.0")
	}
	if err := os.Mkdir(path("inhibit.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("inhibit.d/app", "busy")
	if hold, why, _ := h.hold(t.Context(), install.SlotB, "2.4.0"); hold != peer.HoldAll || why != "inhibited by app: busy" || asked() != 0 {
		t.Errorf("%v %q, asked %d times", hold, why, asked())
	}
	if err := os.Remove(path("inhibit.d/app")); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if hold, why, again := h.hold(t.Context(), install.SlotB, "2.4.0"); hold != peer.HoldAll || why != "a patient is in" || again <= 0 || again > holdAgain {
			t.Errorf("%v %q %v", hold, why, again)
		}
	}
	if n := asked(); n != 1 {
		t.Errorf("asked %d times in a moment", n)
	}
	write("answer", "0")
	h.until = time.Now() // its time is over
	if hold, why, _ := h.hold(t.Context(), install.SlotB, "2.4.0"); hold != peer.HoldNone || asked() != 2 {
		t.Errorf("%v %q, asked %d times", hold, why, asked())
	}
	if hold, _, _ := h.hold(t.Context(), install.SlotB, "2.5.0"); hold != peer.HoldNone {
		t.Error("another version is asked for anew")
	}
	for text, want := range map[string]string{
		"restart = \"command\"\n":                       "policy.may_restart is missing",
		"may_restart = [\"/x\"]\n":                      `policy.may_restart needs policy.restart = "command"`,
		"restart = \"command\"\nmay_restart = [\"\"]\n": "policy.may_restart names no command",
		"may_restart_timeout = \"1h\"\n":                "policy.may_restart_timeout is more than 2m0s",
		"restart = \"sometimes\"\n":                     `policy.restart is not "auto", "window", "command" or "never"`,
	} {
		if _, err := parse(t, sixLines+"[policy]\n"+text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
