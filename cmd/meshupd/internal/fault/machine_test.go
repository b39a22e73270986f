//go:build linux && amd64

package fault_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/verify"
)

// sold is what the vendor made, for all machines.
type sold struct {
	binary, anchor, bundle string
	release, image         verify.Digest
	size                   int64
	factory                []byte
}

const product = "fault-kiosk"

// machine is one device on this one: below root is what it keeps, beside it what the test needs.
type machine struct {
	sold
	kind    string // "files", or the bootloader of block slots
	dir     string
	power   int
	daemon  *exec.Cmd
	ended   chan struct{} // closed when the daemon has
	reboots *os.File      // a pipe that the restart command writes to
	api     *control.Client
}

var machines atomic.Int32

func newMachine(t *testing.T, s sold, kind string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "fault-") // most of the time would else be waiting for syncs
	must(t, err)
	m := &machine{sold: s, kind: kind, dir: dir}
	t.Cleanup(func() {
		m.off()
		if t.Failed() {
			log, _ := os.ReadFile(m.at("daemon.log"))
			t.Logf("the daemon said:\n%s", log[max(0, len(log)-20000):])
		}
		os.RemoveAll(dir)
	})
	must(t, os.MkdirAll(m.at("root/slots/a"), 0o755))
	must(t, syscall.Mkfifo(m.at("reboots"), 0o600))
	m.reboots, err = os.OpenFile(m.at("reboots"), os.O_RDWR|syscall.O_NONBLOCK, 0)
	must(t, err)
	t.Cleanup(func() { m.reboots.Close() })
	m.api = control.NewClient(m.at("root/run/api.sock"))
	t.Cleanup(m.api.Close)
	n := machines.Add(1)
	must(t, os.WriteFile(m.at("meshupd.toml"), fmt.Appendf(nil, `product = %q
hardware = "rev-a"
channel = "stable"
name = "kiosk"
trust = %q
state = %q
run = %q
[mesh]
listen = ["127.77.%d.%d"]
mdns = false
[slots]
factory = "1.0.0"
starts = 3
%s
[health]
command = ["true"]
interval = "100ms"
[store]
reserve = "1MiB"
`, product, s.anchor, m.at("root/state"), m.at("root/run"), n/250, n%250+1, m.slots(t)), 0o644))
	m.powerOn()
	return m
}

// slots makes the slots as the factory does and returns their config.
func (m *machine) slots(t *testing.T) string {
	if m.kind == "files" {
		must(t, os.WriteFile(m.at("root/slots/a/rootfs"), m.factory, 0o644))
		return fmt.Sprintf("folder = %q\nrestart = [\"true\"]", m.at("root/slots"))
	}
	must(t, os.WriteFile(m.at("root/part-a"), m.factory, 0o644))
	must(t, os.WriteFile(m.at("root/part-b"), make([]byte, len(m.factory)), 0o644))
	m.saveGRUB(map[string]string{"ORDER": "A B", "A_OK": "1", "A_TRY": "0", "B_OK": "0", "B_TRY": "0"})
	return fmt.Sprintf(`kind = "block"
a = %q
b = %q
folder = %q
bootloader = "grub"
boot = { env = %q }
restart = ["sh", "-c", "echo now >%s"]
restart_timeout = "1m"`,
		m.at("root/part-a"), m.at("root/part-b"), m.at("root/slots"), m.at("root/grubenv"), m.at("reboots"))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *machine) at(name string) string { return filepath.Join(m.dir, name) }

// powerOn does what GRUB does by packaging/boot/grub.cfg.
func (m *machine) powerOn() {
	m.power++
	if m.kind != "grub" {
		return
	}
	slot, vars := m.grubPicks()
	vars[slot+"_TRY"] = "1"
	m.saveGRUB(vars)
	write(m.at("cmdline"), []byte("quiet meshupd.slot="+strings.ToLower(slot)+"\n"))
	write(m.at("boot_id"), fmt.Appendf(nil, "boot-%d\n", m.power))
}

func write(path string, data []byte) {
	if err := os.WriteFile(path, data, 0o644); err != nil {
		panic(err)
	}
}

func (m *machine) grubPicks() (string, map[string]string) {
	raw, err := os.ReadFile(m.at("root/grubenv"))
	if err != nil {
		panic(err)
	}
	vars := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			vars[name] = value
		}
	}
	pick, last := "", "A"
	for _, slot := range strings.Fields(vars["ORDER"]) {
		if vars[slot+"_OK"] != "1" {
			continue
		}
		last = slot
		if vars[slot+"_TRY"] == "0" && pick == "" {
			pick = slot
		}
	}
	if pick == "" {
		pick = last
	}
	return pick, vars
}

func (m *machine) saveGRUB(vars map[string]string) {
	block := []byte("# GRUB Environment Block\n")
	for _, name := range []string{"ORDER", "A_OK", "A_TRY", "B_OK", "B_TRY"} {
		block = append(block, name+"="+vars[name]+"\n"...)
	}
	write(m.at("root/grubenv"), append(block, bytes.Repeat([]byte("#"), 1024-len(block))...))
}

// start starts the daemon below the tracer, which logs to the file named.
func (m *machine) start(t *testing.T, log string, p point) {
	t.Helper()
	argv := []string{os.Args[0], "fault", m.at(log), m.at("root"), p.call, fmt.Sprint(p.nth), p.how,
		m.binary, "daemon", "--config", m.at("meshupd.toml")}
	if m.kind != "files" {
		// The kernel's word on which slot runs, and in which start of the machine.
		argv = append([]string{"unshare", "-m", "--propagation", "private", "sh", "-c",
			`mount --bind "$1" /proc/cmdline && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"`,
			"sh", m.at("cmdline"), m.at("boot_id")}, argv...)
	}
	out, err := os.OpenFile(m.at("daemon.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	must(t, err)
	defer out.Close()
	fmt.Fprintf(out, "---- start of the daemon in power-on %d, fault %v\n", m.power, p)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its exit code is read from ProcessState
		close(ended)
	}()
	m.daemon, m.ended = cmd, ended
}

// off ends the daemon as the end of the power would, and returns when it is gone.
func (m *machine) off() {
	if m.daemon == nil {
		return
	}
	_ = m.daemon.Process.Signal(syscall.SIGUSR1)
	<-m.ended
	m.daemon = nil
}

// bring runs `meshupd import`, as a technician does.
func (m *machine) bring(ctx context.Context) (string, error) {
	cmd := exec.CommandContext(ctx, m.binary, "import", "--progress=none", "--socket", m.at("root/run/api.sock"), m.bundle)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // shows where it hangs
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// startable is the content that the next power-on would start.
func (m *machine) startable() (verify.Digest, string, error) {
	if m.kind != "files" {
		pick, _ := m.grubPicks()
		slot := strings.ToLower(pick)
		sum, err := m.holds(slot)
		return sum, slot, err
	}
	slot, err := os.Readlink(m.at("root/slots/current"))
	if errors.Is(err, os.ErrNotExist) {
		slot, err = "a", nil // the first start has not come that far
	}
	if err != nil {
		return verify.Digest{}, "", err
	}
	sum, err := m.holds(slot)
	return sum, slot, err
}

// holds is the digest of what is really in a slot.
func (m *machine) holds(slot string) (verify.Digest, error) {
	path := m.at("root/part-" + slot)
	if m.kind == "files" {
		path = filepath.Join(m.at("root/slots"), slot, "rootfs")
	}
	f, err := os.Open(path)
	if err != nil {
		return verify.Digest{}, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, io.LimitReader(f, m.size))
	return verify.Digest(h.Sum(nil)), err
}

// judge looks at the disk of a machine that is off: what would start is whole, and no record says more than is there.
func (m *machine) judge(t *testing.T, when string) {
	t.Helper()
	old := verify.Digest(sha256.Sum256(m.factory))
	if sum, slot, err := m.startable(); err != nil || sum != m.image && sum != old {
		t.Errorf("%s: slot %s would start and holds %v (%v), neither the factory's content nor the signed one", when, slot, sum, err)
	}
	for _, slot := range []string{"a", "b"} {
		raw, err := os.ReadFile(m.at("root/slots/slot." + slot + ".json"))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var record struct {
			Body struct {
				Release verify.Digest `json:"release"`
				Whole   bool          `json:"whole"`
			} `json:"body"`
		}
		if err == nil {
			err = json.Unmarshal(raw, &record)
		}
		if err != nil {
			t.Errorf("%s: the record of slot %s: %v", when, slot, err)
			continue
		}
		want := old
		if record.Body.Release == m.release {
			want = m.image
		}
		if got, err := m.holds(slot); record.Body.Whole && (err != nil || got != want) {
			t.Errorf("%s: the record calls slot %s whole, and it holds %v (%v)", when, slot, got, err)
		}
	}
}
