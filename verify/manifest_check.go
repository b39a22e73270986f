package verify

import (
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/Masterminds/semver/v3"
)

// Caps on a manifest.
const (
	MaxManifest  = 256 << 10 // bytes
	MaxImageSize = 1 << 40   // bytes of one image, distributed or decoded
	MaxSeq       = 1<<53 - 1 // largest whole number that every JSON reader keeps exact

	maxImages   = 64
	maxNames    = 64 // entries of a hardware or critical list
	maxNotes    = 64
	maxNote     = 4 << 10
	maxRecalls  = 1024
	maxVersion  = 64
	maxRequires = 256

	minPieceLength = BlockSize
	maxPieceLength = 16 << 20
)

// understood lists the fields that may be named in Critical. A field is here
// when this version acts on it, not merely when it can read it.
var understood = []string{
	"format", "product", "hardware", "channel", "version", "line", "seq", "trust_epoch", "requires", "via", "min_meshupd",
	"issued_at", "not_after", "downgrade", "critical", "notes", "images", "recalls", "sbom",
}

// ParseUnverifiedManifest reads a manifest strictly. That it parses says nothing
// about who wrote it: a device parses only after the signatures held. Errors are
// Refusals (E-FORMAT, E-SIZE, E-CRITICAL).
func ParseUnverifiedManifest(raw []byte) (Manifest, error) {
	var m Manifest
	if len(raw) > MaxManifest {
		return m, Refuse(CodeSize, "the manifest has %d bytes, more than %d", len(raw), MaxManifest)
	}
	if err := decodeStrict(raw, "the manifest", &m); err != nil {
		return Manifest{}, err
	}
	if err := m.check(); err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// EncodeManifest writes the bytes that get signed. It refuses what
// ParseUnverifiedManifest would refuse.
func EncodeManifest(m Manifest) ([]byte, error) {
	if m.Images == nil {
		m.Images = []Image{} // a list in JSON is never null
	}
	raw, err := encodeCanonical(m)
	if err != nil {
		return nil, Refuse(CodeFormat, "write the manifest: %w", err)
	}
	if _, err := ParseUnverifiedManifest(raw); err != nil {
		return nil, err
	}
	return raw, nil
}

func (m *Manifest) check() error {
	if m.Format != ManifestFormat {
		return Refuse(CodeFormat, "the manifest has format %q, not %q", clip(m.Format), ManifestFormat)
	}
	// Critical comes first: what it names may change the meaning of all the rest.
	if err := checkCritical(m.Critical, understood); err != nil {
		return err
	}
	switch {
	case !isID(m.Product):
		return Refuse(CodeFormat, "the manifest's product %q is not a name", clip(m.Product))
	case !isID(m.Channel):
		return Refuse(CodeFormat, "the manifest's channel %q is not a name", clip(m.Channel))
	case !isVersion(m.Version):
		return Refuse(CodeFormat, "the manifest's version %q is not a semantic version", clip(m.Version))
	case m.Seq < 1 || m.Seq > MaxSeq:
		return Refuse(CodeFormat, "the manifest's seq %d is not between 1 and %d", m.Seq, uint64(MaxSeq))
	case m.Line > MaxSeq || m.TrustEpoch < 1 || m.TrustEpoch > maxTrustDocuments:
		return Refuse(CodeFormat, "the manifest's line %d or trust epoch %d is out of range", m.Line, m.TrustEpoch)
	case !isTime(m.IssuedAt):
		return Refuse(CodeFormat, "the manifest's issued_at is not a whole UTC second")
	case m.NotAfter != nil && !isTime(*m.NotAfter):
		return Refuse(CodeFormat, "the manifest's not_after is not a whole UTC second")
	case m.MinMeshupd != "" && !isVersion(m.MinMeshupd):
		return Refuse(CodeFormat, "the manifest's min_meshupd %q is not a semantic version", clip(m.MinMeshupd))
	}
	if err := m.checkRecalls(); err != nil {
		return err
	}
	if err := checkHardware("the manifest's hardware", m.Hardware); err != nil {
		return err
	}
	if err := m.checkPath(); err != nil {
		return err
	}
	if err := checkNotes(m.Notes); err != nil {
		return err
	}
	return m.checkImages()
}

// checkPath looks at what says over which versions the release goes.
func (m *Manifest) checkPath() error {
	if m.Requires != "" {
		if len(m.Requires) > maxRequires {
			return Refuse(CodeFormat, "the manifest's requires is longer than %d bytes", maxRequires)
		}
		if _, err := semver.NewConstraint(m.Requires); err != nil {
			return Refuse(CodeFormat, "the manifest's requires %q cannot be read: %w", clip(m.Requires), err)
		}
	}
	if m.Via != nil && (!isVersion(m.Via.Version) || m.Via.SHA256.IsZero()) {
		return Refuse(CodeFormat, "the manifest's via names no version or no digest")
	}
	return nil
}

// checkRecalls also keeps a release from withdrawing itself, which could mean anything.
func (m *Manifest) checkRecalls() error {
	if len(m.Recalls) > maxRecalls {
		return Refuse(CodeFormat, "the manifest recalls more than %d digests", maxRecalls)
	}
	for _, d := range m.Recalls {
		if d.IsZero() {
			return Refuse(CodeFormat, "the manifest recalls an empty digest")
		}
		if slices.ContainsFunc(m.Images, func(img Image) bool { return img.SHA256 == d }) {
			return Refuse(CodeFormat, "the manifest recalls an image of its own")
		}
	}
	return nil
}

func (m *Manifest) checkImages() error {
	if len(m.Images) == 0 && len(m.Recalls) > 0 {
		return nil
	}
	if len(m.Images) < 1 || len(m.Images) > maxImages {
		return Refuse(CodeFormat, "the manifest has %d images, not 1 to %d", len(m.Images), maxImages)
	}
	for i := range m.Images {
		img := &m.Images[i]
		if err := img.check(); err != nil {
			return err
		}
		for _, other := range m.Images[:i] {
			if other.SHA256 == img.SHA256 {
				return Refuse(CodeFormat, "the images %s and %s have one digest", other.Name, img.Name)
			}
			if other.Name == img.Name && overlap(other.Hardware, img.Hardware) {
				return Refuse(CodeFormat, "two images for the same hardware are called %s", img.Name)
			}
		}
	}
	return nil
}

func (img *Image) check() error {
	if !isID(img.Name) {
		return Refuse(CodeFormat, "the image name %q is not a name", clip(img.Name))
	}
	if err := checkHardware("the hardware of image "+img.Name, img.Hardware); err != nil {
		return err
	}
	switch {
	case img.Kind != KindSlot && img.Kind != KindContainer && img.Kind != KindFiles:
		return Refuse(CodeFormat, "image %s has the unknown kind %q", img.Name, clip(string(img.Kind)))
	case img.Encoding != EncodingNone && img.Encoding != EncodingZstd:
		return Refuse(CodeFormat, "image %s has the unknown encoding %q", img.Name, clip(string(img.Encoding)))
	case img.Size < 1 || img.Size > MaxImageSize:
		return Refuse(CodeFormat, "image %s has %d bytes, not 1 to %d", img.Name, img.Size, int64(MaxImageSize))
	case img.Content.Size < 1 || img.Content.Size > MaxImageSize:
		return Refuse(CodeFormat, "image %s has %d bytes of content, not 1 to %d", img.Name, img.Content.Size, int64(MaxImageSize))
	case img.SHA256.IsZero() || img.Content.SHA256.IsZero() || img.Pieces.Root.IsZero():
		return Refuse(CodeFormat, "image %s lacks a digest", img.Name)
	case img.Encoding == EncodingNone && (img.Content.Size != img.Size || img.Content.SHA256 != img.SHA256):
		return Refuse(CodeFormat, "image %s is not encoded, but its content differs from it", img.Name)
	}
	return checkPieceLength(img.Pieces.Length)
}

// checkPieceLength holds for BEP 52: a power of two and at least one block.
func checkPieceLength(n int64) error {
	if n < minPieceLength || n > maxPieceLength || n&(n-1) != 0 {
		return Refuse(CodeFormat, "the piece length %d is not a power of two between %d and %d", n, minPieceLength, maxPieceLength)
	}
	return nil
}

func checkCritical(named, known []string) error {
	if len(named) > maxNames {
		return Refuse(CodeFormat, "more than %d critical fields", maxNames)
	}
	for _, name := range named {
		if !slices.Contains(known, name) {
			return Refuse(CodeCritical, "the publisher insists on %q, which this version does not know", clip(name))
		}
	}
	return nil
}

func checkHardware(what string, list []string) error {
	if len(list) > maxNames {
		return Refuse(CodeFormat, "%s has more than %d entries", what, maxNames)
	}
	for _, p := range list {
		if !isPattern(p) {
			return Refuse(CodeFormat, "%s: %q is not a name or pattern", what, clip(p))
		}
	}
	return nil
}

// checkNotes keeps out control characters: notes are shown on terminals.
func checkNotes(notes []string) error {
	if len(notes) > maxNotes {
		return Refuse(CodeFormat, "the manifest has more than %d notes", maxNotes)
	}
	for _, n := range notes {
		if len(n) > maxNote {
			return Refuse(CodeFormat, "a note is longer than %d bytes", maxNote)
		}
		if strings.ContainsFunc(n, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }) {
			return Refuse(CodeFormat, "a note has control characters")
		}
	}
	return nil
}

// isID reports whether s is a name: 1 to 64 of a-z, 0-9, '.', '_' and '-', with
// a letter or digit at both ends and no two dots together. There is no second
// spelling that looks the same: no upper case, no other alphabet, no dot at the end.
func isID(s string) bool {
	if s == "" || len(s) > 64 || strings.Contains(s, "..") {
		return false
	}
	for i, c := range []byte(s) {
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || i == len(s)-1 || c != '.' && c != '_' && c != '-') {
			return false
		}
	}
	return true
}

func isVersion(s string) bool {
	if len(s) > maxVersion {
		return false
	}
	_, err := semver.StrictNewVersion(s)
	return err == nil
}

// isTime reports whether t is a whole second, written in UTC, after 1970.
func isTime(t time.Time) bool {
	_, offset := t.Zone()
	return offset == 0 && t.Nanosecond() == 0 && t.Unix() > 0 && t.Year() < 10000
}

// clip shortens foreign text before it gets into a message.
func clip(s string) string {
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}
