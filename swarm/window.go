package swarm

import (
	"sync"

	"github.com/anacrolix/torrent"
)

// windowBytes is how far ahead of the first lacking piece the engine is told to
// want pieces.
const windowBytes = 16 << 20

// window tells the engine which pieces to want: all of them in strict index
// order, but only so far ahead. For each refill of requests the engine looks at
// every piece that it wants and the parent lacks, so wanting all pieces of a
// large image costs a chain more CPU than moving the bytes.
type window struct {
	g geometry

	mu  sync.Mutex
	tor *torrent.Torrent
	end int // pieces before it are wanted
}

// open is called when the engine knows the torrent.
func (w *window) open(tor *torrent.Torrent) {
	w.mu.Lock()
	w.tor = tor
	w.mu.Unlock()
}

// advance wants the pieces that come into reach when everything before from is there.
func (w *window) advance(from int64) { w.wantUntil((from + windowBytes) / w.g.length) }

// all wants everything: the parent has nothing in reach, but pieces behind.
func (w *window) all() { w.wantUntil(int64(w.g.pieces())) }

func (w *window) wantUntil(end int64) {
	w.mu.Lock()
	tor, begin := w.tor, w.end
	if tor != nil {
		w.end = max(w.end, int(min(end, int64(w.g.pieces()))))
	}
	end = int64(w.end)
	w.mu.Unlock()
	if tor == nil {
		return
	}
	// Readahead is the one priority that means strict index order; Normal shuffles.
	for i := begin; i < int(end); i++ {
		tor.Piece(i).SetPriority(torrent.PiecePriorityReadahead)
	}
}
