package lab_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// parted is a device in two halves: its daemon runs as nobody, and root's half is started at a socket that the test holds
// open in the place of systemd.
type parted struct {
	*lab.Device
	socket string
	ln     *net.UnixListener
	apply  *exec.Cmd
	ended  chan error
}

func newParted(t *testing.T, l *lab.Lab) *parted {
	t.Helper()
	nobody, err := user.Lookup("nobody")
	if _, lerr := exec.LookPath("setpriv"); lerr != nil || err != nil || os.Getuid() != 0 || !realRoot() {
		if os.Getenv("CI") != "" {
			t.Fatalf("needs root, the user nobody and setpriv: %v, %v", err, lerr)
		}
		t.Skip("needs root, the user nobody and setpriv")
	}
	p := &parted{socket: filepath.Join(l.Dir, "apply.sock")}
	dir := filepath.Join(l.Dir, "one")
	sick := filepath.Join(l.Dir, "sick")
	p.Device = add(t, l, lab.DeviceConfig{Name: "one",
		Health: []string{"sh", "-c", "test ! -e " + sick + " || { echo 'pos-app: no answer on port 9100' >&2; exit 1; }"},
		As:     []string{"setpriv", "--reuid", nobody.Uid, "--regid", nobody.Gid, "--clear-groups", "--no-new-privs"},
		Lines: []string{"[apply]", fmt.Sprintf("socket = %q", p.socket), fmt.Sprintf("state = %q", filepath.Join(l.Dir, "own")),
			`user = "nobody"`, `idle = "1s"`},
	})
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	must(t, os.Chmod(l.Dir, 0o755))
	must(t, os.Chmod(filepath.Dir(l.Binary), 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "state"), 0o750))
	for _, name := range []string{"state", "run"} {
		must(t, os.Chown(filepath.Join(dir, name), uid, gid))
	}
	t.Cleanup(p.killApply)
	return p
}

// realRoot says whether other users exist in this user namespace.
func realRoot() bool {
	raw, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && len(strings.Fields(string(raw))) == 3 && strings.Fields(string(raw))[2] != "1"
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// startApply is what systemd does when somebody connects.
func (p *parted) startApply(t *testing.T) {
	t.Helper()
	if p.ln == nil {
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.socket, Net: "unix"})
		must(t, err)
		must(t, os.Chmod(p.socket, 0o666))
		p.ln = ln
		t.Cleanup(func() { ln.Close() })
	}
	given, err := p.ln.File()
	must(t, err)
	defer given.Close()
	log, err := os.OpenFile(filepath.Join(p.Dir, "daemon.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	must(t, err)
	defer log.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" apply --config "$1"`, binary, p.Config)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, []*os.File{given}
	must(t, cmd.Start())
	p.apply, p.ended = cmd, make(chan error, 1)
	go func(ended chan<- error) { ended <- cmd.Wait() }(p.ended)
}

// killApply ends it as a power cut would.
func (p *parted) killApply() {
	if p.apply != nil {
		_ = p.apply.Process.Kill()
		<-p.ended
		p.apply = nil
	}
}

// endsByItself waits until it had nothing to do for long enough.
func (p *parted) endsByItself(t *testing.T, ctx context.Context) {
	t.Helper()
	select {
	case err := <-p.ended:
		must(t, err)
		p.apply = nil
	case <-ctx.Done():
		t.Fatal("meshupd apply does not end though nobody asks")
	}
}

func (p *parted) until(t *testing.T, ctx context.Context, what string, ok func(control.DeviceStatus) bool) control.DeviceStatus {
	t.Helper()
	st, err := p.Until(ctx, func(st control.SiteStatus) bool { return ok(lab.Self(st)) })
	if err != nil {
		t.Fatalf("%s: %v; it is %+v, reason %+v", what, err, lab.Self(st), lab.Self(st).Reason)
	}
	return lab.Self(st)
}

// A device in two halves, as two users: a release goes from import to confirmed, one that is not healthy goes back and says
// why, and a kill of root's half in the middle of a write costs nothing but time.
func TestTwoHalvesOfOneDevice(t *testing.T) {
	l := newLab(t)
	ctx := within(t, 3*time.Minute)
	p := newParted(t, l)
	must(t, p.Start())
	if st := p.until(t, ctx, "without the other half", func(d control.DeviceStatus) bool { return d.State == control.StateBlocked }); st.Reason == nil || st.Reason.Code != verify.CodeApply {
		t.Fatalf("blocked for the reason %+v", st.Reason)
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	must(t, err)
	if !strings.Contains(string(raw), "CapEff:\t0000000000000000") || strings.Contains(string(raw), "Uid:\t0") {
		t.Fatalf("the daemon has rights:\n%s", raw)
	}

	p.startApply(t)
	_, err = p.Import(ctx, bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "2.0.0"}))
	must(t, err)
	confirmed(t, ctx, p.Device, "2.0.0")
	p.endsByItself(t, ctx)

	// What nobody reads into the daemon: it does not wake the other half by itself, and still knows its state.
	confirmed(t, ctx, p.Device, "2.0.0")
	must(t, os.WriteFile(filepath.Join(l.Dir, "sick"), nil, 0o644))
	_, err = p.Import(ctx, bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "3.0.0"}))
	must(t, err)
	p.startApply(t)
	st := p.until(t, ctx, "not healthy", func(d control.DeviceStatus) bool { return d.State == control.StateRolledBack && d.Version == "2.0.0" })
	if st.Reason == nil || st.Reason.Code != verify.CodeHealth || !strings.Contains(st.Reason.Detail, "no answer on port 9100") {
		t.Fatalf("rolled back for the reason %+v", st.Reason)
	}
	history, err := p.API.History(ctx, "", 20)
	must(t, err)
	if !strings.Contains(fmt.Sprintf("%+v", history), "no answer on port 9100") {
		t.Fatalf("the history does not say why: %+v", history)
	}
	must(t, os.Remove(filepath.Join(l.Dir, "sick")))

	p.killWhileItWrites(t, ctx, l)
	confirmed(t, ctx, p.Device, "4.0.0")
	for _, name := range []string{"slots", "slots/a", "slots/b", "slots/current/" + lab.ImageName} {
		if info, err := os.Stat(filepath.Join(p.Dir, name)); err != nil || ownerOf(info) != 0 {
			t.Errorf("%s belongs to user %d (%v)", name, ownerOf(info), err)
		}
	}
	if counters, err := os.ReadFile(filepath.Join(l.Dir, "own", "counters.a")); err != nil || !strings.Contains(string(counters), `"floor": 3,`) {
		t.Errorf("root's half has the counters %s (%v)", counters, err)
	}
}

// killWhileItWrites kills root's half when part of an image is in the slot.
func (p *parted) killWhileItWrites(t *testing.T, ctx context.Context, l *lab.Lab) {
	t.Helper()
	if p.apply != nil {
		p.killApply()
		p.startApply(t)
	}
	_, err := p.Import(ctx, bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "4.0.0", Size: 256 << 20}))
	must(t, err)
	for half := false; !half; {
		if p.apply == nil {
			p.startApply(t)
		}
		select {
		case <-ctx.Done():
			t.Fatal("no write was seen")
		case err := <-p.ended: // it had been idle
			must(t, err)
			p.apply = nil
		case <-time.After(time.Millisecond):
		}
		all, err := filepath.Glob(filepath.Join(p.Dir, "slots", "[ab]", ".*"))
		must(t, err)
		for _, path := range all {
			info, err := os.Stat(path)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			must(t, err)
			if n := info.Size(); n > 0 && n < 256<<20 {
				t.Logf("killed with %d of %d bytes in the slot", n, 256<<20)
				half = true
			}
		}
	}
	p.killApply()
	p.startApply(t)
}

func ownerOf(info os.FileInfo) int {
	if info == nil {
		return -1
	}
	return int(info.Sys().(*syscall.Stat_t).Uid)
}
