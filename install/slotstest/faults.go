package slotstest

import (
	"context"
	"fmt"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

// tale is one life of a device that the faults are put into.
type tale struct {
	name   string
	before func(ctx context.Context, dev Device, known []update) error // without faults; may be nil
	tell   func(ctx context.Context, dev Device, known []update) error
}

var tales = []tale{
	{"confirmed", nil, func(ctx context.Context, dev Device, known []update) error {
		return first(
			func() error { return known[0].write(ctx, dev) },
			func() error { return dev.Try(ctx, install.SlotB) },
			func() error { return dev.Restart(ctx) },
			func() error { return dev.Confirm(ctx) },
			func() error { return known[1].write(ctx, dev) },
		)
	}},
	{"given up", func(ctx context.Context, dev Device, known []update) error {
		return first(
			func() error { return known[0].write(ctx, dev) },
			func() error { return dev.Try(ctx, install.SlotB) },
		)
	}, func(ctx context.Context, dev Device, known []update) error {
		return first(
			func() error { return dev.Try(ctx, install.SlotA) },
			func() error { return dev.Try(ctx, install.SlotB) },
			func() error { return dev.Restart(ctx) },
			func() error { return dev.Fallback(ctx) },
			func() error { return dev.Restart(ctx) },
			func() error { return dev.Forget(ctx) },
		)
	}},
}

func first(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// everyFault tells each tale with each fault, and expects that the device then still gets a release confirmed.
func everyFault(t *testing.T, make func(t *testing.T) Harness, known []update) {
	count := 0
	for _, tale := range tales {
		t.Run(tale.name, func(t *testing.T) {
			first := newWorld(t, make, known)
			every := max(first.h.Every, 1)
			steps := tale.steps(t, first)
			for n, step := range steps {
				for _, kept := range []bool{false, true} {
					for _, cut := range []string{"fails", "killed", "power cut"} {
						if count++; count%every != 0 {
							continue
						}
						f := fault{at: n, kept: kept, off: cut != "fails"}
						t.Run(label(f, cut == "killed", step), func(t *testing.T) {
							t.Parallel() // most of the time is waiting for syncs
							tale.withFault(t, make, known, f, cut)
						})
					}
				}
			}
		})
	}
}

// steps tells the tale without a fault and returns the steps that it takes.
func (tale tale) steps(t *testing.T, w *world) []string {
	var seen []string
	_, err := tale.run(t, w, fault{at: -1}, &seen)
	must(t, tale.name, err)
	if len(seen) < 8 {
		t.Fatalf("the implementation tells of only %d durable steps: %v", len(seen), seen)
	}
	return seen
}

// run returns the device too, unless it did not open.
func (tale tale) run(t *testing.T, w *world, f fault, seen *[]string) (Device, error) {
	if tale.before != nil {
		must(t, "before the faults", tale.before(t.Context(), w.open(t), w.known))
	}
	dev, err := w.h.Open(w.power, f.step(seen))
	if err != nil {
		return nil, err
	}
	if err := dev.Start(t.Context()); err != nil {
		return dev, err
	}
	return dev, tale.tell(t.Context(), dev, w.known)
}

func (tale tale) withFault(t *testing.T, make func(t *testing.T) Harness, known []update, f fault, cut string) {
	w := newWorld(t, make, known)
	var seen []string
	dev, err := tale.run(t, w, f, &seen)
	if err == nil || len(seen) <= f.at {
		t.Fatalf("the fault went unnoticed: %v, steps %v", err, seen)
	}
	if cut == "fails" && dev != nil {
		w.check(t, dev)
		if err := w.driveOn(t.Context(), dev); err != nil {
			t.Fatalf("after the fault the daemon does not go on: %v", err)
		}
		w.recover(t)
		return
	}
	if cut == "power cut" {
		w.power++
	}
	if !w.h.Deep || cut != "power cut" {
		w.recover(t)
		return
	}
	// How many steps the recovery takes is found out on a twin of the device; then each of them is cut as well.
	after := w.recover(t)
	for n := range after {
		for _, kept := range []bool{false, true} {
			twin := newWorld(t, make, known)
			var seen []string
			tale.run(t, twin, f, &seen)
			twin.power = w.power
			var again []string
			if err := twin.drive(t.Context(), fault{at: n, kept: kept, off: true}.step(&again)); err == nil && !kept {
				t.Fatalf("the second fault, at step %d of %v, was not noticed", n, again)
			}
			twin.power++
			twin.recover(t)
		}
	}
}

// recover opens the device again and goes on to a confirmed release, with everything checked on the way. It returns the
// number of steps that it took.
func (w *world) recover(t *testing.T) int {
	t.Helper()
	dev, err := w.h.Open(w.power, plain)
	must(t, "open after the fault", err)
	w.check(t, dev)
	var seen []string
	if err := w.drive(t.Context(), fault{at: -1}.step(&seen)); err != nil {
		t.Fatalf("after the fault the device does not go on: %v", err)
	}
	st := w.check(t, w.open(t))
	if st.Phase != install.PhaseSettled || st.Booted != st.Default || st.Slots[st.Default].Release != w.goal().rel.ID() {
		t.Fatalf("after the fault the device came to %+v", st)
	}
	if w.h.Pointed() != st.Default {
		t.Fatalf("slot %s is confirmed, but the next start uses %s", st.Default, w.h.Pointed())
	}
	return len(seen)
}

// goal is a release that no tale wrote.
func (w *world) goal() update { return w.known[len(w.known)-1] }

// drive does what a lifecycle does: observe, one step, again, until the goal is confirmed.
func (w *world) drive(ctx context.Context, step Step) error {
	dev, err := w.h.Open(w.power, step)
	if err != nil {
		return err
	}
	if err := dev.Start(ctx); err != nil {
		return err
	}
	return w.driveOn(ctx, dev)
}

func (w *world) driveOn(ctx context.Context, dev Device) error {
	for range 30 {
		st, err := dev.State(ctx)
		if err != nil {
			return err
		}
		if st.Phase == install.PhaseSettled && st.Booted == st.Default && st.Failed == "" && st.Slots[st.Default].Release == w.goal().rel.ID() {
			return nil
		}
		if err := w.next(ctx, dev, st); err != nil {
			return fmt.Errorf("in %+v: %w", st, err)
		}
	}
	return fmt.Errorf("no end after 30 steps")
}

func (w *world) next(ctx context.Context, dev Device, st install.State) error {
	idle := st.Default.Other()
	c := st.Slots[idle]
	switch {
	case st.Failed != "":
		return dev.Forget(ctx)
	case st.Phase == install.PhaseArmed:
		return dev.Restart(ctx)
	case st.Phase == install.PhaseTrial && st.Slots[st.Trial].Release == w.goal().rel.ID():
		if err := dev.Confirm(ctx); verify.CodeOf(err) != verify.CodeBoot || ctx.Err() != nil {
			return err
		}
		// Its start was never completed.
		return dev.Fallback(ctx)
	case st.Phase == install.PhaseTrial:
		return dev.Fallback(ctx)
	case st.Booted != st.Default:
		return dev.Restart(ctx)
	case c.Whole && c.Release == w.goal().rel.ID():
		return dev.Try(ctx, idle)
	default:
		return w.goal().write(ctx, dev)
	}
}
