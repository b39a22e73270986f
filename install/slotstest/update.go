package slotstest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// update is a verified release with its bytes.
type update struct {
	rel         *verify.Release
	images      []verify.Image
	distributed map[string][]byte // by image name
	contents    map[string][]byte
}

// updates makes three releases for a device, in their order.
func updates(t *testing.T, vendor *verifytest.Vendor, h Harness) []update {
	t.Helper()
	var all []update
	for i := range 3 {
		all = append(all, newUpdate(t, vendor, i+1, h))
	}
	return all
}

// newUpdate makes the seq-th release, with every other image compressed.
func newUpdate(t *testing.T, vendor *verifytest.Vendor, seq int, h Harness) update {
	t.Helper()
	u := update{distributed: make(map[string][]byte), contents: make(map[string][]byte)}
	var images []verifytest.Image
	for i := range h.Images {
		name := imageName(i)
		u.contents[name] = content(byte(16*seq+i), 5000+1000*i+seq)
		if h.Content != nil {
			u.contents[name] = h.Content(u.contents[name])
		}
		u.distributed[name] = u.contents[name]
		if i%2 == 0 && !h.Plain {
			u.distributed[name] = compress(t, u.contents[name])
		}
		path := filepath.Join(t.TempDir(), name)
		must(t, "write an image", os.WriteFile(path, u.distributed[name], 0o644))
		images = append(images, verifytest.Image{Name: name, Path: path, Kind: h.Kind})
	}
	u.rel, _ = vendor.Verified(t, verifytest.Opts{Version: fmt.Sprintf("%d.0.0", seq+1), Seq: uint64(seq), Images: images})
	u.images = u.rel.Manifest().Images
	for _, img := range u.images {
		if got, want := img.Encoding == verify.EncodingZstd, !bytes.Equal(u.distributed[img.Name], u.contents[img.Name]); got != want {
			t.Fatalf("image %s has the encoding %s", img.Name, img.Encoding)
		}
	}
	return u
}

// FirstImage is the name of a release's first image.
const FirstImage = "image0.img"

func imageName(i int) string { return fmt.Sprintf("image%d.img", i) }

// holds is what a slot holds once the release is in it.
func (u update) holds() map[string]verify.Digest {
	sums := make(map[string]verify.Digest)
	for name, content := range u.contents {
		sums[name] = sha256.Sum256(content)
	}
	return sums
}

func (u update) total() (n int64) {
	for _, img := range u.images {
		n += img.Content.Size
	}
	return n
}

func (u update) source(img verify.Image) (io.ReadCloser, error) {
	data, found := u.distributed[img.Name]
	if !found {
		return nil, fmt.Errorf("no image %s", img.Name)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

// broken is the same release with other bytes, and what these are refused with.
type broken struct {
	update
	code verify.Code
}

func (u update) broken(t *testing.T) map[string]broken {
	t.Helper()
	first := u.images[0].Name
	with := func(data []byte, code verify.Code) broken {
		b := broken{u, code}
		b.distributed = maps.Clone(u.distributed)
		b.distributed[first] = data
		return b
	}
	good := u.distributed[first]
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 4
	missing := with(nil, verify.CodeIO)
	delete(missing.distributed, first)
	return map[string]broken{
		"cut short":     with(good[:len(good)-7], verify.CodeTruncated),
		"nothing":       with(nil, verify.CodeTruncated),
		"a bit flipped": with(flipped, verify.CodeDigest),
		"another image": with(bytes.Repeat([]byte("x"), len(good)), verify.CodeDigest),
		"longer":        with(append(bytes.Clone(good), "more"...), verify.CodeSize),
		"not there":     missing,
	}
}

// compress encodes with a fixed level, so that a release has the same bytes each time.
func compress(t *testing.T, content []byte) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	must(t, "make an encoder", err)
	defer enc.Close()
	return enc.EncodeAll(content, nil)
}

// content is n bytes that do not compress to nothing and differ by seed.
func content(seed byte, n int) []byte {
	var out []byte
	for sum := sha256.Sum256([]byte{seed}); len(out) < n; sum = sha256.Sum256(sum[:]) {
		out = append(out, sum[:16]...)
		out = append(out, bytes.Repeat([]byte{seed}, 16)...)
	}
	return out[:n]
}
