package verify

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// UnverifiedHead is the part of a bundle before its images, as it came: trust
// chain, certificates, manifest, signatures, piece tables. It is the unit in
// which releases travel: the start of a .update file, what neighbours hand each
// other, and what the store keeps. Its bytes are one POSIX tar with, in this order:
//
//	trust.1.json trust.1.sig trust.2.json trust.2.sig ...
//	certs/<sha256>.pgp      ascending; binary OpenPGP certificates
//	manifest.json
//	manifest.sig
//	pieces/<sha256>         ascending; 32 bytes per piece, for images of more than one piece
type UnverifiedHead struct {
	trust     []unverifiedTrust
	certs     [][]byte
	manifest  []byte
	signature []byte
	tables    map[Digest][]byte
}

type unverifiedTrust struct{ document, signature []byte }

// MaxHead is the largest head that is read from anywhere, in bytes.
const MaxHead = 16 << 20

const (
	nameManifest  = "manifest.json"
	nameSignature = "manifest.sig"
	dirCerts      = "certs/"
	dirPieces     = "pieces/"
	dirImages     = "images/"
	certSuffix    = ".pgp"
)

// ReadHead reads a head from r and stops at the end of its tar or after the
// header of the first image. Errors are Refusals: E-BUNDLE, E-TRUNCATED, E-SIZE,
// E-DIGEST (a certificate that is not what its name says), E-FORMAT (no tar), E-IO.
func ReadHead(r io.Reader) (*UnverifiedHead, error) {
	t := newTarReader(r)
	h, err := t.readHead()
	if err != nil {
		return nil, err
	}
	if t.image == nil {
		if err := t.end(); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// UnverifiedManifest is the manifest as it came. Do not change it.
func (h *UnverifiedHead) UnverifiedManifest() []byte { return h.manifest }

// UnverifiedSignature is manifest.sig as it came, empty when there is none.
func (h *UnverifiedHead) UnverifiedSignature() []byte { return h.signature }

// UnverifiedTrust lists the trust documents as they came, oldest first.
func (h *UnverifiedHead) UnverifiedTrust() [][]byte {
	out := make([][]byte, len(h.trust))
	for i, t := range h.trust {
		out[i] = t.document
	}
	return out
}

// UnverifiedCertificates lists the certificates as they came.
func (h *UnverifiedHead) UnverifiedCertificates() [][]byte { return h.certs }

// Bytes returns the canonical tar of the head: the same head, however it came,
// has the same bytes.
func (h *UnverifiedHead) Bytes() []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	err := h.WriteTar(tw)
	if err == nil {
		err = tw.Close()
	}
	if err != nil {
		// A buffer does not fail, and names and sizes are ours.
		panic(fmt.Sprintf("verify: write a head: %v", err))
	}
	return buf.Bytes()
}

// WriteTar writes the head's entries and leaves the tar open for images.
func (h *UnverifiedHead) WriteTar(tw *tar.Writer) error {
	for _, e := range h.entries() {
		if err := tw.WriteHeader(TarHeader(e.name, int64(len(e.data)))); err != nil {
			return fmt.Errorf("write %s: %w", e.name, err)
		}
		if _, err := tw.Write(e.data); err != nil {
			return fmt.Errorf("write %s: %w", e.name, err)
		}
	}
	return nil
}

// TarHeader is the one form of header that bundles are written with: who wrote a
// bundle, when, and on which machine must not show in it.
func TarHeader(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
}

// ImageName is the name of an image in a bundle and in a release folder.
func ImageName(d Digest) string { return dirImages + d.String() }

// TableName is the name of an image's piece table there.
func TableName(d Digest) string { return dirPieces + d.String() }

// CertificateName is the name of a certificate there.
func CertificateName(d Digest) string { return dirCerts + d.String() + certSuffix }

type entry struct {
	name string
	data []byte
}

func (h *UnverifiedHead) entries() []entry {
	var out []entry
	for i, t := range h.trust {
		out = append(out,
			entry{fmt.Sprintf("trust.%d.json", i+1), t.document},
			entry{fmt.Sprintf("trust.%d.sig", i+1), t.signature})
	}
	for _, c := range h.certs {
		out = append(out, entry{CertificateName(sha256.Sum256(c)), c})
	}
	out = append(out, entry{nameManifest, h.manifest})
	if len(h.signature) > 0 {
		out = append(out, entry{nameSignature, h.signature})
	}
	digests := slices.SortedFunc(maps.Keys(h.tables), compareDigests)
	for _, d := range digests {
		out = append(out, entry{TableName(d), h.tables[d]})
	}
	return out
}

func compareDigests(a, b Digest) int { return bytes.Compare(a[:], b[:]) }

// stage is a place in the fixed order of a bundle.
type stage int

const (
	stageTrust stage = iota + 1
	stageTrustSig
	stageCerts
	stageManifest
	stageSignature
	stagePieces
	stageImages
)

// place is what the name of an entry says.
type place struct {
	stage  stage
	epoch  int    // of a trust document or its signature
	digest Digest // of a certificate, or of the image of a piece table or image
	limit  int64  // bytes
}

// placeOf understands a name, or refuses it with E-BUNDLE. There is exactly one
// spelling of each name, so no two entries can mean one thing.
func placeOf(name string) (place, error) {
	unknown := Refuse(CodeBundle, "%q does not belong in a bundle", clip(name))
	fromHex := func(s string, p place) (place, error) {
		d, err := ParseDigest(s)
		if err != nil {
			return place{}, unknown
		}
		p.digest = d
		return p, nil
	}
	switch {
	case name == nameManifest:
		return place{stage: stageManifest, limit: MaxManifest}, nil
	case name == nameSignature:
		return place{stage: stageSignature, limit: MaxSignature}, nil
	case strings.HasPrefix(name, "trust."):
		p := place{stage: stageTrust, limit: MaxTrustDocument}
		number, ok := strings.CutSuffix(name[len("trust."):], ".json")
		if !ok {
			number, ok = strings.CutSuffix(name[len("trust."):], ".sig")
			p = place{stage: stageTrustSig, limit: MaxSignature}
		}
		n, err := strconv.Atoi(number)
		if !ok || err != nil || n < 1 || n > maxTrustDocuments || strconv.Itoa(n) != number {
			return place{}, unknown
		}
		p.epoch = n
		return p, nil
	case strings.HasPrefix(name, dirCerts) && strings.HasSuffix(name, certSuffix):
		return fromHex(strings.TrimSuffix(name[len(dirCerts):], certSuffix), place{stage: stageCerts, limit: MaxCertificate})
	case strings.HasPrefix(name, dirPieces):
		return fromHex(name[len(dirPieces):], place{stage: stagePieces, limit: MaxHead})
	case strings.HasPrefix(name, dirImages):
		return fromHex(name[len(dirImages):], place{stage: stageImages, limit: MaxImageSize})
	}
	return place{}, unknown
}

// headBuilder takes the entries of a head one by one, in order, from a tar or a folder.
type headBuilder struct {
	head  UnverifiedHead
	last  place
	chain int64 // bytes of trust documents, signatures and certificates
	total int64
}

// accept checks name and size of the next entry before a byte of it is read.
func (b *headBuilder) accept(name string, size int64) (place, error) {
	p, err := placeOf(name)
	if err != nil {
		return p, err
	}
	if err := b.inOrder(p, name); err != nil {
		return p, err
	}
	if size < 0 || size > p.limit {
		return p, Refuse(CodeSize, "%s has %d bytes, more than %d", name, size, p.limit)
	}
	if p.stage == stageImages {
		return p, nil
	}
	b.total += size
	if p.stage <= stageCerts {
		b.chain += size
	}
	if b.chain > MaxTrustChain {
		return p, Refuse(CodeSize, "the trust chain has more than %d bytes", MaxTrustChain)
	}
	if b.total > MaxHead {
		return p, Refuse(CodeSize, "the head has more than %d bytes", MaxHead)
	}
	return p, nil
}

func (b *headBuilder) inOrder(p place, name string) error {
	last := b.last
	ok := false
	switch p.stage {
	case stageTrust:
		ok = last.stage == 0 && p.epoch == 1 || last.stage == stageTrustSig && p.epoch == last.epoch+1
	case stageTrustSig:
		ok = last.stage == stageTrust && p.epoch == last.epoch
	case stageCerts, stagePieces:
		ok = last.stage < p.stage && last.stage >= stageTrustSig ||
			last.stage == p.stage && compareDigests(last.digest, p.digest) < 0
		if p.stage == stagePieces {
			ok = ok && last.stage >= stageManifest && len(b.head.tables) < maxImages
		}
	case stageManifest:
		ok = last.stage == stageTrustSig || last.stage == stageCerts
	case stageSignature:
		ok = last.stage == stageManifest
	case stageImages:
		ok = last.stage >= stageManifest
	}
	if !ok {
		return Refuse(CodeBundle, "%s is twice there or not in its place", name)
	}
	return nil
}

// add takes the bytes of an accepted entry.
func (b *headBuilder) add(p place, data []byte) error {
	switch p.stage {
	case stageTrust:
		b.head.trust = append(b.head.trust, unverifiedTrust{document: data})
	case stageTrustSig:
		b.head.trust[len(b.head.trust)-1].signature = data
	case stageCerts:
		if Digest(sha256.Sum256(data)) != p.digest {
			return Refuse(CodeDigest, "the certificate %s is not the one its name says", CertificateName(p.digest))
		}
		b.head.certs = append(b.head.certs, data)
	case stageManifest:
		b.head.manifest = data
	case stageSignature:
		b.head.signature = data
	case stagePieces:
		if b.head.tables == nil {
			b.head.tables = map[Digest][]byte{}
		}
		b.head.tables[p.digest] = data
	}
	b.last = p
	return nil
}

// finish says whether all that a head needs is there. A missing manifest.sig is
// not a fault of the bundle: it is an unsigned release, which the door names as such.
func (b *headBuilder) finish() (*UnverifiedHead, error) {
	if b.last.stage < stageManifest {
		return nil, Refuse(CodeBundle, "the bundle has no %s", [...]string{"trust.1.json", "trust document's signature", nameManifest, nameManifest}[b.last.stage])
	}
	return &b.head, nil
}
