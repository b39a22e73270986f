package swarm

import (
	"bytes"
	"crypto/sha256"
	"slices"

	"meshupd/verify"
)

// The site relays each image along a chain that nobody coordinates.
//
// There is one total order of the devices that hold or fetch an image: by rank,
// then by a hash of device and image, so that different images get different
// chains. Who had the image from the start has rank 0; who starts to fetch claims
// one more than the highest rank it sees and keeps that while it runs, so a
// device that restarts goes to the tail. Each device takes the image from its
// parent, the nearest device before it in the order that is alive and not behind
// it. Parents come before their children in a fixed order, so there is no loop,
// and a device is the nearest predecessor of at most one other, so once the views
// agree each has at most one child and sends one copy. When a device dies, only
// the one after it has to move: to the next before.
//
// This file only decides; engine.go connects and transfer.go keeps the time.

// place is where a device stands in an image's order.
type place struct {
	rank uint32
	tie  [sha256.Size]byte
}

func placeOf(id string, image verify.Digest, rank uint32) place {
	h := sha256.New()
	h.Write(image[:])
	h.Write([]byte(id))
	p := place{rank: rank}
	h.Sum(p.tie[:0])
	return p
}

func (p place) before(q place) bool {
	if p.rank != q.rank {
		return p.rank < q.rank
	}
	return bytes.Compare(p.tie[:], q.tie[:]) < 0
}

// relay is a device that says it holds at least a part of the image.
type relay struct {
	id       string
	place    place
	have     int64
	complete bool
}

// site is what one device sees of the others for one image.
type site []relay

// maxRank is where ranks stop rising, so that a lie cannot wrap them round to 0.
const maxRank = 1<<32 - 1

// siteOf picks the holdings of one image. A member that says two things of one
// image is taken at its first word.
func siteOf(members []Member, self string, image verify.Digest) site {
	var s site
	seen := map[string]bool{self: true}
	for _, m := range members {
		for _, h := range m.Holdings {
			if h.Image != image || seen[m.ID] {
				continue
			}
			seen[m.ID] = true
			s = append(s, relay{id: m.ID, place: placeOf(m.ID, image, h.Rank), have: h.Have, complete: h.Complete})
		}
	}
	return s
}

// claim is the rank of a device that starts to fetch now.
func (s site) claim() uint32 {
	var highest uint32
	for _, r := range s {
		highest = max(highest, r.place.rank)
	}
	if highest == maxRank {
		return maxRank
	}
	return highest + 1
}

// trust is what a device's own experience with another says, best first.
type trust int

const (
	trusted  trust = iota
	doubtful       // it could not be reached, turned this device away or was lost a moment ago
	stalled        // it had what was wanted and did not send it
)

// parentFor picks the parent of a device that is not complete, "" for none:
//
//  1. the nearest predecessor that is trusted and not behind;
//  2. else any complete device that is trusted, the last in the order first,
//     so that the importer is spared;
//  3. else the nearest predecessor that is trusted, behind or not. It has
//     nothing yet, but a connection carries pieces both ways, so with no complete
//     device left the site still puts together what its parts have;
//  4. else the same three among the doubtful, and then among the stalled: a poor source beats none.
//
// Only 2 can point forward in the order, and only to a device that needs no parent: still no loop.
// slack is how far behind a parent may seem; what a member says is a little old.
func (s site) parentFor(self place, have, slack int64, trust func(id string) trust) string {
	for level := trusted; level <= stalled; level++ {
		var near, whole, any *relay
		for i := range s {
			r := &s[i]
			if trust(r.id) != level {
				continue
			}
			if r.place.before(self) {
				any = later(any, r)
				if r.complete || r.have+slack >= have {
					near = later(near, r)
				}
			}
			if r.complete {
				whole = later(whole, r)
			}
		}
		for _, r := range []*relay{near, whole, any} {
			if r != nil {
				return r.id
			}
		}
	}
	return ""
}

// withholds says whether a device does not pass on, or does not take, what the
// device before it offers. A parent that has nothing new may be starved by a
// failure further up, or be cut off itself; the difference is whether its own
// parent is ahead of it. Only the device right behind the failure sees that.
func (s site) withholds(id string, slack int64) bool {
	r, known := s.find(id)
	if !known || r.complete {
		return false
	}
	var above *relay
	for i := range s {
		if s[i].place.before(r.place) {
			above = later(above, &s[i])
		}
	}
	return above != nil && (above.complete || above.have > r.have+slack)
}

func later(a, b *relay) *relay {
	if a == nil || a.place.before(b.place) {
		return b
	}
	return a
}

// turnAway says whether to refuse a new child because another device that takes
// from this one now would be the better parent for it: when a release arrives,
// every device hears of the importer first and of its neighbours in the order a
// moment later, and they must not all begin at the importer. A child that comes
// again after two refusals is let in: it may know that the other is dead.
func (s site) turnAway(child string, children []string, refusals int) bool {
	if refusals >= maxRefusals || len(children) == 0 {
		return false
	}
	at, known := s.find(child)
	if !known {
		return true
	}
	for _, c := range children {
		if other, ok := s.find(c); ok && c != child && other.place.before(at.place) {
			return true
		}
	}
	return false
}

const maxRefusals = 2

func (s site) find(id string) (relay, bool) {
	for _, r := range s {
		if r.id == id {
			return r, true
		}
	}
	return relay{}, false
}

// hasSource says whether a device has all of the image.
func (s site) hasSource() bool {
	return slices.ContainsFunc(s, func(r relay) bool { return r.complete })
}

// without leaves devices out.
func (s site) without(out func(id string) bool) site {
	return slices.DeleteFunc(s, func(r relay) bool { return out(r.id) })
}
