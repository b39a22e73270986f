package bootlab_test

import (
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
)

// told are the markers of one or more starts, without those that only mark progress.
func told(lines []bootlab.Line) string {
	var out []string
	for _, line := range lines {
		switch line.Marker {
		case bootlab.MarkerLoader, bootlab.MarkerState, bootlab.MarkerStatus, bootlab.MarkerQuarter, bootlab.MarkerSynced, bootlab.MarkerWriting, bootlab.MarkerTrying,
			bootlab.MarkerConfirming, bootlab.MarkerGivingUp, bootlab.MarkerRecording:
		case bootlab.MarkerBoot:
			slot, _, _ := strings.Cut(line.Text, " ")
			out = append(out, "BOOT "+slot)
		default:
			out = append(out, string(line.Marker))
		}
	}
	return strings.Join(out, ", ")
}

// live runs a machine through firmware and bootloader until it switches itself off.
func live(t *testing.T, m bootlab.Machine) []bootlab.Line {
	t.Helper()
	run, err := m.Start(t.Context())
	must(t, "switch on", err)
	defer run.Close()
	lines, err := run.Rest()
	if err != nil {
		t.Fatalf("%v\n%s", err, run.Said())
	}
	for _, line := range lines {
		if line.Marker == bootlab.MarkerFail {
			t.Fatalf("the guest failed: %s\n%s", line.Text, run.Said())
		}
	}
	return lines
}

// last is the last state that a guest told of.
func last(t *testing.T, lines []bootlab.Line) (st install.State) {
	t.Helper()
	for _, line := range lines {
		if line.Marker == bootlab.MarkerState {
			var err error
			st, err = bootlab.ParseState(line.Text)
			must(t, "read the state", err)
		}
	}
	return st
}

func wantTold(t *testing.T, lines []bootlab.Line, want string) {
	t.Helper()
	if got := told(lines); got != want {
		t.Fatalf("the machine told\n %s\nnot\n %s", got, want)
	}
}

func wantSettled(t *testing.T, l *bootlab.Lab, disk bootlab.Disk, slot install.SlotName, version string) {
	t.Helper()
	turn, err := disk.Turn(l.Kind, l.Dir)
	must(t, "read the bootloader's choice", err)
	if turn != (bootlab.Turn{Next: slot, Default: slot}) {
		t.Fatalf("the bootloader would start %+v, not slot %s for good", turn, slot)
	}
	data, err := disk.Part(bootlab.Part(slot))
	must(t, "read the slot", err)
	if got := l.Holds(data); got != version {
		t.Fatalf("slot %s holds %q, not %q", slot, got, version)
	}
}

// TestGRUB boots two lives: one of updates that go well, one of updates that do not. What the first one writes is recorded, and
// every disk that a power cut could have left of it is judged.
func TestGRUB(t *testing.T) {
	l := newLab(t, 3)
	disk := func(t *testing.T) bootlab.Disk {
		d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
		must(t, "make a disk", err)
		return d
	}
	t.Run("a good release is confirmed and stays", func(t *testing.T) {
		d := disk(t)
		m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle}
		r := record(t, m)
		wantTold(t, live(t, r.Machine), "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
		wantSettled(t, l, d, install.SlotB, "2.0.0")
		wantNoHarm(t, r.replay(t, l, firstUpdate, ""))
		lines := live(t, m)
		wantTold(t, lines, "BOOT slot=b, SETTLED, OFF")
		if st := last(t, lines); st.Phase != install.PhaseSettled || st.Default != install.SlotB || st.Slots[install.SlotB].Version != "2.0.0" {
			t.Fatalf("after another start the slots are %+v", st)
		}
	})
	t.Run("a release that dies gives way to the old one, and to a better one", func(t *testing.T) {
		d := disk(t)
		m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle}
		m.Scenario.Trial = bootlab.TrialPanic
		lines := live(t, m)
		wantTold(t, lines, "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, BOOT slot=a, RECORDED, SETTLED, OFF")
		if st := last(t, lines); st.Phase != install.PhaseSettled || st.Default != install.SlotA || st.Failed != install.SlotB {
			t.Fatalf("after the fallback the slots are %+v", st)
		}
		wantSettled(t, l, d, install.SlotA, bootlab.FactoryVersion)
		m.Stick, m.Scenario.Trial = l.Releases[1].Bundle, bootlab.TrialGood
		wantTold(t, live(t, m), "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, CONFIRMED, SETTLED, OFF")
		wantSettled(t, l, d, install.SlotB, "2.1.0")
	})
}

// TestGRUBLong are the other ends of a trial.
func TestGRUBLong(t *testing.T) {
	torture(t)
	l := newLab(t, 1)
	for end, want := range map[bootlab.TrialEnd]string{
		bootlab.TrialSilent: "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, SILENT, BOOT slot=a, RECORDED, SETTLED, OFF",
		bootlab.TrialSick:   "BOOT slot=a, WROTE, ARMED, RESTART, BOOT slot=b, TRIAL, GAVE-UP, RECORDED, RESTART, BOOT slot=a, SETTLED, OFF",
	} {
		t.Run(string(end), func(t *testing.T) {
			d, err := l.NewDisk(t.Context(), filepath.Join(ramDir(t), "disk.img"))
			must(t, "make a disk", err)
			m := bootlab.Machine{Kind: l.Kind, Kernel: l.Kernel, Disk: d, Stick: l.Releases[0].Bundle}
			m.Scenario.Trial = end
			wantTold(t, live(t, m), want)
			wantSettled(t, l, d, install.SlotA, bootlab.FactoryVersion)
		})
	}
}
