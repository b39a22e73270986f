package publish

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// TrustOptions describe the first trust document of a product.
type TrustOptions struct {
	Product          string
	Root             []*verify.Certificate // may sign trust documents
	RootThreshold    int                   // 0 means 1
	Release          []*verify.Certificate // may sign releases; none: the root keys
	ReleaseThreshold int                   // 0 means 1
	Signers          []*SecretKey          // at least RootThreshold of Root
	IssuedAt         time.Time             // zero: Now()
	ReleaseUntil     time.Time             // zero: five years after IssuedAt
}

// defaultTrustYears is long, because a device may stay unplugged for years and
// a release key that ends early leaves it without updates.
const defaultTrustYears = 5

// InitTrust writes trust.1.json, trust.1.sig and certs/ into dir, which becomes
// both the anchor that is built into devices and the trust folder that Create
// copies from. It refuses to replace a trust document that is there (E-USAGE),
// and with what verify says of the document.
func InitTrust(dir string, o TrustOptions) error {
	doc, err := o.document()
	if err != nil {
		return err
	}
	if err := notAhead(doc.IssuedAt); err != nil {
		return err
	}
	raw, err := verify.EncodeTrust(doc)
	if err != nil {
		return err
	}
	var signature bytes.Buffer
	for _, k := range o.Signers {
		sig, err := k.DetachSign(raw, signingTime(doc.IssuedAt, k))
		if err != nil {
			return err
		}
		signature.Write(sig)
	}
	if _, err := os.Lstat(filepath.Join(dir, "trust.1.json")); !errors.Is(err, fs.ErrNotExist) {
		return verify.Refuse(verify.CodeUsage, "make the trust folder: %s already has a trust document", dir)
	}
	if err := writeTrust(dir, o.certificates(), raw, signature.Bytes()); err != nil {
		return err
	}
	return checkTrust(dir)
}

func (o *TrustOptions) document() (verify.TrustDocument, error) {
	release := o.Release
	if len(release) == 0 {
		release = o.Root
	}
	issued := o.IssuedAt
	if issued.IsZero() {
		var err error
		if issued, err = Now(); err != nil {
			return verify.TrustDocument{}, err
		}
	}
	issued = issued.UTC().Truncate(time.Second)
	until := o.ReleaseUntil
	if until.IsZero() {
		until = issued.AddDate(defaultTrustYears, 0, 0)
	}
	return verify.TrustDocument{
		Format:       verify.TrustFormat,
		Product:      o.Product,
		Epoch:        1,
		Root:         keySet(o.Root, o.RootThreshold),
		Release:      keySet(release, o.ReleaseThreshold),
		Line:         1,
		MinSeq:       1,
		IssuedAt:     issued,
		ReleaseUntil: until.UTC().Truncate(time.Second),
	}, nil
}

func (o *TrustOptions) certificates() []*verify.Certificate {
	return append(append([]*verify.Certificate{}, o.Root...), o.Release...)
}

func keySet(certs []*verify.Certificate, threshold int) verify.KeySet {
	set := verify.KeySet{Threshold: max(threshold, 1)}
	for _, c := range certs {
		set.Keys = append(set.Keys, verify.KeyRef{Fingerprint: c.Fingerprint(), Cert: c.Digest()})
	}
	return set
}

func writeTrust(dir string, certs []*verify.Certificate, document, signature []byte) error {
	if err := writeCertificates(dir, certs); err != nil {
		return err
	}
	if err := writeTrustFile(dir, "trust.1.sig", signature); err != nil {
		return err
	}
	return writeTrustFile(dir, "trust.1.json", document)
}

func writeCertificates(dir string, certs []*verify.Certificate) error {
	if err := durable.MkdirAll(filepath.Join(dir, "certs"), 0o755); err != nil {
		return verify.Refuse(verify.CodeIO, "make the trust folder: %w", err)
	}
	for _, c := range certs {
		if err := writeTrustFile(dir, verify.CertificateName(c.Digest()), c.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

func writeTrustFile(dir, name string, data []byte) error {
	if err := durable.WriteFile(filepath.Join(dir, filepath.FromSlash(name)), data, 0o644); err != nil {
		return verify.Refuse(verify.CodeIO, "write the trust folder: %w", err)
	}
	return nil
}

// checkTrust opens the folder the way a device would.
func checkTrust(dir string) error {
	_, err := withDoor(dir, func(*verify.Door) (*verify.Release, error) { return nil, nil })
	return err
}

// withDoor runs check with a fresh door in a temporary folder.
func withDoor(anchor string, check func(*verify.Door) (*verify.Release, error)) (*verify.Release, error) {
	state, err := os.MkdirTemp("", "meshupd-verify-")
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "make a temporary folder: %w", err)
	}
	defer os.RemoveAll(state)
	door, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: anchor})
	if err != nil {
		return nil, err
	}
	return check(door)
}

// readTrust reads the documents of a trust folder that already passed checkTrust.
func readTrust(dir string) ([]verify.TrustDocument, error) {
	var docs []verify.TrustDocument
	for n := 1; ; n++ {
		raw, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("trust.%d.json", n)))
		if errors.Is(err, fs.ErrNotExist) && n > 1 {
			return docs, nil
		}
		if err != nil {
			return nil, verify.Refuse(verify.CodeIO, "read the trust folder: %w", err)
		}
		doc, err := verify.ParseUnverifiedTrust(raw)
		if err != nil {
			return nil, err
		}
		docs = append(docs, doc)
	}
}

// signingTime dates a signature: not before the key and what the key says of
// itself were made, or gpg and the library call the signature bad.
func signingTime(at time.Time, k *SecretKey) time.Time {
	later := func(t time.Time) {
		if at.Before(t) {
			at = t
		}
	}
	later(k.entity.PrimaryKey.CreationTime)
	for _, id := range k.entity.Identities {
		for _, sig := range id.SelfCertifications {
			later(sig.Packet.CreationTime)
		}
	}
	for _, sub := range k.entity.Subkeys {
		later(sub.PublicKey.CreationTime)
		for _, sig := range sub.Bindings {
			later(sig.Packet.CreationTime)
		}
	}
	return at
}
