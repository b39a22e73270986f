package peer

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"meshupd/discovery"
	"meshupd/swarm"
	"meshupd/verify"
)

// Finder yields hints about devices on this LAN.
type Finder interface {
	Run(ctx context.Context, found func(discovery.Hint)) error
}

// HeadRef names a release a device holds, for the exchange of heads.
type HeadRef struct {
	ID   verify.Digest `json:"id"`
	Line uint64        `json:"line"`
	Seq  uint64        `json:"seq"`
}

// DeviceStatus is what a device says of itself; signed by its identity key and gossiped. All of it is a claim.
type DeviceStatus struct {
	Name     string          `json:"name"` // host name or configured name; cap 63 bytes
	Boot     uint64          `json:"boot"` // start counter: a restart begins a new sequence
	N        uint64          `json:"n"`    // rises with every message of this Boot
	Hardware string          `json:"hardware"`
	Version  string          `json:"version"`          // what runs
	Target   string          `json:"target,omitempty"` // version it moves to
	State    string          `json:"state"`            // see lifecycle.go
	Since    time.Time       `json:"since"`
	Reason   *Reason         `json:"reason,omitempty"`
	Done     int64           `json:"done,omitempty"` // bytes of the image being fetched or written
	Size     int64           `json:"size,omitempty"`
	Rate     float64         `json:"rate,omitempty"` // bytes per second
	From     []string        `json:"from,omitempty"` // peer ids, most first, cap 8
	Source   string          `json:"source,omitempty"`
	Heads    []HeadRef       `json:"heads,omitempty"`
	Holdings []swarm.Holding `json:"holdings,omitempty"`
	Addrs    []string        `json:"addrs,omitempty"` // ip:port where it can be dialled
	Sent     map[string]int64 `json:"sent,omitempty"` // payload bytes sent per image digest, totals
}

// Reason says why a device does not go on.
type Reason struct {
	Code      verify.Code `json:"code"`
	Detail    string      `json:"detail,omitempty"`
	NeedBytes int64       `json:"need_bytes,omitempty"`
}

// Member is a device of the site as this one sees it.
type Member struct {
	ID        string
	Status    DeviceStatus
	LastHeard time.Time
	Connected bool
}

// MeshConfig of a Mesh.
type MeshConfig struct {
	StateDir   string              // identity key lives here (0600)
	Group      verify.Digest       // trust root of the product: devices of another product are not neighbours
	SiteKey    []byte              // optional shared secret; nil: same Group is enough
	Listen     []netip.AddrPort    // addresses to bind; port 0 picks one
	Finders    func(discovery.Advert) []Finder
	LAN        LAN                 // nil: the machine's TCP
	Log        *slog.Logger
	MaxPeers   int                 // connections kept, default 64

	// CheckHead is asked about a head from a neighbour; nil means believed, kept and to be passed on.
	CheckHead func(ctx context.Context, from string, head []byte) error
	// Heads and Head say what this device can hand on.
	Heads func() []HeadRef
	Head  func(id verify.Digest) []byte
	// Changed is called when members, their status or connections changed; must not block.
	Changed func()
}

// Mesh carries documents, status and streams between admitted devices.
type Mesh struct{}

// NewMesh makes identity and host, and starts nothing.
func NewMesh(cfg MeshConfig) (*Mesh, error) { panic("stub") }

// Run joins the site until ctx ends.
func (m *Mesh) Run(ctx context.Context) error { panic("stub") }

// ID is this device's peer id, text form.
func (m *Mesh) ID() string { panic("stub") }

// Addrs lists where this device listens.
func (m *Mesh) Addrs() []netip.AddrPort { panic("stub") }

// Tell signs and spreads this device's status (at most about once a second; the newest wins).
func (m *Mesh) Tell(s DeviceStatus) { panic("stub") }

// Spread hands a release to the site.
func (m *Mesh) Spread(ctx context.Context, rel *verify.Release) error { panic("stub") }

// Members lists all devices heard of, this one not among them.
func (m *Mesh) Members() []Member { panic("stub") }

// Network carries the swarm's byte streams over this mesh.
func (m *Mesh) Network() swarm.Network { panic("stub") }

// Ban refuses a device from now on, for this run.
func (m *Mesh) Ban(id string, why error) { panic("stub") }
