package slotstest

import (
	"context"
	"errors"
	"maps"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

// Step runs one durable step, or the restart, of an implementation by its name. The suite decides there what fails.
type Step = func(name string, do func() error) error

// Device is a Slots with what its daemon calls once when it starts.
type Device interface {
	install.Slots
	Start(ctx context.Context) error
}

// Harness holds one device: a fresh one whose slot a is booted and holds the factory's content.
type Harness struct {
	// Open opens the device in the power-th start of its machine, each time for one start of the daemon.
	Open func(power int, step Step) (Device, error)
	// Pointed is the slot that a start of the application would use.
	Pointed func() install.SlotName
	// Holds returns the digests of what is really in a slot, by image name.
	Holds func(slot install.SlotName) map[string]verify.Digest
	// Images is how many images a release for this device has.
	Images int
	// Kind of the images; KindSlot when empty.
	Kind verify.Kind
	// Every tells only each so many-th of the faults, where a story takes seconds; all of them when 0.
	Every int
	// Content makes the content of an image out of noise, where not any bytes will do; nil: the noise itself.
	Content func(noise []byte) []byte
	// Plain says that no image is compressed; otherwise every other one is.
	Plain bool
	// Deep says that the device is quick enough to meet every pair of faults.
	Deep bool
}

func plain(_ string, do func() error) error { return do() }

var (
	errOff  = errors.New("the power is off")
	errOnce = errors.New("input/output error, scripted")
)

// fault says what happens at one step of a run.
type fault struct {
	at   int  // which step, from 0; -1: none
	kept bool // the step happens, and is said to have failed
	off  bool // nothing works after it
}

// faulty returns a Step with the fault in it; seen counts the steps that were asked for.
func (f fault) step(seen *[]string) Step {
	return func(name string, do func() error) error {
		n := len(*seen)
		*seen = append(*seen, name)
		if n == f.at {
			if f.kept {
				if err := do(); err != nil {
					return err
				}
			}
			if f.off {
				return errOff
			}
			return errOnce
		}
		if f.off && f.at >= 0 && n > f.at {
			return errOff
		}
		return do()
	}
}

// world is a device and the releases that it may meet.
type world struct {
	h       Harness
	factory map[string]verify.Digest
	known   []update
	power   int
}

func newWorld(t *testing.T, make func(t *testing.T) Harness, known []update) *world {
	h := make(t)
	return &world{h: h, factory: h.Holds(install.SlotA), known: known, power: 1}
}

// open opens the device without faults and starts it.
func (w *world) open(t *testing.T) Device {
	t.Helper()
	dev, err := w.h.Open(w.power, plain)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	if err := dev.Start(t.Context()); err != nil {
		t.Fatalf("start: %v", err)
	}
	w.check(t, dev)
	return dev
}

// powerCycle starts the machine again.
func (w *world) powerCycle(t *testing.T) Device {
	t.Helper()
	w.power++
	return w.open(t)
}

func state(t *testing.T, dev Device) install.State {
	t.Helper()
	st, err := dev.State(t.Context())
	if err != nil {
		t.Fatalf("state: %v", err)
	}
	return st
}

// check asserts what holds at every moment, whatever was cut.
func (w *world) check(t *testing.T, dev Device) install.State {
	t.Helper()
	st := state(t, dev)
	for slot, c := range st.Slots {
		if !c.Whole {
			continue
		}
		if got, want := w.h.Holds(slot), w.content(t, c.Release); !maps.Equal(got, want) {
			t.Fatalf("slot %s is said to be whole with release %.8s, but holds %v, not %v", slot, c.Release, got, want)
		}
	}
	if st.Phase == install.PhaseTrial && st.Booted != st.Trial {
		t.Fatalf("slot %s is on trial, but slot %s counts as booted", st.Trial, st.Booted)
	}
	for _, slot := range []install.SlotName{st.Default, w.h.Pointed(), st.Trial} {
		if slot != "" && !st.Slots[slot].Whole {
			t.Fatalf("slot %s can be booted and is not whole: %+v, pointer at %s", slot, st, w.h.Pointed())
		}
	}
	return st
}

func (w *world) content(t *testing.T, id verify.Digest) map[string]verify.Digest {
	t.Helper()
	if id.IsZero() {
		return w.factory
	}
	for _, u := range w.known {
		if u.rel.ID() == id {
			return u.holds()
		}
	}
	t.Fatalf("a slot is said to hold release %s, which nobody wrote", id)
	return nil
}

// want compares the parts of a state that a story is about.
func want(t *testing.T, st install.State, phase install.Phase, booted, def install.SlotName) {
	t.Helper()
	if st.Phase != phase || st.Booted != booted || st.Default != def {
		t.Fatalf("the device is %s with %s booted and %s default; want %s, %s, %s (%+v)",
			st.Phase, st.Booted, st.Default, phase, booted, def, st)
	}
}

func refused(t *testing.T, what string, err error, code verify.Code) {
	t.Helper()
	if verify.CodeOf(err) != code {
		t.Fatalf("%s: got %v (code %q), want %s", what, err, verify.CodeOf(err), code)
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
