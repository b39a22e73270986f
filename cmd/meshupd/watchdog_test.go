package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"meshupd/peer"
)

// fakeSystemd notes when it was told what.
type fakeSystemd struct {
	began time.Time
	mu    sync.Mutex // owns:
	told  map[string][]time.Duration
}

func (f *fakeSystemd) say(state string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told[state] = append(f.told[state], time.Since(f.began))
	return nil
}

// logged is a log that is read while it is written.
type logged struct {
	mu  sync.Mutex // owns:
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (f *fakeSystemd) count(state string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.told[state])
}

func (f *fakeSystemd) last(state string) time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.told[state]); n > 0 {
		return f.told[state][n-1]
	}
	return -1
}

// The watchdog is kept quiet as long as the loop lives, not as long as the process does.
func TestWatchdogFollowsTheLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeSystemd{began: time.Now(), told: map[string][]time.Duration{}}
		var log logged
		hangsAt, back := f.began.Add(10*time.Minute+time.Second), f.began.Add(20*time.Minute+time.Second)
		alive := func() error {
			if now := time.Now(); now.After(hangsAt) && now.Before(back) {
				return errors.New("nothing was heard of it")
			}
			return nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- guard{alive, f.say, time.Minute, slog.New(slog.NewTextHandler(&log, nil))}.run(ctx) }()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := f.count("WATCHDOG=1"); f.last("READY=1") != 0 || n != 20 {
			t.Errorf("ready at %s, and %d signs of life in ten minutes of a watchdog of one", f.last("READY=1"), n)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if last := f.last("WATCHDOG=1"); last > 10*time.Minute+time.Second {
			t.Errorf("told that it lives at %s, when it hung already", last)
		}
		if n := strings.Count(log.String(), "hangs=true"); n != 1 {
			t.Errorf("logged %d times: %s", n, log.String())
		}
		time.Sleep(5 * time.Minute) // where systemd would have restarted it; without it the device goes on
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || f.last("WATCHDOG=1") != 25*time.Minute && f.last("WATCHDOG=1") != 24*time.Minute+30*time.Second {
			t.Errorf("%v, last sign of life at %s", err, f.last("WATCHDOG=1"))
		}
		if f.last("STOPPING=1") < 0 {
			t.Error("systemd was not told of the end")
		}
	})
}

// A start that takes its time gets it, and one that hangs does not for ever.
func TestStartGetsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeSystemd{began: time.Now(), told: map[string][]time.Duration{}}
		if err := extending(f.say, func() error { return nil }); err != nil || len(f.told) > 0 {
			t.Errorf("a quick start: %v, %v", err, f.told)
		}
		want := errors.New("no disk")
		err := extending(f.say, func() error { time.Sleep(5*time.Minute + time.Second); return want })
		if n := len(f.told[timeToStart]); !errors.Is(err, want) || n != 30 {
			t.Errorf("a slow start: %v, asked %d times", err, n)
		}
		if err := extending(f.say, func() error { time.Sleep(time.Hour); return nil }); err != nil || len(f.told[timeToStart]) > 30+60 {
			t.Errorf("a start that hangs: asked %d times", len(f.told[timeToStart]))
		}
	})
}

// What the loop may be silent for is never less than what its steps may take by their own deadlines.
func TestQuietCoversTheDeadlines(t *testing.T) {
	cfg := defaultConfig()
	cfg.Health.HTTP, cfg.Health.Deadline, cfg.Health.Timeout = []string{"http://127.0.0.1/"}, Duration(time.Hour), Duration(10*time.Minute)
	if got := cfg.quiet(peer.StepCheck); got < time.Hour+20*time.Minute {
		t.Error("health check", got)
	}
	if got := cfg.quiet(peer.StepConfirm); got < time.Hour+20*time.Minute {
		t.Error("the check before a confirmation", got)
	}
	cfg.Slots.RestartTimeout = Duration(time.Hour)
	if got := cfg.quiet(peer.StepRestart); got <= 2*time.Hour {
		t.Error("restart: the command and the end of the machine", got)
	}
	cfg.Hooks.Timeout = Duration(4 * time.Hour)
	for step, least := range map[peer.Step]time.Duration{peer.StepWrite: 8 * time.Hour, peer.StepTry: 8 * time.Hour, peer.StepRestart: 6 * time.Hour} {
		if got := cfg.quiet(step); got <= least {
			t.Error("the hooks of", step, got)
		}
	}
	cfg.Hooks.Timeout = Duration(time.Second)
	cfg.Slots.Settle = Duration(3 * time.Hour)
	if got := cfg.quiet(peer.StepCheck); got <= 3*time.Hour {
		t.Error("a unit that has to stay up", got)
	}
	cfg.Slots.Kind, cfg.Slots.Delegate.Timeout = "rauc", Duration(3*time.Hour)
	if got := cfg.quiet(peer.StepWrite); got < 3*time.Hour+10*time.Minute {
		t.Error("another installer", got)
	}
}
