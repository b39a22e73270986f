package install_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
)

// menderRoot runs mender on a machine of its own: the root file system is the slot that was started, read-only, and the rest is
// this machine's. Its fw_printenv and fw_setenv are the real ones.
const menderRoot = `set -eu
dir=$1
shift
mount -o ro,noload "$(cat "$dir/loop.$(cat "$dir/booted")")" "$dir/root"
for d in usr dev proc sys tmp; do mount --rbind "/$d" "$dir/root/$d"; done
for d in etc var state; do mount --bind "$dir/$d" "$dir/root/$d"; done
exec chroot "$dir/root" env PATH=/state/bin:/usr/sbin:/usr/bin mender --no-syslog "$@"
`

// rootImages are file systems with nothing but what menderRoot mounts on.
func rootImages(t *testing.T) func(seed, n int) []byte {
	skeleton := t.TempDir()
	for _, d := range []string{"usr", "dev", "proc", "sys", "tmp", "etc", "var", "state"} {
		must(t, "mkdir", os.Mkdir(filepath.Join(skeleton, d), 0o755))
	}
	for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
		must(t, "link", os.Symlink("usr/"+d, filepath.Join(skeleton, d)))
	}
	return func(seed, _ int) []byte {
		path := filepath.Join(t.TempDir(), "root.ext4")
		must(t, "noise", os.WriteFile(filepath.Join(skeleton, "noise"), noise(uint64(seed), 300_000), 0o600))
		writeFile(t, path, "")
		must(t, "size", os.Truncate(path, 4<<20))
		runs(t, "mkfs.ext4", "-q", "-F", "-d", skeleton, path)
		return readTest(path)
	}
}

// TestMenderRootfsForReal: mender's own kind of update, rootfs-image, with its U-Boot integration. Mender arms the slot when it has
// written it; meshupd takes that back and arms it when it is time to.
func TestMenderRootfsForReal(t *testing.T) {
	needTools(t, "mender", "unshare", "mount", "chroot", "losetup", "mkfs.ext4", "fw_printenv", "fw_setenv")
	dir := ramDir(t)
	images := rootImages(t)
	factory := images(99, 0)
	var numbers []string
	for _, slot := range []string{"a", "b"} {
		writeTest(filepath.Join(dir, slot), bytes.Clone(factory))
		loop := loopOver(t, filepath.Join(dir, slot))
		writeFile(t, filepath.Join(dir, "loop."+slot), loop)
		numbers = append(numbers, strings.TrimLeft(loop, "/abcdefghijklmnopqrstuvwxyz"))
	}
	for name, text := range map[string]string{
		"etc/mender/mender.conf":   fmt.Sprintf(`{"RootfsPartA":"/dev/loop%s","RootfsPartB":"/dev/loop%s"}`, numbers[0], numbers[1]),
		"etc/mender/artifact_info": "artifact_name=r1\n", "var/lib/mender/device_type": "device_type=lab\n", "root/.keep": "",
		"etc/fw_env.config": "/state/env 0 0x400\n/state/env 0x400 0x400\n",
		"run.sh":            menderRoot, "booted": "a",
	} {
		writeFile(t, filepath.Join(dir, name), text)
	}
	for _, tool := range []string{"fw_printenv", "fw_setenv"} {
		writeFile(t, filepath.Join(dir, "state/bin", tool), "#!/bin/sh\nexec /usr/bin/"+tool+" -c /etc/fw_env.config \"$@\"\n")
		must(t, "chmod", os.Chmod(filepath.Join(dir, "state/bin", tool), 0o755))
	}

	wrap := []string{"unshare", "-m", "--propagation", "private", "sh", filepath.Join(dir, "run.sh"), dir}
	inst := install.Mender()
	for _, argv := range []*[]string{&inst.Command, &inst.Commit, &inst.Rollback} {
		*argv = append(append([]string(nil), wrap...), (*argv)[1:]...)
	}
	lab := newProgramLabOn(t, dir, inst, menderFirmware(dir, install.Names{A: numbers[0], B: numbers[1]}))
	lab.factory, lab.content = factory, images
	lab.life(func(image []byte) []byte { return menderArtifact("lab", "rootfs-image", image) }, map[string]func() []byte{
		"another device": func() []byte { return menderArtifact("other", "rootfs-image", images(3, 0)) },
		"changed bytes": func() []byte {
			data := menderArtifact("lab", "rootfs-image", noise(3, 50000))
			data[len(data)-20000] ^= 1
			return data
		},
	})
}

// menderFirmware is U-Boot with Mender's variables, in a file that fw_setenv writes too.
func menderFirmware(dir string, names install.Names) *firmware {
	u := ubootCopies{filepath.Join(dir, "state", "env"), 1024}
	writeTest(u.path, bytes.Repeat([]byte{0xff}, 2*u.size))
	conf := filepath.Join(dir, "fw_env.config")
	writeTest(conf, fmt.Appendf(nil, "%s 0 0x400\n%s 0x400 0x400\n", u.path, u.path))
	u.save(map[string]string{"mender_boot_part": names.A, "mender_boot_part_hex": hexOf(names.A), "upgrade_available": "0", "bootcount": "0"}, 1, 1)
	return &firmware{
		loader: install.UBoot{Config: conf, Scheme: install.UBootCount, Slot: "mender_boot_part", Names: names},
		turn: func(dry bool) install.SlotName {
			vars, _ := u.load()
			vars["boot_slot"] = map[string]string{names.A: "A", names.B: "B"}[vars["mender_boot_part"]]
			slot := install.SlotName(strings.ToLower(ubootCountTurn(vars)))
			if delete(vars, "boot_slot"); !dry {
				u.change(vars)
				writeTest(filepath.Join(dir, "booted"), []byte(slot))
			}
			if want := hexOf(vars["mender_boot_part"]); vars["mender_boot_part_hex"] != want {
				panic(fmt.Sprintf("the kernel would come from partition %s and the root from %s", vars["mender_boot_part_hex"], want))
			}
			return slot
		},
	}
}

func hexOf(number string) string {
	var n int
	_, _ = fmt.Sscan(number, &n)
	return fmt.Sprintf("%x", n)
}
