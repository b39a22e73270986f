package slotstest

import (
	"context"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

// Boot is a bootloader with its power-on.
type Boot interface {
	install.Bootloader
	// PowerOn does what the bootloader does when the machine starts, and returns when the chosen slot runs.
	PowerOn(ctx context.Context) error
}

// OpenBoot opens one bootloader in the power-th start of its machine. Both slots hold something that can be booted; slot
// a is booted and default at first.
type OpenBoot func(power int, step Step) (Boot, error)

// RunBootloader holds an implementation of install.Bootloader against the contract. make returns a fresh one for each story.
func RunBootloader(t *testing.T, make func(t *testing.T) OpenBoot) {
	story := func(name string, tell func(t *testing.T, m *machine)) {
		t.Run(name, func(t *testing.T) { tell(t, &machine{open: make(t)}) })
	}
	story("a trial is confirmed", bootConfirmed)
	story("a trial uses its starts up", bootUsedUp)
	story("a trial is given up", bootGivenUp)
	story("an armed trial is disarmed", bootDisarmed)
	story("what is not allowed is refused", bootRefusals)
	t.Run("a fault at every step", func(t *testing.T) { bootFaults(t, make) })
}

type machine struct {
	open  OpenBoot
	power int
}

// on starts the machine.
func (m *machine) on(t *testing.T) Boot {
	t.Helper()
	m.power++
	b, err := m.open(m.power, plain)
	must(t, "open", err)
	must(t, "power on", b.PowerOn(t.Context()))
	return b
}

func wantBoot(t *testing.T, b Boot, want install.BootState) {
	t.Helper()
	got, err := b.Boot(t.Context())
	must(t, "boot state", err)
	if got != want {
		t.Fatalf("the boot state is %+v, want %+v", got, want)
	}
}

func settled(slot install.SlotName) install.BootState {
	return install.BootState{Phase: install.PhaseSettled, Booted: slot, Default: slot}
}

func onTrial(left int) install.BootState {
	return install.BootState{Phase: install.PhaseTrial, Booted: install.SlotB, Default: install.SlotA, Trial: install.SlotB, Left: left}
}

func bootConfirmed(t *testing.T, m *machine) {
	b := m.on(t)
	wantBoot(t, b, settled(install.SlotA))
	must(t, "try", b.Try(t.Context(), install.SlotB, 2))
	wantBoot(t, b, install.BootState{Phase: install.PhaseArmed, Booted: install.SlotA, Default: install.SlotA, Trial: install.SlotB, Left: 2})
	b = m.on(t)
	wantBoot(t, b, onTrial(1))
	must(t, "confirm", b.Confirm(t.Context()))
	for range 3 {
		wantBoot(t, b, settled(install.SlotB))
		b = m.on(t)
	}
}

func bootUsedUp(t *testing.T, m *machine) {
	b := m.on(t)
	must(t, "try", b.Try(t.Context(), install.SlotB, 3))
	for left := 2; left >= 0; left-- {
		b = m.on(t)
		wantBoot(t, b, onTrial(left))
	}
	failed := settled(install.SlotA)
	failed.Failed = install.SlotB
	failed.Why = "the new system was started 3 times and did not confirm itself"
	for range 2 {
		b = m.on(t)
		wantBoot(t, b, failed)
	}
	must(t, "take note", b.Confirm(t.Context()))
	wantBoot(t, b, settled(install.SlotA))
	wantBoot(t, m.on(t), settled(install.SlotA))
}

func bootGivenUp(t *testing.T, m *machine) {
	b := m.on(t)
	must(t, "try", b.Try(t.Context(), install.SlotB, 5))
	b = m.on(t)
	must(t, "fall back", b.Fallback(t.Context()))
	wantBoot(t, b, install.BootState{Phase: install.PhaseSettled, Booted: install.SlotB, Default: install.SlotA, Failed: install.SlotB})
	b = m.on(t)
	failed := settled(install.SlotA)
	failed.Failed = install.SlotB
	wantBoot(t, b, failed)
	must(t, "try again", b.Try(t.Context(), install.SlotB, 1))
	wantBoot(t, m.on(t), onTrial(0))
}

func bootDisarmed(t *testing.T, m *machine) {
	b := m.on(t)
	must(t, "try", b.Try(t.Context(), install.SlotB, 1))
	must(t, "disarm", b.Try(t.Context(), install.SlotA, 1))
	wantBoot(t, b, settled(install.SlotA))
	b = m.on(t)
	wantBoot(t, b, settled(install.SlotA))
	must(t, "try", b.Try(t.Context(), install.SlotB, 1))
	must(t, "give the armed trial up", b.Fallback(t.Context()))
	failed := settled(install.SlotA)
	failed.Failed = install.SlotB
	wantBoot(t, b, failed)
}

func bootRefusals(t *testing.T, m *machine) {
	ctx := t.Context()
	b := m.on(t)
	refused(t, "try no slot", b.Try(ctx, "c", 1), verify.CodeBoot)
	refused(t, "try without a start", b.Try(ctx, install.SlotB, 0), verify.CodeBoot)
	refused(t, "fall back when settled", b.Fallback(ctx), verify.CodeBoot)
	must(t, "confirm when settled", b.Confirm(ctx))
	wantBoot(t, b, settled(install.SlotA))
	must(t, "try", b.Try(ctx, install.SlotB, 1))
	refused(t, "confirm when armed", b.Confirm(ctx), verify.CodeBoot)
	b = m.on(t)
	refused(t, "try on trial", b.Try(ctx, install.SlotB, 1), verify.CodeBusy)
	wantBoot(t, b, onTrial(0))
}

// bootFaults cuts the power at every step of a life of three starts. Whatever was cut, the next power-on comes to a state
// that is settled or on trial, and from there to a settled one.
func bootFaults(t *testing.T, make func(t *testing.T) OpenBoot) {
	life := func(t *testing.T, m *machine, f fault, seen *[]string) error {
		step := f.step(seen)
		return first(
			func() error {
				return m.start(t.Context(), step, func(b Boot) error { return b.Try(t.Context(), install.SlotB, 2) })
			},
			func() error { return m.start(t.Context(), step, func(b Boot) error { return b.Fallback(t.Context()) }) },
			func() error {
				return m.start(t.Context(), step, func(b Boot) error { return b.Try(t.Context(), install.SlotB, 1) })
			},
			func() error { return m.start(t.Context(), step, func(b Boot) error { return b.Confirm(t.Context()) }) },
			func() error { return m.start(t.Context(), step, func(b Boot) error { return nil }) },
		)
	}
	var steps []string
	must(t, "life", life(t, &machine{open: make(t)}, fault{at: -1}, &steps))
	if len(steps) < 4 {
		t.Fatalf("the bootloader tells of only %d durable steps: %v", len(steps), steps)
	}
	for n, step := range steps {
		for _, kept := range []bool{false, true} {
			f := fault{at: n, kept: kept, off: true}
			t.Run(label(f, false, step), func(t *testing.T) {
				t.Parallel()
				m := &machine{open: make(t)}
				var seen []string
				if err := life(t, m, f, &seen); err == nil {
					t.Fatal("the cut was not noticed")
				}
				bootRecovers(t, m)
			})
		}
	}
}

// start is one start of the machine, with faults.
func (m *machine) start(ctx context.Context, step Step, do func(Boot) error) error {
	m.power++
	b, err := m.open(m.power, step)
	if err != nil {
		return err
	}
	if err := b.PowerOn(ctx); err != nil {
		return err
	}
	return do(b)
}

func bootRecovers(t *testing.T, m *machine) {
	b := m.on(t)
	for range 4 {
		st, err := b.Boot(t.Context())
		must(t, "boot state", err)
		switch {
		case st.Phase == install.PhaseSettled && st.Booted == st.Default:
			wantBoot(t, m.on(t), st)
			return
		case st.Phase == install.PhaseTrial && st.Booted == st.Trial:
		default:
			t.Fatalf("after a power-on the boot state is %+v", st)
		}
		b = m.on(t)
	}
	t.Fatal("a trial does not end")
}
