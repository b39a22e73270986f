package peer

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/libp2p/go-libp2p/core/connmgr"
	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/sec"
	blankhost "github.com/libp2p/go-libp2p/p2p/host/blank"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	rcmgr "github.com/libp2p/go-libp2p/p2p/host/resource-manager"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	trimmer "github.com/libp2p/go-libp2p/p2p/net/connmgr"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/x/rate"
	"github.com/multiformats/go-multistream"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// identityFile holds the ed25519 key, in libp2p's protobuf form.
const identityFile = "identity.key"

// loadIdentity reads the device's key, or makes it durably at the first start. A
// key that others can read or that is damaged is refused, never replaced: a new
// identity would be a stranger to the site, and the old one would stay "silent" there.
func loadIdentity(dir string) (crypto.PrivKey, error) {
	path := filepath.Join(dir, identityFile)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeIdentity(path)
	}
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read the identity key %s: %w", path, err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, verify.Refuse(verify.CodeKey, "the identity key %s has mode %v, not 0600", path, info.Mode())
	}
	if info.Size() > 1<<10 {
		return nil, verify.Refuse(verify.CodeKey, "the identity key %s is not an ed25519 key", path)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read the identity key %s: %w", path, err)
	}
	key, err := crypto.UnmarshalPrivateKey(raw)
	if err != nil || key.Type() != crypto.Ed25519 {
		return nil, verify.Refuse(verify.CodeKey, "the identity key %s is not an ed25519 key", path)
	}
	return key, nil
}

func makeIdentity(path string) (crypto.PrivKey, error) {
	key, _, err := crypto.GenerateEd25519Key(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make an identity key: %w", err)
	}
	raw, err := crypto.MarshalPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("make an identity key: %w", err)
	}
	if err := durable.WriteFile(path, raw, 0o600); err != nil {
		return nil, verify.Refuse(verify.CodeIO, "keep the identity key: %w", err)
	}
	return key, nil
}

// lanHost is the libp2p host of a device: TCP, TLS 1.3 or Noise, yamux, and
// nothing else. It is put together from libp2p's parts, because libp2p.New links
// QUIC, WebRTC and a dependency container, and starts identify, which a closed
// site has no use for.
type lanHost struct {
	*blankhost.BlankHost
	swarm *swarm.Swarm
	parts []func() error // what Close has to end after the switch, in order
	lan   LAN
	tls   *clocklessTLS
	// allow decides about each stream that a neighbour opened, before its handler runs.
	allow func(s network.Stream) error
}

// negotiateTimeout bounds the choice of a stream's protocol.
const negotiateTimeout = 10 * time.Second

// yamuxWindow is the largest receive window of one stream: enough for a
// gigabit LAN, and 1/16 of libp2p's default, which a small device cannot pay per stream.
const yamuxWindow = 1 << 20

func newHost(key crypto.PrivKey, lan LAN, maxPeers int, gater connmgr.ConnectionGater) (_ *lanHost, err error) {
	if lan == nil {
		lan = machineLAN{}
	}
	var undo []func() error
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	self, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("derive the peer id: %w", err)
	}
	store, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, fmt.Errorf("make a peer store: %w", err)
	}
	undo = append(undo, store.Close)
	if err := store.AddPrivKey(self, key); err != nil {
		return nil, fmt.Errorf("use the identity key: %w", err)
	}
	if err := store.AddPubKey(self, key.GetPublic()); err != nil {
		return nil, fmt.Errorf("use the identity key: %w", err)
	}
	limits, err := newLimits(maxPeers)
	if err != nil {
		return nil, err
	}
	undo = append(undo, limits.Close)
	manager, err := trimmer.NewConnManager(max(maxPeers*3/4, 1), maxPeers, trimmer.WithGracePeriod(30*time.Second), trimmer.WithSilencePeriod(time.Minute))
	if err != nil {
		return nil, fmt.Errorf("make a connection manager: %w", err)
	}
	undo = append(undo, manager.Close)
	bus := eventbus.NewBus()
	sw, err := swarm.NewSwarm(self, store, bus, swarm.WithResourceManager(limits), swarm.WithConnectionGater(gater),
		swarm.WithUDPBlackHoleSuccessCounter(nil), swarm.WithIPv6BlackHoleSuccessCounter(nil))
	if err != nil {
		return nil, fmt.Errorf("make a switch: %w", err)
	}
	undo = append(undo, sw.Close)
	secure, err := addTransport(sw, key, lan, limits, gater)
	if err != nil {
		return nil, err
	}
	n := &lanHost{
		BlankHost: blankhost.NewBlankHost(sw, blankhost.WithConnectionManager(manager), blankhost.WithEventBus(bus)),
		swarm:     sw,
		parts:     []func() error{manager.Close, limits.Close, store.Close},
		lan:       lan,
		tls:       secure,
		allow:     func(network.Stream) error { return errors.New("not started") },
	}
	if n.BlankHost == nil {
		return nil, errors.New("make a libp2p host: it did not start")
	}
	sw.SetStreamHandler(n.serve)
	return n, nil
}

func addTransport(sw *swarm.Swarm, key crypto.PrivKey, lan LAN, limits network.ResourceManager, gater connmgr.ConnectionGater) (*clocklessTLS, error) {
	window := *yamux.DefaultTransport
	window.MaxStreamWindowSize = yamuxWindow
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: &window}}
	// TLS first: Go picks AES-GCM where the processor has it. Noise is ChaCha20 everywhere.
	overTLS, err := newClocklessTLS(key, []protocol.ID{yamux.ID})
	if err != nil {
		return nil, err
	}
	overNoise, err := noise.New(noise.ID, key, muxers)
	if err != nil {
		return nil, fmt.Errorf("set up noise: %w", err)
	}
	up, err := upgrader.New([]sec.SecureTransport{overTLS, overNoise}, muxers, nil, limits, gater, upgrader.WithAcceptTimeout(10*time.Second))
	if err != nil {
		return nil, fmt.Errorf("set up transports: %w", err)
	}
	if err := sw.AddTransport(&lanTransport{lan: lan, upgrader: up, limits: limits}); err != nil {
		return nil, fmt.Errorf("set up transports: %w", err)
	}
	return overTLS, nil
}

// Close closes all connections and waits for what the host started.
func (n *lanHost) Close() error {
	err := n.swarm.Close()
	for _, end := range n.parts {
		err = errors.Join(err, end())
	}
	return err
}

// serve runs for each stream that a neighbour opened.
func (n *lanHost) serve(s network.Stream) {
	s.SetDeadline(time.Now().Add(negotiateTimeout))
	proto, handle, err := n.Mux().Negotiate(s)
	if err != nil {
		s.ResetWithError(network.StreamProtocolNegotiationFailed)
		return
	}
	if err := s.SetProtocol(proto); err != nil {
		s.ResetWithError(network.StreamResourceLimitExceeded)
		return
	}
	if err := n.allow(s); err != nil {
		s.ResetWithError(network.StreamGated)
		return
	}
	s.SetDeadline(time.Time{})
	handle(proto, s)
}

// SetStreamHandler shadows BlankHost's, which would set the protocol a second time.
func (n *lanHost) SetStreamHandler(proto protocol.ID, handler network.StreamHandler) {
	n.Mux().AddHandler(proto, func(_ protocol.ID, rw io.ReadWriteCloser) error {
		handler(rw.(network.Stream))
		return nil
	})
}

// NewStream opens a stream and agrees on a protocol. It does not dial: a stream
// to a device that is not connected fails.
func (n *lanHost) NewStream(ctx context.Context, p peer.ID, protos ...protocol.ID) (network.Stream, error) {
	s, err := n.swarm.NewStream(network.WithNoDial(ctx, "streams follow admission"), p)
	if err != nil {
		return nil, fmt.Errorf("open a stream to %s: %w", p, err)
	}
	if err := agree(ctx, s, protos...); err != nil {
		return nil, fmt.Errorf("open a stream to %s: %w", p, err)
	}
	return s, nil
}

// agree negotiates the protocol of a stream that this device opened; on an error the stream is reset.
func agree(ctx context.Context, s network.Stream, protos ...protocol.ID) error {
	deadline := time.Now().Add(negotiateTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	s.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	proto, err := multistream.SelectOneOf(protos, s)
	if err != nil {
		s.Reset()
		return err
	}
	if err := s.SetProtocol(proto); err != nil {
		s.Reset()
		return err
	}
	return s.SetDeadline(time.Time{})
}

// newLimits bounds what all neighbours together and each alone may hold, fit for a device with little memory.
//
// libp2p's defaults count connections per IPv6 /56 and admit 8: a LAN is one
// /64, so the ninth neighbour would be refused. Here the unit is the address.
func newLimits(maxPeers int) (network.ResourceManager, error) {
	perAddress := max(16, maxPeers/2)
	total := 2*maxPeers + 16 // both directions, and those on their way in or out
	loopback4, loopback6 := netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")
	conns4 := []rcmgr.ConnLimitPerSubnet{{PrefixLength: 32, ConnCount: perAddress}}
	conns6 := []rcmgr.ConnLimitPerSubnet{{PrefixLength: 128, ConnCount: perAddress}, {PrefixLength: 64, ConnCount: total}}
	free4 := []rcmgr.NetworkPrefixLimit{{Network: loopback4, ConnCount: math.MaxInt}}
	free6 := []rcmgr.NetworkPrefixLimit{{Network: loopback6, ConnCount: math.MaxInt}}
	// New connections per second; the burst lets a whole site come up at once.
	pace := &rate.Limiter{
		NetworkPrefixLimits: []rate.PrefixLimit{{Prefix: loopback4}, {Prefix: loopback6}},
		SubnetRateLimiter: rate.SubnetLimiter{
			IPv4SubnetLimits: []rate.SubnetLimit{{PrefixLength: 32, Limit: rate.Limit{RPS: 1, Burst: 2 * perAddress}}},
			IPv6SubnetLimits: []rate.SubnetLimit{
				{PrefixLength: 128, Limit: rate.Limit{RPS: 1, Burst: 2 * perAddress}},
				{PrefixLength: 64, Limit: rate.Limit{RPS: 16, Burst: 2 * total}},
			},
			GracePeriod: time.Minute,
		},
	}
	m, err := rcmgr.NewResourceManager(rcmgr.NewFixedLimiter(scopeLimits(maxPeers, total)), rcmgr.WithMetricsDisabled(),
		rcmgr.WithLimitPerSubnet(conns4, conns6), rcmgr.WithNetworkPrefixLimit(free4, free6), rcmgr.WithConnRateLimiters(pace))
	if err != nil {
		return nil, fmt.Errorf("set up resource limits: %w", err)
	}
	return m, nil
}

func scopeLimits(maxPeers, total int) rcmgr.ConcreteLimitConfig {
	val := func(n int) rcmgr.LimitVal { return rcmgr.LimitVal(n) }
	const perPeer = 64
	all := rcmgr.ResourceLimits{
		Conns: val(total), ConnsInbound: val(maxPeers + 16), ConnsOutbound: val(maxPeers + 16), FD: val(total),
		Streams: val(total * perPeer), StreamsInbound: val(total * perPeer), StreamsOutbound: val(total * perPeer), Memory: 96 << 20,
	}
	joining := rcmgr.ResourceLimits{ // connections whose identity is not proven yet
		Conns: val(maxPeers + 16), ConnsInbound: val(maxPeers), ConnsOutbound: val(maxPeers), FD: val(maxPeers + 16),
		Streams: val(256), StreamsInbound: val(256), StreamsOutbound: val(256), Memory: 16 << 20,
	}
	streams := rcmgr.ResourceLimits{Streams: val(total * perPeer), StreamsInbound: val(total * perPeer), StreamsOutbound: val(total * perPeer), Memory: 64 << 20}
	one := rcmgr.ResourceLimits{
		Conns: val(4), ConnsInbound: val(3), ConnsOutbound: val(3), FD: val(4),
		Streams: val(2 * perPeer), StreamsInbound: val(perPeer), StreamsOutbound: val(perPeer), Memory: 16 << 20,
	}
	partial := rcmgr.PartialLimitConfig{
		System: all, Transient: joining, AllowlistedSystem: all, AllowlistedTransient: joining,
		ServiceDefault: streams, ServicePeerDefault: streams, ProtocolDefault: streams, ProtocolPeerDefault: one, PeerDefault: one,
	}
	defaults := rcmgr.DefaultLimits
	return partial.Build(defaults.Scale(0, 0))
}
