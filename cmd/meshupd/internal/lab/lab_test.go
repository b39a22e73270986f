package lab_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/simnet"
)

// binary is the meshupd executable that all tests of this package run.
var binary string

// TestMain builds the program the way the README does and moves into a private network.
func TestMain(m *testing.M) {
	if err := simnet.Enter(); err != nil {
		fmt.Fprintln(os.Stderr, "SKIPPED: no private network here, so no test of whole sites:", err)
		if os.Getenv("CI") != "" {
			os.Exit(1)
		}
		return
	}
	dir, err := os.MkdirTemp("", "lab-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "meshupd")
	build := exec.Command("go", "build", "-o", binary, "meshupd/cmd/meshupd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// newLab makes an empty site in a folder with a short name: socket paths are limited to 107 bytes.
func newLab(tb testing.TB) *lab.Lab {
	tb.Helper()
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		tb.Fatal(err)
	}
	site, err := simnet.NewSite(simnet.SiteConfig{})
	if err != nil {
		tb.Fatal(err)
	}
	l, err := lab.New(dir, binary, site)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		l.Close()
		site.Close()
		if tb.Failed() {
			for _, d := range l.Devices {
				log := d.Log()
				tb.Logf("---- %s\n%s", d.Name, log[max(0, len(log)-4000):])
			}
		}
		os.RemoveAll(dir)
	})
	return l
}

func within(tb testing.TB, d time.Duration) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	tb.Cleanup(cancel)
	return ctx
}

// One stick, ten devices: nine take the release from the mesh; of these one is
// killed half-way and started again, one has too small a disk, one is not healthy with it.
func TestOneStickWholeSite(t *testing.T) {
	l := newLab(t)
	out, err := l.Story(within(t, 4*time.Minute), lab.StoryConfig{
		Devices: 10, Size: 24 << 20, Rate: 50e6,
		Say: func(format string, args ...any) { t.Logf(format, args...) },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range out.Rows {
		t.Logf("%-10s %-24s %-12s %8s from %v %s", r.Device, r.Role, r.State, r.After.Round(time.Millisecond), r.From, r.Why)
	}
	for _, c := range out.Checks {
		if !c.OK {
			t.Errorf("%s: %s", c.Claim, c.Detail)
		}
	}
}
