package verify

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// The OpenPGP profile. A signature counts when it is a version 4, type 0x00
// (binary document) signature with SHA-256, SHA-384 or SHA-512, made by a pinned
// primary key or a signing subkey of it, RSA of at least 3072 bits, Ed25519, or
// NIST P-256, P-384 or P-521.
//
// Time plays no part: keys are judged at the zero time, at which the library
// skips every expiry, so a device that thinks it is 1970 decides like any other
// and nobody gains by choosing a signature's date. Revocations that say
// "compromised" or give no reason refuse; "superseded" and "retired" do not: the
// trust document alone says which key is in use.
const minRSABits = 3072

var profileHashes = []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}

var profileCurves = []packet.Curve{packet.Curve25519, packet.CurveNistP256, packet.CurveNistP384, packet.CurveNistP521}

// profileConfig is for the few library calls that want one.
var profileConfig = &packet.Config{
	Time:       func() time.Time { return time.Time{} },
	MinRSABits: minRSABits,
}

// Certificate is an OpenPGP certificate (a public key with its names and
// subkeys). It is only as trustworthy as the document that pins its digest.
type Certificate struct {
	entity      *openpgp.Entity
	raw         []byte
	fingerprint string
	name        string
	development bool
}

// ReadCertificate reads exactly one binary certificate. Errors are Refusals
// (E-TRUST, E-FORMAT, E-SIZE).
func ReadCertificate(raw []byte) (cert *Certificate, err error) {
	const what = "the certificate"
	if len(raw) == 0 || len(raw) > MaxCertificate {
		return nil, Refuse(CodeSize, "%s has %d bytes, not 1 to %d", what, len(raw), MaxCertificate)
	}
	packets, err := splitPackets(raw, what, maxPackets,
		packetPublicKey, packetSignature, packetTrust, packetUserID, packetPublicSubkey, packetUserAttribute)
	if err != nil {
		return nil, err
	}
	for i, p := range packets {
		if tag, _, _ := packetHeader(p, what); (tag == packetPublicKey) != (i == 0) {
			return nil, Refuse(CodeFormat, "%s does not hold exactly one primary key", what)
		}
	}
	defer guard(what, &err)
	entity, err := openpgp.ReadEntity(packet.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, Refuse(CodeFormat, "read %s: %w", what, err)
	}
	if entity.PrimaryKey.Version != 4 {
		return nil, Refuse(CodeTrust, "%s has an OpenPGP key of version %d, not 4", what, entity.PrimaryKey.Version)
	}
	names := certifiedNames(entity)
	return &Certificate{
		entity:      entity,
		raw:         bytes.Clone(raw),
		fingerprint: strings.ToUpper(hex.EncodeToString(entity.PrimaryKey.Fingerprint)),
		name:        shownName(names),
		development: slices.ContainsFunc(names, isDevelopment),
	}, nil
}

// DevelopmentMark ends the name of a key that was made for trying things out.
const DevelopmentMark = " DEVELOPMENT"

// StableChannel is the channel of real devices: development keys do not count there.
const StableChannel = "stable"

// isDevelopment also looks before a mail address, where gpg puts it last.
func isDevelopment(name string) bool {
	if at := strings.LastIndex(name, " <"); at > 0 {
		name = name[:at]
	}
	return strings.HasSuffix(name, DevelopmentMark)
}

// Development reports whether one of the key's names marks it as one for trying things out.
func (c *Certificate) Development() bool { return c.development }

func (c *Certificate) signer() Signer {
	return Signer{Name: c.name, Fingerprint: c.fingerprint, Development: c.development}
}

// Fingerprint is the upper-case hex of the primary key.
func (c *Certificate) Fingerprint() string { return c.fingerprint }

// Name is the first user id in the order of the alphabet that the key itself certifies.
func (c *Certificate) Name() string { return c.name }

// Bytes are the exact bytes that were read. Do not change them.
func (c *Certificate) Bytes() []byte { return c.raw }

// Digest is the SHA-256 of the exact bytes, as trust documents pin it.
func (c *Certificate) Digest() Digest { return sha256.Sum256(c.raw) }

// certifiedNames are the user ids that the key itself certifies.
func certifiedNames(e *openpgp.Entity) []string {
	var names []string
	for name, id := range e.Identities {
		if _, err := id.Verify(time.Time{}, profileConfig); err == nil {
			names = append(names, name)
		}
	}
	return names
}

// shownName is for people; control characters in it would reach terminals.
func shownName(names []string) string {
	if len(names) == 0 {
		return ""
	}
	name := strings.ToValidUTF8(slices.Min(names), "?")
	return clip(strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, name))
}

// signaturePacket is one parsed signature; foreign says that the library cannot
// read it, which makes it a signature of a key that nobody here can pin.
type signaturePacket struct {
	sig     *packet.Signature
	foreign bool
}

// SplitSignatures cuts the bytes of a .sig file into its signature packets.
// Errors are Refusals (E-SIG-NONE, E-FORMAT, E-SIZE).
func SplitSignatures(raw []byte) ([][]byte, error) {
	const what = "the signature"
	if len(raw) == 0 {
		return nil, Refuse(CodeSigNone, "there is no signature")
	}
	if len(raw) > MaxSignature {
		return nil, Refuse(CodeSize, "%s has %d bytes, more than %d", what, len(raw), MaxSignature)
	}
	return splitPackets(raw, what, MaxSignatures, packetSignature)
}

func readSignatures(raw []byte) ([]signaturePacket, error) {
	parts, err := SplitSignatures(raw)
	if err != nil {
		return nil, err
	}
	out := make([]signaturePacket, len(parts))
	for i, part := range parts {
		if out[i], err = readSignature(part); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func readSignature(raw []byte) (s signaturePacket, err error) {
	defer guard("the signature", &err)
	r := bytes.NewReader(raw)
	p, err := packet.Read(r)
	sig, ok := p.(*packet.Signature)
	if err != nil || !ok {
		return signaturePacket{foreign: true}, nil
	}
	if r.Len() != 0 {
		return s, Refuse(CodeFormat, "the signature has bytes after its end")
	}
	// Readers disagree on what such a signature does to those after it, so no file may have one.
	if sig.IssuerKeyId == nil && len(sig.IssuerFingerprint) == 0 {
		return s, Refuse(CodeSigProfile, "there is a signature that does not say whose it is")
	}
	return signaturePacket{sig: sig}, nil
}

// issuedBy finds the key of the certificate that a signature names, or nil.
func (c *Certificate) issuedBy(s signaturePacket) *packet.PublicKey {
	if s.foreign {
		return nil
	}
	names := func(k *packet.PublicKey) bool {
		if len(s.sig.IssuerFingerprint) > 0 {
			return bytes.Equal(s.sig.IssuerFingerprint, k.Fingerprint)
		}
		return s.sig.IssuerKeyId != nil && *s.sig.IssuerKeyId == k.KeyId
	}
	if names(c.entity.PrimaryKey) {
		return c.entity.PrimaryKey
	}
	for i := range c.entity.Subkeys {
		if names(c.entity.Subkeys[i].PublicKey) {
			return c.entity.Subkeys[i].PublicKey
		}
	}
	return nil
}

// Issued says whether a signature packet names a key of this certificate. It
// does not check the signature.
func (c *Certificate) Issued(signature []byte) bool {
	s, err := readSignature(signature)
	return err == nil && c.issuedBy(s) != nil
}

// verify checks one signature that names key, a key of this certificate, over
// data. Errors are Refusals: E-SIG-PROFILE, E-SIG-KEY (revoked, not a signing
// key), E-SIG-BAD.
func (c *Certificate) verify(key *packet.PublicKey, s signaturePacket, data []byte) (err error) {
	defer guard("the signature", &err)
	if err := checkProfile(key, s.sig); err != nil {
		return err
	}
	if err := c.checkUsable(key); err != nil {
		return err
	}
	h, err := s.sig.PrepareVerify()
	if err != nil {
		return Refuse(CodeSigProfile, "check the signature of %s: %w", c.fingerprint, err)
	}
	h.Write(data)
	if err := key.VerifySignature(h, s.sig); err != nil {
		return Refuse(CodeSigBad, "the signature of %s does not match the bytes", c.fingerprint)
	}
	return nil
}

func checkProfile(key *packet.PublicKey, sig *packet.Signature) error {
	switch {
	case sig.Version != 4 || key.Version != 4:
		return Refuse(CodeSigProfile, "the signature has version %d, not 4", sig.Version)
	case sig.SigType != packet.SigTypeBinary:
		return Refuse(CodeSigProfile, "the signature is of type 0x%02x, not 0x00 (binary document)", uint8(sig.SigType))
	case !slices.Contains(profileHashes, sig.Hash):
		return Refuse(CodeSigProfile, "the signature uses %v, not SHA-256 or better", sig.Hash)
	}
	for _, n := range sig.Notations {
		if n.IsCritical {
			return Refuse(CodeSigProfile, "the signature has the critical notation %q", clip(n.Name))
		}
	}
	return checkKey(key)
}

// checkKey holds the key itself against the profile.
func checkKey(key *packet.PublicKey) error {
	switch key.PubKeyAlgo {
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly:
		if bits, err := key.BitLength(); err != nil || bits < minRSABits {
			return Refuse(CodeSigProfile, "the key has %d bits of RSA, fewer than %d", bits, minRSABits)
		}
		return nil
	case packet.PubKeyAlgoEd25519:
		return nil
	case packet.PubKeyAlgoEdDSA, packet.PubKeyAlgoECDSA:
		if curve, err := key.Curve(); err != nil || !slices.Contains(profileCurves, curve) {
			return Refuse(CodeSigProfile, "the key uses the curve %q, which is not allowed", curve)
		}
		return nil
	}
	return Refuse(CodeSigProfile, "the key uses public key algorithm %d, which is not allowed", key.PubKeyAlgo)
}

// checkUsable says whether a key of the certificate may sign, apart from time.
func (c *Certificate) checkUsable(key *packet.PublicKey) error {
	e := c.entity
	self, err := e.PrimarySelfSignature(time.Time{}, profileConfig)
	if err != nil {
		return Refuse(CodeSigKey, "the key %s has no valid name: %w", c.fingerprint, err)
	}
	for _, r := range e.Revocations {
		if isHard(r.Packet) && e.PrimaryKey.VerifyRevocationSignature(r.Packet) == nil {
			return Refuse(CodeSigKey, "the key %s is revoked as compromised", c.fingerprint)
		}
	}
	if key == e.PrimaryKey {
		if !self.FlagsValid || !self.FlagSign {
			return Refuse(CodeSigKey, "the key %s is not for signing", c.fingerprint)
		}
		return nil
	}
	for i := range e.Subkeys {
		sub := &e.Subkeys[i]
		if sub.PublicKey != key {
			continue
		}
		for _, r := range sub.Revocations {
			if isHard(r.Packet) && e.PrimaryKey.VerifySubkeyRevocationSignature(r.Packet, key) == nil {
				return Refuse(CodeSigKey, "a subkey of %s is revoked as compromised", c.fingerprint)
			}
		}
		// The binding holds the back signature, without which anyone's subkey could be adopted.
		binding, err := sub.LatestValidBindingSignature(time.Time{}, profileConfig)
		if err != nil || !binding.FlagsValid || !binding.FlagSign {
			return Refuse(CodeSigKey, "the subkey %s of %s is not for signing", key.KeyIdString(), c.fingerprint)
		}
		return nil
	}
	return Refuse(CodeSigKey, "the key %s is not part of the certificate", c.fingerprint)
}

// isHard reports whether a revocation also condemns what was signed before it (RFC 9580 section 5.2.3.31).
func isHard(sig *packet.Signature) bool {
	r := sig.RevocationReason
	return r == nil || *r != packet.KeySuperseded && *r != packet.KeyRetired
}

// material names the key pair itself: without creation time, and the same for
// the two OpenPGP encodings of Ed25519. Two certificates of one key pair must
// not count as two signers.
func material(key *packet.PublicKey) (d Digest, err error) {
	defer guard("the certificate", &err)
	var buf bytes.Buffer
	if err := key.Serialize(&buf); err != nil {
		return d, Refuse(CodeFormat, "read the certificate: %w", err)
	}
	raw := buf.Bytes()
	body, err := packetBody(raw)
	if err != nil {
		return d, err
	}
	// Version 4: version, four bytes of creation time, algorithm, material.
	if len(body) < 6 {
		return d, Refuse(CodeFormat, "the certificate has a key without material")
	}
	body = body[6:]
	switch key.PubKeyAlgo {
	case packet.PubKeyAlgoEdDSA, packet.PubKeyAlgoEd25519:
		if len(body) > 32 {
			body = body[len(body)-32:]
		}
		return sha256.Sum256(append([]byte("ed25519 "), body...)), nil
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly:
		return sha256.Sum256(append([]byte("rsa "), body...)), nil
	}
	return sha256.Sum256(fmt.Appendf(nil, "%d %s", key.PubKeyAlgo, body)), nil
}

// packetBody is one packet that the library wrote, without its header.
func packetBody(raw []byte) ([]byte, error) {
	const what = "the certificate"
	_, size, err := packetHeader(raw, what)
	if err != nil {
		return nil, err
	}
	var header int
	if raw[0]&0x40 != 0 {
		header, _, err = presentLength(raw[1:], what)
	} else {
		header, _, err = legacyLength(raw[1:], int(raw[0]&3), what)
	}
	return raw[1+header : size], err
}

// guard turns a panic of the OpenPGP library into a refusal: it parses hostile
// bytes, and a device must outlive a bug in it.
func guard(what string, err *error) {
	if r := recover(); r != nil {
		*err = Refuse(CodeFormat, "read %s: %w", what, errors.Join(errPanic, fmt.Errorf("%v", r)))
	}
}

var errPanic = errors.New("the OpenPGP library failed")
