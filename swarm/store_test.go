package swarm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"meshupd/verify"
)

func openTestStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := OpenStore(StoreConfig{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// files lists what is in a store's image folder.
func files(t *testing.T, s *Store) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(s.imageDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestPutRefusesAndLeavesNothing(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 300<<10, 64<<10, 1)
	wrong := bytes.Clone(p.data)
	wrong[7777] ^= 1
	broken := errors.New("stick pulled out")
	for _, c := range []struct {
		name string
		r    io.Reader
		code verify.Code
	}{
		{"too short", bytes.NewReader(p.data[:1000]), verify.CodeTruncated},
		{"too long", bytes.NewReader(append(bytes.Clone(p.data), 0)), verify.CodeSize},
		{"other bytes", bytes.NewReader(wrong), verify.CodeDigest},
		{"read error", io.MultiReader(bytes.NewReader(p.data[:500]), iotest.ErrReader(broken)), ""},
	} {
		s := openTestStore(t, t.TempDir())
		err := s.put(context.Background(), p.img, c.r, nil)
		if err == nil || verify.CodeOf(err) != c.code {
			t.Errorf("%s: %v", c.name, err)
		}
		if left := files(t, s); len(left) != 0 || s.Has(p.img.SHA256) {
			t.Errorf("%s: left %v", c.name, left)
		}
	}
}

func TestPutStoresOnceAndReadsBack(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 300<<10, 64<<10, 2)
	s := openTestStore(t, t.TempDir())
	var last int64
	if err := s.put(context.Background(), p.img, bytes.NewReader(p.data), func(n int64) { last = n }); err != nil {
		t.Fatal(err)
	}
	if err := s.put(context.Background(), p.img, iotest.ErrReader(errors.New("read again")), nil); err != nil {
		t.Errorf("an image already held: %v", err)
	}
	r, err := s.Open(p.img.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, p.data) {
		t.Errorf("read back: %v", err)
	}
	info, err := os.Stat(s.imagePath(p.img.SHA256))
	if err != nil || info.Mode().Perm() != 0o444 || last != p.img.Size || s.HaveBytes(p.img.SHA256) != p.img.Size {
		t.Errorf("mode %v, progress %d, have %d, %v", info.Mode(), last, s.HaveBytes(p.img.SHA256), err)
	}
	if !openTestStore(t, s.cfg.Dir).Has(p.img.SHA256) {
		t.Error("forgotten after a restart")
	}
}

func TestSpaceIsRefusedBeforeTheFirstByte(t *testing.T) {
	t.Parallel()
	p, q := newPicture(t, 1<<20, 64<<10, 3), newPicture(t, 1<<20, 64<<10, 4)
	s := openTestStore(t, t.TempDir())
	s.cfg.Reserve = 1 << 20
	s.free = func() (int64, error) { return 2<<20 + 10, nil }
	if err := s.CheckSpace(p.img); err != nil {
		t.Errorf("one fits: %v", err)
	}
	err := s.CheckSpace(p.img, q.img, p.img)
	var r *verify.Refusal
	if !errors.As(err, &r) || r.Code != verify.CodeSpace || r.NeedBytes != 1<<20-10 {
		t.Errorf("two do not fit: %v %+v", err, r)
	}
	s.free = func() (int64, error) { return 1 << 20, nil }
	err = s.put(context.Background(), p.img, iotest.ErrReader(errors.New("a byte was read")), nil)
	if verify.CodeOf(err) != verify.CodeSpace {
		t.Errorf("put: %v", err)
	}
	// What another transfer has booked is gone too.
	s.free = func() (int64, error) { return 2<<20 + 10, nil }
	if err := s.promise(p.img); err != nil {
		t.Fatal(err)
	}
	if err := s.CheckSpace(q.img); verify.CodeOf(err) != verify.CodeSpace {
		t.Errorf("booked space was given away: %v", err)
	}
}

func TestPutOnAFullDisk(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 1<<20, 64<<10, 5)
	for _, c := range []struct {
		err  error
		code verify.Code
	}{{syscall.ENOSPC, verify.CodeSpace}, {syscall.EIO, verify.CodeIO}} {
		s := openTestStore(t, t.TempDir())
		s.writeAt = func(f *os.File, b []byte, off int64) (int, error) {
			if off >= 512<<10 {
				return 0, &os.PathError{Op: "write", Path: f.Name(), Err: c.err}
			}
			return f.WriteAt(b, off)
		}
		err := s.put(context.Background(), p.img, bytes.NewReader(p.data), nil)
		if verify.CodeOf(err) != c.code || !errors.Is(err, c.err) || len(files(t, s)) != 0 {
			t.Errorf("%v: %v, left %v", c.err, err, files(t, s))
		}
	}
}

// fill writes pieces into an open part file, as the engine does.
func fill(t *testing.T, b *bytesOf, p picture, pieces ...int) {
	t.Helper()
	for _, i := range pieces {
		at := int64(i) * p.table.Length
		if _, err := b.write(p.data[at:at+b.g.pieceSize(i)], at); err != nil {
			t.Fatal(err)
		}
		if ok, err := b.checkPiece(i); err != nil || !ok {
			t.Fatalf("piece %d: %v %v", i, ok, err)
		}
		b.setPiece(i)
	}
}

func count(n int) (list []int) {
	for i := range n {
		list = append(list, i)
	}
	return list
}

func openTestBytes(t *testing.T, s *Store, p picture) *bytesOf {
	t.Helper()
	b, err := s.openBytes(context.Background(), p.img, p.table)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// After each step of a fetch the store is copied, as a power cut would leave it,
// and opened again: no piece that the bitmap claims may be lost, nothing that is
// not right may be trusted.
func TestACutBetweenAnyTwoStepsLosesNothingThatWasClaimed(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 640<<10, 64<<10, 6)
	s := openTestStore(t, t.TempDir())
	type cut struct {
		step    string
		dir     string
		claimed int64
	}
	var cuts []cut
	b := openTestBytes(t, s, p)
	s.step = func(name string) {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(s.cfg.Dir)); err != nil {
			t.Fatal(err)
		}
		cuts = append(cuts, cut{name, dir, b.durable.Load()})
	}
	fill(t, b, p, 0, 1, 2)
	if err := b.checkpoint(); err != nil {
		t.Fatal(err)
	}
	fill(t, b, p, 3, 5, 4, 9)
	if err := b.checkpoint(); err != nil {
		t.Fatal(err)
	}
	fill(t, b, p, 6, 7, 8)
	if err := b.run(context.Background(), func(int) { t.Error("a piece was lost") }); err != nil {
		t.Fatal(err)
	}
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	if len(cuts) != 7 {
		t.Errorf("%d steps", len(cuts))
	}
	for _, c := range cuts {
		again := openTestStore(t, c.dir)
		if got := again.HaveBytes(p.img.SHA256); got < c.claimed {
			t.Errorf("%s: %d bytes were claimed, %d are left", c.step, c.claimed, got)
		}
		b := openTestBytes(t, again, p)
		for i := range b.g.pieces() {
			if ok, err := b.checkPiece(i); b.hasPiece(i) && (!ok || err != nil) {
				t.Errorf("%s: piece %d is trusted and wrong (%v)", c.step, i, err)
			} else if !b.hasPiece(i) {
				fill(t, b, p, i)
			}
		}
		if !b.whole {
			if err := b.run(context.Background(), func(int) {}); err != nil {
				t.Errorf("%s: %v", c.step, err)
			}
		}
		if err := b.close(); err != nil {
			t.Errorf("%s: %v", c.step, err)
		}
		if got := files(t, again); len(got) != 1 || got[0] != p.img.SHA256.String() {
			t.Errorf("%s: left %v", c.step, got)
		}
	}
}

func TestADamagedBitmapIsDroppedAndThePiecesHashed(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 640<<10, 64<<10, 7)
	s := openTestStore(t, t.TempDir())
	b := openTestBytes(t, s, p)
	fill(t, b, p, 0, 1, 7)
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(s.bitsPath(p.img.SHA256))
	if err != nil {
		t.Fatal(err)
	}
	data[bitsHeader] ^= 0x04 // claims piece 2
	if err := os.WriteFile(s.bitsPath(p.img.SHA256), data, 0o644); err != nil {
		t.Fatal(err)
	}
	s = openTestStore(t, s.cfg.Dir)
	if got := s.HaveBytes(p.img.SHA256); got != 0 {
		t.Errorf("%d bytes believed on a damaged bitmap", got)
	}
	b = openTestBytes(t, s, p)
	defer b.close()
	for i := range b.g.pieces() {
		if want := i == 0 || i == 1 || i == 7; b.hasPiece(i) != want {
			t.Errorf("piece %d: %v", i, b.hasPiece(i))
		}
	}
}

func TestABitmapOfAnotherCutIsNotBelieved(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 640<<10, 64<<10, 8)
	s := openTestStore(t, t.TempDir())
	b := openTestBytes(t, s, p)
	fill(t, b, p, count(5)...)
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	other := newPicture(t, 640<<10, 32<<10, 8) // same bytes, other pieces
	b = openTestBytes(t, s, other)
	defer b.close()
	if got, _ := b.bytesVerified(); got != 5*64<<10 {
		t.Errorf("%d bytes found by hashing", got)
	}
}

func TestBytesThatDecayedAfterTheirCheckAreFetchedAgain(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 640<<10, 64<<10, 9)
	s := openTestStore(t, t.TempDir())
	b := openTestBytes(t, s, p)
	fill(t, b, p, count(10)...)
	if _, err := b.f.WriteAt([]byte{p.data[70000] ^ 1}, 70000); err != nil {
		t.Fatal(err)
	}
	var lost []int
	ctx, cancel := context.WithCancel(context.Background())
	err := b.run(ctx, func(i int) { lost = append(lost, i); cancel() })
	if !errors.Is(err, context.Canceled) || len(lost) != 1 || lost[0] != 1 || s.Has(p.img.SHA256) {
		t.Fatalf("lost %v, %v", lost, err)
	}
	fill(t, b, p, 1)
	if err := b.run(context.Background(), func(int) {}); err != nil || !s.Has(p.img.SHA256) {
		t.Errorf("after the piece came again: %v", err)
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
}

func TestAManifestThatContradictsItselfIsRefusedAtTheEnd(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 640<<10, 64<<10, 10)
	p.img.SHA256[0] ^= 1
	s := openTestStore(t, t.TempDir())
	b := openTestBytes(t, s, p)
	fill(t, b, p, count(10)...)
	err := b.run(context.Background(), func(int) {})
	if verify.CodeOf(err) != verify.CodeDigest || s.Has(p.img.SHA256) {
		t.Errorf("%v", err)
	}
	if err := b.close(); err != nil {
		t.Error(err)
	}
	if got := files(t, s); len(got) != 0 {
		t.Errorf("left %v", got)
	}
}

func TestStoreSweepsLeftovers(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 100<<10, 64<<10, 11)
	s := openTestStore(t, t.TempDir())
	name := p.img.SHA256.String()
	for _, left := range []string{"." + name + ".tmp-123", name + bitsSuffix, "README"} {
		if err := os.WriteFile(filepath.Join(s.imageDir(), left), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s = openTestStore(t, s.cfg.Dir)
	if got := strings.Join(files(t, s), " "); got != "README" {
		t.Errorf("left %s", got)
	}
}

func TestATransferStopsOnADiskErrorAndTheRestGoesOn(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p, q := newPicture(t, 2<<20, 64<<10, 12), newPicture(t, 2<<20, 64<<10, 13)
	source, d := w.add("source", ""), w.add("fetcher", "")
	d.store.writeAt = func(f *os.File, b []byte, off int64) (int, error) {
		if strings.HasPrefix(filepath.Base(f.Name()), p.img.SHA256.String()) && off >= 1<<20 {
			return 0, &os.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
		}
		return f.WriteAt(b, off)
	}
	w.seed(source, p)
	w.seed(source, q)
	d.start(p.img, p.table)
	d.start(q.img, q.table)
	w.until("the transfer stops with its reason", func() bool { return verify.CodeOf(d.transfer(p).Err) == verify.CodeSpace })
	w.allHave(q, d)
	for _, h := range d.Holdings() {
		if h.Image == p.img.SHA256 {
			t.Error("still offers the image that could not be written")
		}
	}
}

func FuzzBitmap(f *testing.F) {
	p := newPicture(f, 640<<10+5, 64<<10, 14)
	g := geometryOf(p.img)
	have := newPieceSet(g.pieces())
	f.Add(encodeBits(g, have))
	have.add(0)
	have.add(10)
	f.Add(encodeBits(g, have))
	f.Add([]byte(bitsMagic))
	f.Add(encodeBits(geometry{length: minPiece}, nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		g, have, ok := decodeBits(data)
		if !ok {
			return
		}
		if !bytes.Equal(encodeBits(g, have), data) {
			t.Error("a second spelling of the same bitmap")
		}
		if n := g.bytesIn(have); n < 0 || n > g.size {
			t.Errorf("claims %d of %d bytes", n, g.size)
		}
	})
}
