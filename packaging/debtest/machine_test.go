package debtest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// machine is a Debian root that was started, with systemd and udev, in a container that has a network of its own.
type machine struct {
	*root
	leader string // process 1, as seen from here
}

// inside mounts a file system on /run for systemd-nspawn alone: without a systemd here it would take its own folders there
// for those of a machine that is being removed.
const inside = `mount -t tmpfs run /run && mkdir /run/systemd && exec systemd-nspawn --quiet --directory="$0" --register=no --keep-unit \
  --private-network --console=pipe --boot "$@"`

// start boots the root with these devices. /sys can be written, or systemd would have no device units.
func start(t *testing.T, r *root, devices ...string) *machine {
	t.Helper()
	r.closeProc() // systemd-nspawn would take it for the machine's
	args := []string{"-m", "--propagation", "private", "sh", "-c", inside, r.dir}
	for _, dev := range devices {
		args = append(args, "--bind="+dev)
	}
	console, err := os.Create(filepath.Join(t.TempDir(), "console"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", args...)
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes")
	cmd.Stdout, cmd.Stderr = console, console
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // an orderly shutdown
		select {
		case <-ended:
		case <-time.After(time.Minute):
			_ = cmd.Process.Kill()
			<-ended
		}
		console.Close()
		if t.Failed() {
			t.Logf("console:\n%s", read(t, console.Name()))
		}
	})
	m := &machine{root: r}
	m.until(t, "the machine to start", func() bool {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("systemd-nspawn ended: %v\n%s", err, read(t, console.Name()))
		default:
		}
		m.leader = child(cmd.Process.Pid)
		if m.leader == "" {
			return false
		}
		out, _ := m.try("systemctl", "is-system-running")
		return strings.HasPrefix(out, "running") || strings.HasPrefix(out, "degraded")
	})
	// systemd began before udev, and does not listen to it in a container; begun again it does.
	m.sh(t, "systemctl daemon-reexec")
	return m
}

// child is the process that systemd-nspawn started as number 1 of the machine.
func child(pid int) string {
	raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, p := range strings.Fields(string(raw)) {
		if n, err := strconv.Atoi(p); err == nil {
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", n)); strings.HasSuffix(exe, "/systemd/systemd") {
				return p
			}
		}
	}
	return ""
}

// try runs a program in the machine.
func (m *machine) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	return command(ctx, "nsenter", append([]string{"-t", m.leader, "-m", "-u", "-i", "-n", "-p", "-C", "--"}, args...)...)
}

func (m *machine) sh(t *testing.T, script string) string {
	t.Helper()
	out, err := m.try("sh", "-ec", script)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// show asks systemd for one property of a unit.
func (m *machine) show(t *testing.T, unit, property string) string {
	t.Helper()
	return m.sh(t, "systemctl show -P "+property+" "+unit)
}

// until waits for a state. The limit is for a test that would hang; it says nothing of how long this may take.
func (m *machine) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	give := time.After(4 * time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-give:
			if m.leader != "" {
				out, _ := m.try("journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic")
				t.Logf("journal:\n%s", out)
			}
			t.Fatalf("waited in vain for %s", what)
		}
	}
}
