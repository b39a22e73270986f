package peer

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/peerstore"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
	"github.com/multiformats/go-multistream"
	"golang.org/x/time/rate"

	"meshupd/discovery"
	"meshupd/verify"
)

const (
	// Dials that hints lead to: whoever forges hints must not turn the site against a third host.
	hintDialsPerMinute = 64
	hintDialsBurst     = 16
	// Dials to devices that were admitted before, so that forged hints cannot starve them.
	metDialsPerSecond = 2
	metDialsBurst     = 32
	parallelDials     = 8
)

// dialler keeps this device connected, from the book.
type dialler struct {
	m     *Mesh
	wake  chan struct{}
	hints *rate.Limiter
	known *rate.Limiter
	slots chan struct{}
}

func newDialler(m *Mesh) *dialler {
	return &dialler{
		m: m, wake: make(chan struct{}, 1), slots: make(chan struct{}, parallelDials),
		hints: rate.NewLimiter(rate.Every(time.Minute/hintDialsPerMinute), hintDialsBurst),
		known: rate.NewLimiter(metDialsPerSecond, metDialsBurst),
	}
}

// poke makes the dialler look at the book again.
func (d *dialler) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// run dials whoever is due until ctx ends.
func (d *dialler) run(ctx context.Context, h *lanHost) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		case <-timer.C:
		}
		timer.Reset(time.Until(d.round(ctx, h)))
	}
}

func (d *dialler) round(ctx context.Context, h *lanHost) (again time.Time) {
	now := time.Now()
	connected := func(id peer.ID) bool {
		return h.swarm.Connectedness(id) == network.Connected || d.m.adm.isBanned(id)
	}
	calls, again := d.m.book.due(now, connected, d.m.maxPeers)
	for _, c := range calls {
		limit := d.hints
		if c.met {
			limit = d.known
		}
		if !limit.AllowN(now, 1) {
			again = earlier(again, now.Add(time.Second))
			continue
		}
		select {
		case d.slots <- struct{}{}:
		default:
			return earlier(again, now.Add(time.Second)) // the end of a dial pokes, too
		}
		d.m.book.hold(c, now)
		d.m.tasks.Go(func() {
			defer d.poke()
			defer func() { <-d.slots }()
			d.call(ctx, h, c)
		})
	}
	return again
}

func (d *dialler) call(ctx context.Context, h *lanHost, c call) {
	if c.id == "" {
		id, err := h.askWho(ctx, c.at)
		if err != nil {
			d.m.log.Debug("a seed does not answer", "seed", c.at.String(), "why", err.Error())
		}
		d.m.book.seeded(c.at, id, time.Now())
		return
	}
	if err := h.reach(ctx, c.id, d.m.book.addrs(c.id)); err != nil {
		d.m.log.Debug("a device cannot be dialled", "peer", c.id.String(), "why", err.Error())
		d.m.book.failed(c.id, false, time.Now())
	}
}

// reach connects to a device at one of the addresses. A connection is not yet admission.
func (h *lanHost) reach(ctx context.Context, id peer.ID, at []netip.AddrPort) error {
	if h.swarm.Connectedness(id) == network.Connected {
		return nil
	}
	if len(at) == 0 {
		return verify.Refuse(verify.CodeNotFound, "no address of the device %s is known", id)
	}
	addrs := make([]ma.Multiaddr, 0, len(at))
	for _, a := range at {
		if m, err := multiaddrOf(a); err == nil {
			addrs = append(addrs, m)
		}
	}
	h.swarm.Backoff().Clear(id) // the book knows better when to try again
	h.Peerstore().ClearAddrs(id)
	h.Peerstore().AddAddrs(id, addrs, peerstore.TempAddrTTL)
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	if _, err := h.swarm.DialPeer(ctx, id); err != nil {
		return fmt.Errorf("dial %s: %w", id, err)
	}
	return nil
}

// askWho learns which device listens at an address: libp2p only dials whom it
// knows by name, and a seed has none. The connection ends after the handshake.
func (h *lanHost) askWho(ctx context.Context, at netip.AddrPort) (peer.ID, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := h.lan.Dial(ctx, at)
	if err != nil {
		return "", fmt.Errorf("ask the seed %s: %w", at, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := multistream.SelectProtoOrFail(libp2ptls.ID, conn); err != nil {
		return "", fmt.Errorf("ask the seed %s: %w", at, err)
	}
	secured, err := h.tls.SecureOutbound(ctx, conn, "")
	if err != nil {
		return "", fmt.Errorf("ask the seed %s: %w", at, err)
	}
	defer secured.Close()
	return secured.RemotePeer(), nil
}

// found takes a hint from discovery.
func (d *dialler) found(h discovery.Hint) {
	now := time.Now()
	news := false
	if h.ID == "" {
		for _, at := range h.Addrs {
			news = d.m.book.plant(at, now) || news
		}
	} else if id, err := peer.Decode(h.ID); err == nil && !d.m.adm.isBanned(id) {
		news = d.m.book.hint(id, h.Addrs, now)
		news = d.m.book.near(id, now) || news
	}
	if news {
		d.m.log.Debug("a device may be near", "peer", h.ID, "via", h.Via, "addrs", fmt.Sprint(h.Addrs))
		d.poke()
	}
}
