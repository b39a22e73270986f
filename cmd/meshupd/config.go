package main

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Config of the daemon, as in its TOML file. Six lines are enough:
//
//	product = "kiosk-a"
//	trust = "/usr/lib/meshupd/trust"
//	[slots]
//	folder = "/var/lib/app"
//	restart = ["systemctl", "restart", "app"]
//	health.command = ["/usr/lib/app/healthy"]   # or [health] on a line of its own
type Config struct {
	Product  string `toml:"product" comment:"what this device is; only releases for it are taken (required)"`
	Hardware string `toml:"hardware" comment:"kind of hardware; only images for it are installed"`
	Channel  string `toml:"channel" comment:"channel that is followed"`
	Name     string `toml:"name" comment:"name to show; empty: the host name"`
	Trust    string `toml:"trust" comment:"factory folder with trust.N.json, trust.N.sig and certs/ (required)"`
	State    string `toml:"state" comment:"folder that survives restarts and updates"`
	Run      string `toml:"run" comment:"folder of the control socket"`

	Mesh   MeshConfig   `toml:"mesh"`
	Slots  SlotsConfig  `toml:"slots"`
	Apply  ApplyConfig  `toml:"apply"`
	Health HealthConfig `toml:"health"`
	Hooks  HooksConfig  `toml:"hooks"`
	Store  StoreConfig  `toml:"store"`
	Limits LimitsConfig `toml:"limits"`
	Policy PolicyConfig `toml:"policy"`
	Log    LogConfig    `toml:"log"`
}

// MeshConfig says whom this device talks to.
type MeshConfig struct {
	Interfaces  []string `toml:"interfaces" comment:"names or patterns (\"eth*\"); empty: all with private addresses"`
	Listen      []string `toml:"listen" comment:"addresses to bind; empty: the private addresses of the interfaces"`
	Port        int      `toml:"port" comment:"TCP port; 0: any that is free"`
	Seeds       []string `toml:"seeds" comment:"\"host:port\" of neighbours where multicast is blocked"`
	SiteKeyFile string   `toml:"site_key_file" comment:"file with a secret that all devices of the site share; empty: the product's trust is enough"`
	MDNS        bool     `toml:"mdns" comment:"find neighbours by multicast"`
	MaxPeers    int      `toml:"max_peers" comment:"connections kept, 1 to 1024"`
}

// SlotsConfig says where updates go.
type SlotsConfig struct {
	Kind           string   `toml:"kind" comment:"\"files\": two folders and a pointer; \"block\": two partitions and a bootloader; \"container\": two sets of container images; \"rauc\", \"swupdate\", \"mender\", \"command\": another installer writes"`
	Folder         string   `toml:"folder" comment:"files: where the slots are (required); block, container: where the records are, on neither slot"`
	Layout         string   `toml:"layout" comment:"\"folder\": each slot a folder of images; \"image\": each slot one image file"`
	Factory        string   `toml:"factory" comment:"version that the first slot holds when the device is new"`
	Starts         int      `toml:"starts" comment:"starts that a trial gets, 1 to 10"`
	Restart        []string `toml:"restart" comment:"command that starts the application from the chosen slot"`
	RestartTimeout Duration `toml:"restart_timeout" comment:"how long it may take"`
	Machine        bool     `toml:"machine" comment:"files: the restart command restarts the whole machine"`
	Unit           string   `toml:"unit" comment:"files: systemd unit that runs the application, restarted in the place of a restart command; it has to stay up on trial"`
	Settle         Duration `toml:"settle" comment:"files: how long the unit has to stay up before that is believed"`

	Keep int `toml:"keep" comment:"files: how many older releases are kept beside the two slots, to go back to with \"meshupd rollback --to\"; 0 to 8"`

	A          string     `toml:"a" comment:"block: the partition of slot a"`
	B          string     `toml:"b" comment:"block: the partition of slot b"`
	Discard    bool       `toml:"discard" comment:"block: tell the medium what lies unused behind an image"`
	Bootloader string     `toml:"bootloader" comment:"block: \"grub\", \"uboot\", \"systemd-boot\", \"tryboot\", \"efi\" or \"custom\""`
	Boot       BootConfig `toml:"boot"`

	Delegate  DelegateConfig  `toml:"delegate"`
	Container ContainerConfig `toml:"container"`
}

// StoreConfig bounds the store of images.
type StoreConfig struct {
	Reserve  Size `toml:"reserve" comment:"what stays free on its disk"`
	Relay    Size `toml:"relay" comment:"how much is fetched for neighbours of other hardware, to be handed on; \"0\": nothing"`
	Straight bool `toml:"straight" comment:"block: the raw image of the next version lands in the idle slot as it comes, with no copy on disk; packed images, and all others, go to the store"`
}

// LimitsConfig bounds the traffic.
type LimitsConfig struct {
	Upload   Rate `toml:"upload" comment:"to neighbours, as \"4MiB/s\"; \"0\": no limit"`
	Download Rate `toml:"download" comment:"from neighbours; \"0\": no limit"`
}

// LogConfig says what is logged.
type LogConfig struct {
	Level  string `toml:"level" comment:"\"debug\", \"info\", \"warn\" or \"error\""`
	Format string `toml:"format" comment:"\"text\", \"json\" or \"journal\" (text with the levels that systemd reads)"`
}

// defaultConfig is what stands where no file says anything.
func defaultConfig() Config {
	name, _ := os.Hostname()
	return Config{
		Channel: "stable", Name: name, State: "/var/lib/meshupd", Run: "/run/meshupd",
		Mesh: MeshConfig{Interfaces: []string{}, Listen: []string{}, Port: 7610, Seeds: []string{}, MDNS: true, MaxPeers: 64},
		Slots: SlotsConfig{Kind: "files", Layout: "folder", Starts: 1, Restart: []string{}, RestartTimeout: Duration(2 * time.Minute), Settle: Duration(5 * time.Second),
			Boot: BootConfig{Env: "/boot/grub/grubenv", Config: "/etc/fw_env.config", Scheme: "left", Variable: "boot_slot", Dir: "/boot",
				File: "/boot/firmware/autoboot.txt", Command: []string{}},
			Delegate: DelegateConfig{Command: []string{}, Timeout: Duration(time.Hour)},
			Container: ContainerConfig{Engine: "podman", Command: []string{}, Namespace: "meshupd", Stop: Duration(10 * time.Second),
				Settle: Duration(5 * time.Second), Services: map[string]ServiceConfig{}}},
		Apply:  ApplyConfig{State: "/var/lib/meshupd-apply", User: "meshupd", Idle: Duration(30 * time.Second)},
		Health: defaultHealth(),
		Hooks:  defaultHooks(),
		Store:  StoreConfig{Reserve: 64 << 20},
		Policy: PolicyConfig{Auto: "install", Restart: "auto", Window: []string{}, MayRestart: []string{}, MayTimeout: Duration(30 * time.Second),
			InhibitDir: "/run/meshupd-inhibit.d", Inhibitors: true},
		Log: LogConfig{Level: "info", Format: "text"},
	}
}

// fieldError is a value that cannot be used; key is its path, "mesh.port".
type fieldError struct{ key, text string }

func (f *fieldError) Error() string { return f.key + " " + f.text }

// leastDuration also catches a bare number, which TOML would read as nanoseconds.
const (
	leastDuration = Duration(10 * time.Millisecond)
	tooShort      = `is less than 10ms (write it like "90s")`
)

var namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// Validate checks what types cannot say. The error is a *fieldError for the first value that cannot be used.
func (c *Config) Validate() error {
	for _, check := range []func() error{c.checkDevice, c.checkMesh, c.checkSlots, c.checkApply, c.checkHealth, c.checkHooks, c.checkPolicy, c.checkRest} {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

func (c *Config) checkDevice() error {
	switch {
	case c.Product == "":
		return &fieldError{"product", "is missing"}
	case !namePattern.MatchString(c.Product):
		return &fieldError{"product", "is not a name of a-z, 0-9, '.', '_' and '-'"}
	case c.Hardware != "" && !namePattern.MatchString(c.Hardware):
		return &fieldError{"hardware", "is not a name of a-z, 0-9, '.', '_' and '-'"}
	case !namePattern.MatchString(c.Channel):
		return &fieldError{"channel", "is not a name of a-z, 0-9, '.', '_' and '-'"}
	case len(c.Name) > 63:
		return &fieldError{"name", "is longer than 63 bytes"}
	case c.Trust == "":
		return &fieldError{"trust", "is missing"}
	case c.State == "":
		return &fieldError{"state", "is empty"}
	case c.Run == "":
		return &fieldError{"run", "is empty"}
	}
	return nil
}

func (c *Config) checkMesh() error {
	for _, pattern := range c.Mesh.Interfaces {
		if _, err := path.Match(pattern, "eth0"); err != nil || pattern == "" {
			return &fieldError{"mesh.interfaces", fmt.Sprintf("has a pattern that cannot be used: %q", pattern)}
		}
	}
	for _, addr := range c.Mesh.Listen {
		if _, err := netip.ParseAddr(addr); err != nil {
			return &fieldError{"mesh.listen", fmt.Sprintf("has %q, which is not an IP address", addr)}
		}
	}
	for _, seed := range c.Mesh.Seeds {
		host, port, err := net.SplitHostPort(seed)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
			return &fieldError{"mesh.seeds", fmt.Sprintf("has %q, which is not host:port", seed)}
		}
	}
	switch {
	case c.Mesh.Port < 0 || c.Mesh.Port > 65535:
		return &fieldError{"mesh.port", "is not a port: 0 to 65535"}
	case c.Mesh.MaxPeers < 1 || c.Mesh.MaxPeers > 1024:
		return &fieldError{"mesh.max_peers", "is not 1 to 1024"}
	}
	return nil
}

func (c *Config) checkRest() error {
	if c.Store.Straight && c.Slots.Kind != "block" {
		return &fieldError{"store.straight", `needs slots.kind = "block"`}
	}
	if c.Store.Straight && c.Apply.Socket != "" {
		return &fieldError{"store.straight", "cannot be with apply.socket: this process must not write the slots"}
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		return &fieldError{"log.level", `is not "debug", "info", "warn" or "error"`}
	}
	switch c.Log.Format {
	case "text", "json", "journal":
	default:
		return &fieldError{"log.format", `is not "text", "json" or "journal"`}
	}
	return nil
}

// Socket is where the daemon answers.
func (c *Config) Socket() string { return filepath.Join(c.Run, "api.sock") }

// Size is a number of bytes, written "64MiB".
type Size int64

// UnmarshalText reads "64MiB", "1.5 GB" or "4096".
func (s *Size) UnmarshalText(text []byte) error {
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n > math.MaxInt64 {
		return fmt.Errorf("%q is not a size like \"64MiB\"", text)
	}
	*s = Size(n)
	return nil
}

// MarshalText writes the exact number with the largest unit that divides it.
func (s Size) MarshalText() ([]byte, error) {
	for _, u := range []struct {
		bytes Size
		name  string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if s >= u.bytes && s%u.bytes == 0 {
			return fmt.Appendf(nil, "%d%s", s/u.bytes, u.name), nil
		}
	}
	return strconv.AppendInt(nil, int64(s), 10), nil
}

// Rate is a number of bytes per second, written "4MiB/s"; 0 is no limit.
type Rate int64

// UnmarshalText reads a size, with or without "/s".
func (r *Rate) UnmarshalText(text []byte) error {
	var s Size
	if len(text) > 0 {
		if err := s.UnmarshalText([]byte(strings.TrimSuffix(string(text), "/s"))); err != nil {
			return fmt.Errorf("%q is not a rate like \"4MiB/s\"", text)
		}
	}
	*r = Rate(s)
	return nil
}

// MarshalText writes the size and "/s".
func (r Rate) MarshalText() ([]byte, error) {
	if r == 0 {
		return []byte("0"), nil
	}
	text, err := Size(r).MarshalText()
	return append(text, "/s"...), err
}

// Duration is a time.Duration, written "2m30s".
type Duration time.Duration

// UnmarshalText reads "90s" or "1h30m".
func (d *Duration) UnmarshalText(text []byte) error {
	got, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration like \"90s\"", text)
	}
	*d = Duration(got)
	return nil
}

// MarshalText writes the duration as Go does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }
