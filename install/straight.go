package install

import (
	"context"
	"io"
	"os"
	"sync"

	"meshupd/verify"
)

// Straight to the slot: the bytes of a raw image land in the idle slot as they come, piece by piece, and are served from
// it. There is no second copy, and whoever fetches decides what is written where; so what makes a slot bootable stays here:
//
//	OpenIdle  the record of the slot is removed, durably; then it can be written
//	Adopt     no one can write it any more; synced, read back from the medium, compared with the signed digest; the record is written
//
// Between the two the slot is what it is during a Write: without a record, so Try refuses it, and while the boot state is
// settled the bootloader does not boot it.

// IdleSlot is the slot that neither runs nor is the default, open for the bytes of one image. Safe for concurrent use.
type IdleSlot struct {
	slot SlotName

	mu      sync.RWMutex // held for writing by seal and Close alone
	f       *os.File
	sealed  bool
	size    int64 // of the image
	written int64 // bytes; guarded by counting
	same    int64 // likewise

	counting sync.Mutex
}

// OpenIdle opens the idle slot for img, which is written as it is. What the slot held is no release any more from here on.
// A slot that was opened before cannot be written any more. Errors are those of Write, before anything is changed.
func (b *Block) OpenIdle(ctx context.Context, img verify.Image) (*IdleSlot, error) {
	if img.Encoding != verify.EncodingNone {
		return nil, verify.Refuse(verify.CodeFormat, "write image %s straight to a slot: it is packed", img.Name)
	}
	slot, err := b.beginWrite(ctx)
	if err != nil {
		return nil, err
	}
	defer b.endWrite()
	if err := b.checkSpace(slot, []verify.Image{img}); err != nil {
		return nil, err
	}
	if err := b.records.removeRecord(slot); err != nil {
		return nil, err
	}
	f, _, err := b.blocks.openIdle(slot)
	if err != nil {
		return nil, err
	}
	dropCache(f) // what is compared with the image and found right is what the medium holds
	idle := &IdleSlot{slot: slot, f: f, size: img.Size}
	b.mu.Lock()
	b.idle = idle
	b.mu.Unlock()
	return idle, nil
}

// OpenSlot opens a slot to serve from it, whatever it is: also the one that runs. Nothing says that it still holds an image.
func (b *Block) OpenSlot(slot SlotName, img verify.Image) (*IdleSlot, error) {
	path, ok := b.blocks.paths[slot]
	if !ok {
		return nil, verify.Refuse(verify.CodeSlot, "open slot %.8q: there is no such slot", string(slot))
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, verify.Refuse(verify.CodeSlot, "open slot %s: %w", slot, err)
	}
	return &IdleSlot{slot: slot, f: f, size: img.Size, sealed: true}, nil
}

// Adopt is Write for an image whose bytes already are in the idle slot: it reads all of them back from the medium and
// compares. E-SLOT says that they are not what was signed.
func (b *Block) Adopt(ctx context.Context, rel *verify.Release, images []verify.Image, progress func(done, total int64)) error {
	total, err := checkImages(rel, images)
	if err != nil {
		return err
	}
	if err := b.cells.fits(images); err != nil {
		return err
	}
	img := images[0]
	if img.Encoding != verify.EncodingNone {
		return verify.Refuse(verify.CodeFormat, "adopt image %s: it is packed", img.Name)
	}
	slot, err := b.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer b.endWrite()
	if err := b.checkSpace(slot, images); err != nil {
		return err
	}
	if err := b.records.removeRecord(slot); err != nil {
		return err
	}
	meter := &meter{total: total, tell: progress}
	meter.add(0)
	if err := b.blocks.close(slot, img); err != nil {
		return err
	}
	if err := b.cells.check(ctx, slot, img, func() { meter.add(0) }); err != nil {
		return err
	}
	meter.add(int(img.Content.Size))
	b.mu.Lock()
	idle := b.idle
	b.mu.Unlock()
	if idle != nil && idle.slot == slot {
		idle.counting.Lock()
		written := idle.written
		idle.counting.Unlock()
		b.blocks.tell(slot, written, max(0, img.Content.Size-written))
	}
	return b.records.saveRecord(slot, Content{Release: rel.ID(), Version: rel.Manifest().Version, Whole: true})
}

// close makes what is in a slot durable, with zeros behind the image to the end of its last block.
func (b *blockCells) close(slot SlotName, img verify.Image) error {
	what := "close image " + img.Name + " in slot " + string(slot)
	f, size, err := b.openIdle(slot)
	if err != nil {
		return err
	}
	defer f.Close()
	err = b.cfg.step("image.commit", func() error {
		end := min(size, (img.Content.Size+blockSize-1)/blockSize*blockSize)
		if _, err := f.WriteAt(make([]byte, end-img.Content.Size), img.Content.Size); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		if b.cfg.Discard {
			return discard(f, end, size)
		}
		return nil
	})
	return mediumError(err, what, img.Content.Size)
}

// Slot is its name.
func (s *IdleSlot) Slot() SlotName { return s.slot }

// ReadAt reads bytes of the image.
func (s *IdleSlot) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if off < 0 || off > s.size {
		return 0, io.EOF
	}
	n, err := s.f.ReadAt(p[:min(int64(len(p)), s.size-off)], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// WriteAt writes those blocks of p that are not in the slot already. It refuses with E-BUSY once the slot is adopted, or
// written by other means, and bytes outside the image.
func (s *IdleSlot) WriteAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.sealed {
		return 0, verify.Refuse(verify.CodeBusy, "write slot %s: it is not open to pieces any more", s.slot)
	}
	if off < 0 || off+int64(len(p)) > s.size {
		return 0, verify.Refuse(verify.CodeSize, "write slot %s: bytes %d to %d of an image of %d", s.slot, off, off+int64(len(p)), s.size)
	}
	runs := [][2]int{{0, len(p)}}
	old := make([]byte, len(p))
	// A block that cannot be read may well be written.
	if _, err := s.f.ReadAt(old, off); err == nil {
		runs = differing(old, p)
	}
	same := len(p)
	for _, r := range runs {
		if _, err := s.f.WriteAt(p[r[0]:r[1]], off+int64(r[0])); err != nil {
			return 0, mediumError(err, "write slot "+string(s.slot), int64(len(p)))
		}
		same -= r[1] - r[0]
	}
	s.counting.Lock()
	s.written += int64(len(p) - same)
	s.same += int64(same)
	s.counting.Unlock()
	return len(p), nil
}

// Sync makes what was written durable.
func (s *IdleSlot) Sync() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.sealed {
		return nil // it was synced when it was sealed
	}
	return mediumError(s.f.Sync(), "sync slot "+string(s.slot), 0)
}

// Close ends the use.
func (s *IdleSlot) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed = true
	return s.f.Close()
}

// seal syncs and takes the right to write away, for good; reading goes on. It waits for the writes under way.
func (s *IdleSlot) seal() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sealed {
		return nil
	}
	s.sealed = true
	if err := s.f.Sync(); err != nil {
		return mediumError(err, "sync slot "+string(s.slot), 0)
	}
	f, err := os.Open(s.f.Name())
	if err != nil {
		return mediumError(err, "open slot "+string(s.slot), 0)
	}
	s.f.Close()
	s.f = f
	return nil
}
