package verify

import (
	"crypto/sha256"
	"errors"
	"hash"
	"io"
)

// BlockSize is the size in bytes of a leaf of the merkle tree (BEP 52).
const BlockSize = 16 << 10

// PieceTable holds the SHA-256 merkle hash of every piece of an image (the BEP 52
// piece layer), already checked against the signed root. An image of at most one
// piece has one hash, the root itself, and no layer.
type PieceTable struct {
	Length int64  // piece length in bytes
	Size   int64  // image size in bytes
	Root   Digest // BEP 52 pieces root
	Hashes []Digest
}

// Hashed is what one pass over an image yields.
type Hashed struct {
	Size   int64
	SHA256 Digest
	Table  *PieceTable
}

// DefaultPieceLength is the piece length this project chooses for an image of
// this many bytes: small enough that a chain of devices passes data on early,
// large enough that the table stays a few hundred KiB.
func DefaultPieceLength(size int64) int64 {
	switch {
	case size <= 256<<20:
		return 64 << 10
	case size <= 1<<30:
		return 128 << 10
	case size <= 4<<30:
		return 256 << 10
	case size <= 16<<30:
		return 512 << 10
	}
	return 1 << 20
}

// HashImage reads r once to its end and computes the whole digest and the piece
// table. pieceLength as in Pieces.Length. Memory is one hash per piece.
// It refuses an empty image and one larger than MaxImageSize.
func HashImage(r io.Reader, pieceLength int64) (Hashed, error) {
	if err := checkPieceLength(pieceLength); err != nil {
		return Hashed{}, err
	}
	var (
		whole  = sha256.New()
		tree   merkle
		pieces []Digest
		size   int64
		inPart int64 // bytes of the present piece so far
		buf    = make([]byte, BlockSize)
	)
	for {
		n, err := io.ReadFull(r, buf)
		if n > 0 {
			whole.Write(buf[:n])
			tree.add(sha256.Sum256(buf[:n]))
			size += int64(n)
			inPart += int64(n)
		}
		if size > MaxImageSize {
			return Hashed{}, Refuse(CodeSize, "the image is larger than %d bytes", int64(MaxImageSize))
		}
		if inPart == pieceLength {
			pieces = append(pieces, tree.root(blocksPer(pieceLength)))
			tree, inPart = merkle{}, 0
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return Hashed{}, err
		}
	}
	if size == 0 {
		return Hashed{}, Refuse(CodeSize, "the image is empty")
	}
	table := &PieceTable{Length: pieceLength, Size: size}
	switch {
	case size < pieceLength:
		// BEP 52: a file shorter than a piece is padded only to the next power of two of blocks.
		table.Hashes = []Digest{tree.root(powerOfTwo(tree.count))}
	case inPart > 0:
		table.Hashes = append(pieces, tree.root(blocksPer(pieceLength)))
	default:
		table.Hashes = pieces
	}
	table.Root = layerRoot(table.Hashes, pieceLength)
	return Hashed{Size: size, SHA256: sum(whole), Table: table}, nil
}

// ParseTable checks the concatenated hashes of a pieces/ entry against the
// image's signed root. raw is empty for an image of at most one piece. Errors
// are Refusals: E-BUNDLE for a wrong length, E-DIGEST for a wrong root.
func ParseTable(img Image, raw []byte) (*PieceTable, error) {
	t := &PieceTable{Length: img.Pieces.Length, Size: img.Size, Root: img.Pieces.Root}
	if err := checkPieceLength(t.Length); err != nil {
		return nil, err
	}
	if img.Size <= t.Length {
		if len(raw) != 0 {
			return nil, Refuse(CodeBundle, "image %s has one piece, but there is a piece table for it", img.Name)
		}
		t.Hashes = []Digest{t.Root}
		return t, nil
	}
	n := pieceCount(img.Size, t.Length)
	if int64(len(raw)) != n*int64(len(Digest{})) {
		return nil, Refuse(CodeBundle, "the piece table of image %s has %d bytes, not %d", img.Name, len(raw), n*int64(len(Digest{})))
	}
	t.Hashes = make([]Digest, n)
	for i := range t.Hashes {
		copy(t.Hashes[i][:], raw[i*len(Digest{}):])
	}
	if layerRoot(t.Hashes, t.Length) != t.Root {
		return nil, Refuse(CodeDigest, "the piece table of image %s does not belong to the signed root", img.Name)
	}
	return t, nil
}

// Layer is the BEP 52 piece layer as a bundle and a torrent carry it: all hashes
// after each other, or nothing for an image of at most one piece.
func (t *PieceTable) Layer() []byte {
	if t.Size <= t.Length {
		return nil
	}
	out := make([]byte, 0, len(t.Hashes)*len(Digest{}))
	for _, h := range t.Hashes {
		out = append(out, h[:]...)
	}
	return out
}

// PieceSize is the number of bytes of piece i; the last may be shorter.
func (t *PieceTable) PieceSize(i int) int64 {
	return min(t.Length, t.Size-int64(i)*t.Length)
}

// CheckPiece compares the bytes of piece i with the signed table: nil or E-DIGEST.
func (t *PieceTable) CheckPiece(i int, data []byte) error {
	if i < 0 || i >= len(t.Hashes) || int64(len(data)) != t.PieceSize(i) {
		return Refuse(CodeDigest, "piece %d has not the signed size", i)
	}
	var tree merkle
	for rest := data; len(rest) > 0; {
		n := min(len(rest), BlockSize)
		tree.add(sha256.Sum256(rest[:n]))
		rest = rest[n:]
	}
	leaves := blocksPer(t.Length)
	if t.Size <= t.Length {
		leaves = powerOfTwo(tree.count)
	}
	if tree.root(leaves) != t.Hashes[i] {
		return Refuse(CodeDigest, "piece %d is not the signed one", i)
	}
	return nil
}

// merkle folds leaves into a binary tree as they come; it keeps one node per
// level, so its size is the logarithm of the number of leaves.
type merkle struct {
	nodes []node
	count int64
}

type node struct {
	hash  Digest
	level int
}

func (m *merkle) add(leaf Digest) { m.push(node{leaf, 0}); m.count++ }

func (m *merkle) push(n node) {
	for len(m.nodes) > 0 && m.nodes[len(m.nodes)-1].level == n.level {
		left := m.nodes[len(m.nodes)-1]
		m.nodes = m.nodes[:len(m.nodes)-1]
		n = node{pair(left.hash, n.hash), n.level + 1}
	}
	m.nodes = append(m.nodes, n)
}

// root pads the tree to leaves, a power of two, and returns its top. Padding
// leaves are 32 zero bytes (BEP 52), so a whole padding subtree has a hash that
// depends only on its height.
func (m *merkle) root(leaves int64) Digest {
	top := 0
	for int64(1)<<top < leaves {
		top++
	}
	for len(m.nodes) != 1 || m.nodes[0].level < top {
		last := m.nodes[len(m.nodes)-1].level
		m.push(node{padding(last), last})
	}
	return m.nodes[0].hash
}

// layerRoot is the root over a piece layer.
func layerRoot(hashes []Digest, pieceLength int64) Digest {
	if len(hashes) == 1 {
		return hashes[0]
	}
	base := 0
	for int64(BlockSize)<<base < pieceLength {
		base++
	}
	var m merkle
	for _, h := range hashes {
		m.push(node{h, base})
	}
	return m.root(powerOfTwo(int64(len(hashes))) << base)
}

// padding is the root of a subtree of the given height whose leaves are all zero.
func padding(level int) Digest {
	var d Digest
	for range level {
		d = pair(d, d)
	}
	return d
}

func pair(a, b Digest) Digest {
	var buf [2 * sha256.Size]byte
	copy(buf[:], a[:])
	copy(buf[sha256.Size:], b[:])
	return sha256.Sum256(buf[:])
}

func pieceCount(size, length int64) int64 { return (size + length - 1) / length }

func blocksPer(pieceLength int64) int64 { return pieceLength / BlockSize }

func powerOfTwo(n int64) int64 {
	p := int64(1)
	for p < n {
		p <<= 1
	}
	return p
}

func sum(h hash.Hash) Digest {
	var d Digest
	h.Sum(d[:0])
	return d
}
