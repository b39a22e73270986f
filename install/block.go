package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// BlockConfig says how Block works.
type BlockConfig struct {
	// A and B are the slots: partitions, best by /dev/disk/by-partlabel, or files of a fixed size.
	A, B string
	// State is the folder of the records, on neither slot. It is made when it is not there. One Block at a time may use it.
	State string
	// Loader is the bootloader that chooses between the slots.
	Loader Loader
	// FactoryVersion is the version of the slot that runs before the first release.
	FactoryVersion string
	// Starts of a trial before the old slot is taken again, 1 to 100; 1 when zero.
	Starts int
	// Restart is the command and its arguments that restarts the machine; it runs without a shell, with MESHUPD_SLOT,
	// MESHUPD_VERSION and MESHUPD_REBOOT_ARG set (the argument of reboot(2) that the bootloader needs, mostly empty). Nil: systemctl reboot.
	Restart []string
	// RestartTimeout is how long the machine may take to end; 5 minutes when zero.
	RestartTimeout time.Duration
	// Discard tells the medium that what lies behind the image is unused (BLKDISCARD), where it takes that.
	Discard bool
	// Booted tells which slot runs; when nil RunningSlot does.
	Booted func() (SlotName, error)
	// BootID tells one start of the machine from another; the kernel's random boot id when nil.
	BootID func() (string, error)
	// Wrote, if not nil, is told after each image how many bytes went to the medium and how many were already there.
	Wrote func(slot SlotName, written, same int64)

	// step runs each durable step and the restart by its name; a test makes them fail or cuts the power there.
	step func(name string, do func() error) error
	// reboot takes the place of the restart command in a test.
	reboot func(ctx context.Context, slot SlotName, arg string) error
	// system is where the running system is looked at.
	system system
}

// withDefaults checks the configuration. Errors are E-CONFIG.
func (c BlockConfig) withDefaults() (BlockConfig, error) {
	if c.Starts == 0 {
		c.Starts = 1
	}
	if c.RestartTimeout == 0 {
		c.RestartTimeout = 5 * time.Minute
	}
	if c.BootID == nil {
		c.BootID = kernelBootID
	}
	if c.step == nil {
		c.step = func(_ string, do func() error) error { return do() }
	}
	c.system = c.system.withDefaults()
	if c.Booted == nil {
		a, b, sys := c.A, c.B, c.system
		c.Booted = func() (SlotName, error) { return sys.runningSlot(a, b) }
	}
	switch {
	case c.A == "" || c.B == "":
		return c, verify.Refuse(verify.CodeConfig, "the block back end needs two slots")
	case c.State == "":
		return c, verify.Refuse(verify.CodeConfig, "the block back end has no folder for its records")
	case c.Loader == nil:
		return c, verify.Refuse(verify.CodeConfig, "the block back end has no bootloader")
	case c.Starts < 1 || c.Starts > maxStarts:
		return c, verify.Refuse(verify.CodeConfig, "a trial of %d starts: not 1 to %d", c.Starts, maxStarts)
	case c.RestartTimeout < 0:
		return c, verify.Refuse(verify.CodeConfig, "the restart timeout is negative")
	case c.Restart != nil && (len(c.Restart) == 0 || c.Restart[0] == ""):
		return c, verify.Refuse(verify.CodeConfig, "the restart command is empty")
	}
	return c, nil
}

// Block is the back end of a machine that boots from one of two partitions. A release is one image, raw or zstd, that is
// written to the partition as it is. Only what differs is written, and all of it is read back from the medium.
//
// State, the records slot.a.json and slot.b.json and the note of the boot state, lie in a folder that both slots see.
//
// All methods are safe for concurrent use by one process.
type Block struct {
	*pair
	blocks *blockCells // the pair's
}

// OpenBlock opens the slots. On a device without records the slot that runs counts as the factory's, whole, and becomes
// the bootloader's default. Call Start before anything else. Errors are E-CONFIG, E-SLOT and E-BOOT.
func OpenBlock(ctx context.Context, cfg BlockConfig) (*Block, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(cfg.State, 0o755); err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "%w", err)
	}
	if err := durable.Sweep(cfg.State); err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "%w", err)
	}
	if err := cfg.system.checkApart(cfg.A, cfg.B, cfg.State); err != nil {
		return nil, err
	}
	records := &folder{cfg: FilesConfig{Dir: cfg.State, step: cfg.step}}
	cells := &blockCells{cfg: cfg, paths: map[SlotName]string{SlotA: cfg.A, SlotB: cfg.B}}
	boot, err := openLoader(ctx, cfg, records)
	if err != nil {
		return nil, err
	}
	return &Block{blocks: cells, pair: &pair{boot: boot, power: boot, records: records, cells: cells, starts: cfg.Starts}}, nil
}

// openLoader opens the bootloader and begins its note. The configuration has its defaults.
func openLoader(ctx context.Context, cfg BlockConfig, records recordStore) (*loader, error) {
	m, err := cfg.Loader.open(loaderEnv{bootID: cfg.BootID, step: cfg.step})
	if err != nil {
		return nil, err
	}
	l := &loader{
		medium: m, keep: &noteFile{cfg.State, cfg.step}, booted: cfg.Booted, bootID: cfg.BootID,
		whole: func(slot SlotName) error { return whole(records, slot) },
		run: func(ctx context.Context, slot SlotName, arg string) error {
			content, _, err := records.loadRecord(slot)
			if err != nil {
				return err
			}
			err = cfg.step("restart", func() error { return cfg.restart(ctx, slot, content.Version, arg) })
			return coded(verify.CodeRestart, "restart to slot "+string(slot), err)
		},
	}
	return l, l.begin(ctx, records, cfg.FactoryVersion)
}

// restart runs the command and waits for the end of the machine.
func (c BlockConfig) restart(ctx context.Context, slot SlotName, version, arg string) error {
	if c.reboot != nil {
		return c.reboot(ctx, slot, arg)
	}
	argv := c.Restart
	if argv == nil {
		argv = []string{"systemctl", "reboot"}
		if arg != "" {
			argv = append(argv, "--reboot-argument="+arg)
		}
	}
	cmd := command{argv: argv, env: append(slotEnv(slot, version), "MESHUPD_REBOOT_ARG="+arg), timeout: c.RestartTimeout}
	if err := cmd.run(ctx); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(c.RestartTimeout):
		return fmt.Errorf("the machine still runs after %s", c.RestartTimeout)
	}
}

// blockCells are two devices.
type blockCells struct {
	cfg   BlockConfig
	paths map[SlotName]string

	costMu        sync.Mutex // guards what the last write cost
	written, same int64
}

var _ cells = (*blockCells)(nil)

func (b *blockCells) fits(images []verify.Image) error {
	if len(images) != 1 {
		return verify.Refuse(verify.CodeFormat, "write a slot: %d images for a slot that is one device", len(images))
	}
	return noContainer(images)
}

// room also refuses with E-SLOT a device that must not be written, before anything has been changed.
func (b *blockCells) room(slot SlotName) (free, held int64, err error) {
	f, size, err := b.openIdle(slot)
	if err != nil {
		return 0, 0, err
	}
	f.Close()
	if free, err = freeBytes(b.cfg.State); err != nil {
		return 0, 0, verify.Refuse(verify.CodeSlot, "look for free space: %w", err)
	}
	if free < recordSpace {
		return 0, 0, &verify.Refusal{Code: verify.CodeSpace, NeedBytes: recordSpace - free,
			Detail: "write slot " + string(slot) + ": the folder of the records has too little free space"}
	}
	return (size+blockSize-1)/blockSize*blockSize + recordSpace, 0, nil
}

// openIdle opens a device for writing that nobody else uses. Errors are E-SLOT.
func (b *blockCells) openIdle(slot SlotName) (*os.File, int64, error) {
	path := b.paths[slot]
	if err := b.cfg.system.checkIdle(path); err != nil {
		return nil, 0, verify.Refuse(verify.CodeSlot, "write slot %s: %w", slot, err)
	}
	// O_EXCL on a block device: the kernel refuses one that is mounted, swapped to or held by another driver.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_EXCL|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, verify.Refuse(verify.CodeSlot, "write slot %s: %w", slot, err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil && size == 0 {
		err = errors.New("its size is 0")
	}
	if err != nil {
		f.Close()
		return nil, 0, verify.Refuse(verify.CodeSlot, "look for the size of slot %s: %w", slot, err)
	}
	return f, size, nil
}

// clear leaves the old bytes: those that the new image has too need not be written again, and the slot cannot be booted.
func (b *blockCells) clear(context.Context, SlotName, []verify.Image) error { return nil }

func (b *blockCells) put(_ context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error {
	what := "write image " + img.Name + " to slot " + string(slot)
	f, size, err := b.openIdle(slot)
	if err != nil {
		return err
	}
	defer f.Close()
	w := newBlockWriter(f, size)
	defer w.stop() // before f is closed
	if err := b.cfg.step("image.fill", func() error { return fill(w) }); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	err = b.cfg.step("image.commit", func() error {
		if err := w.finish(); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if b.cfg.Discard {
			return discard(f, w.at, size)
		}
		return nil
	})
	if err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	b.tell(slot, w.written, w.same)
	return nil
}

// tell notes what a write cost.
func (b *blockCells) tell(slot SlotName, written, same int64) {
	b.costMu.Lock()
	b.written, b.same = written, same
	b.costMu.Unlock()
	if b.cfg.Wrote != nil {
		b.cfg.Wrote(slot, written, same)
	}
}

// Wrote says how many bytes of the last image went to the medium, and how many were there already.
func (b *Block) Wrote() (written, same int64) {
	b.blocks.costMu.Lock()
	defer b.blocks.costMu.Unlock()
	return b.blocks.written, b.blocks.same
}

func (b *blockCells) check(ctx context.Context, slot SlotName, img verify.Image, further func()) error {
	var r *slotReader
	err := b.cfg.step("image.open", func() (err error) {
		r, err = openSlotReader(b.paths[slot], img.Content.Size)
		return err
	})
	if err != nil {
		if r != nil {
			r.Close()
		}
		return mediumError(err, "read image "+img.Name+" back", 0)
	}
	return readBack(ctx, r, slot, img, further)
}
