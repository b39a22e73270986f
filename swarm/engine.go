package swarm

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/anacrolix/torrent/types/infohash"
	"golang.org/x/time/rate"

	"meshupd/verify"
)

// engine is the BitTorrent client below the swarm. It opens no port and finds no
// peer by itself: it is told whom to connect to, over the Network, and takes what
// the Network accepted. Locks: the client calls back with its own lock held, so
// nothing here calls the client while it holds engine.mu or transfer.mu.
type engine struct {
	cfg      Config
	cl       *torrent.Client
	down, up *rate.Limiter
	in       *listener

	mu        sync.Mutex
	transfers map[infohash.T]*transfer
	dials     map[string]*peerAddr // announced by connect, not yet dialled
	ids       map[netip.Addr]string
	banned    map[string]bool
	lastPort  uint16
}

// Depth of the request queue to a parent: about what a fast LAN needs under way,
// and not less than a few pieces. A refill happens only when the queue runs
// empty, so a deeper one does not help and makes a hop slower.
const (
	bytesUnderWay = 2 << 20
	maxRequests   = 32
	minRequests   = 4
)

// childRequests is the depth to a child. In a chain a child has nothing that its
// parent lacks; if it does have something (it restarted, or no whole image is
// left), taking it is right, but a child that answers nothing must not hold more
// than one piece back.
const childRequests = 1

// maxChunk caps the chunk, which otherwise is the whole piece: then each answer
// is a verified piece that can be passed on, and a bad piece has one author.
const maxChunk = 256 << 10

// maxChildren is how many devices may take one image from this one at a time.
const maxChildren = 4

func chunkSize(pieceLength int64) int64 { return min(pieceLength, maxChunk) }

func requestDepth(pieceLength int64) int {
	return int(min(maxRequests, max(minRequests, bytesUnderWay/chunkSize(pieceLength))))
}

func newEngine(cfg Config) (*engine, error) {
	e := &engine{
		cfg: cfg, down: limiter(cfg.DownLimit), up: limiter(cfg.UpLimit),
		in:        newListener(cfg.Self),
		transfers: map[infohash.T]*transfer{}, dials: map[string]*peerAddr{}, ids: map[netip.Addr]string{}, banned: map[string]bool{},
	}
	cl, err := torrent.NewClient(e.clientConfig())
	if err != nil {
		return nil, fmt.Errorf("start the torrent engine: %w", err)
	}
	e.cl = cl
	cl.AddDialer(e)
	cl.AddListener(e.in)
	return e, nil
}

// limiter's burst is a tenth of a second, and at least what one read brings.
func limiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	burst := min(max(bytesPerSecond/10, 16<<10), math.MaxInt32)
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(burst))
}

// clientConfig switches off every way in which the engine would act by itself.
func (e *engine) clientConfig() *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()
	c.DisableTCP, c.DisableUTP, c.DisableWebtorrent, c.DisableWebseeds = true, true, true, true
	c.NoDHT, c.PeriodicallyAnnounceTorrentsToDht = true, false
	c.DisableTrackers, c.DisablePEX, c.NoDefaultPortForwarding = true, true, true
	c.ListenPort = 0
	c.Seed = true // without it the engine serves only who gives as much back
	// A device that has nothing yet would otherwise refuse its child, which does not dial again by itself.
	c.AlwaysWantConns = true
	// A connection made from both ends at once is kept once.
	c.DropDuplicatePeerIds = true
	// Streams of the Network are encrypted already.
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{RequirePreferred: true, Preferred: false}
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 0)
	c.NominalDialTimeout, c.MinDialTimeout = dialTimeout, dialTimeout
	// Each torrent brings its storage; the default would make a database in the working directory.
	c.DefaultStorage = noStorage{}
	// The default counts pieces that nobody near has yet as unverified and then asks for nothing at all: a chain
	// starves on images larger than the default.
	c.MaxUnverifiedBytes = 0
	// A request is not taken from one connection to be made over another while both stand: the first ends when the new
	// parent has sent something, and what was asked of it is free then. Taking it earlier sends pieces twice.
	// A peer that lets one stand for so long gives nothing, though.
	c.StealRequestGrace = 2 * time.Second
	c.MaxAllocPeerRequestDataPerConn = 1 << 20
	c.EstablishedConnsPerTorrent = 30
	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitLtep, pp.ExtensionBitFast)
	c.MinPeerExtensions = c.Extensions
	c.AnonymousMode = true
	// Not derived from the device's id: after a restart the other end may still hold the dead connection, and would
	// take the new one for a duplicate.
	c.PeerID = "-MU0001-" + rand.Text()[:12]
	c.Slogger = slog.New(onlyErrors{e.cfg.Log.Handler()})
	c.Callbacks = torrent.Callbacks{
		CompletedHandshake: e.onHandshake,
		PeerConnAdded:      []func(*torrent.PeerConn){e.onAdded},
		PeerConnClosed:     e.onClosed,
		ReadMessage:        e.onMessage,
		ReadExtendedHandshake: func(pc *torrent.PeerConn, m *pp.ExtendedHandshakeMessage) {
			// What the peer offers is taken over right after this call, so this is where depth is decided.
			m.Reqq = e.depth(pc)
		},
		SentRequest:        []func(torrent.PeerRequestEvent){e.onAsked},
		DeletedRequest:     []func(torrent.PeerRequestEvent){e.onAnswered},
		ReceivedUsefulData: []func(torrent.ReceivedUsefulDataEvent){e.onUseful},
	}
	return c
}

// onlyErrors keeps the engine's chatter out of the log.
type onlyErrors struct{ slog.Handler }

func (h onlyErrors) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelError && h.Handler.Enabled(ctx, l)
}
func (h onlyErrors) WithAttrs(a []slog.Attr) slog.Handler { return onlyErrors{h.Handler.WithAttrs(a)} }
func (h onlyErrors) WithGroup(n string) slog.Handler      { return onlyErrors{h.Handler.WithGroup(n)} }

// run takes what the Network accepted until ctx ends, and closes the client.
func (e *engine) run(ctx context.Context) error {
	err := e.accept(ctx)
	<-ctx.Done()
	for _, closeErr := range e.cl.Close() {
		e.cfg.Log.Warn("close the torrent engine", "err", closeErr)
	}
	// After the client: it calls Accept again and again until it knows that it is closed.
	close(e.in.done)
	return err
}

// infoOf is the BEP 52 info dictionary of an image. It depends on nothing but
// what the manifest says, so every device computes the same infohash and no
// metadata travels.
func infoOf(g geometry) []byte {
	name := g.image.String()
	return fmt.Appendf(nil, "d9:file treed%d:%sd0:d6:lengthi%de11:pieces root%d:%seee12:meta versioni2e4:name%d:%s12:piece lengthi%dee",
		len(name), name, g.size, len(g.root), g.root[:], len(name), name, g.length)
}

// infohashOf is the SHA-1 of the info dictionary, although the pieces are BEP 52
// pieces and hashed with SHA-256. A connection that names the torrent by its
// SHA-256 makes engine v1.62 look for missing piece hashes before every write,
// which takes 40 % of a fast transfer; ours are all known. It is a mere name: what
// is in the dictionary comes from the manifest, never from a peer.
func infohashOf(g geometry) infohash.T { return infohash.HashBytes(infoOf(g)) }

// add makes the image known to the engine. Incoming connections may arrive before it returns.
func (e *engine) add(t *transfer) (*torrent.Torrent, error) {
	name := infohashOf(t.g)
	e.mu.Lock()
	e.transfers[name] = t
	e.mu.Unlock()
	spec := &torrent.TorrentSpec{AddTorrentOpts: torrent.AddTorrentOpts{
		InfoHash:  name,
		InfoBytes: infoOf(t.g),
		Storage:   storageOf{t},
		ChunkSize: pp.Integer(chunkSize(t.g.length)),
		// What is complete is known from the bitmap; the engine need not find out.
		DisableInitialPieceCheck: true,
	}}
	if t.g.pieces() > 1 {
		spec.PieceLayers = map[string]string{string(t.g.root[:]): layerOf(t.table)}
	}
	tor, _, err := e.cl.AddTorrentSpec(spec)
	if err != nil {
		e.forget(t)
		return nil, fmt.Errorf("add image %s to the torrent engine: %w", t.g.image, err)
	}
	tor.SetOnWriteChunkError(func(err error) { t.fail(err) })
	return tor, nil
}

func layerOf(table *verify.PieceTable) string {
	layer := make([]byte, 0, len(table.Hashes)*len(verify.Digest{}))
	for _, h := range table.Hashes {
		layer = append(layer, h[:]...)
	}
	return string(layer)
}

func (e *engine) forget(t *transfer) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if name := infohashOf(t.g); e.transfers[name] == t {
		delete(e.transfers, name)
	}
}

// connect makes the engine dial a device for one image. The result comes as added or gone.
func (e *engine) connect(t *transfer, tor *torrent.Torrent, id string) *peerAddr {
	a := &peerAddr{id: id, ip: ipOf(id), made: time.Now(), dropped: make(chan struct{})}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.owner.Store(t)
	e.mu.Lock()
	e.ids[a.ip] = id
	// The engine knows a connection by its address, so each attempt gets a port of its own; 1 is for those that come in.
	for range math.MaxUint16 {
		e.lastPort++
		a.port = e.lastPort
		if _, used := e.dials[a.String()]; !used && a.port > 1 {
			break
		}
	}
	e.dials[a.String()] = a
	e.mu.Unlock()
	tor.AddPeers([]torrent.PeerInfo{{Addr: a, Source: torrent.PeerSourceDirect}})
	return a
}

func (e *engine) takeDial(addr string) *peerAddr {
	e.mu.Lock()
	defer e.mu.Unlock()
	a := e.dials[addr]
	delete(e.dials, addr)
	return a
}

// gone is called once for each connection or attempt that ended, without any lock.
func (e *engine) gone(a *peerAddr) {
	e.takeDial(a.String())
	if t := a.owner.Load(); t != nil {
		t.gone(a)
	}
}

// onHandshake learns which image a connection is for. The client's lock is not held.
func (e *engine) onHandshake(pc *torrent.PeerConn, ih infohash.T) {
	a, ok := pc.RemoteAddr.(*peerAddr)
	if !ok {
		return
	}
	e.mu.Lock()
	t := e.transfers[ih]
	e.ids[a.ip] = a.id
	e.mu.Unlock()
	if t == nil {
		return
	}
	a.owner.Store(t)
	if a.incoming() {
		t.replaceOlder(a)
	}
}

func (e *engine) onAdded(pc *torrent.PeerConn) {
	a, ok := pc.RemoteAddr.(*peerAddr)
	if !ok {
		return
	}
	pc.PeerMaxRequests = e.depth(pc)
	t := a.owner.Load()
	if t == nil || e.isBanned(a.id) || !t.added(a, pc) {
		a.hangUp()
	}
}

func (e *engine) onClosed(pc *torrent.PeerConn) {
	if a, ok := pc.RemoteAddr.(*peerAddr); ok {
		a.drop.Do(func() { close(a.dropped) })
	}
}

func (e *engine) depth(pc *torrent.PeerConn) int {
	a, ok := pc.RemoteAddr.(*peerAddr)
	if !ok || a.incoming() {
		return childRequests
	}
	if t := a.owner.Load(); t != nil {
		return requestDepth(t.g.length)
	}
	return childRequests
}

// onMessage drops what no device of ours sends and an attacker could use: hash
// requests and metadata requests cost 20 to 50 bytes and are answered with up to
// 256 KiB, which the engine would queue without bound.
func (e *engine) onMessage(pc *torrent.PeerConn, m *pp.Message) {
	a, ok := pc.RemoteAddr.(*peerAddr)
	if !ok || m.Keepalive {
		return
	}
	t := a.owner.Load()
	if t == nil {
		return
	}
	foreign := false
	switch m.Type {
	case pp.Piece:
		t.receivedRaw(len(m.Piece))
	case pp.Have, pp.Bitfield, pp.HaveAll, pp.HaveNone:
		t.shows(a, m)
	case pp.Request:
		kept, ok := t.stands(a, requestOf(m))
		m.Keepalive, foreign = kept, !ok
	case pp.Cancel:
		if r := requestOf(m); t.withdrawn(a, r) {
			m.Keepalive = true
			if c := a.conn.Load(); c != nil {
				c.say(r.message(pp.Reject))
			}
		}
	case pp.Suggest:
		ours, pass := t.suggested(a)
		m.Keepalive, foreign = !pass, !ours
	case pp.Reject:
		t.refused(a)
	case pp.Choke, pp.Unchoke, pp.Interested, pp.NotInterested, pp.AllowedFast:
	case pp.Extended:
		foreign = m.ExtendedID != pp.HandshakeExtendedID
	default:
		foreign = true
	}
	if foreign {
		m.Keepalive = true // the engine skips it
		a.hangUp()
	}
}

func (e *engine) onUseful(ev torrent.ReceivedUsefulDataEvent) {
	a, ok := ev.Peer.RemoteAddr.(*peerAddr)
	if !ok {
		return
	}
	if t := a.owner.Load(); t != nil {
		t.receivedUseful(a, int(ev.Message.Index), int64(len(ev.Message.Piece)))
	}
}

func (e *engine) isBanned(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.banned[id]
}

// newBans asks the engine whom it has banned since the last call. It bans by
// synthetic address, that is by identity.
func (e *engine) newBans() []string {
	ips := e.cl.BadPeerIPs()
	e.mu.Lock()
	defer e.mu.Unlock()
	var fresh []string
	for _, text := range ips {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		if id, ok := e.ids[ip]; ok && !e.banned[id] {
			e.banned[id] = true
			fresh = append(fresh, id)
		}
	}
	return fresh
}
