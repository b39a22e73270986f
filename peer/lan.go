package peer

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// LAN is the network below libp2p. A nil LAN in MeshConfig means the machine's
// TCP; tests hand in a simulated one, so that whole devices run in fake time.
//
// Both ends of a Conn report *net.TCPAddr as LocalAddr and RemoteAddr, and a
// Listener reports the one it was given (with a picked port for port 0). A Conn
// keeps deadlines as TCP does, and SetDeadline on one that the far side closed
// is not an error.
type LAN interface {
	Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	Listen(at netip.AddrPort) (net.Listener, error)
}

// machineLAN is the TCP of this machine.
type machineLAN struct{}

// keepAlive finds a neighbour that lost its power within a minute, at the price
// of one packet per idle half minute.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

func (machineLAN) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: keepAlive}
	return d.DialContext(ctx, "tcp", to.String())
}

func (machineLAN) Listen(at netip.AddrPort) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive}
	return lc.Listen(context.Background(), "tcp", at.String())
}

// dialTimeout bounds one attempt to connect and to secure a connection.
const dialTimeout = 5 * time.Second

// lanTransport is the libp2p transport over a LAN. One transport serves the
// machine and the simulation, so that what the tests run is what devices run.
//
// It replaces libp2p's TCP transport for a second reason: libp2p never dials
// link-local IPv6, which is all that some sites have. Such an address is given
// to libp2p in the form /dns6/fe80::1%eth0/tcp/7610, which names the same thing
// and is left alone on the way here; nothing ever resolves it.
type lanTransport struct {
	lan      LAN
	upgrader transport.Upgrader
	limits   network.ResourceManager
}

var (
	_ transport.Transport    = (*lanTransport)(nil)
	_ transport.SkipResolver = (*lanTransport)(nil)
)

func (t *lanTransport) Dial(ctx context.Context, to ma.Multiaddr, p peer.ID) (transport.CapableConn, error) {
	at, err := addrPortOf(to)
	if err != nil {
		return nil, err
	}
	plain, err := plainMultiaddr(at)
	if err != nil {
		return nil, err
	}
	scope, err := t.limits.OpenConnection(network.DirOutbound, true, plain)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", at, err)
	}
	conn, err := t.dial(ctx, at, p, scope)
	if err != nil {
		scope.Done()
		return nil, err
	}
	return conn, nil
}

func (t *lanTransport) dial(ctx context.Context, at netip.AddrPort, p peer.ID, scope network.ConnManagementScope) (transport.CapableConn, error) {
	if err := scope.SetPeer(p); err != nil {
		return nil, fmt.Errorf("dial %s: %w", at, err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := t.lan.Dial(ctx, at)
	if err != nil {
		return nil, err
	}
	wrapped, err := manet.WrapNetConn(raw)
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("dial %s: %w", at, err)
	}
	return t.upgrader.Upgrade(ctx, t, wrapped, network.DirOutbound, p, scope)
}

func (t *lanTransport) CanDial(addr ma.Multiaddr) bool {
	_, err := addrPortOf(addr)
	return err == nil
}

func (t *lanTransport) Listen(at ma.Multiaddr) (transport.Listener, error) {
	addr, err := addrPortOf(at)
	if err != nil {
		return nil, err
	}
	l, err := t.lan.Listen(addr)
	if err != nil {
		return nil, err
	}
	wrapped, err := manet.WrapNetListener(l)
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return t.upgrader.UpgradeGatedMaListener(t, t.upgrader.GateMaListener(wrapped)), nil
}

func (t *lanTransport) Protocols() []int { return []int{ma.P_TCP} }

func (t *lanTransport) Proxy() bool { return false }

// SkipResolve keeps libp2p from asking DNS about anything at all.
func (t *lanTransport) SkipResolve(context.Context, ma.Multiaddr) bool { return true }

// multiaddrOf is the form in which an address is handed to libp2p for dialling.
func multiaddrOf(at netip.AddrPort) (ma.Multiaddr, error) {
	at = unmapped(at)
	if at.Addr().Is6() && at.Addr().IsLinkLocalUnicast() {
		host, err := ma.NewComponent("dns6", at.Addr().String())
		if err != nil {
			return nil, fmt.Errorf("address %s: %w", at, err)
		}
		port, err := ma.NewComponent("tcp", strconv.Itoa(int(at.Port())))
		if err != nil {
			return nil, fmt.Errorf("address %s: %w", at, err)
		}
		return host.Encapsulate(port), nil
	}
	return plainMultiaddr(at)
}

// plainMultiaddr is the usual form, with the zone of a link-local address as ip6zone.
func plainMultiaddr(at netip.AddrPort) (ma.Multiaddr, error) {
	m, err := manet.FromNetAddr(net.TCPAddrFromAddrPort(unmapped(at)))
	if err != nil {
		return nil, fmt.Errorf("address %s: %w", at, err)
	}
	return m, nil
}

// addrPortOf reads exactly the forms that multiaddrOf and plainMultiaddr make.
func addrPortOf(m ma.Multiaddr) (netip.AddrPort, error) {
	var host, zone, port string
	for i, c := range m {
		switch code := c.Code(); {
		case code == ma.P_IP6ZONE && i == 0:
			zone = c.Value()
		case (code == ma.P_IP4 || code == ma.P_IP6 || code == ma.P_DNS6) && host == "":
			host = c.Value()
		case code == ma.P_TCP && i == len(m)-1:
			port = c.Value()
		default:
			return netip.AddrPort{}, fmt.Errorf("address %s is not ip:port", m)
		}
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %s is not ip:port", m)
	}
	if zone != "" {
		addr = addr.WithZone(zone)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("address %s is not ip:port", m)
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// unmapped turns an IPv4 address in IPv6 clothes into itself, so that one address has one spelling.
func unmapped(at netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}
