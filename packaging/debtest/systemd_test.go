package debtest

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// deviceConfig is what an integrator writes: an application in two folders, run by a unit, proven healthy by it.
const deviceConfig = `product = "kiosk-a"
name = "kiosk-1"
trust = "/usr/lib/kiosk-trust"
[mesh]
listen = ["127.0.0.1"]
[slots]
folder = "/srv/kiosk"
factory = "1.0.0"
unit = "kiosk.service"
settle = "1s"
[health]
units = ["kiosk.service"]
deadline = "20s"
interval = "200ms"
passes = 3
retries = 8
[apply]
socket = "/run/meshupd-apply.sock"
idle = "2s"
[log]
format = "journal"
`

// neighbourConfig is another device on the same loopback, that sends slowly.
const neighbourConfig = `product = "kiosk-a"
name = "kiosk-2"
trust = "/usr/lib/kiosk-trust"
state = "/var/lib/neighbour"
run = "/run/neighbour"
policy.auto = "fetch"
slots.folder = "/srv/neighbour"
slots.factory = "1.0.0"
limits.upload = "RATE"
[mesh]
listen = ["127.0.0.1"]
port = 7611
mdns = false
seeds = ["127.0.0.1:7610"]
`

const kioskUnit = "[Service]\nExecStart=/bin/sh /srv/kiosk/current/app\n[Install]\nWantedBy=multi-user.target\n"

// vendor makes releases with the command line, as a publisher does.
type vendor struct{ dir, meshupd string }

func newVendor(t *testing.T) *vendor {
	t.Helper()
	tool, err := filepath.Abs(filepath.Join(top(), "bin", "meshupd"))
	if err != nil {
		t.Fatal(err)
	}
	v := &vendor{t.TempDir(), tool}
	must(t, tool, "key", "new", "--name=Acme", "--out="+v.in("acme"), "--no-passphrase")
	must(t, tool, "trust", "init", "--product=kiosk-a", "--key="+v.in("acme.sec.asc"), "--out="+v.in("trust"))
	return v
}

func (v *vendor) in(name string) string { return filepath.Join(v.dir, name) }

// release packs an application, and size bytes of data beside it, into a bundle.
func (v *vendor) release(t *testing.T, version, app string, size int) string {
	t.Helper()
	write(t, v.in("app"), app)
	args := []string{"release", "create", "--product=kiosk-a", "--version=" + version, "--trust=" + v.in("trust"), "--image=app=" + v.in("app"),
		"--out=" + v.in("dist")}
	if size > 0 {
		data := make([]byte, size)
		for i, x := 0, uint64(1); i < size; i++ { // no two pieces are equal
			x = x*6364136223846793005 + 1442695040888963407
			data[i] = byte(x >> 56)
		}
		write(t, v.in("data"), string(data))
		args = append(args, "--image=data="+v.in("data"))
	}
	must(t, v.meshupd, args...)
	folder := filepath.Join(v.in("dist"), "kiosk-a_"+version)
	must(t, v.meshupd, "release", "sign", folder, "--key="+v.in("acme.sec.asc"))
	must(t, v.meshupd, "release", "pack", folder, "--out="+v.in(version+".update"))
	return v.in(version + ".update")
}

// stick is a loop device with an ext4 file system that holds a bundle, as a whole disk.
func stick(t *testing.T, bundle string) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "files", filepath.Base(bundle)), string(read(t, bundle)))
	img := filepath.Join(dir, "stick.img")
	must(t, "truncate", "-s", "16M", img)
	must(t, "mkfs.ext4", "-q", "-d", filepath.Join(dir, "files"), img)
	loop := strings.TrimSpace(must(t, "losetup", "--find", "--show", "--read-only", img))
	t.Cleanup(func() {
		if _, err := command(context.Background(), "losetup", "--detach", loop); err != nil {
			t.Error(err)
		}
	})
	return loop
}

// status is what the machine's daemon, or its neighbour's, says of a device.
type status struct {
	Name, Version, State string
	Done, Size, Sent     int64
	Reason               struct{ Code, Detail string }
}

func (m *machine) status(name, socket string) status {
	out, err := m.try("meshupd", "status", "--json", "--socket="+socket)
	var site struct{ Devices []status }
	if err != nil || json.Unmarshal([]byte(out), &site) != nil {
		return status{}
	}
	for _, d := range site.Devices {
		if d.Name == name {
			return d
		}
	}
	return status{}
}

const own, neighbours = "/run/meshupd/api.sock", "/run/neighbour/api.sock"

func (m *machine) reaches(t *testing.T, version, state string) {
	t.Helper()
	m.until(t, "version "+version+" "+state, func() bool {
		st := m.status("kiosk-1", own)
		return st.Version == version && st.State == state
	})
}

// site is the machine with what its stories need.
type site struct {
	*machine
	debs    packages
	loop    string            // the stick, not plugged in yet
	bundles map[string]string // by version, as the machine names them
	big     int64             // bytes of 3.0.0
}

// TestSystemd tells a device's life with a real systemd and udev, and with the user that the package makes.
func TestSystemd(t *testing.T) {
	need(t, true, "mmdebstrap", "systemd-nspawn", "nsenter", "unshare", "losetup", "mkfs.ext4", "chroot", "tar")
	s := prepare(t)
	for _, story := range []struct {
		name string
		tell func(*testing.T, *site)
	}{
		{"the daemon says that it is ready, as a user without rights", ready},
		{"root's half starts at its socket and ends when nobody asks", onDemand},
		{"a signed bundle is imported by root and ends confirmed in a slot of root", imported},
		{"a version whose unit fails is rolled back", rolledBack},
		{"a stick that is plugged in imports itself", plugged},
		{"a daemon that hangs is killed by its watchdog and comes back", watchdog},
		{"an upgrade in the middle of a fetch goes on with it", upgraded},
		{"removal stops everything, purge leaves the slots", purged},
	} {
		if !t.Run(story.name, func(t *testing.T) { story.tell(t, s) }) {
			t.FailNow()
		}
	}
}

// prepare makes an image with the older package in it, as an integrator does, and starts it.
func prepare(t *testing.T) *site {
	t.Helper()
	s := &site{debs: built(t), bundles: map[string]string{}, big: 24 << 20}
	v := newVendor(t)
	good := "echo version; exec sleep infinity\n"
	made := map[string]string{"2.0.0": v.release(t, "2.0.0", "# 2.0.0\n"+good, 0)}
	made["2.0.1"] = v.release(t, "2.0.1", "echo no card reader >&2; exit 1\n", 0)
	s.loop = stick(t, v.release(t, "2.1.0", "# 2.1.0\n"+good, 0))
	made["3.0.0"] = v.release(t, "3.0.0", "# 3.0.0\n"+good, int(s.big))

	r := newRoot(t)
	r.run(t, "dpkg", "-i", r.take(t, s.debs.old))
	for version, bundle := range made {
		s.bundles[version] = r.take(t, bundle)
	}
	must(t, "cp", "-r", v.in("trust"), r.path("/usr/lib/kiosk-trust"))
	write(t, r.path("/etc/meshupd/config.toml"), deviceConfig)
	write(t, r.path("/etc/neighbour.toml"), strings.ReplaceAll(neighbourConfig, "RATE", "384KiB/s"))
	write(t, r.path("/etc/systemd/system/kiosk.service"), kioskUnit)
	write(t, r.path("/srv/kiosk/a/app"), good)
	if err := os.Symlink("a", r.path("/srv/kiosk/current")); err != nil {
		t.Fatal(err)
	}
	r.run(t, "systemctl", "enable", "kiosk.service")
	// The rule itself, for a loop device that says it hangs on USB; and nobody triggers the devices of the host.
	rule := string(read(t, r.path("/usr/lib/udev/rules.d/90-meshupd.rules")))
	loop := strings.Replace(rule, `KERNEL!="sd*|mmcblk*"`, `KERNEL!="`+filepath.Base(s.loop)+`"`, 1)
	if loop == rule {
		t.Fatal("the rule is not for sd* and mmcblk* any more")
	}
	write(t, r.path("/etc/udev/rules.d/90-meshupd.rules"), `KERNEL=="loop*", ENV{ID_BUS}="usb"`+"\n"+loop)
	r.run(t, "systemctl", "mask", "systemd-udev-trigger.service")
	s.machine = start(t, r, s.loop)
	return s
}

// ready: Type=notify only becomes active when the daemon said so. What the unit takes away is really gone.
func ready(t *testing.T, s *site) {
	s.until(t, "the daemon to be ready", func() bool { return s.show(t, "meshupd", "ActiveState") == "active" })
	if got := s.show(t, "meshupd", "Type"); got != "notify" {
		t.Fatalf("the unit is of type %s", got)
	}
	pid := s.show(t, "meshupd", "MainPID")
	uid := s.sh(t, "id -u meshupd")
	facts := s.sh(t, "grep -E '^(Name|Uid|Cap|NoNew|Seccomp)' /proc/"+pid+"/status")
	for _, want := range []string{`Uid:\s+` + uid + `\s+` + uid, `CapEff:\s+0+\n`, `CapBnd:\s+0+\n`, `NoNewPrivs:\s+1`, `Seccomp:\s+2`} {
		if !regexp.MustCompile(want).MatchString(facts) {
			t.Errorf("the daemon's process is not %s:\n%s", want, facts)
		}
	}
	for _, path := range []string{"/srv/kiosk/b", "/etc/meshupd", "/var/lib/meshupd-apply", "/usr/lib", "/dev/" + filepath.Base(s.loop)} {
		if out, err := s.try("nsenter", "-t", pid, "-m", "setpriv", "--reuid=meshupd", "--regid=meshupd", "--clear-groups", "sh", "-c",
			"test -e "+path+" && test -w "+path); err == nil {
			t.Errorf("the daemon may write %s: %s", path, out)
		}
	}
	for _, unit := range []string{"meshupd.service", "meshupd-apply.service", "meshupd-import@" + filepath.Base(s.loop) + ".service"} {
		out := s.sh(t, "systemd-analyze security --no-pager "+unit+" | tail -n 1")
		t.Log(out)
	}
}

func onDemand(t *testing.T, s *site) {
	ended := func() bool { return s.show(t, "meshupd-apply.service", "ActiveState") == "inactive" }
	s.until(t, "root's half to end", ended)
	if got := s.show(t, "meshupd-apply.service", "Result"); got != "success" {
		t.Errorf("root's half ended with %s", got)
	}
	if got := s.show(t, "meshupd-apply.socket", "ActiveState"); got != "active" {
		t.Errorf("its socket is %s", got)
	}
	if got := s.sh(t, "stat -c '%U:%G %a' /run/meshupd-apply.sock"); got != "root:meshupd 660" {
		t.Errorf("its socket belongs to %s", got)
	}
}

func imported(t *testing.T, s *site) {
	if out, err := s.try("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "meshupd", "import", s.bundles["2.0.0"]); err == nil || !strings.Contains(out, "E-PERMISSION") {
		t.Errorf("anybody may import: %s", out)
	}
	s.sh(t, "meshupd import "+s.bundles["2.0.0"])
	s.reaches(t, "2.0.0", "confirmed")
	if got := s.sh(t, "readlink /srv/kiosk/current; stat -c '%U:%G' /srv/kiosk/b /srv/kiosk/b/app; head -n 1 /srv/kiosk/b/app"); got != "b\nroot:root\nroot:root\n# 2.0.0" {
		t.Errorf("the slot holds %q", got)
	}
	if out, err := s.try("setpriv", "--reuid=meshupd", "--regid=meshupd", "--clear-groups", "touch", "/srv/kiosk/b/app"); err == nil {
		t.Errorf("the daemon's user may write the slot: %s", out)
	}
	s.until(t, "the word for scripts", func() bool { return s.sh(t, "cat /run/meshupd/state") == "confirmed" })
	if got := s.show(t, "kiosk", "ActiveState"); got != "active" {
		t.Errorf("the application is %s", got)
	}
	onDemand(t, s) // and once more
}

func rolledBack(t *testing.T, s *site) {
	s.sh(t, "meshupd import "+s.bundles["2.0.1"])
	s.reaches(t, "2.0.0", "rolled-back")
	if why := s.status("kiosk-1", own).Reason; why.Code != "E-HEALTH" || !strings.Contains(why.Detail, "kiosk.service") {
		t.Errorf("the reason is %+v", why)
	}
	s.until(t, "the old version to run", func() bool { return s.show(t, "kiosk", "ActiveState") == "active" })
}

// plugged: udev finds a file system on what hangs on USB and lets systemd start the unit for it.
func plugged(t *testing.T, s *site) {
	unit := "meshupd-import@" + filepath.Base(s.loop) + ".service"
	s.sh(t, "udevadm trigger --action=add --settle /sys/class/block/"+filepath.Base(s.loop))
	s.until(t, "the unit of the stick to end", func() bool {
		return s.show(t, unit, "ExecMainExitTimestampMonotonic") != "0" && s.show(t, unit, "ActiveState") != "activating"
	})
	var told struct {
		Report struct {
			OK       bool
			Imported struct {
				Path    string
				Release struct{ Version string }
			}
		}
	}
	raw := s.sh(t, "cat /run/meshupd/import.json")
	if err := json.Unmarshal([]byte(raw), &told); err != nil || !told.Report.OK || told.Report.Imported.Release.Version != "2.1.0" ||
		!strings.HasPrefix(told.Report.Imported.Path, s.loop) {
		t.Fatalf("the report is %s (%v)", raw, err)
	}
	s.reaches(t, "2.1.0", "confirmed")
}

func watchdog(t *testing.T, s *site) {
	s.sh(t, `mkdir -p /run/systemd/system/meshupd.service.d
printf '[Service]\nWatchdogSec=3\nRestartSec=100ms\n' >/run/systemd/system/meshupd.service.d/short.conf
systemctl daemon-reload; systemctl restart meshupd`)
	before := s.show(t, "meshupd", "MainPID")
	s.sh(t, "systemctl kill --signal=STOP meshupd")
	s.until(t, "systemd to start the daemon again", func() bool {
		return s.show(t, "meshupd", "NRestarts") == "1" && s.show(t, "meshupd", "ActiveState") == "active"
	})
	if now := s.show(t, "meshupd", "MainPID"); now == before {
		t.Error("it is the same process")
	}
	if log := s.sh(t, "journalctl -u meshupd -o cat --no-pager"); !strings.Contains(log, "SIGABRT") {
		t.Errorf("the journal does not show where it hung:\n%s", log)
	}
	s.reaches(t, "2.1.0", "confirmed")
	s.sh(t, "rm -r /run/systemd/system/meshupd.service.d; systemctl daemon-reload; systemctl restart meshupd")
}

// upgraded: the neighbour sends slowly, the package is upgraded, and the new daemon goes on from the pieces that are there.
func upgraded(t *testing.T, s *site) {
	neighbour := "systemd-run --quiet --collect --unit=neighbour meshupd daemon --config /etc/neighbour.toml"
	s.sh(t, neighbour)
	s.until(t, "the neighbour", func() bool { return s.status("kiosk-1", neighbours).Name != "" })
	s.sh(t, "meshupd import --socket="+neighbours+" "+s.bundles["3.0.0"])
	s.until(t, "some pieces", func() bool { return s.status("kiosk-1", own).Done >= 3<<20 })
	before := s.show(t, "meshupd", "MainPID")
	s.sh(t, "echo a sale >/run/meshupd-inhibit.d/till")
	deb := s.take(t, s.debs.new)
	s.sh(t, "dpkg -i "+deb)
	done := s.status("kiosk-1", own)
	if now := s.show(t, "meshupd", "MainPID"); now == before || now == "0" {
		t.Fatalf("after the upgrade the daemon is process %s, before %s", now, before)
	}
	s.until(t, "the new daemon to fetch", func() bool {
		done = s.status("kiosk-1", own)
		return done.State == "fetching" && done.Done > 0
	})
	if done.Done >= s.big {
		t.Fatal("the upgrade was not in the middle of the fetch")
	}
	s.sh(t, "rm /run/meshupd-inhibit.d/till") // still there, and not needed any more
	// Sent faster from here on, by a neighbour that counts from nothing.
	s.sh(t, "systemctl stop neighbour; sed -i 's,^limits.upload.*,,' /etc/neighbour.toml; "+neighbour)
	s.reaches(t, "3.0.0", "confirmed")
	sent := s.status("kiosk-2", neighbours).Sent
	if sent > s.big-done.Done+2<<20 {
		t.Errorf("%d of %d bytes were here, and %d more were sent", done.Done, s.big, sent)
	}
	t.Logf("%d bytes were here after the upgrade, %d more were sent, of %d", done.Done, sent, s.big)
	s.sh(t, "systemctl stop neighbour")
}

func purged(t *testing.T, s *site) {
	s.sh(t, "dpkg -r meshupd")
	for _, unit := range []string{"meshupd.service", "meshupd-apply.service", "meshupd-apply.socket"} {
		if got := s.show(t, unit, "ActiveState"); got != "inactive" {
			t.Errorf("%s is %s after removal:\n%s", unit, got, s.sh(t, "journalctl --no-pager -o short-monotonic -n 30 -u "+unit))
		}
	}
	if out, err := s.try("sh", "-c", "ls /proc/*/exe -l 2>/dev/null | grep /usr/bin/meshupd"); err == nil {
		t.Errorf("something of it runs still: %s", out)
	}
	s.sh(t, "test -d /var/lib/meshupd/store; test -e /etc/meshupd/config.toml; dpkg -P meshupd")
	if got := s.sh(t, "ls -d /var/lib/meshupd* /etc/meshupd /run/meshupd* 2>/dev/null || true"); got != "" {
		t.Errorf("purge left %s", got)
	}
	if got := s.sh(t, "systemctl show -P ActiveState kiosk; ls /srv/kiosk"); got != "active\na\nb\nboot.json\ncurrent\nslot.a.json\nslot.b.json" {
		t.Errorf("the application is %q", got)
	}
}
