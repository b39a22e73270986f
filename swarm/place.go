package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Place is where the bytes of one image lie outside the store: in a slot of the device, from its first byte on. It is full
// of old bytes.
type Place interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes what was written durable.
	Sync() error
	Close() error
}

// Places gives images a place outside the store, so that there is no second copy.
//
//	images/<sha256>.at-<name>  which pieces in that place are verified and durable, see bitmap.go
//
// Such an image is held whole once all its pieces are claimed and the whole digest was right. A place holds one image:
// whoever is about to change a place calls Store.ForgetPlace first.
type Places interface {
	// Choose names the place where an image should come to lie, [a-z0-9]+; "" is the store.
	Choose(img verify.Image) string
	// Fill opens a place to be written. Store has forgotten, durably, what it held.
	Fill(ctx context.Context, name string, img verify.Image) (Place, error)
	// Serve opens a place to be read. Nothing says that it still holds the image.
	Serve(name string, img verify.Image) (Place, error)
}

const placeSuffix = ".at-"

func (s *Store) placePath(d verify.Digest, name string) string {
	return s.imagePath(d) + placeSuffix + name
}

func plainPlace(name string) bool {
	return name != "" && len(name) <= 16 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") == ""
}

// readPlaces takes in what lies outside the store. Without places the claims go: who else writes there does not ask.
func (s *Store) readPlaces(names []string) error {
	for _, file := range names {
		digest, name, found := strings.Cut(file, placeSuffix)
		d, err := verify.ParseDigest(digest)
		if err != nil || !found || !plainPlace(name) {
			continue
		}
		g, have, ok := s.readBits(s.placePath(d, name), d)
		_, twice := s.placed[d]
		if !ok || twice || s.hasLocked(d) || s.cfg.Places == nil {
			if err := durable.Remove(s.placePath(d, name)); err != nil {
				return err
			}
			continue
		}
		s.placed[d] = name
		if n := g.bytesIn(have); n == g.size {
			s.whole[d] = g.size
		} else {
			s.partial[d] = n
		}
	}
	return nil
}

// ForgetPlace makes the store claim nothing of a place any more, durably, but for the image to keep. It is called before the
// place is changed. What is open there can be neither read nor written afterwards.
func (s *Store) ForgetPlace(name string, keep verify.Digest) error {
	s.mu.Lock()
	var gone []verify.Digest
	for d, at := range s.placed {
		if at == name && d != keep {
			gone = append(gone, d)
		}
	}
	s.mu.Unlock()
	for _, d := range gone {
		if err := s.forgetPlaced(d, name); err != nil {
			return codeDisk(fmt.Errorf("forget what place %s held: %w", name, err), 0)
		}
	}
	return nil
}

func (s *Store) forgetPlaced(d verify.Digest, name string) error {
	s.mu.Lock()
	b := s.serving[d]
	s.mu.Unlock()
	if b != nil {
		// Whoever reads, writes or claims now is waited for; nobody does so afterwards.
		b.gate.Lock()
		b.dropped.Store(true)
		b.gate.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.whole, d)
	delete(s.partial, d)
	delete(s.placed, d)
	return durable.Remove(s.placePath(d, name))
}

// Placed names the place that holds the image, whole or in part; "" when that is the store.
func (s *Store) Placed(d verify.Digest) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.placed[d]
}

func (s *Store) choose(img verify.Image) string {
	if s.cfg.Places == nil || img.Size == 0 {
		return ""
	}
	if name := s.cfg.Places.Choose(img); plainPlace(name) {
		return name
	}
	return ""
}

// openPlace starts to use a place for an image: it is filled, or goes on to be.
func (b *bytesOf) openPlace(ctx context.Context, name string) error {
	s, d := b.store, b.g.image
	if err := s.ForgetPlace(name, d); err != nil {
		return err
	}
	if at := s.Placed(d); at != "" && at != name {
		if err := s.forgetPlaced(d, at); err != nil {
			return codeDisk(err, 0)
		}
	}
	s.step("place: others forgotten")
	s.mu.Lock()
	_, busy := s.open[d]
	if !busy {
		s.open[d], s.serving[d], s.placed[d] = b, b, name
		delete(s.partial, d)
	}
	s.mu.Unlock()
	if busy {
		return verify.Refuse(verify.CodeBusy, "open image %s: it is in use already", d)
	}
	err := b.resumePlace(ctx, name)
	if err != nil {
		b.closePlace()
	}
	return err
}

func (b *bytesOf) resumePlace(ctx context.Context, name string) error {
	s, d := b.store, b.g.image
	b.place, b.bits = name, s.placePath(d, name)
	if err := s.removePartial(d); err != nil { // of a time when it went to the store
		return codeDisk(err, 0)
	}
	f, err := s.cfg.Places.Fill(ctx, name, b.img)
	if err != nil {
		return err
	}
	b.f = f
	g, have, trusted := s.readBits(b.bits, d)
	trusted = trusted && g == b.g
	if trusted {
		b.have, b.verified = have, b.g.bytesIn(have)
		b.durable.Store(b.verified)
	}
	// Without a claim everything is looked at: what an older image has in common with this one need not come again.
	if err := b.rehash(ctx, trusted); err != nil {
		return err
	}
	if n, _ := b.bytesVerified(); !trusted && n > 0 {
		s.cfg.Log.Info("pieces are in the slot already", "image", d, "bytes", n, "of", b.g.size)
	}
	return nil
}

// openPlaced opens an image that a place holds whole, and looks at all of it: since the claim was made the place may have
// run as a root file system that was written to. The image is forgotten if it is not what it was.
func (b *bytesOf) openPlaced(ctx context.Context, name string) error {
	s, d := b.store, b.g.image
	f, err := s.cfg.Places.Serve(name, b.img)
	if err != nil {
		return err
	}
	b.f, b.place, b.bits = f, name, s.placePath(d, name)
	for i := range b.g.pieces() {
		ok, err := b.checkPiece(i)
		if err = errors.Join(err, ctx.Err()); err == nil && ok {
			b.have.add(i)
			continue
		}
		f.Close()
		if err != nil {
			return codeDisk(fmt.Errorf("look at image %s in place %s: %w", d, name, err), 0)
		}
		return b.lost(i)
	}
	b.whole, b.verified, b.firstLacking = true, b.g.size, b.g.pieces()
	b.durable.Store(b.g.size)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.placed[d] != name || s.serving[d] != nil {
		f.Close()
		return verify.Refuse(verify.CodeBusy, "open image %s: its place was taken meanwhile", d)
	}
	s.serving[d] = b
	return nil
}

// lost forgets an image whose place holds other bytes than it did.
func (b *bytesOf) lost(piece int) error {
	s, d := b.store, b.g.image
	if err := s.forgetPlaced(d, b.place); err != nil {
		return codeDisk(err, 0)
	}
	s.cfg.Log.Warn("a slot does not hold the image any more that it held; it is not offered", "slot", b.place, "image", d, "piece", piece)
	return verify.Refuse(verify.CodeSlot, "serve image %s from slot %s: its bytes were changed", d, b.place)
}

// readPlaced reads from a place. Of an image that is whole each piece is hashed on its way out: the slot may run as a root
// file system, and a neighbour that gets a wrong piece bans its sender.
func (b *bytesOf) readPlaced(p []byte, off int64) (int, error) {
	b.gate.RLock()
	if b.dropped.Load() {
		b.gate.RUnlock()
		return 0, verify.Refuse(verify.CodeNotFound, "read image %s: its place holds something else", b.g.image)
	}
	if _, whole := b.bytesVerified(); !whole {
		defer b.gate.RUnlock()
		return b.f.ReadAt(p, off)
	}
	n, bad, err := b.readChecked(p, off)
	b.gate.RUnlock()
	if bad >= 0 {
		return 0, b.lost(bad)
	}
	return n, err
}

// readChecked reads piece by piece. bad is a piece that is not what was signed, or -1.
func (b *bytesOf) readChecked(p []byte, off int64) (n, bad int, err error) {
	b.reading.Lock()
	defer b.reading.Unlock()
	for n < len(p) && off < b.g.size {
		i := int(off / b.g.length)
		if b.piece == nil || b.pieceAt != i {
			b.piece, b.pieceAt = make([]byte, b.g.pieceSize(i)), i
			if _, err := b.f.ReadAt(b.piece, int64(i)*b.g.length); err != nil {
				b.piece = nil
				return n, -1, err
			}
			if !b.rightPiece(i, b.piece) {
				b.piece = nil
				return n, i, nil
			}
		}
		k := copy(p[n:], b.piece[off-int64(i)*b.g.length:])
		n, off = n+k, off+int64(k)
		if off == int64(i)*b.g.length+int64(len(b.piece)) {
			b.piece = nil // it goes out once, as a rule
		}
	}
	if n < len(p) {
		return n, -1, io.EOF
	}
	return n, -1, nil
}

// writePlaced writes to a place that is being filled.
func (b *bytesOf) writePlaced(p []byte, off int64) (int, error) {
	b.gate.RLock()
	defer b.gate.RUnlock()
	if b.dropped.Load() {
		return 0, verify.Refuse(verify.CodeNotFound, "write image %s: its place holds something else", b.g.image)
	}
	return b.f.WriteAt(p, off)
}

// claim says on disk which pieces are held; of a place not if it was given to another image.
func (b *bytesOf) claim(data []byte) error {
	b.gate.RLock()
	defer b.gate.RUnlock()
	if b.place != "" && b.dropped.Load() {
		return verify.Refuse(verify.CodeNotFound, "claim image %s: its place holds something else", b.g.image)
	}
	return durable.WriteFile(b.bits, data, 0o644)
}

// finishPlace is finish for an image in a place; the digest was right.
func (b *bytesOf) finishPlace() error {
	s := b.store
	if err := b.f.Sync(); err != nil {
		return b.fail(fmt.Errorf("sync image %s: %w", b.g.image, err))
	}
	s.step("place: synced")
	b.mu.Lock()
	data := encodeBits(b.g, b.have)
	b.mu.Unlock()
	if err := b.claim(data); err != nil {
		return b.fail(err)
	}
	s.step("place: claimed")
	b.mu.Lock()
	b.whole, b.unsaved = true, 0
	b.mu.Unlock()
	b.durable.Store(b.g.size)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, b.g.image)
	if b.dropped.Load() {
		return verify.Refuse(verify.CodeNotFound, "store image %s: its place was taken meanwhile", b.g.image)
	}
	s.whole[b.g.image] = b.g.size
	return nil
}

// closePlace ends the use of a place; its claim stays.
func (b *bytesOf) closePlace() error {
	s, d := b.store, b.g.image
	s.mu.Lock()
	if s.open[d] == b {
		delete(s.open, d)
	}
	if s.serving[d] == b {
		delete(s.serving, d)
		if !b.dropped.Load() && !s.hasLocked(d) {
			s.partial[d] = b.durable.Load()
		}
	}
	s.mu.Unlock()
	if b.f == nil {
		return nil
	}
	return codeDisk(b.f.Close(), 0)
}

// putPlace is Put for an image that goes straight to a place: each piece is written only after its hash was right, so
// that wrong bytes never get there, and the whole digest is checked on what is there.
func (s *Store) putPlace(ctx context.Context, img verify.Image, table *verify.PieceTable, r io.Reader, name string, progress func(done int64)) error {
	b := newBytesOf(s, img, table)
	if !b.fits() {
		return verify.Refuse(verify.CodeFormat, "store image %s: its piece table does not fit", img.SHA256)
	}
	if err := b.openPlace(ctx, name); err != nil {
		return err
	}
	err := b.putPieces(ctx, r, progress)
	if err == nil {
		err = b.run(ctx, func(int) {})
	}
	return errors.Join(err, b.close())
}

func (b *bytesOf) putPieces(ctx context.Context, r io.Reader, progress func(done int64)) error {
	d := b.g.image
	buf := make([]byte, min(b.g.length, b.g.size))
	var done int64
	for i := range b.g.pieces() {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("store image %s: %w", d, err)
		}
		piece := buf[:b.g.pieceSize(i)]
		n, err := io.ReadFull(r, piece)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return verify.Refuse(verify.CodeTruncated, "store image %s: %d of %d bytes", d, done+int64(n), b.g.size)
		case err != nil:
			return fmt.Errorf("read image %s: %w", d, err)
		case !b.rightPiece(i, piece):
			return verify.Refuse(verify.CodeDigest, "store image %s: the bytes are not those that were signed", d)
		}
		if _, err := b.write(piece, int64(i)*b.g.length); err != nil {
			return err
		}
		b.setPiece(i)
		if b.unsavedBytes() >= checkpointBytes {
			if err := b.checkpoint(); err != nil {
				return codeDisk(err, 0)
			}
		}
		if done += int64(n); progress != nil {
			progress(done)
		}
	}
	if n, _ := io.ReadFull(r, make([]byte, 1)); n > 0 {
		return verify.Refuse(verify.CodeSize, "store image %s: more than its %d bytes", d, b.g.size)
	}
	return nil
}
