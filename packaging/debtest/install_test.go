package debtest

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	daemonLink = "/etc/systemd/system/multi-user.target.wants/meshupd.service"
	socketLink = "/etc/systemd/system/sockets.target.wants/meshupd-apply.socket"
)

// The package's life in a Debian root in which nothing runs, as where an image is built: installed, configured, upgraded,
// removed, installed again and purged.
func TestInstallUpgradeRemovePurge(t *testing.T) {
	need(t, true, "mmdebstrap", "chroot", "tar")
	debs := built(t)
	r := newRoot(t)
	old, younger := r.take(t, debs.old), r.take(t, debs.new)

	r.run(t, "dpkg", "-i", old)
	if out := r.run(t, "dpkg", "-V", "meshupd"); out != "" {
		t.Errorf("dpkg finds changed files: %s", out)
	}
	r.run(t, "meshupd", "version")
	if got := r.run(t, "getent", "passwd", "meshupd"); !strings.HasSuffix(got, ":/var/lib/meshupd:/usr/sbin/nologin\n") {
		t.Errorf("the user is %q", got)
	}
	for path, want := range map[string]string{"/var/lib/meshupd": "meshupd:meshupd 750", "/var/lib/meshupd-apply": "root:root 700",
		"/etc/meshupd": "root:root 755", "/etc/meshupd/conf.d": "root:root 755", "/etc/meshupd/config.toml": "root:root 644"} {
		if got := r.owner(t, path); got != want {
			t.Errorf("%s belongs to %s, not %s", path, got, want)
		}
	}
	if !r.there(daemonLink) || !r.there(socketLink) {
		t.Error("the units are not enabled")
	}
	if entries, err := os.ReadDir(r.path("/var/lib/meshupd")); err != nil || len(entries) != 0 {
		t.Errorf("an image would carry %v into every device (%v)", entries, err)
	}

	// An integrator fills in the config and puts the slots where they belong; the administrator of a site turns the daemon off.
	edited := "product = \"kiosk-a\"\ntrust = \"/usr/lib/meshupd/trust\"\nslots.folder = \"/srv/kiosk\"\n"
	write(t, r.path("/etc/meshupd/config.toml"), edited)
	write(t, r.path("/etc/meshupd/conf.d/site.toml"), "name = \"kiosk-1\"\n")
	write(t, r.path("/srv/kiosk/a/app"), "factory")
	write(t, r.path("/var/lib/meshupd/store/images/x"), "image")
	write(t, r.path("/var/lib/meshupd-apply/counters"), "7")
	r.run(t, "systemctl", "disable", "meshupd.service")

	r.run(t, "dpkg", "-i", younger)
	if got := r.run(t, "dpkg-query", "-W", "-f", "${Version} ${Status}", "meshupd"); got != newVersion+" install ok installed" {
		t.Errorf("after the upgrade it is %q", got)
	}
	kept := func(after string) {
		t.Helper()
		for path, want := range map[string]string{"/etc/meshupd/config.toml": edited, "/srv/kiosk/a/app": "factory",
			"/var/lib/meshupd/store/images/x": "image", "/var/lib/meshupd-apply/counters": "7"} {
			if got := string(read(t, r.path(path))); got != want {
				t.Errorf("after %s %s holds %q", after, path, got)
			}
		}
	}
	kept("the upgrade")
	if r.there(daemonLink) || r.there(socketLink) { // the daemon's unit names the socket in Also=
		t.Error("the upgrade enabled what was disabled")
	}

	r.run(t, "dpkg", "-r", "meshupd")
	kept("removal")
	if r.there("/usr/bin/meshupd") || r.there("/usr/lib/systemd/system/meshupd.service") || r.there("/usr/lib/udev/rules.d/90-meshupd.rules") {
		t.Error("removal left files of the package")
	}

	r.run(t, "dpkg", "-i", younger)
	kept("the second installation")
	// Slots below our own folder, on a file system of their own: still not ours.
	write(t, r.path("/var/lib/meshupd-apply/data/.keep"), "")
	if err := unix.Mount("slots", r.path("/var/lib/meshupd-apply/data"), "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(r.path("/var/lib/meshupd-apply/data"), unix.MNT_DETACH) })
	write(t, r.path("/var/lib/meshupd-apply/data/b/app"), "mounted")
	r.run(t, "dpkg", "-P", "meshupd")
	if string(read(t, r.path("/srv/kiosk/a/app"))) != "factory" || string(read(t, r.path("/var/lib/meshupd-apply/data/b/app"))) != "mounted" {
		t.Error("purge went into the slots")
	}
	if err := unix.Unmount(r.path("/var/lib/meshupd-apply/data"), 0); err != nil {
		t.Fatal(err)
	}
	left := strings.Fields(r.run(t, "find", "/", "-xdev", "-name", "*meshupd*", "-not", "-path", "/var/tmp/*"))
	for _, path := range left {
		if !strings.HasPrefix(path, "/var/lib/meshupd-apply") { // the mount point, which purge could not remove
			t.Errorf("purge left %s", path)
		}
	}
	if got := r.run(t, "find", "/var/lib/meshupd-apply", "-type", "f"); got != "/var/lib/meshupd-apply/data/.keep\n" {
		t.Errorf("purge left %q", got)
	}
	r.run(t, "getent", "passwd", "meshupd") // kept, so that nobody else gets its number
}
