package install

import "context"

// WithStep puts faults into the durable steps of Files.
func WithStep(cfg FilesConfig, step func(name string, do func() error) error) FilesConfig {
	cfg.step = step
	return cfg
}

// WithFree makes the free space of Files what a test says.
func WithFree(cfg FilesConfig, free int64) FilesConfig {
	cfg.free = func(string) (int64, error) { return free, nil }
	return cfg
}

// FilePointer is the bootloader of Files alone, with its power-on.
type FilePointer struct {
	Bootloader
	start func(context.Context) error
}

// PowerOn does what a power-on does.
func (p FilePointer) PowerOn(ctx context.Context) error { return p.start(ctx) }

// OpenPointer opens the bootloader of a Files folder, with two whole slots.
func OpenPointer(cfg FilesConfig) (FilePointer, error) {
	f, err := OpenFiles(cfg)
	if err != nil {
		return FilePointer{}, err
	}
	if err := f.records.saveRecord(SlotB, Content{Whole: true}); err != nil {
		return FilePointer{}, err
	}
	return FilePointer{f.boot, f.power.start}, nil
}

// BlockTest puts faults, a simulated restart and a simulated running system into Block.
type BlockTest struct {
	Step   func(name string, do func() error) error
	Reboot func(ctx context.Context, slot SlotName, arg string) error
	System [3]string // in the place of /proc, /sys and /
}

// With returns the configuration with that in it.
func (b BlockTest) With(cfg BlockConfig) BlockConfig {
	cfg.step, cfg.reboot = b.Step, b.Reboot
	cfg.system = system{b.System[0], b.System[1], b.System[2]}
	return cfg
}

// OpenLoader opens the bootloader of a Block alone, with two whole slots.
func OpenLoader(ctx context.Context, cfg BlockConfig) (FilePointer, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return FilePointer{}, err
	}
	records := &folder{cfg: FilesConfig{Dir: cfg.State, step: func(_ string, do func() error) error { return do() }}}
	for _, slot := range []SlotName{SlotA, SlotB} {
		if err := records.saveRecord(slot, Content{Whole: true}); err != nil {
			return FilePointer{}, err
		}
	}
	l, err := openLoader(ctx, cfg, records)
	if err != nil {
		return FilePointer{}, err
	}
	return FilePointer{l, l.start}, nil
}

// Restart runs the restart of a bootloader that OpenLoader opened.
func Restart(ctx context.Context, p FilePointer) error { return p.Bootloader.(*loader).restart(ctx) }

// DropCache drops what the page cache holds of a device.
func DropCache(path string) error {
	f, err := openDropped(path)
	if err != nil {
		return err
	}
	return f.Close()
}

// WithHookStep puts faults into the notes of Hooked.
func WithHookStep(h *Hooked, step func(name string, do func() error) error) *Hooked {
	h.step = step
	return h
}
