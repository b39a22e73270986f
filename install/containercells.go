package install

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// containerCells are two sets of references in a container engine, with the note which image each has to be.
type containerCells struct {
	*folder
	engine  engine
	defined map[string]Service
}

var _ cells = (*containerCells)(nil)

func (c *containerCells) pinsPath(slot SlotName) string {
	return filepath.Join(c.path(slot), "services.json")
}

// pins returns fs.ErrNotExist when the slot holds nothing.
func (c *containerCells) pins(slot SlotName) (map[string]pin, error) {
	data, err := readSmall(c.pinsPath(slot), maxPins)
	if err != nil {
		return nil, err
	}
	return parsePins(data)
}

func (c *containerCells) savePins(slot SlotName, pins map[string]pin) error {
	data, err := seal(pinsSchema, pins)
	if err != nil {
		return err
	}
	err = c.cfg.step("pins.save", func() error { return durable.WriteFile(c.pinsPath(slot), data, 0o644) })
	return mediumError(err, "note the services of slot "+string(slot), recordSpace)
}

// fits also refuses a service that the configuration does not know: nothing runs with the rights of a container engine
// that the integrator has not placed.
func (c *containerCells) fits(images []verify.Image) error {
	for _, img := range images {
		if img.Kind != verify.KindContainer {
			return verify.Refuse(verify.CodeFormat, "write a slot: image %s is of kind %s, and this device takes containers", img.Name, img.Kind)
		}
		if _, found := c.defined[img.Name]; !found {
			return verify.Refuse(verify.CodeConfig, "write a slot: the release has the service %s, which the configuration does not know", img.Name)
		}
	}
	return nil
}

// extra is an estimate: what the engine makes of an archive, packed and unpacked, beside the spooled file.
func (c *containerCells) extra(images []verify.Image) (n int64) {
	for _, img := range images {
		n += 2 * img.Content.Size
	}
	return n
}

func (c *containerCells) room(SlotName) (free, held int64, err error) {
	if free, err = freeBytes(c.cfg.Dir); err != nil {
		return 0, 0, verify.Refuse(verify.CodeSlot, "look for free space: %w", err)
	}
	return free, 0, nil
}

// clear removes the references of the slot, and with them images that neither slot uses. Containers of the slot do not
// run when it may be written; what is left of them would hold the images.
func (c *containerCells) clear(ctx context.Context, slot SlotName, keep []verify.Image) error {
	names := imageNames(keep)
	what := "clear slot " + string(slot)
	have, err := c.engine.images(ctx)
	if err != nil {
		return engineError(ctx, err, what)
	}
	there, err := c.engine.containers(ctx)
	if err != nil {
		return engineError(ctx, err, what)
	}
	pins, err := c.pins(slot)
	readable := err == nil // else it is written anew
	for _, name := range slices.Sorted(maps.Keys(there)) {
		if strings.HasSuffix(name, "-"+string(slot)) {
			if err := c.engine.remove(ctx, name); err != nil {
				return engineError(ctx, err, what)
			}
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(have)) {
		service, tag, _ := strings.Cut(strings.TrimPrefix(ref, imagePrefix), ":")
		if tag == string(slot) && !names[service] {
			if err := c.engine.untag(ctx, ref); err != nil {
				return engineError(ctx, err, what)
			}
		}
	}
	kept := make(map[string]pin)
	for service, p := range pins {
		if names[service] {
			kept[service] = p
		}
	}
	if readable && len(kept) == len(pins) {
		return nil
	}
	return c.savePins(slot, kept)
}

// put spools the archive to a file without a name, so that a cut leaves nothing, and nobody else can write to what the
// engine is about to be given.
func (c *containerCells) put(ctx context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error {
	what := "load image " + img.Name + " into slot " + string(slot)
	spool, err := os.CreateTemp(c.cfg.Dir, ".spool-*")
	if err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	defer spool.Close()
	if err := os.Remove(spool.Name()); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	if err := c.cfg.step("spool.fill", func() error { return fill(spool) }); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return mediumError(err, what, 0)
	}
	archive, err := openArchive(spool, spool)
	if err != nil {
		return verify.Refuse(verify.CodeInstaller, "%s: %w", what, err)
	}
	clean, err := archive.stream(slotRef(img.Name, slot))
	if err != nil {
		return mediumError(err, what, 0)
	}
	if err := c.cfg.step("engine.load", func() error { return c.engine.load(ctx, clean) }); err != nil {
		return c.refused(ctx, err, what)
	}
	pins, err := c.pins(slot)
	if err != nil {
		return mediumError(err, what, 0)
	}
	if pins == nil {
		pins = make(map[string]pin)
	}
	pins[img.Name] = pin{ID: c.engine.id(archive), Archive: img.Content.SHA256}
	return c.savePins(slot, pins)
}

// check compares what the engine says it has with what the verified archive said. The engine compared every layer with its
// digest while it unpacked it; its files are not read again here.
func (c *containerCells) check(ctx context.Context, slot SlotName, img verify.Image, _ func()) error {
	pins, err := c.pins(slot)
	if err != nil {
		return mediumError(err, "read image "+img.Name+" back", 0)
	}
	have, err := c.engine.images(ctx)
	if err != nil {
		return engineError(ctx, err, "read image "+img.Name+" back")
	}
	p := pins[img.Name]
	if p.Archive != img.Content.SHA256 || p.ID.IsZero() || have[slotRef(img.Name, slot)] != p.ID {
		return verify.Refuse(verify.CodeSlot, "the engine has another image for service %s in slot %s than was loaded", img.Name, slot)
	}
	return nil
}

// refused tells an engine that does not want an image (E-INSTALLER, a verdict that the lifecycle counts) from one that is
// not there, has no room, or whose tool was killed.
func (c *containerCells) refused(ctx context.Context, err error, what string) error {
	accident := engineError(ctx, err, what)
	if verify.CodeOf(accident) != verify.CodeSlot || killed(err) || c.engine.ready(ctx) != nil {
		return accident
	}
	return verify.Refuse(verify.CodeInstaller, "%s: %w", what, err)
}

// engineError gives a code to what an engine said. That its disk is full it says in words only.
func engineError(ctx context.Context, err error, what string) error {
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
		err = errors.Join(err, syscall.ENOSPC)
	}
	return mediumError(err, what, 0)
}

// prepare also removes what a cut left in the slots.
func (c *containerCells) prepare() error {
	if err := c.folder.prepare(); err != nil {
		return err
	}
	for _, slot := range []SlotName{SlotA, SlotB} {
		if err := durable.Sweep(c.path(slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return verify.Refuse(verify.CodeSlot, "%w", err)
		}
	}
	return nil
}
