package bootlab_test

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// deviceStatus is what these stories look at in "meshupd status --json".
type deviceStatus struct {
	State   string
	Version string
	Reason  *struct{ Code, Detail string }
}

// statuses are what the status said, state by state, and at the end.
func statuses(t *testing.T, lines []bootlab.Line) (states string, end deviceStatus) {
	t.Helper()
	var all []string
	for _, line := range lines {
		if line.Marker != bootlab.MarkerStatus {
			continue
		}
		var site struct{ Devices []deviceStatus }
		must(t, "read the status", json.Unmarshal([]byte(line.Text), &site))
		end = site.Devices[0]
		all = append(all, end.State)
	}
	return strings.Join(all, ", "), end
}

// TestGRUBDaemon has the real daemon as what runs on the machine: it takes a release from a stick, writes the slot, restarts the
// machine by its restart command, and what it says afterwards comes from the other slot.
func TestGRUBDaemon(t *testing.T) {
	torture(t)
	l := newLab(t, 1)
	dir := ramDir(t)
	stick := filepath.Join(dir, "stick.img")
	must(t, "make a stick", l.StickOf(t.Context(), l.Releases[0], stick))
	for name, c := range map[string]struct {
		trial   bootlab.TrialEnd
		told    string
		slot    install.SlotName
		version string
		state   string
	}{
		"confirmed": {bootlab.TrialGood, "BOOT slot=a, IMPORTED, RESTART, BOOT slot=b, OFF", install.SlotB, "2.0.0", "confirmed"},
		"not healthy": {bootlab.TrialSick, "BOOT slot=a, IMPORTED, RESTART, BOOT slot=b, RESTART, BOOT slot=a, OFF", install.SlotA,
			bootlab.FactoryVersion, "rolled-back"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
			must(t, "make a disk", err)
			data := filepath.Join(ramDir(t), "data.img")
			must(t, "make the data", l.DataDisk(t.Context(), filepath.Join("..", ".."), data))
			m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: stick, Data: data}
			m.Scenario = bootlab.Scenario{Daemon: true, Trial: c.trial}
			lines := live(t, m)
			wantTold(t, lines, c.told)
			wantSettled(t, l, d, c.slot, c.version)
			states, end := statuses(t, lines)
			t.Logf("status: %s; at the end %+v", states, end)
			if end.State != c.state || end.Version != c.version {
				t.Errorf("at the end the status says %+v", end)
			}
			if c.trial != bootlab.TrialSick {
				return
			}
			if end.Reason == nil || end.Reason.Code != "E-HEALTH" || !strings.Contains(end.Reason.Detail, "the pump does not turn") {
				t.Errorf("after the slot has switched back the reason is %+v", end.Reason)
			}
		})
	}
}
