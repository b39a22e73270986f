package peer

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"golang.org/x/sync/errgroup"

	"meshupd/discovery"
	"meshupd/swarm"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// Finder yields hints about devices on this LAN.
type Finder interface {
	// Run calls found for each hint until ctx ends. A hint may be wrong or hostile.
	Run(ctx context.Context, found func(discovery.Hint)) error
}

// HeadRef names a release a device holds, for the exchange of heads.
type HeadRef struct {
	ID   verify.Digest `json:"id"`
	Line uint64        `json:"line"`
	Seq  uint64        `json:"seq"`
	// Epoch of the newest trust document in the head: the same release may come with newer keys.
	Epoch uint64 `json:"epoch,omitempty"`
}

// DeviceStatus is what a device says of itself; signed by its identity key and gossiped. All of it is a claim.
type DeviceStatus struct {
	Name     string           `json:"name"` // host name or configured name; cap 63 bytes
	Boot     uint64           `json:"boot"` // start counter: a restart begins a new sequence; set by the mesh
	N        uint64           `json:"n"`    // rises with every message of this Boot; set by the mesh
	Hardware string           `json:"hardware"`
	Version  string           `json:"version"`          // what runs
	Target   string           `json:"target,omitempty"` // version it moves to
	State    string           `json:"state"`            // see lifecycle.go
	Since    time.Time        `json:"since"`
	Reason   *Reason          `json:"reason,omitempty"`
	Done     int64            `json:"done,omitempty"` // bytes of the image being fetched or written
	Size     int64            `json:"size,omitempty"`
	Rate     float64          `json:"rate,omitempty"` // bytes per second
	From     []string         `json:"from,omitempty"` // peer ids, most first, cap 8
	Source   string           `json:"source,omitempty"`
	Heads    []HeadRef        `json:"heads,omitempty"` // set by the mesh from MeshConfig.Heads
	Holdings []swarm.Holding  `json:"holdings,omitempty"`
	Addrs    []string         `json:"addrs,omitempty"` // ip:port where it can be dialled; set by the mesh
	Sent     map[string]int64 `json:"sent,omitempty"`  // payload bytes sent per image digest, totals
	Kept     []string         `json:"kept,omitempty"`  // versions beside the slots that it can go back to, newest first
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
	Status    DeviceStatus // zero for a device that is connected and has said nothing yet
	LastHeard time.Time
	Connected bool // admitted, and a connection is open
}

// MeshConfig of a Mesh.
type MeshConfig struct {
	StateDir string           // identity key and start counter live here (0600)
	Group    verify.Digest    // trust root of the product: devices of another product are not neighbours
	SiteKey  []byte           // optional shared secret of at least 16 bytes; nil: same Group is enough
	Listen   []netip.AddrPort // addresses to bind; port 0 picks one
	// ListenNow, if not nil, is asked instead of Listen, again and again: a
	// device starts before its network does, and addresses come and go.
	ListenNow func() []netip.AddrPort
	Finders   func(discovery.Advert) []Finder
	LAN       LAN // nil: the machine's TCP
	Log       *slog.Logger
	MaxPeers  int // connections kept, default 64

	// CheckHead is asked about a head from a neighbour; nil means believed, kept and to be passed on.
	CheckHead func(ctx context.Context, from string, head []byte) error
	// Heads and Head say what this device can hand on.
	Heads func() []HeadRef
	Head  func(id verify.Digest) []byte
	// Changed is called when members, their status or connections changed; must not block.
	Changed func()
}

const defaultMaxPeers = 64

// Mesh carries documents, status and streams between admitted devices.
type Mesh struct {
	cfg      MeshConfig
	log      *slog.Logger
	key      crypto.PrivKey
	self     peer.ID
	maxPeers int

	adm     *admission
	book    *book
	dialler *dialler
	roster  *roster
	teller  *teller
	docs    *documents
	streams *streamNetwork

	// tasks are the goroutines of single connections; Run waits for them.
	tasks sync.WaitGroup
	// started is closed once host is set; host is not changed after that.
	started chan struct{}
	host    *lanHost
}

// NewMesh loads or makes the identity, and starts nothing. It refuses with E-KEY, E-CONFIG or E-IO.
func NewMesh(cfg MeshConfig) (*Mesh, error) {
	cred, err := newCredential(cfg.Group, cfg.SiteKey)
	if err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxPeers <= 0 {
		cfg.MaxPeers = defaultMaxPeers
	}
	if err := durable.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, verify.Refuse(verify.CodeIO, "make the state folder: %w", err)
	}
	key, err := loadIdentity(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, verify.Refuse(verify.CodeKey, "use the identity key: %w", err)
	}
	boot, err := countBoot(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	m := &Mesh{
		cfg: cfg, log: cfg.Log, key: key, self: self, maxPeers: cfg.MaxPeers,
		adm: newAdmission(cred, self, cfg.Log), book: newBook(self), roster: newRoster(), started: make(chan struct{}),
	}
	m.dialler = newDialler(m)
	m.teller = newTeller(m, boot)
	m.docs = newDocuments(m)
	m.streams = newStreamNetwork(m)
	return m, nil
}

// Run joins the site until ctx ends. It must be called once.
func (m *Mesh) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h, err := newHost(m.key, m.cfg.LAN, m.maxPeers, m.adm)
	if err != nil {
		return err
	}
	defer m.tasks.Wait()
	defer h.Close()
	defer cancel()
	h.allow = func(s network.Stream) error { return m.allow(ctx, s) }
	h.Network().Notify(&network.NotifyBundle{
		ConnectedF:    func(_ network.Network, c network.Conn) { m.connected(ctx, c) },
		DisconnectedF: func(_ network.Network, c network.Conn) { m.disconnected(c) },
	})
	h.SetStreamHandler(helloProtocol, func(s network.Stream) { m.hello(ctx, s) })
	h.SetStreamHandler(btProtocol, func(s network.Stream) { m.streams.accept(h, s) })
	if err := m.docs.start(ctx, h); err != nil {
		return err
	}
	if err := m.listen(ctx, h); err != nil {
		return err
	}
	m.host = h
	close(m.started)
	m.log.Info("the mesh is up", "self", m.self.String(), "listen", m.Addrs())
	m.changed()

	g, all := errgroup.WithContext(ctx)
	g.Go(func() error { return m.dialler.run(all, h) })
	g.Go(func() error { return m.teller.run(all) })
	g.Go(func() error { return m.docs.run(all, h) })
	g.Go(func() error { return m.followAddrs(all, h) })
	for _, f := range m.finders() {
		g.Go(func() error {
			// One way of finding devices may fail, the others and the mesh go on.
			if err := f.Run(all, m.dialler.found); err != nil && all.Err() == nil {
				m.log.Warn("discovery ended", "why", err.Error())
			}
			return nil
		})
	}
	return g.Wait()
}

func (m *Mesh) finders() []Finder {
	if m.cfg.Finders == nil {
		return nil
	}
	advert := discovery.Advert{ID: m.self.String(), Tag: m.adm.cred.tag, Match: m.adm.cred.matches}
	if addrs := m.Addrs(); len(addrs) > 0 {
		advert.Port = int(addrs[0].Port())
	}
	advert.Addrs = func() []netip.Addr {
		var list []netip.Addr
		for _, at := range m.Addrs() {
			if int(at.Port()) == advert.Port {
				list = append(list, at.Addr())
			}
		}
		return list
	}
	return m.cfg.Finders(advert)
}

// tag ties an advert to the site without naming it: a nonce, and the first half of an HMAC over it, in hex.
func (c credential) tag() string {
	var nonce [8]byte
	rand.Read(nonce[:])
	return hex.EncodeToString(nonce[:]) + c.tagFor(nonce[:])
}

func (c credential) tagFor(nonce []byte) string {
	mac := hmac.New(sha256.New, c.key)
	io.WriteString(mac, "meshupd advert 1\x00")
	mac.Write(nonce)
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

func (c credential) matches(tag string) bool {
	if len(tag) != 32 {
		return false
	}
	nonce, err := hex.DecodeString(tag[:16])
	return err == nil && hmac.Equal([]byte(c.tagFor(nonce)), []byte(tag[16:]))
}

// allow lets only admitted devices open anything but a hello.
func (m *Mesh) allow(ctx context.Context, s network.Stream) error {
	if s.Protocol() == helloProtocol {
		return nil
	}
	return m.adm.wait(ctx, s.Conn().RemotePeer())
}

// connected runs for each new connection, in either direction.
func (m *Mesh) connected(ctx context.Context, c network.Conn) {
	m.adm.opened(c)
	if c.Stat().Direction == network.DirOutbound {
		m.tasks.Go(func() {
			m.conclude(ctx, c, m.adm.greet(ctx, c))
		})
		return
	}
	time.AfterFunc(helloTimeout, func() {
		if m.adm.overdue(c) {
			m.adm.reject(c.RemotePeer(), verify.Refuse(verify.CodeAdmission, "the device said no hello in time"))
			c.Close()
		}
	})
}

// hello serves the hello of a device that dialled this one.
func (m *Mesh) hello(ctx context.Context, s network.Stream) {
	err := m.adm.answer(ctx, s)
	if err != nil {
		// The other side closes as soon as it has read why.
		s.SetReadDeadline(time.Now().Add(time.Second))
		io.Copy(io.Discard, io.LimitReader(s, 1<<10))
		s.Reset()
	}
	m.conclude(ctx, s.Conn(), err)
}

// conclude admits a connection or closes it.
func (m *Mesh) conclude(ctx context.Context, c network.Conn, err error) {
	p := c.RemotePeer()
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		m.adm.reject(p, err)
		m.book.failed(p, true, time.Now())
		c.Close()
		return
	}
	first, ok := m.adm.admit(c)
	if !ok {
		c.Close()
		return
	}
	at := netip.AddrPort{}
	if c.Stat().Direction == network.DirOutbound {
		at, _ = addrPortOf(c.RemoteMultiaddr())
	}
	m.book.met(p, at)
	if first {
		m.log.Info("a device was admitted", "peer", p.String(), "addr", c.RemoteMultiaddr().String())
		m.docs.joined(ctx, c)
		m.changed()
	}
}

func (m *Mesh) disconnected(c network.Conn) {
	if m.adm.closed(c) {
		p := c.RemotePeer()
		m.log.Info("a device left", "peer", p.String())
		m.book.lost(p, time.Now())
		m.docs.left(p)
		m.changed()
		m.dialler.poke()
	}
}

func (m *Mesh) changed() {
	if m.cfg.Changed != nil {
		m.cfg.Changed()
	}
}

// running waits until the host is up.
func (m *Mesh) running(ctx context.Context) (*lanHost, error) {
	select {
	case <-m.started:
		return m.host, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// ID is this device's peer id, text form.
func (m *Mesh) ID() string { return m.self.String() }

// Addrs lists where this device listens; none before Run has bound its addresses.
// Where it listens on all addresses of the machine, these are the private ones it has now.
func (m *Mesh) Addrs() []netip.AddrPort {
	select {
	case <-m.started:
		return m.host.addrs()
	default:
		return nil
	}
}

// Tell signs and spreads this device's status (at most about once a second; the newest wins).
func (m *Mesh) Tell(s DeviceStatus) { m.teller.tell(s) }

// Spread hands a release to the site: to the neighbours now, and to those that come later as
// long as MeshConfig.Heads lists it. Before Run it does nothing.
func (m *Mesh) Spread(ctx context.Context, rel *verify.Release) error {
	return m.docs.spread(ctx, rel.Head())
}

// Members lists all devices heard of, this one not among them.
func (m *Mesh) Members() []Member { return m.roster.members(m.adm.members(), time.Now()) }

// Network carries the swarm's byte streams over this mesh.
func (m *Mesh) Network() swarm.Network { return m.streams }

// Ban refuses a device from now on, for this run.
func (m *Mesh) Ban(id string, why error) {
	p, err := peer.Decode(id)
	if err != nil || p == m.self {
		return
	}
	m.adm.ban(p)
	m.log.Warn("a device is refused from now on", "peer", id, "code", string(verify.CodeOf(why)), "why", why)
	select {
	case <-m.started:
		m.host.swarm.ClosePeer(p)
	default:
	}
}

// listen binds the addresses. Where ports are picked, one port serves all of them if it is free everywhere.
func (h *lanHost) listen(at []netip.AddrPort, log *slog.Logger) error {
	port := uint16(0)
	var last error
	for _, a := range at {
		err := h.listenOn(a, port)
		if err != nil && a.Port() == 0 && port != 0 {
			err = h.listenOn(a, 0)
		}
		if err != nil {
			last = err
			log.Warn("an address cannot be bound", "addr", a.String(), "why", err.Error())
			continue
		}
		if bound := h.bound(); port == 0 && len(bound) > 0 {
			port = bound[0].Port()
		}
	}
	if len(h.bound()) == 0 && len(at) > 0 {
		return verify.Refuse(verify.CodeConfig, "no address can be bound: %w", last)
	}
	return nil
}

func (h *lanHost) listenOn(at netip.AddrPort, port uint16) error {
	if at.Port() == 0 {
		at = netip.AddrPortFrom(at.Addr(), port)
	}
	m, err := plainMultiaddr(at)
	if err != nil {
		return err
	}
	return h.swarm.Listen(m)
}

// bound lists the addresses as they were bound.
func (h *lanHost) bound() []netip.AddrPort {
	var list []netip.AddrPort
	for _, m := range h.swarm.ListenAddresses() {
		if at, err := addrPortOf(m); err == nil {
			list = append(list, at)
		}
	}
	slices.SortFunc(list, netip.AddrPort.Compare)
	return list
}

// addrs is bound with the unspecified address replaced by the machine's private ones.
func (h *lanHost) addrs() []netip.AddrPort {
	var list []netip.AddrPort
	for _, at := range h.bound() {
		if !at.Addr().IsUnspecified() {
			list = append(list, at)
			continue
		}
		machine, err := net.InterfaceAddrs()
		if err != nil {
			continue
		}
		for _, a := range machine {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil || !prefix.Addr().IsPrivate() && !(prefix.Addr().Is4() && prefix.Addr().IsLinkLocalUnicast()) {
				continue
			}
			if at.Addr().Is6() || prefix.Addr().Is4() {
				list = append(list, netip.AddrPortFrom(prefix.Addr(), at.Port()))
			}
		}
	}
	return list
}
