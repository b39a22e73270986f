package peer

import (
	"context"
	"slices"
	"time"

	"meshupd/swarm"
	"meshupd/verify"
)

// Site is the whole site as this device sees it.
type Site struct {
	Observer string // this device's id
	Trust    verify.TrustInfo
	Alarms   []verify.Alarm  // of this device
	Release  *verify.Release // the newest known here, whoever it is for; nil if none
	Origin   Origin          // where this device has it from
	Imported int64           // bytes that came in by stick or file here
	Devices  []DeviceView    // this device first, the others by name
}

// DeviceView is one device of the site.
type DeviceView struct {
	ID        string
	Status    DeviceStatus
	LastHeard time.Time
	Self      bool
	Connected bool
}

// Site tells what this device knows now.
func (n *Node) Site() Site {
	now := time.Now()
	s := Site{Observer: n.mesh.ID(), Trust: n.door.Trust(), Alarms: n.door.Alarms(), Release: newestOf(n.known())}
	if s.Release != nil {
		s.Origin, _ = n.origin.get(s.Release.ID())
	}
	s.Devices = append(s.Devices, DeviceView{ID: n.mesh.ID(), Status: n.status(), LastHeard: now, Self: true, Connected: true})
	members := n.mesh.Members()
	slices.SortFunc(members, func(a, b Member) int {
		if c := compareStrings(a.Status.Name, b.Status.Name); c != 0 {
			return c
		}
		return compareStrings(a.ID, b.ID)
	})
	for _, m := range members {
		st := m.Status
		if now.Sub(m.LastHeard) >= SilentAfter {
			st.State, st.Since = string(StateSilent), m.LastHeard
			st.Rate, st.From = 0, nil
		}
		s.Devices = append(s.Devices, DeviceView{ID: m.ID, Status: st, LastHeard: m.LastHeard, Connected: m.Connected})
	}
	return s
}

func compareStrings(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (n *Node) nameOf(id string) string {
	for _, m := range n.mesh.Members() {
		if m.ID == id {
			return m.Status.Name
		}
	}
	return ""
}

// status says of this device what others may know, computed from the last round's facts.
func (n *Node) status() DeviceStatus {
	// The swarm is asked before the lock is taken: it calls poke, which takes it.
	transfers, holdings := n.swarm.Transfers(), n.swarm.Holdings()
	epoch := n.door.Trust().Epoch
	n.mu.Lock()
	defer n.mu.Unlock()
	v := n.view
	booted := v.slots.Slots[v.slots.Booted]
	st := DeviceStatus{
		Name: n.cfg.Name, Hardware: n.cfg.Hardware, Version: booted.Version,
		State: string(v.state), Since: v.since.UTC(), Heads: n.headsLocked(epoch), Holdings: holdings,
		Sent: map[string]int64{},
	}
	if v.facts.Boot == BootTrial {
		// What is on trial is not what the device runs for good.
		st.Version, st.Target = v.slots.Slots[v.slots.Default].Version, booted.Version
	} else if v.target != nil && v.facts.Target != TargetRunning {
		st.Target = v.target.Manifest().Version
	}
	for _, c := range v.slots.Kept {
		st.Kept = append(st.Kept, c.Version)
	}
	st.Reason = n.reasonLocked(v, transfers)
	if st.Reason == nil && v.held != "" {
		st.Reason = &Reason{Code: verify.CodeHeld, Detail: v.held}
	} else if st.Reason != nil && st.Reason.Code != verify.CodeHeld && (v.state == StateFetching || v.state == StateFetched || v.state == StateInstalled || v.state == StateWaiting) {
		st.State = string(StateBlocked)
	}
	for _, t := range transfers {
		for _, bytes := range t.Sent {
			st.Sent[t.Image.String()] += bytes
		}
		if v.state == StateFetching && !t.Complete && ofImages(v.images, t.Image) {
			st.Rate += t.DownRate
			st.From = append(st.From, t.From...)
		}
	}
	if v.state == StateFetching {
		st.Done, st.Size = v.have, v.total
	}
	if v.state == StateFetched && n.writing.total > 0 {
		st.Done, st.Size = n.writing.done, n.writing.total
	}
	if from, ok := n.originOf(v.target); ok {
		st.Source = from
	}
	return st
}

func (n *Node) originOf(rel *verify.Release) (string, bool) {
	if rel == nil {
		return "", false
	}
	o, ok := n.origin.get(rel.ID())
	return o.Kind, ok
}

func ofImages(images []verify.Image, d verify.Digest) bool {
	return slices.ContainsFunc(images, func(img verify.Image) bool { return img.SHA256 == d })
}

// headsLocked names the heads that this device can hand on, each with the number of
// the newest trust document that comes with it.
func (n *Node) headsLocked(epoch uint64) []HeadRef {
	out := make([]HeadRef, 0, len(n.releases))
	for _, rel := range n.releases {
		m := rel.Manifest()
		out = append(out, HeadRef{ID: rel.ID(), Line: m.Line, Seq: m.Seq, Epoch: epoch})
	}
	slices.SortFunc(out, func(a, b HeadRef) int { return compareStrings(a.ID.String(), b.ID.String()) })
	return out
}

// reasonLocked says why the device is not further, or nil.
func (n *Node) reasonLocked(v view, transfers []swarm.Transfer) *Reason {
	if v.slots.Failed != "" { // a trial that was given up a moment ago
		if f, ok := n.failures.Failed(v.slots.Slots[v.slots.Failed].Release); ok {
			return &Reason{Code: f.Code, Detail: f.Detail}
		}
	}
	if v.facts.Target == TargetFailed && v.target != nil {
		if f, ok := n.failures.Failed(v.target.ID()); ok {
			return &Reason{Code: f.Code, Detail: f.Detail}
		}
	}
	if v.facts.Target == TargetUnfit || v.facts.SpaceShort {
		return reasonOf(v.why)
	}
	if n.trouble != nil {
		return n.trouble
	}
	for _, t := range transfers {
		if t.Err != nil && ofImages(v.images, t.Image) {
			return reasonOf(t.Err)
		}
	}
	return nil
}

// tellDelay lets changes that come together, such as a new release and the rank
// that its fetch takes, go out as one status.
const tellDelay = 20 * time.Millisecond

// tell spreads this device's status when it changed, and notes what others became.
func (n *Node) tell(ctx context.Context) error {
	for {
		changed := n.Changed()
		n.mesh.Tell(n.status())
		n.noteOthers()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
		if err := pause(ctx, tellDelay); err != nil {
			return err
		}
	}
}

// noteOthers writes into this device's history what other devices became.
func (n *Node) noteOthers() {
	for _, m := range n.mesh.Members() {
		now := DeviceState(m.Status.State)
		n.mu.Lock()
		before, known := n.heard[m.ID]
		n.heard[m.ID] = now
		n.mu.Unlock()
		if !known || before == now {
			continue // what a device was when first heard is no news
		}
		e := Event{Device: m.ID, Name: m.Status.Name, By: m.Status.Source}
		if r := m.Status.Reason; r != nil {
			e.Code, e.Detail = r.Code, r.Detail
		}
		switch now {
		case StateConfirmed:
			e.Kind, e.To = EventConfirmed, m.Status.Version
		case StateRolledBack:
			e.Kind, e.From, e.To = EventRolledBack, m.Status.Target, m.Status.Version
		case StateBlocked:
			e.Kind, e.From, e.To = EventBlocked, m.Status.Version, m.Status.Target
		default:
			continue
		}
		n.record(e)
	}
}

// Running is the version that runs now, "" when unknown.
func (n *Node) Running() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.view.slots.Slots[n.view.slots.Booted].Version
}
