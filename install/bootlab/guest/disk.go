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

const (
	disk  = "/dev/nvme0n1"
	stick = "/dev/nvme1n1" // holds a .update file from its first byte on
)

func device(part int) string { return fmt.Sprintf("%sp%d", disk, part) }

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
// device when fs is "raw".
func mounts(fs string) (boot string, err error) {
	for _, part := range []int{bootlab.PartBoot, bootlab.PartData} {
		if err := waitFor(device(part)); err != nil {
			return "", err
		}
	}
	if err := unix.Mount(device(bootlab.PartData), "/data", "ext4", 0, ""); err != nil {
		return "", fmt.Errorf("mount the data: %w", err)
	}
	options := ""
	switch fs {
	case "raw":
		return device(bootlab.PartBoot), nil
	case "vfat":
		if err := modules(); err != nil {
			return "", err
		}
		options = "iocharset=ascii"
	}
	if err := unix.Mount(device(bootlab.PartBoot), "/boot", fs, 0, options); err != nil {
		return "", fmt.Errorf("mount the boot partition: %w", err)
	}
	return "/boot", nil
}

// modules loads what is in the image, in the order of the names.
func modules() error {
	files, err := filepath.Glob("/lib/modules/*.ko")
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
		if err != nil && !errors.Is(err, unix.EEXIST) {
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
