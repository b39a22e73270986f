package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestRAUCDevice takes a release that carries a RAUC bundle from the import to the confirmed slot, and one that RAUC refuses
// to the history, with the real RAUC service. CI has it.
func TestRAUCDevice(t *testing.T) {
	for _, name := range []string{"rauc", "dbus-daemon", "gdbus", "openssl", "grub-editenv", "mksquashfs", "setsid"} {
		if _, err := exec.LookPath(name); err != nil || os.Geteuid() != 0 {
			if os.Getenv("CI") != "" {
				t.Fatalf("CI must have %s, and run as root", name)
			}
			t.Skipf("%s is not installed, or this is not root: RAUC did not run", name)
		}
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/rauc",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			for _, set := range [][2]string{{"TZ", "UTC"}, {"LANG", "C.UTF-8"}, {"NO_COLOR", ""}, {"SOURCE_DATE_EPOCH", "1790000000"},
				{"HOME", filepath.Join(env.WorkDir, "home")}} {
				env.Setenv(set[0], set[1])
			}
			env.Defer(func() { exec.Command("sh", filepath.Join(env.WorkDir, "lab.sh"), "off").Run() })
			return os.Mkdir(filepath.Join(env.WorkDir, "home"), 0o700)
		},
	})
}
