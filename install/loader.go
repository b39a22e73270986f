package install

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Loader places a bootloader: GRUB, UBoot, SystemdBoot, Tryboot, EFI or Custom.
type Loader interface {
	// open returns what the bootloader reads. Errors are E-CONFIG.
	open(env loaderEnv) (medium, error)
	// places are the files or folders that it reads and that are written here.
	places() []string
}

// loaderEnv is what a medium is given by its device.
type loaderEnv struct {
	bootID func() (string, error)
	step   func(name string, do func() error) error // runs each durable step
}

// medium is the place where a bootloader looks at power-on, in the words that all bootloaders share. Errors are E-BOOT.
type medium interface {
	// read observes what the next start would do.
	read(ctx context.Context) (choice, error)
	// write makes a choice durable and reads it back. It touches nothing when the medium already says exactly that, and
	// clears what the bootloader itself has noted about earlier starts. A fault leaves the old choice or the new one.
	write(ctx context.Context, c choice) error
	// most is how many starts of a trial the bootloader counts by itself, at least one.
	most() int
}

// asker is a medium whose bootloader takes a trial only when the restart asks for it.
type asker interface {
	// ask notes durably that the restart asks, and returns the argument of reboot(2) that does.
	ask(ctx context.Context) (arg string, err error)
}

// loader is the Bootloader of a machine with a real one. The medium says what the next start does and is believed
// first; the note beside the slot records adds what no medium can hold. What runs is told by the running system.
//
//	Try        medium: trial armed -> note: trial, starts to add
//	Try(old)   note: none -> medium: disarmed
//	power-on   the bootloader counts; start() arms again while there are starts to add, and takes note of a fallback
//	Confirm    medium: the trial is the default, the old slot cannot be booted -> note: none
//	Fallback   medium: the trial cannot be booted -> note: failed
//
// When settled the other slot cannot be booted at all, so it can be overwritten at any time without a step before.
type loader struct {
	medium medium
	keep   *noteFile
	booted func() (SlotName, error)
	bootID func() (string, error)
	whole  func(SlotName) error // E-BOOT unless the slot may be booted
	run    func(ctx context.Context, slot SlotName, arg string) error

	mu     sync.Mutex // owns medium and note
	taking bool       // a restart command is running
}

var (
	_ Bootloader = (*loader)(nil)
	_ starter    = (*loader)(nil)
)

// look observes everything that a decision needs.
func (l *loader) look(ctx context.Context) (view, error) {
	c, err := l.medium.read(ctx)
	if err != nil {
		return view{}, coded(verify.CodeBoot, "read the boot state", err)
	}
	v := view{choice: c, booted: c.Booted}
	if v.booted == "" {
		if v.booted, err = l.booted(); err != nil {
			return view{}, err
		}
	}
	if v.id, err = l.bootID(); err != nil {
		return view{}, err
	}
	v.note, _, err = l.keep.load()
	return v, err
}

func (l *loader) save(ctx context.Context, c choice) error {
	c.Booted = ""
	return coded(verify.CodeBoot, "change the boot state", l.medium.write(ctx, c))
}

func (l *loader) Boot(ctx context.Context) (BootState, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.look(ctx)
	if err != nil {
		return BootState{}, err
	}
	return v.state(), nil
}

func (l *loader) Try(ctx context.Context, slot SlotName, starts int) error {
	if !slot.valid() {
		return verify.Refuse(verify.CodeBoot, "try slot %.8q: there is no such slot", string(slot))
	}
	if starts < 1 || starts > maxStarts {
		return verify.Refuse(verify.CodeBoot, "try slot %s for %d starts: not 1 to %d", slot, starts, maxStarts)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.look(ctx)
	if err != nil {
		return err
	}
	st := v.state()
	switch {
	case st.Phase == PhaseTrial:
		return verify.Refuse(verify.CodeBusy, "try slot %s: slot %s is on trial", slot, st.Trial)
	case slot != st.Booted && slot != st.Default:
		counted := min(starts, l.medium.most())
		if err := l.save(ctx, choice{Default: st.Default, Trial: slot, Left: counted}); err != nil {
			return err
		}
		return l.keep.save(bootNote{Trial: slot, More: starts - counted, Starts: starts, Armed: time.Now().Unix(), BootID: v.id})
	case st.Phase == PhaseArmed:
		// The note first: a note of a trial that the medium does not know is a trial that failed.
		if err := l.keep.save(bootNote{BootID: v.id}); err != nil {
			return err
		}
		return l.save(ctx, choice{Default: st.Default})
	}
	return nil
}

func (l *loader) Confirm(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.look(ctx)
	if err != nil {
		return err
	}
	switch st := v.state(); st.Phase {
	case PhaseArmed:
		return verify.Refuse(verify.CodeBoot, "confirm slot %s: it was not started yet", st.Trial)
	case PhaseTrial:
		if err := l.save(ctx, choice{Default: st.Trial}); err != nil {
			return err
		}
		return l.keep.save(bootNote{BootID: v.id})
	default:
		if st.Failed == "" {
			return nil
		}
		// A trial that is used up would else be found on the medium again.
		if err := l.save(ctx, choice{Default: st.Default}); err != nil {
			return err
		}
		return l.keep.save(bootNote{Over: v.over(), BootID: v.id})
	}
}

func (l *loader) Fallback(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.look(ctx)
	if err != nil {
		return err
	}
	if v.state().Phase == PhaseSettled {
		return verify.Refuse(verify.CodeBoot, "fall back: no slot is on trial")
	}
	return l.fallBack(ctx, v)
}

func (l *loader) fallBack(ctx context.Context, v view) error {
	st := v.state()
	if err := l.save(ctx, choice{Default: st.Default}); err != nil {
		return err
	}
	return l.keep.save(bootNote{Failed: st.Trial, Over: v.over(), BootID: v.id})
}

// start does after a power-on what the bootloader has left to do.
func (l *loader) start(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, err := l.look(ctx)
	if err != nil {
		return err
	}
	note, next, write := v.resume()
	if note.Why != v.note.Why && note.Why != "" {
		note.Why = withLastWords(note.Why, pstoreFolders, time.Unix(v.note.Armed, 0))
	}
	if note != v.note {
		if err := l.keep.save(note); err != nil {
			return err
		}
	}
	if !write {
		return nil
	}
	return l.save(ctx, next)
}

func (l *loader) restart(ctx context.Context) error {
	slot, arg, err := l.take(ctx)
	if err != nil {
		return err
	}
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.taking = false
	}()
	return l.run(ctx, slot, arg)
}

// take decides which slot the restart will start, and with which argument.
func (l *loader) take(ctx context.Context) (slot SlotName, arg string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.taking {
		return "", "", verify.Refuse(verify.CodeBusy, "restart: the restart command is already running")
	}
	v, err := l.look(ctx)
	if err != nil {
		return "", "", err
	}
	if v.Trial != "" && v.Left > 0 && l.whole(v.Trial) != nil {
		// The slot lost its record since it was armed.
		if err := l.fallBack(ctx, v); err != nil {
			return "", "", err
		}
		v.choice = choice{Default: v.Default}
	}
	if slot = v.next(); slot == v.Trial {
		if a, ok := l.medium.(asker); ok {
			if arg, err = a.ask(ctx); err != nil {
				return "", "", coded(verify.CodeBoot, "ask for a trial", err)
			}
		}
	}
	l.taking = true
	return slot, arg, nil
}

// begin makes the slot that runs the default of a device that has no note yet: record and medium first, the note last.
func (l *loader) begin(ctx context.Context, records recordStore, factoryVersion string) error {
	_, found, err := l.keep.load()
	if err != nil || found {
		return err
	}
	booted, err := l.booted()
	if err != nil {
		// Only a medium that tells what runs can do without.
		c, rerr := l.medium.read(ctx)
		if rerr != nil || c.Booted == "" {
			return err
		}
		booted = c.Booted
	}
	if _, found, err = records.loadRecord(booted); err != nil {
		return err
	}
	if !found {
		if err := records.saveRecord(booted, Content{Version: factoryVersion, Whole: true}); err != nil {
			return err
		}
	}
	if err := l.save(ctx, choice{Default: booted}); err != nil {
		return err
	}
	return l.keep.save(bootNote{})
}

// noteFile keeps the note of a loader.
type noteFile struct {
	dir  string
	step func(name string, do func() error) error
}

const (
	noteSchema = "meshupd.loader/1"
	maxNote    = 4 << 10
)

func (n *noteFile) path() string { return filepath.Join(n.dir, "loader.json") }

// load returns false when there is no note. One that cannot be believed is an empty one: the medium is believed first,
// and an error here would keep a device from going on.
func (n *noteFile) load() (bootNote, bool, error) {
	data, err := readSmall(n.path(), maxNote)
	if errors.Is(err, fs.ErrNotExist) {
		return bootNote{}, false, nil
	}
	if err != nil {
		return bootNote{}, false, verify.Refuse(verify.CodeBoot, "read the note of the boot state: %w", err)
	}
	note, _ := parseNote(data)
	return note, true, nil
}

func (n *noteFile) save(note bootNote) error {
	data, err := seal(noteSchema, note)
	if err != nil {
		return err
	}
	err = n.step("note.save", func() error { return durable.WriteFile(n.path(), data, 0o644) })
	return coded(verify.CodeBoot, "save the note of the boot state", err)
}
