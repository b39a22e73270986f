package debtest

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a Debian needs to start and to run the units, and no more.
const suite = "bookworm"

var includes = []string{"systemd", "systemd-sysv", "udev", "dbus"}

// debianTar is a Debian as one tar, kept between runs under a name that says what it holds.
func debianTar(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	key := sha256.Sum256([]byte(strings.Join(includes, " ")))
	path := filepath.Join(cache, "meshupd-lab", fmt.Sprintf("debian-%s-%x.tar", suite, key[:4]))
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	part := fmt.Sprintf("%s.%d.part.tar", path, os.Getpid())
	defer os.Remove(part)
	must(t, "mmdebstrap", "--quiet", "--variant=minbase", "--include="+strings.Join(includes, ","), suite, part)
	if err := os.Rename(part, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// root is a Debian root folder that can be changed from outside, and by commands in it.
type root struct{ dir string }

func newRoot(t *testing.T) *root {
	t.Helper()
	r := &root{t.TempDir()}
	must(t, "tar", "-xf", debianTar(t), "-C", r.dir)
	// As every tool that builds images does it; systemd-tmpfiles wants it.
	if err := unix.Mount("proc", r.path("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.closeProc)
	return r
}

func (r *root) closeProc() { _ = unix.Unmount(r.path("/proc"), unix.MNT_DETACH) }

func (r *root) path(path string) string { return filepath.Join(r.dir, path) }

func (r *root) run(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, "chroot", append([]string{r.dir}, args...)...)
}

// take puts a file into the root's own temporary folder and returns its name there.
func (r *root) take(t *testing.T, path string) string {
	t.Helper()
	name := "/var/tmp/" + filepath.Base(path)
	if err := os.WriteFile(r.path(name), read(t, path), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func (r *root) there(path string) bool {
	_, err := os.Lstat(r.path(path))
	return err == nil
}

// owner of a path as "user mode", by the names that hold in the root.
func (r *root) owner(t *testing.T, path string) string {
	t.Helper()
	return strings.TrimSpace(r.run(t, "stat", "-c", "%U:%G %a", path))
}
