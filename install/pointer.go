package install

import (
	"context"
	"sync"
	"time"

	"meshupd/verify"
)

// maxBootID is the longest boot id that is believed; the kernel's has 36 characters.
const maxBootID = 64

// bootStore keeps the boot record and the pointer durably.
type bootStore interface {
	loadBoot() (bootRecord, error)
	saveBoot(bootRecord) error
	pointed() (SlotName, error)
	point(SlotName) error
}

// pointer is the Bootloader of a device whose application is started from the slot that a pointer names. It is also what
// powers the device on: it switches the pointer and runs the restart command.
type pointer struct {
	keep    bootStore
	bootID  func() (string, error)
	whole   func(SlotName) error                  // E-BOOT unless the slot may be booted
	run     func(context.Context, SlotName) error // the restart command; E-RESTART
	machine bool                                  // run restarts the machine

	mu     sync.Mutex // owns the boot record in keep
	taking bool       // a restart command is running
}

var (
	_ Bootloader = (*pointer)(nil)
	_ starter    = (*pointer)(nil)
)

func (p *pointer) Boot(ctx context.Context) (BootState, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, err := p.keep.loadBoot()
	if err != nil {
		return BootState{}, err
	}
	at, err := p.keep.pointed()
	if err != nil {
		return BootState{}, err
	}
	if !r.Open && at != r.Booted {
		return BootState{}, verify.Refuse(verify.CodeBoot, "the boot pointer names slot %s, but slot %s was booted", at, r.Booted)
	}
	return r.state(), nil
}

func (p *pointer) Try(ctx context.Context, slot SlotName, starts int) error {
	if !slot.valid() {
		return verify.Refuse(verify.CodeBoot, "try slot %.8q: there is no such slot", string(slot))
	}
	if starts < 1 || starts > maxStarts {
		return verify.Refuse(verify.CodeBoot, "try slot %s for %d starts: not 1 to %d", slot, starts, maxStarts)
	}
	id, err := p.bootID()
	if err != nil {
		return err
	}
	return p.change(func(r bootRecord) (bootRecord, error) {
		switch {
		case r.Phase == PhaseTrial:
			return r, verify.Refuse(verify.CodeBusy, "try slot %s: slot %s is on trial", slot, r.Trial)
		case slot != r.Booted && slot != r.Default:
			r = r.armed(slot, starts, id)
			r.Armed = time.Now().Unix()
			return r, nil
		case r.Phase == PhaseArmed:
			return r.settledOn(r.Default), nil
		default:
			return r, nil
		}
	})
}

func (p *pointer) Confirm(ctx context.Context) error {
	return p.change(func(r bootRecord) (bootRecord, error) {
		switch {
		case r.Phase == PhaseArmed:
			return r, verify.Refuse(verify.CodeBoot, "confirm slot %s: it was not started yet", r.Trial)
		case r.Phase == PhaseTrial && r.Open:
			return r, verify.Refuse(verify.CodeBoot, "confirm slot %s: its start has not completed", r.Trial)
		case r.Phase == PhaseTrial:
			return r.settledOn(r.Trial), nil
		default:
			r.Failed, r.Why = "", ""
			return r, nil
		}
	})
}

func (p *pointer) Fallback(ctx context.Context) error {
	return p.change(func(r bootRecord) (bootRecord, error) {
		if r.Phase == PhaseSettled {
			return r, verify.Refuse(verify.CodeBoot, "fall back: no slot is on trial")
		}
		return r.fallenBack(), nil
	})
}

// change makes one decision durable.
func (p *pointer) change(decide func(bootRecord) (bootRecord, error)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	old, err := p.keep.loadBoot()
	if err != nil {
		return err
	}
	next, err := decide(old)
	if err != nil || next == old {
		return err
	}
	return p.keep.saveBoot(next)
}

func (p *pointer) restart(ctx context.Context) error {
	return p.turn(ctx, func(r bootRecord, id string, _ SlotName) (bootRecord, deed) { return r.begin(id), deedTake })
}

func (p *pointer) start(ctx context.Context) error {
	return p.turn(ctx, func(r bootRecord, id string, at SlotName) (bootRecord, deed) { return r.wake(id, at, p.machine) })
}

// turn carries one decision out in this order: the record with the start counted, the pointer, the command, the record
// with the start completed. A cut after any of them finds Open set, and wake goes on from there.
func (p *pointer) turn(ctx context.Context, decide func(bootRecord, string, SlotName) (bootRecord, deed)) error {
	id, err := p.bootID()
	if err != nil {
		return err
	}
	r, do, err := p.switchTo(id, decide)
	if err != nil || do != deedTake {
		return err
	}
	err = p.run(ctx, r.target())

	p.mu.Lock()
	defer p.mu.Unlock()
	p.taking = false
	if err != nil || p.machine {
		return err
	}
	// The record may have changed while the command ran: a trial given up meanwhile is not completed by it.
	if now, err := p.keep.loadBoot(); err != nil || now != r {
		return err
	}
	return p.keep.saveBoot(r.ended())
}

// switchTo makes the decision durable and switches the pointer.
func (p *pointer) switchTo(id string, decide func(bootRecord, string, SlotName) (bootRecord, deed)) (bootRecord, deed, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taking {
		return bootRecord{}, deedNone, verify.Refuse(verify.CodeBusy, "restart: the restart command is already running")
	}
	old, err := p.keep.loadBoot()
	if err != nil {
		return old, deedNone, err
	}
	at, err := p.keep.pointed()
	if err != nil {
		return old, deedNone, err
	}
	r, do := decide(old, id, at)
	if r.Why != old.Why && r.Why != "" && p.machine {
		r.Why = withLastWords(r.Why, pstoreFolders, time.Unix(old.Armed, 0))
	}
	if do == deedTake {
		if r, err = p.bootable(r); err != nil {
			return r, deedNone, err
		}
	}
	if r != old {
		if err := p.keep.saveBoot(r); err != nil {
			return r, deedNone, err
		}
	}
	if do != deedTake {
		return r, do, nil
	}
	if at != r.target() {
		if err := p.keep.point(r.target()); err != nil {
			return r, deedNone, err
		}
	}
	p.taking = true
	return r, do, nil
}

// bootable returns r, or r fallen back when the slot on trial has lost its record.
func (p *pointer) bootable(r bootRecord) (bootRecord, error) {
	err := p.whole(r.target())
	if err == nil {
		return r, nil
	}
	if r.Phase != PhaseTrial {
		return r, err
	}
	r = r.fallenBack()
	return r, p.whole(r.target())
}
