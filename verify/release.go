package verify

// Release is a manifest whose signatures held, with the verified piece table of
// each image. Only Door.Check makes one. It is immutable and safe for concurrent use.
type Release struct {
	manifest Manifest
	id       Digest
	tables   map[Digest]*PieceTable
	signers  []Signer
	head     []byte
}

// Signer names a trusted key that signed.
type Signer struct {
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"` // upper-case hex of the primary key
	Development bool   `json:"development,omitempty"`
}

// ID is the SHA-256 of the manifest's bytes.
func (r *Release) ID() Digest { return r.id }

// Manifest returns what was signed. The slices are shared: do not change them.
func (r *Release) Manifest() Manifest { return r.manifest }

// Signers lists the trusted keys whose signatures held.
func (r *Release) Signers() []Signer { return r.signers }

// Head returns the bytes to hand on to a neighbour or to keep; see ReadHead.
func (r *Release) Head() []byte { return r.head }

// Image finds an image of the release by its digest.
func (r *Release) Image(d Digest) (Image, bool) {
	for _, img := range r.manifest.Images {
		if img.SHA256 == d {
			return img, true
		}
	}
	return Image{}, false
}

// Pieces returns the verified piece table of an image of this release, or nil.
func (r *Release) Pieces(d Digest) *PieceTable { return r.tables[d] }
