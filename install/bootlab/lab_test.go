package bootlab_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"meshupd/install/bootlab"
)

// need skips a test where the lab cannot run, and says why. In CI it must run.
func need(t testing.TB, tools ...string) bootlab.Kernel {
	t.Helper()
	cannot := t.Skipf
	if os.Getenv("CI") != "" {
		cannot = t.Fatalf
	}
	if testing.Short() {
		t.Skip("boots take their time")
	}
	for _, name := range append(tools, "qemu-system-x86_64", "sfdisk", "mkfs.ext4", "e2fsck", "debugfs", "nice", "cp", "go") {
		if _, err := exec.LookPath(name); err != nil {
			cannot("%s is not installed: nothing was booted", name)
		}
	}
	k, err := bootlab.FindKernel()
	if err != nil {
		cannot("%v: nothing was booted", err)
	}
	return k
}

// newLab makes a lab for GRUB.
func newLab(t testing.TB, releases int) *bootlab.Lab {
	t.Helper()
	return newLabOf(t, "grub", releases, "grub-mkimage", "grub-fstest")
}

// newEFILab makes a lab for a kind with UEFI firmware.
func newEFILab(t testing.TB, kind string, releases int) *bootlab.Lab {
	t.Helper()
	l := newLabOf(t, kind, releases, "mkfs.vfat", "mcopy")
	for _, path := range bootlab.EFIFiles {
		if _, err := os.Stat(path); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%v: nothing was booted", err)
			}
			t.Skipf("%v: nothing was booted", err)
		}
	}
	return l
}

func newLabOf(t testing.TB, kind string, releases int, tools ...string) *bootlab.Lab {
	t.Helper()
	kernel := need(t, tools...)
	l, err := bootlab.NewLab(t.Context(), ramDir(t), filepath.Join("..", ".."), bootlab.Kinds[kind], kernel, releases)
	must(t, "make a lab", err)
	return l
}

// ramDir is a folder in memory where there is one: nothing here has to outlast the test.
func ramDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "meshupd-bootlab-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func must(t testing.TB, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// torture skips what a change should not wait for.
func torture(t testing.TB) {
	t.Helper()
	if os.Getenv("MESHUPD_TORTURE") == "" {
		t.Skip("long: MESHUPD_TORTURE=1 runs it")
	}
}
