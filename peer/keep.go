package peer

import (
	"context"

	"meshupd/verify"
)

// What a device stops keeping: releases that nobody goes to any more, releases that
// the keys in force do not vouch for, and releases that the publisher withdrew.

// prune drops what is not worth keeping after a release was confirmed. Of the
// release in the other slot the head stays, so that the device may go back to it if what
// runs is withdrawn; its bytes are in the slot.
func (n *Node) prune(running, other verify.Digest) {
	known := n.known()
	keep := keepers(known, n.door.Counters(), running, other)
	bytesOf := keepers(known, n.door.Counters(), running)
	for _, rel := range known {
		if !bytesOf[rel.ID()] {
			n.forget(rel, keep[rel.ID()])
		}
	}
}

// pruneToQuota is prune for a device that never installs: what it only relays must not fill its disk.
func (n *Node) pruneToQuota() {
	n.mu.Lock()
	slots := n.view.slots
	many := len(n.releases) > maxKept
	n.mu.Unlock()
	if many {
		n.prune(slots.Slots[slots.Booted].Release, slots.Slots[slots.Booted.Other()].Release)
	}
}

// forget drops a release and its images; with keepHead only the images. It says whether it did.
func (n *Node) forget(rel *verify.Release, keepHead bool) {
	m := rel.Manifest()
	n.mu.Lock()
	if !keepHead {
		delete(n.releases, rel.ID())
	}
	var others []*verify.Release
	for i := range n.importing { // their images belong to no kept release yet
		others = append(others, i.rel)
	}
	n.mu.Unlock()
	others = without(append(others, n.known()...), rel)
	for _, img := range m.Images {
		if !imageOf(others, img.SHA256) {
			n.swarm.Stop(img.SHA256)
		}
	}
	if err := n.store.Drop(rel, others); err != nil {
		n.log.Warn("drop a release", "version", m.Version, "err", err)
		return
	}
	if keepHead {
		if err := n.store.Keep(rel); err != nil {
			n.log.Warn("keep the head of a release", "version", m.Version, "err", err)
		}
		return
	}
	n.log.Info("release dropped", "version", m.Version)
}

func without(list []*verify.Release, rel *verify.Release) []*verify.Release {
	var out []*verify.Release
	for _, r := range list {
		if r.ID() != rel.ID() {
			out = append(out, r)
		}
	}
	return out
}

func imageOf(list []*verify.Release, d verify.Digest) bool {
	for _, rel := range list {
		if _, ok := rel.Image(d); ok {
			return true
		}
	}
	return false
}

// withdrawn says whether the publisher recalled a release, by its manifest or by one of its images.
func (n *Node) withdrawn(id verify.Digest) bool {
	if id.IsZero() {
		return false
	}
	n.mu.Lock()
	known := n.recalled[id]
	n.mu.Unlock()
	return known || n.door.Recalled(id)
}

// withdrawKnown drops what a recall named. The heads stay on disk: when they are
// read again at a start they say which manifests the recall of an image condemns.
func (n *Node) withdrawKnown() {
	for _, rel := range n.known() {
		if !n.door.Withdrawn(rel) {
			continue
		}
		n.mu.Lock()
		n.recalled[rel.ID()] = true
		n.mu.Unlock()
		n.forget(rel, true)
		n.mu.Lock()
		delete(n.releases, rel.ID())
		n.mu.Unlock()
		n.log.Warn("a release was withdrawn by its publisher", "version", rel.Manifest().Version)
	}
}

// reviewKnown takes the kept releases through the door again after a change of
// keys: what the keys in force do not vouch for is neither offered nor installed
// any more, and what they do is handed on with the longer chain from now on.
func (n *Node) reviewKnown(ctx context.Context) {
	for _, old := range n.known() {
		rel, err := n.check(ctx, old.Head())
		switch {
		case ctx.Err() != nil:
			return // the next start looks at all of them
		case isOver(err):
			n.log.Warn("a kept release is not believed any more", "version", old.Manifest().Version, "code", verify.CodeOf(err), "err", err)
			n.forget(old, false)
		case err == nil:
			if err := n.store.Keep(rel); err != nil {
				n.log.Warn("keep a release with the new trust chain", "err", err)
			}
			n.mu.Lock()
			if n.releases[rel.ID()] != nil {
				n.releases[rel.ID()] = rel
			}
			n.mu.Unlock()
		}
	}
	n.poke()
}

// isOver tells a release whose time is over, by the publisher's word, from one that is only in doubt.
func isOver(err error) bool {
	switch verify.CodeOf(err) {
	case verify.CodeSigKey, verify.CodeOrder, verify.CodeExpired, verify.CodeRecalled, verify.CodeDevKey:
		return true
	}
	return false
}
