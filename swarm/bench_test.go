package swarm

import (
	"testing"
)

// BenchmarkPair moves 256 MiB between two devices without any limit.
func BenchmarkPair(b *testing.B) {
	p := newPicture(b, 256<<20, 64<<10, 40)
	w := newTown(b)
	source := w.add("source", b.TempDir())
	w.seed(source, p)
	b.SetBytes(p.img.Size)
	b.ReportAllocs()
	for b.Loop() {
		d := w.add("fetcher", b.TempDir())
		d.start(p.img, p.table)
		w.until("it is there", func() bool { return d.store.Has(p.img.SHA256) })
		w.leave(d)
	}
}
