package install_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// bench is a Block with a release of one image, on devices that a test chooses.
type bench struct {
	a, b  string
	fw    *firmware
	state string

	rel           *verify.Release
	image         []byte
	written, same int64
}

// newBench makes a machine with a release of size bytes.
func newBench(t testing.TB, fw *firmware, a, b string, image []byte) *bench {
	t.Helper()
	fw.at(1)
	v := &bench{a: a, b: b, fw: fw, state: t.TempDir()}
	v.release(t, image)
	return v
}

func (v *bench) release(t testing.TB, image []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	v.image = image
	v.rel, _ = verifytest.NewVendor(t, "block").Verified(t, verifytest.Opts{Images: []verifytest.Image{{Name: "rootfs", Path: path}}})
}

func (v *bench) source(verify.Image) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(v.image)), nil
}

func (v *bench) config() install.BlockConfig {
	cfg := v.fw.config(v.state)
	cfg.A, cfg.B, cfg.Discard = v.a, v.b, true
	cfg.Wrote = func(_ install.SlotName, written, same int64) { v.written, v.same = written, same }
	return cfg
}

func (v *bench) open(t testing.TB, with install.BlockTest) *install.Block {
	t.Helper()
	dev, err := install.OpenBlock(t.Context(), with.With(v.config()))
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return dev
}

func (v *bench) write(ctx context.Context, dev *install.Block) error {
	return dev.Write(ctx, v.rel, v.rel.Manifest().Images, v.source, nil)
}

// noise is n bytes that no block of another seed has.
func noise(seed uint64, n int) []byte {
	out := make([]byte, n)
	for i := 0; i+8 <= n; i += 8 {
		seed = seed*6364136223846793005 + 1442695040888963407
		for k := range 8 {
			out[i+k] = byte(seed >> (8 * k))
		}
	}
	return out
}

func plainPair(t *testing.T, size int64) (a, b string) {
	dir := t.TempDir()
	a, b = filepath.Join(dir, "a"), filepath.Join(dir, "b")
	writeFile(t, a, "factory")
	writeFile(t, b, "")
	for _, path := range []string{a, b} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

func TestBlockWritesOnlyWhatDiffers(t *testing.T) {
	const size = 6<<20 + 700
	a, b := plainPair(t, 8<<20)
	image := noise(1, size)
	v := newBench(t, grubFirmware(t), a, b, image)
	dev := v.open(t, install.BlockTest{})
	holds := func(total int64) {
		t.Helper()
		must(t, "write", v.write(t.Context(), dev))
		data, err := os.ReadFile(b)
		must(t, "read", err)
		if len(data) != 8<<20 || !bytes.Equal(data[:len(v.image)], v.image) {
			t.Fatal("the slot holds something else")
		}
		if v.written+v.same != total {
			t.Fatalf("%d bytes written and %d the same, not %d together", v.written, v.same, total)
		}
	}
	const padded = (size + 4095) / 4096 * 4096
	holds(padded)
	if v.written != padded {
		t.Fatalf("%d bytes were written to an empty slot", v.written)
	}
	holds(padded)
	if v.written != 0 {
		t.Fatalf("%d bytes were written of an image that was there", v.written)
	}
	other := bytes.Clone(image)
	other[3<<20+5] ^= 1
	other[3<<20+8200] ^= 1
	other[size-1] ^= 1
	v.release(t, other)
	holds(padded)
	if v.written != 3*4096 {
		t.Fatalf("%d bytes were written for three changed blocks", v.written)
	}
	v.release(t, noise(9, 5000))
	holds(8192)
	if data, err := os.ReadFile(b); err != nil || !bytes.Equal(data[5000:8192], make([]byte, 3192)) {
		t.Fatalf("bytes of the old image are behind the new one in its last block: %v", err)
	}
	// Discarded, from the next whole MiB on.
	var st syscall.Stat_t
	must(t, "stat", syscall.Stat(b, &st))
	if st.Blocks*512 > 2<<20 {
		t.Fatalf("%d bytes are still allocated", st.Blocks*512)
	}
}

func TestBlockRefusesWhatDoesNotFit(t *testing.T) {
	a, b := plainPair(t, 1<<20)
	v := newBench(t, grubFirmware(t), a, b, noise(1, 1<<20))
	dev := v.open(t, install.BlockTest{})
	must(t, "write an image as large as the slot", v.write(t.Context(), dev))
	before, err := os.ReadFile(b)
	must(t, "read", err)
	v.release(t, noise(2, 1<<20+1))
	err = v.write(t.Context(), dev)
	wantCode(t, "write", err, verify.CodeSpace)
	var r *verify.Refusal
	if !errors.As(err, &r) || r.NeedBytes != 4096 {
		t.Fatalf("%d bytes are said to be missing: %v", r.NeedBytes, err)
	}
	if after, err := os.ReadFile(b); err != nil || !bytes.Equal(before, after) {
		t.Fatal("the refusal changed the slot")
	}
	if st, err := dev.State(t.Context()); err != nil || !st.Slots[install.SlotB].Whole {
		t.Fatalf("the refusal changed the record: %+v, %v", st, err)
	}
}

func TestBlockMediumFails(t *testing.T) {
	for _, c := range []struct {
		name, step string
		fail       func(b string) error
		code       verify.Code
	}{
		{"input/output error", "image.commit", func(string) error { return syscall.EIO }, verify.CodeSlot},
		{"full", "image.commit", func(string) error { return syscall.ENOSPC }, verify.CodeSpace},
		{"reads back other bytes", "image.open", func(b string) error {
			f, err := os.OpenFile(b, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("?"), 1<<20-1)
			return err
		}, verify.CodeSlot},
		{"ends early", "image.open", func(b string) error { return os.Truncate(b, 1<<19) }, verify.CodeSlot},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := plainPair(t, 2<<20)
			v := newBench(t, grubFirmware(t), a, b, noise(3, 1<<20))
			old, err := os.ReadFile(a)
			must(t, "read", err)
			broken := true
			dev := v.open(t, install.BlockTest{Step: func(name string, do func() error) error {
				if name == c.step && broken {
					if err := c.fail(b); err != nil {
						return err
					}
				}
				return do()
			}})
			wantCode(t, "write", v.write(t.Context(), dev), c.code)
			wantCode(t, "try", dev.Try(t.Context(), install.SlotB), verify.CodeBoot)
			if now, err := os.ReadFile(a); err != nil || !bytes.Equal(old, now) {
				t.Fatal("the slot that runs was changed")
			}
			if v.fw.turn(true) != install.SlotA {
				t.Fatal("the next start boots another slot")
			}
			broken = false
			must(t, "mend", os.Truncate(b, 2<<20))
			must(t, "write again", v.write(t.Context(), dev))
			must(t, "try", dev.Try(t.Context(), install.SlotB))
		})
	}
}

// TestBlockSystem holds the looks at the running system against made-up ones.
func TestBlockSystem(t *testing.T) {
	a, b := plainPair(t, 1<<20)
	v := newBench(t, grubFirmware(t), a, b, noise(4, 1<<16))
	sys := t.TempDir()
	writeFile(t, filepath.Join(sys, "proc", "cmdline"), "quiet rauc.slot=A root=/dev/x\n")
	with := install.BlockTest{System: [3]string{filepath.Join(sys, "proc"), filepath.Join(sys, "sys"), "/"}}
	open := func() (*install.Block, error) {
		cfg := v.config()
		cfg.Booted = nil
		return install.OpenBlock(t.Context(), with.With(cfg))
	}
	dev, err := open()
	must(t, "open", err)
	if st, err := dev.State(t.Context()); err != nil || st.Booted != install.SlotA {
		t.Fatalf("the slot that runs: %+v, %v", st, err)
	}
	writeFile(t, filepath.Join(sys, "sys", "block", "loop7", "loop", "backing_file"), b+"\n")
	if err := v.write(t.Context(), dev); verify.CodeOf(err) != verify.CodeSlot || !strings.Contains(err.Error(), "loop7") {
		t.Fatalf("write to a file that a loop device shows: %v", err)
	}
	writeFile(t, filepath.Join(sys, "proc", "cmdline"), "quiet root=/dev/x\n")
	_, err = dev.State(t.Context())
	wantCode(t, "a root file system on neither slot", err, verify.CodeBoot)
}

func TestBlockConfigIsChecked(t *testing.T) {
	a, b := plainPair(t, 1<<20)
	v := newBench(t, grubFirmware(t), a, b, []byte("x"))
	link := filepath.Join(t.TempDir(), "link")
	must(t, "link", os.Symlink(a, link))
	for name, change := range map[string]func(*install.BlockConfig){
		"one slot":         func(c *install.BlockConfig) { c.B = "" },
		"one slot twice":   func(c *install.BlockConfig) { c.B = link },
		"no such slot":     func(c *install.BlockConfig) { c.B = link + "no" },
		"a folder":         func(c *install.BlockConfig) { c.B = v.state },
		"no state":         func(c *install.BlockConfig) { c.State = "" },
		"no bootloader":    func(c *install.BlockConfig) { c.Loader = nil },
		"bad bootloader":   func(c *install.BlockConfig) { c.Loader = install.EFI{} },
		"too many starts":  func(c *install.BlockConfig) { c.Starts = 101 },
		"empty command":    func(c *install.BlockConfig) { c.Restart = []string{} },
		"negative timeout": func(c *install.BlockConfig) { c.RestartTimeout = -1 },
	} {
		cfg := v.config()
		change(&cfg)
		_, err := install.OpenBlock(t.Context(), cfg)
		wantCode(t, name, err, verify.CodeConfig)
	}
}

func TestBlockTellsTheRestartCommand(t *testing.T) {
	a, b := plainPair(t, 1<<20)
	v := newBench(t, trybootFirmware(t), a, b, noise(5, 1<<16))
	told := filepath.Join(t.TempDir(), "told")
	cfg := v.config()
	cfg.Restart = []string{"sh", "-c", `echo "$MESHUPD_SLOT $MESHUPD_VERSION $MESHUPD_REBOOT_ARG" > "$0"`, told}
	cfg.RestartTimeout = time.Second // for a machine that does not end
	dev, err := install.OpenBlock(t.Context(), cfg)
	must(t, "open", err)
	must(t, "write", v.write(t.Context(), dev))
	must(t, "try", dev.Try(t.Context(), install.SlotB))
	wantCode(t, "restart", dev.Restart(t.Context()), verify.CodeRestart)
	if got, err := os.ReadFile(told); err != nil || string(got) != fmt.Sprintf("b %s 0 tryboot\n", v.rel.Manifest().Version) {
		t.Fatalf("the command was told %q, %v", got, err)
	}
}

// TestTrybootOutlivesThePowerThatItsArgumentDoesNot: the firmware forgets "0 tryboot" when the power is cut.
func TestTrybootOutlivesThePowerThatItsArgumentDoesNot(t *testing.T) {
	fw := trybootFirmware(t)
	fw.at(1)
	cfg := fw.config(ramDir(t))
	open := func() install.FilePointer {
		p, err := install.OpenLoader(t.Context(), install.BlockTest{
			Reboot: func(context.Context, install.SlotName, string) error { return nil },
		}.With(cfg))
		must(t, "open", err)
		must(t, "power on", p.PowerOn(t.Context()))
		return p
	}
	turn := fw.turn
	p := open()
	must(t, "try", p.Try(t.Context(), install.SlotB, 1))
	fw.turn = func(bool) install.SlotName { return install.SlotA } // without the argument
	fw.at(2)
	p = open()
	if st, err := p.Boot(t.Context()); err != nil || st.Phase != install.PhaseArmed || st.Left != 1 {
		t.Fatalf("after a cut before the restart: %+v, %v", st, err)
	}
	must(t, "restart", install.Restart(t.Context(), p))
	fw.turn = turn
	fw.at(3)
	if st, err := open().Boot(t.Context()); err != nil || st.Phase != install.PhaseTrial || st.Left != 0 {
		t.Fatalf("after the restart: %+v, %v", st, err)
	}
	fw.at(4)
	if st, err := open().Boot(t.Context()); err != nil || st.Phase != install.PhaseSettled || st.Booted != install.SlotA || st.Failed != install.SlotB {
		t.Fatalf("after a cut on trial: %+v, %v", st, err)
	}
}

// loopDevice shows n new bytes as a block device, or skips the test and says so.
func loopDevice(t testing.TB, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, n); err != nil {
		t.Fatal(err)
	}
	return loopOver(t, path)
}

// loopOver shows a file as a block device.
func loopOver(t testing.TB, path string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		install.CannotRun(t, "no loop devices without root; the tests on real block devices did not run")
	}
	out, err := exec.Command("losetup", "--find", "--show", path).CombinedOutput()
	if err != nil {
		install.CannotRun(t, "no loop device (%v: %s); the tests on real block devices did not run", err, bytes.TrimSpace(out))
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "--detach", dev).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v: %s", dev, err, out)
		}
	})
	return dev
}

func TestBlockOnLoopDevices(t *testing.T) {
	a, b := loopDevice(t, 16<<20), loopDevice(t, 16<<20)
	v := newBench(t, grubFirmware(t), a, b, noise(6, 5<<20+123))
	dev := v.open(t, install.BlockTest{})
	must(t, "write", v.write(t.Context(), dev))
	must(t, "write again", v.write(t.Context(), dev))
	if v.written != 0 {
		t.Fatalf("%d bytes were written of an image that was there", v.written)
	}
	holder, err := os.OpenFile(b, os.O_RDONLY|syscall.O_EXCL, 0)
	must(t, "hold the device", err)
	wantCode(t, "write to a device that is held", v.write(t.Context(), dev), verify.CodeSlot)
	must(t, "let go", holder.Close())

	if out, err := exec.Command("mkfs.ext4", "-q", "-F", b).CombinedOutput(); err != nil {
		install.CannotRun(t, "mkfs.ext4 does not run (%v: %s); the test with a mounted slot did not run", err, out)
	}
	at := t.TempDir()
	if err := syscall.Mount(b, at, "ext4", syscall.MS_RDONLY, ""); err != nil {
		install.CannotRun(t, "mount: %v; the test with a mounted slot did not run", err)
	}
	err = v.write(t.Context(), dev)
	must(t, "unmount", syscall.Unmount(at, 0))
	if verify.CodeOf(err) != verify.CodeSlot || !strings.Contains(err.Error(), "is mounted at "+at) {
		t.Fatalf("write to a mounted slot: %v", err)
	}
	if st, err := dev.State(t.Context()); err != nil || !st.Slots[install.SlotB].Whole {
		t.Fatalf("the refusal changed the record: %+v, %v", st, err)
	}
	must(t, "write over the file system", v.write(t.Context(), dev))
}

// A whole disk is in use when one of its partitions is, and so is a partition that something else was built on.
func TestBlockRefusesADiskWithAMountedPartition(t *testing.T) {
	disk, other := loopDevice(t, 16<<20), loopDevice(t, 16<<20)
	part := exec.Command("sfdisk", "--quiet", disk)
	part.Stdin = strings.NewReader(",,L\n")
	if out, err := part.CombinedOutput(); err != nil {
		install.CannotRun(t, "sfdisk does not run (%v: %s); the test with a mounted partition did not run", err, bytes.TrimSpace(out))
	}
	if out, err := exec.Command("partx", "--add", disk).CombinedOutput(); err != nil {
		t.Logf("partx: %v: %s", err, bytes.TrimSpace(out)) // the kernel may have found it by itself
	}
	p1 := disk + "p1"
	if _, err := os.Stat(p1); err != nil {
		install.CannotRun(t, "loop devices have no partitions here; the test with a mounted partition did not run")
	}
	t.Cleanup(func() { _ = exec.Command("partx", "--delete", disk).Run() })
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", p1).CombinedOutput(); err != nil {
		install.CannotRun(t, "mkfs.ext4 does not run (%v: %s); the test with a mounted partition did not run", err, out)
	}
	at := t.TempDir()
	if err := syscall.Mount(p1, at, "ext4", syscall.MS_RDONLY, ""); err != nil {
		install.CannotRun(t, "mount: %v; the test with a mounted partition did not run", err)
	}
	v := newBench(t, grubFirmware(t), other, disk, noise(16, 1<<20))
	dev := v.open(t, install.BlockTest{})
	err := v.write(t.Context(), dev)
	_, idleErr := dev.OpenIdle(t.Context(), v.rel.Manifest().Images[0])
	must(t, "unmount", syscall.Unmount(at, 0))
	wantCode(t, "write to a disk whose partition is mounted", err, verify.CodeSlot)
	wantCode(t, "open it for pieces", idleErr, verify.CodeSlot)
}
