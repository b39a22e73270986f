package bootlab

import "hash/maphash"

// medium is a disk in memory that knows at any time whether a partition is one that it was before: the sum of a partition is that
// of the hashes of its blocks with their places, so that a write costs its own length only.
type medium struct {
	data []byte
	seed maphash.Seed
	sums map[int]uint64
}

const mediumBlock = 4096

// DiskSize is that of a whole disk.
func DiskSize() int64 { return diskSize }

// PartAt is the first byte of a partition.
func PartAt(n int) int64 { return layout[n].at }

func newMedium(data []byte) *medium {
	m := &medium{data: append([]byte(nil), data...), seed: maphash.MakeSeed(), sums: make(map[int]uint64)}
	for n, e := range layout {
		for at := e.at; at < e.at+e.size; at += mediumBlock {
			m.sums[n] += m.block(at)
		}
	}
	return m
}

func (m *medium) block(at int64) uint64 {
	var h maphash.Hash
	h.SetSeed(m.seed)
	var place [8]byte
	for i := range place {
		place[i] = byte(at >> (8 * i))
	}
	_, _ = h.Write(place[:])
	_, _ = h.Write(m.data[at:min(at+mediumBlock, int64(len(m.data)))])
	return h.Sum64()
}

// partOf is the partition that a block lies in, or 0.
func partOf(at int64) int {
	for n, e := range layout {
		if at >= e.at && at < e.at+e.size {
			return n
		}
	}
	return 0
}

func (m *medium) apply(e Entry) {
	for at := e.At &^ (mediumBlock - 1); at < e.At+int64(len(e.Data)); at += mediumBlock {
		n := partOf(at)
		m.sums[n] -= m.block(at)
		from := max(at, e.At)
		copy(m.data[from:at+mediumBlock], e.Data[from-e.At:])
		m.sums[n] += m.block(at)
	}
}

// with applies writes, looks at the disk, and takes them back.
func (m *medium) with(writes []Entry, look func()) {
	var undo []Entry
	for _, e := range writes {
		undo = append(undo, Entry{At: e.At, Data: append([]byte(nil), m.data[e.At:e.At+int64(len(e.Data))]...)})
		m.apply(e)
	}
	look()
	for i := len(undo) - 1; i >= 0; i-- {
		m.apply(undo[i])
	}
}

func (m *medium) part(n int) []byte {
	e := layout[n]
	return m.data[e.at : e.at+e.size]
}
