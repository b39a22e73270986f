package swarm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/bits"

	"meshupd/verify"
)

// pieceSet is a set of piece numbers.
type pieceSet []uint64

func newPieceSet(n int) pieceSet { return make(pieceSet, (n+63)/64) }

func (s pieceSet) has(i int) bool { return s[i/64]&(1<<(i%64)) != 0 }
func (s pieceSet) add(i int)      { s[i/64] |= 1 << (i % 64) }
func (s pieceSet) remove(i int)   { s[i/64] &^= 1 << (i % 64) }

func (s pieceSet) addAll(n int) {
	for i := range n {
		s.add(i)
	}
}

func (s pieceSet) count() (n int) {
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

// geometry is how an image is cut into pieces.
type geometry struct {
	image  verify.Digest
	root   verify.Digest
	size   int64
	length int64 // of a piece
}

func geometryOf(img verify.Image) geometry {
	return geometry{image: img.SHA256, root: img.Pieces.Root, size: img.Size, length: img.Pieces.Length}
}

// pieces is the number of pieces; 0 for an empty image.
func (g geometry) pieces() int { return int((g.size + g.length - 1) / g.length) }

// pieceSize is the number of bytes of piece i; the last one may be shorter.
func (g geometry) pieceSize(i int) int64 {
	return min(g.length, g.size-int64(i)*g.length)
}

// bytesIn is the number of bytes of the pieces in a set.
func (g geometry) bytesIn(set pieceSet) int64 {
	n := int64(set.count()) * g.length
	if last := g.pieces() - 1; last >= 0 && set.has(last) {
		n -= g.length - g.pieceSize(last)
	}
	return n
}

// Limits of a geometry that is read from a .bits file. Pieces.Length in a manifest has the same range.
const (
	minPiece  = 16 << 10
	maxPiece  = 16 << 20
	maxPieces = 1 << 26
)

func (g geometry) valid() bool {
	return g.size >= 0 && g.length >= minPiece && g.length <= maxPiece && g.length&(g.length-1) == 0 &&
		g.size/g.length < maxPieces
}

// A .bits file says which pieces of a .part file are verified and durable:
//
//	"meshupd.bits/1\n"  image digest  pieces root  size  piece length  bitmap  SHA-256 of all before
//
// Numbers are 8 bytes big-endian; bit i%8 of byte i/8 is piece i; spare bits are
// zero. The checksum is against torn and rotten files, not against an attacker:
// who can write here can also write the image.
const bitsMagic = "meshupd.bits/1\n"

const bitsHeader = len(bitsMagic) + 2*sha256.Size + 16

// maxBitsFile is the size of the largest .bits file that is read.
const maxBitsFile = int64(bitsHeader) + maxPieces/8 + 1 + sha256.Size

func encodeBits(g geometry, have pieceSet) []byte {
	n := g.pieces()
	out := make([]byte, 0, bitsHeader+(n+7)/8+sha256.Size)
	out = append(out, bitsMagic...)
	out = append(out, g.image[:]...)
	out = append(out, g.root[:]...)
	out = binary.BigEndian.AppendUint64(out, uint64(g.size))
	out = binary.BigEndian.AppendUint64(out, uint64(g.length))
	for i := range (n + 7) / 8 {
		out = append(out, byte(have[i/8]>>(8*(i%8))))
	}
	sum := sha256.Sum256(out)
	return append(out, sum[:]...)
}

// decodeBits reads a .bits file. Anything unexpected yields ok == false: the
// caller then finds out by hashing what it has.
func decodeBits(data []byte) (g geometry, have pieceSet, ok bool) {
	if len(data) < bitsHeader+sha256.Size || !bytes.HasPrefix(data, []byte(bitsMagic)) {
		return geometry{}, nil, false
	}
	body, sum := data[:len(data)-sha256.Size], data[len(data)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return geometry{}, nil, false
	}
	rest := body[len(bitsMagic):]
	rest = rest[copy(g.image[:], rest):]
	rest = rest[copy(g.root[:], rest):]
	g.size = int64(binary.BigEndian.Uint64(rest))
	g.length = int64(binary.BigEndian.Uint64(rest[8:]))
	rest = rest[16:]
	if !g.valid() || len(rest) != (g.pieces()+7)/8 {
		return geometry{}, nil, false
	}
	n := g.pieces()
	have = newPieceSet(n)
	for i, b := range rest {
		have[i/8] |= uint64(b) << (8 * (i % 8))
	}
	if n%64 != 0 && have[len(have)-1]>>(n%64) != 0 {
		return geometry{}, nil, false
	}
	return g, have, true
}
