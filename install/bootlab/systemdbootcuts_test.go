package bootlab_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// TestSystemdBootPowerCuts kills a user-mode Linux while the back end writes to its ESP, and judges each disk as systemd-boot would
// find it, and as a kernel does. Then each machine starts again, by the slot that it would start, and has to come to an end.
func TestSystemdBootPowerCuts(t *testing.T) {
	torture(t)
	cuts := 210
	if n, err := strconv.Atoi(os.Getenv("MESHUPD_LAB_CUTS")); err == nil {
		cuts = n
	}
	user, l := userKernel(t), newEFILab(t, "systemd-boot", 1)
	dir := ramDir(t)
	fresh, err := l.NewDisk(t.Context(), filepath.Join(dir, "fresh.img"))
	must(t, "make a disk", err)
	trial, err := fresh.Copy(filepath.Join(dir, "trial.img"))
	must(t, "copy the disk", err)
	m := bootlab.Machine{Kind: l.Kind, UserMode: user, Disk: trial, Stick: l.Releases[0].Bundle, Slot: install.SlotA, Scenario: bootlab.Scenario{Starts: 3}}
	wantTold(t, live(t, m), "BOOT slot=a, WROTE, ARMED, RESTART")
	sum := &tally{harm: make(map[bootlab.Harm]int), stands: make(map[bootlab.Stand]int), scenes: make(map[string]int)}
	scenes := []scene{
		{name: "update", disk: fresh, slot: install.SlotA, after: []bootlab.Marker{bootlab.MarkerTrying, bootlab.MarkerWrote, bootlab.MarkerArmed, bootlab.MarkerQuarter}},
		{name: "confirm", disk: trial, slot: install.SlotB, stand: bootlab.Stand(bootlab.MarkerArmed),
			after: []bootlab.Marker{bootlab.MarkerConfirming, bootlab.MarkerTrial, bootlab.MarkerConfirmed}},
		{name: "give up", disk: trial, slot: install.SlotB, stand: bootlab.Stand(bootlab.MarkerArmed), trial: bootlab.TrialSick,
			after: []bootlab.Marker{bootlab.MarkerGivingUp, bootlab.MarkerGaveUp, bootlab.MarkerRecording}},
	}
	for n := range cuts {
		s := scenes[n%len(scenes)]
		d, err := s.disk.Copy(filepath.Join(dir, "cut.img"))
		must(t, "copy the disk", err)
		m.Disk, m.Slot, m.Scenario.Trial = d, s.slot, s.trial
		lines := cutAfter(t, m, s.after[n/len(scenes)%len(s.after)], 20*time.Millisecond)
		stand := s.stand
		for _, line := range lines {
			stand = stand.Move(line.Marker)
		}
		harm, why, err := d.Judge(l, firstUpdate, stand, dir)
		must(t, "judge the disk", err)
		if harm != bootlab.HarmNone {
			t.Errorf("cut %d, %s, behind %q: %s: %s", n, s.name, stand, harm, why)
		}
		sum.cuts++
		sum.harm[harm]++
		sum.stands[stand]++
		sum.scenes[s.name]++
		if n%5 == 0 {
			sum.boots++
			again(t, l, m, dir)
		}
	}
	t.Logf("systemd-boot power cuts: %s", fmt.Sprintf("cuts=%d in %v; promised by then %v; harm %v; started again %d", sum.cuts, sum.scenes, sum.stands, sum.harm, sum.boots))
}

// again starts what is left of a machine until nothing is left to do, by the slot that its bootloader would start.
func again(t *testing.T, l *bootlab.Lab, m bootlab.Machine, dir string) {
	t.Helper()
	m.Scenario.Trial = bootlab.TrialGood
	for range 5 {
		turn, err := m.Disk.Turn(l.Kind, dir)
		must(t, "read the bootloader's choice", err)
		m.Slot = turn.Next
		lines := live(t, m)
		if lines[len(lines)-1].Marker != bootlab.MarkerOff {
			continue
		}
		if turn, err = m.Disk.Turn(l.Kind, dir); err != nil || turn.Next != turn.Default {
			t.Errorf("at the end the bootloader would start %+v, %v", turn, err)
		}
		return
	}
	t.Error("the machine comes to no end")
}
