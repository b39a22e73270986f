package bootlab_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/bootlab"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// boardLab is a vendor with two releases, and a board to run them on.
type boardLab struct {
	board    *bootlab.Board
	dir      string
	anchor   string
	images   map[string][]byte // by version
	releases []string          // the .update files
}

func newBoardLab(t *testing.T) *boardLab {
	t.Helper()
	needBoard(t)
	l := &boardLab{dir: ramDir(t), images: make(map[string][]byte)}
	root := filepath.Join("..", "..")
	var err error
	l.board, err = bootlab.NewBoard(t.Context(), l.dir, root)
	must(t, "make a board", err)
	vendor, err := publish.NewVendor(filepath.Join(l.dir, "vendor"), bootlab.Product)
	must(t, "make a vendor", err)
	l.anchor = vendor.Anchor()
	for _, version := range []string{bootlab.FactoryVersion, "2.0.0"} {
		l.images[version], err = bootlab.BoardImage(t.Context(), l.dir, version)
		must(t, "make an image", err)
	}
	path := filepath.Join(l.dir, "2.0.0.img")
	writeFile(t, path, l.images["2.0.0"])
	bundle, err := vendor.Bundle(t.Context(), publish.VendorRelease{Version: "2.0.0", Images: []publish.VendorImage{{Name: "rootfs", Path: path}}})
	must(t, "sign a release", err)
	l.releases = append(l.releases, bundle)
	return l
}

// needBoard skips a test where no board can run, and says why. In CI it must run.
func needBoard(t testing.TB) {
	t.Helper()
	cannot := t.Skipf
	if os.Getenv("CI") != "" {
		cannot = t.Fatalf
	}
	if testing.Short() {
		t.Skip("boots take their time")
	}
	for _, name := range []string{"qemu-system-aarch64", "mkimage", "mkenvimage", "fw_printenv", "sfdisk", "mkfs.ext4", "mkfs.vfat", "mcopy", "nice", "cp"} {
		if _, err := exec.LookPath(name); err != nil {
			cannot("%s is not installed: no U-Boot was run", name)
		}
	}
	if _, err := os.Stat(bootlab.BoardBIOS); err != nil {
		cannot("no U-Boot was run: %v", err)
	}
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	must(t, "write a file", os.WriteFile(path, data, 0o600))
}

// boardDevice is a board with meshupd's back end on its disk. Between two starts of the board the back end runs here, as it would
// in the system that was started.
type boardDevice struct {
	*boardLab
	t      *testing.T
	path   string // of files env, a, b and the folder state
	loader install.UBoot
	fault  bootlab.BoardFault
	booted install.SlotName
	power  int
	said   string
}

// newDevice is a device as the factory made it: slot a runs, and slot b is empty.
func (l *boardLab) newDevice(t *testing.T, scheme install.UBootScheme, env string) *boardDevice {
	t.Helper()
	d := &boardDevice{boardLab: l, t: t, path: t.TempDir(), booted: install.SlotA}
	d.loader = install.UBoot{Config: d.file("fw_env.config"), Scheme: scheme}
	writeFile(t, d.file("fw_env.config"), fmt.Appendf(nil, "%s 0 %#x\n%s %#x %#x\n", d.file("env"), bootlab.EnvSize, d.file("env"), bootlab.EnvApart, bootlab.EnvSize))
	writeFile(t, d.file("a"), l.images[bootlab.FactoryVersion])
	writeFile(t, d.file("b"), make([]byte, bootlab.BoardSlotSize))
	writeFile(t, d.file("env"), make([]byte, bootlab.EnvApart+bootlab.EnvSize))
	writeFile(t, d.file("env.txt"), []byte(env))
	out, err := exec.CommandContext(t.Context(), "mkenvimage", "-r", "-s", fmt.Sprint(bootlab.EnvSize), "-o", d.file("first"), d.file("env.txt")).CombinedOutput()
	if err != nil {
		t.Fatalf("make the factory's environment: %v: %s", err, out)
	}
	first, err := os.ReadFile(d.file("first"))
	must(t, "read the factory's environment", err)
	d.put(0, first)
	return d
}

func (d *boardDevice) file(name string) string { return filepath.Join(d.path, name) }

func (d *boardDevice) read(name string) []byte {
	d.t.Helper()
	data, err := os.ReadFile(d.file(name))
	must(d.t, "read the device", err)
	return data
}

// put changes bytes of the environment.
func (d *boardDevice) put(at int, data []byte) {
	d.t.Helper()
	env := d.read("env")
	copy(env[at:], data)
	writeFile(d.t, d.file("env"), env)
}

// corrupt spoils one copy of the environment.
func (d *boardDevice) corrupt(copies ...int) {
	for _, n := range copies {
		d.put(n*bootlab.EnvApart+40, []byte("no such bytes"))
	}
}

// newest is the copy of the environment that was written last.
func (d *boardDevice) newest() int {
	env := d.read("env")
	if int8(env[bootlab.EnvApart+4]-env[4]) > 0 {
		return 1
	}
	return 0
}

// start switches the board on and tells which slot ran.
func (d *boardDevice) start() string {
	d.t.Helper()
	disk := bootlab.BoardDisk{Env: d.read("env"), A: d.read("a"), B: d.read("b")}
	s, err := d.board.Start(d.t.Context(), &disk, d.fault)
	must(d.t, "start the board", err)
	if want := map[install.SlotName][]byte{install.SlotA: disk.A, install.SlotB: disk.B}[s.Slot]; string(want) != string(d.images[s.Version]) {
		d.t.Errorf("slot %s was started, and the kernel is of version %s", s.Slot, s.Version)
	}
	writeFile(d.t, d.file("env"), disk.Env)
	d.booted, d.said = s.Slot, s.Said
	d.power++
	return string(s.Slot)
}

// starts wants to see a row of starts in which nobody does anything.
func (d *boardDevice) starts(want string) {
	d.t.Helper()
	var got []string
	for range strings.Fields(want) {
		got = append(got, d.start())
	}
	if strings.Join(got, " ") != want {
		d.t.Fatalf("the board started %v, not %s; at last it said\n%s", got, want, d.said)
	}
}

// slots are the device's, opened as its daemon does when the system has started.
func (d *boardDevice) slots() *install.Block {
	d.t.Helper()
	slots, err := install.OpenBlock(d.t.Context(), install.BlockConfig{
		A: d.file("a"), B: d.file("b"), State: d.file("state"), Loader: d.loader, FactoryVersion: bootlab.FactoryVersion, Starts: 3,
		Booted: func() (install.SlotName, error) { return d.booted, nil },
		BootID: func() (string, error) { return fmt.Sprint("start-", d.power), nil },
	})
	must(d.t, "open the slots", err)
	must(d.t, "start the slots", slots.Start(d.t.Context()))
	return slots
}

// arm writes the release into slot b and arms it.
func (d *boardDevice) arm() {
	d.t.Helper()
	ctx := d.t.Context()
	door, err := verify.OpenDoor(verify.DoorConfig{Dir: d.t.TempDir(), Anchor: d.anchor, Product: bootlab.Product})
	must(d.t, "open the door", err)
	f, err := os.Open(d.releases[0])
	must(d.t, "open the release", err)
	defer f.Close()
	bundle, err := verify.OpenBundle(f)
	must(d.t, "open the release", err)
	rel, err := door.Check(ctx, bundle.Head())
	must(d.t, "verify the release", err)
	slots := d.slots()
	image := func(verify.Image) (io.ReadCloser, error) { return os.Open(filepath.Join(d.dir, "2.0.0.img")) }
	must(d.t, "write the release", slots.Write(ctx, rel, rel.Manifest().Images, image, func(int64, int64) {}))
	must(d.t, "arm slot b", slots.Try(ctx, install.SlotB))
}

func (d *boardDevice) want(phase install.Phase, deflt, failed install.SlotName) *install.Block {
	d.t.Helper()
	slots := d.slots()
	st, err := slots.State(d.t.Context())
	must(d.t, "look at the slots", err)
	if st.Phase != phase || st.Default != deflt || st.Failed != failed {
		d.t.Fatalf("the slots are %+v, not %s with default %s and failed %q", st, phase, deflt, failed)
	}
	return slots
}

// printed is what libubootenv reads on the device.
func (d *boardDevice) printed(name string) string {
	d.t.Helper()
	out, err := exec.CommandContext(context.WithoutCancel(d.t.Context()), "fw_printenv", "-c", d.file("fw_env.config"), "-n", name).CombinedOutput()
	if err != nil {
		d.t.Fatalf("fw_printenv %s: %v: %s", name, err, out)
	}
	return strings.TrimSpace(string(out))
}

const leftEnv = "BOOT_ORDER=A\nBOOT_A_LEFT=3\nBOOT_B_LEFT=0\nserial_no=x y\n"

// TestUBoot lets a real U-Boot run the shipped script on what the back end writes.
func TestUBoot(t *testing.T) {
	l := newBoardLab(t)
	left := func(t *testing.T) *boardDevice { return l.newDevice(t, install.UBootLeft, leftEnv) }
	t.Run("a settled device starts its slot, and nothing is written", func(t *testing.T) {
		d := left(t)
		d.want(install.PhaseSettled, install.SlotA, "")
		before := string(d.read("env"))
		d.starts("a a a")
		if string(d.read("env")) != before {
			t.Error("U-Boot has written its environment though no slot is on trial")
		}
	})
	t.Run("a trial that nobody confirms has three starts", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.starts("b b b a a")
		if got := d.printed("BOOT_B_LEFT"); got != "0" {
			t.Errorf("libubootenv reads BOOT_B_LEFT=%s", got)
		}
		if got := d.printed("serial_no"); got != "x y" {
			t.Errorf("a variable of somebody else became %q", got)
		}
		slots := d.want(install.PhaseSettled, install.SlotA, install.SlotB)
		must(t, "take note of the failure", slots.Forget(t.Context()))
		d.starts("a a")
		d.want(install.PhaseSettled, install.SlotA, "")
	})
	t.Run("a confirmed slot stays", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.starts("b b")
		must(t, "confirm", d.want(install.PhaseTrial, install.SlotA, "").Confirm(t.Context()))
		d.starts("b b b b")
		d.want(install.PhaseSettled, install.SlotB, "")
		if got := d.printed("BOOT_ORDER"); got != "B" {
			t.Errorf("libubootenv reads BOOT_ORDER=%s", got)
		}
	})
	t.Run("U-Boot's own boot counting", func(t *testing.T) {
		d := l.newDevice(t, install.UBootCount, "boot_slot=A\nupgrade_available=0\nbootcount=0\n")
		d.starts("a a")
		d.arm()
		d.starts("b b b a a")
		must(t, "take note of the failure", d.want(install.PhaseSettled, install.SlotA, install.SlotB).Forget(t.Context()))
		d.starts("a")
		d.arm()
		d.starts("b")
		must(t, "confirm", d.want(install.PhaseTrial, install.SlotA, "").Confirm(t.Context()))
		d.starts("b b b b")
	})
}

// TestUBootFaults breaks what the script reads and writes.
func TestUBootFaults(t *testing.T) {
	l := newBoardLab(t)
	left := func(t *testing.T) *boardDevice { return l.newDevice(t, install.UBootLeft, leftEnv) }
	confirmed := func(t *testing.T) *boardDevice {
		d := left(t)
		d.arm()
		d.starts("b")
		must(t, "confirm", d.slots().Confirm(t.Context()))
		return d
	}
	t.Run("the newer copy of an armed device", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.corrupt(d.newest())
		d.starts("a a") // as before it was armed; the note remembers that there was a trial
		d.want(install.PhaseSettled, install.SlotA, install.SlotB)
	})
	t.Run("the older copy of an armed device", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.corrupt(1 - d.newest())
		d.starts("b b b a a")
	})
	t.Run("the newer copy of a confirmed device: the trial goes on", func(t *testing.T) {
		d := confirmed(t)
		d.corrupt(d.newest())
		d.starts("b")
		must(t, "confirm", d.want(install.PhaseTrial, install.SlotA, "").Confirm(t.Context()))
		d.starts("b b b b")
	})
	t.Run("both copies: the factory's slot, then the other one", func(t *testing.T) {
		d := confirmed(t)
		d.corrupt(0, 1)
		d.starts("a a a b b")
		d.want(install.PhaseSettled, install.SlotB, install.SlotA)
		d.starts("b b")
	})
	t.Run("both copies, and the factory's slot cannot be loaded", func(t *testing.T) {
		d := confirmed(t)
		d.corrupt(0, 1)
		writeFile(t, d.file("a"), make([]byte, bootlab.BoardSlotSize))
		d.starts("b b b b")
		d.want(install.PhaseSettled, install.SlotB, install.SlotA)
	})
	t.Run("the environment cannot be read", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.fault = bootlab.BoardNoEnv
		d.starts("a a")
	})
	t.Run("the environment cannot be saved: no trial", func(t *testing.T) {
		d := left(t)
		d.arm()
		d.fault = bootlab.BoardReadOnly
		d.starts("a a")
		d.fault = ""
		d.starts("b b b a")
	})
	t.Run("the slot on trial cannot be loaded", func(t *testing.T) {
		d := left(t)
		d.arm()
		writeFile(t, d.file("b"), make([]byte, bootlab.BoardSlotSize))
		d.starts("a a a")
		d.want(install.PhaseSettled, install.SlotA, install.SlotB)
	})
	t.Run("the only slot that is named cannot be loaded: the other one may hold half an image", func(t *testing.T) {
		d := left(t)
		disk := bootlab.BoardDisk{Env: d.read("env"), A: make([]byte, bootlab.BoardSlotSize), B: l.images["2.0.0"]}
		if s, err := l.board.Start(t.Context(), &disk, ""); !errors.Is(err, bootlab.ErrNoStart) {
			t.Fatalf("slot %q was started, error %v", s.Slot, err)
		}
	})
	t.Run("variables that are none", func(t *testing.T) {
		for env, want := range map[string]string{
			"BOOT_ORDER=B A\nx=y\n":            "a a", // no counter: no trial
			"BOOT_ORDER=B A\nBOOT_B_LEFT=zz\n": "a a",
			"BOOT_ORDER=C\nBOOT_A_LEFT=0\n":    "a a a b b",
			"BOOT_ORDER=C B\n":                 "b b",
			"boot_slot=Q\n":                    "a a",
			"boot_slot=B\nupgrade_available=1\nbootcount=3\nbootlimit=3\n": "a a",
		} {
			d := l.newDevice(t, install.UBootLeft, env)
			writeFile(t, d.file("b"), l.images["2.0.0"])
			t.Log(env)
			d.starts(want)
		}
	})
}
