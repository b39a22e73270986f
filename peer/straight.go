package peer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/dustin/go-humanize"

	"meshupd/install"
	"meshupd/swarm"
	"meshupd/verify"
)

// Straight is what slots can do that take an image piece by piece; see install.Block.
type Straight interface {
	OpenIdle(ctx context.Context, img verify.Image) (*install.IdleSlot, error)
	OpenSlot(slot install.SlotName, img verify.Image) (*install.IdleSlot, error)
	Adopt(ctx context.Context, rel *verify.Release, images []verify.Image, progress func(done, total int64)) error
}

// places lets the one raw image that this device is to install next come to lie in its idle slot.
type places struct{ n *Node }

var _ swarm.Places = places{}

// Choose implements swarm.Places. Whatever is not about to be installed goes to the store: from the first piece on the slot
// holds no version to go back to.
func (p places) Choose(img verify.Image) string {
	n := p.n
	if img.Encoding != verify.EncodingNone || n.cfg.Policy != PolicyInstall {
		return ""
	}
	n.mu.Lock()
	slots := n.view.slots
	known := make([]*verify.Release, 0, len(n.releases)+len(n.importing))
	for _, rel := range n.releases {
		known = append(known, rel)
	}
	for i := range n.importing {
		if !slices.ContainsFunc(known, func(rel *verify.Release) bool { return rel.ID() == i.rel.ID() }) {
			known = append(known, i.rel)
		}
	}
	n.mu.Unlock()
	if slots.Phase != install.PhaseSettled || slots.Booted != slots.Default {
		return ""
	}
	target, how, _ := choose(choice{known: known, dev: n.deviceFor(slots), counters: n.door.Counters(),
		running: slots.Slots[slots.Booted].Release, withdrawn: n.withdrawn, failed: n.failedHere})
	if how != TargetNew {
		return ""
	}
	if images := target.ImagesFor(n.cfg.Hardware); len(images) != 1 || images[0].SHA256 != img.SHA256 {
		return ""
	}
	return string(slots.Default.Other())
}

// Fill implements swarm.Places.
func (p places) Fill(ctx context.Context, name string, img verify.Image) (swarm.Place, error) {
	idle, err := p.n.cfg.Straight.OpenIdle(ctx, img)
	if err != nil {
		return nil, err
	}
	if string(idle.Slot()) != name {
		idle.Close()
		return nil, verify.Refuse(verify.CodeBusy, "write slot %s: it is not the idle one any more", name)
	}
	p.n.poke() // the slot has no version any more
	return idle, nil
}

// Serve implements swarm.Places.
func (p places) Serve(name string, img verify.Image) (swarm.Place, error) {
	f, err := p.n.cfg.Straight.OpenSlot(install.SlotName(name), img)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// writeSlot is StepWrite. What it cost goes to the history: flash wears by writing.
func (n *Node) writeSlot(ctx context.Context, v view) error {
	began := time.Now()
	if err := n.fillSlot(ctx, v); err != nil || n.cfg.Wrote == nil {
		return err
	}
	written, same := n.cfg.Wrote()
	n.record(Event{Kind: EventWritten, From: v.slots.Slots[v.slots.Booted].Version, To: versionOf(v.target), Took: time.Since(began),
		Detail: fmt.Sprintf("wrote %s, %s were there", humanize.IBytes(uint64(max(0, written))), humanize.IBytes(uint64(max(0, same))))})
	return nil
}

// fillSlot copies the images to the idle slot, or makes it their holder where they are in it already.
func (n *Node) fillSlot(ctx context.Context, v view) error {
	progressed := func(done, total int64) { n.setWriting(progress{done, total}) }
	idle := string(v.slots.Default.Other())
	if n.cfg.Straight != nil && len(v.images) == 1 && n.store.Placed(v.images[0].SHA256) == idle {
		err := n.cfg.Straight.Adopt(ctx, v.target, v.images, progressed)
		if verify.CodeOf(err) == verify.CodeSlot {
			// What is wrong there is found when it is opened again, and fetched again.
			n.log.Warn("the slot does not hold what came; it is looked at again", "slot", idle, "err", err)
			return errors.Join(err, n.forgetPlace(idle))
		}
		return err
	}
	if err := n.forgetPlace(idle); err != nil {
		return err
	}
	return n.cfg.Slots.Write(ctx, v.target, v.images, n.openImage, progressed)
}

// forgetPlace ends what lies in a slot that is about to be changed.
func (n *Node) forgetPlace(name string) error {
	err := n.store.ForgetPlace(name, verify.Digest{})
	n.stopLost()
	return err
}

// stopLost ends the transfers of images that were held whole and are not any more.
func (n *Node) stopLost() {
	for _, t := range n.swarm.Transfers() {
		if t.Complete && !n.store.Has(t.Image) {
			n.swarm.Stop(t.Image)
		}
	}
}
