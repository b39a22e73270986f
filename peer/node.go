package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"meshupd/discovery"
	"meshupd/install"
	"meshupd/swarm"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// Config of a Node. Zero values of optional fields mean what their comment says.
type Config struct {
	Name     string // shown to people; the host name as a rule
	Product  string
	Hardware string
	Channel  string
	StateDir string
	Anchor   string // folder with the factory trust document
	Reserve  int64  // bytes that stay free on the store's file system
	Relay    int64  // bytes of images for other hardware that are fetched to be handed on; 0: none
	// BuildTime is when this program was made, see verify.DoorConfig; zero: unknown.
	BuildTime time.Time
	Meshupd   string // version of this program, for releases that need a newer one

	Slots install.Slots
	Takes []verify.Kind // kinds of images that Slots can hold; nil: any
	// Straight, if not nil, are the same slots: a raw image lands in the idle one as it comes, with no copy in the store.
	Straight Straight
	// Wrote, if not nil, says how many bytes the last write of a slot cost, and how many were there already; for the history.
	Wrote func() (written, same int64)
	// Starter, if not nil, is run once before the first look at the slots: what
	// a bootloader does at power-on where there is none.
	Starter func(ctx context.Context) error
	// Learn, if not nil, is told of the newest release that was accepted, once, by a device whose slots are written by
	// another process with a door of its own.
	Learn func(ctx context.Context, rel *verify.Release) error
	// Restore, if not nil, fills the idle slot with one of the versions of State.Kept.
	Restore func(ctx context.Context, release verify.Digest) error
	// Health proves the running slot healthy or says why not. nil: healthy by having started.
	Health func(ctx context.Context, slot install.SlotName, version string) error
	// Quiet, if not nil, says how long a step may go without a sign of progress, by the deadlines of what it runs; see Node.Alive.
	// What is less than five minutes counts as five.
	Quiet  func(Step) time.Duration
	Policy Policy
	// StateChanged, if not nil, is told this device's status by the loop in each round, and must not wait.
	StateChanged func(DeviceStatus)
	// Hold, if not nil, says whether the new version may be armed and started now, and if not, why and when to ask again. It is
	// asked in each round of the loop, which waits for it.
	Hold func(ctx context.Context, slot install.SlotName, version string) (hold HoldFact, why string, again time.Duration)

	SiteKey            []byte
	Listen             []netip.AddrPort
	ListenNow          func() []netip.AddrPort // see MeshConfig
	Finders            func(discovery.Advert) []Finder
	LAN                LAN
	MaxPeers           int
	UpLimit, DownLimit int64 // bytes per second; 0: no limit

	Log *slog.Logger
}

// Node is a whole device: its door, store, slots, swarm and mesh, and the loop
// that takes a release through its life.
type Node struct {
	cfg      Config
	log      *slog.Logger
	door     *verify.Door
	store    *swarm.Store
	swarm    *swarm.Swarm
	mesh     *Mesh
	failures *install.Failures
	history  *History
	origin   *origins
	// wake asks the loop for another look; a full channel already holds the request.
	wake  chan struct{}
	pulse pulse // of the loop

	refusals map[verify.Digest]int         // by the installer, since the daemon started; the loop owns it
	putOff   map[verify.Digest]verify.Code // by a hook, as the history knows it; the loop owns it

	adopting sync.Mutex // held while a release is taken in

	mu        sync.Mutex // guards the fields below
	releases  map[verify.Digest]*verify.Release
	recalled  map[verify.Digest]bool // manifests that were kept here until one of their images was recalled
	view      view                   // what the last round observed
	trouble   *Reason
	health    HealthFact
	learned   verify.Digest // release that Learn was told of
	urged     bool          // a person asked for the next restart
	writing   progress
	heard     map[string]DeviceState // last state each other device was heard in, for the history
	importing map[*Import]bool       // imports that have images in the store and are not committed yet
	changed   chan struct{}          // closed and replaced when anything a person could see changed
}

// progress of a slow step.
type progress struct{ done, total int64 }

// New opens everything that a device keeps and starts nothing.
func New(cfg Config) (*Node, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := durable.MkdirAll(cfg.StateDir, 0o750); err != nil {
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: cfg.Log,
		wake:     make(chan struct{}, 1),
		releases: map[verify.Digest]*verify.Release{},
		refusals: map[verify.Digest]int{}, putOff: map[verify.Digest]verify.Code{},
		recalled: map[verify.Digest]bool{}, importing: map[*Import]bool{},
		heard:   map[string]DeviceState{},
		changed: make(chan struct{}),
	}
	n.view.state = StateWaiting
	n.view.since = time.Now()
	if err := n.openState(); err != nil {
		return nil, err
	}
	if err := n.openSite(); err != nil {
		return nil, err
	}
	return n, nil
}

// openState opens what outlasts a restart.
func (n *Node) openState() (err error) {
	dir := n.cfg.StateDir
	if n.door, err = verify.OpenDoor(verify.DoorConfig{Dir: dir, Anchor: n.cfg.Anchor, Product: n.cfg.Product, BuildTime: n.cfg.BuildTime}); err != nil {
		return fmt.Errorf("open the trust of this device: %w", err)
	}
	if why := n.door.Trust().Damage; why != "" {
		n.log.Error("the kept trust chain is damaged; what holds of it is used", "why", why)
	}
	store := swarm.StoreConfig{Dir: filepath.Join(dir, "store"), Reserve: n.cfg.Reserve, Log: n.log}
	if n.cfg.Straight != nil {
		store.Places = places{n}
	}
	if n.store, err = swarm.OpenStore(store); err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	if n.failures, err = install.OpenFailures(dir); err != nil {
		if n.failures == nil {
			return fmt.Errorf("open the list of failures: %w", err)
		}
		n.log.Error("the list of failures was damaged and is begun anew", "err", err)
	}
	if n.history, err = OpenHistory(filepath.Join(dir, "history.log")); err != nil {
		if n.history == nil {
			return err
		}
		n.log.Error("history", "err", err)
	}
	if n.origin, err = openOrigins(filepath.Join(dir, "origins.json")); err != nil {
		return err
	}
	return n.loadReleases()
}

// loadReleases takes the kept heads through the same door as any other bytes: the
// disk is no more trusted than a stick. What no kept release needs is dropped.
func (n *Node) loadReleases() error {
	heads, err := n.store.UnverifiedHeads()
	if err != nil {
		return fmt.Errorf("read the kept releases: %w", err)
	}
	doubt := false
	for _, raw := range heads {
		rel, err := n.check(context.Background(), raw)
		if err != nil {
			n.log.Warn("a kept release is not believed any more", "code", verify.CodeOf(err), "err", err)
			if verify.CodeOf(err) == verify.CodeRecalled {
				n.recalled[manifestID(raw)] = true
			}
			doubt = doubt || !isOver(err)
			continue
		}
		n.releases[rel.ID()] = rel
	}
	if doubt {
		return nil // a person may want to look at what is there; nothing of it is offered or installed
	}
	if err := n.store.Sweep(n.known()); err != nil {
		return fmt.Errorf("sweep the store: %w", err)
	}
	return nil
}

// manifestID names the release of a head that was read before.
func manifestID(raw []byte) verify.Digest {
	head, err := verify.ReadHead(bytes.NewReader(raw))
	if err != nil {
		return verify.Digest{}
	}
	return sha256.Sum256(head.UnverifiedManifest())
}

// openSite prepares the mesh and the swarm on top of it.
func (n *Node) openSite() (err error) {
	n.mesh, err = NewMesh(MeshConfig{
		StateDir: n.cfg.StateDir, Group: n.door.Trust().RootID, SiteKey: n.cfg.SiteKey,
		Listen: n.cfg.Listen, ListenNow: n.cfg.ListenNow, Finders: n.cfg.Finders, LAN: n.cfg.LAN, MaxPeers: n.cfg.MaxPeers, Log: n.log,
		CheckHead: n.hearHead, Heads: n.heads, Head: n.head, Changed: n.poke,
	})
	if err != nil {
		return fmt.Errorf("prepare the mesh: %w", err)
	}
	n.swarm, err = swarm.New(swarm.Config{
		Self: n.mesh.ID(), Store: n.store, Network: n.mesh.Network(), Log: n.log,
		Changed: n.poke, BadPeer: n.badPeer, UpLimit: n.cfg.UpLimit, DownLimit: n.cfg.DownLimit,
	})
	if err != nil {
		return fmt.Errorf("prepare the swarm: %w", err)
	}
	return nil
}

// Run is the device, until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.mesh.Run(ctx) })
	g.Go(func() error { return n.swarm.Run(ctx) })
	g.Go(func() error { return n.live(ctx) })
	g.Go(func() error { return n.tell(ctx) })
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// poke asks for another look at the facts.
func (n *Node) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
	n.mu.Lock()
	n.touchLocked()
	n.mu.Unlock()
}

func (n *Node) touchLocked() {
	close(n.changed)
	n.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change a person could see.
func (n *Node) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

// known lists the verified releases that are kept.
func (n *Node) known() []*verify.Release {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]*verify.Release, 0, len(n.releases))
	for _, rel := range n.releases {
		out = append(out, rel)
	}
	return out
}

// ID is this device's name in the mesh.
func (n *Node) ID() string { return n.mesh.ID() }

// Addrs lists where this device listens.
func (n *Node) Addrs() []netip.AddrPort { return n.mesh.Addrs() }

// History tells what happened, newest first.
func (n *Node) History(device string, limit int) []Event { return n.history.Events(device, limit) }
