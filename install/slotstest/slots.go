package slotstest

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// Run holds an implementation of install.Slots against the contract. make returns a fresh device for each story.
func Run(t *testing.T, make func(t *testing.T) Harness) {
	RunFrom(t, verifytest.NewVendor(t, "slotstest"), make)
}

// RunFrom is Run with the releases of a vendor, for devices that verify them again.
func RunFrom(t *testing.T, vendor *verifytest.Vendor, make func(t *testing.T) Harness) {
	known := updates(t, vendor, make(t))
	b, c := known[0], known[1]
	story := func(name string, tell func(t *testing.T, w *world)) {
		t.Run(name, func(t *testing.T) { tell(t, newWorld(t, make, known)) })
	}
	story("two releases, one after the other", func(t *testing.T, w *world) { twoReleases(t, w, b, c) })
	story("a trial is given up", func(t *testing.T, w *world) { givenUp(t, w, b, c) })
	story("a trial that nobody confirms falls back by itself", func(t *testing.T, w *world) { unconfirmed(t, w, b) })
	story("the daemon restarts during a trial", func(t *testing.T, w *world) { daemonRestarts(t, w, b) })
	story("a power cut starts an armed trial", func(t *testing.T, w *world) { cutWhileArmed(t, w, b) })
	story("trying the booted slot disarms", func(t *testing.T, w *world) { disarm(t, w, b) })
	story("what is not allowed is refused", func(t *testing.T, w *world) { refusals(t, w, b) })
	story("bytes that were not signed", func(t *testing.T, w *world) { badBytes(t, w, b) })
	story("a write can be watched, and nothing else goes on", func(t *testing.T, w *world) { watched(t, w, b) })
	story("a write that is stopped", func(t *testing.T, w *world) { stopped(t, w, b) })
	t.Run("a fault at every step", func(t *testing.T) { everyFault(t, make, known) })
}

func (u update) write(ctx context.Context, dev Device) error {
	return dev.Write(ctx, u.rel, u.images, u.source, nil)
}

// toTrial takes a release from nothing to the trial.
func toTrial(t *testing.T, dev Device, u update, slot install.SlotName) {
	t.Helper()
	must(t, "write", u.write(t.Context(), dev))
	must(t, "try", dev.Try(t.Context(), slot))
	if st := state(t, dev); st.Phase != install.PhaseArmed || st.Trial != slot || st.Left != 1 {
		t.Fatalf("after try the state is %+v", st)
	}
	must(t, "restart", dev.Restart(t.Context()))
	if st := state(t, dev); st.Phase != install.PhaseTrial || st.Trial != slot || st.Booted != slot || st.Left != 0 {
		t.Fatalf("after the restart the state is %+v", st)
	}
}

func twoReleases(t *testing.T, w *world, b, c update) {
	dev := w.open(t)
	want(t, w.check(t, dev), install.PhaseSettled, install.SlotA, install.SlotA)
	var told []int64
	must(t, "write", dev.Write(t.Context(), b.rel, b.images, b.source, func(done, total int64) {
		if total != b.total() || done > total || len(told) > 0 && done < told[len(told)-1] {
			t.Errorf("progress went from %v to %d of %d, want up to %d", told, done, total, b.total())
		}
		told = append(told, done)
	}))
	if len(told) == 0 || told[len(told)-1] != b.total() {
		t.Errorf("progress ended at %v, not at %d", told, b.total())
	}
	if got := w.check(t, dev).Slots[install.SlotB]; got != (install.Content{Release: b.rel.ID(), Version: b.rel.Manifest().Version, Whole: true}) {
		t.Fatalf("slot b holds %+v", got)
	}
	toTrial(t, dev, b, install.SlotB)
	w.check(t, dev)
	must(t, "confirm", dev.Confirm(t.Context()))
	want(t, w.check(t, dev), install.PhaseSettled, install.SlotB, install.SlotB)

	dev = w.powerCycle(t)
	want(t, state(t, dev), install.PhaseSettled, install.SlotB, install.SlotB)
	toTrial(t, dev, c, install.SlotA)
	must(t, "confirm", dev.Confirm(t.Context()))
	dev = w.powerCycle(t)
	st := w.check(t, dev)
	want(t, st, install.PhaseSettled, install.SlotA, install.SlotA)
	if st.Slots[install.SlotA].Release != c.rel.ID() || st.Slots[install.SlotB].Release != b.rel.ID() {
		t.Fatalf("the slots hold %+v", st.Slots)
	}
}

func givenUp(t *testing.T, w *world, b, c update) {
	dev := w.open(t)
	toTrial(t, dev, b, install.SlotB)
	must(t, "fall back", dev.Fallback(t.Context()))
	st := w.check(t, dev)
	want(t, st, install.PhaseSettled, install.SlotB, install.SlotA)
	if st.Failed != install.SlotB {
		t.Fatalf("the failed slot is %q", st.Failed)
	}
	refused(t, "write over the slot that still runs", c.write(t.Context(), dev), verify.CodeBusy)
	must(t, "restart", dev.Restart(t.Context()))
	st = w.check(t, dev)
	want(t, st, install.PhaseSettled, install.SlotA, install.SlotA)
	if st.Failed != install.SlotB {
		t.Fatalf("the restart forgot the failure: %+v", st)
	}
	dev = w.powerCycle(t)
	if st := state(t, dev); st.Failed != install.SlotB {
		t.Fatalf("the power cut forgot the failure: %+v", st)
	}
	must(t, "forget", dev.Forget(t.Context()))
	must(t, "forget again", dev.Forget(t.Context()))
	dev = w.powerCycle(t)
	if st := state(t, dev); st.Failed != "" {
		t.Fatalf("the failure was not forgotten: %+v", st)
	}
	toTrial(t, dev, c, install.SlotB)
	must(t, "confirm", dev.Confirm(t.Context()))
	want(t, w.check(t, dev), install.PhaseSettled, install.SlotB, install.SlotB)
}

func unconfirmed(t *testing.T, w *world, b update) {
	dev := w.open(t)
	toTrial(t, dev, b, install.SlotB)
	dev = w.powerCycle(t)
	st := w.check(t, dev)
	want(t, st, install.PhaseSettled, install.SlotA, install.SlotA)
	if st.Failed != install.SlotB {
		t.Fatalf("the failed slot is %q", st.Failed)
	}
	if at := w.h.Pointed(); at != install.SlotA {
		t.Fatalf("the next start would use slot %s", at)
	}
}

func daemonRestarts(t *testing.T, w *world, b update) {
	dev := w.open(t)
	toTrial(t, dev, b, install.SlotB)
	for range 3 {
		dev = w.open(t)
		want(t, state(t, dev), install.PhaseTrial, install.SlotB, install.SlotA)
	}
	must(t, "confirm", dev.Confirm(t.Context()))
	want(t, w.check(t, w.powerCycle(t)), install.PhaseSettled, install.SlotB, install.SlotB)
}

func cutWhileArmed(t *testing.T, w *world, b update) {
	dev := w.open(t)
	must(t, "write", b.write(t.Context(), dev))
	must(t, "try", dev.Try(t.Context(), install.SlotB))
	dev = w.open(t)
	if st := state(t, dev); st.Phase != install.PhaseArmed {
		t.Fatalf("a start of the daemon alone changed an armed trial: %+v", st)
	}
	dev = w.powerCycle(t)
	want(t, state(t, dev), install.PhaseTrial, install.SlotB, install.SlotA)
	must(t, "confirm", dev.Confirm(t.Context()))
	want(t, w.check(t, dev), install.PhaseSettled, install.SlotB, install.SlotB)
}

func disarm(t *testing.T, w *world, b update) {
	dev := w.open(t)
	must(t, "write", b.write(t.Context(), dev))
	must(t, "try", dev.Try(t.Context(), install.SlotB))
	must(t, "try the booted slot", dev.Try(t.Context(), install.SlotA))
	must(t, "try the booted slot again", dev.Try(t.Context(), install.SlotA))
	must(t, "restart", dev.Restart(t.Context()))
	st := w.check(t, w.powerCycle(t))
	want(t, st, install.PhaseSettled, install.SlotA, install.SlotA)
	if st.Failed != "" || st.Trial != "" || st.Left != 0 {
		t.Fatalf("disarming left something: %+v", st)
	}
}

func refusals(t *testing.T, w *world, b update) {
	ctx := t.Context()
	dev := w.open(t)
	refused(t, "try an empty slot", dev.Try(ctx, install.SlotB), verify.CodeBoot)
	refused(t, "try no slot", dev.Try(ctx, "c"), verify.CodeBoot)
	refused(t, "confirm when settled", dev.Confirm(ctx), verify.CodeBoot)
	refused(t, "fall back when settled", dev.Fallback(ctx), verify.CodeBoot)
	refused(t, "write no image", dev.Write(ctx, b.rel, nil, b.source, nil), verify.CodeFormat)
	strange := slices.Clone(b.images)
	strange[0].SHA256[0] ^= 1
	refused(t, "write an image that is not of the release", dev.Write(ctx, b.rel, strange, b.source, nil), verify.CodeFormat)
	if st := w.check(t, dev); len(st.Slots) != 1 {
		t.Fatalf("a refusal changed the slots: %+v", st)
	}

	must(t, "write", b.write(ctx, dev))
	must(t, "try", dev.Try(ctx, install.SlotB))
	refused(t, "write when armed", b.write(ctx, dev), verify.CodeBusy)
	refused(t, "confirm when armed", dev.Confirm(ctx), verify.CodeBoot)
	must(t, "restart", dev.Restart(ctx))
	refused(t, "write on trial", b.write(ctx, dev), verify.CodeBusy)
	refused(t, "try on trial", dev.Try(ctx, install.SlotA), verify.CodeBusy)
	want(t, w.check(t, dev), install.PhaseTrial, install.SlotB, install.SlotA)
}

func badBytes(t *testing.T, w *world, b update) {
	dev := w.open(t)
	must(t, "write", b.write(t.Context(), dev))
	for name, bad := range b.broken(t) {
		err := dev.Write(t.Context(), b.rel, b.images, bad.source, nil)
		refused(t, name, err, bad.code)
		st := w.check(t, dev)
		want(t, st, install.PhaseSettled, install.SlotA, install.SlotA)
		if st.Slots[install.SlotB].Whole {
			t.Fatalf("%s: the slot counts as whole", name)
		}
		refused(t, name+", tried", dev.Try(t.Context(), install.SlotB), verify.CodeBoot)
		dev = w.powerCycle(t)
	}
	toTrial(t, dev, b, install.SlotB)
	must(t, "confirm", dev.Confirm(t.Context()))
	w.check(t, dev)
}

func watched(t *testing.T, w *world, b update) {
	dev := w.open(t)
	must(t, "write", b.write(t.Context(), dev))
	looked := 0
	err := dev.Write(t.Context(), b.rel, b.images, b.source, func(int64, int64) {
		looked++
		if st := state(t, dev); st.Phase != install.PhaseSettled || st.Slots[install.SlotB].Whole {
			t.Errorf("during the write the state is %+v", st)
		}
		refused(t, "a second write", b.write(t.Context(), dev), verify.CodeBusy)
		refused(t, "try during a write", dev.Try(t.Context(), install.SlotB), verify.CodeBusy)
	})
	must(t, "write", err)
	if looked == 0 {
		t.Fatal("progress was never told")
	}
	w.check(t, dev)
}

func stopped(t *testing.T, w *world, b update) {
	dev := w.open(t)
	ctx, cancel := context.WithCancel(t.Context())
	err := dev.Write(ctx, b.rel, b.images, b.source, func(int64, int64) { cancel() })
	if err == nil || ctx.Err() == nil || verify.CodeOf(err) != "" {
		t.Fatalf("a stopped write returned %v", err)
	}
	if w.check(t, dev).Slots[install.SlotB].Whole {
		t.Fatal("a stopped write left a whole slot")
	}
	must(t, "write again", b.write(t.Context(), dev))
	w.check(t, dev)
}

func label(f fault, kill bool, step string) string {
	kind, what := "lost", "fails"
	if f.kept {
		kind = "kept"
	}
	if f.off {
		what = "power cut"
		if kill {
			what = "killed"
		}
	}
	return fmt.Sprintf("%02d %s, %s, %s", f.at, step, what, kind)
}
