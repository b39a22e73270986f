package install

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// StartedSlots are slots with what is called once, before anything else.
type StartedSlots interface {
	Slots
	Start(ctx context.Context) error
}

// Hooked are slots with hooks around them.
//
//	Write   pre-install -> note: an update -> the slots' own Write -> post-install -> note: passed
//	Try     of a slot with that note: post-install unless it passed -> pre-reboot -> the slots' own Try
//	Restart of an armed slot with that note, unless pre-reboot passed a moment ago: pre-reboot -> the slots' own Restart
//	Confirm the slots' own Confirm -> no note any more
//
// The note says that a slot holds an update, and not a version that ran here before, so that the way back meets no hook:
// neither Fallback, nor the restart after it, nor a Try of the version before. post-install stands before Try as well
// because a cut may come between the slot's record and the hook. pre-reboot stands before Try so that what it holds is not
// armed either, and no power cut starts it.
type Hooked struct {
	StartedSlots
	hooks Hooks
	path  string
	step  func(name string, do func() error) error // of the notes; a test makes them fail

	mu     sync.Mutex // owns the file at path, and:
	agreed verify.Digest
	at     time.Time // when pre-reboot passed for that release
}

// hookNotes tell of each release that was written and has not been confirmed yet whether post-install passed.
type hookNotes map[verify.Digest]bool

const (
	hookSchema   = "meshupd.hooks/1"
	maxHookNotes = 4 << 10
	// agreedFor is how long pre-reboot needs not be asked again before the restart that it was asked for.
	agreedFor = time.Minute
)

func parseHookNotes(data []byte) (hookNotes, error) {
	var n hookNotes
	if err := unseal(data, hookSchema, maxHookNotes, &n); err != nil {
		return nil, err
	}
	return n, nil
}

// OpenHooked puts hooks around slots. What it has to remember goes into a folder of its own. Errors are E-IO.
func OpenHooked(slots StartedSlots, hooks Hooks, dir string) (*Hooked, error) {
	err := durable.MkdirAll(dir, 0o700)
	if err == nil {
		err = durable.Sweep(dir)
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "%w", err)
	}
	return &Hooked{StartedSlots: slots, hooks: hooks, path: filepath.Join(dir, "notes.json"),
		step: func(_ string, do func() error) error { return do() }}, nil
}

// Inner are the slots without the hooks.
func (h *Hooked) Inner() StartedSlots { return h.StartedSlots }

// Start implements StartedSlots. A cut after a confirmation has left its note.
func (h *Hooked) Start(ctx context.Context) error {
	err := h.StartedSlots.Start(ctx)
	st, serr := h.State(ctx)
	if serr == nil && st.Phase == PhaseSettled {
		h.forget(st.Slots[st.Default].Release)
	}
	return err
}

// Write implements Slots. A hook that fails is an E-HOOK: pre-install before anything was changed, post-install with the
// slot whole. Neither is a verdict about the release: what a hook looks at is this device, and to ask it again costs nothing.
func (h *Hooked) Write(ctx context.Context, rel *verify.Release, images []verify.Image, open Source, progress func(done, total int64)) error {
	if err := CheckImages(rel, images); err != nil {
		return err
	}
	if err := h.PreInstall(ctx, rel.ID(), rel.Manifest().Version); err != nil {
		return err
	}
	return h.Install(ctx, rel, func() error { return h.StartedSlots.Write(ctx, rel, images, open, progress) })
}

// PreInstall asks whether the idle slot may be changed, for a release if one is known already. A trial must not begin with
// a health hook that cannot be run: so all hooks are looked at.
func (h *Hooked) PreInstall(ctx context.Context, release verify.Digest, version string) error {
	st, err := h.State(ctx)
	if err != nil {
		return err
	}
	if err := h.hooks.Check(); err != nil {
		return err
	}
	return h.hooks.Run(ctx, HookPreInstall, hookEnv(st, st.Default.Other(), Content{Release: release, Version: version})...)
}

// Install is what Write does after pre-install passed: write fills the slot.
func (h *Hooked) Install(ctx context.Context, rel *verify.Release, write func() error) error {
	st, err := h.State(ctx)
	if err != nil {
		return err
	}
	keep := []verify.Digest{rel.ID()}
	for _, c := range st.Slots {
		keep = append(keep, c.Release)
	}
	if err := h.note(rel.ID(), false, keep...); err != nil {
		return err
	}
	if err := write(); err != nil {
		return err
	}
	return h.postInstall(ctx, st, st.Default.Other(), Content{Release: rel.ID(), Version: rel.Manifest().Version})
}

func (h *Hooked) postInstall(ctx context.Context, st State, slot SlotName, c Content) error {
	if err := h.hooks.Run(ctx, HookPostInstall, hookEnv(st, slot, c)...); err != nil {
		return err
	}
	return h.note(c.Release, true)
}

// Try implements Slots. A failing pre-reboot is an E-HELD.
func (h *Hooked) Try(ctx context.Context, slot SlotName) error {
	st, err := h.State(ctx)
	if err != nil {
		return err
	}
	c := st.Slots[slot]
	if slot == st.Booted || !c.Whole { // disarms, or is refused
		return h.StartedSlots.Try(ctx, slot)
	}
	passed, update := h.noted(c.Release)
	if update && !passed {
		if err := h.postInstall(ctx, st, slot, c); err != nil {
			return err
		}
	}
	if update {
		if err := h.preReboot(ctx, st, slot, c); err != nil {
			return err
		}
	}
	return h.StartedSlots.Try(ctx, slot)
}

// Restart implements Slots. Only the start of an update that is armed asks the hook: a boot state that cannot be read, a
// trial and the way back do not.
func (h *Hooked) Restart(ctx context.Context) error {
	if st, err := h.State(ctx); err == nil && st.Phase == PhaseArmed {
		c := st.Slots[st.Trial]
		h.mu.Lock()
		fresh := h.agreed == c.Release && time.Since(h.at) < agreedFor
		h.mu.Unlock()
		if _, update := h.noted(c.Release); update && !fresh {
			if err := h.preReboot(ctx, st, st.Trial, c); err != nil {
				return err
			}
		}
	}
	return h.StartedSlots.Restart(ctx)
}

func (h *Hooked) preReboot(ctx context.Context, st State, slot SlotName, c Content) error {
	err := h.hooks.Run(ctx, HookPreReboot, hookEnv(st, slot, c)...)
	if verify.CodeOf(err) == verify.CodeHook {
		return verify.Refuse(verify.CodeHeld, "held by %w", err)
	}
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.agreed, h.at = c.Release, time.Now()
	return nil
}

// Confirm implements Slots.
func (h *Hooked) Confirm(ctx context.Context) error {
	st, err := h.State(ctx)
	if err != nil {
		return err
	}
	if err := h.StartedSlots.Confirm(ctx); err != nil {
		return err
	}
	h.forget(st.Slots[st.Trial].Release)
	return nil
}

// hookEnv is what the hooks around the slots are told.
func hookEnv(st State, slot SlotName, c Content) []string {
	env := append(slotEnv(slot, c.Version), "MESHUPD_RUNNING="+printable(st.Slots[st.Booted].Version, maxVersion), "MESHUPD_RELEASE=")
	if !c.Release.IsZero() {
		env[len(env)-1] += c.Release.String()
	}
	return env
}

// noted says whether a release is an update that was not confirmed yet, and whether post-install passed for it. Notes
// that cannot be read count as hooks that have to be asked.
func (h *Hooked) noted(id verify.Digest) (passed, update bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	notes, err := h.load()
	if err != nil {
		return false, !id.IsZero()
	}
	passed, update = notes[id]
	return passed, update
}

func (h *Hooked) load() (hookNotes, error) {
	data, err := readSmall(h.path, maxHookNotes)
	if errors.Is(err, fs.ErrNotExist) {
		return hookNotes{}, nil
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read the notes of the hooks: %w", err)
	}
	return parseHookNotes(data)
}

// note keeps one note, and drops those of releases that are not among keep, if any are.
func (h *Hooked) note(id verify.Digest, passed bool, keep ...verify.Digest) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	notes, err := h.load()
	if err != nil { // damaged: begun anew
		notes = hookNotes{}
	}
	notes[id] = passed
	for other := range notes {
		if len(keep) > 0 && !slices.Contains(keep, other) {
			delete(notes, other)
		}
	}
	err = h.step("hooks.note", func() error { return h.save(notes) })
	return mediumError(err, "keep the notes of the hooks", maxHookNotes)
}

// forget drops the note of a release that was confirmed. It may fail: a note that stays makes hooks be asked once more,
// and the next start tries again.
func (h *Hooked) forget(id verify.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	notes, err := h.load()
	if _, there := notes[id]; err != nil || !there {
		return
	}
	delete(notes, id)
	_ = h.save(notes)
}

func (h *Hooked) save(notes hookNotes) error {
	data, err := seal(hookSchema, notes)
	if err != nil {
		return err
	}
	return durable.WriteFile(h.path, data, 0o600)
}
