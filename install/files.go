package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Layout says what a slot of Files is made of.
type Layout string

// The layouts.
const (
	LayoutFolder Layout = "folder" // a/ and b/, each image one flat file named by its name
	LayoutImage  Layout = "image"  // a.img and b.img, for releases of exactly one image
)

// FilesConfig says how Files works.
type FilesConfig struct {
	// Dir holds the slots, the pointer and the records. It is made when it is not there. One Files at a time may use it.
	Dir string
	// Layout is LayoutFolder when empty.
	Layout Layout
	// FactoryVersion is the version of what the first slot holds before the first release, for people and for Requires.
	FactoryVersion string
	// Restart is the command and its arguments that makes the application start from Dir/current; it runs without a shell,
	// with MESHUPD_SLOT and MESHUPD_VERSION set. Nil: switching the pointer is all there is to do. It must not stop meshupd
	// itself: that would look like a crash in the restart, which costs a start. Use Machine for a command that restarts the machine.
	Restart []string
	// Unit, in the place of Restart, is a systemd unit that runs Dir/current: it is restarted after the pointer moved, and
	// Check wants it to stay up.
	Unit string
	// Settle is how long the unit has to stay up before Check believes that it does; 5 s when zero.
	Settle time.Duration
	// RestartTimeout ends the command, with its process group; 60 s when zero.
	RestartTimeout time.Duration
	// Machine says that Restart restarts the whole machine: the restart has then completed when the daemon is back with
	// another boot id, and not when the command ends. Method Restart then waits for the end of the machine, and returns
	// with E-RESTART when it does not come within RestartTimeout.
	Machine bool
	// Starts of a trial before the old slot is taken again, 1 to 100; 1 when zero.
	Starts int
	// Keep is how many versions are kept beside the two slots, for a person to go back to; 0 to MaxKept.
	Keep int
	// BootID tells one start of the machine from another; the kernel's random boot id when nil.
	BootID func() (string, error)

	// step runs each durable step and the restart command by its name; a test makes them fail or cuts the power there.
	step func(name string, do func() error) error
	// free tells the free bytes of a folder's file system.
	free func(dir string) (int64, error)
}

// withDefaults checks the configuration. Errors are E-CONFIG.
func (c FilesConfig) withDefaults() (FilesConfig, error) {
	if c.Layout == "" {
		c.Layout = LayoutFolder
	}
	if c.Starts == 0 {
		c.Starts = 1
	}
	if c.RestartTimeout == 0 {
		c.RestartTimeout = time.Minute
	}
	c.Settle = orElse(c.Settle, 5*time.Second)
	if c.BootID == nil {
		c.BootID = kernelBootID
	}
	if c.step == nil {
		c.step = func(_ string, do func() error) error { return do() }
	}
	if c.free == nil {
		c.free = freeBytes
	}
	switch {
	case c.Dir == "":
		return c, verify.Refuse(verify.CodeConfig, "the files back end has no folder")
	case c.Layout != LayoutFolder && c.Layout != LayoutImage:
		return c, verify.Refuse(verify.CodeConfig, "the slot layout is %.20q, not %q or %q", string(c.Layout), LayoutFolder, LayoutImage)
	case c.Starts < 1 || c.Starts > maxStarts:
		return c, verify.Refuse(verify.CodeConfig, "a trial of %d starts: not 1 to %d", c.Starts, maxStarts)
	case c.Keep < 0 || c.Keep > MaxKept:
		return c, verify.Refuse(verify.CodeConfig, "to keep %d versions: not 0 to %d", c.Keep, MaxKept)
	case c.RestartTimeout < 0:
		return c, verify.Refuse(verify.CodeConfig, "the restart timeout is negative")
	case c.Restart != nil && (len(c.Restart) == 0 || c.Restart[0] == ""):
		return c, verify.Refuse(verify.CodeConfig, "the restart command is empty")
	case c.Unit != "" && (c.Restart != nil || c.Machine):
		return c, verify.Refuse(verify.CodeConfig, "a unit and a restart command: only one of them can start the application")
	case c.Machine && c.Restart == nil:
		return c, verify.Refuse(verify.CodeConfig, "restarting the machine needs a restart command")
	}
	return c, nil
}

// Files is the embedded back end: two slots below one folder and a pointer that is switched in one step. It serves
// applications, and machines whose boot loader or initrd follows the pointer.
//
//	DIR/a/  DIR/b/              the slots (or a.img, b.img)
//	DIR/current -> a            the pointer: what a start of the application uses
//	DIR/slot.a.json slot.b.json what the slots hold (Content, with a checksum)
//	DIR/versions/               older versions, with Keep
//	DIR/boot.json               default, trial, phase, starts left (with a checksum)
//
// There is no bootloader that counts starts, so Restart counts, and Start does at the start of the daemon what a
// bootloader would have done at power-on:
//
//	Restart   record: start counted, restart open -> pointer -> restart command -> record: restart completed
//	               |                                 |              |
//	               +------------- a cut here leaves the restart open -----------> Start finds it
//
//	phase    restart    boot id  pointer   Start does
//	any      open       any      old slot  the counted start did not happen: takes it now, counts nothing
//	trial    open       any      trial     a crash in the restart: uses one more start, or falls back when none is left
//	settled  open       any      default   runs the restart command again, at most 3 times
//	any      open       same     new slot  (Machine) the machine has not restarted yet: runs the command again
//	any      open       changed  new slot  (Machine) this power-on is the counted start: completed, goes on
//	settled  completed  any      default   nothing
//	settled  completed  any      trial     given up, not yet restarted: starts the default slot
//	armed    completed  same     default   nothing: only Restart, or a power cut, starts the trial
//	armed    completed  changed  default   as a bootloader: counts a start and takes it
//	trial    completed  same     trial     nothing: an upgrade or a kill of the daemon does not condemn a healthy slot
//	trial    completed  changed  trial     uses one start, and goes on; falls back by itself when none is left
//
// Falling back sets the default slot's turn and State.Failed, switches the pointer and runs the restart command. A slot
// is only ever started when its record says that it is Whole.
//
// All methods are safe for concurrent use by one process.
type Files struct {
	*pair
	keep *folder
	unit *unit // nil: none
}

// OpenFiles opens the folder, or begins it: what the pointer names then (slot a, if nothing) counts as the factory's
// content, whole, and is what the first trial falls back to. Call Start before anything else. Errors are E-CONFIG, E-SLOT
// and E-BOOT; a boot.json that cannot be believed is E-BOOT and stays as it is.
func OpenFiles(cfg FilesConfig) (*Files, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	keep := &folder{cfg: cfg, versions: versions{dir: filepath.Join(cfg.Dir, "versions"), keep: cfg.Keep, step: cfg.step}}
	if err := keep.prepare(); err != nil {
		return nil, err
	}
	if err := keep.begin(); err != nil {
		return nil, err
	}
	power := &pointer{
		keep: keep, bootID: cfg.BootID, machine: cfg.Machine,
		whole: func(slot SlotName) error { return whole(keep, slot) },
		run:   keep.runRestart,
	}
	return &Files{keep: keep, unit: keep.unit(), pair: &pair{boot: power, power: power, records: keep, cells: keep, starts: cfg.Starts}}, nil
}

// unit is the unit that runs the application, or nil.
func (f *folder) unit() *unit {
	if f.cfg.Unit == "" {
		return nil
	}
	return &unit{name: f.cfg.Unit, timeout: f.cfg.RestartTimeout, settle: f.cfg.Settle}
}

// runRestart runs the restart command for a slot, or restarts the unit.
func (f *folder) runRestart(ctx context.Context, slot SlotName) error {
	content, _, err := f.loadRecord(slot)
	if err != nil {
		return err
	}
	err = f.cfg.step("restart", func() error {
		if u := f.unit(); u != nil {
			return u.restart(ctx)
		}
		if f.cfg.Restart == nil {
			return nil
		}
		c := command{argv: f.cfg.Restart, env: slotEnv(slot, content.Version), timeout: f.cfg.RestartTimeout}
		if err := c.run(ctx); err != nil || !f.cfg.Machine {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(f.cfg.RestartTimeout):
			return fmt.Errorf("the machine still runs after %s", f.cfg.RestartTimeout)
		}
	})
	return coded(verify.CodeRestart, "restart to slot "+string(slot), err)
}

// prepare makes the folders and removes what a cut left of unfinished writes.
func (f *folder) prepare() error {
	dirs := []string{f.cfg.Dir}
	if f.cfg.Layout == LayoutFolder {
		dirs = append(dirs, f.path(SlotA), f.path(SlotB))
	}
	for _, dir := range dirs {
		if err := durable.MkdirAll(dir, 0o755); err != nil {
			return verify.Refuse(verify.CodeSlot, "%w", err)
		}
	}
	for _, dir := range dirs[1:] {
		// A slot that is a link could be the other slot.
		if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
			return verify.Refuse(verify.CodeSlot, "open slot %s: it is not a folder", dir)
		}
	}
	for _, tidy := range []func() error{func() error { return durable.Sweep(f.cfg.Dir) }, f.removeStale, f.versions.open} {
		if err := tidy(); err != nil {
			return coded(verify.CodeSlot, "open the slots", err)
		}
	}
	return nil
}

// begin makes pointer, record and boot state of a folder that has no boot state yet, the boot state last.
func (f *folder) begin() error {
	_, err := f.loadBoot()
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	slot, err := f.pointed()
	if err != nil {
		return err
	}
	if slot == "" {
		slot = SlotA
		if err := f.point(slot); err != nil {
			return err
		}
	}
	_, found, err := f.loadRecord(slot)
	if err != nil {
		return err
	}
	if !found {
		if err := f.saveRecord(slot, Content{Version: f.cfg.FactoryVersion, Whole: true}); err != nil {
			return err
		}
	}
	return f.saveBoot(bootRecord{Phase: PhaseSettled, Booted: slot, Default: slot})
}

// kernelBootID reads the id that Linux draws at every start (random(4), /proc/sys/kernel/random/boot_id).
func kernelBootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", verify.Refuse(verify.CodeBoot, "read the boot id: %w", err)
	}
	id := strings.TrimSpace(string(data))
	if id == "" || len(id) > maxBootID {
		return "", verify.Refuse(verify.CodeBoot, "read the boot id: it has %d characters", len(id))
	}
	return id, nil
}
