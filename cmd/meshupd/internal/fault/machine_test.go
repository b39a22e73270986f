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
	"os/user"
	"path/filepath"
	"strconv"
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
	config                 verify.Digest // of the container
}

const product = "fault-kiosk"

// model says how a machine is made.
type model struct {
	kind  string // "files", "container", or the bootloader of block slots: "grub", "custom"
	split bool   // a daemon without rights, and meshupd apply
}

func (m model) String() string {
	if m.split {
		return m.kind + ", two halves"
	}
	return m.kind
}

func (m model) block() bool { return m.kind == "grub" || m.kind == "custom" }

// machine is one device on this one: below root is what it keeps, beside it what the test needs.
type machine struct {
	sold
	model
	dir     string
	power   int
	daemon  *process
	apply   *process // nil in one piece
	reboots *os.File // a pipe that the restart command writes to
	api     *control.Client
}

// process is one half of the machine, or all of it, below its tracer.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
}

// gone is what a machine waits for that has no second half.
var gone = &process{ended: make(chan struct{})}

var machines atomic.Int32

func newMachine(t *testing.T, s sold, model model) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "fault-") // most of the time would else be waiting for syncs
	must(t, err)
	m := &machine{sold: s, model: model, dir: dir, apply: gone}
	t.Cleanup(func() {
		m.off()
		if t.Failed() {
			for _, half := range []string{"daemon", "apply"} {
				if log, err := os.ReadFile(m.at("log." + half)); err == nil {
					t.Logf("the %s said:\n%s", half, log[max(0, len(log)-20000):])
				}
			}
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
	halves := ""
	if m.split {
		halves = fmt.Sprintf("[apply]\nsocket = %q\nstate = %q\nuser = \"nobody\"\n", m.at("root/apply.sock"), m.at("root/own"))
		m.giveToNobody(t)
	}
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
%s`, product, s.anchor, m.at("root/state"), m.at("root/run"), n/250, n%250+1, m.slots(t), halves), 0o644))
	m.powerOn()
	return m
}

// slots makes the slots as the factory does and returns their config.
func (m *machine) slots(t *testing.T) string {
	if m.kind == "files" {
		must(t, os.WriteFile(m.at("root/slots/a/rootfs"), m.factory, 0o644))
		return fmt.Sprintf("folder = %q\nrestart = [\"true\"]", m.at("root/slots"))
	}
	if m.kind == "container" {
		must(t, os.MkdirAll(m.at("root/engine"), 0o755))
		write(m.at("root/engine/store.json"), fmt.Appendf(nil, `{"Images":{%q:%q}}`, containerRef+"a", factoryConfig))
		return fmt.Sprintf("kind = \"container\"\nfolder = %q\ncontainer = { engine = \"podman\", command = [%q, \"--root\", %q], settle = \"100ms\", services = { rootfs = {} } }",
			m.at("root/slots"), engine, m.at("root/engine"))
	}
	must(t, os.WriteFile(m.at("root/part-a"), m.factory, 0o644))
	must(t, os.WriteFile(m.at("root/part-b"), make([]byte, len(m.factory)), 0o644))
	boot := fmt.Sprintf("bootloader = \"custom\"\nboot = { command = [\"sh\", %q] }", m.at("custom.sh"))
	if m.kind == "grub" {
		boot = fmt.Sprintf("bootloader = \"grub\"\nboot = { env = %q }", m.at("root/grubenv"))
	}
	write(m.at("custom.sh"), fmt.Appendf(nil, customBoot, m.at("root/boot")))
	write(m.at("root/boot"), []byte("a\n"))
	m.saveGRUB(map[string]string{"ORDER": "A B", "A_OK": "1", "A_TRY": "0", "B_OK": "0", "B_TRY": "0"})
	return fmt.Sprintf(`kind = "block"
a = %q
b = %q
folder = %q
%s
restart = ["sh", "-c", "echo now >%s"]
restart_timeout = "1m"`,
		m.at("root/part-a"), m.at("root/part-b"), m.at("root/slots"), boot, m.at("reboots"))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *machine) at(name string) string { return filepath.Join(m.dir, name) }

// giveToNobody makes the daemon's folders the daemon's.
func (m *machine) giveToNobody(t *testing.T) {
	nobody, err := user.Lookup("nobody")
	must(t, err)
	uid, err := strconv.Atoi(nobody.Uid)
	must(t, err)
	must(t, os.Chmod(m.dir, 0o755))
	for _, name := range []string{"root/state", "root/run"} {
		must(t, os.MkdirAll(m.at(name), 0o755))
		must(t, os.Chown(m.at(name), uid, -1))
	}
}

// customBoot is a bootloader of an integrator: one file, "DEFAULT" or "DEFAULT TRIAL LEFT", that is replaced by rename.
const customBoot = `set -eu
file=%q
put() { echo "$*" >"$file.new"; sync "$file.new"; mv "$file.new" "$file"; sync "${file%%/*}"; }
read -r default trial left <"$file" || :
case "$1" in
get-state)
	if [ -n "${trial:-}" ]; then echo "{\"default\":\"$default\",\"trial\":\"$trial\",\"left\":$left}"; else echo "{\"default\":\"$default\"}"; fi ;;
try) if [ "$2" = "$default" ]; then put "$default"; else put "$default" "$2" "$3"; fi ;;
confirm | fallback) put "$2" ;;
esac
`

// customPicks is the slot that the integrator's bootloader starts next, and what it writes when it does.
func (m *machine) customPicks() (slot, after string) {
	raw, err := os.ReadFile(m.at("root/boot"))
	if err != nil {
		panic(err)
	}
	var trial string
	var left int
	if n, _ := fmt.Sscan(string(raw), &slot, &trial, &left); n == 3 && left > 0 {
		return trial, fmt.Sprintf("%s %s %d\n", slot, trial, left-1)
	}
	return slot, string(raw)
}

// powerOn does what GRUB does by packaging/boot/grub.cfg.
func (m *machine) powerOn() {
	m.power++
	slot := ""
	switch m.kind {
	case "files", "container":
		return
	case "custom":
		next, after := m.customPicks()
		write(m.at("root/boot"), []byte(after))
		slot = next
	default:
		pick, vars := m.grubPicks()
		vars[pick+"_TRY"] = "1"
		m.saveGRUB(vars)
		slot = pick
	}
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

// start starts what the machine runs. The point is met by the half that it names.
func (m *machine) start(t *testing.T, nth int, p point) {
	t.Helper()
	if m.split {
		m.apply = m.startHalf(t, "apply", nth, p)
	}
	m.daemon = m.startHalf(t, "daemon", nth, p)
}

// startHalf starts one half below the tracer, which logs to calls.HALF.NTH.
func (m *machine) startHalf(t *testing.T, half string, nth int, p point) *process {
	t.Helper()
	if p.half != half {
		p = none
	}
	argv := []string{os.Args[0], "fault", m.at(fmt.Sprintf("calls.%s.%d", half, nth)), m.at("root"), p.call, fmt.Sprint(p.nth), p.how, fmt.Sprint(m.kind == "custom" || m.kind == "container")}
	switch {
	case half == "apply":
		argv = append(argv, m.binary, "apply", "--config", m.at("meshupd.toml"), "--socket", m.at("root/apply.sock"))
	case m.split:
		argv = append(argv, "setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--no-new-privs", m.binary, "daemon", "--config", m.at("meshupd.toml"))
	default:
		argv = append(argv, m.binary, "daemon", "--config", m.at("meshupd.toml"))
	}
	if m.block() {
		// The kernel's word on which slot runs, and in which start of the machine.
		argv = append([]string{"unshare", "-m", "--propagation", "private", "sh", "-c",
			`mount --bind "$1" /proc/cmdline && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"`,
			"sh", m.at("cmdline"), m.at("boot_id")}, argv...)
	}
	out, err := os.OpenFile(m.at("log."+half), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	must(t, err)
	defer out.Close()
	fmt.Fprintf(out, "---- start of the %s in power-on %d, fault %v\n", half, m.power, p)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	must(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // its exit code is read from ProcessState
		close(ended)
	}()
	return &process{cmd, ended}
}

// off ends both halves as the end of the power would, and returns when they are gone.
func (m *machine) off() {
	for _, p := range []*process{m.daemon, m.apply} {
		if p != nil && p.cmd != nil {
			_ = p.cmd.Process.Signal(syscall.SIGUSR1)
			<-p.ended
		}
	}
	m.daemon, m.apply = nil, gone
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
	if m.block() {
		pick, _ := m.grubPicks()
		slot := strings.ToLower(pick)
		if m.kind == "custom" {
			slot, _ = m.customPicks()
		}
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
	if m.kind == "container" {
		return m.holdsContainer(slot)
	}
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

// The container's reference without the slot, and the config of what the factory loaded.
const (
	containerRef  = "localhost/meshupd/rootfs:"
	factoryConfig = "0000000000000000000000000000000000000000000000000000000000000001"
)

// holdsContainer asks the engine's store.
func (m *machine) holdsContainer(slot string) (verify.Digest, error) {
	var store struct{ Images map[string]string }
	raw, err := os.ReadFile(m.at("root/engine/store.json"))
	if err == nil {
		err = json.Unmarshal(raw, &store)
	}
	switch store.Images[containerRef+slot] {
	case factoryConfig:
		return sha256.Sum256(m.factory), err
	case m.config.String():
		return m.image, err
	}
	return verify.Digest{}, errors.Join(err, fmt.Errorf("the engine has the image %q", store.Images[containerRef+slot]))
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
