package peer

import (
	"slices"

	"meshupd/verify"
)

// choice is all that choose looks at.
type choice struct {
	known    []*verify.Release // taken through the door
	dev      verify.Device
	counters verify.Counters
	running  verify.Digest // manifest of what runs and was confirmed; zero if there is none
	// withdrawn says what the publisher recalled, also of a manifest that is not known any more.
	withdrawn func(verify.Digest) bool
	failed    func(verify.Digest) bool
}

// choose picks the release a device should run next. The second result says how
// it stands, the third why not, when that is a rule of the release.
//
// As a rule that is the newest that is meant for the device, and not below its
// floor; when the newest can only be installed over a version in between that it
// names, it is the first on that way. A device that runs what was withdrawn goes to
// the newest that it may and can run, also back: the recall is the signed word for it.
func choose(c choice) (*verify.Release, Target, error) {
	list := c.candidates()
	if c.withdrawn(c.running) {
		return c.leave(list)
	}
	for _, rel := range list {
		way, err := rel, error(nil)
		if rel.ID() == c.running {
			return rel, TargetRunning, nil // what runs and was confirmed was fit when it was installed
		}
		switch err = rel.Fits(c.dev); verify.CodeOf(err) {
		case verify.CodeProduct, verify.CodeHardware, verify.CodeChannel:
			continue // for somebody else
		case verify.CodeRequires:
			way, err = c.firstStep(rel)
		}
		switch {
		case err != nil:
			return rel, TargetUnfit, err
		case c.failed(way.ID()):
			return way, TargetFailed, nil
		}
		return way, TargetNew, nil
	}
	return nil, TargetNone, nil
}

// candidates are what may run at all, newest first.
func (c *choice) candidates() []*verify.Release {
	leaving := c.withdrawn(c.running)
	list := slices.DeleteFunc(slices.Clone(c.known), func(rel *verify.Release) bool {
		m := rel.Manifest()
		below := m.Line < c.counters.Line || m.Line == c.counters.Line && m.Seq < c.counters.Floor
		return c.withdrawn(rel.ID()) || below && !leaving && rel.ID() != c.running
	})
	slices.SortFunc(list, func(a, b *verify.Release) int { return b.Compare(a) })
	return list
}

// firstStep is the first release on the way to one whose Requires is not met here.
func (c *choice) firstStep(goal *verify.Release) (*verify.Release, error) {
	way, err := verify.Route(goal.ID(), finder(c.known, c.withdrawn), c.dev)
	if err != nil {
		return nil, err
	}
	if way[0] == c.running {
		return nil, goal.Fits(c.dev) // it runs already and did not help
	}
	at := slices.IndexFunc(c.known, func(rel *verify.Release) bool { return rel.ID() == way[0] })
	return c.known[at], nil
}

// leave is choose for a device that runs what was withdrawn.
func (c *choice) leave(list []*verify.Release) (*verify.Release, Target, error) {
	why := verify.Refuse(verify.CodeRecalled, "the publisher withdrew the version that runs here, and no other is at hand")
	for _, rel := range list {
		way, err := rel, rel.Fits(c.dev)
		switch verify.CodeOf(err) {
		case verify.CodeDowngrade:
			err = nil
		case verify.CodeRequires:
			way, err = c.firstStep(rel)
		}
		if err == nil && !c.failed(way.ID()) {
			return way, TargetNew, nil
		}
	}
	return nil, TargetUnfit, why
}

// finder looks manifests up among releases, except those that were withdrawn.
func finder(known []*verify.Release, withdrawn func(verify.Digest) bool) func(verify.Digest) (verify.Manifest, bool) {
	return func(id verify.Digest) (verify.Manifest, bool) {
		for _, rel := range known {
			if rel.ID() == id && !withdrawn(id) {
				return rel.Manifest(), true
			}
		}
		return verify.Manifest{}, false
	}
}

// maxKept bounds the releases that a device keeps for others: their order is
// signed, so the oldest are those that nobody goes to any more.
const maxKept = 16

// keepers says which of the known releases stay: those in the slots, the newest
// and what it names as versions in between, and others from the floor up, as many as
// maxKept allows, newest first.
func keepers(known []*verify.Release, floor verify.Counters, slots ...verify.Digest) map[verify.Digest]bool {
	keep := map[verify.Digest]bool{}
	for _, id := range slots {
		keep[id] = true
	}
	list := slices.Clone(known)
	slices.SortFunc(list, func(a, b *verify.Release) int { return b.Compare(a) })
	if len(list) > 0 {
		keep[list[0].ID()] = true
		for _, id := range verify.Stones(list[0].Manifest(), finder(known, func(verify.Digest) bool { return false })) {
			keep[id] = true
		}
	}
	for _, rel := range list {
		m := rel.Manifest()
		if len(keep) < maxKept && (m.Line > floor.Line || m.Line == floor.Line && m.Seq >= floor.Floor) {
			keep[rel.ID()] = true
		}
	}
	return keep
}
