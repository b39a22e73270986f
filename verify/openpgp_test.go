package verify

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

func sample(t *testing.T, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile("testdata/seeds/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestSamplesOfGpgHold(t *testing.T) {
	for _, name := range []string{"gpg-rsa3072", "gpg-ed25519", "gpg-nistp256", "release"} {
		data := sample(t, "manifest.json")
		cert, err := ReadCertificate(sample(t, name+".pgp"))
		if err != nil {
			t.Fatal(err)
		}
		sig := "manifest.sig"
		if strings.HasPrefix(name, "gpg") {
			data, sig = sample(t, "manifest-gpg.json"), name+".sig"
		}
		raw := sample(t, sig)
		if err := cert.CheckSignature(data, raw); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := cert.CheckSignature(data[1:], raw); CodeOf(err) != CodeSigBad {
			t.Errorf("%s over other data: %v, want E-SIG-BAD", name, err)
		}
	}
}

func TestWeakKeysOfGpgAreRefused(t *testing.T) {
	for _, name := range []string{"gpg-rsa2048", "gpg-dsa2048"} {
		cert, err := ReadCertificate(sample(t, name+".pgp"))
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignature(sample(t, "manifest-gpg.json"), sample(t, name+".sig")); CodeOf(err) != CodeSigProfile {
			t.Errorf("%s: %v, want E-SIG-PROFILE", name, err)
		}
	}
}

func TestCertificatesAreReadWhole(t *testing.T) {
	good := sample(t, "gpg-ed25519.pgp")
	other := sample(t, "gpg-nistp256.pgp")
	for _, c := range []struct {
		name string
		raw  []byte
		want Code
	}{
		{"empty", nil, CodeSize},
		{"too large", make([]byte, MaxCertificate+1), CodeSize},
		{"two of them", append(bytes.Clone(good), other...), CodeFormat},
		{"bytes after it", append(bytes.Clone(good), 0), CodeFormat},
		{"a signature alone", sample(t, "gpg-ed25519.sig"), CodeFormat},
		{"without its name", good[:2+int(good[1])], CodeFormat},
		{"armored", []byte("-----BEGIN PGP PUBLIC KEY BLOCK-----"), CodeFormat},
		{"literal data in it", append(bytes.Clone(good), 0xcb, 1, 0), CodeFormat},
		{"open-ended length", append(bytes.Clone(good), 0x8b, 1), CodeFormat},
		{"partial length", append(bytes.Clone(good), 0xc2, 0xe1, 0, 0), CodeFormat},
		{"length beyond the end", append(bytes.Clone(good), 0xc2, 0xff, 0xff, 0xff, 0xff, 0xff), CodeFormat},
	} {
		if _, err := ReadCertificate(c.raw); CodeOf(err) != c.want {
			t.Errorf("%s: %v (%s), want %s", c.name, err, CodeOf(err), c.want)
		}
	}
	for n := range good {
		if _, err := ReadCertificate(good[:n]); err == nil {
			// Cut exactly after the name's certification or before a subkey it is still a certificate; then its digest differs.
			if n < len(good)/2 {
				t.Errorf("cut at %d it is still a certificate", n)
			}
		}
	}
}

// A device must outlive a bug in the library that parses hostile bytes.
func TestPanicBecomesARefusal(t *testing.T) {
	fail := func() (err error) {
		defer guard("the certificate", &err)
		var none *Certificate
		return none.checkUsable(nil)
	}
	if err := fail(); CodeOf(err) != CodeFormat {
		t.Fatalf("got %v, want E-FORMAT", err)
	}
}

// The same Ed25519 point in the two OpenPGP encodings, or with another creation
// date, is the same key pair, though the fingerprints differ.
func TestMaterialNamesTheKeyPair(t *testing.T) {
	point := bytes.Repeat([]byte{7}, 32)
	oid := []byte{9, 0x2b, 6, 1, 4, 1, 0xda, 0x47, 0x0f, 1} // length and OID of Ed25519 (RFC 9580 section 9.2)
	id := func(date byte, algorithm byte, parts ...[]byte) Digest {
		body := append([]byte{4, 0x60, 0, 0, date, algorithm}, bytes.Join(parts, nil)...)
		p, err := packet.Read(bytes.NewReader(append([]byte{0xc6, byte(len(body))}, body...)))
		if err != nil {
			t.Fatal(err)
		}
		d, err := material(p.(*packet.PublicKey))
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	mpi := []byte{1, 7, 0x40} // 263 bits: the prefix of a native point, then the point
	legacy := id(1, 22, oid, mpi, point)
	if id(2, 22, oid, mpi, point) != legacy {
		t.Error("the creation date changes the material")
	}
	if id(1, 27, point) != legacy {
		t.Error("the two encodings of one Ed25519 key have different material")
	}
	if id(1, 27, bytes.Repeat([]byte{8}, 32)) == legacy {
		t.Error("two keys have one material")
	}
}

// Whoever holds one secret subkey can bind it to as many primary keys as he
// likes; it must still count once.
func TestSharedSubkeyCountsOnce(t *testing.T) {
	entity := func(name string) *openpgp.Entity {
		e, err := openpgp.NewEntity(name, "", "", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA})
		if err != nil {
			t.Fatal(err)
		}
		e.Subkeys = nil
		return e
	}
	a, b := entity("A"), entity("B")
	if err := a.AddSigningSubkey(&packet.Config{Algorithm: packet.PubKeyAlgoEdDSA}); err != nil {
		t.Fatal(err)
	}
	// Another creation date gives it another fingerprint, which hides that it is the same.
	secret := packet.NewSignerPrivateKey(a.PrimaryKey.CreationTime.Add(-time.Hour), a.Subkeys[0].PrivateKey.PrivateKey)
	secret.IsSubkey = true
	shared := openpgp.Subkey{Primary: b, PublicKey: &secret.PublicKey, PrivateKey: secret}
	shared.Bindings = a.Subkeys[0].Bindings // for their date
	shared.Bindings = []*packet.VerifiableSignature{packet.NewVerifiableSig(bind(t, b, shared))}
	b.Subkeys = []openpgp.Subkey{shared}
	ring := keyring{threshold: 2}
	var sigs []byte
	for _, e := range []*openpgp.Entity{a, b} {
		var public, sig bytes.Buffer
		if err := e.Serialize(&public); err != nil {
			t.Fatal(err)
		}
		cert, err := ReadCertificate(public.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		if err := openpgp.DetachSign(&sig, []*openpgp.Entity{e}, strings.NewReader("data"), nil); err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignature([]byte("data"), sig.Bytes()); err != nil {
			t.Fatalf("alone it counts: %v", err)
		}
		ring.certs = append(ring.certs, cert)
		sigs = append(sigs, sig.Bytes()...)
	}
	if _, err := ring.check([]byte("data"), sigs, "the data"); CodeOf(err) != CodeSigKey {
		t.Fatalf("got %v, want E-SIG-KEY", err)
	}
}

// bind makes the binding of sub to e, with the back signature that sub itself gives.
func bind(t *testing.T, e *openpgp.Entity, sub openpgp.Subkey) *packet.Signature {
	t.Helper()
	old := sub.Bindings[0].Packet
	sig := &packet.Signature{
		Version: 4, SigType: packet.SigTypeSubkeyBinding, PubKeyAlgo: e.PrimaryKey.PubKeyAlgo, Hash: old.Hash,
		CreationTime: old.CreationTime, IssuerKeyId: &e.PrimaryKey.KeyId, IssuerFingerprint: e.PrimaryKey.Fingerprint,
		FlagsValid: true, FlagSign: true,
		EmbeddedSignature: &packet.Signature{
			Version: 4, SigType: packet.SigTypePrimaryKeyBinding, PubKeyAlgo: sub.PublicKey.PubKeyAlgo, Hash: old.Hash,
			CreationTime: old.CreationTime, IssuerKeyId: &sub.PublicKey.KeyId,
		},
	}
	if err := sig.EmbeddedSignature.CrossSignKey(sub.PublicKey, e.PrimaryKey, sub.PrivateKey, nil); err != nil {
		t.Fatal(err)
	}
	if err := sig.SignKey(sub.PublicKey, e.PrivateKey, nil); err != nil {
		t.Fatal(err)
	}
	return sig
}
