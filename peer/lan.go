package peer

import (
	"context"
	"net"
	"net/netip"
)

// LAN is the network below libp2p. A nil LAN in MeshConfig means the machine's
// TCP; tests hand in a simulated one, so that whole devices run in fake time.
type LAN interface {
	Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	Listen(at netip.AddrPort) (net.Listener, error)
}
