package swarm

import (
	"context"
	"io"
	"log/slog"
	"net"
	"time"

	"meshupd/verify"
)

// ---- store ----

// StoreConfig says where images live and what must stay free.
type StoreConfig struct {
	Dir     string
	Reserve int64 // bytes of the file system that must stay free
	Log     *slog.Logger
}

// Store keeps images by digest and the heads of their releases. Safe for concurrent use.
type Store struct{}

// OpenStore sweeps leftovers and reads what is there. A complete image keeps its name only after its whole digest was checked.
func OpenStore(cfg StoreConfig) (*Store, error) { panic("stub") }

// Put stores an image whole from r: space check first (E-SPACE with NeedBytes, before the first byte), hash on the way, fsync, rename.
// An error leaves nothing behind. An image already held is not read again.
func (s *Store) Put(ctx context.Context, rel *verify.Release, img verify.Image, r io.Reader, progress func(done int64)) error {
	panic("stub")
}

// Has says whether the image is held whole.
func (s *Store) Has(d verify.Digest) bool { panic("stub") }

// HaveBytes says how much of the image is durable and verified, whole or partial.
func (s *Store) HaveBytes(d verify.Digest) int64 { panic("stub") }

// Open opens a whole image.
func (s *Store) Open(d verify.Digest) (io.ReadCloser, error) { panic("stub") }

// CheckSpace says whether the missing bytes of these images fit, as E-SPACE or nil.
func (s *Store) CheckSpace(imgs ...verify.Image) error { panic("stub") }

// Keep stores the head of a release durably.
func (s *Store) Keep(rel *verify.Release) error { panic("stub") }

// UnverifiedHeads returns all kept heads; they are checked again at each start.
func (s *Store) UnverifiedHeads() ([][]byte, error) { panic("stub") }

// Drop forgets a release's head and those images that no release in keep uses.
func (s *Store) Drop(rel *verify.Release, keep []*verify.Release) error { panic("stub") }

// ---- swarm ----

// Network connects admitted devices. Conns are authenticated, encrypted and end-to-end.
type Network interface {
	// Dial opens a byte stream to the device's swarm.
	Dial(ctx context.Context, id string) (net.Conn, error)
	// Accept waits for a stream that an admitted device opened.
	Accept(ctx context.Context) (conn net.Conn, id string, err error)
}

// Holding is what a device says of one image.
type Holding struct {
	Image verify.Digest `json:"image"`
	// Rank is the device's place in the image's relay chain; see graph.go. 0 for those that had it from the start.
	Rank     uint32 `json:"rank"`
	Have     int64  `json:"have"` // verified bytes
	Complete bool   `json:"complete"`
}

// Member is an admitted device that was heard lately.
type Member struct {
	ID       string
	Holdings []Holding
}

// Transfer tells of one image that is being fetched or served.
type Transfer struct {
	Image    verify.Digest
	Done     int64
	Size     int64
	Complete bool
	DownRate float64 // bytes per second, over the last seconds
	UpRate   float64
	From     []string         // devices that sent verified pieces, most first
	Received map[string]int64 // verified payload bytes by device
	Sent     map[string]int64 // payload bytes by device
	Wasted   int64            // duplicate and failed payload bytes
	Err      error            // why it does not go on (E-SPACE, E-IO), or nil
	Parent   string           // whom it is taking from now
	Started  time.Time
}

// Config of a Swarm.
type Config struct {
	Self    string
	Store   *Store
	Network Network
	Log     *slog.Logger
	// Changed is called, not too often, when holdings or transfers changed. It must not block.
	Changed func()
	// BadPeer is called when a device was proven to have sent a bad piece; the swarm itself already refuses it from then on.
	BadPeer func(id string, img verify.Digest)
	// UpLimit and DownLimit in bytes per second; 0 is no limit.
	UpLimit, DownLimit int64
}

// Swarm fetches and serves images.
type Swarm struct{}

// New prepares a swarm; Run starts it.
func New(cfg Config) (*Swarm, error) { panic("stub") }

// Run serves until ctx ends.
func (s *Swarm) Run(ctx context.Context) error { panic("stub") }

// Fetch starts or goes on fetching an image of rel; it is idempotent and returns at once. When the image is whole, Store.Has says so.
func (s *Swarm) Fetch(rel *verify.Release, d verify.Digest) { panic("stub") }

// Seed serves a whole image; idempotent.
func (s *Swarm) Seed(rel *verify.Release, d verify.Digest) { panic("stub") }

// Stop neither fetches nor serves the image any more.
func (s *Swarm) Stop(d verify.Digest) { panic("stub") }

// SetMembers tells who is admitted and alive now, and what they say they hold.
func (s *Swarm) SetMembers(m []Member) { panic("stub") }

// Holdings is what this device may say of itself.
func (s *Swarm) Holdings() []Holding { panic("stub") }

// Transfers tells about all images in hand.
func (s *Swarm) Transfers() []Transfer { panic("stub") }
