package publish

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/ProtonMail/go-crypto/openpgp/s2k"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"meshupd/verify"
)

// DevelopmentMark ends the name of a key that was made for trying things out.
const DevelopmentMark = verify.DevelopmentMark

// maxKeyFile bounds what is read as a key, armor included.
const maxKeyFile = 4 * verify.MaxCertificate

// KeyOptions describe a new key.
type KeyOptions struct {
	Name        string // shown to people who verify; must not contain ()<> or control characters
	Passphrase  []byte // protects SecretArmored; empty: not protected
	Development bool   // mark the name, so that the key cannot get into production unseen
	Now         time.Time
}

// SecretKey can sign.
type SecretKey struct {
	entity     *openpgp.Entity
	cert       *verify.Certificate
	passphrase []byte
}

// NewKey makes an OpenPGP version 4 Ed25519 key in the encoding that gpg 2.2
// knows, with one name, no expiry and no subkeys. It refuses with E-KEY.
func NewKey(o KeyOptions) (*SecretKey, error) {
	name := strings.TrimSpace(o.Name)
	if name == "" || len(name) > 48 || strings.ContainsAny(name, "()<>\x00") || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' }) {
		return nil, verify.Refuse(verify.CodeKey, "make a key: the name %q has no characters, more than 48, or one of ()<>", name)
	}
	if o.Development && !strings.HasSuffix(name, DevelopmentMark) {
		name += DevelopmentMark
	}
	now := o.Now
	if now.IsZero() {
		now = time.Now()
	}
	config := &packet.Config{
		Algorithm:   packet.PubKeyAlgoEdDSA,
		Curve:       packet.Curve25519,
		DefaultHash: crypto.SHA256,
		Time:        func() time.Time { return now },
	}
	entity, err := openpgp.NewEntity(name, "", "", config)
	if err != nil {
		return nil, verify.Refuse(verify.CodeKey, "make a key: %w", err)
	}
	// The library adds a subkey for encryption; nothing is ever encrypted to a release key.
	entity.Subkeys = nil
	return newSecretKey(entity, o.Passphrase)
}

func newSecretKey(entity *openpgp.Entity, passphrase []byte) (*SecretKey, error) {
	var public bytes.Buffer
	if err := entity.Serialize(&public); err != nil {
		return nil, verify.Refuse(verify.CodeKey, "read the key: %w", err)
	}
	cert, err := verify.ReadCertificate(public.Bytes())
	if err != nil {
		return nil, verify.Refuse(verify.CodeKey, "read the key: %w", err)
	}
	return &SecretKey{entity: entity, cert: cert, passphrase: bytes.Clone(passphrase)}, nil
}

// LoadSecretKey reads one secret key, armored or binary, as NewKey or
// `gpg --export-secret-keys` write it, and opens it with the passphrase. It
// refuses with E-KEY.
func LoadSecretKey(data, passphrase []byte) (key *SecretKey, err error) {
	defer func() {
		if r := recover(); r != nil {
			key, err = nil, verify.Refuse(verify.CodeKey, "read the key: the OpenPGP library failed: %v", r)
		}
	}()
	if len(data) > maxKeyFile {
		return nil, verify.Refuse(verify.CodeKey, "read the key: it has more than %d bytes", maxKeyFile)
	}
	if data, err = dearmor(data); err != nil {
		return nil, verify.Refuse(verify.CodeKey, "read the key: %w", err)
	}
	list, err := openpgp.ReadKeyRing(bytes.NewReader(data))
	if err != nil {
		return nil, verify.Refuse(verify.CodeKey, "read the key: %w", err)
	}
	if len(list) != 1 || list[0].PrivateKey == nil {
		return nil, verify.Refuse(verify.CodeKey, "read the key: the file holds no secret key, or more than one")
	}
	entity := list[0]
	if isLocked(entity) {
		if len(passphrase) == 0 {
			return nil, verify.Refuse(verify.CodeKey, "open the key: it is protected by a passphrase")
		}
		if err := entity.DecryptPrivateKeys(passphrase); err != nil {
			return nil, verify.Refuse(verify.CodeKey, "open the key: the passphrase does not fit")
		}
	}
	return newSecretKey(entity, passphrase)
}

func isLocked(e *openpgp.Entity) bool {
	if e.PrivateKey.Encrypted {
		return true
	}
	for _, s := range e.Subkeys {
		if s.PrivateKey != nil && s.PrivateKey.Encrypted {
			return true
		}
	}
	return false
}

// ReadCertificate reads a public key, armored or binary, as `gpg --export` or
// NewKey write it. It refuses with E-KEY.
func ReadCertificate(data []byte) (*verify.Certificate, error) {
	if len(data) > maxKeyFile {
		return nil, verify.Refuse(verify.CodeKey, "read the public key: it has more than %d bytes", maxKeyFile)
	}
	binary, err := dearmor(data)
	if err == nil {
		var cert *verify.Certificate
		if cert, err = verify.ReadCertificate(binary); err == nil {
			return cert, nil
		}
	}
	return nil, verify.Refuse(verify.CodeKey, "read the public key: %w", err)
}

// Name is the key's user id.
func (k *SecretKey) Name() string { return k.cert.Name() }

// Fingerprint is the upper-case hex of the primary key.
func (k *SecretKey) Fingerprint() string { return k.cert.Fingerprint() }

// Certificate is the public half.
func (k *SecretKey) Certificate() *verify.Certificate { return k.cert }

// PublicArmored is the public half for a file that people handle.
func (k *SecretKey) PublicArmored() ([]byte, error) { return Armored(k.cert) }

// Armored is a certificate for a file that people handle.
func Armored(cert *verify.Certificate) ([]byte, error) {
	return enarmor(openpgp.PublicKeyType, cert.Bytes())
}

// SecretArmored is the secret half, protected by the passphrase that the key was
// made or opened with. Whoever writes it to a file gives it mode 0600.
func (k *SecretKey) SecretArmored() ([]byte, error) {
	var raw bytes.Buffer
	if err := k.entity.SerializePrivateWithoutSigning(&raw, nil); err != nil {
		return nil, verify.Refuse(verify.CodeKey, "write the key: %w", err)
	}
	if len(k.passphrase) > 0 {
		// Protecting works in place, so it is done to a copy: this key goes on signing.
		list, err := openpgp.ReadKeyRing(bytes.NewReader(raw.Bytes()))
		if err != nil || len(list) != 1 {
			return nil, verify.Refuse(verify.CodeKey, "write the key: %w", err)
		}
		// gpg 2.2 knows neither AEAD protection nor Argon2: CFB with an iterated hash is what both read.
		config := &packet.Config{DefaultCipher: packet.CipherAES256,
			S2KConfig: &s2k.Config{S2KMode: s2k.IteratedSaltedS2K, Hash: crypto.SHA256, S2KCount: 65011712}}
		if err := list[0].EncryptPrivateKeys(k.passphrase, config); err != nil {
			return nil, verify.Refuse(verify.CodeKey, "protect the key: %w", err)
		}
		raw.Reset()
		if err := list[0].SerializePrivateWithoutSigning(&raw, nil); err != nil {
			return nil, verify.Refuse(verify.CodeKey, "write the key: %w", err)
		}
	}
	return enarmor(openpgp.PrivateKeyType, raw.Bytes())
}

// DetachSign makes one binary detached signature over data, dated at, and
// refuses (E-KEY) when a device would not count it.
func (k *SecretKey) DetachSign(data []byte, at time.Time) ([]byte, error) {
	// The library's random salt would give the same release other bytes at each signing.
	salted := false
	config := &packet.Config{
		DefaultHash:                           crypto.SHA256,
		Time:                                  func() time.Time { return at },
		NonDeterministicSignaturesViaNotation: &salted,
	}
	var out bytes.Buffer
	if err := openpgp.DetachSign(&out, []*openpgp.Entity{k.entity}, bytes.NewReader(data), config); err != nil {
		return nil, verify.Refuse(verify.CodeKey, "sign with %s: %w", k.Name(), err)
	}
	if err := k.cert.CheckSignature(data, out.Bytes()); err != nil {
		return nil, verify.Refuse(verify.CodeKey, "sign with %s: %w", k.Name(), err)
	}
	return out.Bytes(), nil
}

var armorStart = []byte("-----BEGIN PGP ")

// dearmor returns binary OpenPGP data from either form.
func dearmor(data []byte) ([]byte, error) {
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), armorStart) {
		return data, nil
	}
	block, err := armor.Decode(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("read the armor: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(block.Body, maxKeyFile+1))
	if err != nil {
		return nil, fmt.Errorf("read the armor: %w", err)
	}
	if len(out) > maxKeyFile {
		return nil, errors.New("read the armor: too much data in it")
	}
	return out, nil
}

func enarmor(kind string, data []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := armor.Encode(&out, kind, nil)
	if err == nil {
		if _, err = w.Write(data); err == nil {
			err = w.Close()
		}
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeKey, "write the armor: %w", err)
	}
	out.WriteByte('\n')
	return out.Bytes(), nil
}
