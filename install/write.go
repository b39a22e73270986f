package install

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"syscall"

	"github.com/klauspost/compress/zstd"

	"meshupd/verify"
)

// cells are the places that slots write to: folders, image files, block devices. Errors are E-SPACE when a medium is
// full, else E-SLOT; an error of the function that fills is passed on as it is.
type cells interface {
	// fits refuses with E-FORMAT what the layout cannot hold.
	fits(images []verify.Image) error
	// room tells how many bytes can be written, and how many more once the slot is cleared.
	room(SlotName) (free, held int64, err error)
	// clear removes everything from the slot but the images to keep.
	clear(ctx context.Context, slot SlotName, keep []verify.Image) error
	// put makes the image's file, durable when it returns nil.
	put(ctx context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error
	// check compares what the medium holds, not a cache of what was written, with what was signed. A difference is E-SLOT. It calls
	// further now and then while it reads, so that a long one is not taken for one that hangs.
	check(ctx context.Context, slot SlotName, img verify.Image, further func()) error
}

// maxWindow bounds the memory that a zstd frame can ask of the decoder.
const maxWindow = 128 << 20

// chunk is the size of one step of a copy: the distance between looks at the context and reports of progress.
const chunk = 256 << 10

// meter reports bytes of content over all images of a Write.
type meter struct {
	done, total int64
	tell        func(done, total int64)
}

func (m *meter) add(n int) {
	m.done += int64(n)
	if m.tell != nil {
		m.tell(m.done, m.total)
	}
}

// filling returns the function that writes the content of img, once, to what it is given. It returns nil only when the
// distributed bytes had the signed size and digest and decoded to the signed content.
func filling(ctx context.Context, img verify.Image, open Source, m *meter) func(io.Writer) error {
	return func(w io.Writer) error {
		src, err := open(img)
		if err != nil {
			return sourceError(img, err)
		}
		defer src.Close()
		in := &distributed{ctx: ctx, img: img, src: src, sum: sha256.New()}
		if img.Encoding == verify.EncodingNone {
			bytes := readAhead(src)
			defer bytes.close()
			in.src = bytes
			return copyContent(in, in, w, img, m)
		}
		packed := readAhead(in)
		defer packed.close()
		// One goroutine and little memory: small devices do nothing but this.
		dec, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxWindow))
		if err != nil {
			packed.close()
			return in.verdict(err)
		}
		defer dec.Close()
		content := readAhead(dec)
		defer content.close()
		return copyContent(&decoded{content, packed}, in, w, img, m)
	}
}

// decoded is content on its way through a decoder. At its end nothing reads the distributed bytes any more, so that they can be judged.
type decoded struct{ content, packed *ahead }

func (d *decoded) Read(p []byte) (int, error) {
	n, err := d.content.Read(p)
	if err != nil {
		d.content.close()
		d.packed.close()
	}
	return n, err
}

// copyContent copies at most the signed size and one byte: more is a decompression bomb, and its bytes stay unwritten.
func copyContent(content io.Reader, in *distributed, w io.Writer, img verify.Image, m *meter) error {
	sum := sha256.New()
	// Content that is distributed as it is was hashed on its way in.
	twice := img.Encoding != verify.EncodingNone || img.Content.SHA256 != img.SHA256
	buf := make([]byte, min(chunk, img.Content.Size+1))
	for left := img.Content.Size; ; {
		n, err := content.Read(buf[:min(int64(len(buf)), left+1)])
		if int64(n) > left {
			return verify.Refuse(verify.CodeSize, "image %s has more than its %d bytes of content", img.Name, img.Content.Size)
		}
		if twice {
			sum.Write(buf[:n])
		}
		if _, werr := w.Write(buf[:n]); werr != nil {
			return mediumError(werr, "write image "+img.Name, left)
		}
		left -= int64(n)
		m.add(n)
		if err == nil {
			continue
		}
		if err == io.EOF {
			err = nil
		}
		// The bytes as distributed are judged first: a decoder's complaint about wrong bytes says less.
		if err := in.verdict(err); err != nil {
			return err
		}
		if left > 0 {
			return verify.Refuse(verify.CodeTruncated, "the content of image %s ends %d bytes early", img.Name, left)
		}
		if twice && digest(sum) != img.Content.SHA256 {
			return verify.Refuse(verify.CodeDigest, "the content of image %s is not what was signed", img.Name)
		}
		return nil
	}
}

// distributed reads the bytes of an image as they came and checks them on the way.
type distributed struct {
	ctx context.Context
	img verify.Image
	src io.Reader
	sum hash.Hash
	n   int64
	err error // the first that was not io.EOF; a decoder may wrap or hide it
}

func (d *distributed) Read(p []byte) (int, error) {
	if d.err != nil {
		return 0, d.err
	}
	if d.err = d.ctx.Err(); d.err != nil {
		return 0, d.err
	}
	n, err := d.src.Read(p)
	d.n += int64(n)
	d.sum.Write(p[:n])
	if d.n > d.img.Size {
		d.err = verify.Refuse(verify.CodeSize, "image %s has more than its %d bytes", d.img.Name, d.img.Size)
		return 0, d.err
	}
	if err != nil && err != io.EOF {
		d.err = sourceError(d.img, err)
		return n, d.err
	}
	return n, err
}

// verdict reads what the decoder left over and says what is wrong with the distributed bytes; if nothing is, what the
// decoder said of them.
func (d *distributed) verdict(decoding error) error {
	if d.err == nil {
		io.Copy(io.Discard, d) // its error is kept in d.err
	}
	switch {
	case d.err != nil:
		return d.err
	case d.n < d.img.Size:
		return verify.Refuse(verify.CodeTruncated, "image %s ends after %d of %d bytes", d.img.Name, d.n, d.img.Size)
	case digest(d.sum) != d.img.SHA256:
		return verify.Refuse(verify.CodeDigest, "image %s is not what was signed", d.img.Name)
	case decoding != nil:
		return verify.Refuse(verify.CodeFormat, "decode image %s: %w", d.img.Name, decoding)
	}
	return nil
}

// noContainer refuses with E-FORMAT an image that only a container engine can hold.
func noContainer(images []verify.Image) error {
	for _, img := range images {
		if img.Kind == verify.KindContainer {
			return verify.Refuse(verify.CodeFormat, "write a slot: image %s is a container, and this device has no slots for containers", img.Name)
		}
	}
	return nil
}

// readBack compares what r, opened past every cache, yields with what was signed, and closes it.
func readBack(ctx context.Context, r io.ReadCloser, slot SlotName, img verify.Image, further func()) error {
	defer r.Close()
	sum := sha256.New()
	in := io.LimitReader(r, img.Content.Size+1)
	buf := make([]byte, min(chunk, img.Content.Size+1))
	var n int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := in.Read(buf)
		n += int64(k)
		sum.Write(buf[:k])
		further()
		if err == io.EOF {
			break
		}
		if err != nil {
			return verify.Refuse(verify.CodeSlot, "read image %s back from slot %s: %w", img.Name, slot, err)
		}
	}
	if n != img.Content.Size || !bytes.Equal(sum.Sum(nil), img.Content.SHA256[:]) {
		return verify.Refuse(verify.CodeSlot, "slot %s reads back other bytes of image %s than were written", slot, img.Name)
	}
	return nil
}

func digest(h hash.Hash) (d verify.Digest) {
	h.Sum(d[:0])
	return d
}

// stopped reports whether the caller ended the work: that is nobody's fault and gets no code.
func stopped(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// sourceError gives a code to what a Source said without one.
func sourceError(img verify.Image, err error) error {
	if verify.CodeOf(err) != "" || stopped(err) {
		return err
	}
	return verify.Refuse(verify.CodeIO, "read image %s: %w", img.Name, err)
}

// mediumError gives a code to what a medium said: full is E-SPACE with the bytes that were still to come, all else E-SLOT.
func mediumError(err error, what string, left int64) error {
	if err == nil || verify.CodeOf(err) != "" || stopped(err) {
		return err
	}
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return verify.Refuse(verify.CodeSlot, "%s: %w", what, err)
	}
	full := verify.Refuse(verify.CodeSpace, "%s: %w", what, err)
	var r *verify.Refusal
	if errors.As(full, &r) {
		r.NeedBytes = left
	}
	return full
}
