package swarm

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"github.com/anacrolix/torrent"
)

// counts is what went over the wire for one image. transfer.mu guards it.
type counts struct {
	raw, useful int64 // piece payload that came, and the part of it that was not here yet
	failed      int64 // payload of pieces whose hash was wrong
	received    map[string]int64
	pending     map[int]map[string]int64 // by piece that is not verified yet, and sender
	sent        map[string]int64         // over connections that ended
	retired     []retired                // connections that ended, not yet in sent
	newFailed   bool                     // a piece failed, or was right after it failed: see whom the engine banned
	troubled    map[int]bool             // pieces that failed before

	moved   time.Time // when bytes last moved
	samples []sample
}

type retired struct {
	id string
	pc *torrent.PeerConn
}

// sample is a reading of both totals, for the rates.
type sample struct {
	at       time.Time
	down, up int64
}

func newCounts() counts {
	return counts{
		received: map[string]int64{}, pending: map[int]map[string]int64{}, sent: map[string]int64{},
		troubled: map[int]bool{}, moved: time.Now(),
	}
}

// rateWindow is how far back a rate looks.
const rateWindow = 5 * time.Second

// note adds a reading and says whether bytes moved since the one before.
func (c *counts) note(now time.Time, up int64) bool {
	last := sample{}
	if n := len(c.samples); n > 0 {
		last = c.samples[n-1]
	}
	moved := last.down != c.useful || last.up != up
	if moved {
		c.moved = now
	}
	c.samples = append(c.samples, sample{now, c.useful, up})
	// The newest sample that is older than the window stays: the rate is measured from it.
	for len(c.samples) > 2 && now.Sub(c.samples[1].at) >= rateWindow {
		c.samples = c.samples[1:]
	}
	return moved
}

func (c *counts) rates(now time.Time) (down, up float64) {
	if len(c.samples) < 2 {
		return 0, 0
	}
	first, last := c.samples[0], c.samples[len(c.samples)-1]
	if now.Sub(c.moved) > rateWindow {
		return 0, 0
	}
	span := max(now.Sub(first.at), flowInterval).Seconds()
	return float64(last.down-first.down) / span, float64(last.up-first.up) / span
}

func (c *counts) downRate(now time.Time) float64 {
	down, _ := c.rates(now)
	return down
}

func (c *counts) retire(id string, pc *torrent.PeerConn) {
	c.retired = append(c.retired, retired{id, pc})
}

// The engine's callbacks. They come with the client's lock held and must be short.

func (t *transfer) receivedRaw(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.raw += int64(n)
}

func (t *transfer) receivedUseful(a *peerAddr, piece int, n int64) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	c := &t.counts
	c.useful += n
	if c.pending[piece] == nil {
		c.pending[piece] = map[string]int64{}
	}
	c.pending[piece][a.id] += n
	l := t.links[a]
	if l == nil {
		return
	}
	first := l.useful.IsZero()
	if first || now.Sub(c.moved) > longLook/4 {
		t.poke() // the old parent can go now, or the next look is far off
	}
	if first {
		delete(t.retries, a.id)
		if t.suspects[a.id].is == doubtful {
			delete(t.suspects, a.id)
		}
	}
	l.useful = now
}

// pieceGood and pieceBad come from the storage, without the client's lock.

func (t *transfer) pieceGood(i int) {
	t.bytes.setPiece(i)
	t.want.advance(t.bytes.prefix())
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, n := range t.counts.pending[i] {
		t.counts.received[id] += n
	}
	delete(t.counts.pending, i)
	if t.counts.troubled[i] {
		// Now that the right bytes are known, the engine may know who sent the wrong ones.
		delete(t.counts.troubled, i)
		t.counts.newFailed = true
		t.poke()
	}
}

func (t *transfer) pieceBad(i int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range t.counts.pending[i] {
		t.counts.failed += n
	}
	delete(t.counts.pending, i)
	t.counts.troubled[i] = true
	t.counts.newFailed = true
	t.poke()
}

// sentSoFar reads the upload totals by device. It takes the client's lock, so no other may be held.
func (t *transfer) sentSoFar() map[string]int64 {
	t.mu.Lock()
	ended := t.counts.retired
	t.counts.retired = nil
	live := slices.Collect(maps.Values(t.links))
	t.mu.Unlock()
	read := func(pc *torrent.PeerConn) int64 {
		stats := pc.Stats()
		return stats.BytesWrittenData.Int64()
	}
	folded := make([]int64, len(ended))
	for i, r := range ended {
		folded[i] = read(r.pc)
	}
	now := map[string]int64{}
	for _, l := range live {
		now[l.addr.id] += read(l.pc)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, r := range ended {
		t.counts.sent[r.id] += folded[i]
	}
	for id, n := range t.counts.sent {
		now[id] += n
	}
	return now
}

// measure takes a reading for the rates and says whether bytes moved.
func (t *transfer) measure(now time.Time) bool {
	var up int64
	for _, n := range t.sentSoFar() {
		up += n
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts.note(now, up)
}

func (t *transfer) holding() (Holding, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.opened || !t.claimed || t.err != nil {
		return Holding{}, false
	}
	have, whole := t.bytes.bytesVerified()
	return Holding{Image: t.g.image, Rank: t.rank, Have: have, Complete: whole && t.whole}, true
}

func (t *transfer) status() Transfer {
	t.mu.Lock()
	opened := t.opened
	t.mu.Unlock()
	out := Transfer{Image: t.g.image, Size: t.g.size, Started: t.begun}
	if opened {
		out.Sent = t.sentSoFar()
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if opened {
		out.Done, _ = t.bytes.bytesVerified()
	}
	out.Complete, out.Err = t.whole, t.err
	out.DownRate, out.UpRate = t.counts.rates(now)
	out.Received = maps.Clone(t.counts.received)
	out.Wasted = t.counts.raw - t.counts.useful + t.counts.failed
	out.From = slices.SortedFunc(maps.Keys(out.Received), func(a, b string) int {
		return cmp.Or(cmp.Compare(out.Received[b], out.Received[a]), cmp.Compare(a, b))
	})
	if t.parent != nil && !t.whole {
		out.Parent = t.parent.addr.id
	}
	return out
}
