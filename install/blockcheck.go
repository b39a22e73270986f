package install

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// system is where the running system tells what it uses.
type system struct {
	proc, sys, root string
}

func (s system) withDefaults() system {
	if s == (system{}) {
		return system{"/proc", "/sys", "/"}
	}
	return s
}

const maxProcFile = 4 << 20

// deviceID is what makes two paths the same slot.
type deviceID struct {
	block      bool
	dev, inode uint64 // of a block device dev alone, as major and minor
}

func identify(path string) (deviceID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return deviceID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		return deviceID{block: true, dev: uint64(st.Rdev)}, nil
	case unix.S_IFREG:
		return deviceID{dev: uint64(st.Dev), inode: st.Ino}, nil
	}
	return deviceID{}, fmt.Errorf("%s is neither a block device nor a file", path)
}

func (d deviceID) numbers() string { return fmt.Sprintf("%d:%d", unix.Major(d.dev), unix.Minor(d.dev)) }

// checkApart refuses with E-CONFIG two slots that are one, and a state folder that lies on a slot.
func (s system) checkApart(a, b, state string) error {
	var ids [2]deviceID
	for i, path := range []string{a, b} {
		id, err := identify(path)
		if err != nil {
			return verify.Refuse(verify.CodeConfig, "open a slot: %w", err)
		}
		ids[i] = id
	}
	if ids[0] == ids[1] {
		return verify.Refuse(verify.CodeConfig, "both slots are %s", a)
	}
	var st unix.Stat_t
	if err := unix.Stat(state, &st); err != nil {
		return verify.Refuse(verify.CodeConfig, "look at the folder of the records: %w", err)
	}
	for i, path := range []string{a, b} {
		if ids[i].block && ids[i].dev == uint64(st.Dev) {
			return verify.Refuse(verify.CodeConfig, "the folder of the records %s lies on the slot %s, which an update overwrites", state, path)
		}
	}
	return nil
}

// checkIdle says why a device must not be written.
func (s system) checkIdle(path string) error {
	id, err := identify(path)
	if err != nil {
		return err
	}
	if !id.block {
		return s.checkLoops(path)
	}
	var st unix.Stat_t
	if err := unix.Stat(s.root, &st); err != nil {
		return err
	}
	if uint64(st.Dev) == id.dev {
		return fmt.Errorf("the system runs from %s", path)
	}
	data, err := readSmall(filepath.Join(s.proc, "self", "mountinfo"), maxProcFile)
	if err != nil {
		return err
	}
	if at := mountedAt(string(data), id.numbers()); at != "" {
		return fmt.Errorf("%s is mounted at %s", path, at)
	}
	holders, err := os.ReadDir(filepath.Join(s.sys, "dev", "block", id.numbers(), "holders"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if len(holders) > 0 {
		return fmt.Errorf("%s is used by %s", path, holders[0].Name())
	}
	return nil
}

// checkLoops refuses a file that a loop device shows.
func (s system) checkLoops(path string) error {
	whole, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	if whole, err = filepath.Abs(whole); err != nil {
		return err
	}
	backing, err := filepath.Glob(filepath.Join(s.sys, "block", "loop*", "loop", "backing_file"))
	if err != nil {
		return err
	}
	for _, file := range backing {
		name, err := readSmall(file, unix.PathMax)
		if err == nil && strings.TrimSuffix(string(name), "\n") == whole {
			return fmt.Errorf("%s is used by %s", path, filepath.Base(filepath.Dir(filepath.Dir(file))))
		}
	}
	return nil
}

// mountedAt finds a device, "major:minor", in /proc/self/mountinfo (proc_pid_mountinfo(5)): its mount point, or "".
func mountedAt(mountinfo, device string) string {
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 && f[2] == device {
			return f[4]
		}
	}
	return ""
}

// runningSlot tells which slot runs. The kernel command line is asked first, meshupd.slot=a or RAUC's rauc.slot=A, because
// a root file system on an overlay or dm-verity does not tell what it lies on; then the device of the root file system.
// Errors are E-BOOT.
func (s system) runningSlot(a, b string) (SlotName, error) {
	data, err := readSmall(filepath.Join(s.proc, "cmdline"), maxProcFile)
	if err != nil {
		return "", verify.Refuse(verify.CodeBoot, "look which slot runs: %w", err)
	}
	if slot := slotOfCmdline(string(data)); slot != "" {
		return slot, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(s.root, &st); err != nil {
		return "", verify.Refuse(verify.CodeBoot, "look which slot runs: %w", err)
	}
	for slot, path := range map[SlotName]string{SlotA: a, SlotB: b} {
		if id, err := identify(path); err == nil && id.block && id.dev == uint64(st.Dev) {
			return slot, nil
		}
	}
	return "", verify.Refuse(verify.CodeBoot, "look which slot runs: the root file system is on neither, and the kernel command line has no meshupd.slot=a or b")
}

// slotOfCmdline returns "" when the command line does not say.
func slotOfCmdline(cmdline string) SlotName {
	for _, key := range []string{"meshupd.slot=", "rauc.slot="} {
		for _, word := range strings.Fields(cmdline) {
			if value, found := strings.CutPrefix(word, key); found {
				if slot := SlotName(strings.ToLower(value)); slot.valid() {
					return slot
				}
			}
		}
	}
	return ""
}
