package verify

import (
	"crypto/sha256"
	"encoding/hex"
)

// Digest is a SHA-256 digest. Its text form is 64 lower-case hex digits.
type Digest [sha256.Size]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// IsZero reports whether d was never set.
func (d Digest) IsZero() bool { return d == Digest{} }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText accepts exactly 64 lower-case hex digits: a second spelling of
// one digest would be a second name for one thing.
func (d *Digest) UnmarshalText(text []byte) error {
	var got Digest
	if len(text) != 2*len(got) {
		return Refuse(CodeFormat, "a digest has %d characters, not %d", 2*len(got), len(text))
	}
	for _, c := range text {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Refuse(CodeFormat, "a digest has only the characters 0-9 and a-f")
		}
	}
	if _, err := hex.Decode(got[:], text); err != nil {
		return Refuse(CodeFormat, "read a digest: %w", err)
	}
	*d = got
	return nil
}

// ParseDigest reads the text form.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	err := d.UnmarshalText([]byte(s))
	return d, err
}
