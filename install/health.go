package install

import (
	"context"
	"time"

	"meshupd/verify"
)

// Health asks a command whether the slot on trial is good.
type Health struct {
	// Command and its arguments, run without a shell; exit code 0 means healthy. Nil: healthy at once, so that a slot is
	// good as soon as the daemon runs from it.
	Command []string
	// Deadline is how long the slot may take to become healthy; 5 minutes when zero.
	Deadline time.Duration
	// Interval is the time between the end of one run and the next; 2 s when zero.
	Interval time.Duration
	// Timeout of one run, after which its process group is killed; 30 s when zero.
	Timeout time.Duration

	// Env is told to the command besides.
	Env []string
	// Slot and Version are told to the command as MESHUPD_SLOT and MESHUPD_VERSION; see For.
	Slot    SlotName
	Version string
}

// For returns the same check for what a slot holds.
func (h Health) For(slot SlotName, version string) Health {
	h.Slot, h.Version = slot, version
	return h
}

// Check runs the command until it exits with 0 (nil) or the deadline passes: E-HEALTH, with the last line of standard
// error of the last run. When ctx ends it returns the cause without a code: that says nothing about the slot.
func (h Health) Check(ctx context.Context) error {
	if len(h.Command) == 0 {
		return nil
	}
	deadline, interval, timeout := orElse(h.Deadline, 5*time.Minute), orElse(h.Interval, 2*time.Second), orElse(h.Timeout, 30*time.Second)
	end := time.Now().Add(deadline)
	for {
		c := command{argv: h.Command, env: append(slotEnv(h.Slot, h.Version), h.Env...), timeout: min(timeout, time.Until(end))}
		err := c.run(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Until(end) <= interval {
			return verify.Refuse(verify.CodeHealth, "not healthy within %s: %w", deadline, err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(interval):
		}
	}
}

func orElse(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}
