package install_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// raucLab is a machine with the real RAUC on a bus of its own: two slots that are files, RAUC's GRUB or custom bootloader
// back end, and grubFirmware for the power-on.
type raucLab struct {
	t       *testing.T
	dir     string
	fw      *firmware
	service *exec.Cmd
	dev     *install.Delegate
	vendor  *verifytest.Vendor
	seq     uint64
}

// raucCustom is a bootloader back end of RAUC's kind "custom", on the variables that grubFirmware reads.
const raucCustom = `#!/bin/sh
set -eu
env=%q
get() { grub-editenv "$env" list | sed -n "s/^$1=//p"; }
case "$1" in
get-primary)
	for s in $(get ORDER); do
		if [ "$(get "${s}_OK")" = 1 ] && [ "$(get "${s}_TRY")" = 0 ]; then echo "$s"; exit 0; fi
	done
	exit 1 ;;
set-primary) o=A; [ "$2" = A ] && o=B; grub-editenv "$env" set ORDER="$2 $o" "$2_OK=1" "$2_TRY=0" ;;
get-state) if [ "$(get "$2_OK")" = 1 ] && [ "$(get "$2_TRY")" = 0 ]; then echo good; else echo bad; fi ;;
set-state) ok=0; [ "$3" = good ] && ok=1; grub-editenv "$env" set "$2_OK=$ok" "$2_TRY=0" ;;
esac
`

func newRaucLab(t *testing.T, bootloader string, activates bool) *raucLab {
	needTools(t, "rauc", "dbus-daemon", "gdbus", "openssl", "grub-editenv", "mksquashfs")
	lab := &raucLab{t: t, dir: t.TempDir(), fw: grubFirmware(t), vendor: verifytest.NewVendor(t, "rauc")}
	env := lab.fw.loader.(install.GRUB).Env
	lab.fw.loader = nil
	lab.key("right")
	lab.key("wrong")
	lab.file("a", "what the factory put there")
	lab.file("b", "")
	for _, slot := range []string{"a", "b"} {
		must(t, "size", os.Truncate(lab.path(slot), 1<<20))
	}
	place := "grubenv=" + env
	if bootloader == "custom" {
		writeFile(t, lab.path("backend"), fmt.Sprintf(raucCustom, env))
		must(t, "chmod", os.Chmod(lab.path("backend"), 0o755))
		place = ""
	}
	conf := fmt.Sprintf("[system]\ncompatible=lab\nbootloader=%s\n%s\nstatusfile=%s\nmountprefix=%s\nactivate-installed=%t\n[keyring]\npath=%s\n",
		bootloader, place, lab.path("central.status"), lab.path("mnt"), activates, lab.path("right.crt"))
	if bootloader == "custom" {
		conf += "[handlers]\nbootloader-custom-backend=" + lab.path("backend") + "\n"
	} else {
		conf += "[handlers]\npre-install=" + lab.path("pre-install") + "\npost-install=" + lab.path("post-install") + "\n"
	}
	for n, slot := range []string{"a", "b"} {
		conf += fmt.Sprintf("[slot.rootfs.%d]\ndevice=%s\ntype=raw\nbootname=%s\n", n, lab.path(slot), strings.ToUpper(slot))
	}
	lab.file("system.conf", conf)
	for _, name := range []string{"pre-install", "post-install"} {
		lab.handler(name, "exit 0")
	}
	lab.bus()
	lab.reboot()
	return lab
}

func (l *raucLab) path(name string) string { return filepath.Join(l.dir, name) }

func (l *raucLab) file(name, data string) { writeFile(l.t, l.path(name), data) }

func (l *raucLab) handler(name, script string) {
	l.file(name+".new", "#!/bin/sh\n"+script+"\n")
	must(l.t, "chmod", os.Chmod(l.path(name+".new"), 0o755))
	must(l.t, "rename", os.Rename(l.path(name+".new"), l.path(name)))
}

func (l *raucLab) key(name string) {
	runs(l.t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", l.path(name+".key"), "-out", l.path(name+".crt"),
		"-subj", "/CN="+name, "-days", "3650")
}

func (l *raucLab) bus() {
	startBus(l.t, l.path("bus"), l.path("bus.conf"))
}

// startBus runs a dbus-daemon that allows everything, at a socket of its own, until the test ends.
func startBus(t *testing.T, socket, conf string) {
	writeFile(t, conf, `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=`+socket+`</listen><policy context="default"><allow user="*"/><allow own="*"/>
<allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>`)
	bus := exec.Command("dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile", "--print-address=1")
	untilLine(t, bus, "unix:path")
	t.Cleanup(func() {
		bus.Process.Kill()
		bus.Wait()
	})
}

// untilLine starts a program and returns when a line of its output begins with words.
func untilLine(t *testing.T, cmd *exec.Cmd, words string) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	must(t, "pipe", err)
	must(t, "start "+cmd.Path, cmd.Start())
	buf := make([]byte, 0, 4096)
	for !strings.Contains(string(buf), words) {
		n, err := out.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err != nil || len(buf) == cap(buf) {
			t.Fatalf("%s said %q and ended: %v", cmd.Path, buf, err)
		}
	}
	go io.Copy(io.Discard, out) // ends with the program, which the caller ends
}

// stop ends the service as a power cut does.
func (l *raucLab) stop() {
	if l.service != nil {
		l.service.Process.Kill()
		l.service.Wait()
		l.service = nil
		_ = unix.Unmount(l.path("mnt/bundle"), unix.MNT_DETACH) // no mount outlasts a power cut
	}
}

// start runs the service in the slot that is booted, and returns when it has its name on the bus.
func (l *raucLab) start() {
	t := l.t
	booted, _ := l.fw.runs()
	l.service = exec.Command("rauc", "--conf="+l.path("system.conf"), "--override-boot-slot="+strings.ToUpper(string(booted)), "service")
	l.service.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS=unix:path="+l.path("bus"))
	if testing.Verbose() {
		l.service.Stdout, l.service.Stderr = os.Stderr, os.Stderr
	}
	must(t, "start rauc", l.service.Start())
	t.Cleanup(l.stop)
	awaitName(t, l.path("bus"), "de.pengutronix.rauc")
}

// awaitName waits until somebody owns a name on a bus.
func awaitName(t *testing.T, socket, name string) {
	t.Helper()
	wait := exec.Command("gdbus", "wait", "--address", "unix:path="+socket, "--timeout", "60", name)
	if out, err := wait.CombinedOutput(); err != nil {
		t.Fatalf("nobody became %s: %v: %s", name, err, out)
	}
}

// reboot is a power cut and a power-on.
func (l *raucLab) reboot() {
	l.stop()
	l.fw.at(l.fw.power + 1)
	l.start()
	l.open()
}

// open starts the daemon's half.
func (l *raucLab) open() {
	dev, err := install.OpenDelegate(l.t.Context(), install.DelegateConfig{
		Installer: install.RAUC{Bus: "unix:path=" + l.path("bus"), Command: []string{"rauc", "--conf=" + l.path("system.conf")}},
		BlockConfig: install.BlockTest{
			Step:   func(_ string, do func() error) error { return do() },
			Reboot: func(context.Context, install.SlotName, string) error { l.reboot(); return nil },
		}.With(l.fw.config(l.path("state"))),
	})
	must(l.t, "open", err)
	must(l.t, "start", dev.Start(l.t.Context()))
	l.dev = dev
}

// bundle makes a RAUC bundle and a release that carries it.
func (l *raucLab) bundle(key, compatible string, image []byte) (*verify.Release, []byte) {
	l.seq++
	dir := l.path(fmt.Sprintf("bundle%d", l.seq))
	writeFile(l.t, filepath.Join(dir, "rootfs.img"), string(image))
	writeFile(l.t, filepath.Join(dir, "manifest.raucm"),
		fmt.Sprintf("[update]\ncompatible=%s\nversion=%d.0.0\n[image.rootfs]\nfilename=rootfs.img\n", compatible, l.seq+1))
	runs(l.t, "rauc", "--cert="+l.path(key+".crt"), "--key="+l.path(key+".key"), "bundle", dir, dir+".raucb")
	return l.release(readTest(dir + ".raucb"))
}

func (l *raucLab) release(bundle []byte) (*verify.Release, []byte) {
	file := l.path("bundle.raucb")
	writeTest(file, bundle)
	l.seq++
	rel, _ := l.vendor.Verified(l.t, verifytest.Opts{Version: fmt.Sprintf("%d.0.0", l.seq), Seq: l.seq, Images: []verifytest.Image{{Name: "bundle.raucb", Path: file}}})
	return rel, bundle
}

func (l *raucLab) write(rel *verify.Release, bundle []byte) error {
	var last int64
	err := l.dev.Write(l.t.Context(), rel, rel.Manifest().Images, func(verify.Image) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(bundle)), nil
	}, func(done, total int64) { last = done })
	if err == nil && last != int64(len(bundle)) {
		l.t.Errorf("progress ended at %d of %d", last, len(bundle))
	}
	return err
}

// is compares phase, booted and default slot, and what they hold.
func (l *raucLab) is(phase install.Phase, booted, def install.SlotName, holds map[install.SlotName][]byte) install.State {
	l.t.Helper()
	st, err := l.dev.State(l.t.Context())
	must(l.t, "state", err)
	if st.Phase != phase || st.Booted != booted || st.Default != def {
		l.t.Fatalf("the device is %+v; want %s, %s booted, %s default", st, phase, booted, def)
	}
	for slot, image := range holds {
		if !bytes.HasPrefix(readTest(l.path(string(slot))), image) {
			l.t.Fatalf("slot %s holds something else", slot)
		}
	}
	return st
}

func TestRAUCForReal(t *testing.T) {
	for name, lab := range map[string]struct {
		bootloader string
		activates  bool
	}{"grub": {"grub", false}, "grub that activates": {"grub", true}, "custom": {"custom", false}} {
		t.Run(name, func(t *testing.T) { raucLife(t, newRaucLab(t, lab.bootloader, lab.activates)) })
	}
}

func raucLife(t *testing.T, l *raucLab) {
	ctx, a, b := t.Context(), install.SlotA, install.SlotB
	l.is(install.PhaseSettled, a, a, nil)
	image := noise(1, 300000)
	rel, bundle := l.bundle("right", "lab", image)
	must(t, "write", l.write(rel, bundle))
	st := l.is(install.PhaseSettled, a, a, map[install.SlotName][]byte{a: []byte("what the factory put there"), b: image})
	if c := st.Slots[b]; !c.Whole || c.Release != rel.ID() {
		t.Fatalf("slot b holds %+v", c)
	}
	if l.fw.turn(true) != a {
		t.Fatal("the write alone armed the slot")
	}
	must(t, "try", l.dev.Try(ctx, b))
	l.is(install.PhaseArmed, a, a, nil)
	must(t, "disarm", l.dev.Try(ctx, a))
	l.is(install.PhaseSettled, a, a, nil)
	must(t, "try", l.dev.Try(ctx, b))
	refusedWith(t, "write when armed", l.write(rel, bundle), verify.CodeBusy)
	must(t, "restart", l.dev.Restart(ctx))
	l.is(install.PhaseTrial, b, a, nil)
	refusedWith(t, "write on trial", l.write(rel, bundle), verify.CodeBusy)
	l.open()
	l.is(install.PhaseTrial, b, a, nil)
	must(t, "confirm", l.dev.Confirm(ctx))
	for range 3 {
		l.is(install.PhaseSettled, b, b, nil)
		l.reboot()
	}
	// A second one, to the other slot, that nobody confirms.
	second := noise(2, 200000)
	rel2, bundle2 := l.bundle("right", "lab", second)
	must(t, "write", l.write(rel2, bundle2))
	must(t, "try", l.dev.Try(ctx, a))
	must(t, "restart", l.dev.Restart(ctx))
	l.is(install.PhaseTrial, a, b, nil)
	l.reboot()
	if st := l.is(install.PhaseSettled, b, b, map[install.SlotName][]byte{a: second, b: image}); st.Failed != a {
		t.Fatalf("the failed slot is %q", st.Failed)
	}
	must(t, "forget", l.dev.Forget(ctx))
	// And one that is given up.
	must(t, "try", l.dev.Try(ctx, a))
	must(t, "restart", l.dev.Restart(ctx))
	must(t, "fall back", l.dev.Fallback(ctx))
	if st := l.is(install.PhaseSettled, a, b, nil); st.Failed != a {
		t.Fatalf("the failed slot is %q", st.Failed)
	}
	must(t, "restart", l.dev.Restart(ctx))
	l.is(install.PhaseSettled, b, b, nil)
}

func refusedWith(t *testing.T, what string, err error, code verify.Code) {
	t.Helper()
	if verify.CodeOf(err) != code {
		t.Fatalf("%s: %v (%s), want %s", what, err, verify.CodeOf(err), code)
	}
}

func TestRAUCRefusesForReal(t *testing.T) {
	l := newRaucLab(t, "grub", true)
	image := noise(3, 100000)
	tampered := func() (*verify.Release, []byte) {
		_, data := l.bundle("right", "lab", image)
		data = bytes.Clone(data)
		data[5000] ^= 1
		return l.release(data)
	}
	for name, bad := range map[string]struct {
		make func() (*verify.Release, []byte)
		says string
	}{
		"a foreign certificate": {func() (*verify.Release, []byte) { return l.bundle("wrong", "lab", image) }, "signature"},
		"changed bytes":         {tampered, "signature"},
		"another compatible":    {func() (*verify.Release, []byte) { return l.bundle("right", "other", image) }, "ompatible"},
		"no bundle at all":      {func() (*verify.Release, []byte) { return l.release(noise(4, 5000)) }, ""},
	} {
		rel, data := bad.make()
		err := l.write(rel, data)
		t.Logf("%s: %v", name, err)
		refusedWith(t, name, err, verify.CodeInstaller)
		if !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%s: the reason is %v", name, err)
		}
		st := l.is(install.PhaseSettled, install.SlotA, install.SlotA, map[install.SlotName][]byte{install.SlotA: []byte("what the factory put there")})
		if st.Slots[install.SlotB].Whole || l.fw.turn(true) != install.SlotA {
			t.Fatalf("%s: the device is %+v", name, st)
		}
	}
	rel, data := l.bundle("right", "lab", image)
	must(t, "write", l.write(rel, data))
	l.is(install.PhaseSettled, install.SlotA, install.SlotA, map[install.SlotName][]byte{install.SlotB: image})
}

// TestRAUCIsKilled ends the service, and with it all power, in the middle of an installation.
func TestRAUCIsKilled(t *testing.T) {
	for _, at := range []string{"pre-install", "post-install"} {
		t.Run(at, func(t *testing.T) {
			l := newRaucLab(t, "grub", true)
			image := noise(5, 400000)
			rel, data := l.bundle("right", "lab", image)
			runs(t, "mkfifo", l.path("reached"))
			l.handler(at, "echo $$ > "+l.path("reached")+"; exec sleep 600")
			reached, err := os.OpenFile(l.path("reached"), os.O_RDWR, 0)
			must(t, "open", err)
			var handler [16]byte
			result, here := make(chan error, 1), make(chan error, 1)
			go func() { result <- l.write(rel, data) }()
			go func() {
				_, err := reached.Read(handler[:])
				here <- err
			}()
			select {
			case err := <-here:
				must(t, "hear of the handler", err)
			case err := <-result:
				reached.WriteString("x") // so that the reader ends
				<-here
				t.Fatalf("the installation ended before the handler: %v", err)
			}
			reached.Close()
			l.stop()
			runs(t, "kill", strings.Trim(string(handler[:]), "\x00\n"))
			err = <-result
			t.Logf("killed: %v", err)
			refusedWith(t, "write", err, verify.CodeSlot)
			l.handler(at, "exit 0")
			l.reboot()
			if at == "post-install" {
				// RAUC had written and activated the slot. Its status proves that it is our release.
				st := l.is(install.PhaseTrial, install.SlotB, install.SlotA, map[install.SlotName][]byte{install.SlotB: image})
				if c := st.Slots[install.SlotB]; !c.Whole || c.Release != rel.ID() {
					t.Fatalf("slot b holds %+v", c)
				}
				must(t, "confirm", l.dev.Confirm(t.Context()))
				l.reboot()
				l.is(install.PhaseSettled, install.SlotB, install.SlotB, nil)
				return
			}
			if st := l.is(install.PhaseSettled, install.SlotA, install.SlotA, nil); st.Slots[install.SlotB].Whole {
				t.Fatalf("slot b holds %+v", st.Slots[install.SlotB])
			}
			must(t, "write", l.write(rel, data))
			must(t, "try", l.dev.Try(t.Context(), install.SlotB))
			must(t, "restart", l.dev.Restart(t.Context()))
			must(t, "confirm", l.dev.Confirm(t.Context()))
			l.is(install.PhaseSettled, install.SlotB, install.SlotB, map[install.SlotName][]byte{install.SlotB: image})
		})
	}
}
