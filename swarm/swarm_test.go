package swarm

import (
	"log/slog"
	"os"
	"testing"
	"time"
)

func TestFiveDevicesShareOneCopy(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 8<<20+12345, 64<<10, 1)
	var devices []*device
	for _, id := range names(5) {
		devices = append(devices, w.add(id, ""))
	}
	w.seed(devices[0], p)
	for _, d := range devices[1:] {
		d.start(p.img, p.table)
	}
	w.allHave(p, devices...)
	sent := sum(devices[0].transfer(p).Sent)
	t.Logf("first device sent %.3f copies", float64(sent)/float64(p.img.Size))
	if limit := p.img.Size * 12 / 10; sent >= limit {
		t.Errorf("the first device sent %d bytes for an image of %d", sent, p.img.Size)
	}
	for _, d := range devices[1:] {
		tr := d.transfer(p)
		if got := sum(tr.Received); got != p.img.Size {
			t.Errorf("%s received %d verified bytes of %d", d.id, got, p.img.Size)
		}
		if tr.Wasted > p.img.Size/50 {
			t.Errorf("%s wasted %d bytes", d.id, tr.Wasted)
		}
		t.Logf("%s: from %v wasted %d", d.id, tr.Received, tr.Wasted)
	}
}

func TestADeviceInTheMiddleIsKilled(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 12<<20, 64<<10, 2)
	var devices []*device
	for _, id := range names(5) {
		devices = append(devices, w.add(id, "", upLimit(6<<20)))
	}
	w.seed(devices[0], p)
	for _, d := range devices[1:] {
		d.start(p.img, p.table)
	}
	var victim *device
	w.until("a device in the middle is half way", func() bool {
		for _, d := range devices[1:] {
			tr := d.transfer(p)
			if sum(tr.Sent) > 1<<20 && tr.Done > p.img.Size/3 && tr.Parent != devices[0].id {
				victim = d
				return true
			}
		}
		return false
	})
	victim.port.kill()
	w.leave(victim)
	var rest []*device
	for _, d := range devices {
		if d != victim {
			rest = append(rest, d)
		}
	}
	w.allHave(p, rest...)
	if sent := sum(devices[0].transfer(p).Sent); sent >= p.img.Size*13/10 {
		t.Errorf("the first device sent %d bytes for an image of %d", sent, p.img.Size)
	}
}

func TestACorruptSenderIsRefusedAndTheOthersGoOn(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 6<<20, 64<<10, 3)
	good, bad := w.add("good", ""), w.add("bad", "")
	fetchers := []*device{w.add("fetcher-1", ""), w.add("fetcher-2", "")}
	w.seed(good, p)
	w.seed(bad, p)
	rot(t, bad.store.imagePath(p.img.SHA256), p.img.Size)
	for _, d := range fetchers {
		d.start(p.img, p.table)
	}
	w.allHave(p, fetchers...)
	for _, d := range fetchers {
		for range len(d.bad) {
			if id := <-d.bad; id != bad.id {
				t.Errorf("%s blames %s", d.id, id)
			}
		}
		if d.transfer(p).Received[bad.id] == p.img.Size {
			t.Errorf("%s took everything from the corrupt sender", d.id)
		}
	}
}

// rot flips a bit in each 64 KiB of a stored image.
func rot(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	for at := int64(1000); at < size; at += 64 << 10 {
		if _, err := f.ReadAt(b[:], at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x10
		if _, err := f.WriteAt(b[:], at); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTheOnlyCorruptSenderIsNamedOnce(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 1<<20, 64<<10, 4)
	bad, d := w.add("bad", ""), w.add("fetcher", "")
	w.seed(bad, p)
	rot(t, bad.store.imagePath(p.img.SHA256), p.img.Size)
	d.start(p.img, p.table)
	if id := <-d.bad; id != bad.id {
		t.Fatalf("blamed %s", id)
	}
	w.until("the failed bytes are counted", func() bool { return d.transfer(p).Wasted > 0 })
	good := w.add("good", "")
	w.seed(good, p)
	w.allHave(p, d)
	if tr := d.transfer(p); tr.Received[good.id] != p.img.Size || tr.Received[bad.id] != 0 {
		t.Errorf("received %v", tr.Received)
	}
	if len(d.bad) != 0 {
		t.Errorf("blamed again: %s", <-d.bad)
	}
}

func TestAParentThatGoesSilentIsReplaced(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 10<<20, 64<<10, 5)
	var devices []*device
	for _, id := range names(4) {
		devices = append(devices, w.add(id, "", upLimit(5<<20)))
	}
	w.seed(devices[0], p)
	for _, d := range devices[1:] {
		d.start(p.img, p.table)
	}
	var victim *device
	w.until("a device in the middle is half way", func() bool {
		for _, d := range devices[1:] {
			tr := d.transfer(p)
			if sum(tr.Sent) > 1<<20 && tr.Done > p.img.Size/3 {
				victim = d
				return true
			}
		}
		return false
	})
	victim.port.cut.Store(true) // its link is gone, nobody gets a word, it stays in the member lists
	var rest []*device
	for _, d := range devices {
		if d != victim {
			rest = append(rest, d)
		}
	}
	w.allHave(p, rest...)
}

func TestARestartFetchesOnlyWhatIsLacking(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 8<<20, 64<<10, 6)
	source := w.add("source", "", upLimit(4<<20))
	d := w.add("fetcher", "")
	w.seed(source, p)
	d.start(p.img, p.table)
	w.until("half of it is there", func() bool { return d.transfer(p).Done > p.img.Size/2 })
	before := sum(d.transfer(p).Received)
	w.leave(d)
	store, err := OpenStore(StoreConfig{Dir: d.dir})
	if err != nil {
		t.Fatal(err)
	}
	kept := store.HaveBytes(p.img.SHA256)
	if kept < before {
		t.Errorf("%d bytes were verified, %d are kept", before, kept)
	}
	d = w.add("fetcher", d.dir)
	d.start(p.img, p.table)
	w.allHave(p, d)
	// A piece that came just before the end may be found by its hash, so it can be less.
	if got := sum(d.transfer(p).Received); got > p.img.Size-kept {
		t.Errorf("fetched %d bytes, only %d were lacking", got, p.img.Size-kept)
	}
}

// The engine's own limit on unverified bytes counts pieces that no neighbour has
// yet, and starves a chain when the image is larger than the limit (64 MiB).
func TestTheEngineNeverHoldsRequestsBackForUnverifiedBytes(t *testing.T) {
	t.Parallel()
	e, err := newEngine(Config{Self: "a", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer close(e.in.done)
	defer e.cl.Close()
	if c := e.clientConfig(); c.MaxUnverifiedBytes != 0 {
		t.Errorf("MaxUnverifiedBytes is %d", c.MaxUnverifiedBytes)
	}
	if n := len(e.cl.ListenAddrs()); n != 1 {
		t.Errorf("the engine listens on %d addresses, not only on the Network", n)
	}
}

func TestSmallAndOddImages(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	source, d := w.add("source", ""), w.add("fetcher", "")
	for i, size := range []int64{0, 1, 16 << 10, 16<<10 + 1, 64 << 10, 64<<10 + 1, 1<<20 - 1} {
		p := newPicture(t, size, 64<<10, uint64(10+i))
		w.seed(source, p)
		d.start(p.img, p.table)
		w.allHave(p, d)
	}
	large := newPicture(t, 5<<20, 1<<20, 20) // a piece of several chunks
	w.seed(source, large)
	d.start(large.img, large.table)
	w.allHave(large, d)
}

func TestStopEndsServing(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 1<<20, 64<<10, 7)
	source, d := w.add("source", ""), w.add("fetcher", "")
	w.seed(source, p)
	w.until("it is offered", func() bool { return len(source.Holdings()) == 1 })
	source.Stop(p.img.SHA256)
	if len(source.Holdings()) != 0 || len(source.Transfers()) != 0 {
		t.Error("still offered")
	}
	d.start(p.img, p.table)
	source.start(p.img, p.table)
	w.allHave(p, d)
}

// No whole image is near, and what a parent has lies far behind the first lacking piece.
func TestPiecesFarAheadAreTakenWhenThereAreNoOthers(t *testing.T) {
	t.Parallel()
	p := newPicture(t, windowBytes+4<<20, 256<<10, 8)
	dir := t.TempDir()
	b := openTestBytes(t, openTestStore(t, dir), p)
	last := b.g.pieces() - 1
	fill(t, b, p, last-2, last-1, last)
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	for _, ids := range [][2]string{{"a", "b"}, {"b", "a"}} { // whoever is first in the order
		w := newTown(t)
		partial := t.TempDir()
		if err := os.CopyFS(partial, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		a, d := w.add(ids[0], partial), w.add(ids[1], "")
		a.start(p.img, p.table)
		d.start(p.img, p.table)
		w.until("the end is passed on", func() bool { return d.transfer(p).Done == 3*256<<10 })
	}
}

// Words travel slowly, and the devices begin one after the other: each hears of
// the importer before it hears of its neighbours.
func TestAStaggeredStartStillTakesOneCopy(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	w.lag = 300 * time.Millisecond
	p := newPicture(t, 16<<20, 64<<10, 9)
	importer := w.add("importer", "", upLimit(8<<20))
	w.seed(importer, p)
	w.until("the importer offers it", func() bool { return len(importer.Holdings()) == 1 })
	var devices []*device
	for _, id := range names(5) {
		d := w.add(id, "", upLimit(8<<20))
		d.SetMembers([]Member{{ID: importer.id, Holdings: importer.Holdings()}})
		d.start(p.img, p.table)
		devices = append(devices, d)
	}
	w.allHave(p, devices...)
	sent := sum(importer.transfer(p).Sent)
	t.Logf("the importer sent %.3f copies", float64(sent)/float64(p.img.Size))
	if sent >= p.img.Size*12/10 {
		t.Errorf("the importer sent %d bytes for an image of %d", sent, p.img.Size)
	}
}
