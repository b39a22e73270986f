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
