package install

import (
	"context"
	"io"

	"meshupd/verify"
)

// SlotName names one of the two slots of a device.
type SlotName string

// The two slots.
const (
	SlotA SlotName = "a"
	SlotB SlotName = "b"
)

// Other returns the other slot.
func (s SlotName) Other() SlotName {
	if s == SlotA {
		return SlotB
	}
	return SlotA
}

// Content says what a slot holds, as its durable record tells. A slot whose
// record is missing or whose Whole is false holds nothing that may be booted.
type Content struct {
	Release verify.Digest `json:"release"` // ID of the manifest; zero for a factory slot
	Version string        `json:"version"`
	Whole   bool          `json:"whole"` // written, synced, read back and equal
}

// Phase is where the boot state stands.
//
//	settled --Try--> armed --restart--> trial --Confirm--> settled (on the new slot)
//	   ^               |                  |
//	   +---Try(booted)-+                  +--no confirm: attempts used up, or Fallback--> settled (on the old slot)
type Phase string

// The phases.
const (
	PhaseSettled Phase = "settled" // the default slot runs
	PhaseArmed   Phase = "armed"   // the next start boots Trial once
	PhaseTrial   Phase = "trial"   // Trial runs and is not confirmed yet
)

// State is what a Slots implementation observes; it is never cached where the slots are (apply.Client says what it keeps).
type State struct {
	Phase   Phase                `json:"phase"`
	Booted  SlotName             `json:"booted"` // on trial always Trial; differs from Default when settled until a trial given up has restarted
	Default SlotName             `json:"default"`
	Trial   SlotName             `json:"trial,omitempty"`  // set when armed or on trial
	Left    int                  `json:"left,omitempty"`   // starts left before the old slot is taken again
	Failed  SlotName             `json:"failed,omitempty"` // slot of a trial that fell back since the last Forget
	Why     string               `json:"why,omitempty"`    // beside Failed: what is known, when the system on trial did not live to say it
	Slots   map[SlotName]Content `json:"slots"`
	Kept    []Content            `json:"kept,omitempty"` // versions beside the slots, newest first, at most MaxKept; see Files.Restore
}

// Source opens the distributed bytes of an image; the caller closes it.
type Source func(img verify.Image) (io.ReadCloser, error)

// Slots is a device's pair of slots with their boot state. Every change is
// durable when the method returns nil. A fault leaves either the old state or
// the new one, never a slot that can be booted and is not Whole.
type Slots interface {
	// State observes slots and boot state.
	State(ctx context.Context) (State, error)

	// Write puts the images of rel (those for this device, in order) into the slot that is neither booted nor default. The record
	// of that slot is removed first and written last, after the content was synced, read back and compared with the signed digest
	// of the content. It refuses with E-BUSY unless the phase is settled, with E-SPACE before the first byte, with E-SLOT when the
	// read-back differs. progress, if not nil, is told bytes of content written so far.
	Write(ctx context.Context, rel *verify.Release, images []verify.Image, open Source, progress func(done, total int64)) error

	// Try arms the slot for trial starts: the next restart boots it, and falls back unless confirmed. It refuses with E-BOOT when the
	// slot is not Whole. Trying the booted slot disarms.
	Try(ctx context.Context, slot SlotName) error

	// Restart makes the device or the application start from the armed slot (or again from the present one). For a real
	// bootloader it does not return in practice.
	Restart(ctx context.Context) error

	// Confirm makes the slot on trial the default. It refuses with E-BOOT unless the phase is trial.
	Confirm(ctx context.Context) error

	// Fallback gives the trial up: the default slot is booted again by the next Restart, and State.Failed names the slot.
	Fallback(ctx context.Context) error

	// Forget clears State.Failed after the failure was recorded.
	Forget(ctx context.Context) error
}
