package bootlab_test

import (
	"encoding/binary"
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// TestEFI lets OVMF itself choose between the slots: BootNext starts the trial once, BootOrder is what confirmation changes.
func TestEFI(t *testing.T) {
	torture(t)
	l := newEFILab(t, "efi", 2)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle}

	m.Scenario.Trial = bootlab.TrialSilent
	lines := live(t, m)
	wantTold(t, lines, "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, SILENT, BOOT slot=a, RECORDED, SETTLED, OFF")
	if st := last(t, lines); st.Phase != install.PhaseSettled || st.Default != install.SlotA || st.Failed != install.SlotB {
		t.Fatalf("after a trial that was not confirmed the slots are %+v", st)
	}
	wantSettled(t, l, d, install.SlotA, bootlab.FactoryVersion)

	m.Stick, m.Scenario.Trial = l.Releases[1].Bundle, bootlab.TrialGood
	wantTold(t, live(t, m), "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
	wantSettled(t, l, d, install.SlotB, "2.1.0")
	vars, err := d.BootVars()
	must(t, "read the variables of the firmware", err)
	order := vars["BootOrder"]
	for i := 0; i+1 < len(order); i += 2 {
		if n := binary.LittleEndian.Uint16(order[i:]); (n == 0x1002) != (i == 0) || n == 0x1001 {
			t.Errorf("BootOrder is % x: slot b's option first, and slot a's nowhere", order)
		}
	}
	if _, there := vars["BootNext"]; there {
		t.Error("BootNext is still there")
	}
	wantTold(t, live(t, m), "BOOT slot=b, SETTLED, OFF")
}
