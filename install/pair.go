package install

import (
	"context"
	"maps"
	"slices"
	"sync"

	"meshupd/verify"
)

// recordStore keeps the slot records durably.
type recordStore interface {
	// loadRecord returns false when there is no record. A record that cannot be believed is Content{}, true.
	loadRecord(SlotName) (Content, bool, error)
	saveRecord(SlotName, Content) error
	removeRecord(SlotName) error
}

// pair is what all kinds of Slots have in common: two slots with a record each, and a bootloader that chooses between
// them. It keeps the order of steps on which the promises of Slots rest; what a slot is made of is the matter of its cells.
type pair struct {
	boot    Bootloader
	power   starter
	records recordStore
	cells   cells
	starts  int // of a trial
	// ready looks at what a record cannot know, before a slot is armed; nil: there is nothing. E-BOOT when the slot cannot run.
	ready func(context.Context, SlotName) error

	mu      sync.Mutex // orders the steps of the boot state, and owns:
	writing bool       // a Write is under way
	idle    *IdleSlot  // the last that was opened; nil: none
}

var _ Slots = (*pair)(nil)

// State implements Slots. A slot without a record is not in State.Slots.
func (p *pair) State(ctx context.Context) (State, error) {
	b, err := p.boot.Boot(ctx)
	if err != nil {
		return State{}, err
	}
	st := State{Phase: b.Phase, Booted: b.Booted, Default: b.Default, Trial: b.Trial, Left: b.Left, Failed: b.Failed, Why: b.Why,
		Slots: make(map[SlotName]Content, 2)}
	for _, slot := range []SlotName{SlotA, SlotB} {
		c, found, err := p.records.loadRecord(slot)
		if err != nil {
			return State{}, err
		}
		if found {
			st.Slots[slot] = c
		}
	}
	if k, ok := p.cells.(keeper); ok {
		st.Kept = k.kept()
	}
	return st, nil
}

// Write implements Slots. Images that are not of the release, or whose names or number the layout cannot hold, are refused
// with E-FORMAT before anything is changed.
func (p *pair) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open Source, progress func(done, total int64)) error {
	total, err := checkImages(rel, images)
	if err != nil {
		return err
	}
	if err := p.cells.fits(images); err != nil {
		return err
	}
	slot, err := p.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer p.endWrite()
	if err := p.checkSpace(slot, images); err != nil {
		return err
	}
	aside, keeps := p.cells.(keeper)
	if keeps {
		if err := aside.setAside(slot, rel.ID(), p.need(images)); err != nil {
			return err
		}
	}
	if err := p.records.removeRecord(slot); err != nil {
		return err
	}
	if err := p.cells.clear(ctx, slot, nil); err != nil {
		return err
	}
	meter := &meter{total: total, tell: progress}
	for _, img := range images {
		if err := p.cells.put(ctx, slot, img, filling(ctx, img, open, meter)); err != nil {
			return err
		}
		if err := p.cells.check(ctx, slot, img, func() { meter.add(0) }); err != nil {
			return err
		}
	}
	// Whatever appeared in the slot meanwhile was not signed.
	if err := p.cells.clear(ctx, slot, images); err != nil {
		return err
	}
	c := Content{Release: rel.ID(), Version: rel.Manifest().Version, Whole: true}
	if keeps {
		if err := aside.noteImages(slot, c, images); err != nil {
			return err
		}
	}
	return p.records.saveRecord(slot, c)
}

// keeper are cells that keep older versions beside the slots.
type keeper interface {
	// setAside keeps what the slot holds, before anything else is changed, if there is room for it beside what comes instead.
	setAside(slot SlotName, instead verify.Digest, need int64) error
	// noteImages notes what the slot was written with, before its record.
	noteImages(SlotName, Content, []verify.Image) error
	// kept lists what can be gone back to, the newest first.
	kept() []Content
}

// beginWrite picks the slot that may be written and keeps Try away from it.
func (p *pair) beginWrite(ctx context.Context) (SlotName, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing {
		return "", verify.Refuse(verify.CodeBusy, "write a slot: another write is under way")
	}
	b, err := p.boot.Boot(ctx)
	if err != nil {
		return "", err
	}
	if b.Phase != PhaseSettled {
		return "", verify.Refuse(verify.CodeBusy, "write a slot: slot %s is %s", b.Trial, b.Phase)
	}
	if b.Booted != b.Default {
		return "", verify.Refuse(verify.CodeBusy, "write a slot: slot %s runs until the restart to slot %s", b.Booted, b.Default)
	}
	if p.idle != nil { // nobody else writes to it from here on
		if err := p.idle.seal(); err != nil {
			return "", err
		}
	}
	p.writing = true
	return b.Default.Other(), nil
}

func (p *pair) endWrite() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.writing = false
}

// Try implements Slots. It refuses with E-BUSY on trial and during a Write.
func (p *pair) Try(ctx context.Context, slot SlotName) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing {
		return verify.Refuse(verify.CodeBusy, "try slot %s: a slot is being written", slot)
	}
	if err := p.whole(slot); err != nil {
		return err
	}
	if p.ready != nil {
		if err := p.ready(ctx, slot); err != nil {
			return err
		}
	}
	return p.boot.Try(ctx, slot, p.starts)
}

// whole refuses with E-BOOT unless the record says that the slot may be booted.
func (p *pair) whole(slot SlotName) error { return whole(p.records, slot) }

func whole(records recordStore, slot SlotName) error {
	if !slot.valid() {
		return verify.Refuse(verify.CodeBoot, "boot slot %.8q: there is no such slot", string(slot))
	}
	c, found, err := records.loadRecord(slot)
	if err != nil {
		return err
	}
	if !found || !c.Whole {
		return verify.Refuse(verify.CodeBoot, "boot slot %s: it holds no whole release", slot)
	}
	return nil
}

// Restart implements Slots. On trial it is the next start of the trial: with none left the default slot is started.
func (p *pair) Restart(ctx context.Context) error { return p.power.restart(ctx) }

// Start does what a power-on has left to do. The daemon calls it once when it starts, before anything else here.
func (p *pair) Start(ctx context.Context) error { return p.power.start(ctx) }

// Confirm implements Slots.
func (p *pair) Confirm(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := p.boot.Boot(ctx)
	if err != nil {
		return err
	}
	if b.Phase != PhaseTrial {
		return verify.Refuse(verify.CodeBoot, "confirm: no slot is on trial")
	}
	return p.boot.Confirm(ctx)
}

// Fallback implements Slots. An armed trial can be given up too. It refuses with E-BOOT when settled.
func (p *pair) Fallback(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.boot.Fallback(ctx)
}

// Forget implements Slots. Trying another slot forgets too.
func (p *pair) Forget(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	b, err := p.boot.Boot(ctx)
	if err != nil || b.Phase != PhaseSettled || b.Failed == "" {
		return err
	}
	return p.boot.Confirm(ctx)
}

// checkSpace refuses with E-SPACE before the first byte is written and before anything is removed.
func (p *pair) checkSpace(slot SlotName, images []verify.Image) error {
	free, held, err := p.cells.room(slot)
	if err != nil {
		return err
	}
	if missing := p.need(images) - free - held; missing > 0 {
		return &verify.Refusal{Code: verify.CodeSpace, NeedBytes: missing,
			Detail: "write slot " + string(slot) + ": there is too little room for it"}
	}
	return nil
}

// need is how many bytes the images take.
func (p *pair) need(images []verify.Image) int64 {
	need := recordSpace
	for _, img := range images {
		need += (img.Content.Size + blockSize - 1) / blockSize * blockSize
	}
	if c, ok := p.cells.(interface{ extra([]verify.Image) int64 }); ok {
		need += c.extra(images)
	}
	return need
}

const (
	blockSize   int64 = 4 << 10  // files occupy whole blocks
	recordSpace int64 = 64 << 10 // for the small files beside the slots
)

// CheckImages refuses a list of images that is not of the release (E-FORMAT, E-SIZE), as Slots.Write does first of all.
func CheckImages(rel *verify.Release, images []verify.Image) error {
	_, err := checkImages(rel, images)
	return err
}

// checkImages says what the images come to, decoded. The names become file names here, so they are looked at again,
// whatever was checked before.
func checkImages(rel *verify.Release, images []verify.Image) (total int64, err error) {
	if rel == nil || len(images) == 0 || len(images) > maxImages {
		return 0, verify.Refuse(verify.CodeFormat, "write a slot: %d images, not 1 to %d", len(images), maxImages)
	}
	names := make(map[string]bool, len(images))
	for _, img := range images {
		switch {
		case !slices.ContainsFunc(rel.Manifest().Images, func(signed verify.Image) bool { return sameImage(signed, img) }):
			return 0, verify.Refuse(verify.CodeFormat, "write a slot: image %.64q is not of the release", img.Name)
		case !plainName(img.Name):
			return 0, verify.Refuse(verify.CodeFormat, "write a slot: an image has the name %.64q", img.Name)
		case names[img.Name]:
			return 0, verify.Refuse(verify.CodeFormat, "write a slot: two images have the name %s", img.Name)
		case img.Size < 0 || img.Content.Size < 0 || img.Content.Size > maxContent:
			return 0, verify.Refuse(verify.CodeSize, "write a slot: image %s has a size that cannot be", img.Name)
		case img.Encoding != verify.EncodingNone && img.Encoding != verify.EncodingZstd:
			return 0, verify.Refuse(verify.CodeFormat, "write a slot: image %s has the encoding %.16q", img.Name, string(img.Encoding))
		}
		names[img.Name] = true
		total += img.Content.Size
	}
	return total, nil
}

func sameImage(a, b verify.Image) bool {
	return a.Name == b.Name && a.Size == b.Size && a.SHA256 == b.SHA256 && a.Encoding == b.Encoding && a.Content == b.Content
}

const (
	maxImages        = 256
	maxContent int64 = 1 << 44 // 256 of them still fit an int64
)

// plainName reports whether a name is of the form that the manifest promises: [a-z0-9][a-z0-9._-]{0,63}.
func plainName(s string) bool {
	if len(s) == 0 || len(s) > 64 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		letter := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

// imageNames are the names to keep in a slot.
func imageNames(images []verify.Image) map[string]bool {
	return maps.Collect(func(yield func(string, bool) bool) {
		for _, img := range images {
			if !yield(img.Name, true) {
				return
			}
		}
	})
}
