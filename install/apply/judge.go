package apply

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// Shelf is the other half's store. What it returns is believed only after the door and the digests said so.
type Shelf interface {
	// UnverifiedHead reads the head kept under a release's name, at most verify.MaxHead bytes.
	UnverifiedHead(release verify.Digest) ([]byte, error)
	// OpenUnverified opens what is kept under an image's name.
	OpenUnverified(img verify.Image) (io.ReadCloser, error)
}

// Slots are this half's slots with what else it does about them.
type Slots interface {
	install.Slots
	Start(ctx context.Context) error
	// Check proves the slot healthy, or says why not (E-HEALTH).
	Check(ctx context.Context, slot install.SlotName, version string) error
	// Restore fills the idle slot with a version that is kept beside the slots.
	Restore(ctx context.Context, release verify.Digest) error
	// Forsake drops the kept versions that the digests name, as manifests or images.
	Forsake(ctx context.Context, recalls []verify.Digest) error
}

// judge decides what may be done with the slots. It keeps the heads of the releases in the slots, and of the one that was
// accepted last, in a folder of its own, so that nothing it decides about them depends on the other half.
type judge struct {
	door   *verify.Door
	dev    verify.Device // Running is looked up
	slots  Slots
	shelf  Shelf
	folder string // of the heads
	log    *slog.Logger

	acting sync.Mutex // held by whoever changes the slots
	begun  atomic.Bool

	mu      sync.Mutex // owns:
	healthy trial      // passed its check
	at      time.Time  // when it did
}

// trial names what was checked.
type trial struct {
	slot    install.SlotName
	release verify.Digest
}

// checkHolds is how long a passed check stands for a confirmation, so that a slow one is not run twice.
const checkHolds = time.Minute

// alone runs do unless something else is being done to the slots: E-BUSY.
func (j *judge) alone(ctx context.Context, do func(context.Context) error) error {
	if !j.acting.TryLock() {
		return verify.Refuse(verify.CodeBusy, "another request is being carried out")
	}
	defer j.acting.Unlock()
	return do(ctx)
}

// started runs begin unless it was run.
func (j *judge) started(ctx context.Context) {
	if j.begun.Load() {
		return
	}
	j.acting.Lock()
	defer j.acting.Unlock()
	if j.begun.Load() {
		return
	}
	if err := j.begin(ctx); err != nil {
		j.log.Error("start the slots", "code", verify.CodeOf(err), "err", err)
	}
}

func (j *judge) start(ctx context.Context) error {
	if !j.acting.TryLock() {
		return verify.Refuse(verify.CodeBusy, "another request is being carried out")
	}
	defer j.acting.Unlock()
	return j.begin(ctx)
}

// begin does for the slots what a start of the daemon does where it owns them. This process may have been killed in the
// middle of a restart, so it is done once in each life of it, asked for or not.
func (j *judge) begin(ctx context.Context) error {
	j.begun.Store(true)
	err := j.slots.Start(ctx)
	st, serr := j.slots.State(ctx)
	if serr != nil {
		return errors.Join(err, serr)
	}
	if c := st.Slots[st.Default]; st.Phase == install.PhaseSettled && st.Booted == st.Default && !c.Release.IsZero() {
		j.raiseFloor(ctx, c.Release)
	}
	return err
}

// raiseFloor is for a release that runs and is confirmed. On a device that was one process before, its head is still only
// in the other half's store. It failed when the counters stay below it: that is told, and does not stop the device.
func (j *judge) raiseFloor(ctx context.Context, id verify.Digest) {
	rel, err := j.own(ctx, id)
	if errors.Is(err, fs.ErrNotExist) {
		if rel, err = j.fetch(ctx, id); err == nil {
			err = j.keep(rel)
		}
	}
	if err == nil {
		if err = j.door.Accept(rel); verify.CodeOf(err) == verify.CodeOrder {
			err = nil // a newer one was accepted
		}
	}
	if err == nil {
		err = j.door.Confirmed(rel)
	}
	if err != nil {
		j.log.Warn("raise the floor to what runs", "code", verify.CodeOf(err), "err", err)
	}
}

// fetch takes a head of the other half's store through the door.
func (j *judge) fetch(ctx context.Context, id verify.Digest) (*verify.Release, error) {
	raw, err := j.shelf.UnverifiedHead(id)
	if err != nil {
		return nil, err
	}
	return j.check(ctx, raw, id)
}

// own is fetch from this half's own folder. It may be fs.ErrNotExist.
func (j *judge) own(ctx context.Context, id verify.Digest) (*verify.Release, error) {
	raw, err := j.readOwn(id)
	if err != nil {
		return nil, err
	}
	return j.check(ctx, raw, id)
}

func (j *judge) check(ctx context.Context, raw []byte, id verify.Digest) (*verify.Release, error) {
	head, err := verify.ReadHead(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(head.UnverifiedManifest()) != id {
		return nil, verify.Refuse(verify.CodeDigest, "the head under the name of release %s is that of another", id)
	}
	return j.door.Check(ctx, head)
}

// learn accepts a release that the other half knows of, so that it is known here too, with its keys and recalls, should the
// other half be taken over afterwards.
func (j *judge) learn(ctx context.Context, id verify.Digest) error {
	rel, err := j.fetch(ctx, id)
	if err != nil {
		return err
	}
	if err := j.door.Accept(rel); err != nil {
		return err
	}
	if err := j.slots.Forsake(ctx, rel.Manifest().Recalls); err != nil {
		j.log.Warn("drop the versions that were withdrawn", "code", verify.CodeOf(err), "err", err)
	}
	return j.keep(rel)
}

// restore brings a kept version back. It was verified when it was written, and is compared with its digests again; order
// does not bind, as for the release in the other slot.
func (j *judge) restore(ctx context.Context, id verify.Digest) error {
	if err := j.refuseWithdrawn(ctx, id); err != nil {
		return err
	}
	return j.slots.Restore(ctx, id)
}

// write verifies everything from scratch and fills the idle slot.
func (j *judge) write(ctx context.Context, id verify.Digest, progress func(done, total int64)) error {
	rel, err := j.fetch(ctx, id)
	if err != nil {
		return err
	}
	st, err := j.slots.State(ctx)
	if err != nil {
		return err
	}
	if err := j.admit(ctx, rel, st); err != nil {
		return err
	}
	// Kept before the slot's record can name it.
	if err := j.keep(rel, id); err != nil {
		return err
	}
	return j.slots.Write(ctx, rel, rel.ImagesFor(j.dev.Hardware), j.shelf.OpenUnverified, progress)
}

// admit says whether a release that came through the door may be written now. The rules are those by which a device
// chooses (peer, choose): for this device, and not older than accepted, but for stepping stones to the newest. A device
// that runs what was withdrawn may also go back.
func (j *judge) admit(ctx context.Context, rel *verify.Release, st install.State) error {
	leaving := verify.CodeOf(j.refuseWithdrawn(ctx, st.Slots[st.Booted].Release)) == verify.CodeRecalled
	dev := j.dev
	dev.Running = st.Slots[st.Default].Version
	if err := rel.Fits(dev); err != nil && !(leaving && verify.CodeOf(err) == verify.CodeDowngrade) {
		return err
	}
	err := j.door.Accept(rel)
	switch {
	case verify.CodeOf(err) != verify.CodeOrder:
		return err
	case leaving:
		return nil
	}
	goal, gerr := j.find(ctx, j.door.AcceptedID())
	if gerr != nil {
		return err
	}
	// Fetched before the door is asked: a door that is asked while it asks would wait for itself.
	stones := map[verify.Digest]verify.Manifest{}
	verify.Stones(goal.Manifest(), func(id verify.Digest) (verify.Manifest, bool) {
		if stone, err := j.find(ctx, id); err == nil {
			stones[id] = stone.Manifest()
		}
		m, ok := stones[id]
		return m, ok
	})
	if j.door.AllowVia(goal, rel, func(id verify.Digest) (verify.Manifest, bool) { m, ok := stones[id]; return m, ok }) != nil {
		return err
	}
	return nil
}

func (j *judge) find(ctx context.Context, id verify.Digest) (*verify.Release, error) {
	if rel, err := j.own(ctx, id); err == nil {
		return rel, nil
	}
	return j.fetch(ctx, id)
}

// try arms a slot, unless what it holds was withdrawn, or belongs to a line of releases that was given up.
func (j *judge) try(ctx context.Context, slot install.SlotName) error {
	st, err := j.slots.State(ctx)
	if err != nil {
		return err
	}
	if slot != st.Booted { // trying that one only disarms
		if err := j.refuseWithdrawn(ctx, st.Slots[slot].Release); err != nil {
			return err
		}
	}
	return j.slots.Try(ctx, slot)
}

// refuseWithdrawn is E-RECALLED or E-ORDER for what a slot holds. The factory's content is no release.
func (j *judge) refuseWithdrawn(ctx context.Context, id verify.Digest) error {
	if id.IsZero() {
		return nil
	}
	if j.door.Recalled(id) {
		return verify.Refuse(verify.CodeRecalled, "the publisher withdrew release %s", id)
	}
	raw, err := j.readOwn(id)
	if errors.Is(err, fs.ErrNotExist) { // written before the device was parted in two
		raw, err = j.shelf.UnverifiedHead(id)
	}
	if err != nil {
		j.log.Warn("a slot's release cannot be looked at", "release", id, "err", err)
		return nil
	}
	head, err := verify.ReadHead(bytes.NewReader(raw))
	if err != nil || sha256.Sum256(head.UnverifiedManifest()) != id {
		return nil
	}
	if _, err := j.door.Check(ctx, head); verify.CodeOf(err) == verify.CodeRecalled {
		return err
	}
	// The digest in the slot's record vouches for these bytes: they were verified when they were written.
	m, err := verify.ParseUnverifiedManifest(head.UnverifiedManifest())
	if t := j.door.Trust(); err == nil && m.Line < t.Line {
		return verify.Refuse(verify.CodeOrder, "version %s is of line %d, which the publisher gave up for line %d", m.Version, m.Line, t.Line)
	}
	return nil
}

// restart starts what is armed. What was withdrawn since it was armed is disarmed.
func (j *judge) restart(ctx context.Context) error {
	st, err := j.slots.State(ctx)
	if err != nil {
		return err
	}
	if st.Phase == install.PhaseArmed {
		if err := j.refuseWithdrawn(ctx, st.Slots[st.Trial].Release); err != nil {
			return errors.Join(err, j.slots.Try(ctx, st.Booted))
		}
	}
	return j.slots.Restart(ctx)
}

// checkHealth runs the check and remembers that the slot on trial passed it.
func (j *judge) checkHealth(ctx context.Context, slot install.SlotName) error {
	st, err := j.slots.State(ctx)
	if err != nil {
		return err
	}
	c := st.Slots[slot]
	if err := j.slots.Check(ctx, slot, c.Version); err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.healthy, j.at = trial{slot, c.Release}, time.Now()
	return nil
}

func (j *judge) passed(t trial) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	ok := j.healthy == t && time.Since(j.at) < checkHolds
	j.healthy = trial{} // it stands for one confirmation
	return ok
}

// confirm believes nobody that the slot is healthy.
func (j *judge) confirm(ctx context.Context) error {
	st, err := j.slots.State(ctx)
	if err != nil {
		return err
	}
	c := st.Slots[st.Trial]
	if st.Phase == install.PhaseTrial {
		if err := j.refuseWithdrawn(ctx, c.Release); err != nil {
			return err
		}
		if !j.passed(trial{st.Trial, c.Release}) {
			if err := j.slots.Check(ctx, st.Trial, c.Version); err != nil {
				return err
			}
		}
	}
	if err := j.slots.Confirm(ctx); err != nil {
		return err
	}
	if !c.Release.IsZero() {
		j.raiseFloor(ctx, c.Release)
	}
	return nil
}

func (j *judge) headPath(id verify.Digest) string {
	return filepath.Join(j.folder, id.String()+".head")
}

func (j *judge) readOwn(id verify.Digest) ([]byte, error) {
	info, err := os.Stat(j.headPath(id))
	if err != nil {
		return nil, err
	}
	if info.Size() > verify.MaxHead {
		return nil, verify.Refuse(verify.CodeSize, "the kept head of release %s has %d bytes", id, info.Size())
	}
	return os.ReadFile(j.headPath(id))
}

// keep writes the head of a release, and drops those that nothing here names any more.
func (j *judge) keep(rel *verify.Release, more ...verify.Digest) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := durable.WriteFile(j.headPath(rel.ID()), rel.Head(), 0o600); err != nil {
		return verify.Refuse(verify.CodeIO, "keep the head of a release: %w", err)
	}
	st, err := j.slots.State(context.Background())
	if err != nil {
		return nil // nothing is dropped
	}
	wanted := map[string]bool{}
	for _, id := range append(more, rel.ID(), j.door.AcceptedID(), st.Slots[install.SlotA].Release, st.Slots[install.SlotB].Release) {
		wanted[filepath.Base(j.headPath(id))] = true
	}
	for _, c := range st.Kept {
		wanted[filepath.Base(j.headPath(c.Release))] = true
	}
	entries, err := os.ReadDir(j.folder)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".head") && !wanted[e.Name()] {
			if err := durable.Remove(filepath.Join(j.folder, e.Name())); err != nil {
				j.log.Warn("drop the head of a release", "err", err)
			}
		}
	}
	return nil
}
