package bootlab_test

import (
	"os"
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// userKernel skips where there is none.
func userKernel(t testing.TB) bootlab.UserKernel {
	t.Helper()
	k, err := bootlab.FindUserKernel()
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return k
}

// TestSystemdBootOnFAT lets Linux write the entries to a real FAT, and reads the medium as systemd-boot does. A machine that
// restarts does not sync: what was not made durable by then is lost.
func TestSystemdBootOnFAT(t *testing.T) {
	torture(t)
	user, l := userKernel(t), newEFILab(t, "systemd-boot", 1)
	d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
	must(t, "make a disk", err)
	m := bootlab.Machine{Kind: l.Kind, UserMode: user, Disk: d, Stick: l.Releases[0].Bundle, Scenario: bootlab.Scenario{Starts: 3}}
	for _, start := range []struct {
		slot    install.SlotName
		told    string
		turn    bootlab.Turn
		entries []string
	}{
		{install.SlotA, "BOOT slot=a, WROTE, ARMED, RESTART", bootlab.Turn{Next: install.SlotB, Default: install.SlotA},
			[]string{"meshupd-000001-a.conf", "meshupd-000002-b+3.conf"}},
		{install.SlotB, "BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF", bootlab.Turn{Next: install.SlotB, Default: install.SlotB},
			[]string{"meshupd-000003-b.conf"}},
	} {
		m.Slot = start.slot
		wantTold(t, live(t, m), start.told)
		wantEntries(t, d, start.entries...)
		if turn, err := d.Turn(l.Kind, l.Dir); err != nil || turn != start.turn {
			t.Errorf("systemd-boot would start %+v, %v; want %+v", turn, err, start.turn)
		}
	}
}
