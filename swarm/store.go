package swarm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// StoreConfig says where images live and what must stay free.
type StoreConfig struct {
	Dir     string
	Reserve int64 // bytes of the file system that must stay free
	Log     *slog.Logger
	// Places, if not nil, gives images a place outside Dir.
	Places Places
}

// Store keeps images by digest and the heads of their releases. Safe for concurrent use.
//
//	images/<sha256>       a whole image, mode 0444; it has this name only after its digest was checked
//	images/<sha256>.part  an image on its way, at its full size from the start
//	images/<sha256>.bits  which pieces of the .part file are verified and durable, see bitmap.go
//	images/<sha256>.at-*  the same of an image that lies outside the store, see place.go
//	heads/<release>.head  the signed head of a release, to be checked again at each start
type Store struct {
	cfg StoreConfig

	// For tests: the free space, the write to a part file, and a look between the
	// steps of a change, where a power cut may happen.
	free    func() (int64, error)
	writeAt func(f *os.File, b []byte, off int64) (int, error)
	step    func(name string)

	mu       sync.Mutex
	whole    map[verify.Digest]int64    // size of whole images
	partial  map[verify.Digest]int64    // verified bytes of .part files that nobody has open
	open     map[verify.Digest]*bytesOf // .part files in use
	promised map[verify.Digest]int64    // size of images that are being written
	placed   map[verify.Digest]string   // name of the place of images that lie outside; they are in whole or partial or open too
	serving  map[verify.Digest]*bytesOf // those of them in use
}

const (
	partSuffix = ".part"
	bitsSuffix = ".bits"
	headSuffix = ".head"
)

// maxHeads is how many heads are read back at a start; the device keeps a handful.
const maxHeads = 256

// OpenStore sweeps leftovers and reads what is there. A complete image keeps its name only after its whole digest was checked.
func OpenStore(cfg StoreConfig) (*Store, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		cfg:      cfg,
		free:     func() (int64, error) { return freeBytes(cfg.Dir) },
		writeAt:  func(f *os.File, b []byte, off int64) (int, error) { return f.WriteAt(b, off) },
		step:     func(string) {},
		whole:    map[verify.Digest]int64{},
		partial:  map[verify.Digest]int64{},
		open:     map[verify.Digest]*bytesOf{},
		promised: map[verify.Digest]int64{},
		placed:   map[verify.Digest]string{},
		serving:  map[verify.Digest]*bytesOf{},
	}
	for _, dir := range []string{s.imageDir(), s.headDir()} {
		if err := durable.MkdirAll(dir, 0o755); err != nil {
			return nil, codeDisk(fmt.Errorf("open the store: %w", err), 0)
		}
		if err := durable.Sweep(dir); err != nil {
			return nil, codeDisk(fmt.Errorf("open the store: %w", err), 0)
		}
	}
	if err := s.readImages(); err != nil {
		return nil, codeDisk(fmt.Errorf("open the store: %w", err), 0)
	}
	return s, nil
}

func (s *Store) imageDir() string { return filepath.Join(s.cfg.Dir, "images") }
func (s *Store) headDir() string  { return filepath.Join(s.cfg.Dir, "heads") }

func (s *Store) imagePath(d verify.Digest) string { return filepath.Join(s.imageDir(), d.String()) }
func (s *Store) partPath(d verify.Digest) string  { return s.imagePath(d) + partSuffix }
func (s *Store) bitsPath(d verify.Digest) string  { return s.imagePath(d) + bitsSuffix }
func (s *Store) headPath(id verify.Digest) string {
	return filepath.Join(s.headDir(), id.String()+headSuffix)
}

// readImages takes in what the folder holds and removes what a cut left between two steps.
func (s *Store) readImages() error {
	entries, err := os.ReadDir(s.imageDir())
	if err != nil {
		return err
	}
	parts := map[verify.Digest]bool{}
	var names []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			continue
		}
		names = append(names, e.Name())
		if d, err := verify.ParseDigest(e.Name()); err == nil {
			s.whole[d] = info.Size()
		}
		if name, ok := strings.CutSuffix(e.Name(), partSuffix); ok {
			if d, err := verify.ParseDigest(name); err == nil {
				parts[d] = true
			}
		}
	}
	for _, e := range entries {
		name, suffix := strings.CutSuffix(e.Name(), bitsSuffix)
		if d, err := verify.ParseDigest(name); err == nil && suffix && !parts[d] {
			if err := durable.Remove(s.bitsPath(d)); err != nil {
				return err
			}
		}
	}
	for d := range parts {
		if _, ok := s.whole[d]; ok {
			if err := s.removePartial(d); err != nil {
				return err
			}
			continue
		}
		if g, have, ok := s.readBits(s.bitsPath(d), d); ok {
			s.partial[d] = g.bytesIn(have)
		} else {
			s.partial[d] = 0
		}
	}
	return s.readPlaces(names)
}

// readBits reads a bitmap; ok is false if there is none to trust.
func (s *Store) readBits(path string, d verify.Digest) (geometry, pieceSet, bool) {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() > maxBitsFile {
		return geometry{}, nil, false
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return geometry{}, nil, false
	}
	g, have, ok := decodeBits(data)
	if !ok || g.image != d {
		s.cfg.Log.Warn("drop a damaged piece bitmap", "image", d)
		return geometry{}, nil, false
	}
	return g, have, true
}

// removePartial forgets a .part file. The bitmap goes first: a bitmap alone
// claims nothing, but a bitmap beside a later, other .part file would lie.
func (s *Store) removePartial(d verify.Digest) error {
	if err := durable.Remove(s.bitsPath(d)); err != nil {
		return err
	}
	return durable.Remove(s.partPath(d))
}

// Has says whether the image is held whole.
func (s *Store) Has(d verify.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hasLocked(d)
}

func (s *Store) hasLocked(d verify.Digest) bool {
	_, ok := s.whole[d]
	return ok
}

// HaveBytes says how much of the image is durable and verified, whole or partial.
func (s *Store) HaveBytes(d verify.Digest) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if size, ok := s.whole[d]; ok {
		return size
	}
	if p, ok := s.open[d]; ok {
		return p.durable.Load()
	}
	return s.partial[d]
}

// Open opens a whole image.
func (s *Store) Open(d verify.Digest) (io.ReadCloser, error) {
	if at := s.Placed(d); at != "" {
		return nil, verify.Refuse(verify.CodeNotFound, "open image %s: it lies in slot %s", d, at)
	}
	return s.openWhole(d)
}

func (s *Store) openWhole(d verify.Digest) (*os.File, error) {
	if !s.Has(d) {
		return nil, verify.Refuse(verify.CodeNotFound, "open image %s: not held whole", d)
	}
	f, err := os.Open(s.imagePath(d))
	if err != nil {
		return nil, codeDisk(fmt.Errorf("open image %s: %w", d, err), 0)
	}
	return f, nil
}

// Put stores an image whole from r: space check first (E-SPACE with NeedBytes, before the first byte), hash on the way, fsync, rename.
// An error leaves nothing behind. An image already held is not read again.
func (s *Store) Put(ctx context.Context, rel *verify.Release, img verify.Image, r io.Reader, progress func(done int64)) error {
	if got, ok := rel.Image(img.SHA256); !ok || got.Size != img.Size {
		return verify.Refuse(verify.CodeBundle, "store image %s: it is not part of the release", img.SHA256)
	}
	if name := s.choose(img); name != "" && !s.Has(img.SHA256) {
		return s.putPlace(ctx, img, rel.Pieces(img.SHA256), r, name, progress)
	}
	return s.put(ctx, img, r, progress)
}

// write goes to a file of the store, or to a place.
func (s *Store) write(b *bytesOf, p []byte, off int64) (int, error) {
	if f, ok := b.f.(*os.File); ok {
		return s.writeAt(f, p, off)
	}
	return b.writePlaced(p, off)
}

func (s *Store) put(ctx context.Context, img verify.Image, r io.Reader, progress func(done int64)) error {
	if err := s.promise(img); err != nil || s.Has(img.SHA256) {
		return err
	}
	defer s.unpromise(img.SHA256)
	f, err := durable.Create(s.imagePath(img.SHA256), 0o444)
	if err != nil {
		return codeDisk(err, img.Size)
	}
	defer f.Abort()
	if err := preallocate(f.File, img.Size); err != nil {
		return codeDisk(fmt.Errorf("take space for image %s: %w", img.SHA256, err), img.Size)
	}
	if err := s.copyImage(ctx, f.File, img, r, progress); err != nil {
		return err
	}
	s.step("put: written")
	if err := f.Commit(); err != nil {
		return codeDisk(err, 0)
	}
	s.step("put: committed")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.whole[img.SHA256] = img.Size
	if _, inUse := s.open[img.SHA256]; inUse {
		return nil // its owner removes the .part file
	}
	delete(s.partial, img.SHA256)
	return codeDisk(s.removePartial(img.SHA256), 0)
}

// promise books the space of an image, or says E-SPACE.
func (s *Store) promise(img verify.Image) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.checkSpaceLocked([]verify.Image{img}); err != nil {
		return err
	}
	if !s.hasLocked(img.SHA256) {
		s.promised[img.SHA256] = img.Size
	}
	return nil
}

func (s *Store) unpromise(d verify.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.promised, d)
}

// copyImage writes exactly img.Size bytes with the signed digest, or says what is wrong with them.
func (s *Store) copyImage(ctx context.Context, f *os.File, img verify.Image, r io.Reader, progress func(done int64)) error {
	hash := sha256.New()
	buf := make([]byte, 256<<10)
	var done int64
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("store image %s: %w", img.SHA256, err)
		}
		n, err := r.Read(buf)
		if done+int64(n) > img.Size {
			return verify.Refuse(verify.CodeSize, "store image %s: more than its %d bytes", img.SHA256, img.Size)
		}
		if n > 0 {
			hash.Write(buf[:n])
			if _, err := s.writeAt(f, buf[:n], done); err != nil {
				return codeDisk(fmt.Errorf("write image %s: %w", img.SHA256, err), img.Size-done)
			}
			done += int64(n)
			if progress != nil {
				progress(done)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read image %s: %w", img.SHA256, err)
		}
	}
	if done < img.Size {
		return verify.Refuse(verify.CodeTruncated, "store image %s: %d of %d bytes", img.SHA256, done, img.Size)
	}
	if verify.Digest(hash.Sum(nil)) != img.SHA256 {
		return verify.Refuse(verify.CodeDigest, "store image %s: the bytes are not those that were signed", img.SHA256)
	}
	return nil
}

// Keep stores the head of a release durably.
func (s *Store) Keep(rel *verify.Release) error {
	return codeDisk(durable.WriteFile(s.headPath(rel.ID()), rel.Head(), 0o644), int64(len(rel.Head())))
}

// UnverifiedHeads returns all kept heads; they are checked again at each start.
func (s *Store) UnverifiedHeads() ([][]byte, error) {
	entries, err := os.ReadDir(s.headDir())
	if err != nil {
		return nil, codeDisk(fmt.Errorf("read the kept heads: %w", err), 0)
	}
	var heads [][]byte
	for _, e := range entries {
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, codeDisk(fmt.Errorf("read the kept heads: %w", err), 0)
		}
		if !info.Mode().IsRegular() || !strings.HasSuffix(e.Name(), headSuffix) || info.Size() > verify.MaxHead || len(heads) == maxHeads {
			continue
		}
		head, err := os.ReadFile(filepath.Join(s.headDir(), e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, codeDisk(fmt.Errorf("read a kept head: %w", err), 0)
		}
		heads = append(heads, head)
	}
	return heads, nil
}

// Drop forgets a release's head and those images that no release in keep uses.
// The head goes first: images without a head are swept up by the next Drop or Put,
// but a head without its images would make the device offer what it lacks.
func (s *Store) Drop(rel *verify.Release, keep []*verify.Release) error {
	if err := durable.Remove(s.headPath(rel.ID())); err != nil {
		return codeDisk(fmt.Errorf("drop a release: %w", err), 0)
	}
	for _, img := range rel.Manifest().Images {
		if usedBy(keep, img.SHA256) {
			continue
		}
		if err := s.dropImage(img.SHA256); err != nil {
			return codeDisk(fmt.Errorf("drop image %s: %w", img.SHA256, err), 0)
		}
	}
	return nil
}

func (s *Store) dropImage(d verify.Digest) error {
	if at := s.Placed(d); at != "" {
		if err := s.forgetPlaced(d, at); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.whole, d)
	delete(s.partial, d)
	if p, ok := s.open[d]; ok {
		p.dropped.Store(true)
	}
	if err := s.removePartial(d); err != nil {
		return err
	}
	return durable.Remove(s.imagePath(d))
}
