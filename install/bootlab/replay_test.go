package bootlab_test

import (
	"os"
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// recording is a machine whose writes are recorded.
type recording struct {
	bootlab.Machine
	base []byte
}

// record makes a machine record what it writes to its disk from now on.
func record(t *testing.T, m bootlab.Machine) recording {
	t.Helper()
	base, err := os.ReadFile(m.Disk.Path)
	must(t, "read the disk", err)
	m.Log = filepath.Join(ramDir(t), "log")
	must(t, "make the log", os.WriteFile(m.Log, nil, 0o600))
	m.Scenario.Marks = true
	return recording{m, base}
}

// replay judges every disk that a cut could have left of the recorded run.
func (r recording) replay(t *testing.T, l *bootlab.Lab, story bootlab.Story, stand bootlab.Stand) bootlab.Count {
	t.Helper()
	entries, err := bootlab.ReadLog(r.Log, int64(len(r.base)))
	must(t, "read the log", err)
	seeds := 5
	if os.Getenv("MESHUPD_TORTURE") != "" {
		seeds = 200
	}
	re := bootlab.Replay{Kind: l.Kind, Story: story, Stand: stand, Holds: l.Holds, Base: r.base, Log: entries, Seeds: seeds, Linux: true}
	count := re.Run(ramDir(t))
	t.Logf("%s write log: %s", l.Kind.Name, count)
	return count
}

// wantNoHarm also wants the log to hold a whole update.
func wantNoHarm(t *testing.T, c bootlab.Count) {
	t.Helper()
	if c.Harmed() > 0 {
		t.Errorf("a cut would have done harm: %q", c.First)
	}
	for _, m := range []bootlab.Marker{"", bootlab.MarkerTrying, bootlab.MarkerArmed, bootlab.MarkerConfirming, bootlab.MarkerConfirmed} {
		if c.Behind[bootlab.Stand(m)] == 0 {
			t.Errorf("no disk behind the mark %q was judged", m)
		}
	}
	if c.Flushes == 0 || c.Boots < 4 || c.Views < 4 {
		t.Errorf("the log does not hold a whole update: %s", c)
	}
}

var firstUpdate = bootlab.Story{From: install.SlotA, To: install.SlotB, Before: bootlab.FactoryVersion, After: "2.0.0"}

// TestGRUBWriteLog records two updates after each other, firmware and GRUB included, and replays what the disk was told to write.
func TestGRUBWriteLog(t *testing.T) {
	torture(t)
	l := newLab(t, 2)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	for _, update := range []struct {
		bundle string
		story  bootlab.Story
		told   string
	}{
		{l.Releases[0].Bundle, firstUpdate, "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF"},
		{l.Releases[1].Bundle, bootlab.Story{From: install.SlotB, To: install.SlotA, Before: "2.0.0", After: "2.1.0"},
			"BOOT slot=b, WROTE, ARMED, RESTART, BOOT slot=a, TRIAL, CONFIRMED, SETTLED, OFF"},
	} {
		m := record(t, bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: update.bundle})
		wantTold(t, live(t, m.Machine), update.told)
		wantNoHarm(t, m.replay(t, l, update.story, ""))
	}
}

// TestRenameIsNoticed has the environment written as GRUB must not have it, and wants the lab to say so.
func TestRenameIsNoticed(t *testing.T) {
	torture(t)
	l := newLab(t, 1)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle, Slot: install.SlotA}
	wantTold(t, live(t, m), "BOOT slot=a, WROTE, ARMED, RESTART")
	m.Slot, m.Scenario.Rename = install.SlotB, true
	r := record(t, m)
	wantTold(t, live(t, r.Machine), "BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
	c := r.replay(t, l, firstUpdate, bootlab.Stand(bootlab.MarkerArmed))
	if c.Harm[bootlab.HarmLost] == 0 {
		t.Errorf("the environment was renamed into place, and nothing was noticed: %s", c)
	}
	t.Logf("noticed: %q", c.First)
}
