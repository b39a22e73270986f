package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/install"
	"meshupd/install/bootlab"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// guest is the device: its slots, its door, and the release that is plugged in.
type guest struct {
	sc       bootlab.Scenario
	slots    *install.Block
	door     *verify.Door
	failures *install.Failures
	rel      *verify.Release // nil: nothing is plugged in
}

// openGuest starts the slots as a daemon does, and takes the plugged-in release through the door.
func openGuest(ctx context.Context, sc bootlab.Scenario) (*guest, error) {
	g := &guest{sc: sc}
	var err error
	say(bootlab.MarkerBoot, "slot=%s version=%s loader=%s scenario=%s", word("meshupd.slot"), version(), word("lab.loader"), sc)
	if sc.Trial == bootlab.TrialPanic && version() != bootlab.FactoryVersion {
		os.Exit(1) // the first process ends, the kernel panics
	}
	if g.slots, err = slotsOf(ctx, sc); err != nil {
		return nil, err
	}
	if err := g.slots.Start(ctx); err != nil {
		return nil, err
	}
	if err := careless(sc); err != nil {
		return nil, err
	}
	if g.failures, err = install.OpenFailures("/data"); err != nil {
		return nil, err
	}
	if err := durable.MkdirAll("/data/door", 0o700); err != nil {
		return nil, err
	}
	if g.door, err = verify.OpenDoor(verify.DoorConfig{Dir: "/data/door", Anchor: "/etc/trust", Product: bootlab.Product}); err != nil {
		return nil, err
	}
	if g.rel, err = g.plugged(ctx); err != nil {
		return nil, err
	}
	st, err := g.slots.State(ctx)
	if err != nil {
		return nil, err
	}
	say(bootlab.MarkerState, "%s", bootlab.FormatState(st))
	return g, nil
}

// plugged verifies what is on the second disk. A release that came before and is older by now is nothing to do.
func (g *guest) plugged(ctx context.Context) (*verify.Release, error) {
	if g.sc.Look {
		return nil, nil
	}
	if err := waitFor(stick()); err != nil {
		return nil, err
	}
	b, done, err := openBundle()
	if err != nil {
		return nil, err
	}
	defer done()
	rel, err := g.door.Check(ctx, b.Head())
	if err != nil {
		return nil, err
	}
	return rel, g.door.Accept(rel)
}

func openBundle() (*verify.UnverifiedBundle, func(), error) {
	f, err := os.Open(stick())
	if err != nil {
		return nil, nil, err
	}
	b, err := verify.OpenBundle(bufio.NewReaderSize(f, 1<<20))
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return b, func() { f.Close() }, nil
}

// source reads an image from the second disk.
func (g *guest) source(verify.Image) (io.ReadCloser, error) {
	b, done, err := openBundle()
	if err != nil {
		return nil, err
	}
	_, r, err := b.NextImage(g.rel)
	if err != nil {
		done()
		return nil, err
	}
	return closing{r, done}, nil
}

type closing struct {
	io.Reader
	done func()
}

func (c closing) Close() error {
	c.done()
	return nil
}

// step does what peer's lifecycle would do next. It returns false when there is nothing left to do.
func (g *guest) step(ctx context.Context, st install.State) (more bool, err error) {
	switch idle := st.Default.Other(); {
	case g.sc.Look:
		return false, nil
	case st.Phase == install.PhaseTrial:
		return true, g.trial(ctx, st)
	case st.Failed != "":
		return true, g.record(ctx, st)
	case st.Phase == install.PhaseArmed, st.Booted != st.Default:
		return false, g.restart(ctx)
	case g.rel == nil, st.Slots[st.Booted].Release == g.rel.ID(), g.failedHere():
		return false, g.stage(bootlab.MarkerSettled, func() error { return nil })
	case st.Slots[idle].Whole && st.Slots[idle].Release == g.rel.ID():
		return true, g.stages(bootlab.MarkerTrying, bootlab.MarkerArmed, func() error { return g.slots.Try(ctx, idle) })
	default:
		return true, g.stages(bootlab.MarkerWriting, bootlab.MarkerWrote, func() error {
			return g.slots.Write(ctx, g.rel, g.rel.Manifest().Images, g.source, quarters())
		})
	}
}

// trial ends the trial as the scenario wants it.
func (g *guest) trial(ctx context.Context, st install.State) error {
	say(bootlab.MarkerTrial, "slot=%s left=%d", st.Trial, st.Left)
	switch g.sc.Trial {
	case bootlab.TrialSilent:
		say(bootlab.MarkerSilent, "")
		restart("")
	case bootlab.TrialSick:
		c := st.Slots[st.Booted]
		if err := g.failures.Record(install.Failure{Release: c.Release, Version: c.Version, Code: verify.CodeHealth,
			Detail: "the scenario says so", At: time.Now()}); err != nil {
			return err
		}
		return g.stages(bootlab.MarkerGivingUp, bootlab.MarkerGaveUp, func() error { return g.slots.Fallback(ctx) })
	}
	return g.stages(bootlab.MarkerConfirming, bootlab.MarkerConfirmed, func() error {
		if err := g.slots.Confirm(ctx); err != nil {
			return err
		}
		// Only now: a floor above the slot that boots would make the device refuse what it runs.
		if g.rel != nil && st.Slots[st.Booted].Release == g.rel.ID() {
			return g.door.Confirmed(g.rel)
		}
		return nil
	})
}

// record remembers the release of a trial that fell back.
func (g *guest) record(ctx context.Context, st install.State) error {
	c := st.Slots[st.Failed]
	if _, known := g.failures.Failed(c.Release); !known {
		if err := g.failures.Record(install.Failure{Release: c.Release, Version: c.Version, Code: verify.CodeBoot,
			Detail: "the new system was started and did not confirm itself", At: time.Now()}); err != nil {
			return err
		}
	}
	return g.stages(bootlab.MarkerRecording, bootlab.MarkerRecorded, func() error { return g.slots.Forget(ctx) })
}

func (g *guest) failedHere() bool {
	_, failed := g.failures.Failed(g.rel.ID())
	return failed
}

func (g *guest) restart(ctx context.Context) error {
	if err := g.stage(bootlab.MarkerRestart, func() error { return nil }); err != nil {
		return err
	}
	return g.slots.Restart(ctx)
}

// stages says what is about to be done, does it, and says that it is done.
func (g *guest) stages(before, after bootlab.Marker, do func() error) error {
	if g.sc.Marks {
		if err := mark(before); err != nil {
			return err
		}
	}
	say(before, "")
	return g.stage(after, do)
}

func (g *guest) stage(after bootlab.Marker, do func() error) error {
	if err := do(); err != nil {
		return fmt.Errorf("before %s: %w", after, err)
	}
	if err := careless(g.sc); err != nil {
		return err
	}
	if g.sc.Marks {
		if err := mark(after); err != nil {
			return err
		}
	}
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	say(after, "uptime=%d.%03d", now.Sec, now.Nsec/1e6)
	return nil
}

// quarters says when another quarter of the image was written.
func quarters() func(done, total int64) {
	next := int64(1)
	return func(done, total int64) {
		for ; next < 4 && done >= total*next/4; next++ {
			say(bootlab.MarkerQuarter, "%d", next)
		}
	}
}
