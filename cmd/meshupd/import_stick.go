package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// stickTypes are the file systems that a stick may have, and how each is mounted. No other driver of the kernel is
// given bytes that a stranger wrote. An ext4 journal is not replayed: that would write to the stick.
var stickTypes = []struct {
	name  string
	flags []string
}{{"vfat", nil}, {"exfat", nil}, {"ext4", []string{"noload"}}}

// stick is a block device that is mounted read-only and has no place in any file tree: nobody else sees it, and the
// kernel unmounts it when this process ends, however it ends.
type stick struct {
	fd     int
	device string
}

// isDevice says whether path is a block device.
func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == os.ModeDevice
}

// mountStick mounts the device; E-IO when it has none of the file systems, E-BUSY when the system uses it.
func mountStick(device string) (*stick, error) {
	// A disk that carries a mounted or held file system is in use, and no stick; O_EXCL finds that out.
	fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, verify.Refuse(verify.CodeBusy, "%s is in use: import from where it is mounted", device)
	}
	if err != nil {
		return nil, openError("open", &os.PathError{Op: "open", Path: device, Err: err})
	}
	_ = unix.Close(fd)
	var tried []string
	for _, kind := range stickTypes {
		mfd, err := mountDetached(device, kind.name, kind.flags)
		switch {
		case err == nil:
			return &stick{mfd, device}, nil
		case errors.Is(err, unix.EPERM):
			return nil, verify.Refuse(verify.CodePermission, "mount %s: %w", device, err)
		case errors.Is(err, unix.ENOSYS):
			return nil, verify.Refuse(verify.CodeIO, "this kernel (before 5.2) cannot mount %s without a place: mount it, and import from there", device)
		}
		tried = append(tried, fmt.Sprintf("%s: %v", kind.name, err))
	}
	return nil, verify.Refuse(verify.CodeIO, "%s has no file system that is read from sticks (%s)", device, strings.Join(tried, ", "))
}

func mountDetached(device, kind string, flags []string) (int, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", device); err != nil {
		return -1, err
	}
	for _, flag := range append([]string{"ro"}, flags...) {
		if err := unix.FsconfigSetFlag(fs, flag); err != nil {
			return -1, err
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC,
		unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
}

// path is where the files of the stick are, for this process alone.
func (s *stick) path() string { return fmt.Sprintf("/proc/self/fd/%d", s.fd) }

// shown puts the device's name where a path names a descriptor.
func (s *stick) shown(path string) string {
	if s == nil {
		return path
	}
	return strings.ReplaceAll(path, s.path(), s.device)
}

func (s *stick) close() {
	if s != nil {
		_ = unix.Close(s.fd)
	}
}
