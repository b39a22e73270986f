package install

import (
	"context"
	"fmt"
	"time"

	"meshupd/verify"
)

// Health says when the slot on trial is good: when every check of a round passes, in as many rounds after each other as
// are wanted. Without a check a slot is good once Grace is over, which is at once when it is zero.
type Health struct {
	// Command and its arguments, run without a shell; exit code 0 means healthy.
	Command []string
	// HTTP are addresses on this machine that have to answer with 2xx; see probeHTTP.
	HTTP []string
	// Units are systemd units that have to be active.
	Units []string
	// Files have to be there, as regular files; with a Fresh, changed no longer ago than that.
	Files []string
	Fresh time.Duration

	// Hooks may have a health hook, which is one more check.
	Hooks Hooks

	// Grace is how long the first round is put off. It is part of the Deadline.
	Grace time.Duration
	// Deadline is how long the slot may take to become healthy; 5 minutes when zero.
	Deadline time.Duration
	// Interval is the time between the end of one round and the next; 2 s when zero.
	Interval time.Duration
	// Timeout of one check, after which it counts as failed; 30 s when zero.
	Timeout time.Duration
	// Passes is how many good rounds after each other are wanted; 1 when zero.
	Passes int
	// Retries is how many failed rounds are borne before the slot is given up ahead of the deadline; 0: no limit.
	Retries int

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

// Check runs rounds until enough of them were good (nil), the deadline passes, or too many failed: E-HEALTH, with the
// name of the check that failed last and what it said. When ctx ends it returns the cause without a code: that says
// nothing about the slot.
func (h Health) Check(ctx context.Context) error {
	h.Deadline, h.Interval, h.Timeout = orElse(h.Deadline, 5*time.Minute), orElse(h.Interval, 2*time.Second), orElse(h.Timeout, 30*time.Second)
	end := time.Now().Add(h.Deadline)
	if err := pause(ctx, h.Grace); err != nil {
		return err
	}
	probes := h.probes()
	var last error
	for good, bad := 0, 0; ; {
		err := round(ctx, probes, min(h.Timeout, time.Until(end)))
		if err != nil && last != nil && time.Until(end) <= 0 {
			err = last // this round was cut short; the one before it says more than that its time ran out
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			good, bad, last = 0, bad+1, err
		default:
			good++
		}
		switch {
		case good >= max(h.Passes, 1), len(probes) == 0:
			return nil
		case h.Retries > 0 && bad > h.Retries:
			return verify.Refuse(verify.CodeHealth, "not healthy in %d rounds: %w", bad, err)
		case time.Until(end) <= h.Interval && err != nil:
			return verify.Refuse(verify.CodeHealth, "not healthy within %s: %w", h.Deadline, err)
		case time.Until(end) <= h.Interval:
			return verify.Refuse(verify.CodeHealth, "not healthy within %s: only %d of the %d good rounds that are wanted", h.Deadline, good, h.Passes)
		}
		if err := pause(ctx, h.Interval); err != nil {
			return err
		}
	}
}

// probe is one check of a round.
type probe struct {
	name string // leads the reason
	run  func(ctx context.Context, timeout time.Duration) error
}

func (h Health) probes() []probe {
	var list []probe
	if len(h.Command) > 0 {
		list = append(list, probe{"command " + printable(h.Command[0], maxReason), func(ctx context.Context, timeout time.Duration) error {
			return command{argv: h.Command, env: append(slotEnv(h.Slot, h.Version), h.Env...), timeout: timeout}.run(ctx)
		}})
	}
	// Its own sentence names the hook. One that is there and cannot be run is a check that fails.
	if path, err := h.Hooks.find(HookHealth); path != "" || err != nil {
		list = append(list, probe{"", func(ctx context.Context, timeout time.Duration) error {
			hooks := h.Hooks
			hooks.Timeout = min(timeout, orElse(hooks.Timeout, timeout))
			return hooks.Run(ctx, HookHealth, append(slotEnv(h.Slot, h.Version), h.Env...)...)
		}})
	}
	for _, url := range h.HTTP {
		list = append(list, probe{"http " + url, func(ctx context.Context, timeout time.Duration) error { return probeHTTP(ctx, url, timeout) }})
	}
	for _, unit := range h.Units {
		list = append(list, probe{"unit " + unit, func(ctx context.Context, timeout time.Duration) error { return probeUnit(ctx, unit, timeout) }})
	}
	for _, path := range h.Files {
		list = append(list, probe{"file " + path, func(context.Context, time.Duration) error { return probeFile(path, h.Fresh, time.Now()) }})
	}
	return list
}

// round runs the checks one after the other, and ends with the first that fails.
func round(ctx context.Context, probes []probe, timeout time.Duration) error {
	for _, p := range probes {
		if err := p.run(ctx, timeout); err != nil {
			if p.name == "" {
				return err
			}
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// pause waits; it returns the cause when ctx ends first.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

func orElse(d, otherwise time.Duration) time.Duration {
	if d <= 0 {
		return otherwise
	}
	return d
}
