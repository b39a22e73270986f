package peer

import (
	"cmp"
	"slices"

	"meshupd/verify"
)

// An image for other hardware is kept and served wherever it was imported. A
// device with Config.Relay also fetches such images, so that a mixed site does not
// depend on the one device that had the stick. What it cannot install it verifies
// like everything else: bytes reach the store only by their signed digest.

// relayed is an image to hold for others.
type relayed struct {
	rel *verify.Release
	img verify.Image
}

// relays picks what to hold for others: the images of the newest releases that
// are not the device's own, as many as fit into quota bytes, the held ones counted too.
func relays(known []*verify.Release, hardware string, counters verify.Counters, quota int64) []relayed {
	known = slices.Clone(known)
	slices.SortFunc(known, func(a, b *verify.Release) int {
		return cmp.Or(b.Compare(a), compareStrings(a.ID().String(), b.ID().String()))
	})
	var out []relayed
	seen := map[verify.Digest]bool{}
	for _, rel := range known {
		if m := rel.Manifest(); m.Line < counters.Line || m.Line == counters.Line && m.Seq < counters.Floor {
			continue // nobody may go there any more
		}
		own := rel.ImagesFor(hardware)
		for _, img := range rel.Manifest().Images {
			if seen[img.SHA256] || ofImages(own, img.SHA256) || img.Size > quota {
				continue
			}
			seen[img.SHA256] = true
			quota -= img.Size
			out = append(out, relayed{rel, img})
		}
	}
	return out
}

// relay fetches what is held for others, after the device's own image.
func (n *Node) relay(v view) {
	if n.cfg.Relay <= 0 || n.cfg.Policy == PolicyOff || v.facts.Target == TargetNew && v.facts.Image != ImageWhole {
		return
	}
	for _, r := range relays(n.known(), n.cfg.Hardware, n.door.Counters(), n.cfg.Relay) {
		if !n.store.Has(r.img.SHA256) && n.store.CheckSpace(r.img) == nil && n.anyoneHolds([]verify.Image{r.img}) {
			n.swarm.Fetch(r.rel, r.img.SHA256)
		}
	}
}
