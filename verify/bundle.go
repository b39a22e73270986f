package verify

import (
	"crypto/sha256"
	"errors"
	"hash"
	"io"
)

// UnverifiedBundle is a .update file or a release folder that is being read: a
// head, then the images in the manifest's order. It is for one goroutine.
type UnverifiedBundle struct {
	head   *UnverifiedHead
	images imageSource
	next   int // index in the manifest of the image that comes next
}

// imageSource yields images in the manifest's order from a tar or a folder.
type imageSource interface {
	// open returns the bytes of img, which has to come next; the reader may give fewer or more than img.Size.
	open(img Image) (io.Reader, error)
	// end says whether anything follows the last image: nil or a Refusal.
	end(images []Image) error
	close() error
}

// OpenBundle reads the head of a .update stream. Errors as for ReadHead.
func OpenBundle(r io.Reader) (*UnverifiedBundle, error) {
	t := newTarReader(r)
	h, err := t.readHead()
	if err != nil {
		return nil, err
	}
	return &UnverifiedBundle{head: h, images: &tarImages{t: t}}, nil
}

// Head returns what Door.Check wants.
func (b *UnverifiedBundle) Head() *UnverifiedHead { return b.head }

// NextImage moves to the next image, in the manifest's order, and returns a
// reader of its distributed bytes. The reader ends with io.EOF only after exactly
// Size bytes with the signed digest; else with a Refusal (E-TRUNCATED, E-SIZE,
// E-DIGEST, E-IO). What is read before that is not verified. An image may be left
// unread. After the last image NextImage returns io.EOF if nothing else follows,
// or a Refusal (E-BUNDLE).
func (b *UnverifiedBundle) NextImage(rel *Release) (Image, io.Reader, error) {
	img, r, err := b.NextUnverified(rel.manifest.Images)
	if err != nil {
		return Image{}, nil, err
	}
	return img, &imageReader{r: r, img: img, hash: sha256.New()}, nil
}

// NextUnverified is NextImage for whoever hands a bundle on to a device that has
// verified its head: images are those of the manifest in its order, as that device
// says (Name, SHA256 and Size). Names, order, sizes and the end of the bundle are
// checked; the bytes are not, and may be fewer than Size.
func (b *UnverifiedBundle) NextUnverified(images []Image) (Image, io.Reader, error) {
	if b.next == len(images) {
		if err := b.images.end(images); err != nil {
			return Image{}, nil, err
		}
		return Image{}, nil, io.EOF
	}
	img := images[b.next]
	r, err := b.images.open(img)
	if err != nil {
		return Image{}, nil, err
	}
	b.next++
	return img, r, nil
}

// Close frees the folder's descriptors. The stream of OpenBundle stays the caller's.
func (b *UnverifiedBundle) Close() error { return b.images.close() }

// tarImages reads images from the rest of a bundle's tar.
type tarImages struct{ t *tarReader }

func (s *tarImages) open(img Image) (io.Reader, error) {
	hdr := s.t.image
	s.t.image = nil
	if hdr == nil {
		var err error
		hdr, err = s.t.next()
		if errors.Is(err, io.EOF) {
			return nil, Refuse(CodeBundle, "the image %s is missing from the bundle", img.Name)
		}
		if err != nil {
			return nil, err
		}
	}
	if hdr.Name != ImageName(img.SHA256) {
		return nil, Refuse(CodeBundle, "%q stands where the image %s belongs", clip(hdr.Name), img.Name)
	}
	if hdr.Size != img.Size {
		return nil, Refuse(CodeSize, "the image %s has %d bytes in the bundle, %d were signed", img.Name, hdr.Size, img.Size)
	}
	s.t.allow(hdr.Size)
	return &tarBody{s.t}, nil
}

func (s *tarImages) end([]Image) error {
	hdr, err := s.t.image, error(nil)
	if hdr == nil {
		hdr, err = s.t.next()
	}
	if err == nil {
		return Refuse(CodeBundle, "%q does not belong in the bundle", clip(hdr.Name))
	}
	if !errors.Is(err, io.EOF) {
		return err
	}
	return s.t.end()
}

func (s *tarImages) close() error { return nil }

// tarBody reads the present entry and counts what of it is left.
type tarBody struct{ t *tarReader }

func (b *tarBody) Read(p []byte) (int, error) {
	n, err := b.t.tr.Read(p)
	b.t.rest -= int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		err = b.t.fault(err, "read an image")
	}
	return n, err
}

// imageReader lets io.EOF through only when size and digest are the signed ones.
type imageReader struct {
	r    io.Reader
	img  Image
	hash hash.Hash
	done int64
	end  error // what every further Read returns
}

func (v *imageReader) Read(p []byte) (int, error) {
	if v.end != nil {
		return 0, v.end
	}
	if len(p) == 0 {
		return 0, nil
	}
	if v.done == v.img.Size {
		v.end = v.verdict()
		return 0, v.end
	}
	n, err := v.r.Read(p[:min(int64(len(p)), v.img.Size-v.done)])
	v.hash.Write(p[:n])
	v.done += int64(n)
	switch {
	case err == nil:
	case !errors.Is(err, io.EOF):
		if CodeOf(err) == "" {
			err = Refuse(CodeIO, "read image %s: %w", v.img.Name, err)
		}
		v.end = err
	case v.done < v.img.Size:
		v.end = Refuse(CodeTruncated, "the image %s ends after %d of %d bytes", v.img.Name, v.done, v.img.Size)
	}
	if n > 0 {
		return n, nil
	}
	return 0, v.end
}

// verdict is reached after Size bytes: is that all, and is it what was signed?
func (v *imageReader) verdict() error {
	var one [1]byte
	switch n, err := io.ReadFull(v.r, one[:]); {
	case n > 0:
		return Refuse(CodeSize, "the image %s is longer than the %d bytes that were signed", v.img.Name, v.img.Size)
	case !errors.Is(err, io.EOF):
		return Refuse(CodeIO, "read image %s: %w", v.img.Name, err)
	}
	if sum(v.hash) != v.img.SHA256 {
		return Refuse(CodeDigest, "the bytes of image %s are not those that were signed", v.img.Name)
	}
	return io.EOF
}
