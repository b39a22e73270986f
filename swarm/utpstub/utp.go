// Package utp stands in for github.com/anacrolix/go-utp, which the torrent
// library imports for its uTP transport.
//
// meshupd carries BitTorrent only inside authenticated libp2p streams, so uTP is
// switched off and no code of the real module would ever run. The real module
// cannot be had from every module mirror, and a build that depends on it cannot
// be reproduced everywhere. This package offers exactly the names that the
// torrent library compiles against; both constructors refuse, so switching uTP
// on by mistake is an error at start and never a silent second transport.
package utp

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// Default names the implementation in error messages.
const Default = "none (uTP is left out of this build)"

// ErrLeftOut is what both constructors return.
var ErrLeftOut = errors.New("uTP is left out of this build")

// FirewallCallback decides whether a packet from an unknown address is dropped.
type FirewallCallback func(net.Addr) bool

// Socket is the set of methods that the torrent library calls on a uTP socket.
type Socket interface {
	net.PacketConn
	Accept() (net.Conn, error)
	Addr() net.Addr
	DialContext(ctx context.Context, network, addr string) (net.Conn, error)
	SetFirewallCallback(FirewallCallback)
}

// Option configures a Socket.
type Option func()

// WithLogger is accepted and ignored.
func WithLogger(*slog.Logger) Option { return func() {} }

// NewSocket refuses.
func NewSocket(network, addr string, _ ...Option) (Socket, error) { return nil, ErrLeftOut }

// NewSocketFromPacketConn refuses.
func NewSocketFromPacketConn(net.PacketConn, ...Option) (Socket, error) { return nil, ErrLeftOut }
