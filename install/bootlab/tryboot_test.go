package bootlab_test

import (
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// TestTrybootWriteLog records updates on a machine whose boot partition is that of a Raspberry Pi: FAT, and autoboot.txt on it. The
// kernel and its driver for FAT are real, the lab starts what the firmware would.
func TestTrybootWriteLog(t *testing.T) {
	torture(t)
	kernel := need(t, "mkfs.vfat", "mcopy", "mtype")
	l, err := bootlab.NewLab(t.Context(), ramDir(t), filepath.Join("..", ".."), bootlab.Kinds["tryboot"], kernel, 2)
	must(t, "make a lab", err)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	for n, story := range []bootlab.Story{firstUpdate, {From: install.SlotB, To: install.SlotA, Before: "2.0.0", After: "2.1.0"}} {
		m := record(t, bootlab.Machine{Kind: l.Kind, Kernel: kernel, Disk: d, Stick: l.Releases[n].Bundle, Slot: story.From})
		wantTold(t, live(t, m.Machine), "BOOT slot="+string(story.From)+", WROTE, ARMED, RESTART")
		log := entriesOf(t, m)
		second := record(t, bootlab.Machine{Kind: l.Kind, Kernel: kernel, Disk: d, Stick: l.Releases[n].Bundle, Slot: story.To})
		wantTold(t, live(t, second.Machine), "BOOT slot="+string(story.To)+", TRIAL, CONFIRMED, SETTLED, OFF")
		wantNoHarm(t, judgeLog(t, l, story, m.base, append(log, entriesOf(t, second)...)))
		wantSettled(t, l, d, story.To, story.After)
	}
}
