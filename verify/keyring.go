package verify

import (
	"bytes"
)

// KeySet says who may sign: at least Threshold of Keys.
type KeySet struct {
	Threshold int      `json:"threshold"`
	Keys      []KeyRef `json:"keys"`
}

// KeyRef pins a key by its primary fingerprint and by the SHA-256 of the exact
// certificate shipped beside the document, so that nobody can graft a subkey or
// a name onto it.
type KeyRef struct {
	Fingerprint string `json:"fingerprint"` // upper-case hex
	Cert        Digest `json:"cert"`
}

// MaxKeys is the largest number of keys in a KeySet: as many as signatures fit.
const MaxKeys = MaxSignatures

// keyring is a KeySet with its certificates.
type keyring struct {
	threshold int
	certs     []*Certificate
}

func (s KeySet) check(role string) error {
	if len(s.Keys) < 1 || len(s.Keys) > MaxKeys {
		return Refuse(CodeTrust, "the %s role has %d keys, not 1 to %d", role, len(s.Keys), MaxKeys)
	}
	if s.Threshold < 1 || s.Threshold > len(s.Keys) {
		return Refuse(CodeTrust, "the %s role asks for %d of %d keys", role, s.Threshold, len(s.Keys))
	}
	for i, k := range s.Keys {
		if !isFingerprint(k.Fingerprint) || k.Cert.IsZero() {
			return Refuse(CodeTrust, "the %s role pins a key without fingerprint or certificate", role)
		}
		for _, other := range s.Keys[:i] {
			if other.Fingerprint == k.Fingerprint {
				return Refuse(CodeTrust, "the %s role lists the key %s twice", role, k.Fingerprint)
			}
		}
	}
	return nil
}

// resolve finds the certificates of a checked KeySet. cert returns nil for one that is not there.
func (s KeySet) resolve(role string, cert func(Digest) []byte) (keyring, error) {
	ring := keyring{threshold: s.Threshold}
	seen := map[Digest]bool{}
	for _, k := range s.Keys {
		raw := cert(k.Cert)
		if raw == nil {
			return keyring{}, Refuse(CodeBundle, "the certificate certs/%s.pgp is missing", k.Cert)
		}
		c, err := ReadCertificate(raw)
		if err != nil {
			return keyring{}, Refuse(CodeTrust, "the certificate of %s: %w", k.Fingerprint, err)
		}
		if c.Digest() != k.Cert || c.Fingerprint() != k.Fingerprint {
			return keyring{}, Refuse(CodeTrust, "the certificate of %s is another one than the document pins", k.Fingerprint)
		}
		m, err := material(c.entity.PrimaryKey)
		if err != nil {
			return keyring{}, err
		}
		if seen[m] {
			return keyring{}, Refuse(CodeTrust, "the %s role lists one key pair twice, as %s too", role, k.Fingerprint)
		}
		seen[m] = true
		ring.certs = append(ring.certs, c)
	}
	return ring, nil
}

// check counts the keys of the ring that signed data and refuses unless they
// reach the threshold. Signatures by other keys are ignored: anyone may add one,
// and a document may be signed for two sets of keys at once. When too few hold,
// the code is that of the most telling failure: E-SIG-BAD, E-SIG-PROFILE, else E-SIG-KEY.
func (ring keyring) check(data, signature []byte, what string) ([]Signer, error) {
	signers, worst, err := ring.count(data, signature)
	switch {
	case err != nil:
		return nil, err
	case len(signers) >= ring.threshold:
		return signers, nil
	case worst != nil:
		return nil, worst
	}
	return nil, Refuse(CodeSigKey, "%s is signed by %d of the %d keys it needs", what, len(signers), ring.threshold)
}

// count lists the keys of the ring that signed data, and the most telling failure
// among the signatures by keys of the ring that do not count.
func (ring keyring) count(data, signature []byte) (signers []Signer, worst, err error) {
	sigs, err := readSignatures(signature)
	if err != nil {
		return nil, nil, err
	}
	used := map[Digest]bool{} // key pairs that already counted
	for _, s := range sigs {
		signer, err := ring.signer(s, data, used)
		if err != nil && (worst == nil || weight(err) > weight(worst)) {
			worst = err
		}
		if signer != nil {
			signers = append(signers, *signer)
		}
	}
	return signers, worst, nil
}

// Signers lists the keys of the set that signed data, however few they are: for a
// publisher's tools, which collect signatures one by one. cert returns nil for a
// certificate that is not there. Errors are Refusals; no signature is none.
func (s KeySet) Signers(data, signature []byte, cert func(Digest) []byte) ([]Signer, error) {
	ring, err := s.resolve("signing", cert)
	if err != nil || len(signature) == 0 {
		return nil, err
	}
	signers, _, err := ring.count(data, signature)
	return signers, err
}

// signer returns whom a signature adds to the count: nil when it is by an
// unknown key or by one that counted already.
func (ring keyring) signer(s signaturePacket, data []byte, used map[Digest]bool) (*Signer, error) {
	var failure error
	for _, c := range ring.certs {
		key := c.issuedBy(s)
		if key == nil {
			continue
		}
		if err := c.verify(key, s, data); err != nil {
			failure = err
			continue
		}
		primary, err := material(c.entity.PrimaryKey)
		if err != nil {
			return nil, err
		}
		signing, err := material(key)
		if err != nil {
			return nil, err
		}
		// A subkey shared by two certificates is one signer, not two.
		if used[primary] || used[signing] {
			return nil, nil
		}
		used[primary], used[signing] = true, true
		s := c.signer()
		return &s, nil
	}
	return nil, failure
}

func weight(err error) int {
	switch CodeOf(err) {
	case CodeSigBad:
		return 3
	case CodeSigProfile:
		return 2
	}
	return 1
}

// CheckSignature checks one signature packet by this certificate over data, for
// a publisher's tools. Errors are Refusals: E-SIG-KEY when the packet names
// another key, else as for a device.
func (c *Certificate) CheckSignature(data, signature []byte) error {
	ring := keyring{threshold: 1, certs: []*Certificate{c}}
	_, err := ring.check(data, bytes.Clone(signature), "the document")
	return err
}

// isFingerprint reports whether s is the upper-case hex of a version 4 fingerprint.
func isFingerprint(s string) bool {
	if len(s) != 40 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'A' || c > 'F') {
			return false
		}
	}
	return true
}
