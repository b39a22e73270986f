package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"meshupd/install"
	"meshupd/peer"
)

// PolicyConfig says how far this device goes by itself, and when.
type PolicyConfig struct {
	Auto       string   `toml:"auto" comment:"\"off\", \"check\", \"fetch\" or \"install\""`
	Restart    string   `toml:"restart" comment:"into a new version: \"auto\": at once; \"window\": in policy.window; \"command\": when policy.may_restart says so; \"never\": left to the device"`
	Window     []string `toml:"window" comment:"\"02:00-05:00\", local time; several are allowed, and over midnight"`
	MayRestart []string `toml:"may_restart" comment:"command that decides when: exit 0: now; 75: not yet, the last line of standard error says why (how it is done is slots.restart)"`
	MayTimeout Duration `toml:"may_restart_timeout" comment:"how long it may take; then it is not yet"`
	InhibitDir string   `toml:"inhibit_dir" comment:"any file in it holds the restart, and its first line says why; empty: nothing does"`
	Inhibitors bool     `toml:"inhibitors" comment:"a lock of systemd-logind on shutdown (systemd-inhibit --mode=block) holds it too"`
}

const (
	holdAgain     = 10 * time.Second // when to look again at what can end without a message
	freeAgain     = 2 * time.Second  // how long it counts that a program or logind had nothing against it: arming and restart follow each other
	maxMayTimeout = 2 * time.Minute  // well below what the device's loop may be silent for
)

func (c *Config) checkPolicy() error {
	switch c.Policy.Auto {
	case "off", "check", "fetch", "install":
	default:
		return &fieldError{"policy.auto", `is not "off", "check", "fetch" or "install"`}
	}
	for _, text := range c.Policy.Window {
		if _, err := parseWindow(text); err != nil {
			return &fieldError{"policy.window", fmt.Sprintf("has %q, which is not like \"02:00-05:00\"", text)}
		}
	}
	switch p := c.Policy; {
	case len(p.MayRestart) > 0 && p.MayRestart[0] == "":
		return &fieldError{"policy.may_restart", "names no command"}
	case len(p.MayRestart) > 0 && p.Restart != "command":
		return &fieldError{"policy.may_restart", `needs policy.restart = "command"`}
	case p.MayTimeout < leastDuration:
		return &fieldError{"policy.may_restart_timeout", tooShort}
	case p.MayTimeout > Duration(maxMayTimeout):
		return &fieldError{"policy.may_restart_timeout", "is more than 2m0s"}
	}
	switch c.Policy.Restart {
	case "auto", "never":
	case "command":
		if len(c.Policy.MayRestart) == 0 {
			return &fieldError{"policy.may_restart", "is missing"}
		}
	case "window":
		if len(c.Policy.Window) == 0 {
			return &fieldError{"policy.window", "is missing"}
		}
	default:
		return &fieldError{"policy.restart", `is not "auto", "window", "command" or "never"`}
	}
	return nil
}

// holder applies the policy. Programs and the bus are asked at most every few seconds, however often the loop looks.
type holder struct {
	policy PolicyConfig
	bus    string // of logind; empty: the system's
	log    *slog.Logger

	// The loop owns these: the last answer of a program or of logind, to what, and how long it counts.
	asked string
	why   string
	until time.Time
}

// hold says whether the restart into a version waits, why, and when to ask again.
func (h *holder) hold(ctx context.Context, slot install.SlotName, version string) (peer.HoldFact, string, time.Duration) {
	now := time.Now()
	if fact, why, again := h.policy.hold(now); fact != peer.HoldNone || !h.policy.Inhibitors && h.policy.Restart != "command" {
		return fact, why, again
	}
	if h.asked != version || !now.Before(h.until) {
		why := h.ask(ctx, slot, version)
		if ctx.Err() != nil {
			return peer.HoldAll, "the daemon ends", holdAgain
		}
		again := freeAgain
		if why != "" {
			again = holdAgain
		}
		h.asked, h.why, h.until = version, why, time.Now().Add(again)
	}
	if h.why != "" {
		return peer.HoldAll, h.why, max(time.Until(h.until), time.Second)
	}
	return peer.HoldNone, "", 0
}

// ask asks whoever has to be run or called. A logind that does not answer holds nothing, as with systemctl: an update may be
// what mends it.
func (h *holder) ask(ctx context.Context, slot install.SlotName, version string) string {
	if h.policy.Inhibitors {
		who, err := install.Inhibited(ctx, h.bus)
		if err != nil && ctx.Err() == nil {
			h.log.Warn("inhibitors are not known", "err", err)
		}
		if who != "" {
			return "inhibited by " + who
		}
	}
	if h.policy.Restart != "command" {
		return ""
	}
	err := install.MayRestart{Command: h.policy.MayRestart, Timeout: time.Duration(h.policy.MayTimeout)}.Ask(ctx, slot, version)
	if err != nil {
		return err.Error()
	}
	return ""
}

// hold is what the policy says without asking any program.
func (p PolicyConfig) hold(now time.Time) (peer.HoldFact, string, time.Duration) {
	if p.Restart == "never" {
		return peer.HoldRestart, "waits for a restart of the device", 0
	}
	if p.Restart == "window" {
		wait, text := 24*time.Hour, ""
		for _, one := range p.Window {
			w, err := parseWindow(one) // Validate has let it pass
			if d := w.until(now); err == nil && d <= wait {
				wait, text = d, one
			}
		}
		if wait > 0 {
			return peer.HoldAll, "waits for the window " + text, wait
		}
	}
	if why := inhibited(p.InhibitDir); why != "" {
		return peer.HoldAll, "inhibited by " + why, holdAgain
	}
	return peer.HoldNone, "", 0
}

// window is a part of each day, in minutes from midnight; it may go over midnight.
type window struct{ from, to int }

func parseWindow(text string) (window, error) {
	from, to, ok := strings.Cut(text, "-")
	a, err := time.Parse("15:04", from)
	b, err2 := time.Parse("15:04", to)
	if !ok || err != nil || err2 != nil || a.Equal(b) {
		return window{}, fmt.Errorf("%q is not a window", text)
	}
	return window{a.Hour()*60 + a.Minute(), b.Hour()*60 + b.Minute()}, nil
}

// until is how long it takes to the window's start by the clock on the wall; 0 inside it.
func (w window) until(now time.Time) time.Duration {
	minute := now.Hour()*60 + now.Minute()
	inside := minute >= w.from && minute < w.to
	if w.from > w.to {
		inside = minute >= w.from || minute < w.to
	}
	if inside {
		return 0
	}
	left := (w.from - minute + 24*60) % (24 * 60)
	return time.Duration(left)*time.Minute - time.Duration(now.Second())*time.Second
}

// makeInhibitDir makes the folder where no package did, for root's applications alone.
func makeInhibitDir(dir string, log *slog.Logger) {
	if dir == "" {
		return
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		log.Warn("there is no folder of inhibitors: no file can hold a restart", "err", err)
	}
}

// maxInhibitor bounds what is read of a file that an application wrote.
const maxInhibitor = 256

// inhibited names the first file that holds restarts, and its first line; "" for none.
func inhibited(dir string) string {
	if dir == "" {
		return ""
	}
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return ""
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		name := shown(e.Name(), 64)
		f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			if os.IsNotExist(err) {
				continue
			}
			return name // it is there, whatever it says
		}
		line, _ := io.ReadAll(io.LimitReader(f, maxInhibitor))
		f.Close()
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if text := shown(string(line), maxInhibitor); text != "" {
			return name + ": " + text
		}
		return name
	}
	return ""
}

func shown(s string, most int) string {
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s))
	return string([]rune(s)[:min(most, len([]rune(s)))])
}
