package install_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

// Slots with hooks are slots: they pass the same suite, with a fault at every step of theirs and of the notes.
func TestHooked(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		dir := t.TempDir()
		m := install.NewMemory(install.MemoryConfig{FactoryVersion: "1.0.0"})
		power := 1
		return slotstest.Harness{
			Images: 2,
			Open: func(now int, step slotstest.Step) (slotstest.Device, error) {
				m = m.Reopen(install.MemoryConfig{Step: step}, now != power)
				power = now
				h, err := install.OpenHooked(m, install.Hooks{Dir: filepath.Join(dir, "none")}, filepath.Join(dir, "notes"))
				return install.WithHookStep(h, step), err
			},
			Pointed: func() install.SlotName { return m.Pointed() },
			Holds:   func(slot install.SlotName) map[string]verify.Digest { return m.Digests(slot) },
		}
	})
}

// hookedDevice is a device in memory with hooks that write down when they ran, and refuse when they are told to.
type hookedDevice struct {
	*device
	hooks, log string
	memory     *install.Memory
	started    []install.SlotName
}

func newHookedDevice(t *testing.T) *hookedDevice {
	d := &hookedDevice{device: newDevice(t), hooks: t.TempDir(), log: filepath.Join(t.TempDir(), "log")}
	d.memory = install.NewMemory(install.MemoryConfig{FactoryVersion: "1.0.0", Restart: func(_ context.Context, slot install.SlotName, _ install.Content) error {
		d.started = append(d.started, slot)
		return nil
	}})
	for _, hook := range []string{"pre-install", "post-install", "pre-reboot"} {
		must(t, "write a hook", os.WriteFile(filepath.Join(d.hooks, hook), []byte("#!/bin/sh\n"+
			`echo "$MESHUPD_HOOK $MESHUPD_SLOT $MESHUPD_RUNNING>$MESHUPD_VERSION ${MESHUPD_RELEASE:+x}" >>`+d.log+"\n"+
			"if test -e $0.refuses; then echo not now >&2; exit 1; fi\n"), 0o700))
	}
	return d
}

// open is a start of the daemon.
func (d *hookedDevice) open(t *testing.T) *install.Hooked {
	t.Helper()
	h, err := install.OpenHooked(d.memory, install.Hooks{Dir: d.hooks}, filepath.Join(d.dir, "notes"))
	must(t, "open", err)
	must(t, "start", h.Start(t.Context()))
	return h
}

func (d *hookedDevice) refuse(t *testing.T, hook string, yes bool) {
	t.Helper()
	path := filepath.Join(d.hooks, hook+".refuses")
	if yes {
		writeFile(t, path, "")
		return
	}
	must(t, "consent again", os.Remove(path))
}

// ran returns what the hooks wrote since the last look.
func (d *hookedDevice) ran(t *testing.T) []string {
	t.Helper()
	data, _ := os.ReadFile(d.log) // none yet
	_ = os.Remove(d.log)
	return strings.FieldsFunc(string(data), func(r rune) bool { return r == '\n' })
}

func (d *hookedDevice) wantRan(t *testing.T, when string, want ...string) {
	t.Helper()
	if got := d.ran(t); !slices.Equal(got, want) {
		t.Fatalf("%s: the hooks that ran are %q, want %q", when, got, want)
	}
}

func (d *hookedDevice) writeHooked(t *testing.T, h *install.Hooked) error {
	return h.Write(t.Context(), d.rel, d.rel.Manifest().Images, d.source, nil)
}

const (
	preInstall  = "pre-install b 1.0.0>2.0.0 x"
	postInstall = "post-install b 1.0.0>2.0.0 x"
	preReboot   = "pre-reboot b 1.0.0>2.0.0 x"
)

func TestHooksAroundAnUpdate(t *testing.T) {
	d := newHookedDevice(t)
	h := d.open(t)
	ctx := t.Context()

	d.refuse(t, "pre-install", true)
	err := d.writeHooked(t, h)
	wantCode(t, "write", err, verify.CodeHook)
	if err.Error() != "hook pre-install: exit status 1: not now" {
		t.Fatalf("the reason is %q", err)
	}
	if _, there := d.state(t, h).Slots[install.SlotB]; there {
		t.Fatal("a slot was changed though pre-install refused")
	}
	d.refuse(t, "pre-install", false)
	d.wantRan(t, "refused", preInstall)

	d.refuse(t, "post-install", true)
	wantCode(t, "write", d.writeHooked(t, h), verify.CodeHook)
	d.wantRan(t, "written", preInstall, postInstall)
	if !d.state(t, h).Slots[install.SlotB].Whole {
		t.Fatal("post-install ran before the slot was whole")
	}
	// Neither in this life of the daemon nor in the next is the slot armed before post-install passed.
	wantCode(t, "try", h.Try(ctx, install.SlotB), verify.CodeHook)
	h = d.open(t)
	wantCode(t, "try", h.Try(ctx, install.SlotB), verify.CodeHook)
	if st := d.state(t, h); st.Phase != install.PhaseSettled {
		t.Fatalf("armed though post-install refuses: %+v", st)
	}
	d.refuse(t, "post-install", false)
	d.wantRan(t, "tried", postInstall, postInstall)

	d.refuse(t, "pre-reboot", true)
	err = h.Try(ctx, install.SlotB)
	wantCode(t, "try", err, verify.CodeHeld)
	if err.Error() != "held by hook pre-reboot: exit status 1: not now" {
		t.Fatalf("the reason is %q", err)
	}
	wantCode(t, "try again", h.Try(ctx, install.SlotB), verify.CodeHeld)
	if st := d.state(t, h); st.Phase != install.PhaseSettled {
		t.Fatalf("armed though pre-reboot refuses, so a power cut would start it: %+v", st)
	}
	d.refuse(t, "pre-reboot", false)
	d.wantRan(t, "held", postInstall, preReboot, preReboot)

	must(t, "try", h.Try(ctx, install.SlotB))
	must(t, "restart", h.Restart(ctx))
	d.wantRan(t, "restarted", preReboot)
	must(t, "confirm", h.Confirm(ctx))
	if !slices.Equal(d.started, []install.SlotName{install.SlotB}) {
		t.Fatalf("started: %v", d.started)
	}

	// A person goes back: no hook has a say.
	for _, hook := range []string{"pre-install", "post-install", "pre-reboot"} {
		d.refuse(t, hook, true)
	}
	must(t, "go back", h.Try(ctx, install.SlotA))
	must(t, "restart", h.Restart(ctx))
	must(t, "confirm", h.Confirm(ctx))
	must(t, "and forth", h.Try(ctx, install.SlotB))
	must(t, "restart", h.Restart(ctx))
	d.wantRan(t, "rolled back")
}

// An armed slot that another life of the daemon finds asks pre-reboot again; a trial and the way back never do.
func TestPreRebootNeverStopsTheWayBack(t *testing.T) {
	d := newHookedDevice(t)
	h := d.open(t)
	ctx := t.Context()
	must(t, "write", d.writeHooked(t, h))
	must(t, "try", h.Try(ctx, install.SlotB))
	d.ran(t)
	h = d.open(t)
	d.refuse(t, "pre-reboot", true)
	wantCode(t, "restart", h.Restart(ctx), verify.CodeHeld)
	d.wantRan(t, "held", preReboot)
	must(t, "disarm", h.Try(ctx, install.SlotA))
	d.refuse(t, "pre-reboot", false)
	must(t, "try", h.Try(ctx, install.SlotB))
	must(t, "restart", h.Restart(ctx))
	d.ran(t)

	d.refuse(t, "pre-reboot", true)
	must(t, "fall back", h.Fallback(ctx))
	must(t, "restart", h.Restart(ctx))
	d.wantRan(t, "fallen back")
	if st := d.state(t, h); st.Booted != install.SlotA || st.Failed != install.SlotB {
		t.Fatalf("after the fallback: %+v", st)
	}
}

// A trial must not begin with a health hook that cannot be run, for it would be rolled back.
func TestHooksAreLookedAtBeforeAWrite(t *testing.T) {
	d := newHookedDevice(t)
	h := d.open(t)
	writeFile(t, filepath.Join(d.hooks, "health"), "#!/bin/sh\n")
	err := d.writeHooked(t, h)
	wantCode(t, "write", err, verify.CodeHook)
	if err.Error() != "hook health: it is not executable" {
		t.Fatalf("got %q", err)
	}
	d.wantRan(t, "refused")
}

// Notes that a flash chip spoiled count as hooks that have to be asked; the next write begins them anew.
func TestDamagedHookNotes(t *testing.T) {
	d := newHookedDevice(t)
	h := d.open(t)
	must(t, "write", d.writeHooked(t, h))
	d.ran(t)
	alter(t, filepath.Join(d.dir, "notes", "notes.json"), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	h = d.open(t)
	must(t, "try", h.Try(t.Context(), install.SlotB))
	d.wantRan(t, "tried", postInstall, preReboot)
	must(t, "restart", h.Restart(t.Context()))
	must(t, "confirm", h.Confirm(t.Context()))
}

func (d *hookedDevice) state(t *testing.T, h *install.Hooked) install.State {
	t.Helper()
	st, err := h.State(t.Context())
	must(t, "state", err)
	return st
}
