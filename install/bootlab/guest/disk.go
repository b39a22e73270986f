package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"meshupd/install/bootlab"
)

const disk = "/dev/nvme0n1"

// stick holds a .update file from its first byte on.
func stick() string {
	if userMode() {
		return "/dev/ubdb"
	}
	return "/dev/nvme1n1"
}

func device(part int) string {
	if userMode() {
		return fmt.Sprintf("/dev/ubda%d", part)
	}
	return fmt.Sprintf("%sp%d", disk, part)
}

// userMode reports whether this is a user-mode kernel, which runs as a process of the lab's machine.
func userMode() bool { return word("lab.modules") != "" }

// waitFor waits for a device that the kernel is still looking for.
func waitFor(path string) error {
	for range 1000 {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s does not appear", path)
}

// mounts mounts the boot partition and the data partition, and returns where the bootloader's choice is: a folder, or the
// device when its file system is "raw".
func mounts(kind bootlab.Kind) (boot string, err error) {
	if err := waitFor(device(bootlab.PartData)); err != nil {
		return "", err
	}
	if err := unix.Mount(device(bootlab.PartData), "/data", "ext4", 0, ""); err != nil {
		return "", fmt.Errorf("mount the data: %w", err)
	}
	return mountBoot(kind)
}

func mountBoot(kind bootlab.Kind) (boot string, err error) {
	if err := waitFor(device(kind.Boot())); err != nil {
		return "", err
	}
	if kind.EFI || kind.FS == "vfat" {
		if err := modules(); err != nil {
			return "", err
		}
	}
	if _, err := os.Stat(variables); kind.EFI && err == nil {
		if err := unix.Mount("efivarfs", variables, "efivarfs", 0, ""); err != nil {
			return "", fmt.Errorf("mount the variables of the firmware: %w", err)
		}
	}
	options := ""
	switch kind.FS {
	case "raw":
		return device(kind.Boot()), nil
	case "efivarfs":
		return variables, nil
	case "vfat":
		options = "iocharset=ascii"
	}
	if err := unix.Mount(device(kind.Boot()), "/boot", kind.FS, 0, options); err != nil {
		return "", fmt.Errorf("mount the boot partition: %w", err)
	}
	return "/boot", nil
}

// variables is where the kernel wants the variables of the firmware; the folder is there when it was started by UEFI.
const variables = "/sys/firmware/efi/efivars"

// modules loads what is in the image, in the order of the names; with a user-mode kernel, from the lab's machine.
func modules() error {
	dir := "/lib/modules"
	if userMode() {
		if err := os.Mkdir("/run/modules", 0o755); err != nil {
			return err
		}
		dir = "/run/modules"
		if err := unix.Mount("none", dir, "hostfs", unix.MS_RDONLY, word("lab.modules")); err != nil {
			return fmt.Errorf("mount the modules: %w", err)
		}
	}
	files, err := filepath.Glob(dir + "/*.ko")
	if err != nil {
		return err
	}
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		// No such device: the variables of firmware that this machine does not have.
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}

// version is that of the slot that runs.
func version() string {
	text, err := os.ReadFile("/etc/version")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(text))
}

// mark leaves a marker in the write log: a block on a partition that nothing else uses, past the page cache and without a
// flush. Where the log is replayed it says that the promise the marker stands for had been given.
func mark(marker bootlab.Marker) error {
	f, err := os.OpenFile(device(bootlab.PartMarks), os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page := make([]byte, 2*bootlab.MarkSize)
	page = page[-uintptr(unsafe.Pointer(&page[0]))&(bootlab.MarkSize-1):][:bootlab.MarkSize]
	copy(page, bootlab.MarkerPrefix+string(marker)+"\n")
	_, err = f.WriteAt(page, 0)
	return err
}
