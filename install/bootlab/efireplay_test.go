package bootlab_test

import (
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// TestSystemdBootWriteLog records an update and its confirmation, the renames of systemd-boot in the firmware's FAT driver
// included, and replays what the disk was told.
func TestSystemdBootWriteLog(t *testing.T) {
	torture(t)
	l := newEFILab(t, "systemd-boot", 1)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	r := record(t, bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle, Scenario: bootlab.Scenario{Starts: 3}})
	wantTold(t, live(t, r.Machine), "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
	wantNoHarm(t, r.replay(t, l, firstUpdate, ""))
}

// TestSystemdBootPrefixes records two updates on a FAT that a user-mode Linux writes, and judges the disk behind each write. Its
// block driver drops flushes, so that each write is synced here: a disk without a cache.
func TestSystemdBootPrefixes(t *testing.T) {
	torture(t)
	user, l := userKernel(t), newEFILab(t, "systemd-boot", 2)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	second := bootlab.Story{From: install.SlotB, To: install.SlotA, Before: "2.0.0", After: "2.1.0"}
	for release, story := range []bootlab.Story{firstUpdate, second} {
		var all bootlab.Count
		m := bootlab.Machine{Kind: l.Kind, UserMode: user, Disk: d, Stick: l.Releases[release].Bundle, Scenario: bootlab.Scenario{Starts: 3}}
		for _, half := range []struct {
			slot  install.SlotName
			stand bootlab.Stand
			told  string
		}{
			{story.From, "", "WROTE, ARMED, RESTART"},
			{story.To, bootlab.Stand(bootlab.MarkerArmed), "TRIAL, CONFIRMED, SETTLED, OFF"},
		} {
			m.Slot = half.slot
			r := record(t, m)
			wantTold(t, live(t, r.Machine), "BOOT slot="+string(half.slot)+", "+half.told)
			all.Add(r.replay(t, l, story, half.stand))
		}
		wantNoHarm(t, all)
	}
}
