package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// ContainersConfig says how Containers works.
type ContainersConfig struct {
	// Dir holds the pointer, the records and, for a moment, the archive that is being loaded. It is made when it is not
	// there. One Containers at a time may use it, and one device an engine's store or namespace.
	Dir string
	// Engine is Podman or Containerd.
	Engine Engine
	// Services by name: that of their image in a release. A release may leave some out, and may have no others.
	Services map[string]Service
	// FactoryVersion is the version of what the first slot holds before the first release: the images that the engine then
	// has as localhost/meshupd/SERVICE:a, if any.
	FactoryVersion string
	// Starts of a trial before the old slot is taken again, 1 to 100; 1 when zero.
	Starts int
	// Timeout of one call of the engine, and of the wait for an engine that is still starting; 2 minutes when zero.
	Timeout time.Duration
	// Stop is how long a service may take to end after it was asked to; 10 s when zero.
	Stop time.Duration
	// Settle is how long the services on trial have to run before Check believes that they stay; 5 s when zero.
	Settle time.Duration
	// BootID tells one start of the machine from another; the kernel's random boot id when nil.
	BootID func() (string, error)

	// step runs each durable step and each change in the engine by its name; a test makes them fail or cuts the power there.
	step    func(name string, do func() error) error
	again   time.Duration // see services
	systemd func(ctx context.Context, verb, unit string) error
}

// withDefaults checks the configuration. Errors are E-CONFIG.
func (c ContainersConfig) withDefaults() (ContainersConfig, error) {
	if c.Starts == 0 {
		c.Starts = 1
	}
	c.Timeout, c.Stop, c.Settle = orElse(c.Timeout, 2*time.Minute), orElse(c.Stop, 10*time.Second), orElse(c.Settle, 5*time.Second)
	if c.BootID == nil {
		c.BootID = kernelBootID
	}
	if c.step == nil {
		c.step = func(_ string, do func() error) error { return do() }
	}
	c.again = orElse(c.again, 2*time.Second)
	if c.systemd == nil {
		c.systemd = systemctl(c.Timeout)
	}
	switch {
	case c.Dir == "":
		return c, verify.Refuse(verify.CodeConfig, "the container back end has no folder")
	case c.Engine == nil:
		return c, verify.Refuse(verify.CodeConfig, "the container back end has no engine")
	case len(c.Services) == 0 || len(c.Services) > maxImages:
		return c, verify.Refuse(verify.CodeConfig, "%d services: not 1 to %d", len(c.Services), maxImages)
	case c.Starts < 1 || c.Starts > maxStarts:
		return c, verify.Refuse(verify.CodeConfig, "a trial of %d starts: not 1 to %d", c.Starts, maxStarts)
	}
	for name, s := range c.Services {
		switch {
		case !plainName(name):
			return c, verify.Refuse(verify.CodeConfig, "a service has the name %.64q", name)
		case s.Unit != "" && (s.Beside || len(s.Args)+len(s.Command)+len(s.Ready)+len(s.Switch) > 0):
			return c, verify.Refuse(verify.CodeConfig, "service %s has a unit, which says itself how it runs", name)
		case !s.Beside && len(s.Ready)+len(s.Switch) > 0:
			return c, verify.Refuse(verify.CodeConfig, "service %s is not started beside the old one, so there is nothing to be ready for", name)
		}
	}
	return c, nil
}

// Containers is the back end of a device whose application is one or more containers. An image of a release is an OCI
// archive and becomes the service of its name. The slots are two sets of references in the engine:
//
//	localhost/meshupd/SERVICE:a  :b   the images of the slots; :current for those that a systemd unit runs
//	meshupd-SERVICE-a  -b             the containers that meshupd runs itself
//	DIR/a/services.json  DIR/b/       which image the engine must have for each service of a slot (with a checksum)
//	DIR/current, slot.*.json, boot.json   as in Files, with the same steps, starts and recovery
//
// An archive is hashed while it is spooled to a file that has no name; only then does the engine see it, as a new archive
// with that one image under our reference. The record is written after the engine's own id of the image was compared.
//
// All methods are safe for concurrent use by one process.
type Containers struct {
	*pair
	cfg      ContainersConfig
	keep     *containerCells
	services *services
}

// OpenContainers opens the folder, or begins it, for which the engine has to answer within Timeout. Call Start before
// anything else. Errors are E-CONFIG, E-SLOT and E-BOOT.
func OpenContainers(ctx context.Context, cfg ContainersConfig) (*Containers, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	logs := filepath.Join(cfg.Dir, "log")
	eng, err := cfg.Engine.open(engineEnv{logs: logs, stop: cfg.Stop, timeout: cfg.Timeout})
	if err != nil {
		return nil, err
	}
	eng = steppedEngine{eng, cfg.step}
	keep := &containerCells{folder: &folder{cfg: FilesConfig{Dir: cfg.Dir, Layout: LayoutFolder, FactoryVersion: cfg.FactoryVersion,
		step: cfg.step, free: freeBytes}}, engine: eng, defined: cfg.Services}
	c := &Containers{cfg: cfg, keep: keep,
		services: &services{engine: eng, defined: cfg.Services, systemd: cfg.systemd, timeout: cfg.Timeout, again: cfg.again}}
	power := &pointer{
		keep: keep, bootID: cfg.BootID, run: c.run,
		whole: func(slot SlotName) error { return whole(keep, slot) },
	}
	c.pair = &pair{boot: power, power: power, records: keep, cells: keep, starts: cfg.Starts, ready: c.ready}
	if err := keep.prepare(); err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(logs, 0o700); err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "%w", err)
	}
	return c, c.begin(ctx)
}

// begin takes what the engine already has as slot a for the factory's.
func (c *Containers) begin(ctx context.Context) error {
	if _, err := c.keep.loadBoot(); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := c.await(ctx); err != nil {
		return err
	}
	slot, err := c.keep.pointed()
	if err != nil {
		return err
	}
	if slot == "" {
		slot = SlotA
	}
	if _, err := c.keep.pins(slot); errors.Is(err, fs.ErrNotExist) {
		have, err := c.services.engine.images(ctx)
		if err != nil {
			return verify.Refuse(verify.CodeSlot, "look for the factory's images: %w", err)
		}
		pins := make(map[string]pin)
		for service := range c.cfg.Services {
			if id, found := have[slotRef(service, slot)]; found {
				pins[service] = pin{ID: id}
			}
		}
		if err := c.keep.savePins(slot, pins); err != nil {
			return err
		}
	}
	return c.keep.begin()
}

// await waits for an engine that is still starting.
func (c *Containers) await(ctx context.Context) error {
	var last error
	ok, err := until(ctx, c.cfg.Timeout, time.Second, func() (bool, error) {
		last = c.services.engine.ready(ctx)
		return last == nil, nil
	})
	if err == nil && !ok {
		err = verify.Refuse(verify.CodeRestart, "the container engine does not answer: %w", last)
	}
	return err
}

// Start does what a power-on has left to do, and makes sure that the services of the slot whose turn it is run: after a
// restart of the machine nobody else starts them. The daemon calls it once when it starts, before anything else here.
func (c *Containers) Start(ctx context.Context) error {
	if err := c.await(ctx); err != nil {
		return err
	}
	if err := c.pair.Start(ctx); err != nil {
		return err
	}
	b, err := c.boot.Boot(ctx)
	if err != nil {
		return err
	}
	// A slot that runs cannot be written again, but the other one can: the lifecycle has to see that it is not whole.
	if err := c.ready(ctx, b.Default.Other()); err != nil && verify.CodeOf(err) != verify.CodeBoot {
		return err
	}
	return c.startSlot(ctx, b.Booted, false)
}

// State implements Slots. It also keeps the logs small.
func (c *Containers) State(ctx context.Context) (State, error) {
	c.trimLogs()
	return c.pair.State(ctx)
}

// ready refuses with E-BOOT when a slot that a record calls whole cannot run because the engine lost an image. Unless it is the
// slot that runs or is the default, it then loses its record, so that it is written again.
func (c *Containers) ready(ctx context.Context, slot SlotName) error {
	if whole(c.keep, slot) != nil {
		return nil
	}
	b, err := c.boot.Boot(ctx)
	if err != nil || slot == b.Booted || slot == b.Default {
		return err
	}
	pins, err := c.keep.pins(slot)
	if err == nil {
		err = c.services.missing(ctx, slot, pins)
	} else {
		err = verify.Refuse(verify.CodeBoot, "read the services of slot %s: %w", slot, err)
	}
	if verify.CodeOf(err) != verify.CodeBoot {
		return err
	}
	return errors.Join(err, c.keep.removeRecord(slot))
}

// run is the restart: it starts the services of a slot in the place of those of the other.
func (c *Containers) run(ctx context.Context, slot SlotName) error {
	return c.startSlot(ctx, slot, true)
}

func (c *Containers) startSlot(ctx context.Context, slot SlotName, afresh bool) error {
	content, _, err := c.keep.loadRecord(slot)
	if err != nil {
		return err
	}
	pins, err := c.keep.pins(slot)
	if err != nil {
		return verify.Refuse(verify.CodeBoot, "read the services of slot %s: %w", slot, err)
	}
	for service := range pins {
		if _, found := c.cfg.Services[service]; !found {
			return verify.Refuse(verify.CodeConfig, "slot %s holds the service %s, which the configuration does not know", slot, service)
		}
	}
	err = c.services.start(ctx, slot, content.Version, pins, afresh)
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return coded(verify.CodeRestart, "start slot "+string(slot), err)
}

// Env tells a command which services and containers a slot has: MESHUPD_SERVICES and MESHUPD_CONTAINERS, each a list
// with spaces. A service that a unit runs has no container of ours.
func (c *Containers) Env(slot SlotName) []string {
	pins, _ := c.keep.pins(slot) // a slot that cannot be read has none
	names := slices.Sorted(maps.Keys(pins))
	var containers []string
	for _, service := range names {
		if c.cfg.Services[service].Unit == "" {
			containers = append(containers, containerName(service, slot))
		}
	}
	return []string{"MESHUPD_SERVICES=" + strings.Join(names, " "), "MESHUPD_CONTAINERS=" + strings.Join(containers, " ")}
}

// Check runs check and looks at the services of the slot meanwhile. One that ends, or ends and is started again, ends the
// check at once with E-HEALTH and the last line that it printed. They have to run for Settle, however short the check is.
func (c *Containers) Check(ctx context.Context, slot SlotName, check func(context.Context) error) error {
	pins, err := c.keep.pins(slot)
	if err != nil {
		return verify.Refuse(verify.CodeHealth, "read the services of slot %s: %w", slot, err)
	}
	pids := make(map[string]int)
	return checkWatched(ctx, c.cfg.Settle, check, func(ctx context.Context) (bool, error) {
		return true, c.look(ctx, slot, pins, pids)
	})
}

// look compares the services with how they were first seen. An engine that does not answer says nothing about them.
func (c *Containers) look(ctx context.Context, slot SlotName, pins map[string]pin, pids map[string]int) error {
	there, err := c.services.engine.containers(ctx)
	if err != nil {
		return ctx.Err()
	}
	for _, service := range slices.Sorted(maps.Keys(pins)) {
		if unit := c.cfg.Services[service].Unit; unit != "" {
			if c.cfg.systemd(ctx, "is-failed", unit) == nil {
				return verify.Refuse(verify.CodeHealth, "unit %s failed", unit)
			}
			continue
		}
		name := containerName(service, slot)
		if err := c.services.ended(ctx, there, name, pids[name]); err != nil {
			// A list that was taken while something changed is not enough to condemn a release.
			if err := c.services.alive(ctx, name, pids[name]); err != nil {
				return err
			}
			continue
		}
		pids[name] = there[name].pid
	}
	return ctx.Err()
}

// maxLog is how large the log of a service may become before it is emptied. Engines that keep logs themselves have none here.
const maxLog = 1 << 20

func (c *Containers) trimLogs() {
	logs, err := filepath.Glob(filepath.Join(c.cfg.Dir, "log", "*.log"))
	if err != nil {
		return
	}
	for _, path := range logs {
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() && info.Size() > maxLog {
			_ = os.Truncate(path, 0) // the engine appends, so it goes on at the new end
		}
	}
}

// steppedEngine makes each change in the engine a step that a test can let fail.
type steppedEngine struct {
	engine
	step func(name string, do func() error) error
}

func (s steppedEngine) tag(ctx context.Context, from, to string) error {
	return s.step("engine.tag", func() error { return s.engine.tag(ctx, from, to) })
}

func (s steppedEngine) untag(ctx context.Context, ref string) error {
	return s.step("engine.untag", func() error { return s.engine.untag(ctx, ref) })
}

func (s steppedEngine) run(ctx context.Context, c wanted) error {
	err := s.step("engine.run", func() error { return s.engine.run(ctx, c) })
	if err != nil {
		return fmt.Errorf("run %s: %w", c.name, err)
	}
	return nil
}

func (s steppedEngine) remove(ctx context.Context, name string) error {
	return s.step("engine.remove", func() error { return s.engine.remove(ctx, name) })
}
