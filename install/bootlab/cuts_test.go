package bootlab_test

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// scene is a moment of an update from which a machine is started to be cut.
type scene struct {
	name  string
	disk  bootlab.Disk
	slot  install.SlotName // "": through firmware and bootloader
	story bootlab.Story
	stand bootlab.Stand
	stick string
	trial bootlab.TrialEnd
	after []bootlab.Marker // cut a little after one of these
	took  time.Duration    // from BOOT to the end, once, uncut
}

func (s scene) machine(l *bootlab.Lab, d bootlab.Disk) bootlab.Machine {
	return bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Slot: s.slot, Stick: s.stick, Scenario: bootlab.Scenario{Trial: s.trial}}
}

// scenes lets whole machines come to the moments that matter. Where the kernel is started by the lab a restart ends the machine:
// an update is cut into the part that writes and arms, and the part that is on trial.
func scenes(t *testing.T, l *bootlab.Lab, dir string) []*scene {
	t.Helper()
	writes := []bootlab.Marker{bootlab.MarkerBoot, bootlab.MarkerWriting, bootlab.MarkerQuarter, bootlab.MarkerSynced, bootlab.MarkerWrote,
		bootlab.MarkerTrying, bootlab.MarkerArmed}
	confirms := []bootlab.Marker{bootlab.MarkerBoot, bootlab.MarkerTrial, bootlab.MarkerConfirming, bootlab.MarkerConfirmed}
	second := bootlab.Story{From: install.SlotB, To: install.SlotA, Before: "2.0.0", After: "2.1.0"}
	armed, good := bootlab.Stand(bootlab.MarkerArmed), bootlab.TrialGood
	all := []*scene{
		{name: "update", slot: install.SlotA, story: firstUpdate, stick: l.Releases[0].Bundle, trial: good, after: writes},
		{name: "confirm", slot: install.SlotB, story: firstUpdate, stand: armed, stick: l.Releases[0].Bundle, trial: good, after: confirms},
		{name: "second update", slot: install.SlotB, story: second, stick: l.Releases[1].Bundle, trial: good, after: writes},
		{name: "second confirm", slot: install.SlotA, story: second, stand: armed, stick: l.Releases[1].Bundle, trial: good, after: confirms},
	}
	disk, err := l.NewDisk(t.Context(), filepath.Join(dir, "life.img"))
	must(t, "make a disk", err)
	for i, s := range all {
		s.disk, err = disk.Copy(filepath.Join(dir, fmt.Sprintf("scene.%d.img", i)))
		must(t, "copy the disk", err)
		s.took = uncut(t, s.machine(l, disk))
	}
	sick, reboot := *all[1], *all[1]
	sick.name, sick.trial, sick.after = "give up", bootlab.TrialSick, []bootlab.Marker{bootlab.MarkerTrial, bootlab.MarkerGivingUp,
		bootlab.MarkerGaveUp, bootlab.MarkerRecording, bootlab.MarkerRecorded}
	reboot.name, reboot.slot = "GRUB starts the trial", ""
	return append(all, &sick, &reboot)
}

func uncut(t *testing.T, m bootlab.Machine) time.Duration {
	t.Helper()
	run, err := m.Start(t.Context())
	must(t, "switch on", err)
	defer run.Close()
	_, err = run.Until(bootlab.MarkerBoot)
	must(t, "boot", err)
	began := time.Now()
	_, err = run.Rest()
	must(t, "run to the end", err)
	return time.Since(began)
}

// tally counts what the cuts came to.
type tally struct {
	mu sync.Mutex // owns:

	cuts, boots, confirmed, old int
	harm                        map[bootlab.Harm]int
	stands                      map[bootlab.Stand]int
	scenes                      map[string]int
}

// TestGRUBPowerCuts cuts the power, half of the times a little after a marker, half at any moment, in all phases of two updates that
// follow each other. After each the disk is judged as it lies there and as a kernel finds it, and every tenth is booted for real,
// firmware and GRUB included: it has to come to an end, on the new release or back on the old one.
func TestGRUBPowerCuts(t *testing.T) {
	torture(t)
	cuts := 210
	if n, err := strconv.Atoi(os.Getenv("MESHUPD_LAB_CUTS")); err == nil {
		cuts = n
	}
	l := newLab(t, 2)
	all := scenes(t, l, ramDir(t))
	sum := &tally{harm: make(map[bootlab.Harm]int), stands: make(map[bootlab.Stand]int), scenes: make(map[string]int)}
	t.Run("cuts", func(t *testing.T) {
		for n := range cuts {
			s := all[n%len(all)]
			t.Run(fmt.Sprintf("%d %s", n, s.name), func(t *testing.T) {
				t.Parallel()
				sum.cut(t, l, s, n)
			})
		}
	})
	t.Logf("%s power cuts: cuts=%d in %v; promised by then %v; bricks=%d wrong boots=%d lost confirmations=%d; real boots after=%d, on the new release %d, on the old one %d",
		l.Kind.Name, sum.cuts, sum.scenes, sum.stands, sum.harm[bootlab.HarmBrick], sum.harm[bootlab.HarmWrong], sum.harm[bootlab.HarmLost],
		sum.boots, sum.confirmed, sum.old)
	if cuts < 200 {
		return
	}
	for _, m := range []bootlab.Marker{"", bootlab.MarkerTrying, bootlab.MarkerArmed, bootlab.MarkerConfirming, bootlab.MarkerConfirmed,
		bootlab.MarkerGivingUp, bootlab.MarkerGaveUp} {
		if sum.stands[bootlab.Stand(m)] == 0 {
			t.Errorf("no cut behind %q: the series says nothing about it", m)
		}
	}
}

func (sum *tally) cut(t *testing.T, l *bootlab.Lab, s *scene, n int) {
	dir := ramDir(t)
	d, err := s.disk.Copy(filepath.Join(dir, "cut.img"))
	must(t, "copy the disk", err)
	var lines []bootlab.Line
	round := n / 6
	switch {
	case s.slot == "":
		lines = cutInFirmware(t, s.machine(l, d))
	case round%2 == 0:
		lines = cutAfter(t, s.machine(l, d), s.after[round/2%len(s.after)], 60*time.Millisecond)
	default:
		lines = cutAfter(t, s.machine(l, d), bootlab.MarkerBoot, s.took)
	}
	stand := s.stand
	for _, line := range lines {
		stand = stand.Move(line.Marker)
		if line.Marker == bootlab.MarkerFail {
			t.Errorf("the guest failed: %s", line.Text)
		}
	}
	harm, why, err := d.Judge(l, s.story, stand, dir)
	must(t, "judge the disk", err)
	if harm != bootlab.HarmNone {
		t.Errorf("cut behind %q: %s: %s", stand, harm, why)
	}
	t.Logf("cut behind %q", stand)
	sum.mu.Lock()
	sum.cuts++
	sum.harm[harm]++
	sum.stands[stand]++
	sum.scenes[s.name]++
	boot := sum.cuts%10 == 0
	sum.mu.Unlock()
	if boot {
		sum.boot(t, l, s, d, stand)
	}
}

// boot lets a disk that was cut come to its end for real.
func (sum *tally) boot(t *testing.T, l *bootlab.Lab, s *scene, d bootlab.Disk, stand bootlab.Stand) {
	m := s.machine(l, d)
	m.Slot, m.Scenario.Trial = "", bootlab.TrialGood
	live(t, m)
	turn, err := d.Turn(l.Kind, ramDir(t))
	must(t, "read the bootloader's choice", err)
	if turn.Next != turn.Default {
		t.Errorf("at the end the bootloader would start %+v", turn)
	}
	data, err := d.Part(bootlab.Part(turn.Next))
	must(t, "read the slot", err)
	version := l.Holds(data)
	sum.mu.Lock()
	defer sum.mu.Unlock()
	sum.boots++
	switch {
	case turn.Next == s.story.To && version == s.story.After && stand != bootlab.Stand(bootlab.MarkerGaveUp):
		sum.confirmed++
	case turn.Next == s.story.From && version == s.story.Before && stand != bootlab.Stand(bootlab.MarkerConfirmed):
		sum.old++
	default:
		t.Errorf("behind %q: the machine came to slot %s with %q", stand, turn.Next, version)
	}
}

// cutAfter starts a machine and cuts its power within a time after a marker; a quarter of the cuts come at once. When the machine
// was quicker it is cut as it lies: that is no cut in the middle, and the disk is judged all the same.
func cutAfter(t *testing.T, m bootlab.Machine, at bootlab.Marker, within time.Duration) []bootlab.Line {
	t.Helper()
	run, err := m.Start(t.Context())
	must(t, "switch on", err)
	defer run.Close()
	lines, err := run.Until(at)
	if err != nil && !errors.Is(err, io.EOF) || len(lines) == 0 {
		t.Fatalf("before %s: %v\n%s", at, err, run.Said())
	}
	if rand.IntN(4) > 0 {
		// Not a wait for a state: the moment of the cut is what is random here.
		time.Sleep(time.Duration(rand.Int64N(int64(within))))
	}
	rest, err := run.Cut()
	must(t, "cut", err)
	return append(lines, rest...)
}

// cutInFirmware cuts around the moment in which the bootloader takes note of a start: it says so just before it starts the kernel.
func cutInFirmware(t *testing.T, m bootlab.Machine) []bootlab.Line {
	t.Helper()
	run, err := m.Start(t.Context())
	must(t, "switch on", err)
	defer run.Close()
	_, err = run.Until(bootlab.MarkerLoader)
	must(t, "see the bootloader", err)
	time.Sleep(time.Duration(rand.Int64N(int64(400 * time.Millisecond)))) // as above
	lines, err := run.Cut()
	must(t, "cut", err)
	return lines
}
