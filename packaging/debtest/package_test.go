// Package debtest installs the Debian package for real: in a Debian root, as an image is built, and in a Debian that was
// started with systemd in a container, as a device runs.
package debtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "debtest"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(scratch)
	os.Exit(code)
}

// need skips what takes longer than a change should wait, and without the tool or root on a developer's machine; it fails
// where everything has to run.
func need(t *testing.T, root bool, tools ...string) {
	t.Helper()
	if testing.Short() {
		t.Skip("builds and installs packages")
	}
	miss := func(format string, args ...any) {
		t.Helper()
		if os.Getenv("CI") != "" {
			t.Fatalf(format, args...)
		}
		t.Skipf(format, args...)
	}
	if root && os.Geteuid() != 0 {
		miss("needs root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			miss("%s is missing: apt-get install %s", tool, debianPackage[tool])
		}
	}
}

var debianPackage = map[string]string{"make": "make", "dpkg-deb": "dpkg", "lintian": "lintian", "mmdebstrap": "mmdebstrap", "unshare": "util-linux",
	"systemd-nspawn": "systemd-container", "nsenter": "util-linux", "losetup": "mount", "mkfs.ext4": "e2fsprogs", "chroot": "coreutils", "tar": "tar"}

// arch is this machine's, as the Makefile names it.
func arch() string {
	if runtime.GOARCH == "arm" {
		return "arm.7"
	}
	return runtime.GOARCH
}

// top is the repository.
func top() string { return filepath.Join("..", "..") }

func inTop(env []string, name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = top(), append(slices.Concat(os.Environ(), []string{"CGO_ENABLED=0"}), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

const oldVersion, newVersion = "1.0.0", "1.1.0"

// pack builds the package of this machine's architecture into a folder of its own.
func pack(name, version string, env ...string) (string, error) {
	dir := filepath.Join(scratch, name)
	if err := inTop(env, "packaging/deb/build.sh", "-o", dir, "-v", version, arch()); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "meshupd_"+version+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("build.sh left %q (%v)", debs, err)
	}
	return debs[0], nil
}

type packages struct{ old, new string }

var build = sync.OnceValues(func() (p packages, err error) {
	if err = inTop(nil, "make", "build", "cross", "ARCHES="+arch()); err != nil {
		return p, err
	}
	var err2 error
	p.old, err = pack("old", oldVersion)
	p.new, err2 = pack("new", newVersion)
	return p, errors.Join(err, err2)
})

// built gives the package, and the same with a higher version.
func built(t *testing.T) packages {
	t.Helper()
	need(t, false, "make", "dpkg-deb")
	p, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The same commit, linked and packed again by someone with another umask and in another time zone, gives the same bytes.
func TestTheSameCommitGivesTheSameBytes(t *testing.T) {
	first := read(t, built(t).old)
	if err := os.Remove(filepath.Join(top(), "bin", "meshupd-linux-"+arch())); err != nil {
		t.Fatal(err)
	}
	if err := inTop(nil, "make", "cross", "ARCHES="+arch()); err != nil {
		t.Fatal(err)
	}
	again, err := pack("again", oldVersion, "TZ=Asia/Tokyo", "LC_ALL=C")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, read(t, again)) {
		t.Fatal("two builds differ")
	}
}

func TestLintian(t *testing.T) {
	need(t, false, "lintian")
	out, err := exec.Command("lintian", "--allow-root", "--fail-on=error,warning", "--tag-display-limit=0", built(t).new).CombinedOutput()
	if err != nil {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// What an integrator reads in the package, and nothing that only the maintainer should own.
func TestContents(t *testing.T) {
	out, err := exec.Command("dpkg-deb", "-c", built(t).new).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	list := string(out)
	for _, want := range []string{"./usr/bin/meshupd", "./usr/lib/systemd/system/meshupd.service", "./usr/lib/systemd/system/meshupd-apply.socket",
		"./usr/lib/systemd/system/meshupd-apply.service", "./usr/lib/systemd/system/meshupd-import@.service", "./usr/lib/udev/rules.d/90-meshupd.rules",
		"./usr/lib/sysusers.d/meshupd.conf", "./usr/lib/tmpfiles.d/meshupd.conf", "./etc/meshupd/config.toml", "./usr/share/man/man1/meshupd-import.1.gz",
		"./usr/share/bash-completion/completions/meshupd", "./usr/share/zsh/vendor-completions/_meshupd",
		"./usr/share/fish/vendor_completions.d/meshupd.fish", "./usr/share/doc/meshupd/copyright", "./usr/share/doc/meshupd/licences.gz",
		"./usr/share/doc/meshupd/examples/boot/grub.cfg", "./usr/share/doc/meshupd/examples/boot/uboot.cmd"} {
		if !strings.Contains(list, " "+want+"\n") {
			t.Errorf("%s is not in the package", want)
		}
	}
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); f[1] != "root/root" || f[0][5] == 'w' || f[0][8] == 'w' || strings.ContainsAny(f[0], "sS") {
			t.Errorf("owner or mode: %s", line)
		}
	}
	if out, err := exec.Command("dpkg-deb", "-I", built(t).new, "conffiles").Output(); err != nil || string(out) != "/etc/meshupd/config.toml\n" {
		t.Errorf("conffiles are %q (%v)", out, err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// write makes a file with the folders above it.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// command runs a program and returns what it printed, on both outputs.
func command(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(t.Context(), name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
