package lab_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/simnet"
)

// The quick starts of the README are run here word for word, in its order: the
// vendor makes a release, the integrator a device, the technician plugs it in.
// The folders they write to are overlaid with memory, for this process family only.
func TestReadmeQuickStarts(t *testing.T) {
	readme := quickStarts(t)
	ctx := within(t, 4*time.Minute)
	overlay(t, "/usr", "/etc", "/srv", "/var/lib")
	for _, dir := range []string{"/media", "/run"} {
		mount(t, "tmpfs", dir, "mode=0755")
	}
	sh := newShell(t)

	// The vendor has a built image and has thought of a passphrase.
	sh.write("rootfs.img", strings.Repeat("the whole system, as one flat image\n", 100_000), 0o644)
	sh.write("passphrase", "correct horse battery staple\n", 0o600)
	sh.run(ctx, readme["vendor, once"])
	sh.run(ctx, readme["vendor, each release"])

	// The integrator has built the program and the product's two scripts.
	sh.copy(binary, "bin/meshupd")
	sh.write("/usr/lib/kiosk/restart", "#!/bin/sh\nexit 0\n", 0o755)
	sh.write("/usr/lib/kiosk/healthy", "#!/bin/sh\ntest -s /srv/kiosk/current/rootfs.img\n", 0o755)
	sh.run(ctx, readme["integrator"])
	device := startService(t)

	// The technician's stick holds what the vendor packed.
	sh.copy(filepath.Join(sh.dir, "kiosk-a_2.4.0.update"), "/media/usb0/kiosk-a_2.4.0.update")
	out := sh.run(ctx, readme["technician"])
	for _, want := range []string{"signature good: Acme Releases", "can be pulled out now", "kiosk-a 2.4.0"} {
		if !strings.Contains(out, want) {
			t.Errorf("the technician does not see %q in:\n%s", want, out)
		}
	}
	st, err := device.Status(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d := st.Devices[0]; d.State != control.StateConfirmed || d.Version != "2.4.0" {
		t.Errorf("after the quick starts the device is %s with %s", d.State, d.Version)
	}
}

// quickStarts finds the marked blocks of the README.
func quickStarts(t *testing.T) map[string]string {
	t.Helper()
	raw, err := os.ReadFile("../../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := map[string]string{}
	for _, m := range regexp.MustCompile("(?s)<!-- quick start: ([^>]*) -->\n```sh\n(.*?)```").FindAllStringSubmatch(string(raw), -1) {
		blocks[m[1]] = m[2]
	}
	for _, name := range []string{"vendor, once", "vendor, each release", "integrator", "technician"} {
		if blocks[name] == "" {
			t.Fatalf("the README has no quick start for %q", name)
		}
	}
	return blocks
}

// mount is private to this process family: simnet.Enter gave it a mount namespace of its own.
func mount(t *testing.T, kind, dir, options string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Fatalf("mount %s on %s: %v", kind, dir, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

func overlay(t *testing.T, dirs ...string) {
	t.Helper()
	top := t.TempDir()
	mount(t, "tmpfs", top, "mode=0755")
	for _, dir := range dirs {
		upper, work := filepath.Join(top, dir, "upper"), filepath.Join(top, dir, "work")
		for _, d := range []string{upper, work, dir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		mount(t, "overlay", dir, "lowerdir="+dir+",upperdir="+upper+",workdir="+work)
	}
}

// shell is a person's folder with meshupd on the path.
type shell struct {
	t   *testing.T
	dir string
	env []string
}

func newShell(t *testing.T) *shell {
	t.Helper()
	sh := &shell{t: t, dir: t.TempDir()}
	tools := filepath.Join(sh.dir, ".tools")
	sh.copy(binary, filepath.Join(tools, "meshupd"))
	// A test is root already, and a small machine has no sudo.
	sh.write(filepath.Join(tools, "sudo"), "#!/bin/sh\nexec \"$@\"\n", 0o755)
	sh.env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "HOME="+sh.dir)
	return sh
}

func (sh *shell) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(sh.dir, name)
}

func (sh *shell) write(name, content string, perm os.FileMode) {
	sh.t.Helper()
	path := sh.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		sh.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), perm); err != nil {
		sh.t.Fatal(err)
	}
}

func (sh *shell) copy(from, to string) {
	sh.t.Helper()
	raw, err := os.ReadFile(from)
	if err != nil {
		sh.t.Fatal(err)
	}
	sh.write(to, string(raw), 0o755)
}

// run hands the block to a shell as it stands; any command that fails ends it.
func (sh *shell) run(ctx context.Context, block string) string {
	sh.t.Helper()
	cmd := exec.CommandContext(ctx, "sh", "-eu", "-c", block)
	cmd.Dir, cmd.Env = sh.dir, sh.env
	out, err := cmd.CombinedOutput()
	sh.t.Logf("%s\n%s", strings.TrimSpace(block), out)
	if err != nil {
		sh.t.Fatalf("the quick start fails: %v", err)
	}
	return string(out)
}

// startService runs `meshupd daemon` as the unit would, on a machine with one network card.
func startService(t *testing.T) *control.Client {
	t.Helper()
	site, err := simnet.NewSite(simnet.SiteConfig{})
	if err != nil {
		t.Fatal(err)
	}
	node, err := site.AddNode(simnet.NodeConfig{Name: "kiosk"})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/usr/bin/meshupd", "daemon")
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := node.Start(cmd); err != nil {
		t.Fatal(err)
	}
	client := control.NewClient("/run/meshupd/api.sock")
	t.Cleanup(func() {
		client.Close()
		site.Close()
		_ = cmd.Wait()
		if t.Failed() {
			raw, _ := os.ReadFile(log.Name())
			t.Logf("daemon: %s", raw)
		}
		log.Close()
	})
	ctx := within(t, time.Minute)
	for {
		if _, err := client.Status(ctx, 0); err == nil {
			return client
		} else if ctx.Err() != nil {
			t.Fatal("the daemon does not answer: ", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}
