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

// RAUC is the installer RAUC, spoken to over D-Bus (de.pengutronix.rauc.Installer) and, for what a bundle holds, through the
// command `rauc info`. It also chooses the slot of the next start, whichever bootloader stands behind it:
//
//	State      the booted slot, the primary slot and the boot status, as RAUC tells them
//	Write      InstallBundle
//	Try        Mark("active", the other slot)
//	Confirm    Mark("good", the booted slot)
//	Fallback   Mark("active", the default slot), Mark("bad", the slot on trial)
//
// RAUC does not tell a slot on trial from one that is confirmed. So the confirmed one is noted here (rauc.json), and
// nothing else may mark slots good: rauc-mark-good.service has to be off.
type RAUC struct {
	// A and B are the two root slots by their name ("rootfs.0") or bootname; empty: the two that have a bootname, in
	// the order of their names.
	A, B string
	// Command is the rauc program with its first arguments; "rauc" when empty.
	Command []string
	// Bus is the address of the D-Bus; empty: the system's.
	Bus string
	// Timeout of one installation; an hour when zero.
	Timeout time.Duration

	service raucService // in the place of the real one, in a test
}

// raucService is what is asked of RAUC. Errors without a code are its own words; E-BUSY while it installs.
type raucService interface {
	// slots returns the status of all slots.
	slots(ctx context.Context) ([]raucSlot, error)
	// primary is the name of the slot that the next start boots; "" when RAUC knows of none.
	primary(ctx context.Context) (string, error)
	// mark changes the boot status of a slot: good, bad or active.
	mark(ctx context.Context, state, slot string) error
	// describe tells what a bundle holds. Errors have a code.
	describe(ctx context.Context, path string) (raucBundle, error)
	// install returns when the bundle is installed. Errors have a code.
	install(ctx context.Context, path string, tell func(percent int)) error
}

func (r RAUC) attach(ctx context.Context, env delegateEnv) (delegated, error) {
	if r.service == nil {
		if len(r.Command) == 0 {
			r.Command = []string{"rauc"}
		}
		r.service = &raucBus{address: r.Bus, command: r.Command, timeout: orElse(r.Timeout, installTimeout)}
	}
	m := &rauc{service: r.service, dir: env.dir, step: env.step, folder: env.records}
	slots, err := m.slots(ctx)
	if err != nil {
		return delegated{}, err
	}
	if m.names, err = raucPair(slots, r.A, r.B); err != nil {
		return delegated{}, err
	}
	return delegated{courier: m, medium: m, records: m}, nil
}

// rauc is RAUC as courier, medium and keeper of records.
type rauc struct {
	*folder // of the records
	service raucService
	names   map[SlotName]string
	dir     string
	step    func(name string, do func() error) error

	mu    sync.Mutex // owns:
	fills SlotName   // the slot that a Write of ours fills, or ""
	seen  []raucSlot // while RAUC installs, because it then answers nothing: the status from before it
}

var (
	_ courier     = (*rauc)(nil)
	_ medium      = (*rauc)(nil)
	_ recordStore = (*rauc)(nil)
)

func (r *rauc) slots(ctx context.Context) ([]raucSlot, error) {
	r.mu.Lock()
	seen := r.seen
	r.mu.Unlock()
	if seen != nil {
		return seen, nil
	}
	slots, err := r.service.slots(ctx)
	return slots, coded(verify.CodeBoot, "ask RAUC for its slots", err)
}

// raucNote is what RAUC does not keep.
type raucNote struct {
	Default SlotName `json:"default"`         // the slot that was confirmed last
	Armed   SlotName `json:"armed,omitempty"` // the slot that Try asked for
}

const (
	raucNoteSchema  = "meshupd.rauc/1"
	raucProofSchema = "meshupd.rauc-bundle/1"
	maxRaucProof    = 64 << 10
)

// note returns an empty note where there is none that can be believed: then the slot that runs counts as the default.
func (r *rauc) note() (raucNote, error) {
	data, err := readSmall(filepath.Join(r.dir, "rauc.json"), maxNote)
	if errors.Is(err, fs.ErrNotExist) {
		return raucNote{}, nil
	}
	if err != nil {
		return raucNote{}, verify.Refuse(verify.CodeBoot, "read the note about RAUC's slots: %w", err)
	}
	var n raucNote
	if unseal(data, raucNoteSchema, maxNote, &n) != nil || !n.Default.valid() || n.Armed != "" && n.Armed != n.Default.Other() {
		return raucNote{}, nil
	}
	return n, nil
}

func (r *rauc) saveNote(n raucNote) error {
	data, err := seal(raucNoteSchema, n)
	if err != nil {
		return err
	}
	return r.step("rauc.note", func() error { return durable.WriteFile(filepath.Join(r.dir, "rauc.json"), data, 0o644) })
}

// raucView is what one look at RAUC finds.
type raucView struct {
	note    raucNote
	booted  SlotName
	primary SlotName // "" when no slot of ours is
}

func (r *rauc) look(ctx context.Context) (raucView, error) {
	slots, err := r.slots(ctx)
	if err != nil {
		return raucView{}, err
	}
	var v raucView
	for slot, name := range r.names {
		if s := raucFind(slots, name); s != nil && s.State == "booted" {
			v.booted = slot
		}
	}
	if v.booted == "" {
		return v, verify.Refuse(verify.CodeBoot, "RAUC says that neither %s nor %s is booted", r.names[SlotA], r.names[SlotB])
	}
	if v.note, err = r.note(); err != nil {
		return v, err
	}
	if v.note.Default == "" {
		v.note.Default = v.booted
	}
	r.mu.Lock()
	busy := r.seen != nil
	r.mu.Unlock()
	if busy {
		return v, nil // an installation is not begun on a device that is armed
	}
	primary, err := r.service.primary(ctx)
	if err != nil {
		return v, coded(verify.CodeBoot, "ask RAUC for the primary slot", err)
	}
	for slot, name := range r.names {
		if name == primary {
			v.primary = slot
		}
	}
	return v, nil
}

// read takes a slot for armed only when Try asked for it: with GRUB, RAUC calls the other slot primary whenever the one that runs
// was started and not marked good yet.
func (r *rauc) read(ctx context.Context) (choice, error) {
	v, err := r.look(ctx)
	if err != nil {
		return choice{}, err
	}
	c := choice{Default: v.note.Default, Booted: v.booted}
	if armed := v.note.Armed; armed != "" && v.booted == v.note.Default && v.primary == armed {
		c.Trial, c.Left = armed, 1
	}
	return c, nil
}

// most is one: how many starts a slot gets is the matter of RAUC's bootloader, and counts as one here.
func (r *rauc) most() int { return 1 }

// write makes the marks in an order in which each cut leaves the old choice, the new one, or a trial that goes on.
func (r *rauc) write(ctx context.Context, want choice) error {
	v, err := r.look(ctx)
	if err != nil {
		return err
	}
	next := want.next()
	if next != want.Default {
		if err := r.saveNote(raucNote{Default: want.Default, Armed: next}); err != nil {
			return err
		}
		if err := r.mark(ctx, "active", next); err != nil {
			return err
		}
		return r.primaryIs(ctx, next)
	}
	if v.booted == want.Default {
		// Each time: bootloaders count the starts of the default slot too.
		if err := r.mark(ctx, "good", v.booted); err != nil {
			return err
		}
	}
	if now, err := r.look(ctx); err != nil {
		return err
	} else if now.primary != want.Default {
		if err := r.mark(ctx, "active", want.Default); err != nil {
			return err
		}
	}
	if other := want.Default.Other(); v.booted == other || v.primary == other {
		if err := r.mark(ctx, "bad", other); err != nil {
			return err
		}
	}
	if err := r.primaryIs(ctx, want.Default); err != nil {
		return err
	}
	if v.note == (raucNote{Default: want.Default}) {
		if on, err := r.note(); err != nil || on == v.note {
			return err
		}
	}
	return r.saveNote(raucNote{Default: want.Default})
}

func (r *rauc) mark(ctx context.Context, state string, slot SlotName) error {
	err := r.step("rauc.mark", func() error { return r.service.mark(ctx, state, r.names[slot]) })
	return coded(verify.CodeBoot, "let RAUC mark "+r.names[slot]+" "+state, err)
}

func (r *rauc) primaryIs(ctx context.Context, slot SlotName) error {
	v, err := r.look(ctx)
	if err == nil && v.primary != slot {
		err = verify.Refuse(verify.CodeBoot, "RAUC was told to boot %s next, and says that it boots %q", r.names[slot], r.names[v.primary])
	}
	return err
}

// raucProof says what a slot holds when RAUC's status of it agrees.
type raucProof struct {
	Content Content    `json:"content"`
	Bundle  raucBundle `json:"bundle"`
}

func (r *rauc) proofPath(slot SlotName) string {
	return filepath.Join(r.dir, "bundle."+string(slot)+".json")
}

// proof returns false when there is none that can be believed.
func (r *rauc) proof(slot SlotName) (raucProof, bool, error) {
	data, err := readSmall(r.proofPath(slot), maxRaucProof)
	if errors.Is(err, fs.ErrNotExist) {
		return raucProof{}, false, nil
	}
	if err != nil {
		return raucProof{}, false, verify.Refuse(verify.CodeSlot, "read what was installed in slot %s: %w", slot, err)
	}
	p, err := parseRaucProof(data)
	return p, err == nil, nil
}

func parseRaucProof(data []byte) (raucProof, error) {
	var p raucProof
	if err := unseal(data, raucProofSchema, maxRaucProof, &p); err != nil {
		return raucProof{}, err
	}
	if len(p.Content.Version) > maxVersion || len(p.Bundle.Images) == 0 {
		return raucProof{}, verify.Refuse(verify.CodeFormat, "read what was installed: a field is out of range")
	}
	return p, nil
}

// deliver notes what is about to be installed, and then has it installed. Should the record of the slot never be written,
// note and status together still prove what the slot holds.
func (r *rauc) deliver(ctx context.Context, slot SlotName, p parcel, tell func(int)) error {
	slots, err := r.slots(ctx)
	if err != nil {
		return err
	}
	r.answersNothing(slots)
	defer r.answersNothing(nil)
	bundle, err := r.service.describe(ctx, p.path)
	if err != nil {
		return err
	}
	data, err := seal(raucProofSchema, raucProof{Content: p.content, Bundle: bundle})
	if err != nil {
		return err
	}
	if err := r.step("proof.save", func() error { return durable.WriteFile(r.proofPath(slot), data, 0o644) }); err != nil {
		return mediumError(err, "note what is installed in slot "+string(slot), recordSpace)
	}
	err = r.step("image.commit", func() error { return r.service.install(ctx, p.path, tell) })
	r.answersNothing(nil)
	if err != nil {
		return coded(verify.CodeSlot, "install the bundle with RAUC", err)
	}
	// Unless activate-installed is false, RAUC has armed the slot: arming is a step of its own here.
	c, err := r.read(ctx)
	if err != nil {
		return err
	}
	return r.write(ctx, choice{Default: c.Default})
}

func (r *rauc) answersNothing(seen []raucSlot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = seen
}

func (r *rauc) fill(slot SlotName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fills = slot
}

// ended is told that a Write of ours ended, however it did.
func (r *rauc) ended() { r.fill("") }

func (r *rauc) filled() SlotName {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fills
}

// check compares RAUC's status of the slot, with the digests that it took while it wrote, with what the bundle holds.
func (r *rauc) check(ctx context.Context, slot SlotName, _ verify.Image) error {
	p, found, err := r.proof(slot)
	if err != nil {
		return err
	}
	slots, err := r.slots(ctx)
	if err != nil {
		return err
	}
	if !found || !raucHolds(slots, r.names[slot], p.Bundle) {
		return verify.Refuse(verify.CodeSlot,
			"RAUC does not say that %s holds the bundle (its system.conf needs a statusfile or data-directory)", r.names[slot])
	}
	return nil
}

// loadRecord believes RAUC's status more than the record.
//
//	record    bundle noted   RAUC's status of the slot   the slot holds
//	none      none           any                         nothing that is known
//	none      X              as X                        X: a cut before the record was written
//	none      X              another                     nothing that may be booted
//	whole     none           any                         what the record says (the factory's)
//	whole     X              as X                        X
//	whole     X              ok, another                 what somebody else installed with RAUC, by RAUC's version
//	whole     X              not ok                      nothing that may be booted
//	any, while a Write of ours fills the slot            nothing that is known
func (r *rauc) loadRecord(slot SlotName) (Content, bool, error) {
	c, found, err := r.folder.loadRecord(slot)
	if err != nil || r.filled() == slot {
		return Content{}, false, err
	}
	p, noted, err := r.proof(slot)
	if err != nil || !noted {
		return c, found, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), raucCallTimeout)
	defer cancel()
	slots, err := r.slots(ctx)
	if err != nil {
		return Content{}, false, err
	}
	switch s := raucFind(slots, r.names[slot]); {
	case raucHolds(slots, r.names[slot], p.Bundle):
		return p.Content, true, nil
	case found && c.Whole && s != nil && s.Status == "ok":
		return Content{Version: s.Version, Whole: true}, true, nil
	}
	return Content{}, found, nil
}

// removeRecord removes the note of the bundle first: without it nothing can be proven any more.
func (r *rauc) removeRecord(slot SlotName) error {
	r.fill(slot)
	err := r.step("proof.remove", func() error { return durable.Remove(r.proofPath(slot)) })
	if err != nil {
		return mediumError(err, "forget what was installed in slot "+string(slot), recordSpace)
	}
	return r.folder.removeRecord(slot)
}

func (r *rauc) saveRecord(slot SlotName, c Content) error {
	if err := r.folder.saveRecord(slot, c); err != nil {
		return err
	}
	r.fill("")
	return nil
}
