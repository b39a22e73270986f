package verify

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
)

// tarReader reads a bundle's tar under a budget, and remembers whether a fault
// came from the bytes or from below them.
type tarReader struct {
	tr     *tar.Reader
	budget *budgetReader
	image  *tar.Header // header of the image that comes next
	size   int64       // bytes of the present entry
	rest   int64       // of them, those that may still be unread
	ended  bool
}

func newTarReader(r io.Reader) *tarReader {
	b := &budgetReader{r: r}
	return &tarReader{tr: tar.NewReader(b), budget: b}
}

// tarOverhead is what one entry may cost beside its bytes: header, padding and
// PAX records. It is more than `tar` writes and less than hurts.
const tarOverhead = 16 << 10

// maxTarPadding bounds the zeros after the end of the archive.
const maxTarPadding = 1 << 20

func (t *tarReader) readHead() (*UnverifiedHead, error) {
	var b headBuilder
	for {
		hdr, err := t.next()
		if errors.Is(err, io.EOF) {
			return b.finish()
		}
		if err != nil {
			return nil, err
		}
		p, err := b.accept(hdr.Name, hdr.Size)
		if err != nil {
			return nil, err
		}
		if p.stage == stageImages {
			t.image = hdr
			return b.finish()
		}
		t.allow(hdr.Size)
		data := make([]byte, hdr.Size)
		if _, err := io.ReadFull(t.tr, data); err != nil {
			return nil, t.fault(err, "read "+hdr.Name)
		}
		t.rest = 0
		if err := b.add(p, data); err != nil {
			return nil, err
		}
	}
}

// next moves to the next entry; io.EOF is the proper end of the archive.
func (t *tarReader) next() (*tar.Header, error) {
	if t.ended {
		return nil, io.EOF
	}
	t.budget.left = t.rest + tarOverhead
	skipped := t.rest + t.padding()
	before := t.budget.read
	hdr, err := t.tr.Next()
	if errors.Is(err, io.EOF) {
		// archive/tar takes any end between entries for the end of the archive. A
		// bundle that was cut there must not look whole, so the closing block of zeros is required.
		if t.budget.read-before < skipped+blockTar {
			return nil, t.fault(io.ErrUnexpectedEOF, "read the bundle")
		}
		t.ended = true
		return nil, io.EOF
	}
	if err != nil {
		return nil, t.fault(err, "read the bundle")
	}
	if err := plainFile(hdr); err != nil {
		return nil, err
	}
	t.rest, t.size, t.budget.left = hdr.Size, hdr.Size, 0
	return hdr, nil
}

const blockTar = 512

// padding is the filling after the present entry.
func (t *tarReader) padding() int64 { return -t.size & (blockTar - 1) }

// allow opens the budget for the bytes of the present entry.
func (t *tarReader) allow(size int64) { t.budget.left = size }

// end checks that nothing but zeros follows the archive.
func (t *tarReader) end() error {
	t.budget.left = maxTarPadding
	buf := make([]byte, 32<<10)
	for {
		n, err := t.budget.Read(buf)
		if len(bytes.Trim(buf[:n], "\x00")) > 0 {
			return Refuse(CodeBundle, "there is data after the end of the bundle")
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return t.fault(err, "read the end of the bundle")
		}
	}
}

// plainFile refuses every kind of entry that is not simply a file: links and
// devices, but also sparse files and records that rename or attach things.
func plainFile(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeReg {
		return Refuse(CodeBundle, "%q is not a regular file", clip(hdr.Name))
	}
	for key := range hdr.PAXRecords {
		switch key {
		case "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "size":
		default:
			return Refuse(CodeBundle, "%q carries a tar record %q, which is not allowed", clip(hdr.Name), clip(key))
		}
	}
	return nil
}

// fault names what an error of the tar reader means.
func (t *tarReader) fault(err error, doing string) error {
	switch {
	case t.budget.failed != nil:
		return Refuse(CodeIO, "%s: %w", doing, t.budget.failed)
	case errors.Is(err, errBudget):
		return Refuse(CodeSize, "%s: it is longer than allowed", doing)
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		return Refuse(CodeTruncated, "%s: the bytes end too early", doing)
	}
	return Refuse(CodeFormat, "%s: %w", doing, err)
}

var errBudget = errors.New("more bytes than allowed")

// budgetReader hands out at most left bytes.
type budgetReader struct {
	r      io.Reader
	left   int64
	read   int64 // bytes handed out so far
	failed error // an error of r other than its end
}

func (b *budgetReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if b.left <= 0 {
		// Whether there is more decides between the end and too much.
		var one [1]byte
		n, err := b.r.Read(one[:])
		if n == 0 && err != nil {
			return 0, b.note(err)
		}
		return 0, errBudget
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	b.read += int64(n)
	return n, b.note(err)
}

func (b *budgetReader) note(err error) error {
	if err != nil && !errors.Is(err, io.EOF) {
		b.failed = err
	}
	return err
}
