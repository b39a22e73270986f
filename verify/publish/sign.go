package publish

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Sign adds the key's signature to a release folder, in place of an older one by
// the same primary key. The key must be one of the release keys of the folder's
// newest trust document (E-SIG-KEY); the manifest must be one that devices read.
func Sign(dir string, key *SecretKey) error {
	raw, m, err := manifestToSign(dir)
	if err != nil {
		return err
	}
	// The date of the manifest, not of today: signing again gives the same bytes.
	sig, err := key.DetachSign(raw, signingTime(m.IssuedAt, key))
	if err != nil {
		return err
	}
	if _, err := Absorb(dir); err != nil {
		return err
	}
	return addSignatures(dir, raw, [][]byte{sig})
}

// AddSignature adds detached signatures that gpg made, armored or binary. Each
// must be a signature that a device would count: E-SIG-KEY, E-SIG-BAD, E-SIG-PROFILE.
func AddSignature(dir string, signature []byte) error {
	raw, _, err := manifestToSign(dir)
	if err != nil {
		return err
	}
	if len(signature) > 4*verify.MaxSignature {
		return verify.Refuse(verify.CodeSize, "the signature has more than %d bytes", 4*verify.MaxSignature)
	}
	binary, err := dearmor(signature)
	if err != nil {
		return verify.Refuse(verify.CodeFormat, "read the signature: %w", err)
	}
	parts, err := verify.SplitSignatures(binary)
	if err != nil {
		return err
	}
	return addSignatures(dir, raw, parts)
}

// gpgLeaves are the names that `gpg --armor --detach-sign manifest.json` and
// `gpg --detach-sign manifest.json` write to.
var gpgLeaves = []string{"manifest.json.asc", "manifest.json.sig"}

// Absorb takes up signatures that gpg left beside the manifest and removes the
// files; it returns how many files there were.
func Absorb(dir string) (int, error) {
	var n int
	for _, name := range gpgLeaves {
		path := filepath.Join(dir, name)
		raw, err := readAtMost(path, 4*verify.MaxSignature)
		if verify.CodeOf(err) == verify.CodeNotFound {
			continue
		}
		if err != nil {
			return n, err
		}
		if err := AddSignature(dir, raw); err != nil {
			return n, verify.Refuse(verify.CodeOf(err), "%s: %w", name, err)
		}
		if err := durable.Remove(path); err != nil {
			return n, verify.Refuse(verify.CodeIO, "take up %s: %w", name, err)
		}
		n++
	}
	return n, nil
}

func manifestToSign(dir string) ([]byte, verify.Manifest, error) {
	raw, err := readAtMost(filepath.Join(dir, "manifest.json"), verify.MaxManifest)
	if err != nil {
		return nil, verify.Manifest{}, err
	}
	m, err := verify.ParseUnverifiedManifest(raw)
	if err != nil {
		return nil, verify.Manifest{}, err
	}
	return raw, m, notAhead(m.IssuedAt)
}

// checkDevelopment keeps a development key away from the channel of real devices.
func checkDevelopment(m verify.Manifest, cert *verify.Certificate) error {
	if m.Channel == verify.StableChannel && cert.Development() {
		return verify.Refuse(verify.CodeDevKey, "%s is a development key, which does not count on the channel %s", cert.Name(), m.Channel)
	}
	return nil
}

func addSignatures(dir string, manifest []byte, parts [][]byte) error {
	certs, err := releaseCertificates(dir)
	if err != nil {
		return err
	}
	m, err := verify.ParseUnverifiedManifest(manifest)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "manifest.sig")
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return verify.Refuse(verify.CodeIO, "read manifest.sig: %w", err)
	}
	var kept [][]byte
	if len(old) > 0 {
		if kept, err = verify.SplitSignatures(old); err != nil {
			return err
		}
	}
	for _, part := range parts {
		cert, err := signerOf(certs, manifest, part)
		if err != nil {
			return err
		}
		if err := checkDevelopment(m, cert); err != nil {
			return err
		}
		kept = append(without(kept, cert), part)
	}
	joined := bytes.Join(kept, nil)
	// What is written must be readable again: the cap on the number of signatures holds here too.
	if _, err := verify.SplitSignatures(joined); err != nil {
		return err
	}
	if bytes.Equal(joined, old) {
		return nil
	}
	if err := durable.WriteFile(path, joined, 0o644); err != nil {
		return verify.Refuse(verify.CodeIO, "write manifest.sig: %w", err)
	}
	return nil
}

// without drops the signatures that name a key of cert.
func without(parts [][]byte, cert *verify.Certificate) [][]byte {
	var out [][]byte
	for _, p := range parts {
		if !cert.Issued(p) {
			out = append(out, p)
		}
	}
	return out
}

func signerOf(certs []*verify.Certificate, manifest, signature []byte) (*verify.Certificate, error) {
	err := verify.Refuse(verify.CodeSigKey, "the signature is not by a release key of the newest trust document")
	for _, c := range certs {
		if !c.Issued(signature) {
			continue
		}
		if err = c.CheckSignature(manifest, signature); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// Progress of signing by several keys.
type Progress struct {
	Signers []verify.Signer `json:"signers,omitempty"`
	Need    int             `json:"need"` // how many keys have to sign
}

// Missing is how many keys still have to sign.
func (p Progress) Missing() int { return max(0, p.Need-len(p.Signers)) }

// SigningProgress tells which release keys signed the release in a folder.
func SigningProgress(dir string) (Progress, error) {
	docs, err := readTrust(dir)
	if err != nil {
		return Progress{}, err
	}
	manifest, err := readAtMost(filepath.Join(dir, "manifest.json"), verify.MaxManifest)
	if err != nil {
		return Progress{}, err
	}
	signature, err := readAtMost(filepath.Join(dir, "manifest.sig"), verify.MaxSignature)
	if err != nil && verify.CodeOf(err) != verify.CodeNotFound {
		return Progress{}, err
	}
	return progressOf(dir, docs[len(docs)-1].Release, manifest, signature)
}

func progressOf(dir string, set verify.KeySet, document, signature []byte) (Progress, error) {
	signers, err := set.Signers(document, signature, func(d verify.Digest) []byte {
		raw, err := readAtMost(filepath.Join(dir, filepath.FromSlash(verify.CertificateName(d))), verify.MaxCertificate)
		if err != nil {
			return nil
		}
		return raw
	})
	return Progress{Signers: signers, Need: set.Threshold}, err
}

// releaseCertificates are those of the newest trust document in the folder.
func releaseCertificates(dir string) ([]*verify.Certificate, error) {
	docs, err := readTrust(dir)
	if err != nil {
		return nil, err
	}
	return certificatesOf(dir, docs[len(docs)-1].Release)
}

func certificatesOf(dir string, set verify.KeySet) ([]*verify.Certificate, error) {
	var certs []*verify.Certificate
	for _, k := range set.Keys {
		raw, err := readAtMost(filepath.Join(dir, filepath.FromSlash(verify.CertificateName(k.Cert))), verify.MaxCertificate)
		if err != nil {
			return nil, err
		}
		c, err := verify.ReadCertificate(raw)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	return certs, nil
}
