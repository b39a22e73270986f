package verify

import (
	"time"
)

// TrustFormat is the value of TrustDocument.Format that this version reads and writes.
const TrustFormat = "meshupd.trust/1"

// Caps on trust documents and on the chain of them.
const (
	MaxTrustDocument  = 64 << 10 // bytes
	MaxTrustChain     = 4 << 20  // bytes of all documents, signatures and certificates
	maxTrustDocuments = 256
)

var understoodTrust = []string{
	"format", "product", "epoch", "root", "release", "line", "min_seq", "issued_at", "release_until", "critical",
}

// TrustDocument says whose signatures count for a product. Document Epoch+1 must
// be signed by the root threshold of document Epoch and by its own, so the keys
// of both can be replaced, and nobody can be put in charge who does not hold a key.
type TrustDocument struct {
	Format       string    `json:"format"` // TrustFormat
	Product      string    `json:"product"`
	Epoch        uint64    `json:"epoch"`   // 1, 2, 3 ...
	Root         KeySet    `json:"root"`    // sign trust documents
	Release      KeySet    `json:"release"` // sign manifests
	Line         uint64    `json:"line"`    // manifests of another line are refused; raised after a theft of keys
	MinSeq       uint64    `json:"min_seq"` // manifests of this line with a smaller seq are refused
	IssuedAt     time.Time `json:"issued_at"`
	ReleaseUntil time.Time `json:"release_until"` // a manifest issued later than this is refused
	Critical     []string  `json:"critical,omitempty"`
}

// ParseUnverifiedTrust reads a trust document strictly; that says nothing about
// who wrote it. Errors are Refusals (E-FORMAT, E-TRUST, E-SIZE, E-CRITICAL).
func ParseUnverifiedTrust(raw []byte) (TrustDocument, error) {
	var t TrustDocument
	if len(raw) > MaxTrustDocument {
		return t, Refuse(CodeSize, "the trust document has %d bytes, more than %d", len(raw), MaxTrustDocument)
	}
	if err := decodeStrict(raw, "the trust document", &t); err != nil {
		return TrustDocument{}, err
	}
	if err := t.check(); err != nil {
		return TrustDocument{}, err
	}
	return t, nil
}

// EncodeTrust writes the bytes that get signed.
func EncodeTrust(t TrustDocument) ([]byte, error) {
	raw, err := encodeCanonical(t)
	if err != nil {
		return nil, Refuse(CodeFormat, "write the trust document: %w", err)
	}
	if _, err := ParseUnverifiedTrust(raw); err != nil {
		return nil, err
	}
	return raw, nil
}

func (t *TrustDocument) check() error {
	if t.Format != TrustFormat {
		return Refuse(CodeFormat, "the trust document has format %q, not %q", clip(t.Format), TrustFormat)
	}
	if err := checkCritical(t.Critical, understoodTrust); err != nil {
		return err
	}
	switch {
	case !isID(t.Product):
		return Refuse(CodeFormat, "the trust document's product %q is not a name", clip(t.Product))
	case t.Epoch < 1 || t.Epoch > maxTrustDocuments:
		return Refuse(CodeFormat, "the trust document's epoch %d is not between 1 and %d", t.Epoch, maxTrustDocuments)
	case t.Line > MaxSeq || t.MinSeq > MaxSeq:
		return Refuse(CodeFormat, "the trust document's line %d or min_seq %d is out of range", t.Line, t.MinSeq)
	case !isTime(t.IssuedAt) || !isTime(t.ReleaseUntil):
		return Refuse(CodeFormat, "the trust document's dates are not whole UTC seconds")
	case !t.ReleaseUntil.After(t.IssuedAt):
		return Refuse(CodeFormat, "the trust document's release_until is not after its issued_at")
	}
	if err := t.Root.check("root"); err != nil {
		return err
	}
	return t.Release.check("release")
}

// trusted is a trust document that was verified in its place in a chain.
type trusted struct {
	TrustDocument
	raw, signature []byte
	root, release  keyring
}

// trustChain is a verified chain, oldest first: chain[i] has epoch i+1. It is
// immutable; a longer chain is a new value that shares the beginning.
type trustChain []*trusted

func (c trustChain) newest() *trusted { return c[len(c)-1] }

// provenTime is the latest date that a trusted root vouched for.
func (c trustChain) provenTime() time.Time {
	var p time.Time
	for _, t := range c {
		if t.IssuedAt.After(p) {
			p = t.IssuedAt
		}
	}
	return p
}

// certs lists the certificates that the chain pins, by digest.
func (c trustChain) certs() map[Digest][]byte {
	out := map[Digest][]byte{}
	for _, t := range c {
		for _, ring := range []keyring{t.root, t.release} {
			for _, cert := range ring.certs {
				out[cert.Digest()] = cert.raw
			}
		}
	}
	return out
}

// extend verifies one more document. On an empty chain it is the first: then the
// caller vouches for it (the factory did), and only its own root has to sign.
// Errors are Refusals, nearly all E-TRUST.
func (c trustChain) extend(doc unverifiedTrust, cert func(Digest) []byte) (trustChain, error) {
	epoch := len(c) + 1
	if len(c) > 0 {
		// The raw bytes are checked against keys we already trust before anything parses them.
		if _, err := c.newest().root.check(doc.document, doc.signature, "the trust document"); err != nil {
			return nil, Refuse(CodeTrust, "trust document %d is not signed by the root of document %d: %w", epoch, epoch-1, err)
		}
	}
	t := &trusted{raw: doc.document, signature: doc.signature}
	var err error
	if t.TrustDocument, err = ParseUnverifiedTrust(doc.document); err != nil {
		return nil, err
	}
	if err := c.follows(t); err != nil {
		return nil, err
	}
	if t.root, err = t.Root.resolve("root", cert); err != nil {
		return nil, err
	}
	if t.release, err = t.Release.resolve("release", cert); err != nil {
		return nil, err
	}
	if _, err := t.root.check(doc.document, doc.signature, "the trust document"); err != nil {
		return nil, Refuse(CodeTrust, "trust document %d is not signed by its own root: %w", epoch, err)
	}
	return append(c[:len(c):len(c)], t), nil
}

// follows checks what must not go back from one document to the next.
func (c trustChain) follows(t *trusted) error {
	if t.Epoch != uint64(len(c)+1) {
		return Refuse(CodeTrust, "the trust document in place %d says it is document %d", len(c)+1, t.Epoch)
	}
	if len(c) == 0 {
		return nil
	}
	last := c.newest()
	switch {
	case t.Product != last.Product:
		return Refuse(CodeTrust, "trust document %d is for product %s, not %s", t.Epoch, t.Product, last.Product)
	case t.Line < last.Line:
		return Refuse(CodeTrust, "trust document %d lowers the line from %d to %d", t.Epoch, last.Line, t.Line)
	case t.Line == last.Line && t.MinSeq < last.MinSeq:
		return Refuse(CodeTrust, "trust document %d lowers min_seq from %d to %d", t.Epoch, last.MinSeq, t.MinSeq)
	}
	return nil
}
