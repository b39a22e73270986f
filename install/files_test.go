package install_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// device is a Files folder with a release for it.
type device struct {
	dir    string
	rel    *verify.Release
	source install.Source
}

func newDevice(t *testing.T) *device {
	t.Helper()
	rel, data := verifytest.NewVendor(t, "files").Verified(t, verifytest.Opts{Version: "2.0.0"})
	return &device{
		dir: t.TempDir(), rel: rel,
		source: func(verify.Image) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
	}
}

func (d *device) config() install.FilesConfig { return filesConfig(d.dir, "", 1) }

func (d *device) open(t *testing.T, cfg install.FilesConfig) *install.Files {
	t.Helper()
	f, err := install.OpenFiles(cfg)
	must(t, "open", err)
	must(t, "start", f.Start(t.Context()))
	return f
}

func (d *device) write(t *testing.T, f *install.Files) error {
	return f.Write(t.Context(), d.rel, d.rel.Manifest().Images, d.source, nil)
}

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func wantCode(t *testing.T, what string, err error, code verify.Code) {
	t.Helper()
	if verify.CodeOf(err) != code {
		t.Fatalf("%s: got %v (%q), want %s", what, err, verify.CodeOf(err), code)
	}
}

func stateOf(t *testing.T, f *install.Files) install.State {
	t.Helper()
	st, err := f.State(t.Context())
	must(t, "state", err)
	return st
}

func TestSpaceIsCheckedFirst(t *testing.T) {
	d := newDevice(t)
	f := d.open(t, d.config())
	must(t, "write", d.write(t, f))
	held := folderDigests(t, filepath.Join(d.dir, "b"))

	// The old content of the slot counts as free, and what is missing is said to the byte.
	const size, blocks, small = 200_000, 49 * 4096, 64 << 10
	for free, need := range map[int64]int64{0: small, small - 1: 1, small: 0} {
		f := d.open(t, install.WithFree(d.config(), free))
		err := d.write(t, f)
		if need == 0 {
			must(t, "write in the place of the old content", err)
			continue
		}
		wantCode(t, "write", err, verify.CodeSpace)
		var r *verify.Refusal
		if errors.As(err, &r); r.NeedBytes != need {
			t.Fatalf("with %d bytes free %d are said to be missing, want %d", free, r.NeedBytes, need)
		}
		if !stateOf(t, f).Slots[install.SlotB].Whole || len(folderDigests(t, filepath.Join(d.dir, "b"))) != len(held) {
			t.Fatal("a refusal for space changed the slot")
		}
	}

	fresh := newDevice(t)
	err := fresh.write(t, fresh.open(t, install.WithFree(fresh.config(), 1000)))
	wantCode(t, "write", err, verify.CodeSpace)
	var r *verify.Refusal
	if errors.As(err, &r); r.NeedBytes != blocks+small-1000 || size > blocks {
		t.Fatalf("%d bytes are said to be missing", r.NeedBytes)
	}
}

func TestMediumFaults(t *testing.T) {
	for _, c := range []struct {
		step string
		err  error
		code verify.Code
	}{
		{"record.remove", syscall.EIO, verify.CodeSlot},
		{"slot.clear", syscall.EIO, verify.CodeSlot},
		{"image.fill", syscall.ENOSPC, verify.CodeSpace},
		{"image.fill", syscall.EDQUOT, verify.CodeSpace},
		{"image.fill", syscall.EIO, verify.CodeSlot},
		{"image.commit", syscall.ENOSPC, verify.CodeSpace},
		{"image.commit", syscall.EROFS, verify.CodeSlot},
		{"image.open", syscall.EIO, verify.CodeSlot},
		{"record.save", syscall.ENOSPC, verify.CodeSpace},
	} {
		t.Run(c.step+" "+c.err.Error(), func(t *testing.T) {
			d := newDevice(t)
			writeFile(t, filepath.Join(d.dir, "a", "app"), "runs")
			d.open(t, d.config())
			f := d.open(t, install.WithStep(d.config(), func(name string, do func() error) error {
				if name == c.step {
					return &os.PathError{Op: "write", Path: "b", Err: c.err}
				}
				return do()
			}))
			wantCode(t, "write", d.write(t, f), c.code)
			st := stateOf(t, f)
			if st.Phase != install.PhaseSettled || st.Booted != install.SlotA || !st.Slots[install.SlotA].Whole || st.Slots[install.SlotB].Whole {
				t.Fatalf("after the fault: %+v", st)
			}
			if data, err := os.ReadFile(filepath.Join(d.dir, "current", "app")); err != nil || string(data) != "runs" {
				t.Fatalf("the slot that runs is damaged: %q, %v", data, err)
			}
			f = d.open(t, d.config())
			must(t, "write again", d.write(t, f))
			must(t, "try", f.Try(t.Context(), install.SlotB))
		})
	}
}

func TestReadBackFindsWhatTheMediumChanged(t *testing.T) {
	for name, change := range map[string]func(*testing.T, string){
		"a bit":   func(t *testing.T, path string) { alter(t, path, func(b []byte) []byte { b[777] ^= 1; return b }) },
		"shorter": func(t *testing.T, path string) { alter(t, path, func(b []byte) []byte { return b[:len(b)-1] }) },
		"longer":  func(t *testing.T, path string) { alter(t, path, func(b []byte) []byte { return append(b, 0) }) },
		"a link": func(t *testing.T, path string) {
			must(t, "move", os.Rename(path, path+".moved"))
			must(t, "link", os.Symlink(path+".moved", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t)
			f := d.open(t, install.WithStep(d.config(), func(step string, do func() error) error {
				if step == "image.open" {
					change(t, filepath.Join(d.dir, "b", d.rel.Manifest().Images[0].Name))
				}
				return do()
			}))
			wantCode(t, "write", d.write(t, f), verify.CodeSlot)
			wantCode(t, "try", f.Try(t.Context(), install.SlotB), verify.CodeBoot)
		})
	}
}

func alter(t *testing.T, path string, change func([]byte) []byte) {
	data, err := os.ReadFile(path)
	must(t, "read", err)
	must(t, "write", os.WriteFile(path, change(data), 0o644))
}

func TestOnlyTheReleaseIsInTheSlot(t *testing.T) {
	d := newDevice(t)
	writeFile(t, filepath.Join(d.dir, "outside", "keep"), "keep")
	writeFile(t, filepath.Join(d.dir, "b", "old", "deep", "file"), "old")
	must(t, "link", os.Symlink(filepath.Join(d.dir, "outside"), filepath.Join(d.dir, "b", "link")))
	f := d.open(t, install.WithStep(d.config(), func(step string, do func() error) error {
		err := do()
		if step == "image.commit" {
			writeFile(t, filepath.Join(d.dir, "b", "slipped-in"), "not signed")
		}
		return err
	}))
	must(t, "write", d.write(t, f))
	if got := folderDigests(t, filepath.Join(d.dir, "b")); len(got) != 1 || got["rootfs"] != d.rel.Manifest().Images[0].Content.SHA256 {
		t.Fatalf("the slot holds %v", got)
	}
	if _, err := os.Stat(filepath.Join(d.dir, "outside", "keep")); err != nil {
		t.Fatalf("clearing the slot followed a link: %v", err)
	}
}

func TestRestartCommand(t *testing.T) {
	d := newDevice(t)
	cfg := d.config()
	cfg.Restart = []string{"/bin/sh", "-c", `echo "$MESHUPD_SLOT $MESHUPD_VERSION $(readlink "$0/current")" >>"$0/log"; test ! -e "$0/fail" || { echo no such pump >&2; exit 1; }`, d.dir}
	f := d.open(t, cfg)
	must(t, "write", d.write(t, f))
	must(t, "try", f.Try(t.Context(), install.SlotB))
	writeFile(t, filepath.Join(d.dir, "fail"), "")
	err := f.Restart(t.Context())
	wantCode(t, "restart", err, verify.CodeRestart)
	if !strings.HasSuffix(err.Error(), "no such pump") {
		t.Fatalf("the reason is %q", err)
	}
	wantCode(t, "confirm what was not started", f.Confirm(t.Context()), verify.CodeBoot)
	must(t, "fall back", f.Fallback(t.Context()))
	if st := stateOf(t, f); st.Booted != install.SlotB || st.Default != install.SlotA || st.Failed != install.SlotB {
		t.Fatalf("after the fallback: %+v", st)
	}
	must(t, "unblock", os.Remove(filepath.Join(d.dir, "fail")))
	must(t, "restart", f.Restart(t.Context()))
	if st := stateOf(t, f); st.Phase != install.PhaseSettled || st.Booted != install.SlotA {
		t.Fatalf("after the restart: %+v", st)
	}
	log, err := os.ReadFile(filepath.Join(d.dir, "log"))
	if want := "b 2.0.0 b\na 1.0.0 a\n"; err != nil || string(log) != want {
		t.Fatalf("the command saw %q, %v; want %q", log, err, want)
	}
}

func TestRestartTimeout(t *testing.T) {
	d := newDevice(t)
	cfg := d.config()
	cfg.Restart, cfg.RestartTimeout = []string{"/bin/sleep", "600"}, 50*time.Millisecond
	wantCode(t, "restart", d.open(t, cfg).Restart(t.Context()), verify.CodeRestart)
}

// TestMachineRestart: the command only asks for the restart, so the trial begins when the machine is back.
func TestMachineRestart(t *testing.T) {
	d := newDevice(t)
	at := func(power int) install.FilesConfig {
		cfg := filesConfig(d.dir, "", power)
		cfg.Machine, cfg.Restart = true, []string{"/bin/sh", "-c", `echo x >>"$0/log"`, d.dir}
		return cfg
	}
	// A test cannot end the machine, so the wait for that ends with its context, as at a shutdown.
	down := func(restart func(context.Context) error) {
		t.Helper()
		before, _ := os.ReadFile(filepath.Join(d.dir, "log"))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error)
		go func() { ended <- restart(ctx) }()
	waiting:
		for {
			select {
			case err := <-ended:
				t.Fatalf("the restart did not wait for the end of the machine: %v", err)
			case <-time.After(time.Millisecond):
			}
			if now, _ := os.ReadFile(filepath.Join(d.dir, "log")); len(now) > len(before) {
				break waiting
			}
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Fatalf("the restart ended with %v", err)
		}
	}
	open := func(power int) *install.Files {
		f, err := install.OpenFiles(at(power))
		must(t, "open", err)
		return f
	}
	f := d.open(t, at(1))
	must(t, "write", d.write(t, f))
	must(t, "try", f.Try(t.Context(), install.SlotB))
	down(f.Restart)
	wantCode(t, "confirm before the machine restarted", f.Confirm(t.Context()), verify.CodeBoot)
	down(open(1).Start) // the daemon is started again on the way down
	f = d.open(t, at(2))
	if st := stateOf(t, f); st.Phase != install.PhaseTrial || st.Booted != install.SlotB {
		t.Fatalf("after the restart: %+v", st)
	}
	f = open(3) // and again, unconfirmed
	down(f.Start)
	if st := stateOf(t, f); st.Phase != install.PhaseSettled || st.Failed != install.SlotB || st.Booted != install.SlotB {
		t.Fatalf("after the second restart: %+v", st)
	}
	f = d.open(t, at(4))
	if st := stateOf(t, f); st.Phase != install.PhaseSettled || st.Failed != install.SlotB || st.Booted != install.SlotA {
		t.Fatalf("after the fallback: %+v", st)
	}
}

func TestMachineThatDoesNotRestart(t *testing.T) {
	d := newDevice(t)
	cfg := d.config()
	cfg.Machine, cfg.Restart, cfg.RestartTimeout = true, []string{"/bin/true"}, 50*time.Millisecond
	f := d.open(t, cfg)
	must(t, "write", d.write(t, f))
	must(t, "try", f.Try(t.Context(), install.SlotB))
	wantCode(t, "restart", f.Restart(t.Context()), verify.CodeRestart)
	must(t, "fall back", f.Fallback(t.Context()))
}

func TestMoreThanOneStart(t *testing.T) {
	d := newDevice(t)
	cfg := d.config()
	cfg.Starts = 2
	f := d.open(t, cfg)
	must(t, "write", d.write(t, f))
	must(t, "try", f.Try(t.Context(), install.SlotB))
	must(t, "restart", f.Restart(t.Context()))
	if st := stateOf(t, f); st.Left != 1 {
		t.Fatalf("after one start: %+v", st)
	}
	must(t, "restart", f.Restart(t.Context()))
	if st := stateOf(t, f); st.Left != 0 || st.Phase != install.PhaseTrial {
		t.Fatalf("after two starts: %+v", st)
	}
	must(t, "restart", f.Restart(t.Context()))
	if st := stateOf(t, f); st.Phase != install.PhaseSettled || st.Booted != install.SlotA || st.Failed != install.SlotB {
		t.Fatalf("after all starts: %+v", st)
	}
}

func TestDamage(t *testing.T) {
	t.Run("boot state", func(t *testing.T) {
		d := newDevice(t)
		d.open(t, d.config())
		path := filepath.Join(d.dir, "boot.json")
		alter(t, path, func(b []byte) []byte { return bytes.Replace(b, []byte(`"default":"a"`), []byte(`"default":"b"`), 1) })
		before, _ := os.ReadFile(path)
		_, err := install.OpenFiles(d.config())
		wantCode(t, "open", err, verify.CodeBoot)
		if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
			t.Fatal("the damaged boot state was changed")
		}
	})
	t.Run("slot record", func(t *testing.T) {
		d := newDevice(t)
		f := d.open(t, d.config())
		must(t, "write", d.write(t, f))
		alter(t, filepath.Join(d.dir, "slot.b.json"), func(b []byte) []byte { return bytes.Replace(b, []byte("2.0.0"), []byte("2.0.1"), 1) })
		wantCode(t, "try", f.Try(t.Context(), install.SlotB), verify.CodeBoot)
		must(t, "write", d.write(t, f))
		must(t, "try", f.Try(t.Context(), install.SlotB))
	})
	t.Run("record lost when armed", func(t *testing.T) {
		d := newDevice(t)
		f := d.open(t, d.config())
		must(t, "write", d.write(t, f))
		must(t, "try", f.Try(t.Context(), install.SlotB))
		must(t, "remove", os.Remove(filepath.Join(d.dir, "slot.b.json")))
		must(t, "restart", f.Restart(t.Context()))
		if st := stateOf(t, f); st.Phase != install.PhaseSettled || st.Booted != install.SlotA || st.Failed != install.SlotB {
			t.Fatalf("a slot without a record was booted: %+v", st)
		}
	})
	t.Run("pointer", func(t *testing.T) {
		d := newDevice(t)
		f := d.open(t, d.config())
		current := filepath.Join(d.dir, "current")
		must(t, "remove", os.Remove(current))
		must(t, "link", os.Symlink("b", current))
		_, err := f.State(t.Context())
		wantCode(t, "state", err, verify.CodeBoot)
		if st := stateOf(t, d.open(t, d.config())); st.Booted != install.SlotA {
			t.Fatalf("start did not heal the pointer: %+v", st)
		}
		must(t, "remove", os.Remove(current))
		must(t, "link", os.Symlink("../../etc", current))
		_, err = install.OpenFiles(d.config())
		must(t, "open", err)
		_, err = f.State(t.Context())
		wantCode(t, "state", err, verify.CodeBoot)
	})
	t.Run("slot is a link", func(t *testing.T) {
		d := newDevice(t)
		must(t, "link", os.Symlink("a", filepath.Join(d.dir, "b")))
		must(t, "mkdir", os.Mkdir(filepath.Join(d.dir, "a"), 0o755))
		_, err := install.OpenFiles(d.config())
		wantCode(t, "open", err, verify.CodeSlot)
	})
}

func TestThePointerThatIsThereIsTaken(t *testing.T) {
	d := newDevice(t)
	must(t, "link", os.Symlink("b", filepath.Join(d.dir, "current")))
	f := d.open(t, d.config())
	st := stateOf(t, f)
	if st.Booted != install.SlotB || st.Default != install.SlotB || st.Slots[install.SlotB] != (install.Content{Version: "1.0.0", Whole: true}) {
		t.Fatalf("the device begins with %+v", st)
	}
	must(t, "write", d.write(t, f))
	must(t, "try", f.Try(t.Context(), install.SlotA))
}

func TestImageLayoutTakesOneImage(t *testing.T) {
	d := newDevice(t)
	rel, _ := verifytest.NewVendor(t, "files").Verified(t, verifytest.Opts{Images: []verifytest.Image{{Name: "one", Size: 999}, {Name: "two", Size: 999}}})
	cfg := d.config()
	cfg.Layout = install.LayoutImage
	f := d.open(t, cfg)
	wantCode(t, "write", f.Write(t.Context(), rel, rel.Manifest().Images, d.source, nil), verify.CodeFormat)
}

func TestFilesConfigIsChecked(t *testing.T) {
	dir := t.TempDir()
	for name, cfg := range map[string]install.FilesConfig{
		"no folder":         {},
		"strange layout":    {Dir: dir, Layout: "disk"},
		"too many starts":   {Dir: dir, Starts: 101},
		"negative starts":   {Dir: dir, Starts: -1},
		"negative timeout":  {Dir: dir, RestartTimeout: -1},
		"empty command":     {Dir: dir, Restart: []string{}},
		"machine by itself": {Dir: dir, Machine: true},
	} {
		_, err := install.OpenFiles(cfg)
		wantCode(t, name, err, verify.CodeConfig)
	}
	if _, err := install.OpenFiles(install.FilesConfig{Dir: dir}); err != nil {
		t.Fatalf("the kernel's boot id does: %v", err)
	}
}
