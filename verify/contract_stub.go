package verify

import (
	"context"
	"io"
)

// ---- pieces ----

// PieceTable holds the SHA-256 merkle hash of every piece of an image (the BEP 52 piece layer), already checked against the signed root.
type PieceTable struct {
	Length int64  // piece length in bytes
	Size   int64  // image size in bytes
	Root   Digest // BEP 52 pieces root
	Hashes []Digest
}

// Hashed is what one pass over an image yields.
type Hashed struct {
	Size   int64
	SHA256 Digest
	Table  *PieceTable
}

// HashImage reads r once to its end. pieceLength as in Pieces.Length.
func HashImage(r io.Reader, pieceLength int64) (Hashed, error) { panic("stub") }

// ---- bundle ----

// ReadHead reads a head from r and leaves r at the first image (or at the end).
func ReadHead(r io.Reader) (*UnverifiedHead, error) { panic("stub") }

// Bytes returns the canonical tar of the head.
func (h *UnverifiedHead) Bytes() []byte { panic("stub") }

// UnverifiedBundle is a .update file or a release folder that is being read.
type UnverifiedBundle struct{}

// OpenBundle reads the head of a .update stream.
func OpenBundle(r io.Reader) (*UnverifiedBundle, error) { panic("stub") }

// OpenFolder reads the head of a release folder (a stick with the published layout).
func OpenFolder(dir string) (*UnverifiedBundle, error) { panic("stub") }

// Head returns what Door.Check wants.
func (b *UnverifiedBundle) Head() *UnverifiedHead { panic("stub") }

// NextImage moves to the next image, in the manifest's order, and returns a reader of its distributed bytes. The reader ends
// with io.EOF only after exactly Size bytes with the signed digest; else with a Refusal (E-TRUNCATED, E-SIZE, E-DIGEST).
// After the last image it returns io.EOF if nothing else follows, or a Refusal (E-BUNDLE).
func (b *UnverifiedBundle) NextImage(rel *Release) (Image, io.Reader, error) { panic("stub") }

// Close frees the folder's descriptors.
func (b *UnverifiedBundle) Close() error { panic("stub") }

// ---- door ----

// DoorConfig says where a device keeps its trust.
type DoorConfig struct {
	Dir     string // durable state: newest trust chain, counters in two copies
	Anchor  string // factory folder with trust.N.json, trust.N.sig and certs/; read-only
	Product string
}

// Door is the one way from unverified bytes to a Release. Safe for concurrent use.
type Door struct{}

// OpenDoor loads and re-verifies the trust that the device has.
func OpenDoor(cfg DoorConfig) (*Door, error) { panic("stub") }

// Check verifies a head: continues the trust chain (and keeps a newer document durably), then signatures, product, line and
// dates, then the piece tables. It does not touch the counters. Errors are Refusals.
func (d *Door) Check(ctx context.Context, h *UnverifiedHead) (*Release, error) { panic("stub") }

// Counters of a device; they only rise. Order is (Line, Seq).
type Counters struct {
	Line     uint64 `json:"line"`
	Accepted uint64 `json:"accepted"`
	Floor    uint64 `json:"floor"`
}

// Accept raises the accepted counter to rel, durably, or refuses with E-ORDER (older than accepted) or E-FORK (same place,
// other manifest). Accepting the same release again is fine.
func (d *Door) Accept(rel *Release) error { panic("stub") }

// Confirmed raises the floor to rel, durably.
func (d *Door) Confirmed(rel *Release) error { panic("stub") }

// Counters returns the present values.
func (d *Door) Counters() Counters { panic("stub") }

// TrustInfo is what status and doctor tell about the trust in force.
type TrustInfo struct {
	Product   string   `json:"product"`
	Epoch     uint64   `json:"epoch"`
	RootID    Digest   `json:"root_id"` // SHA-256 of the first trust document: names the product's trust root
	Line      uint64   `json:"line"`
	Threshold int      `json:"threshold"`
	Keys      []Signer `json:"keys"`
}

// Trust tells what is in force.
func (d *Door) Trust() TrustInfo { panic("stub") }

// Device is what Fits needs to know of a device.
type Device struct {
	Product  string
	Hardware string
	Channel  string
	Running  string // version that runs now; "" when unknown
}

// Fits says whether the release is for this device, as a Refusal (E-PRODUCT, E-HARDWARE, E-CHANNEL, E-REQUIRES, E-DOWNGRADE) or nil.
func (r *Release) Fits(dev Device) error { panic("stub") }

// ImagesFor lists the images of the release for this hardware.
func (r *Release) ImagesFor(hardware string) []Image { panic("stub") }

// Compare orders releases by (line, seq): -1, 0 or 1.
func (r *Release) Compare(other *Release) int { panic("stub") }
