package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"meshupd/install"
	"meshupd/verify"
)

// SilentAfter is how long a device may go unheard before others call it silent.
const SilentAfter = 60 * time.Second

// roundsApart bounds how often a busy site makes the loop look again.
const roundsApart = 50 * time.Millisecond

// view is what one round observed; status is computed from it.
type view struct {
	facts   Facts
	target  *verify.Release
	held    string        // why the restart is held, when it is
	again   time.Duration // when to look at that again
	why     error         // why the target is unfit, or does not fit in the space left
	slots   install.State
	images  []verify.Image // of the target, for this device
	have    int64          // bytes of images held
	total   int64
	state   DeviceState
	since   time.Time
	started time.Time // when the target was first heard of
}

// live is the loop: observe, next, do one step, wait.
func (n *Node) live(ctx context.Context) error {
	if n.cfg.Starter != nil {
		n.pulse.beat("start", n.quietFor(StepRestart))
		if err := n.cfg.Starter(ctx); err != nil {
			n.setTrouble(err)
			n.log.Error("start the slots", "code", verify.CodeOf(err), "err", err)
		}
	}
	var pause time.Duration // grows while the same trouble lasts
	for ctx.Err() == nil {
		looked := time.Now()
		n.pulse.beat("look", quietLook)
		v, err := n.observe(ctx)
		n.tellState()
		if err == nil {
			step := next(v.facts)
			if step == StepWait || step == StepFetch {
				if step == StepFetch {
					n.fetch(v)
				}
				n.relay(v)
				if !n.troubled() { // a slot that fails again and again is fetched to in between
					pause = 0
				}
				n.wait(ctx, n.idleFor(v))
				n.pauseFor(ctx, roundsApart-time.Since(looked))
				continue
			}
			n.log.Info("step", "do", step.String(), "state", v.state, "target", versionOf(v.target))
			n.pulse.beat(step.String(), n.quietFor(step))
			if err = n.do(ctx, step, v); err == nil {
				pause = 0
				n.setTrouble(nil)
				n.poke()
				continue
			}
			n.notePutOff(err, v)
			n.log.Error("step failed", "do", step.String(), "code", verify.CodeOf(err), "err", err)
		}
		if ctx.Err() != nil {
			break
		}
		n.setTrouble(err)
		n.tellState()
		pause = min(max(2*pause, time.Second), time.Minute)
		n.pauseFor(ctx, pause)
	}
	return ctx.Err()
}

// idleFor says when to look again though nothing was heard: free space comes without a message.
func (n *Node) idleFor(v view) time.Duration {
	if v.facts.Hold != HoldNone && v.again > 0 {
		return min(v.again, time.Minute)
	}
	if v.facts.SpaceShort {
		return 5 * time.Second
	}
	return time.Minute
}

func (n *Node) wait(ctx context.Context, longest time.Duration) {
	n.pulse.beat("wait", longest+quietLook)
	timer := time.NewTimer(longest)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-n.wake:
	}
}

// pauseFor waits out a back-off: a wake must not turn trouble into a busy loop.
func (n *Node) pauseFor(ctx context.Context, d time.Duration) {
	n.pulse.beat("pause", d+quietLook)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// observe gathers the facts. It changes nothing but the swarm's picture of the site.
func (n *Node) observe(ctx context.Context) (view, error) {
	slots, err := n.cfg.Slots.State(ctx)
	if err != nil {
		return view{}, fmt.Errorf("read the slots: %w", err)
	}
	running := slots.Slots[slots.Booted]
	known := n.known()
	if err := n.tellNewest(ctx, known); err != nil {
		return view{}, err
	}
	v := view{slots: slots}
	confirmed := running.Release
	if slots.Phase == install.PhaseTrial {
		confirmed = verify.Digest{} // what is on trial does not count as running
	}
	v.target, v.facts.Target, v.why = choose(choice{known: known, dev: n.deviceFor(slots), counters: n.door.Counters(),
		running: confirmed, withdrawn: n.withdrawn, failed: n.failedHere})
	v.facts.Policy = n.cfg.Policy
	v.facts.Boot = bootFact(slots)
	v.facts.Unrecorded = slots.Failed != ""
	if v.target != nil {
		v.images = v.target.ImagesFor(n.cfg.Hardware)
		v.facts.Idle = idleHolds(slots, v.target)
		n.observeImages(&v)
	}
	if n.cfg.Hold != nil && (v.facts.Boot == BootArmed || v.facts.Boot == BootSettled && v.facts.Idle && v.facts.Target == TargetNew) && !n.isUrged() {
		version := versionOf(v.target)
		if v.facts.Boot == BootArmed {
			version = slots.Slots[slots.Trial].Version
		}
		v.facts.Hold, v.held, v.again = n.cfg.Hold(ctx, slots.Default.Other(), version)
	}
	n.swarm.SetMembers(n.members())
	n.stopLost()
	n.seed(known)

	// What was withdrawn while it was on trial is as good as failed.
	withdrawn := n.withdrawn(running.Release)
	n.mu.Lock()
	defer n.mu.Unlock()
	if slots.Phase == install.PhaseTrial {
		v.facts.Health = n.health
		if withdrawn {
			v.facts.Health = HealthBad
		}
	}
	v.state = state(v.facts, v.have > 0)
	if v.state == StateWaiting && v.facts.Target == TargetNew && n.anyoneHolds(v.images) {
		v.state = StateFetching
	}
	v.since, v.started = n.view.since, n.view.started
	if v.state != n.view.state {
		v.since = time.Now()
	}
	if versionOf(v.target) != versionOf(n.view.target) || v.started.IsZero() {
		v.started = time.Now()
	}
	if before := n.view; v.facts != before.facts || v.held != before.held || v.state != before.state || v.have != before.have || !slices.Equal(v.slots.Kept, before.slots.Kept) ||
		versionOf(v.target) != versionOf(before.target) || v.slots.Slots[v.slots.Booted] != before.slots.Slots[before.slots.Booted] {
		n.touchLocked() // who watches must hear of what this round found, not of the wake that led to it
	}
	n.view = v
	return v, nil
}

// tellNewest lets Config.Learn know. That it does not take the release is a matter of its own door; only one that cannot
// be reached is asked again.
func (n *Node) tellNewest(ctx context.Context, known []*verify.Release) error {
	newest := newestOf(known)
	if n.cfg.Learn == nil || newest == nil {
		return nil
	}
	n.mu.Lock()
	told := n.learned == newest.ID()
	n.mu.Unlock()
	if told {
		return nil
	}
	err := n.cfg.Learn(ctx, newest)
	if code := verify.CodeOf(err); code == verify.CodeApply || ctx.Err() != nil {
		return err
	} else if err != nil {
		n.log.Warn("the process that writes the slots does not take the newest release", "code", code, "err", err)
	}
	n.mu.Lock()
	n.learned = newest.ID()
	n.mu.Unlock()
	return nil
}

// deviceFor is this device as the rules of a release see it. While a trial runs,
// the version that counts is the default slot's: the trial may still go.
func (n *Node) deviceFor(slots install.State) verify.Device {
	return verify.Device{Product: n.cfg.Product, Hardware: n.cfg.Hardware, Channel: n.cfg.Channel,
		Running: slots.Slots[slots.Default].Version, Meshupd: n.cfg.Meshupd, Takes: n.cfg.Takes}
}

func (n *Node) failedHere(id verify.Digest) bool {
	_, failed := n.failures.Failed(id)
	return failed
}

func bootFact(s install.State) BootFact {
	switch {
	case s.Phase == install.PhaseTrial:
		return BootTrial
	case s.Phase == install.PhaseArmed:
		return BootArmed
	case s.Booted != s.Default:
		return BootReturned
	default:
		return BootSettled
	}
}

// idleHolds says whether the slot that does not run holds the release, whole.
func idleHolds(s install.State, rel *verify.Release) bool {
	c, ok := s.Slots[s.Default.Other()]
	return ok && c.Whole && c.Release == rel.ID() && s.Booted == s.Default
}

// observeImages fills in how much of the target is held and whether the rest fits.
func (n *Node) observeImages(v *view) {
	// What is verified and not durable yet counts for the progress, though not for anything else.
	moving := map[verify.Digest]int64{}
	for _, t := range n.swarm.Transfers() {
		moving[t.Image] = t.Done
	}
	var missing []verify.Image
	for _, img := range v.images {
		v.total += img.Size
		v.have += max(n.store.HaveBytes(img.SHA256), moving[img.SHA256])
		if !n.store.Has(img.SHA256) {
			missing = append(missing, img)
		}
	}
	if len(missing) == 0 {
		v.facts.Image = ImageWhole
		return
	}
	if v.facts.Target != TargetNew || v.facts.Idle {
		return
	}
	if err := n.store.CheckSpace(missing...); err != nil {
		v.facts.SpaceShort = verify.CodeOf(err) == verify.CodeSpace
		v.why = err
	}
}

// anyoneHolds says whether some device heard of has bytes of these images.
func (n *Node) anyoneHolds(images []verify.Image) bool {
	for _, m := range n.mesh.Members() {
		for _, h := range m.Status.Holdings {
			for _, img := range images {
				if h.Image == img.SHA256 && h.Have > 0 {
					return true
				}
			}
		}
	}
	return false
}

// seed serves every image that is held whole.
func (n *Node) seed(known []*verify.Release) {
	for _, rel := range known {
		for _, img := range rel.Manifest().Images {
			if n.store.Has(img.SHA256) {
				n.swarm.Seed(rel, img.SHA256)
			}
		}
	}
}

// fetch lets the swarm get what the target lacks, and nothing that was wanted before and is no more.
func (n *Node) fetch(v view) {
	wanted := map[verify.Digest]bool{}
	for _, img := range v.images {
		wanted[img.SHA256] = true
		if !n.store.Has(img.SHA256) {
			n.swarm.Fetch(v.target, img.SHA256)
		}
	}
	for _, t := range n.swarm.Transfers() {
		if !t.Complete && !wanted[t.Image] {
			n.swarm.Stop(t.Image)
		}
	}
}

// do carries out one step.
func (n *Node) do(ctx context.Context, step Step, v view) error {
	slots := n.cfg.Slots
	switch step {
	case StepWrite:
		defer n.setWriting(progress{})
		return n.installerRefused(n.writeSlot(ctx, v), v)
	case StepTry:
		return slots.Try(ctx, v.slots.Default.Other())
	case StepRestart:
		return n.restart(ctx)
	case StepCheck:
		return n.checkHealth(ctx, v)
	case StepConfirm:
		return n.confirm(ctx, v)
	case StepFallback:
		if c := v.slots.Slots[v.slots.Booted]; n.withdrawn(c.Release) {
			n.fail(verify.Refuse(verify.CodeRecalled, "the publisher withdrew version %s", c.Version))
		}
		return slots.Fallback(ctx)
	case StepRecord:
		return n.recordFailure(ctx, v)
	default:
		return fmt.Errorf("no way to do step %v", step)
	}
}

// maxRefusals is how often an installer may refuse a release before it counts as failed here. Its reason may lie in the
// device and pass, but every try copies the image once more.
const maxRefusals = 3

// installerRefused keeps the reason of an installer in the history, once, and gives the release up in the end.
func (n *Node) installerRefused(err error, v view) error {
	if verify.CodeOf(err) != verify.CodeInstaller {
		return err
	}
	id, m := v.target.ID(), v.target.Manifest()
	n.refusals[id]++
	if n.refusals[id] == 1 {
		n.record(Event{Kind: EventBlocked, From: v.slots.Slots[v.slots.Booted].Version, To: m.Version,
			Took: time.Since(v.started), Code: verify.CodeInstaller, Detail: err.Error()})
	}
	if n.refusals[id] < maxRefusals {
		return err
	}
	delete(n.refusals, id)
	if kept := n.failures.Record(install.Failure{Release: id, Version: m.Version, Code: verify.CodeInstaller,
		Detail: err.Error(), At: time.Now().UTC()}); kept != nil {
		return errors.Join(err, fmt.Errorf("remember the refused release: %w", kept))
	}
	return nil
}

// notePutOff keeps in the history that a hook of the device put a release off, once: it is asked again and again. It is no
// verdict about the release, however often that happens: a hook judges the device, and nothing was written in vain.
func (n *Node) notePutOff(err error, v view) {
	code := verify.CodeOf(err)
	if code != verify.CodeHook && code != verify.CodeHeld || v.target == nil || n.putOff[v.target.ID()] == code {
		return
	}
	n.putOff = map[verify.Digest]verify.Code{v.target.ID(): code}
	n.record(Event{Kind: EventBlocked, From: v.slots.Slots[v.slots.Booted].Version, To: versionOf(v.target),
		Took: time.Since(v.started), Code: code, Detail: err.Error()})
}

// tellState lets Config.StateChanged know.
func (n *Node) tellState() {
	if n.cfg.StateChanged != nil {
		n.cfg.StateChanged(n.status())
	}
}

func (n *Node) openImage(img verify.Image) (io.ReadCloser, error) { return n.store.Open(img.SHA256) }

// restart starts what the boot state says. Where the restart command of a trial
// fails, the trial failed: the slot was entered and does not run.
func (n *Node) restart(ctx context.Context) error {
	n.setHealth(HealthUnknown)
	n.urge(false)
	err := n.cfg.Slots.Restart(ctx)
	if err == nil || ctx.Err() != nil {
		return err
	}
	after, stateErr := n.cfg.Slots.State(ctx)
	if stateErr != nil {
		return errors.Join(err, stateErr)
	}
	if after.Phase != install.PhaseTrial {
		return err
	}
	n.fail(err)
	return nil
}

// checkHealth proves the trial healthy or notes why not. A check that was only
// interrupted by the end of the daemon says nothing about the slot.
func (n *Node) checkHealth(ctx context.Context, v view) error {
	if n.cfg.Health == nil {
		n.setHealth(HealthGood)
		return nil
	}
	err := n.cfg.Health(ctx, v.slots.Booted, v.slots.Slots[v.slots.Booted].Version)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		n.fail(err)
		return nil
	}
	n.setHealth(HealthGood)
	return nil
}

// fail marks the present trial as failed and keeps the reason durably, so that
// it outlasts the restart into the old slot.
func (n *Node) fail(why error) {
	n.setHealth(HealthBad)
	s, err := n.cfg.Slots.State(context.WithoutCancel(context.Background()))
	if err != nil {
		n.log.Error("read the slots after a failed trial", "err", err)
		return
	}
	c := s.Slots[s.Booted]
	n.log.Warn("trial failed", "version", c.Version, "code", verify.CodeOf(why), "err", why)
	if err := n.failures.Record(install.Failure{Release: c.Release, Version: c.Version,
		Code: codeOr(why, verify.CodeHealth), Detail: why.Error(), At: time.Now().UTC()}); err != nil {
		n.log.Error("remember a failed trial", "err", err)
	}
}

// confirm makes the trial the default. The floor rises only afterwards: a floor
// above the slot that boots would make the device refuse what it runs.
func (n *Node) confirm(ctx context.Context, v view) error {
	from, to := v.slots.Slots[v.slots.Default], v.slots.Slots[v.slots.Booted]
	err := n.cfg.Slots.Confirm(ctx)
	if code := verify.CodeOf(err); code == verify.CodeHealth || code == verify.CodeRecalled {
		n.fail(err) // who writes the slots looks again before it confirms
		return nil
	}
	if err != nil {
		return err
	}
	n.setHealth(HealthUnknown)
	n.mu.Lock()
	rel, started := n.releases[to.Release], v.started
	n.mu.Unlock()
	if rel != nil {
		if err := n.door.Confirmed(rel); err != nil {
			return fmt.Errorf("raise the floor: %w", err)
		}
	}
	by := ""
	if o, ok := n.origin.get(to.Release); ok {
		by = o.Kind
	}
	// It failed here before, and was tried again: that is over.
	if err := n.failures.Forgive(to.Release); err != nil {
		n.log.Error("forget that a release failed, which is confirmed now", "err", err)
	}
	n.record(Event{Kind: EventConfirmed, From: from.Version, To: to.Version, Took: time.Since(started), By: by})
	n.prune(to.Release, from.Release)
	return nil
}

// recordFailure remembers the release of a trial that fell back.
func (n *Node) recordFailure(ctx context.Context, v view) error {
	c := v.slots.Slots[v.slots.Failed]
	f, known := n.failures.Failed(c.Release)
	if !known {
		// The bootloader fell back by itself: nobody was left to say why.
		f = install.Failure{Release: c.Release, Version: c.Version, Code: verify.CodeBoot,
			Detail: orText(v.slots.Why, "the new system was started and did not confirm itself"), At: time.Now().UTC()}
		if err := n.failures.Record(f); err != nil {
			return fmt.Errorf("remember the failed release: %w", err)
		}
	}
	n.record(Event{Kind: EventRolledBack, From: c.Version, To: v.slots.Slots[v.slots.Default].Version,
		Took: time.Since(v.started), Code: f.Code, Detail: f.Detail})
	return n.cfg.Slots.Forget(ctx)
}

// Rollback goes back to the other slot by a person's wish: the version that runs
// counts as failed here, so that it is not installed again by itself.
func (n *Node) Rollback(ctx context.Context, by string) error {
	return n.goBack(ctx, by, verify.Digest{})
}

// goBack is Rollback to one release, if it is not zero: the loop may have filled the slot anew a moment ago.
func (n *Node) goBack(ctx context.Context, by string, want verify.Digest) error {
	s, err := n.cfg.Slots.State(ctx)
	if err != nil {
		return fmt.Errorf("read the slots: %w", err)
	}
	if s.Phase != install.PhaseSettled || s.Booted != s.Default {
		return verify.Refuse(verify.CodeBusy, "an update is on trial; it ends by itself")
	}
	other := s.Slots[s.Default.Other()]
	if !other.Whole {
		return verify.Refuse(verify.CodeSlot, "the other slot holds no whole version to go back to")
	}
	if !want.IsZero() && other.Release != want {
		return verify.Refuse(verify.CodeBusy, "an update to version %s came in between", other.Version)
	}
	if n.withdrawn(other.Release) {
		return verify.Refuse(verify.CodeRecalled, "the publisher withdrew version %s, which the other slot holds", other.Version)
	}
	now := s.Slots[s.Booted]
	if !now.Release.IsZero() {
		if err := n.failures.Record(install.Failure{Release: now.Release, Version: now.Version, Code: verify.CodeFailedHere,
			Detail: "rolled back by " + by, At: time.Now().UTC()}); err != nil {
			return fmt.Errorf("remember the release that is left: %w", err)
		}
	}
	if err := n.failures.Forgive(other.Release); err != nil {
		return fmt.Errorf("allow the previous release again: %w", err)
	}
	n.urge(true)
	if err := n.cfg.Slots.Try(ctx, s.Default.Other()); err != nil {
		n.urge(false)
		return err
	}
	n.record(Event{Kind: EventRolledBack, From: now.Version, To: other.Version, By: by, Code: verify.CodeFailedHere, Detail: "asked for by " + by})
	n.poke()
	return nil
}

// RollbackTo is Rollback to one of the versions that are kept beside the slots, or to the one in the other slot.
func (n *Node) RollbackTo(ctx context.Context, by, version string) error {
	s, err := n.cfg.Slots.State(ctx)
	if err != nil {
		return fmt.Errorf("read the slots: %w", err)
	}
	if c := s.Slots[s.Default.Other()]; c.Whole && c.Version == version {
		return n.Rollback(ctx, by)
	}
	if c := s.Slots[s.Booted]; c.Version == version {
		return verify.Refuse(verify.CodeBusy, "version %s runs already", version)
	}
	i := slices.IndexFunc(s.Kept, func(c install.Content) bool { return c.Version == version })
	if i < 0 || n.cfg.Restore == nil {
		return verify.Refuse(verify.CodeNotFound, "this device keeps no version %s; there are: %s", version, keptVersions(s))
	}
	if n.withdrawn(s.Kept[i].Release) {
		return verify.Refuse(verify.CodeRecalled, "the publisher withdrew version %s", version)
	}
	if err := n.cfg.Restore(ctx, s.Kept[i].Release); err != nil {
		n.poke() // it may be kept no longer
		return err
	}
	return n.goBack(ctx, by, s.Kept[i].Release)
}

// keptVersions names what a person can go back to.
func keptVersions(s install.State) string {
	var names []string
	if c := s.Slots[s.Default.Other()]; c.Whole {
		names = append(names, c.Version)
	}
	for _, c := range s.Kept {
		names = append(names, c.Version)
	}
	if names == nil {
		return "none"
	}
	return strings.Join(names, ", ")
}

// urge notes that a person asked for the next restart, which no policy holds then.
func (n *Node) urge(yes bool) {
	n.mu.Lock()
	n.urged = yes
	n.mu.Unlock()
}

func (n *Node) isUrged() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.urged
}

func (n *Node) setHealth(h HealthFact) {
	n.mu.Lock()
	n.health = h
	n.mu.Unlock()
}

func (n *Node) setWriting(p progress) {
	n.pulse.again()
	n.mu.Lock()
	n.writing = p
	n.mu.Unlock()
}

func (n *Node) troubled() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.trouble != nil
}

func (n *Node) setTrouble(err error) {
	n.mu.Lock()
	n.trouble = reasonOf(err)
	n.touchLocked()
	n.mu.Unlock()
}

// record appends to the history; a history that cannot be written must not stop an update.
func (n *Node) record(e Event) {
	e.At = time.Now().UTC()
	if e.Device == "" {
		e.Device, e.Name = n.mesh.ID(), n.cfg.Name
	}
	if err := n.history.Append(e); err != nil {
		n.log.Error("write the history", "err", err)
	}
}

func reasonOf(err error) *Reason {
	if err == nil {
		return nil
	}
	r := &Reason{Code: codeOr(err, verify.CodeIO), Detail: err.Error()}
	var refusal *verify.Refusal
	if errors.As(err, &refusal) {
		r.NeedBytes = refusal.NeedBytes
	}
	return r
}

func codeOr(err error, fallback verify.Code) verify.Code {
	if c := verify.CodeOf(err); c != "" {
		return c
	}
	return fallback
}

func orText(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func versionOf(rel *verify.Release) string {
	if rel == nil {
		return ""
	}
	return rel.Manifest().Version
}
