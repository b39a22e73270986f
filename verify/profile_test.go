package verify

import (
	"bytes"
	"crypto"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// badSigner makes signatures that no tool of ours would.
type badSigner struct {
	t      *testing.T
	entity *openpgp.Entity
}

func newBadSigner(t *testing.T, change func(*packet.Config)) *badSigner {
	t.Helper()
	config := &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return time.Unix(1_700_000_000, 0) }}
	if change != nil {
		change(config)
	}
	e, err := openpgp.NewEntity("Acme", "", "", config)
	if err != nil {
		t.Fatal(err)
	}
	e.Subkeys = nil
	return &badSigner{t, e}
}

func (b *badSigner) cert() *Certificate {
	b.t.Helper()
	var out bytes.Buffer
	if err := b.entity.Serialize(&out); err != nil {
		b.t.Fatal(err)
	}
	c, err := ReadCertificate(out.Bytes())
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

// sign signs data as change says.
func (b *badSigner) sign(data []byte, change func(*packet.Signature)) []byte {
	b.t.Helper()
	key := b.entity.PrivateKey
	sig := &packet.Signature{Version: 4, SigType: packet.SigTypeBinary, PubKeyAlgo: key.PubKeyAlgo, Hash: crypto.SHA256,
		CreationTime: time.Unix(1_700_000_000, 0), IssuerKeyId: &key.KeyId, IssuerFingerprint: key.Fingerprint}
	if change != nil {
		change(sig)
	}
	h := sig.Hash.New()
	if sig.SigType == packet.SigTypeText {
		h.Write(bytes.ReplaceAll(data, []byte("\n"), []byte("\r\n")))
	} else {
		h.Write(data)
	}
	if err := sig.Sign(h, key, nil); err != nil {
		b.t.Fatal(err)
	}
	var out bytes.Buffer
	if err := sig.Serialize(&out); err != nil {
		b.t.Fatal(err)
	}
	return out.Bytes()
}

// The hard cases of OpenPGP signatures, each with the one verdict of our profile,
// whatever this or another library would say. Expiry, retirement and revocation
// are in publish's tests, where the real gpg makes them.
func TestProfileVerdicts(t *testing.T) {
	data := []byte("line one\nline two\n")
	b := newBadSigner(t, nil)
	stranger := newBadSigner(t, nil)
	cert := b.cert()
	good := b.sign(data, nil)
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	many := func(n int, one []byte) []byte { return bytes.Repeat(one, n) }
	// The library does not sign with a weak hash; that the real thing is refused too, gpg shows in publish's tests.
	weak := func(hash byte) []byte {
		sig := bytes.Clone(good)
		if _, n, err := presentLength(sig[1:], "the signature"); err != nil || n+2 != len(sig) {
			t.Fatal("not a packet with a short header")
		}
		sig[5] = hash // behind type, length, version, kind and key algorithm (RFC 9580 section 5.2.3)
		return sig
	}
	ours, theirs := b.entity.PrimaryKey.Fingerprint, stranger.entity.PrimaryKey.Fingerprint
	inOurName := bytes.ReplaceAll(stranger.sign(data, nil), theirs, ours)
	inOurName = bytes.ReplaceAll(inOurName, theirs[12:], ours[12:]) // the key id is its end
	// Issuer (16) and issuer fingerprint (33) become subpackets of private use.
	nobodys := bytes.ReplaceAll(good, append([]byte{22, 33, 4}, ours...), append([]byte{22, 100, 4}, ours...))
	nobodys = bytes.ReplaceAll(nobodys, append([]byte{9, 16}, ours[12:]...), append([]byte{9, 101}, ours[12:]...))
	century := uint32(100 * 365 * 24 * 3600)
	for _, c := range []struct {
		name string
		sig  []byte
		want Code
	}{
		{"ordinary", good, ""},
		{"SHA-384", b.sign(data, func(s *packet.Signature) { s.Hash = crypto.SHA384 }), ""},
		{"SHA-512", b.sign(data, func(s *packet.Signature) { s.Hash = crypto.SHA512 }), ""},
		{"SHA-1", weak(2), CodeSigProfile},
		{"MD5", weak(1), CodeSigKey}, // the library cannot read it, so it is nobody's
		{"text mode", b.sign(data, func(s *packet.Signature) { s.SigType = packet.SigTypeText }), CodeSigProfile},
		{"of a key certification's type", b.sign(data, func(s *packet.Signature) { s.SigType = packet.SigTypePositiveCert }), CodeSigProfile},
		{"dated 1970", b.sign(data, func(s *packet.Signature) { s.CreationTime = time.Unix(1, 0) }), ""},
		{"dated 2099", b.sign(data, func(s *packet.Signature) { s.CreationTime = time.Unix(4_086_000_000, 0) }), ""},
		{"that lapsed after a second", b.sign(data, func(s *packet.Signature) { one := uint32(1); s.SigLifetimeSecs = &one }), ""},
		{"that lasts a century", b.sign(data, func(s *packet.Signature) { s.SigLifetimeSecs = &century }), ""},
		{"a notation", b.sign(data, func(s *packet.Signature) {
			s.Notations = []*packet.Notation{{Name: "a@example.org", Value: []byte("b"), IsHumanReadable: true}}
		}), ""},
		{"a critical notation", b.sign(data, func(s *packet.Signature) {
			s.Notations = []*packet.Notation{{Name: "a@example.org", Value: []byte("b"), IsHumanReadable: true, IsCritical: true}}
		}), CodeSigProfile},
		{"over other bytes", b.sign([]byte("other"), nil), CodeSigBad},
		{"over the same text with other line ends", b.sign(bytes.ReplaceAll(data, []byte("\n"), []byte("\r\n")), nil), CodeSigBad},
		{"by a stranger", stranger.sign(data, nil), CodeSigKey},
		{"by a stranger in our name", inOurName, CodeSigBad},
		{"nobody's, then a good one", join(nobodys, good), CodeSigProfile},
		{"a bad one, then a good one", join(b.sign([]byte("other"), nil), good), ""},
		{"a stranger's, then a good one", join(stranger.sign(data, nil), good), ""},
		{"a weak one, then a good one", join(weak(2), good), ""},
		{"a good one, then a byte", join(good, []byte{0}), CodeFormat},
		{"a good one, then a user id", join(good, []byte{0xcd, 1, 'x'}), CodeFormat},
		{"a byte, then a good one", join([]byte{0}, good), CodeFormat},
		{"cut", good[:len(good)-1], CodeFormat},
		{"nothing", nil, CodeSigNone},
		{"armor", []byte("-----BEGIN PGP SIGNATURE-----\n\n"), CodeFormat},
		{"eight times", many(8, good), ""},
		{"nine times", many(9, good), CodeFormat},
		{"a hundred by the same key", many(100, good), CodeSize},
		{"too long", join(good, make([]byte, MaxSignature)), CodeSize},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := cert.CheckSignature(data, c.sig)
			if CodeOf(err) != c.want || (c.want == "" && err != nil) {
				t.Errorf("got %v (%s), want %q", err, CodeOf(err), c.want)
			}
		})
	}
	t.Run("the same signature counts once", func(t *testing.T) {
		ring := keyring{threshold: 2, certs: []*Certificate{cert}}
		if _, err := ring.check(data, many(8, good), "the data"); CodeOf(err) != CodeSigKey {
			t.Errorf("got %v", err)
		}
	})
	t.Run("short RSA", func(t *testing.T) {
		for bits, want := range map[int]Code{2048: CodeSigProfile, 3072: ""} {
			rsa := newBadSigner(t, func(c *packet.Config) { c.Algorithm, c.RSABits = packet.PubKeyAlgoRSA, bits })
			if err := rsa.cert().CheckSignature(data, rsa.sign(data, nil)); CodeOf(err) != want {
				t.Errorf("%d bits: %v, want %q", bits, err, want)
			}
		}
	})
	t.Run("junk where nothing is signed", func(t *testing.T) {
		// 60 kB fit into the unhashed area; the cap comes before any parsing.
		padded := bytes.Clone(good)
		if err := cert.CheckSignature(data, append(padded, make([]byte, 60_000)...)); CodeOf(err) != CodeSize {
			t.Errorf("got %v", err)
		}
	})
}

// A subkey signs only when its binding says so and carries its own signature back.
func TestProfileVerdictsOnSubkeys(t *testing.T) {
	data := []byte("data")
	for _, c := range []struct {
		name   string
		change func(*packet.Signature)
		want   Code
	}{
		{"bound both ways", func(*packet.Signature) {}, ""},
		{"without the signing flag", func(s *packet.Signature) { s.FlagSign = false }, CodeSigKey},
		{"without flags", func(s *packet.Signature) { s.FlagsValid = false }, CodeSigKey},
		{"without its own signature", func(s *packet.Signature) { s.EmbeddedSignature = nil }, CodeSigKey},
		{"with a back signature for another primary key", func(s *packet.Signature) {
			other := newBadSigner(t, nil)
			s.EmbeddedSignature.IssuerKeyId = &other.entity.PrimaryKey.KeyId
			if err := s.EmbeddedSignature.CrossSignKey(other.entity.PrimaryKey, other.entity.PrimaryKey, other.entity.PrivateKey, nil); err != nil {
				t.Fatal(err)
			}
		}, CodeSigKey},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBadSigner(t, nil)
			e := b.entity
			if err := e.AddSigningSubkey(&packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Time: func() time.Time { return e.PrimaryKey.CreationTime }}); err != nil {
				t.Fatal(err)
			}
			sub := &e.Subkeys[0]
			binding := bind(t, e, *sub)
			c.change(binding)
			if err := binding.SignKey(sub.PublicKey, e.PrivateKey, nil); err != nil {
				t.Fatal(err)
			}
			sub.Bindings = []*packet.VerifiableSignature{packet.NewVerifiableSig(binding)}
			var public, sig bytes.Buffer
			if err := e.Serialize(&public); err != nil {
				t.Fatal(err)
			}
			signer := &badSigner{t, &openpgp.Entity{PrimaryKey: sub.PublicKey, PrivateKey: sub.PrivateKey}}
			sig.Write(signer.sign(data, nil))
			cert, err := ReadCertificate(public.Bytes())
			if err == nil {
				err = cert.CheckSignature(data, sig.Bytes())
			}
			if c.want == "" && err != nil || c.want != "" && err == nil {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
