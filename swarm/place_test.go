package swarm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"

	"meshupd/verify"
)

// shelf is a place in memory with a power cut: what was not synced is lost then.
type shelf struct {
	mu      sync.Mutex
	now     []byte
	synced  []byte
	fail    error // of the next writes
	writes  int
	written int
}

func newShelf(content []byte) *shelf {
	return &shelf{now: bytes.Clone(content), synced: bytes.Clone(content)}
}

func (s *shelf) ReadAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.NewReader(s.now).ReadAt(p, off)
}

func (s *shelf) WriteAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return 0, s.fail
	}
	s.writes++
	s.written += len(p)
	return copy(s.now[off:], p), nil
}

func (s *shelf) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.synced = bytes.Clone(s.now)
	return nil
}

func (s *shelf) Close() error { return nil }

// shelves put chosen images on one shelf, "b".
type shelves struct {
	*shelf
	images map[verify.Digest]bool
	filled int
}

func (s *shelves) Choose(img verify.Image) string {
	if s.images[img.SHA256] {
		return "b"
	}
	return ""
}

func (s *shelves) Fill(context.Context, string, verify.Image) (Place, error) {
	s.filled++
	return s.shelf, nil
}

func (s *shelves) Serve(string, verify.Image) (Place, error) { return s.shelf, nil }

func openPlaceStore(t *testing.T, dir string, at *shelves) *Store {
	t.Helper()
	s, err := OpenStore(StoreConfig{Dir: dir, Places: at})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// feed writes pieces as the engine does.
func feed(t *testing.T, b *bytesOf, p picture, pieces ...int) {
	t.Helper()
	for _, i := range pieces {
		at := int64(i) * b.g.length
		if _, err := b.write(p.data[at:at+b.g.pieceSize(i)], at); err != nil {
			t.Fatal(err)
		}
		if ok, err := b.checkPiece(i); err != nil || !ok {
			t.Fatalf("piece %d: %v, %v", i, ok, err)
		}
		b.setPiece(i)
	}
}

func onShelf(images ...picture) *shelves {
	at := &shelves{shelf: newShelf(make([]byte, 2<<20)), images: map[verify.Digest]bool{}}
	for _, p := range images {
		at.images[p.img.SHA256] = true
	}
	return at
}

func TestPlaceIsFilledServedAndKeptWithoutACopy(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 1<<20+500, 64<<10, 40)
	at := onShelf(p)
	s := openPlaceStore(t, t.TempDir(), at)
	b, err := s.openBytes(t.Context(), p.img, p.table)
	if err != nil {
		t.Fatal(err)
	}
	feed(t, b, p, 0, 1, 2)
	if err := b.close(); err != nil { // a stop: what is there is claimed
		t.Fatal(err)
	}
	s = openPlaceStore(t, s.cfg.Dir, at)
	if have := s.HaveBytes(p.img.SHA256); have != 3*64<<10 || s.Placed(p.img.SHA256) != "b" {
		t.Fatalf("after a restart %d bytes are held", have)
	}
	if b, err = s.openBytes(t.Context(), p.img, p.table); err != nil {
		t.Fatal(err)
	}
	for i := 3; i < b.g.pieces(); i++ {
		feed(t, b, p, i)
	}
	if err := b.run(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if !s.Has(p.img.SHA256) || !bytes.Equal(at.now[:len(p.data)], p.data) {
		t.Fatal("it is not whole in its place")
	}
	for _, name := range files(t, s) {
		if name != p.img.SHA256.String()+".at-b" {
			t.Errorf("the store has %s", name)
		}
	}
	got := make([]byte, len(p.data))
	if n, err := b.readAt(got, 0); n != len(got) || err != nil || !bytes.Equal(got, p.data) {
		t.Fatalf("served %d bytes: %v", n, err)
	}
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	// And after a start, when the slot may run.
	s = openPlaceStore(t, s.cfg.Dir, at)
	filled := at.filled
	if b, err = s.openBytes(t.Context(), p.img, p.table); err != nil || at.filled != filled {
		t.Fatalf("opened for writing, or not at all: %v", err)
	}
	at.now[70000] ^= 1 // the running system writes to its root
	if _, err := b.readAt(got[:100], 0); err != nil {
		t.Errorf("a piece that is right: %v", err)
	}
	if _, err := b.readAt(got[:100], 70000); verify.CodeOf(err) != verify.CodeSlot || s.Has(p.img.SHA256) {
		t.Errorf("a piece that was changed was served, or is still offered: %v", err)
	}
}

func TestPlaceThatChangedWhileNobodyLookedIsNotOffered(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 1<<20, 64<<10, 41)
	at := onShelf(p)
	s := openPlaceStore(t, t.TempDir(), at)
	if err := s.putPlace(t.Context(), p.img, p.table, bytes.NewReader(p.data), "b", nil); err != nil {
		t.Fatal(err)
	}
	at.now[5] ^= 1
	s = openPlaceStore(t, s.cfg.Dir, at)
	if _, err := s.openBytes(t.Context(), p.img, p.table); verify.CodeOf(err) != verify.CodeSlot || s.Has(p.img.SHA256) {
		t.Fatalf("%v", err)
	}
	// To be installed again, it is looked at piece by piece, and only the bad one is missing.
	b, err := s.openBytes(t.Context(), p.img, p.table)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if n, whole := b.bytesVerified(); n != p.img.Size-64<<10 || whole || b.hasPiece(0) {
		t.Errorf("%d bytes are verified", n)
	}
}

func TestPlaceFindsWhatTheOlderImageHasInCommon(t *testing.T) {
	t.Parallel()
	old := newPicture(t, 1<<20, 64<<10, 42)
	p := old
	p.data = bytes.Clone(old.data)
	p.data[300<<10] ^= 1
	p = pictureOf(p.data, 64<<10)
	at := onShelf(p)
	copy(at.now, old.data)
	s := openPlaceStore(t, t.TempDir(), at)
	b, err := s.openBytes(t.Context(), p.img, p.table)
	if err != nil {
		t.Fatal(err)
	}
	if n, _ := b.bytesVerified(); n != 15*64<<10 || b.hasPiece(4) {
		t.Fatalf("%d bytes need not come again", n)
	}
	feed(t, b, p, 4)
	if err := b.run(t.Context(), nil); err != nil || at.writes != 1 {
		t.Fatalf("%d writes: %v", at.writes, err)
	}
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
}

// A place goes to another image: nothing of the first one may be believed, served or written from then on, whatever is cut where.
func TestPlaceGoesToAnotherImage(t *testing.T) {
	t.Parallel()
	p, q := newPicture(t, 1<<20, 64<<10, 43), newPicture(t, 1<<20, 64<<10, 44)
	at := onShelf(p, q)
	s := openPlaceStore(t, t.TempDir(), at)
	if err := s.putPlace(t.Context(), p.img, p.table, bytes.NewReader(p.data), "b", nil); err != nil {
		t.Fatal(err)
	}
	serving, err := s.openBytes(t.Context(), p.img, p.table)
	if err != nil {
		t.Fatal(err)
	}
	s.step = func(name string) {
		if name == "place: others forgotten" {
			if cut := openPlaceStore(t, s.cfg.Dir, at); cut.Has(p.img.SHA256) || cut.HaveBytes(p.img.SHA256) != 0 {
				t.Error("a cut before the first write leaves a claim of the old image")
			}
		}
	}
	filling, err := s.openBytes(t.Context(), q.img, q.table)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := serving.readAt(make([]byte, 10), 0); verify.CodeOf(err) != verify.CodeNotFound || s.Has(p.img.SHA256) {
		t.Errorf("the old image is still served: %v", err)
	}
	if err := serving.close(); err != nil {
		t.Error(err)
	}
	feed(t, filling, q, 0, 1)
	if err := s.ForgetPlace("b", verify.Digest{}); err != nil { // a copy is about to be written there
		t.Fatal(err)
	}
	if _, err := filling.write(q.data[:10], 0); err == nil {
		t.Error("written to a place that was taken away")
	}
	if err := filling.close(); err != nil {
		t.Error(err)
	}
	if left := files(t, s); len(left) != 0 {
		t.Errorf("claims are left: %v", left)
	}
}

func TestPlaceCutsAndFaults(t *testing.T) {
	t.Parallel()
	p := newPicture(t, 1<<20, 64<<10, 45)
	for _, name := range []string{"checkpoint: data synced", "checkpoint: bitmap replaced", "place: synced", "place: claimed"} {
		at := onShelf(p)
		s := openPlaceStore(t, t.TempDir(), at)
		b, err := s.openBytes(t.Context(), p.img, p.table)
		if err != nil {
			t.Fatal(err)
		}
		cuts := 0
		s.step = func(step string) {
			if step != name {
				return
			}
			cuts++
			then := &shelves{shelf: newShelf(at.synced), images: at.images}
			after := openPlaceStore(t, s.cfg.Dir, then)
			claimed := after.HaveBytes(p.img.SHA256)
			c, err := after.openBytes(context.Background(), p.img, p.table)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			if n, _ := c.bytesVerified(); n < claimed {
				t.Errorf("%s: %d bytes were claimed, %d hold", name, claimed, n)
			}
			for i := range c.g.pieces() {
				if ok, err := c.checkPiece(i); c.hasPiece(i) && (!ok || err != nil) {
					t.Errorf("%s: piece %d does not hold: %v", name, i, err)
				}
			}
		}
		feed(t, b, p, 0, 1, 2, 5)
		if err := b.checkpoint(); err != nil {
			t.Fatal(err)
		}
		for i := range b.g.pieces() {
			feed(t, b, p, i)
		}
		if err := b.run(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if cuts == 0 {
			t.Errorf("%s never happened", name)
		}
	}
	at := onShelf(p)
	s := openPlaceStore(t, t.TempDir(), at)
	at.fail = syscall.EIO
	err := s.putPlace(t.Context(), p.img, p.table, bytes.NewReader(p.data), "b", nil)
	if verify.CodeOf(err) != verify.CodeIO || s.Has(p.img.SHA256) {
		t.Errorf("a medium that fails: %v", err)
	}
	at.fail = nil
	wrong := bytes.Clone(p.data)
	wrong[200<<10] ^= 1
	for _, c := range []struct {
		r    io.Reader
		code verify.Code
	}{
		{bytes.NewReader(wrong), verify.CodeDigest},
		{bytes.NewReader(p.data[:1000]), verify.CodeTruncated},
		{bytes.NewReader(append(bytes.Clone(p.data), 0)), verify.CodeSize},
	} {
		err := s.putPlace(t.Context(), p.img, p.table, c.r, "b", nil)
		if verify.CodeOf(err) != c.code || s.Has(p.img.SHA256) {
			t.Errorf("%v, want %s", err, c.code)
		}
		if at.now[200<<10] == wrong[200<<10] {
			t.Error("a byte that was not signed is in the slot")
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if err := s.putPlace(ctx, p.img, p.table, bytes.NewReader(p.data), "b", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
	// Without the mode nobody forgets for the others that write there.
	if s, err = OpenStore(StoreConfig{Dir: s.cfg.Dir}); err != nil || len(files(t, s)) != 0 {
		t.Errorf("claims are left: %v, %v", files(t, s), err)
	}
}
