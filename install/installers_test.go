package install_test

import (
	"os"
	"os/exec"
	"testing"

	"meshupd/install"
)

// needTools skips a test with programs that are not installed, and says so.
func needTools(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			install.CannotRun(t, "%s is not installed; the real installer did not run", name)
		}
	}
	if os.Geteuid() != 0 {
		install.CannotRun(t, "the real installer needs root; it did not run")
	}
}

func runs(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", argv, err, out)
	}
	return string(out)
}
