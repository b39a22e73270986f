package swarm

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// A release that went through the door: stored, offered, fetched, kept, dropped.
func TestAReleaseFromTheStickToANeighbour(t *testing.T) {
	t.Parallel()
	vendor := verifytest.NewVendor(t, "edge")
	rel, data := vendor.Verified(t, verifytest.Opts{})
	img := rel.Manifest().Images[0]
	w := newTown(t)
	a, b := w.add("a", ""), w.add("b", "")

	if err := a.store.CheckSpace(rel.Manifest().Images...); err != nil {
		t.Fatal(err)
	}
	if err := a.store.Put(context.Background(), rel, img, bytes.NewReader(data), nil); err != nil {
		t.Fatal(err)
	}
	foreign := img
	foreign.SHA256[0] ^= 1
	if err := a.store.Put(context.Background(), rel, foreign, bytes.NewReader(data), nil); verify.CodeOf(err) != verify.CodeBundle {
		t.Errorf("an image of another release was stored: %v", err)
	}
	if err := a.store.Keep(rel); err != nil {
		t.Fatal(err)
	}
	b.Seed(rel, img.SHA256) // nothing to serve yet
	if len(b.Transfers()) != 0 {
		t.Error("serves what it does not hold")
	}
	a.Seed(rel, img.SHA256)
	a.Seed(rel, img.SHA256)
	b.Fetch(rel, img.SHA256)
	b.Fetch(rel, img.SHA256)
	w.until("the neighbour has it", func() bool { return b.store.Has(img.SHA256) })
	r, err := b.store.Open(img.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, data) {
		t.Errorf("other bytes (%v)", err)
	}

	again := openTestStore(t, a.dir)
	heads, err := again.UnverifiedHeads()
	if err != nil || len(heads) != 1 || !bytes.Equal(heads[0], rel.Head()) {
		t.Errorf("%d heads kept (%v)", len(heads), err)
	}
	if err := again.Drop(rel, []*verify.Release{rel}); err != nil || !again.Has(img.SHA256) {
		t.Errorf("dropped an image that is still used (%v)", err)
	}
	if err := again.Drop(rel, nil); err != nil || again.Has(img.SHA256) || len(files(t, again)) != 0 {
		t.Errorf("kept an image that nobody uses (%v)", err)
	}
	if heads, err := again.UnverifiedHeads(); err != nil || len(heads) != 0 {
		t.Errorf("%d heads left (%v)", len(heads), err)
	}
}

// An import finishes while the same image is being fetched.
func TestAnImageThatArrivesByOtherMeansIsServed(t *testing.T) {
	t.Parallel()
	vendor := verifytest.NewVendor(t, "edge")
	rel, data := vendor.Verified(t, verifytest.Opts{})
	img := rel.Manifest().Images[0]
	w := newTown(t)
	a, b := w.add("a", ""), w.add("b", "")
	a.Fetch(rel, img.SHA256)
	w.until("it waits for someone who has it", func() bool { return len(a.Holdings()) == 1 })
	if err := a.store.Put(context.Background(), rel, img, bytes.NewReader(data), nil); err != nil {
		t.Fatal(err)
	}
	a.Seed(rel, img.SHA256)
	b.Fetch(rel, img.SHA256)
	w.until("the neighbour has it", func() bool { return b.store.Has(img.SHA256) })
	if got := files(t, a.store); len(got) != 1 {
		t.Errorf("left %v", got)
	}
}

func TestChangedIsNotCalledTooOften(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 6<<20, 64<<10, 50)
	var calls atomic.Int64
	source := w.add("source", "", upLimit(3<<20))
	d := w.add("fetcher", "", func(c *Config) {
		told := c.Changed
		c.Changed = func() { calls.Add(1); told() }
	})
	w.seed(source, p)
	begin := time.Now()
	d.start(p.img, p.table)
	w.allHave(p, d)
	// Four a second while bytes flow, and a handful for the changes of state.
	if limit := int64(time.Since(begin)/flowInterval) + 12; calls.Load() > limit {
		t.Errorf("%d calls, at most %d expected", calls.Load(), limit)
	}
}

func TestRatesAreMeasuredOverTheWindow(t *testing.T) {
	t.Parallel()
	c := newCounts()
	now := time.Now()
	for range 40 {
		c.useful += 1 << 20
		now = now.Add(250 * time.Millisecond)
		c.note(now, 0)
	}
	if down, up := c.rates(now); down < 3.9*(1<<20) || down > 4.1*(1<<20) || up != 0 {
		t.Errorf("%f %f, not 4 MiB/s", down, up)
	}
	if len(c.samples) > 25 {
		t.Errorf("%d samples kept", len(c.samples))
	}
	if down, _ := c.rates(now.Add(time.Minute)); down != 0 {
		t.Errorf("%f long after the last byte", down)
	}
}
