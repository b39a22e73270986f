package install_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// programLab is a machine with a real installer that is run once for each image, and a bootloader.
type programLab struct {
	t      *testing.T
	dir    string
	fw     *firmware
	inst   install.Program
	dev    *install.Delegate
	vendor *verifytest.Vendor
	seq    uint64
	told   []int // percents of the writes

	factory []byte                   // what slot a holds at first
	content func(seed, n int) []byte // makes images
}

func newProgramLab(t *testing.T, dir string, inst install.Program) *programLab {
	for _, slot := range []string{"a", "b"} {
		writeFile(t, filepath.Join(dir, slot), "what the factory put there")
		must(t, "size", os.Truncate(filepath.Join(dir, slot), 1<<20))
	}
	return newProgramLabOn(t, dir, inst, grubFirmware(t))
}

// newProgramLabOn takes the slots a and b of a folder as they are.
func newProgramLabOn(t *testing.T, dir string, inst install.Program, fw *firmware) *programLab {
	l := &programLab{t: t, dir: dir, fw: fw, inst: inst, vendor: verifytest.NewVendor(t, "program"), factory: []byte("what the factory put there"),
		content: func(seed, n int) []byte { return noise(uint64(seed), n) }}
	l.fw.at(1)
	l.open()
	return l
}

func (l *programLab) open() {
	dev, err := install.OpenDelegate(l.t.Context(), install.DelegateConfig{Installer: l.inst, BlockConfig: install.BlockTest{
		Step: func(_ string, do func() error) error { return do() },
		Reboot: func(context.Context, install.SlotName, string) error {
			l.fw.at(l.fw.power + 1)
			l.open()
			return nil
		},
	}.With(l.fw.config(filepath.Join(l.dir, "state")))})
	must(l.t, "open", err)
	must(l.t, "start", dev.Start(l.t.Context()))
	l.dev = dev
}

func (l *programLab) write(data []byte) error {
	file := filepath.Join(l.dir, "image")
	writeTest(file, data)
	l.seq++
	rel, _ := l.vendor.Verified(l.t, verifytest.Opts{Version: fmt.Sprintf("%d.0.0", l.seq), Seq: l.seq, Images: []verifytest.Image{{Name: "update", Path: file}}})
	var err error
	for range 5 { // as the daemon does: an accident is tried again
		err = l.dev.Write(l.t.Context(), rel, rel.Manifest().Images, func(verify.Image) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(data)), nil
		}, func(done, total int64) {
			if percent := int(done * 100 / total); len(l.told) == 0 || l.told[len(l.told)-1] != percent {
				l.told = append(l.told, percent)
			}
		})
		if verify.CodeOf(err) != verify.CodeSlot {
			return err
		}
		l.t.Logf("tried again: %v", err)
	}
	return err
}

func (l *programLab) is(phase install.Phase, booted, def install.SlotName) install.State {
	l.t.Helper()
	st, err := l.dev.State(l.t.Context())
	must(l.t, "state", err)
	if st.Phase != phase || st.Booted != booted || st.Default != def {
		l.t.Fatalf("the device is %+v; want %s, %s booted, %s default", st, phase, booted, def)
	}
	return st
}

func (l *programLab) holds(slot string, image []byte) {
	l.t.Helper()
	if !bytes.HasPrefix(readTest(filepath.Join(l.dir, slot)), image) {
		l.t.Fatalf("slot %s holds something else", slot)
	}
}

// life: one release is confirmed, a bad one refused, one is given up.
func (l *programLab) life(make func(image []byte) []byte, bad map[string]func() []byte) {
	t, ctx, a, b := l.t, l.t.Context(), install.SlotA, install.SlotB
	image, second := l.content(1, 200000), l.content(2, 100000)
	must(t, "write", l.write(make(image)))
	l.holds("a", l.factory)
	l.holds("b", image)
	if st := l.is(install.PhaseSettled, a, a); !st.Slots[b].Whole {
		t.Fatalf("slot b holds %+v", st.Slots[b])
	}
	must(t, "try", l.dev.Try(ctx, b))
	must(t, "restart", l.dev.Restart(ctx))
	l.is(install.PhaseTrial, b, a)
	must(t, "confirm", l.dev.Confirm(ctx))
	l.is(install.PhaseSettled, b, b)
	for name, data := range bad {
		err := l.write(data())
		t.Logf("%s: %v", name, err)
		refusedWith(t, name, err, verify.CodeInstaller)
		if st := l.is(install.PhaseSettled, b, b); st.Slots[a].Whole {
			t.Fatalf("%s: slot a holds %+v", name, st.Slots[a])
		}
		l.holds("b", image)
	}
	must(t, "write", l.write(make(second)))
	l.holds("a", second)
	must(t, "try", l.dev.Try(ctx, a))
	must(t, "restart", l.dev.Restart(ctx))
	l.is(install.PhaseTrial, a, b)
	must(t, "fall back", l.dev.Fallback(ctx))
	must(t, "restart", l.dev.Restart(ctx))
	if st := l.is(install.PhaseSettled, b, b); st.Failed != a {
		t.Fatalf("the failed slot is %q", st.Failed)
	}
	must(t, "write again", l.write(make(second)))
}

func TestSWUpdateForReal(t *testing.T) {
	needTools(t, "swupdate", "openssl", "cpio")
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir) // swupdate's sockets
	for _, key := range []string{"right", "wrong"} {
		runs(t, "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", filepath.Join(dir, key+".key"), "-out", filepath.Join(dir, key+".crt"),
			"-subj", "/CN="+key, "-days", "3650", "-addext", "keyUsage=digitalSignature", "-addext", "extendedKeyUsage=emailProtection")
	}
	pack := func(key string, image []byte) []byte {
		work := t.TempDir()
		writeTest(filepath.Join(work, "rootfs.img"), image)
		part := func(slot string) string {
			return fmt.Sprintf(`%s: { images: ( { filename = "rootfs.img"; device = %q; type = "raw"; sha256 = "%x"; } ); };`,
				strings.ToUpper(slot), filepath.Join(dir, slot), sha256.Sum256(image))
		}
		writeTest(filepath.Join(work, "sw-description"), []byte(`software = { version = "2.0.0"; hardware-compatibility: ["1.0"]; stable: { `+part("a")+part("b")+` }; }`))
		runs(t, "openssl", "cms", "-sign", "-in", filepath.Join(work, "sw-description"), "-out", filepath.Join(work, "sw-description.sig"),
			"-signer", filepath.Join(dir, key+".crt"), "-inkey", filepath.Join(dir, key+".key"), "-outform", "DER", "-nosmimecap", "-binary")
		runs(t, "sh", "-c", `cd "$1" && printf 'sw-description\nsw-description.sig\nrootfs.img\n' | cpio -o -H crc >up.swu 2>/dev/null`, "pack", work)
		return readTest(filepath.Join(work, "up.swu"))
	}
	inst := install.SWUpdate("-k", filepath.Join(dir, "right.crt"), "-H", "lab:1.0", "-e", "stable,{slot}")
	inst.Names = install.Names{A: "A", B: "B"}
	lab := newProgramLab(t, dir, inst)
	lab.life(func(image []byte) []byte { return pack("right", image) }, map[string]func() []byte{
		"a foreign certificate": func() []byte { return pack("wrong", noise(3, 50000)) },
		"changed bytes": func() []byte {
			data := pack("right", noise(3, 50000))
			data[len(data)-9000] ^= 1
			return data
		},
		"no image at all": func() []byte { return noise(4, 5000) },
	})
	// The check of the bytes is the first quarter, and the end is told by us: all between them comes from swupdate. It tells
	// those who have come by then, and on a busy machine it can be done before.
	for try := range 10 {
		lab.told = nil
		must(t, "write a large one", lab.write(pack("right", noise(uint64(5+try), 8<<20))))
		if slices.ContainsFunc(lab.told, func(n int) bool { return n > 25 && n < 100 }) {
			return
		}
	}
	t.Errorf("of its progress nothing was told but %d", lab.told)
}

// menderModule installs to the slot that it is told, and can be rolled back, so that mender waits for a commit.
const menderModule = `#!/bin/sh
set -eu
case "$1" in
SupportsRollback) echo Yes ;;
NeedsArtifactReboot) echo No ;;
ArtifactInstall) cp "$2/files/rootfs.img" %q/"$MESHUPD_SLOT" ;;
ArtifactCommit) echo commit >> %q ;;
ArtifactRollback) echo rollback >> %[2]q ;;
esac
`

// menderArtifact is an artifact of version 3 with one payload for the module.
func menderArtifact(device, kind string, image []byte) []byte {
	pack := func(zip bool, files ...string) []byte {
		var out bytes.Buffer
		var w io.WriteCloser = struct {
			io.Writer
			io.Closer
		}{&out, io.NopCloser(nil)}
		if zip {
			w = gzip.NewWriter(&out)
		}
		tw := tar.NewWriter(w)
		for i := 0; i < len(files); i += 2 {
			tw.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1])), Format: tar.FormatUSTAR})
			io.WriteString(tw, files[i+1])
		}
		tw.Close()
		if zip {
			w.Close()
		}
		return out.Bytes()
	}
	version := `{"format":"mender","version":3}`
	header := string(pack(true, "header-info", `{"payloads":[{"type":"`+kind+`"}],"artifact_provides":{"artifact_name":"r2"},"artifact_depends":{"device_type":["`+device+`"]}}`,
		"headers/0000/type-info", `{"type":"`+kind+`"}`))
	manifest := fmt.Sprintf("%x  data/0000/rootfs.img\n%x  header.tar.gz\n%x  version\n", sha256.Sum256(image), sha256.Sum256([]byte(header)), sha256.Sum256([]byte(version)))
	return pack(false, "version", version, "manifest", manifest, "header.tar.gz", header, "data/0000.tar.gz", string(pack(true, "rootfs.img", string(image))))
}

func TestMenderForReal(t *testing.T) {
	needTools(t, "mender", "unshare", "mount")
	dir := t.TempDir()
	told := filepath.Join(dir, "told")
	writeFile(t, filepath.Join(dir, "modules", "meshupd-test"), fmt.Sprintf(menderModule, dir, told))
	must(t, "chmod", os.Chmod(filepath.Join(dir, "modules", "meshupd-test"), 0o755))
	writeFile(t, filepath.Join(dir, "etc", "artifact_info"), "artifact_name=r1\n")
	writeFile(t, filepath.Join(dir, "etc", "mender.conf"), "{}")
	writeFile(t, filepath.Join(dir, "data", "device_type"), "device_type=lab\n")
	// Two paths are built into mender: they are covered in a mount namespace of its own.
	wrap := []string{"unshare", "-m", "sh", "-c", fmt.Sprintf(
		`mount --bind %[1]q/modules /usr/share/mender/modules/v3 && mount --bind %[1]q/etc /etc/mender && exec mender --no-syslog --data %[1]q/data "$@"`, dir), "mender"}
	inst := install.Mender()
	for _, argv := range []*[]string{&inst.Command, &inst.Commit, &inst.Rollback} {
		*argv = append(append([]string(nil), wrap...), (*argv)[1:]...)
	}
	newProgramLab(t, dir, inst).life(func(image []byte) []byte { return menderArtifact("lab", "meshupd-test", image) }, map[string]func() []byte{
		"another device": func() []byte { return menderArtifact("other", "meshupd-test", noise(3, 5000)) },
		"changed bytes": func() []byte {
			data := menderArtifact("lab", "meshupd-test", noise(3, 50000))
			data[len(data)-20000] ^= 1
			return data
		},
	})
	if got := string(readTest(told)); got != "commit\nrollback\n" {
		t.Errorf("mender was told %q", got)
	}
}
