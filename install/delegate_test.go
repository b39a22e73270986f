package install_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

// delegateHarness is a machine whose slots another installer writes.
func delegateHarness(t *testing.T, f *firmware, inst install.Installer, holds func(install.SlotName) verify.Digest) slotstest.Harness {
	dir := ramDir(t)
	offset := 0 // starts of the machine that the daemon asked for
	return slotstest.Harness{
		Images: 1,
		Open: func(power int, step slotstest.Step) (slotstest.Device, error) {
			f.at(power + offset)
			return install.OpenDelegate(t.Context(), install.DelegateConfig{Installer: inst, BlockConfig: install.BlockTest{
				Step: step,
				Reboot: func(context.Context, install.SlotName, string) error {
					offset++
					f.at(power + offset)
					return nil
				},
			}.With(f.config(filepath.Join(dir, "state")))})
		},
		Pointed: func() install.SlotName { return f.turn(true) },
		Holds: func(slot install.SlotName) map[string]verify.Digest {
			return map[string]verify.Digest{slotstest.FirstImage: holds(slot)}
		},
	}
}

func raucHarness(activates bool) func(t *testing.T) slotstest.Harness {
	return func(t *testing.T) slotstest.Harness {
		fake := install.NewFakeRAUC([]byte("what the factory put there"))
		fake.Activates = activates
		return delegateHarness(t, &firmware{turn: fake.Turn}, install.RAUCWith(fake), fake.Holds)
	}
}

func TestDelegateRAUC(t *testing.T) { slotstest.Run(t, raucHarness(false)) }

func TestDelegateRAUCThatActivates(t *testing.T) { slotstest.Run(t, raucHarness(true)) }

// fileDigests reads slots that are files a.img and b.img.
func fileDigests(t *testing.T, dir string) func(install.SlotName) verify.Digest {
	return func(slot install.SlotName) verify.Digest {
		return imageDigest(t, filepath.Join(dir, string(slot)+".img"))[slotstest.FirstImage]
	}
}

// slotFiles makes a.img with the factory's content and an empty b.img.
func slotFiles(t *testing.T) string {
	dir := ramDir(t)
	writeFile(t, filepath.Join(dir, "a.img"), "what the factory put there")
	writeFile(t, filepath.Join(dir, "b.img"), "")
	return dir
}

func TestDelegateExecutable(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		f, dir := customFirmware(t), slotFiles(t)
		custom := f.loader.(install.Custom)
		script := filepath.Join(dir, "installer")
		writeFile(t, script, fmt.Sprintf(`set -eu
dir=%q
case "$1" in
write) cat > "$dir/new"; echo 50%%; mv "$dir/new" "$dir/$2.img"; test "$MESHUPD_SLOT" = "$2" ;;
check) echo "$MESHUPD_SHA256  $dir/$2.img" | sha256sum -c - >&2 ;;
*) exec %s "$@" ;;
esac
`, dir, strings.Join(custom.Command, " ")))
		custom.Command = []string{"/bin/sh", script}
		f.loader = nil
		return delegateHarness(t, f, install.Executable{Custom: custom}, fileDigests(t, dir))
	})
}

// TestDelegateProgram has a program in the place of swupdate, which a bootloader of ours stands behind.
func TestDelegateProgram(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		f, dir := grubFirmware(t), slotFiles(t)
		return delegateHarness(t, f, install.Program{
			Command: []string{"/bin/sh", "-c", `cp "$1" "` + dir + `/new" && mv "` + dir + `/new" "` + dir + `/$2.img"`, "install", "{file}", "{slot}"},
		}, fileDigests(t, dir))
	})
}
