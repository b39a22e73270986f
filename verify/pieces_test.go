package verify_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"meshupd/verify"
)

// slowRoot is BEP 52 read literally: hash 16 KiB blocks, append zero hashes up to
// a power of two, halve until one is left.
func slowRoot(leaves []verify.Digest, width int) verify.Digest {
	row := make([]verify.Digest, width)
	copy(row, leaves)
	for len(row) > 1 {
		half := make([]verify.Digest, len(row)/2)
		for i := range half {
			half[i] = sha256.Sum256(append(append([]byte{}, row[2*i][:]...), row[2*i+1][:]...))
		}
		row = half
	}
	return row[0]
}

func slowTable(data []byte, pieceLength int) (root verify.Digest, layer []byte) {
	var leaves []verify.Digest
	for i := 0; i < len(data); i += 16384 {
		leaves = append(leaves, sha256.Sum256(data[i:min(i+16384, len(data))]))
	}
	width := 1
	for width < len(leaves) {
		width *= 2
	}
	root = slowRoot(leaves, width)
	if len(data) > pieceLength {
		per := pieceLength / 16384
		for i := 0; i < len(leaves); i += per {
			h := slowRoot(leaves[i:min(i+per, len(leaves))], per)
			layer = append(layer, h[:]...)
		}
	}
	return root, layer
}

func randomBytes(seed uint64, n int) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)}).Read(data)
	return data
}

func TestPieceTableIsThatOfBEP52(t *testing.T) {
	const kib = 1 << 10
	sizes := []int{1, 16*kib - 1, 16 * kib, 16*kib + 1, 32 * kib, 48*kib + 5, 64*kib - 1, 64 * kib, 64*kib + 1, 100 * kib,
		128 * kib, 129 * kib, 192 * kib, 300*kib + 7, 512 * kib, 513 * kib, 1000*kib + 3}
	for _, length := range []int64{16 * kib, 32 * kib, 64 * kib, 256 * kib} {
		for _, size := range sizes {
			t.Run(fmt.Sprintf("%d by %d", size, length), func(t *testing.T) {
				data := randomBytes(uint64(size), size)
				// A reader that gives few bytes at a time must make no difference.
				got, err := verify.HashImage(io.MultiReader(bytes.NewReader(data[:size/3]), bytes.NewReader(data[size/3:])), length)
				if err != nil {
					t.Fatal(err)
				}
				root, layer := slowTable(data, int(length))
				if got.Table.Root != root || !bytes.Equal(got.Table.Layer(), layer) {
					t.Fatal("root or layer differ from BEP 52")
				}
				if got.Size != int64(size) || got.SHA256 != sha256.Sum256(data) {
					t.Fatal("size or digest are wrong")
				}
				img := verify.Image{Name: "x", Size: got.Size, Pieces: verify.Pieces{Length: length, Root: root}}
				table, err := verify.ParseTable(img, layer)
				if err != nil {
					t.Fatal(err)
				}
				checkEveryPiece(t, table, data)
			})
		}
	}
}

func checkEveryPiece(t *testing.T, table *verify.PieceTable, data []byte) {
	t.Helper()
	for i := range table.Hashes {
		from := int64(i) * table.Length
		piece := bytes.Clone(data[from : from+table.PieceSize(i)])
		if err := table.CheckPiece(i, piece); err != nil {
			t.Fatal(err)
		}
		piece[len(piece)-1] ^= 1
		if err := table.CheckPiece(i, piece); verify.CodeOf(err) != verify.CodeDigest {
			t.Fatalf("a changed piece %d: %v, want E-DIGEST", i, err)
		}
		if err := table.CheckPiece(i, piece[:len(piece)-1]); verify.CodeOf(err) != verify.CodeDigest {
			t.Fatalf("a short piece %d: %v, want E-DIGEST", i, err)
		}
	}
}

func TestPieceTableRefusals(t *testing.T) {
	data := randomBytes(1, 200_000)
	got, err := verify.HashImage(bytes.NewReader(data), 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	img := verify.Image{Name: "x", Size: got.Size, Pieces: verify.Pieces{Length: 64 << 10, Root: got.Table.Root}}
	layer := got.Table.Layer()
	flipped := bytes.Clone(layer)
	flipped[40] ^= 1
	small := verify.Image{Name: "x", Size: 10, Pieces: verify.Pieces{Length: 64 << 10, Root: got.Table.Root}}
	odd := img
	odd.Pieces.Length = 65000
	for _, c := range []struct {
		name string
		img  verify.Image
		raw  []byte
		want verify.Code
	}{
		{"short", img, layer[:96], verify.CodeBundle},
		{"long", img, append(bytes.Clone(layer), make([]byte, 32)...), verify.CodeBundle},
		{"missing", img, nil, verify.CodeBundle},
		{"flipped", img, flipped, verify.CodeDigest},
		{"table for one piece", small, layer[:32], verify.CodeBundle},
		{"odd piece length", odd, layer, verify.CodeFormat},
	} {
		if _, err := verify.ParseTable(c.img, c.raw); verify.CodeOf(err) != c.want {
			t.Errorf("%s: got %v, want %s", c.name, err, c.want)
		}
	}
	for _, length := range []int64{0, -1, 1, 8 << 10, 48 << 10, 32 << 20} {
		if _, err := verify.HashImage(bytes.NewReader(data), length); verify.CodeOf(err) != verify.CodeFormat {
			t.Errorf("piece length %d: got %v, want E-FORMAT", length, err)
		}
	}
	if _, err := verify.HashImage(bytes.NewReader(nil), 64<<10); verify.CodeOf(err) != verify.CodeSize {
		t.Errorf("empty image: got %v, want E-SIZE", err)
	}
}

func TestDefaultPieceLength(t *testing.T) {
	for _, c := range []struct{ size, want int64 }{
		{1, 64 << 10}, {256 << 20, 64 << 10}, {256<<20 + 1, 128 << 10}, {1 << 30, 128 << 10}, {1<<30 + 1, 256 << 10},
		{4 << 30, 256 << 10}, {4<<30 + 1, 512 << 10}, {16 << 30, 512 << 10}, {16<<30 + 1, 1 << 20}, {1 << 40, 1 << 20},
	} {
		if got := verify.DefaultPieceLength(c.size); got != c.want {
			t.Errorf("%d bytes: %d, want %d", c.size, got, c.want)
		}
	}
}

// zeros is an endless image that takes no memory.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestHashingMemoryDoesNotGrowWithTheImage(t *testing.T) {
	allocated := func(size int64) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := verify.HashImage(io.LimitReader(zeros{}, size), 4<<20); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	allocated(1 << 20)
	small, large := allocated(4<<20), allocated(64<<20)
	// Sixteen times the image may cost its piece hashes, not its bytes.
	if large > small+(256<<10) {
		t.Fatalf("4 MiB allocate %d bytes, 64 MiB allocate %d", small, large)
	}
}
