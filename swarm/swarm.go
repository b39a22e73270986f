package swarm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"meshupd/verify"
)

// Network connects admitted devices. Conns are authenticated, encrypted and end-to-end.
type Network interface {
	// Dial opens a byte stream to the device's swarm.
	Dial(ctx context.Context, id string) (net.Conn, error)
	// Accept waits for a stream that an admitted device opened.
	// An error other than the end of ctx is final: the swarm ends with it.
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

// Swarm fetches and serves images. Safe for concurrent use.
type Swarm struct {
	cfg Config

	wake chan struct{} // has room for one: there are transfers to start

	mu        sync.Mutex
	members   []Member
	transfers map[verify.Digest]*transfer
	ending    map[verify.Digest]*transfer // stopped, but maybe not at its end yet
	lastFlow  time.Time                   // when Changed was last called because bytes moved
}

// New prepares a swarm; Run starts it.
func New(cfg Config) (*Swarm, error) {
	if cfg.Self == "" || cfg.Store == nil || cfg.Network == nil {
		return nil, errors.New("swarm: Self, Store and Network must be set")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Changed == nil {
		cfg.Changed = func() {}
	}
	if cfg.BadPeer == nil {
		cfg.BadPeer = func(string, verify.Digest) {}
	}
	return &Swarm{
		cfg: cfg, wake: make(chan struct{}, 1),
		transfers: map[verify.Digest]*transfer{}, ending: map[verify.Digest]*transfer{},
	}, nil
}

// Run serves until ctx ends. What is verified is made durable before it returns.
func (s *Swarm) Run(ctx context.Context) error {
	e, err := newEngine(s.cfg)
	if err != nil {
		return err
	}
	engineCtx, stopEngine := context.WithCancel(context.WithoutCancel(ctx))
	engineErr := make(chan error, 1)
	go func() { engineErr <- e.run(engineCtx) }()
	var running sync.WaitGroup
	defer func() {
		running.Wait() // the engine is closed after its torrents
		stopEngine()
		<-engineErr
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		for _, t := range s.unstarted() {
			running.Go(func() { t.run(ctx, e) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case err := <-engineErr:
			engineErr <- err
			return fmt.Errorf("run the swarm: %w", cmp.Or(err, net.ErrClosed))
		}
	}
}

// unstarted takes the transfers that wait for a goroutine.
func (s *Swarm) unstarted() []*transfer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*transfer
	for _, t := range s.transfers {
		if !t.started {
			t.started = true
			list = append(list, t)
		}
	}
	return list
}

func (s *Swarm) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Fetch starts or goes on fetching an image of rel; it is idempotent and returns at once. When the image is whole, Store.Has says so.
// A transfer that ended with an error is tried again, but not more often than every few seconds.
func (s *Swarm) Fetch(rel *verify.Release, d verify.Digest) {
	img, ok := rel.Image(d)
	if !ok {
		s.cfg.Log.Error("fetch an image that is not part of the release", "image", d)
		return
	}
	s.start(img, rel.Pieces(d))
}

// Seed serves a whole image; idempotent.
func (s *Swarm) Seed(rel *verify.Release, d verify.Digest) {
	if s.cfg.Store.Has(d) {
		s.Fetch(rel, d)
	}
}

// retryAfter is how long a failed transfer rests before Fetch starts it again.
const retryAfter = 5 * time.Second

func (s *Swarm) start(img verify.Image, table *verify.PieceTable) {
	s.mu.Lock()
	old := s.transfers[img.SHA256]
	if old != nil && !old.outdated() {
		s.mu.Unlock()
		return
	}
	prev := s.ending[img.SHA256]
	if old != nil {
		if prev = old.prev; old.started {
			prev = old
		}
		old.stop()
	}
	s.transfers[img.SHA256] = newTransfer(s, img, table, prev)
	delete(s.ending, img.SHA256)
	s.mu.Unlock()
	s.poke()
}

// Stop neither fetches nor serves the image any more.
func (s *Swarm) Stop(d verify.Digest) {
	s.mu.Lock()
	t := s.transfers[d]
	if t != nil {
		delete(s.transfers, d)
		if t.started {
			s.ending[d] = t
		} else if t.prev != nil {
			s.ending[d] = t.prev
		}
		t.stop()
	}
	s.mu.Unlock()
	if t != nil {
		s.cfg.Changed()
	}
}

// SetMembers tells who is admitted and alive now, and what they say they hold.
func (s *Swarm) SetMembers(m []Member) {
	m = slices.Clone(m)
	s.mu.Lock()
	s.members = m
	for _, t := range s.transfers {
		t.poke()
	}
	s.mu.Unlock()
}

func (s *Swarm) siteOf(img verify.Digest) site {
	s.mu.Lock()
	defer s.mu.Unlock()
	return siteOf(s.members, s.cfg.Self, img)
}

// Holdings is what this device may say of itself.
func (s *Swarm) Holdings() []Holding {
	var list []Holding
	for _, t := range s.list() {
		if h, ok := t.holding(); ok {
			list = append(list, h)
		}
	}
	return list
}

// Transfers tells about all images in hand.
func (s *Swarm) Transfers() []Transfer {
	var list []Transfer
	for _, t := range s.list() {
		list = append(list, t.status())
	}
	return list
}

// list is all transfers in a steady order.
func (s *Swarm) list() []*transfer {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*transfer, 0, len(s.transfers))
	for _, t := range s.transfers {
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *transfer) int {
		return cmp.Or(a.begun.Compare(b.begun), slices.Compare(a.g.image[:], b.g.image[:]))
	})
	return list
}

// flowInterval is the shortest time between two calls of Changed only because bytes moved.
const flowInterval = 250 * time.Millisecond

func (s *Swarm) flowed() {
	now := time.Now()
	s.mu.Lock()
	due := now.Sub(s.lastFlow) >= flowInterval
	if due {
		s.lastFlow = now
	}
	s.mu.Unlock()
	if due {
		s.cfg.Changed()
	}
}
