package install_test

import (
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"meshupd/install"
	"meshupd/verify"
)

// lock is one of systemd-logind's inhibitors as it comes over the bus.
type lock struct {
	What, Who, Why, Mode string
	UID, PID             uint32
}

// fakeLogind answers ListInhibitors.
type fakeLogind struct {
	mu    sync.Mutex // owns:
	locks []lock
}

// ListInhibitors is what org.freedesktop.login1.Manager has under that name.
func (f *fakeLogind) ListInhibitors() ([]lock, *dbus.Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.locks, nil
}

func TestInhibitorsOfLogind(t *testing.T) {
	needTools(t, "dbus-daemon")
	dir := t.TempDir()
	socket := filepath.Join(dir, "bus")
	startBus(t, socket, filepath.Join(dir, "bus.conf"))
	bus := "unix:path=" + socket
	if who, err := install.Inhibited(t.Context(), bus); who != "" || err != nil {
		t.Errorf("without logind: %q, %v", who, err)
	}
	conn, err := dbus.Connect(bus)
	must(t, "connect", err)
	defer conn.Close()
	logind := &fakeLogind{}
	must(t, "export", conn.Export(logind, "/org/freedesktop/login1", "org.freedesktop.login1.Manager"))
	if got, err := conn.RequestName("org.freedesktop.login1", dbus.NameFlagDoNotQueue); err != nil || got != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(got, err)
	}
	for _, c := range []struct {
		name  string
		locks []lock
		want  string
	}{
		{"nobody", nil, ""},
		{"only wants to be told", []lock{{"shutdown:sleep", "NetworkManager", "", "delay", 0, 1}}, ""},
		{"another thing is held", []lock{{"sleep:idle", "player", "plays", "block", 0, 1}}, ""},
		{"gives way", []lock{{"shutdown", "player", "plays", "block-weak", 0, 1}}, ""},
		{"held", []lock{{"sleep", "x", "", "block", 0, 1}, {"sleep:shutdown", "pos-app", "sale in\x1b[2J progress", "block", 1000, 7}}, "pos-app: sale in[2J progress"},
		{"without a name", []lock{{"shutdown", "", "", "block", 1000, 7}}, "process 7"},
		{"talkative", []lock{{"shutdown", strings.Repeat("w", 500), strings.Repeat("y", 500), "block", 1000, 7}}, strings.Repeat("w", 100) + ": " + strings.Repeat("y", 100)},
	} {
		logind.mu.Lock()
		logind.locks = c.locks
		logind.mu.Unlock()
		if who, err := install.Inhibited(t.Context(), bus); who != c.want || err != nil {
			t.Errorf("%s: %q, %v", c.name, who, err)
		}
	}
	if who, err := install.Inhibited(t.Context(), "unix:path="+filepath.Join(dir, "none")); who != "" || err != nil {
		t.Errorf("without a bus: %q, %v", who, err)
	}
}

// A bus that takes the call and says nothing keeps a device waiting for seconds, not for ever.
func TestBusThatHangs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "bus")
	ln, err := net.Listen("unix", socket)
	must(t, "listen", err)
	defer ln.Close()
	began := time.Now()
	if who, err := install.Inhibited(t.Context(), "unix:path="+socket); who != "" || err == nil {
		t.Errorf("%q, %v", who, err)
	}
	t.Logf("gave up after %s", time.Since(began).Round(time.Second))
}

func TestMayRestart(t *testing.T) {
	ask := func(script string) error {
		return install.MayRestart{Command: []string{"/bin/sh", "-c", script}, Timeout: time.Minute}.Ask(t.Context(), install.SlotB, "2.4.0")
	}
	if err := ask(`test "$MESHUPD_VERSION" = 2.4.0 && test "$MESHUPD_SLOT" = b`); err != nil {
		t.Error("now:", err)
	}
	for _, c := range [][2]string{
		{"echo first >&2; echo 'doors open until 20:00' >&2; exit 75", "doors open until 20:00"},
		{"exit 75", "not yet"},
		{"echo broken >&2; exit 1", "/bin/sh does not say: exit status 1: broken"},
		{"kill -9 $$", "/bin/sh does not say: signal: killed"},
	} {
		if err := ask(c[0]); verify.CodeOf(err) != verify.CodeHeld || err.Error() != c[1] {
			t.Errorf("%s: %v", c[0], err)
		}
	}
	err := install.MayRestart{Command: []string{"/bin/sleep", "60"}, Timeout: 50 * time.Millisecond}.Ask(t.Context(), install.SlotB, "2.4.0")
	if verify.CodeOf(err) != verify.CodeHeld || !strings.Contains(err.Error(), "no end after 50ms") {
		t.Error("one that hangs:", err)
	}
	if err := (install.MayRestart{Command: []string{"/no/such"}, Timeout: time.Minute}).Ask(t.Context(), install.SlotB, "2.4.0"); verify.CodeOf(err) != verify.CodeHeld {
		t.Error("one that is not there:", err)
	}
}
