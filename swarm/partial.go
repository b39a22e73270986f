package swarm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent/merkle"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// When the bitmap of a .part file is renewed: after so many new bytes, or so long
// after the first of them. Each costs two syncs.
const (
	checkpointBytes = 32 << 20
	checkpointEvery = 5 * time.Second
)

// tailMisses is how many unclaimed pieces in a row may fail their hash before
// the rest is taken as not written. Pieces come in index order, with at most some
// ten on the way, so behind a gap this long there is nothing.
const tailMisses = 64

// bytesOf is the bytes of one image in use by the swarm: a .part file that fills
// up, or a whole image that is only read.
//
// The order that makes it outlast a cut: bytes are written, a piece's hash is
// checked on the bytes as read back, its bit is set in memory; a checkpoint syncs
// the file and only then replaces the bitmap by one that claims those pieces.
type bytesOf struct {
	store *Store
	img   verify.Image
	g     geometry
	table *verify.PieceTable
	f     Place  // an *os.File of the store, or a place
	place string // name of the place; "": the store
	bits  string // path of the bitmap

	wake    chan struct{} // has room for one: something for run to do
	durable atomic.Int64  // bytes that the bitmap on disk claims
	dropped atomic.Bool   // the store forgot the image: do not write its name again

	gate sync.RWMutex // of a place: held for writing while it is taken away

	reading sync.Mutex // guards a piece on its way out of a place
	piece   []byte     // checked; nil: none
	pieceAt int        // its number

	mu           sync.Mutex
	have         pieceSet
	verified     int64 // bytes in have
	unsaved      int64 // bytes in have that the bitmap on disk lacks
	whole        bool  // the image has its final name
	err          error // the first error of the disk; nothing is trusted after it
	firstLacking int   // no piece before it is missing
}

// openBytes starts to use an image: the whole one, or its .part file, which is made
// or resumed. The caller must run run and then close. Errors are coded.
func (s *Store) openBytes(ctx context.Context, img verify.Image, table *verify.PieceTable) (*bytesOf, error) {
	b := newBytesOf(s, img, table)
	if !b.fits() {
		return nil, verify.Refuse(verify.CodeFormat, "open image %s: its piece table does not fit", img.SHA256)
	}
	if s.Has(img.SHA256) {
		if at := s.Placed(img.SHA256); at != "" {
			return b, b.openPlaced(ctx, at)
		}
		return b, b.openWhole()
	}
	if name := s.choose(img); name != "" {
		return b, b.openPlace(ctx, name)
	}
	if err := s.promise(img); err != nil {
		return nil, err
	}
	if err := b.openPart(ctx); err != nil {
		if verify.CodeOf(err) != verify.CodeBusy {
			s.unpromise(img.SHA256)
		}
		return nil, err
	}
	return b, nil
}

func newBytesOf(s *Store, img verify.Image, table *verify.PieceTable) *bytesOf {
	g := geometryOf(img)
	b := &bytesOf{store: s, img: img, g: g, table: table, bits: s.bitsPath(img.SHA256), wake: make(chan struct{}, 1)}
	if g.valid() {
		b.have = newPieceSet(g.pieces())
	}
	return b
}

// fits says whether the image can be cut into pieces as its table says.
func (b *bytesOf) fits() bool {
	return b.g.valid() && b.table != nil && (b.g.pieces() <= 1 || len(b.table.Hashes) == b.g.pieces())
}

// overtaken says that the image became whole by Put while its .part file is still in use.
func (s *Store) overtaken(d verify.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hasLocked(d) && s.open[d] != nil
}

func (b *bytesOf) openWhole() error {
	f, err := b.store.openWhole(b.g.image)
	if err != nil {
		return err
	}
	if info, err := f.Stat(); err != nil || info.Size() != b.g.size {
		f.Close()
		return verify.Refuse(verify.CodeIO, "open image %s: the stored file does not have its %d bytes", b.g.image, b.g.size)
	}
	for i := range b.g.pieces() {
		b.have.add(i)
	}
	b.f, b.whole, b.verified = f, true, b.g.size
	b.durable.Store(b.g.size)
	return nil
}

func (b *bytesOf) openPart(ctx context.Context) error {
	s := b.store
	s.mu.Lock()
	_, busy := s.open[b.g.image]
	if !busy {
		s.open[b.g.image] = b
		delete(s.partial, b.g.image)
	}
	s.mu.Unlock()
	if busy {
		return verify.Refuse(verify.CodeBusy, "open image %s: it is in use already", b.g.image)
	}
	err := b.resume(ctx)
	if err != nil {
		if b.f != nil {
			b.f.Close()
		}
		s.mu.Lock()
		delete(s.open, b.g.image)
		s.partial[b.g.image] = b.durable.Load()
		s.mu.Unlock()
	}
	return err
}

// resume opens the .part file and finds out what it holds.
func (b *bytesOf) resume(ctx context.Context) error {
	s := b.store
	g, have, trusted := s.readBits(b.bits, b.g.image)
	trusted = trusted && g == b.g
	if !trusted {
		// The new bitmap must not meet a .part file of another shape under a bitmap that claims something.
		if err := durable.Remove(s.bitsPath(b.g.image)); err != nil {
			return codeDisk(err, 0)
		}
	}
	f, err := os.OpenFile(s.partPath(b.g.image), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return codeDisk(fmt.Errorf("open image %s: %w", b.g.image, err), 0)
	}
	b.f = f
	info, err := f.Stat()
	if err != nil {
		return codeDisk(err, 0)
	}
	written := min(info.Size(), b.g.size)
	if info.Size() > b.g.size {
		if err := f.Truncate(b.g.size); err != nil {
			return codeDisk(err, 0)
		}
	}
	if err := preallocate(f, b.g.size); err != nil {
		return codeDisk(fmt.Errorf("take space for image %s: %w", b.g.image, err), b.g.size)
	}
	if trusted && written == b.g.size {
		b.have = have
		b.verified = b.g.bytesIn(have)
		b.durable.Store(b.verified)
	}
	if written == 0 {
		return codeDisk(durable.SyncDir(s.imageDir()), 0)
	}
	return b.rehash(ctx, trusted)
}

// rehash looks for verified pieces that no bitmap claims. With a good bitmap
// these are the few since the last checkpoint; without one, all are looked at.
func (b *bytesOf) rehash(ctx context.Context, nearOnly bool) error {
	misses := 0
	for i := range b.g.pieces() {
		if b.have.has(i) {
			misses = 0
			continue
		}
		if nearOnly && misses >= tailMisses {
			break
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("check image %s: %w", b.g.image, err)
		}
		ok, err := b.checkPiece(i)
		if err != nil {
			return codeDisk(fmt.Errorf("check image %s: %w", b.g.image, err), 0)
		}
		if !ok {
			misses++
			continue
		}
		misses = 0
		b.setPiece(i)
	}
	return nil
}

// checkPiece hashes one piece as it is on disk against the verified table.
func (b *bytesOf) checkPiece(i int) (bool, error) {
	h := merkle.NewHash()
	if _, err := b.writePiece(h, i); err != nil {
		return false, err
	}
	return b.rightHash(h, i), nil
}

func (b *bytesOf) rightHash(h *merkle.Hash, i int) bool {
	// An image of one piece has no layer: its hash is the root itself, which is not padded to the piece length (BEP 52).
	if b.g.pieces() == 1 {
		return verify.Digest(h.Sum(nil)) == b.g.root
	}
	return verify.Digest(h.SumMinLength(nil, int(b.g.length))) == b.table.Hashes[i]
}

// rightPiece hashes one piece in memory.
func (b *bytesOf) rightPiece(i int, data []byte) bool {
	h := merkle.NewHash()
	h.Write(data)
	return b.rightHash(h, i)
}

var pieceBuffers = sync.Pool{New: func() any { buf := make([]byte, 64<<10); return &buf }}

// writePiece copies a piece from disk to w.
func (b *bytesOf) writePiece(w io.Writer, i int) (int64, error) {
	buf := pieceBuffers.Get().(*[]byte)
	defer pieceBuffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{w}, io.NewSectionReader(b.f, int64(i)*b.g.length, b.g.pieceSize(i)), *buf)
}

// setPiece notes a piece whose hash was checked.
func (b *bytesOf) setPiece(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.have.has(i) {
		return
	}
	b.have.add(i)
	for b.firstLacking < b.g.pieces() && b.have.has(b.firstLacking) {
		b.firstLacking++
	}
	b.verified += b.g.pieceSize(i)
	b.unsaved += b.g.pieceSize(i)
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *bytesOf) hasPiece(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.have.has(i)
}

// pieces is a copy of the set of verified pieces.
func (b *bytesOf) pieces() pieceSet {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.have)
}

// lacksOf says whether one of these pieces is not here.
func (b *bytesOf) lacksOf(set pieceSet) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, w := range set {
		if w&^b.have[i] != 0 {
			return true
		}
	}
	return false
}

// prefix is the number of bytes from the start without a gap.
func (b *bytesOf) prefix() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.firstLacking < b.g.pieces() && b.have.has(b.firstLacking) {
		b.firstLacking++
	}
	return min(b.g.size, int64(b.firstLacking)*b.g.length)
}

// bytesVerified is what may be told to others: verified, if not durable yet.
func (b *bytesOf) bytesVerified() (n int64, whole bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.verified, b.whole
}

func (b *bytesOf) failed() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// fail notes the first error; the pieces that are not saved yet lose their trust with it.
func (b *bytesOf) fail(err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = codeDisk(err, b.g.size-b.verified)
	}
	return b.err
}

func (b *bytesOf) readAt(p []byte, off int64) (int, error) {
	if b.place != "" {
		return b.readPlaced(p, off)
	}
	return b.f.ReadAt(p, off)
}

func (b *bytesOf) write(p []byte, off int64) (int, error) {
	if err := b.failed(); err != nil {
		return 0, err
	}
	n, err := b.store.write(b, p, off)
	if err != nil {
		return n, b.fail(fmt.Errorf("write image %s: %w", b.g.image, err))
	}
	return n, nil
}

// errPieces says that some pieces are not what they were; they have to come again.
var errPieces = errors.New("pieces changed on disk after they were checked")

// run does the slow work of a .part file until ctx ends, an error, or the image
// is whole (nil): checkpoints, the whole digest, the final name. lost is called
// with pieces that have to be fetched again.
func (b *bytesOf) run(ctx context.Context, lost func(piece int)) error {
	digest := &prefixHash{b: b, h: sha256.New(), buf: make([]byte, 256<<10)}
	var due <-chan time.Time
	for {
		if err := b.failed(); err != nil {
			return err
		}
		at, err := digest.advance(ctx, b.prefix())
		if err != nil {
			return b.ended(ctx, err)
		}
		if at == b.g.size {
			err := b.finish(digest)
			if !errors.Is(err, errPieces) {
				return err
			}
			digest.reset()
			if err := b.recheck(ctx, lost); err != nil {
				return b.ended(ctx, err)
			}
			continue
		}
		if b.unsavedBytes() >= checkpointBytes {
			due = nil
			if err := b.checkpoint(); err != nil {
				return b.fail(err)
			}
		} else if due == nil && b.unsavedBytes() > 0 {
			due = time.After(checkpointEvery)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.wake:
		case <-due:
			due = nil
			if err := b.checkpoint(); err != nil {
				return b.fail(err)
			}
		}
	}
}

// ended keeps a plain end apart from an error of the disk.
func (b *bytesOf) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return b.fail(err)
}

func (b *bytesOf) unsavedBytes() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unsaved
}

// sync makes the written bytes durable.
func (b *bytesOf) sync() error {
	if f, ok := b.f.(*os.File); ok {
		return fdatasync(f)
	}
	return b.f.Sync()
}

// forget drops what can never become whole.
func (b *bytesOf) forget() error {
	if b.place != "" {
		return b.store.forgetPlaced(b.g.image, b.place)
	}
	if err := b.store.removePartial(b.g.image); err != nil {
		return err
	}
	b.dropped.Store(true)
	return nil
}

// checkpoint makes what is verified durable, and then says so on disk.
func (b *bytesOf) checkpoint() error {
	b.mu.Lock()
	if b.whole || b.unsaved == 0 || b.err != nil || b.dropped.Load() {
		b.mu.Unlock()
		return nil // after an error the last checkpoint stands; run has told of the error
	}
	data, claimed := encodeBits(b.g, b.have), b.verified
	unsaved := b.unsaved
	b.mu.Unlock()
	if err := b.sync(); err != nil {
		return fmt.Errorf("sync image %s: %w", b.g.image, err)
	}
	b.store.step("checkpoint: data synced")
	if err := b.claim(data); err != nil {
		return err
	}
	b.store.step("checkpoint: bitmap replaced")
	b.durable.Store(claimed)
	b.mu.Lock()
	b.unsaved -= unsaved
	b.mu.Unlock()
	return nil
}

// finish gives the image its name, once the digest of all its bytes is the signed one.
func (b *bytesOf) finish(digest *prefixHash) error {
	if verify.Digest(digest.h.Sum(nil)) != b.g.image {
		return errPieces
	}
	if b.dropped.Load() {
		return verify.Refuse(verify.CodeNotFound, "store image %s: it was dropped meanwhile", b.g.image)
	}
	if b.place != "" {
		return b.finishPlace()
	}
	s := b.store
	if err := os.Chmod(s.partPath(b.g.image), 0o444); err != nil {
		return b.fail(err)
	}
	if err := b.f.Sync(); err != nil {
		return b.fail(fmt.Errorf("sync image %s: %w", b.g.image, err))
	}
	s.step("finish: synced")
	if err := durable.Rename(s.partPath(b.g.image), s.imagePath(b.g.image)); err != nil {
		return b.fail(err)
	}
	s.step("finish: renamed")
	s.mu.Lock()
	s.whole[b.g.image] = b.g.size
	delete(s.open, b.g.image)
	delete(s.promised, b.g.image)
	s.mu.Unlock()
	b.durable.Store(b.g.size)
	b.mu.Lock()
	b.whole, b.unsaved = true, 0
	b.mu.Unlock()
	// A bitmap without its .part file claims nothing; should this fail, the next start removes it.
	if err := durable.Remove(s.bitsPath(b.g.image)); err != nil {
		s.cfg.Log.Warn("remove a piece bitmap that is not needed any more", "image", b.g.image, "err", err)
	}
	s.step("finish: bitmap removed")
	return nil
}

// recheck finds the pieces that spoil the whole digest. If every piece is right,
// the manifest contradicts itself, and fetching again cannot help.
func (b *bytesOf) recheck(ctx context.Context, lost func(piece int)) error {
	var bad []int
	for i := range b.g.pieces() {
		if err := ctx.Err(); err != nil {
			return err
		}
		ok, err := b.checkPiece(i)
		if err != nil {
			return err
		}
		if !ok {
			bad = append(bad, i)
		}
	}
	if len(bad) == 0 {
		if err := b.forget(); err != nil {
			return err
		}
		return verify.Refuse(verify.CodeDigest, "store image %s: all pieces fit the piece table, but the whole is not what was signed", b.g.image)
	}
	b.store.cfg.Log.Warn("pieces changed on disk, fetch them again", "image", b.g.image, "pieces", len(bad))
	b.mu.Lock()
	for _, i := range bad {
		b.have.remove(i)
		b.verified -= b.g.pieceSize(i)
		b.firstLacking = min(b.firstLacking, i)
	}
	b.unsaved = max(b.unsaved, 1)
	b.mu.Unlock()
	for _, i := range bad {
		lost(i)
	}
	return nil
}

// close ends the use; what is verified is made durable first.
func (b *bytesOf) close() error {
	err := b.checkpoint()
	if b.place != "" {
		return errors.Join(err, b.closePlace())
	}
	s := b.store
	s.mu.Lock()
	if s.open[b.g.image] == b {
		delete(s.open, b.g.image)
		delete(s.promised, b.g.image)
		switch {
		case b.dropped.Load():
		case s.hasLocked(b.g.image): // Put was faster
			err = errors.Join(err, s.removePartial(b.g.image))
		default:
			s.partial[b.g.image] = b.durable.Load()
		}
	}
	s.mu.Unlock()
	return codeDisk(errors.Join(err, b.f.Close()), 0)
}

// prefixHash is the SHA-256 of an image as far as it has no gap, so that the end
// of a transfer does not wait for a second pass over everything. It reads every
// byte from the file after its piece was written and checked, so it covers what
// is on disk as a last full pass would; only a later decay of a byte already
// read differs, and that can happen after a last pass just as well.
type prefixHash struct {
	b   *bytesOf
	h   hash.Hash
	at  int64
	buf []byte
}

func (p *prefixHash) reset() {
	p.h.Reset()
	p.at = 0
}

func (p *prefixHash) advance(ctx context.Context, to int64) (int64, error) {
	for p.at < to {
		if err := ctx.Err(); err != nil {
			return p.at, err
		}
		n := min(int64(len(p.buf)), to-p.at)
		if _, err := p.b.f.ReadAt(p.buf[:n], p.at); err != nil {
			return p.at, fmt.Errorf("read image %s: %w", p.b.g.image, err)
		}
		p.h.Write(p.buf[:n])
		p.at += n
	}
	return p.at, nil
}
