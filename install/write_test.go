package install

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"meshupd/verify"
)

func zstdOf(t *testing.T, content []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	enc, err := zstd.NewWriter(nil, opts...)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	return enc.EncodeAll(content, nil)
}

// signed describes an image as a vendor who made a mistake, or worse, could have signed it.
func signed(encoding verify.Encoding, distributed, content []byte) verify.Image {
	return verify.Image{
		Name: "rootfs", Encoding: encoding, Size: int64(len(distributed)), SHA256: sha256.Sum256(distributed),
		Content: verify.Content{Size: int64(len(content)), SHA256: sha256.Sum256(content)},
	}
}

// counting counts what is written and fails after some bytes.
type counting struct {
	n, limit int64
	err      error
}

func (c *counting) Write(p []byte) (int, error) {
	if c.err != nil && c.n+int64(len(p)) > c.limit {
		return 0, c.err
	}
	c.n += int64(len(p))
	return len(p), nil
}

func TestFillingJudgesTheContent(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	bomb := zstdOf(t, make([]byte, 32<<20))
	other := bytes.Clone(content)
	other[9] ^= 1
	random := make([]byte, 300<<10)
	for i := range random {
		random[i] = byte(i * i >> 3)
	}
	for _, c := range []struct {
		name        string
		img         verify.Image
		distributed []byte
		out         *counting
		code        verify.Code
		most        int64 // bytes that may have been written
	}{
		{"good", signed(verify.EncodingZstd, zstdOf(t, content), content), zstdOf(t, content), &counting{}, "", int64(len(content))},
		{"good, two frames", signed(verify.EncodingZstd, append(zstdOf(t, content[:100]), zstdOf(t, content[100:])...), content),
			append(zstdOf(t, content[:100]), zstdOf(t, content[100:])...), &counting{}, "", int64(len(content))},
		{"nothing at all", signed(verify.EncodingNone, nil, nil), nil, &counting{}, "", 0},
		{"a bomb", signed(verify.EncodingZstd, bomb, content), bomb, &counting{}, verify.CodeSize, int64(len(content))},
		{"content too short", signed(verify.EncodingZstd, zstdOf(t, content[:99]), content), zstdOf(t, content[:99]), &counting{}, verify.CodeTruncated, 99},
		{"other content", signed(verify.EncodingZstd, zstdOf(t, other), content), zstdOf(t, other), &counting{}, verify.CodeDigest, int64(len(content))},
		{"not zstd", signed(verify.EncodingZstd, content, content), content, &counting{}, verify.CodeFormat, 0},
		{"zstd cut short when signed", signed(verify.EncodingZstd, zstdOf(t, random)[:1000], random), zstdOf(t, random)[:1000], &counting{}, verify.CodeFormat, int64(len(random))},
		{"garbage behind the frame", signed(verify.EncodingZstd, append(zstdOf(t, content), "garbage"...), content),
			append(zstdOf(t, content), "garbage"...), &counting{}, verify.CodeFormat, int64(len(content))},
		{"a window that takes too much memory", signed(verify.EncodingZstd, hugeWindow, nil), hugeWindow, &counting{}, verify.CodeFormat, 0},
		{"disk full", signed(verify.EncodingNone, random, random), random, &counting{limit: 1 << 18, err: syscall.ENOSPC}, verify.CodeSpace, 1 << 18},
		{"disk broken", signed(verify.EncodingNone, random, random), random, &counting{limit: 1 << 18, err: syscall.EIO}, verify.CodeSlot, 1 << 18},
	} {
		t.Run(c.name, func(t *testing.T) {
			open := func(verify.Image) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(c.distributed)), nil }
			err := filling(t.Context(), c.img, open, &meter{})(c.out)
			if verify.CodeOf(err) != c.code || (err == nil) != (c.code == "") {
				t.Fatalf("got %v (%s), want %q", err, verify.CodeOf(err), c.code)
			}
			if c.out.n > c.most {
				t.Fatalf("%d bytes were written, at most %d were signed", c.out.n, c.most)
			}
			if c.code == verify.CodeSpace {
				var r *verify.Refusal
				if !errors.As(err, &r) || r.NeedBytes != int64(len(random))-c.out.n {
					t.Fatalf("%d bytes are said to be needed", r.NeedBytes)
				}
			}
		})
	}
}

// hugeWindow is the head of a frame that asks for a window of 2 GiB (RFC 8878 section 3.1.1.1.2: exponent 21).
var hugeWindow = []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00}

// TestLargeContentDecodes: content larger than the window limit is no reason to refuse.
func TestLargeContentDecodes(t *testing.T) {
	if testing.Short() {
		t.Skip("decodes 130 MiB")
	}
	const size = 130 << 20
	var distributed bytes.Buffer
	enc, err := zstd.NewWriter(&distributed, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(enc, sum), zeros{}, size); err != nil {
		t.Fatal(err)
	}
	if err := enc.Close(); err != nil {
		t.Fatal(err)
	}
	img := signed(verify.EncodingZstd, distributed.Bytes(), nil)
	img.Content = verify.Content{Size: size, SHA256: digest(sum)}
	open := func(verify.Image) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(distributed.Bytes())), nil
	}
	var out counting
	if err := filling(t.Context(), img, open, &meter{})(&out); err != nil || out.n != size {
		t.Fatalf("wrote %d bytes: %v", out.n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
