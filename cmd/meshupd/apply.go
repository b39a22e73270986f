package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"meshupd/install/apply"
	"meshupd/peer"
	"meshupd/swarm"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// ApplyConfig parts the device in two: a daemon without rights, and `meshupd apply`, which writes the slots. Both read the
// same files.
type ApplyConfig struct {
	Socket string   `toml:"socket" comment:"where \"meshupd apply\" answers; empty: the daemon writes the slots itself, as root"`
	State  string   `toml:"state" comment:"folder of \"meshupd apply\", which the daemon cannot write"`
	User   string   `toml:"user" comment:"the daemon's user; besides root only it may ask \"meshupd apply\" for anything"`
	Idle   Duration `toml:"idle" comment:"\"meshupd apply\" ends when nobody asked for so long, if systemd can start it again; \"0s\": never"`
}

func (c *Config) checkApply() error {
	a := c.Apply
	switch {
	case a.Idle != 0 && a.Idle < Duration(time.Second):
		return &fieldError{"apply.idle", `is less than 1s (write it like "30s"; "0s" for never)`}
	case a.Socket == "":
		return nil
	case !filepath.IsAbs(a.Socket):
		return &fieldError{"apply.socket", "is no absolute path"}
	case !filepath.IsAbs(a.State):
		return &fieldError{"apply.state", "is no absolute path"}
	case a.User == "":
		return &fieldError{"apply.user", "is empty"}
	}
	// Who owns a folder can rename what is in it: nothing that decides what boots may lie below the daemon's.
	for key, path := range map[string]string{"apply.state": a.State, "slots.folder": c.Slots.Folder, "trust": c.Trust} {
		for owner, folder := range map[string]string{"state": c.State, "run": c.Run} {
			if path != "" && below(path, folder) {
				return &fieldError{key, "lies in the folder of `" + owner + "`, which belongs to the daemon without rights"}
			}
		}
	}
	return nil
}

// below says whether path is folder or in it, by name.
func below(path, folder string) bool {
	rel, err := filepath.Rel(folder, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

func newApplyCmd(e *env) *cobra.Command {
	var path, socket string
	var idle time.Duration
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Write the slots for a daemon that runs without rights",
		Long: "The half of a device that writes slots, as root, for a daemon that runs as a user without rights. It reads the\n" +
			"daemon's config. It takes nothing but digests from the daemon: signatures, order and every byte are verified here again,\n" +
			"with a trust state of its own, and it asks the health checks itself. Systemd starts it at its socket when it is needed,\n" +
			"and it ends when nobody asked for `apply.idle`. With --socket it makes the socket itself, and stays.",
		Example: example("meshupd apply", "meshupd apply --config ./my.toml --socket /run/meshupd-apply.sock"),
		Args:    takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if e.verbose {
				cfg.Log.Level = "debug"
			}
			switch {
			case cmd.Flags().Changed("idle") && idle != 0 && idle < time.Second:
				return usage("--idle is at least 1s, or 0 for never")
			case cmd.Flags().Changed("idle"):
				cfg.Apply.Idle = Duration(idle)
			case socket != "":
				cfg.Apply.Idle = 0
			}
			err = runApply(cmd.Context(), cfg, socket, newLogger(e, cfg.Log))
			if errors.Is(context.Cause(cmd.Context()), context.Canceled) {
				return nil // told to stop, which is no failure
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", "", "this file alone instead of the layers of the system")
	f.StringVar(&socket, "socket", "", "make this socket instead of taking the one that systemd hands over")
	f.DurationVar(&idle, "idle", 0, "end when nobody asked for so long, instead of apply.idle; 0: never")
	_ = cmd.MarkFlagFilename("config", "toml")
	return cmd
}

// runApply serves the slots until ctx ends or nobody asks any more.
func runApply(ctx context.Context, cfg Config, socket string, log *slog.Logger) error {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(memoryLimit)
	uid, err := userID(cfg.Apply.User)
	if err != nil {
		return err
	}
	unlock, err := lockState(cfg)
	if err != nil {
		return err
	}
	defer unlock()
	ln, err := applyListener(socket, uid)
	if err != nil {
		return err
	}
	defer ln.Close()
	server, err := openApply(ctx, cfg, uid, log)
	if err != nil {
		return err
	}
	log.Info("apply started", "product", cfg.Product, "socket", ln.Addr().String(), "user", cfg.Apply.User)
	err = server.Serve(ctx, ln)
	log.Info("apply stopped", "err", err)
	return err
}

func openApply(ctx context.Context, cfg Config, uid uint32, log *slog.Logger) (*apply.Server, error) {
	door, err := verify.OpenDoor(verify.DoorConfig{Dir: cfg.Apply.State, Anchor: cfg.Trust, Product: cfg.Product, BuildTime: buildTime()})
	if err != nil {
		return nil, fmt.Errorf("open the trust of meshupd apply: %w", err)
	}
	if why := door.Trust().Damage; why != "" {
		log.Error("the kept trust chain is damaged; what holds of it is used", "why", why)
	}
	own := cfg
	own.State = cfg.Apply.State // where records of slots go that have no folder of their own
	slots, err := openSlots(ctx, own, log)
	if err != nil {
		return nil, err
	}
	return apply.NewServer(apply.Config{
		State: cfg.Apply.State, Door: door,
		Device: verify.Device{Product: cfg.Product, Hardware: cfg.Hardware, Channel: cfg.Channel,
			Meshupd: buildVersion().Version, Takes: cfg.Slots.takes()},
		Slots: localInstaller{slots, cfg.health()}, Shelf: swarm.View{State: cfg.State},
		UIDs: []uint32{uid}, Idle: time.Duration(cfg.Apply.Idle), Log: log,
	})
}

// lockState makes the folder, looks whether it and what else decides what boots is out of the daemon's reach, and takes the lock
// that keeps a second process away.
func lockState(cfg Config) (unlock func(), err error) {
	if cfg.Apply.State == "" {
		return nil, verify.Refuse(verify.CodeConfig, "apply.state is empty")
	}
	if err := durable.MkdirAll(cfg.Apply.State, 0o700); err != nil {
		return nil, verify.Refuse(verify.CodeIO, "make the folder of meshupd apply: %w", err)
	}
	for key, path := range map[string]string{"apply.state": cfg.Apply.State, "trust": cfg.Trust, "slots.folder": cfg.Slots.Folder} {
		if err := ownedHere(key, path); err != nil {
			return nil, err
		}
	}
	f, err := os.OpenFile(filepath.Join(cfg.Apply.State, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "lock the folder of meshupd apply: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, verify.Refuse(verify.CodeBusy, "another meshupd apply works on %s", cfg.Apply.State)
	}
	return func() { f.Close() }, nil
}

// ownedHere refuses a folder that others than root and this user may change.
func ownedHere(key, path string) error {
	var st unix.Stat_t
	if path == "" || unix.Stat(path, &st) != nil {
		return nil // made later, or missed by name then
	}
	if st.Uid != 0 && int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return verify.Refuse(verify.CodeConfig, "%s: %s can be changed by others than root (owner %d, mode %o)", key, path, st.Uid, st.Mode&0o7777)
	}
	return nil
}

func userID(name string) (uint32, error) {
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	if err != nil {
		return 0, verify.Refuse(verify.CodeConfig, "apply.user: there is no user %q", name)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return 0, verify.Refuse(verify.CodeConfig, "apply.user: user %q has no number", name)
	}
	return uint32(uid), nil
}

// applyListener is the socket that systemd hands over, or one made at path, which only root and the daemon's user can open.
func applyListener(path string, uid uint32) (*net.UnixListener, error) {
	if path == "" {
		given, err := activation.Listeners()
		if err != nil {
			return nil, fmt.Errorf("take over the socket: %w", err)
		}
		if len(given) != 1 {
			return nil, usage("systemd hands over %d sockets, not one: start it through meshupd-apply.socket, or with --socket", len(given))
		}
		ln, ok := given[0].(*net.UnixListener)
		if !ok {
			return nil, usage("the socket that was handed over is no unix socket")
		}
		ln.SetUnlinkOnClose(false) // it stays systemd's
		return ln, nil
	}
	// The lock is ours, so nobody answers on what is there.
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the old socket: %w", err)
		}
	}
	old := unix.Umask(0o177)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen for the daemon: %w", err)
	}
	if os.Geteuid() == 0 {
		if err := os.Lchown(path, int(uid), -1); err != nil {
			ln.Close()
			return nil, fmt.Errorf("give the socket to the daemon's user: %w", err)
		}
	}
	return ln, nil
}

// remoteInstaller asks meshupd apply.
type remoteInstaller struct{ *apply.Client }

func (remoteInstaller) straight() peer.Straight { return nil }

func (remoteInstaller) wrote() func() (written, same int64) { return nil }

func (r remoteInstaller) learn(ctx context.Context, rel *verify.Release) error {
	return r.Learn(ctx, rel.ID())
}
