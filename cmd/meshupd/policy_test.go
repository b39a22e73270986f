package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
