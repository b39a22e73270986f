package verify

import "time"

// Manifest says what a release is. It is parsed strictly, and only after its signature held.
type Manifest struct {
	Format     string     `json:"format"` // ManifestFormat
	Product    string     `json:"product"`
	Hardware   []string   `json:"hardware,omitempty"` // names or patterns such as rev-*; empty: any hardware of the product
	Channel    string     `json:"channel"`
	Version    string     `json:"version"` // semver, for people and for Requires
	Line       uint64     `json:"line"`    // releases are ordered by (Line, Seq)
	Seq        uint64     `json:"seq"`     // 1 to 2^53-1
	TrustEpoch uint64     `json:"trust_epoch"`
	Requires   string     `json:"requires,omitempty"` // semver constraint on the running version
	MinMeshupd string     `json:"min_meshupd,omitempty"`
	Via        *Via       `json:"via,omitempty"`
	IssuedAt   time.Time  `json:"issued_at"` // RFC 3339, UTC, whole seconds
	NotAfter   *time.Time `json:"not_after,omitempty"`
	Downgrade  bool       `json:"downgrade,omitempty"` // an older version on purpose
	Critical   []string   `json:"critical,omitempty"`  // fields that must be understood
	Notes      []string   `json:"notes,omitempty"`
	Images     []Image    `json:"images"`            // may be empty only beside Recalls
	Recalls    []Digest   `json:"recalls,omitempty"` // of manifests or images that are withdrawn
	SBOM       *Digest    `json:"sbom,omitempty"`    // of a software bill of materials beside the manifest
}

// ManifestFormat is the value of Manifest.Format that this version reads and writes.
const ManifestFormat = "meshupd.manifest/1"

// Via names the release to go through first when Requires is not met.
type Via struct {
	Version string `json:"version"`
	SHA256  Digest `json:"sha256"` // of the manifest's bytes
}

// Image is one flat file of a release. Nothing in it is ever unpacked by name.
type Image struct {
	Name     string   `json:"name"` // [a-z0-9][a-z0-9._-]{0,63}
	Kind     Kind     `json:"kind"`
	Hardware []string `json:"hardware,omitempty"` // empty: as the manifest
	Size     int64    `json:"size"`               // bytes as distributed
	SHA256   Digest   `json:"sha256"`             // of the bytes as distributed
	Encoding Encoding `json:"encoding"`
	Content  Content  `json:"content"` // after decoding; equal to Size and SHA256 with EncodingNone
	Pieces   Pieces   `json:"pieces"`
}

// Kind says what an image is installed as.
type Kind string

// The kinds.
const (
	KindSlot      Kind = "slot"
	KindContainer Kind = "container"
	KindFiles     Kind = "files"
)

// Encoding says how the distributed bytes encode the content.
type Encoding string

// The encodings.
const (
	EncodingNone Encoding = "none"
	EncodingZstd Encoding = "zstd"
)

// Content describes the bytes that end up in the slot.
type Content struct {
	Size   int64  `json:"size"`
	SHA256 Digest `json:"sha256"`
}

// Pieces binds the piece table to the signature: Root is the BEP 52 "pieces
// root", the SHA-256 merkle root over 16 KiB blocks, and Length the piece length
// (a power of two, 16 KiB to 16 MiB).
type Pieces struct {
	Length int64  `json:"length"`
	Root   Digest `json:"root"`
}
