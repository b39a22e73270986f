package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"meshupd/peer"
)

// guard tells systemd that the daemon is ready, and then at each turn of its watchdog that the device's loop lives. When the
// loop hangs it is told nothing: systemd ends the daemon with SIGABRT, so that the log has the stacks of all goroutines, and
// starts it again. Without systemd, or without WatchdogSec=, a loop that hangs is only logged.
type guard struct {
	alive func() error
	say   func(state string) error // to systemd; nothing where there is none
	every time.Duration            // of systemd's watchdog; 0: it has none
	log   *slog.Logger
}

// lookAtLoop is how often a loop that nobody else watches over is looked at.
const lookAtLoop = time.Minute

func newGuard(alive func() error, log *slog.Logger) guard {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the environment of systemd's watchdog cannot be read", "err", err)
		every = 0
	}
	return guard{alive, saySystemd, every, log}
}

func saySystemd(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}

// run ends with ctx.
func (g guard) run(ctx context.Context) error {
	if err := g.say(daemon.SdNotifyReady); err != nil {
		return err
	}
	turn := lookAtLoop
	if g.every > 0 {
		turn = g.every / 2
	}
	tick := time.NewTicker(turn)
	defer tick.Stop()
	hangs := false
	for {
		select {
		case <-ctx.Done():
			_ = g.say(daemon.SdNotifyStopping)
			return ctx.Err()
		case <-tick.C:
		}
		err := g.alive()
		if (err != nil) != hangs {
			hangs = err != nil
			g.log.Error("the device's loop", "hangs", hangs, "err", err)
		}
		if err != nil || g.every == 0 {
			continue
		}
		if err := g.say(daemon.SdNotifyWatchdog); err != nil {
			return err
		}
	}
}

// A start verifies every kept release again, and may have to wait for a slow disk or an engine. systemd is asked for more
// time while it goes on, up to startLimit: a start that hangs for longer is one that systemd ends.
const (
	startLimit  = 10 * time.Minute
	askForTime  = 10 * time.Second
	timeToStart = "EXTEND_TIMEOUT_USEC=60000000"
)

// extending runs do.
func extending(say func(state string) error, do func() error) error {
	done := make(chan struct{})
	var asking sync.WaitGroup
	asking.Go(func() {
		tick := time.NewTicker(askForTime)
		defer tick.Stop()
		end := time.NewTimer(startLimit)
		defer end.Stop()
		for {
			select {
			case <-done:
				return
			case <-end.C:
				return
			case <-tick.C:
				if say(timeToStart) != nil {
					return
				}
			}
		}
	})
	err := do()
	close(done)
	asking.Wait()
	return err
}

const (
	flushTime = 10 * time.Minute // what a medium may take for the last bytes of an image that the kernel still holds
	margin    = time.Minute      // for what has no deadline of its own and takes moments
)

// quiet says how long a step of the device's loop may be silent, see peer.Config.
func (c *Config) quiet(s peer.Step) time.Duration {
	hook := time.Duration(c.Hooks.Timeout)
	switch s {
	case peer.StepWrite: // between pre-install and post-install
		d := flushTime + margin + 2*hook
		if delegated(c.Slots.Kind) {
			d += time.Duration(c.Slots.Delegate.Timeout) // one that tells no progress; 10 minutes more are those of `rauc info`
		}
		if c.Slots.Kind == "container" {
			d += time.Duration(c.Slots.RestartTimeout)
		}
		return d
	case peer.StepTry: // after post-install and pre-reboot
		return 2*hook + margin
	case peer.StepRestart:
		return c.restartTime() + hook + margin
	case peer.StepCheck, peer.StepConfirm: // the half that writes slots may check again before it confirms
		return c.Health.longest() + max(time.Duration(c.Slots.Container.Settle), time.Duration(c.Slots.Settle)) + margin
	}
	return 0
}

// restartTime bounds a restart: the command, and then the end of the machine; or one container after the other.
func (c *Config) restartTime() time.Duration {
	timeout := time.Duration(c.Slots.RestartTimeout)
	if c.Slots.Kind != "container" {
		return 2 * timeout
	}
	d := timeout // for an engine that is still starting
	for _, s := range c.Slots.Container.Services {
		// Look, stop, start, ready, switch, stop the old one: each a call of the engine.
		d += 6*timeout + time.Duration(c.Slots.Container.Stop) + time.Duration(s.ReadyTimeout) + 30*time.Second
	}
	return d
}

// longest is what a health check may take: a round that began in time goes on to its end.
func (h HealthConfig) longest() time.Duration {
	probes := len(h.HTTP) + len(h.Units) + len(h.Files) + 2 // and the command, and the hook
	return time.Duration(h.Deadline) + time.Duration(probes)*(time.Duration(h.Timeout)+time.Second)
}
