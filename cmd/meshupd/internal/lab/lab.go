// Package lab runs a whole site of real daemons on one machine.
//
// Each device is the meshupd binary as its own process, on a node of a
// simnet.Site, with its own folder, config, slots and control socket. The demo,
// the end-to-end tests and the benchmarks are scenarios on a Lab. It fakes
// nothing: what is imported, fetched and confirmed goes the way it goes on a
// product, except that the product's restart and health commands are short scripts.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/simnet"
	"meshupd/verify/publish"
)

// Product is what every lab sells; ImageName is the one image of its releases.
const (
	Product   = "lab-kiosk"
	ImageName = "rootfs"
)

// Lab is a site and its vendor.
type Lab struct {
	Dir     string
	Binary  string // the meshupd executable that devices run
	Site    *simnet.Site
	Vendor  *publish.Vendor
	Devices []*Device
}

// New prepares a lab below dir; the site stays the caller's to close.
func New(dir, binary string, site *simnet.Site) (*Lab, error) {
	vendor, err := publish.NewVendor(filepath.Join(dir, "vendor"), Product)
	if err != nil {
		return nil, fmt.Errorf("set up the vendor: %w", err)
	}
	return &Lab{Dir: dir, Binary: binary, Site: site, Vendor: vendor}, nil
}

// DeviceConfig of a device of the lab.
type DeviceConfig struct {
	Name     string
	Up, Down int64 // bits per second on the wire; 0: not shaped
	Hardware string
	Channel  string
	// Health is the health command; empty: one that passes.
	Health []string
	// StateDir, if set, is used instead of a folder of the lab's.
	StateDir string
	Reserve  string // bytes that must stay free, as in the config file
	Relay    string // bytes fetched for other hardware, as in the config file
	Policy   string
	// Lines are added to the config as they are; Slots and Store to those sections.
	Lines, Slots, Store []string
	Env                 []string
	// As is a command that runs the daemon, as another user for instance: its words stand before the daemon's.
	As []string
}

// Device is one daemon of a lab.
type Device struct {
	Name   string
	Dir    string
	Config string // path of the config file
	Socket string
	Node   *simnet.Node
	API    *control.Client

	binary string
	as     []string
	env    []string
	cmd    *exec.Cmd
	ended  chan error
}

// Add plugs a device in; Start starts it.
func (l *Lab) Add(cfg DeviceConfig) (*Device, error) {
	node, err := l.Site.AddNode(simnet.NodeConfig{Name: cfg.Name, UpBitsPerSec: cfg.Up, DownBitsPerSec: cfg.Down})
	if err != nil {
		return nil, err
	}
	d := &Device{Name: cfg.Name, Dir: filepath.Join(l.Dir, cfg.Name), Node: node, binary: l.Binary, as: cfg.As, env: cfg.Env}
	slots := filepath.Join(d.Dir, "slots")
	for _, dir := range []string{d.Dir, slots, filepath.Join(d.Dir, "run")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make the folders of %s: %w", cfg.Name, err)
		}
	}
	d.Config = filepath.Join(d.Dir, "meshupd.toml")
	d.Socket = filepath.Join(d.Dir, "run", "api.sock")
	d.API = control.NewClient(d.Socket)
	if err := os.WriteFile(d.Config, []byte(l.toml(d, cfg)), 0o644); err != nil {
		return nil, fmt.Errorf("write the config of %s: %w", cfg.Name, err)
	}
	l.Devices = append(l.Devices, d)
	return d, nil
}

// toml is the config file of a device.
func (l *Lab) toml(d *Device, cfg DeviceConfig) string {
	or := func(s, fallback string) string {
		if s == "" {
			return fallback
		}
		return s
	}
	health := cfg.Health
	if len(health) == 0 {
		health = []string{"true"}
	}
	listen := ""
	if !l.Site.Isolated() {
		// On a shared loopback each device needs an address of its own, and there is no multicast: the first is everybody's seed.
		first := net.JoinHostPort(l.Site.Nodes()[0].Addr4().String(), "7610")
		listen = fmt.Sprintf("listen = [%q]\nmdns = false\nseeds = [%q]\n", d.Node.Addr4().String(), first)
	}
	return fmt.Sprintf(`product = %q
hardware = %q
channel = %q
name = %q
trust = %q
state = %q
run = %q

[mesh]
%s
[slots]
folder = %q
factory = "1.0.0"
%s

[health]
command = %s
deadline = "5s"
interval = "200ms"

[hooks]
dir = ""

[store]
reserve = %q
relay = %q
%s

[policy]
auto = %q
%s
`, Product, or(cfg.Hardware, "rev-a"), or(cfg.Channel, "stable"), cfg.Name, l.Vendor.Anchor(),
		or(cfg.StateDir, filepath.Join(d.Dir, "state")), filepath.Join(d.Dir, "run"), listen,
		filepath.Join(d.Dir, "slots"), or(strings.Join(cfg.Slots, "\n"), `restart = ["true"]`), tomlList(health), or(cfg.Reserve, "1MiB"), or(cfg.Relay, "0"),
		strings.Join(cfg.Store, "\n"), or(cfg.Policy, "install"),
		strings.Join(cfg.Lines, "\n"))
}

func tomlList(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = fmt.Sprintf("%q", w)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// Start runs the daemon; it returns once the process is started, not once it is ready.
func (d *Device) Start() error {
	log, err := os.OpenFile(filepath.Join(d.Dir, "daemon.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("open the log of %s: %w", d.Name, err)
	}
	defer log.Close()
	words := append(slices.Clone(d.as), d.binary, "daemon", "--config", d.Config)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), d.env...)
	if err := d.Node.Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", d.Name, err)
	}
	d.cmd, d.ended = cmd, make(chan error, 1)
	go func() { d.ended <- cmd.Wait() }()
	return nil
}

// PID of the running daemon.
func (d *Device) PID() int { return d.cmd.Process.Pid }

// Wait waits until the daemon has ended by itself.
func (d *Device) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-d.ended:
		d.cmd = nil
		return nil
	}
}

// Kill ends the daemon as a power cut would, and waits until it is gone.
func (d *Device) Kill() error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", d.Name, err)
	}
	<-d.ended
	d.cmd = nil
	return nil
}

// Stop asks the daemon to end and waits for it.
func (d *Device) Stop(ctx context.Context) error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", d.Name, err)
	}
	select {
	case err := <-d.ended:
		d.cmd = nil
		return err
	case <-ctx.Done():
		return errors.Join(ctx.Err(), d.Kill())
	}
}

// Close ends all daemons at once.
func (l *Lab) Close() {
	for _, d := range l.Devices {
		d.API.Close()
		_ = d.Kill()
	}
}

// Log returns what the daemon wrote, for messages of failed tests.
func (d *Device) Log() string {
	raw, err := os.ReadFile(filepath.Join(d.Dir, "daemon.log"))
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// Until polls the device's own status until ok says so, over the daemon's long poll.
func (d *Device) Until(ctx context.Context, ok func(control.SiteStatus) bool) (control.SiteStatus, error) {
	var last control.SiteStatus
	var after uint64
	for {
		st, err := d.API.Status(ctx, after)
		switch {
		case err == nil:
			last, after = st, st.Generation
			if ok(st) {
				return st, nil
			}
		case ctx.Err() != nil:
			return last, fmt.Errorf("wait for %s: %w", d.Name, context.Cause(ctx))
		default: // not up yet, or just restarted
			after = 0
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

// Self is the part of a status that is about the device that answered.
func Self(st control.SiteStatus) control.DeviceStatus {
	if len(st.Devices) == 0 {
		return control.DeviceStatus{}
	}
	return st.Devices[0]
}

// Import runs `meshupd import` on the device, the way a technician does.
func (d *Device) Import(ctx context.Context, path string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, d.binary, "import", "--progress=none", "--socket", d.Socket, path)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("import on %s: %w: %s", d.Name, err, out)
	}
	return out, nil
}
