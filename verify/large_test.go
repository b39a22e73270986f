package verify_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"testing"

	"meshupd/verify"
)

// holes is a stream of zeros with one other byte at the very end, as a sparse
// image with something in its last block is.
type holes struct{ left int64 }

const lastByte = 0x5a

func (h *holes) Read(p []byte) (int, error) {
	if h.left == 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), h.left))
	clear(p[:n])
	if h.left -= int64(n); h.left == 0 {
		p[n-1] = lastByte
	}
	return n, nil
}

// zeroTable is the piece table of such an image: all pieces but the last are equal.
func zeroTable(size, length int64) (root verify.Digest, layer []byte) {
	pair := func(a, b verify.Digest) verify.Digest { return sha256.Sum256(append(a[:], b[:]...)) }
	zero := verify.Digest(sha256.Sum256(make([]byte, verify.BlockSize)))
	pad := verify.Digest{} // missing blocks are zero hashes (BEP 52)
	last := verify.Digest(sha256.Sum256([]byte{lastByte}))
	for n := int64(verify.BlockSize); n < length; n *= 2 {
		last, zero, pad = pair(last, pad), pair(zero, zero), pair(pad, pad)
	}
	pieces := (size + length - 1) / length
	row := make([]verify.Digest, pieces)
	for i := range row {
		row[i] = zero
	}
	row[pieces-1] = last
	for _, d := range row {
		layer = append(layer, d[:]...)
	}
	for ; len(row) > 1; pad = pair(pad, pad) {
		if len(row)%2 == 1 {
			row = append(row, pad)
		}
		for i := range len(row) / 2 {
			row[i] = pair(row[2*i], row[2*i+1])
		}
		row = row[:len(row)/2]
	}
	return row[0], layer
}

// coversAll takes a bundle whose one image has the size, with every byte but the
// last a zero, through the door, and then the same with the last byte changed.
func coversAll(t *testing.T, size int64, digest string) {
	sum, err := verify.ParseDigest(digest)
	wantCode(t, err, "")
	const length = 16 << 20
	root, layer := zeroTable(size, length)
	key := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, key), s.set(1, key)), key)
	m := s.manifest(1)
	m.Images = []verify.Image{{Name: "rootfs", Kind: verify.KindSlot, Size: size, SHA256: sum, Encoding: verify.EncodingNone,
		Content: verify.Content{Size: size, SHA256: sum}, Pieces: verify.Pieces{Length: length, Root: root}}}
	raw, err := verify.EncodeManifest(m)
	wantCode(t, err, "")
	var head bytes.Buffer
	tw := tar.NewWriter(&head)
	files := append(untar(t, s.headTar(raw, signAll(t, raw, key))), plain(verify.TableName(sum), layer))
	for _, f := range files {
		if err := errors.Join(tw.WriteHeader(verify.TarHeader(f.Name, int64(len(f.data)))), func() error { _, err := tw.Write(f.data); return err }()); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, tw.WriteHeader(verify.TarHeader(verify.ImageName(sum), size)), "")
	zeros := make([]byte, 512-size%512+1024) // what fills the last block, and the end of the tar
	door := s.door(s.anchor(1), t.TempDir())
	for _, c := range []struct {
		name  string
		image io.Reader
		want  verify.Code
	}{
		{"as signed", &holes{size}, ""},
		{"with another last byte", io.MultiReader(&holes{size - 1}, bytes.NewReader([]byte{lastByte + 1})), verify.CodeDigest},
	} {
		b, err := verify.OpenBundle(io.MultiReader(bytes.NewReader(head.Bytes()), c.image, bytes.NewReader(zeros)))
		wantCode(t, err, "")
		rel, err := door.Check(t.Context(), b.Head())
		wantCode(t, err, "")
		_, r, err := b.NextImage(rel)
		wantCode(t, err, "")
		n, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{r}, make([]byte, 1<<20))
		if verify.CodeOf(err) != c.want || (c.want == "" && (err != nil || n != size)) {
			t.Errorf("%s: %d bytes, %v", c.name, n, err)
		}
		if c.want == "" {
			if _, _, err := b.NextImage(rel); !errors.Is(err, io.EOF) {
				t.Errorf("after the image: %v", err)
			}
		}
	}
}

// CVE-2026-34155 (RAUC): of a file beyond 2 GiB only the beginning was covered by
// the signature. The digests are those of sha256sum.
func TestRAUC_CVE_2026_34155_TwoGiBAndOneByte(t *testing.T) {
	coversAll(t, 2<<30+1, "1323b4791995171dce63b28a80be386c953ffc7e71c65ef782ff879fd78c6676")
}

// Beyond 32 bits as well; this one takes some seconds of hashing, so `make torture` asks for it.
func TestRAUC_CVE_2026_34155_FourGiBAndOneByte(t *testing.T) {
	if os.Getenv("MESHUPD_TORTURE") == "" {
		t.Log("only the piece table: the bytes are hashed by make torture")
		root, layer := zeroTable(4<<30+1, 16<<20)
		img := verify.Image{Name: "rootfs", Size: 4<<30 + 1, Pieces: verify.Pieces{Length: 16 << 20, Root: root}}
		table, err := verify.ParseTable(img, layer)
		wantCode(t, err, "")
		if len(table.Layer()) != 257*32 {
			t.Errorf("%d bytes of table", len(table.Layer()))
		}
		return
	}
	coversAll(t, 4<<30+1, "153014c024b3db9a126b40397ded44c0b708efde6f5c89f22407e4089160850a")
}
