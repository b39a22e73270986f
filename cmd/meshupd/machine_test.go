package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMachines takes releases from the import to the confirmed slot, and others to the history, on machines of which only the
// firmware is a script: with the real RAUC, an integrator's installer, or block slots and GRUB's environment; in one piece, or in
// two halves as two users. CI has what they need.
func TestMachines(t *testing.T) {
	if testing.Short() {
		t.Skip("starts machines again and again; not in the short run")
	}
	for _, name := range []string{"rauc", "dbus-daemon", "gdbus", "openssl", "grub-editenv", "mksquashfs", "setsid", "setpriv", "unshare"} {
		if _, err := exec.LookPath(name); err != nil || os.Geteuid() != 0 {
			if os.Getenv("CI") != "" {
				t.Fatalf("CI must have %s, and run as root", name)
			}
			t.Skipf("%s is not installed, or this is not root: no machine ran", name)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/machine",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			for _, set := range [][2]string{{"TZ", "UTC"}, {"LANG", "C.UTF-8"}, {"NO_COLOR", ""}, {"SOURCE_DATE_EPOCH", "1790000000"},
				{"HOME", filepath.Join(env.WorkDir, "home")}, {"DBUS_SYSTEM_BUS_ADDRESS", "unix:path=" + filepath.Join(env.WorkDir, "bus")}} {
				env.Setenv(set[0], set[1])
			}
			env.Defer(func() { exec.Command("sh", filepath.Join(env.WorkDir, "lab.sh"), "off").Run() })
			return errors.Join(os.CopyFS(env.WorkDir, os.DirFS("testdata/machine/lab")), os.Mkdir(filepath.Join(env.WorkDir, "home"), 0o700))
		},
	})
}
