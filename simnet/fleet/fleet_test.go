package fleet_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"meshupd/install"
	"meshupd/peer"
	. "meshupd/simnet/fleet"
	"meshupd/verify"
)

const (
	mib  = 1 << 20
	mbit = 1e6 / 8 // bytes per second
)

// rate of each link in bytes per second. With a small image, which keeps the CPU
// out of it, a fast link would be done before the devices have heard of each
// other's first pieces; so the link is slow, and 4 MiB stand for 40 on a LAN.
const rate = 10 * mbit

// play runs a scenario in fake time.
func play(t *testing.T, s Scenario) (r Result) {
	t.Helper()
	dir := t.TempDir()
	if os.Getenv("FLEET_LOG") != "" { // to look into a failure
		s.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if s.Image == 0 {
		s.Image = 2 * mib
	}
	if s.Up == 0 {
		s.Up, s.Down = rate, rate
	}
	begun := time.Now()
	synctest.Test(t, func(t *testing.T) {
		var err error
		if r, err = Run(t.Context(), dir, s); err != nil {
			t.Error(err)
		}
		if err := r.Check(); err != nil {
			t.Error(err)
		}
	})
	t.Logf("%v of a site in %v", r.Took, time.Since(begun))
	return r
}

// TestTheSameInRealTime runs before the bubbles, which are parallel tests.
func TestTheSameInRealTime(t *testing.T) {
	r, err := Run(t.Context(), t.TempDir(), Scenario{Devices: 3, Image: mib, Up: 100 * mbit, Down: 100 * mbit, Events: []Event{
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Confirmed(0)},
		{Do: Kill(1)},
		{Do: Start(1)},
		{When: Both(Met(), Confirmed(0))},
	}})
	if err := errors.Join(err, r.Check()); err != nil {
		t.Fatal(err)
	}
	goleak.VerifyNone(t)
}

func TestAnEventThatCannotBeIsAnError(t *testing.T) {
	t.Parallel()
	for name, events := range map[string][]Event{
		"never happens":    {{When: Confirmed(0)}},
		"impossible":       {{Do: Start(0)}},
		"a device is gone": {{Do: Kill(0)}, {Do: Import(0, 0)}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				if _, err := Run(t.Context(), dir, Scenario{Devices: 1, Image: 1, Limit: 5 * time.Minute, Events: events}); err == nil {
					t.Error("the scenario went well")
				}
			})
		})
	}
}

// total of all devices.
func total(r Result, of func(Device) int64) (n int64) {
	for _, d := range r.Devices {
		n += of(d)
	}
	return n
}

// ends checks how a device came to rest.
func ends(t *testing.T, d Device, state peer.DeviceState, version string) {
	t.Helper()
	if d.State != state || d.Version != version {
		t.Errorf("%s is %s with version %s, reason %v; it went %v", d.Name, d.State, d.Version, d.Reason, d.Steps)
	}
}

// count tells how often something is in a device's own history.
func count(d Device, kind peer.EventKind) (n int) {
	for _, e := range d.History {
		if e.Device == d.ID && e.Kind == kind {
			n++
		}
	}
	return n
}

func TestOneStickServesTheSite(t *testing.T) {
	t.Parallel()
	r := play(t, Scenario{Devices: 8, Image: 8 * mib, Events: []Event{
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Confirmed(0)},
	}})
	image := r.Releases[0].Image
	for i, d := range r.Devices {
		ends(t, d, peer.StateConfirmed, "2.0.0")
		if d.Booted != install.SlotB {
			t.Errorf("%s starts from slot %s", d.Name, d.Booted)
		}
		if n := count(d, peer.EventConfirmed); n != 1 {
			t.Errorf("%s confirmed %d times", d.Name, n)
		}
		if got := d.Received(image.SHA256); i > 0 && got != image.Size {
			t.Errorf("%s received %d verified bytes of %d", d.Name, got, image.Size)
		}
	}
	first := r.Devices[0]
	if sent := first.Sent(image.SHA256); sent < image.Size || float64(sent) >= 1.1*float64(image.Size) {
		t.Errorf("the device with the stick sent %d bytes of payload, the image has %d", sent, image.Size)
	}
	// The cable agrees with what the swarm counts.
	if sent := first.LANSent; sent < image.Size || float64(sent) >= 1.2*float64(image.Size) {
		t.Errorf("%d bytes left the device with the stick, the image has %d", sent, image.Size)
	}
	// With equal links the last device cannot have it before it has crossed one of them. This is fake time, in which
	// no CPU is busy: what is above the bound are silences on the way, and what is said beside the image.
	took, bound := r.Events[2]-r.Events[1], time.Duration(float64(image.Size)/rate*float64(time.Second))
	t.Logf("the last device took %.3f of the bound", float64(took)/float64(bound))
	if float64(took) > 1.2*float64(bound) {
		t.Errorf("the last device was done after %v, the bound is %v", took, bound)
	}
}

func TestALateDeviceCatchesUp(t *testing.T) {
	t.Parallel()
	const last = 2
	r := play(t, Scenario{Devices: 3, Late: []int{last}, Limit: 2 * time.Hour, Events: []Event{
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Confirmed(0, 0, 1)},
		{At: time.Hour, Do: Start(last)},
		{When: Confirmed(0)},
	}})
	image, late := r.Releases[0].Image, r.Devices[last]
	ends(t, late, peer.StateConfirmed, "2.0.0")
	if took := late.When - r.Events[3]; took > time.Minute {
		t.Errorf("the late device needed %v", took)
	}
	if sent := total(r, func(d Device) int64 { return d.Sent(image.SHA256) }); sent < 2*image.Size {
		t.Errorf("two devices fetched %d bytes, and only %d were sent", image.Size, sent)
	}
}

func TestAPartitionHeals(t *testing.T) {
	t.Parallel()
	left, right := []int{0, 1}, []int{2, 3}
	var during [4]peer.DeviceState
	r := play(t, Scenario{Devices: 4, Limit: 2 * time.Hour, Events: []Event{
		{When: Met()},
		{Do: Partition(left, right)},
		{When: Both(Sees(0, 3, peer.StateSilent), Sees(3, 0, peer.StateSilent))},
		{Do: Import(0, 0)},
		{When: Confirmed(0, left...)},
		{Wait: 30 * time.Minute, Do: Do("look at both halves", func(_ context.Context, f *Fleet) error {
			for i := range during {
				st, _ := f.Status(i)
				during[i] = peer.DeviceState(st.State)
			}
			return nil
		})},
		{Do: Heal()},
		{When: Both(Confirmed(0), Met())},
	}})
	for _, i := range right {
		if during[i] != peer.StateWaiting {
			t.Errorf("d%02d was %s on the far side of the partition", i, during[i])
		}
		ends(t, r.Devices[i], peer.StateConfirmed, "2.0.0")
	}
	if took := r.Events[7] - r.Events[6]; took > 2*time.Minute {
		t.Errorf("the site needed %v after the heal", took)
	}
}

func TestAKilledDeviceGoesOn(t *testing.T) {
	t.Parallel()
	var kept int64
	r := play(t, Scenario{Devices: 3, Image: 4 * mib, Events: []Event{
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Holds(2, 0, 0.4)},
		{Do: Kill(2)},
		{Do: Do("look at the disk", func(_ context.Context, f *Fleet) (err error) { kept, err = f.Kept(2, 0); return err })},
		{Wait: time.Minute, Do: Start(2)},
		{When: Confirmed(0)},
	}})
	image, d := r.Releases[0].Image, r.Devices[2]
	ends(t, d, peer.StateConfirmed, "2.0.0")
	if len(d.Lives) != 2 {
		t.Fatalf("it lived %d times", len(d.Lives))
	}
	before, after := d.Lives[0].Received[image.SHA256], d.Lives[1].Received[image.SHA256]
	if before < image.Size*4/10 || before == image.Size {
		t.Errorf("the kill came after %d of %d bytes", before, image.Size)
	}
	if before+after > image.Size {
		t.Errorf("%d bytes before the kill and %d after are more than the image's %d", before, after, image.Size)
	}
	// A piece that came just before the end may be found by its hash, so less may come after.
	if kept < before-image.Pieces.Length || after > image.Size-kept {
		t.Errorf("the disk kept %d of %d bytes, and %d of %d came after", kept, before, after, image.Size)
	}
	if got := d.LANReceived; got > image.Size*5/4 {
		t.Errorf("%d bytes came over the cable for an image of %d", got, image.Size)
	}
}

func TestAnUnhealthyDeviceTriesOnce(t *testing.T) {
	t.Parallel()
	r := play(t, Scenario{Devices: 3, Limit: 48 * time.Hour, Events: []Event{
		{When: Met()},
		{Do: Unhealthy(1)},
		{Do: Import(0, 0)},
		{When: Both(Confirmed(0, 0, 2), Is(1, peer.StateRolledBack), Sees(0, 1, peer.StateRolledBack))},
		{Wait: 15 * time.Minute},
		// An idle site is work even when its time is free, so the day passes with the devices switched off: what
		// keeps the device from another trial has to be on its disk, and the others offer the release anew.
		{Do: Together(Kill(0), Kill(1), Kill(2))},
		{Wait: 12 * time.Hour, Do: Together(Start(0), Start(1), Start(2))},
		{When: Met()},
		{Wait: 5 * time.Minute, Do: Together(Kill(0), Kill(1), Kill(2))},
		{At: 24 * time.Hour, Do: Together(Start(0), Start(1), Start(2))},
		{When: Met()},
		{Wait: 5 * time.Minute, When: Both(Confirmed(0, 0, 2), Sees(0, 1, peer.StateRolledBack))},
	}})
	bad := r.Devices[1]
	ends(t, bad, peer.StateRolledBack, "1.0.0")
	ends(t, r.Devices[0], peer.StateConfirmed, "2.0.0")
	ends(t, r.Devices[2], peer.StateConfirmed, "2.0.0")
	if bad.Reason == nil || bad.Reason.Code != verify.CodeHealth {
		t.Errorf("the reason is %v", bad.Reason)
	}
	if bad.Trials != 1 || count(bad, peer.EventRolledBack) != 1 {
		t.Errorf("%d trials, and %d times in the history", bad.Trials, count(bad, peer.EventRolledBack))
	}
	if bad.Booted != install.SlotA {
		t.Errorf("it starts from slot %s", bad.Booted)
	}
}

func TestAFullDiskBlocksUntilThereIsSpace(t *testing.T) {
	t.Parallel()
	var blocked *peer.Reason
	r := play(t, Scenario{Devices: 3, Events: []Event{
		{Do: FullDisk(1)},
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Both(Confirmed(0, 0, 2), Is(1, peer.StateBlocked), Sees(0, 1, peer.StateBlocked))},
		{Wait: 10 * time.Minute, Do: Do("ask why", func(_ context.Context, f *Fleet) error {
			st, _ := f.Status(1)
			blocked = st.Reason
			return nil
		})},
		{Do: FreeDisk(1)},
		{When: Confirmed(0)},
	}})
	if blocked == nil || blocked.Code != verify.CodeSpace || blocked.NeedBytes <= 0 {
		t.Errorf("the full device said %v", blocked)
	}
	ends(t, r.Devices[1], peer.StateConfirmed, "2.0.0")
	if got, want := r.Devices[1].Received(r.Releases[0].Image.SHA256), r.Releases[0].Image.Size; got != want {
		t.Errorf("it received %d of %d bytes", got, want)
	}
}

func TestACutDeviceIsSilent(t *testing.T) {
	t.Parallel()
	const cut = 2
	silent := Both(Sees(0, cut, peer.StateSilent), Sees(1, cut, peer.StateSilent), Sees(3, cut, peer.StateSilent), Sees(cut, 0, peer.StateSilent))
	r := play(t, Scenario{Devices: 4, Events: []Event{
		{When: Met()},
		{Wait: 5 * time.Minute, Do: Cut(cut)},
		{When: silent},
		{Wait: 5 * time.Minute, When: silent, Do: Restore(cut)},
		{When: Met()},
	}})
	if took := r.Events[2] - r.Events[1]; took < 45*time.Second || took > 75*time.Second {
		t.Errorf("the cut device was silent after %v", took)
	}
	if took := r.Events[4] - r.Events[3]; took > time.Minute {
		t.Errorf("it was heard again after %v", took)
	}
}

func TestTwoReleasesAtOnceEndOnTheNewer(t *testing.T) {
	t.Parallel()
	r := play(t, Scenario{Devices: 5, Releases: 2, Events: []Event{
		{When: Met()},
		{Do: Together(Import(0, 0), Import(4, 1))},
		{When: Confirmed(1)},
		{Wait: time.Minute, When: Confirmed(1)},
	}})
	for _, d := range r.Devices {
		ends(t, d, peer.StateConfirmed, "3.0.0")
	}
}

func TestANewerReleaseOvertakesAFetch(t *testing.T) {
	t.Parallel()
	r := play(t, Scenario{Devices: 5, Releases: 2, Image: 4 * mib, Events: []Event{
		{When: Met()},
		{Do: Import(0, 0)},
		{When: Holds(4, 0, 0.2)},
		{Do: Import(1, 1)},
		{When: Confirmed(1)},
	}})
	old, image := r.Releases[0].Image, r.Releases[1].Image
	for i, d := range r.Devices {
		ends(t, d, peer.StateConfirmed, "3.0.0")
		if i > 1 && d.Received(image.SHA256) != image.Size {
			t.Errorf("%s received %d bytes of the newer image", d.Name, d.Received(image.SHA256))
		}
		if got := d.Received(old.SHA256); i > 0 && got > old.Size*9/10 {
			t.Errorf("%s went on fetching the old image, %d bytes", d.Name, got)
		}
	}
}
