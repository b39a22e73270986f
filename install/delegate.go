package install

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Installer is another program that writes the slots of this device: RAUC, Program (SWUpdate, Mender) or Executable.
type Installer interface {
	// attach finds the installer. Errors are E-CONFIG, and E-BOOT when it does not answer.
	attach(ctx context.Context, env delegateEnv) (delegated, error)
}

// delegateEnv is what an installer is given by its device.
type delegateEnv struct {
	loaderEnv
	dir     string  // of the records
	records *folder // of the slots
}

// delegated is an installer that was found.
type delegated struct {
	courier courier
	// medium is the installer's own word on the next start; nil: the configuration names a bootloader.
	medium medium
	// records, when not nil, stand in front of the folder's: an installer that keeps a status of its slots is asked.
	records recordStore
	// around, when not nil, runs what the installer has to be told beside the bootloader.
	around func(Bootloader) Bootloader
}

// courier hands a verified image to an installer. It runs each durable step through the step of its environment.
type courier interface {
	// deliver returns nil when the installer said that the slot is written, durably. tell is told percent. E-INSTALLER is its
	// refusal, with its reason; E-SLOT that it ended in the middle.
	deliver(ctx context.Context, slot SlotName, p parcel, tell func(percent int)) error
	// check refuses with E-SLOT unless the slot holds the image, as far as the installer can tell.
	check(ctx context.Context, slot SlotName, img verify.Image) error
}

// DelegateConfig says how a Delegate works.
type DelegateConfig struct {
	// BlockConfig says the rest. A and B are only looked at to tell which slot runs, and Loader only where the installer
	// does not bring its own; both may be empty where the installer knows.
	BlockConfig
	// Installer writes the slots.
	Installer Installer
}

// Delegate is the back end of a device whose slots another installer writes. It gets a release of one image, such as a RAUC
// bundle, in a file that has no name and that only root can read: what was verified is what is handed over.
//
// What the installer does beyond writing is taken back. A slot that it armed by itself is disarmed, so that arming stays a
// step of its own; a trial of a slot that no record and no status of the installer vouches for is given up.
//
// All methods are safe for concurrent use by one process.
type Delegate struct {
	*pair
	cells *delegateCells
	one   sync.Mutex // held by the one Write under way
}

// OpenDelegate finds the installer and opens the records. On a device without records the slot that runs counts as the
// factory's, whole, and becomes the default. Call Start before anything else. Errors are E-CONFIG, E-SLOT, E-BOOT.
func OpenDelegate(ctx context.Context, cfg DelegateConfig) (*Delegate, error) {
	if cfg.Installer == nil {
		return nil, verify.Refuse(verify.CodeConfig, "the delegate has no installer")
	}
	bc, known := cfg.BlockConfig, cfg.A != "" && cfg.B != ""
	if !known {
		bc.A, bc.B = "a", "b"
		if bc.Booted == nil {
			bc.Booted = func() (SlotName, error) {
				return "", verify.Refuse(verify.CodeConfig, "nothing tells which slot runs: name the partitions of both slots")
			}
		}
	}
	brings := bc.Loader == nil
	if brings {
		bc.Loader = opened{} // stands in until the installer is found
	}
	bc, err := bc.withDefaults()
	if err != nil {
		return nil, err
	}
	spool := filepath.Join(bc.State, "spool")
	if err := errors.Join(durable.MkdirAll(bc.State, 0o755), durable.MkdirAll(spool, 0o700)); err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "%w", err)
	}
	if err := durable.Sweep(bc.State); err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "%w", err)
	}
	keep := &folder{cfg: FilesConfig{Dir: bc.State, step: bc.step}}
	env := delegateEnv{loaderEnv{bootID: bc.BootID, step: bc.step}, bc.State, keep}
	found, err := cfg.Installer.attach(ctx, env)
	if err != nil {
		return nil, err
	}
	if found.medium != nil {
		bc.Loader = opened{found.medium}
	} else if brings {
		return nil, verify.Refuse(verify.CodeConfig, "this installer does not choose the slot: a bootloader has to be named")
	}
	var records recordStore = keep
	if found.records != nil {
		records = found.records
	}
	power, err := openLoader(ctx, bc, records)
	if err != nil {
		return nil, err
	}
	var boot Bootloader = power
	if found.around != nil {
		boot = found.around(power)
	}
	cells := &delegateCells{courier: found.courier, spool: spool, step: bc.step, disarm: func(ctx context.Context) error { return disarm(ctx, power) }}
	return &Delegate{pair: &pair{boot: boot, power: power, records: records, cells: cells, starts: bc.Starts}, cells: cells}, nil
}

// opened is a Loader that was opened elsewhere.
type opened struct{ m medium }

func (o opened) open(loaderEnv) (medium, error) { return o.m, nil }

func (o opened) places() []string { return nil }

// Start implements the first call of a daemon, and gives up what was started or armed without a whole record.
func (d *Delegate) Start(ctx context.Context) error {
	if err := d.pair.Start(ctx); err != nil {
		return err
	}
	st, err := d.boot.Boot(ctx)
	if err != nil || st.Phase == PhaseSettled {
		return err
	}
	err = whole(d.records, st.Trial)
	if err == nil || verify.CodeOf(err) != verify.CodeBoot {
		return err
	}
	if st.Phase == PhaseArmed {
		return disarm(ctx, d.boot)
	}
	// A cut in the middle of an installation that the installer had already armed. That is nobody's failure, so none is noted.
	if err := d.boot.Fallback(ctx); err != nil {
		return err
	}
	return d.boot.Confirm(ctx)
}

// disarm takes an armed trial back.
func disarm(ctx context.Context, boot Bootloader) error {
	st, err := boot.Boot(ctx)
	if err != nil || st.Phase != PhaseArmed {
		return err
	}
	return boot.Try(ctx, st.Default, 1)
}

// Write implements Slots. The first quarter of the progress is the check of the bytes, the rest is the installer's word.
func (d *Delegate) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open Source, progress func(done, total int64)) error {
	if !d.one.TryLock() {
		return verify.Refuse(verify.CodeBusy, "write a slot: another write is under way")
	}
	defer d.one.Unlock()
	if c, ok := d.cells.courier.(interface{ ended() }); ok {
		defer c.ended()
	}
	total, err := checkImages(rel, images)
	if err != nil {
		return err
	}
	tell := func(int64, int64) {}
	if progress != nil {
		tell = progress
	}
	most := int64(0) // an installer may tell less than before, and tells nothing of importance by it
	d.cells.job = job{
		content: Content{Release: rel.ID(), Version: rel.Manifest().Version, Whole: true},
		tell: func(percent int) {
			most = max(most, total/4+(total-total/4)/100*int64(percent))
			if percent == 100 {
				most = total
			}
			tell(most, total)
		},
	}
	return d.pair.Write(ctx, rel, images, open, func(done, _ int64) {
		most = max(most, done/4)
		tell(most, total)
	})
}

// installerError gives a code to what a program said: its own exit is a refusal, its death is not.
func installerError(ctx context.Context, what string, err error) error {
	if err == nil || verify.CodeOf(err) != "" {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit interface{ Exited() bool }
	if errors.As(err, &exit) && exit.Exited() {
		return verify.Refuse(verify.CodeInstaller, "%s: %w", what, err)
	}
	return verify.Refuse(verify.CodeSlot, "%s: %w", what, err)
}

// installTimeout is how long an installer may take for one image.
const installTimeout = time.Hour
