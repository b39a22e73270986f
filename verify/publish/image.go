package publish

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/zstd"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// addImage puts a file into the folder under its digest and describes it. The
// bytes are hashed in their place there, so the description is of what ships.
func addImage(ctx context.Context, dir string, in ImageInput, p *progress) (verify.Image, error) {
	placed := filepath.Join(dir, "images", ".new")
	if err := place(ctx, in.Path, placed); err != nil {
		return verify.Image{}, err
	}
	f, err := os.Open(placed)
	if err != nil {
		return verify.Image{}, verify.Refuse(verify.CodeIO, "read the image: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return verify.Image{}, verify.Refuse(verify.CodeIO, "read the image: %w", err)
	}
	length := in.PieceLength
	if length == 0 {
		length = verify.DefaultPieceLength(info.Size())
	}
	hashed, err := verify.HashImage(&watched{r: f, ctx: ctx, p: p}, length)
	if err != nil {
		return verify.Image{}, fmt.Errorf("hash %s: %w", in.Path, err)
	}
	img := verify.Image{
		Name:     in.Name,
		Kind:     in.Kind,
		Hardware: in.Hardware,
		Size:     hashed.Size,
		SHA256:   hashed.SHA256,
		Encoding: verify.EncodingNone,
		Content:  verify.Content{Size: hashed.Size, SHA256: hashed.SHA256},
		Pieces:   verify.Pieces{Length: length, Root: hashed.Table.Root},
	}
	if img.Name == "" {
		img.Name = strings.ToLower(filepath.Base(in.Path))
	}
	if img.Kind == "" {
		img.Kind = verify.KindSlot
	}
	if err := decodeContent(ctx, f, &img); err != nil {
		return verify.Image{}, fmt.Errorf("read %s: %w", in.Path, err)
	}
	return img, finishImage(dir, placed, img, hashed.Table)
}

func finishImage(dir, placed string, img verify.Image, table *verify.PieceTable) error {
	if err := durable.Rename(placed, filepath.Join(dir, filepath.FromSlash(verify.ImageName(img.SHA256)))); err != nil {
		return verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	layer := table.Layer()
	if len(layer) == 0 {
		return nil
	}
	if err := durable.MkdirAll(filepath.Join(dir, "pieces"), 0o755); err != nil {
		return verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, filepath.FromSlash(verify.TableName(img.SHA256))), layer, 0o644); err != nil {
		return verify.Refuse(verify.CodeIO, "create the release: %w", err)
	}
	return nil
}

// place links the file, which costs nothing however large it is, or copies it
// where links do not reach.
func place(ctx context.Context, from, to string) error {
	// A link to a symbolic link would ship the symbolic link.
	if real, err := filepath.EvalSymlinks(from); err == nil {
		from = real
	}
	if os.Link(from, to) == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return verify.Refuse(verify.CodeIO, "read the image: %w", err)
	}
	defer in.Close()
	out, err := durable.Create(to, 0o644)
	if err != nil {
		return verify.Refuse(verify.CodeIO, "copy the image: %w", err)
	}
	defer out.Abort()
	if _, err := io.Copy(out, &watched{r: in, ctx: ctx}); err != nil {
		return verify.Refuse(verify.CodeIO, "copy the image: %w", err)
	}
	if err := out.Commit(); err != nil {
		return verify.Refuse(verify.CodeIO, "copy the image: %w", err)
	}
	return nil
}

var zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd} // RFC 8878 section 3.1.1

// decodeContent describes what a slot or container image decodes to, when it is compressed. Files are kept as they are.
func decodeContent(ctx context.Context, f io.ReadSeeker, img *verify.Image) error {
	if img.Kind == verify.KindFiles {
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return verify.Refuse(verify.CodeIO, "read the image: %w", err)
	}
	var magic [4]byte
	if _, err := io.ReadFull(f, magic[:]); err != nil || !bytes.Equal(magic[:], zstdMagic) {
		return nil
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return verify.Refuse(verify.CodeIO, "read the image: %w", err)
	}
	content, err := decodedContent(&watched{r: f, ctx: ctx})
	if err != nil {
		return err
	}
	img.Encoding, img.Content = verify.EncodingZstd, content
	return nil
}

// maxZstdWindow is what a device decodes with; a larger window would not fit small memories.
const maxZstdWindow = 128 << 20

func decodedContent(r io.Reader) (verify.Content, error) {
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		return verify.Content{}, verify.Refuse(verify.CodeFormat, "decode the image: %w", err)
	}
	defer dec.Close()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(dec, verify.MaxImageSize+1))
	if err != nil {
		return verify.Content{}, verify.Refuse(verify.CodeFormat, "decode the image: %w", err)
	}
	if n > verify.MaxImageSize {
		return verify.Content{}, verify.Refuse(verify.CodeSize, "decode the image: it has more than %d bytes", int64(verify.MaxImageSize))
	}
	return verify.Content{Size: n, SHA256: verify.Digest(h.Sum(nil))}, nil
}

// progress adds up what was read.
type progress struct {
	tell        func(done, total int64)
	done, total int64
}

// watched stops reading when ctx ends and tells how far it is.
type watched struct {
	r   io.Reader
	ctx context.Context
	p   *progress
}

func (w *watched) Read(buf []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.r.Read(buf)
	if w.p != nil && w.p.tell != nil && n > 0 {
		w.p.done += int64(n)
		w.p.tell(w.p.done, w.p.total)
	}
	return n, err
}
