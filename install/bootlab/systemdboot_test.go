package bootlab_test

import (
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// TestSystemdBoot boots OVMF and systemd-boot: a release that is confirmed, and one that dies three times.
func TestSystemdBoot(t *testing.T) {
	torture(t)
	l := newEFILab(t, "systemd-boot", 2)
	disk := func(t *testing.T) bootlab.Disk {
		d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
		must(t, "make a disk", err)
		return d
	}
	t.Run("a good release is confirmed and stays", func(t *testing.T) {
		d := disk(t)
		m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle, Scenario: bootlab.Scenario{Starts: 3}}
		lines := live(t, m)
		wantTold(t, lines, "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
		if st := last(t, lines); st.Phase != install.PhaseTrial || st.Left != 2 {
			t.Errorf("on trial the slots are %+v: systemd-boot counts one of three starts", st)
		}
		wantEntries(t, d, "meshupd-000003-b.conf")
		wantSettled(t, l, d, install.SlotB, "2.0.0")
		lines = live(t, m)
		wantTold(t, lines, "BOOT slot=b, SETTLED, OFF")
		if st := last(t, lines); st.Phase != install.PhaseSettled || st.Default != install.SlotB || st.Slots[install.SlotB].Version != "2.0.0" {
			t.Fatalf("after another start the slots are %+v", st)
		}
	})
	t.Run("a release that dies three times gives way to the old one, and to a better one", func(t *testing.T) {
		d := disk(t)
		m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle}
		m.Scenario = bootlab.Scenario{Starts: 3, Trial: bootlab.TrialPanic}
		lines := live(t, m)
		wantTold(t, lines, "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, BOOT slot=b, BOOT slot=b, BOOT slot=a, RECORDED, SETTLED, OFF")
		if st := last(t, lines); st.Phase != install.PhaseSettled || st.Default != install.SlotA || st.Failed != install.SlotB {
			t.Fatalf("after the fallback the slots are %+v", st)
		}
		wantEntries(t, d, "meshupd-000001-a.conf")
		wantSettled(t, l, d, install.SlotA, bootlab.FactoryVersion)
		m.Stick, m.Scenario.Trial = l.Releases[1].Bundle, bootlab.TrialGood
		wantTold(t, live(t, m), "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
		wantSettled(t, l, d, install.SlotB, "2.1.0")
	})
}

func wantEntries(t *testing.T, d bootlab.Disk, want ...string) {
	t.Helper()
	names, err := d.Entries()
	must(t, "read the entries", err)
	if len(names) != len(want) {
		t.Fatalf("the ESP holds %q, not %q", names, want)
	}
	for i := range want {
		if names[i] != want[i] {
			t.Fatalf("the ESP holds %q, not %q", names, want)
		}
	}
}
