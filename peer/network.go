package peer

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"meshupd/swarm"
	"meshupd/verify"
)

// btProtocol carries one BitTorrent peer connection per stream.
const btProtocol protocol.ID = "/meshupd/bt/1"

// maxWaitingStreams is how many opened streams may wait for Accept; more are refused.
const maxWaitingStreams = 32

// streamNetwork is the swarm's view of the mesh.
type streamNetwork struct {
	m        *Mesh
	incoming chan *streamConn

	mu   sync.Mutex
	open map[peer.ID]int // streams by device: a connection in use is not trimmed
}

var _ swarm.Network = (*streamNetwork)(nil)

func newStreamNetwork(m *Mesh) *streamNetwork {
	return &streamNetwork{m: m, incoming: make(chan *streamConn, maxWaitingStreams), open: map[peer.ID]int{}}
}

// Dial connects to the device if it has to, waits for its admission and opens a stream.
func (n *streamNetwork) Dial(ctx context.Context, id string) (net.Conn, error) {
	p, err := peer.Decode(id)
	if err != nil {
		return nil, verify.Refuse(verify.CodeNotFound, "%q is not the id of a device", cleanText(id, maxWord))
	}
	if p == n.m.self {
		return nil, errors.New("dial a stream: the device is this one")
	}
	h, err := n.m.running(ctx)
	if err != nil {
		return nil, err
	}
	if n.m.adm.isBanned(p) {
		return nil, verify.Refuse(verify.CodePeer, "the device %s is refused", p)
	}
	if err := h.reach(ctx, p, n.m.book.addrs(p)); err != nil {
		return nil, err
	}
	if err := n.m.adm.wait(ctx, p); err != nil {
		return nil, err
	}
	s, err := h.NewStream(ctx, p, btProtocol)
	if err != nil {
		return nil, err
	}
	return n.wrap(h, s), nil
}

// Accept waits for a stream. When the mesh has ended it waits for ctx: a caller's accept loop would spin on errors.
func (n *streamNetwork) Accept(ctx context.Context) (net.Conn, string, error) {
	for {
		select {
		case <-ctx.Done():
			return nil, "", ctx.Err()
		case c := <-n.incoming:
			p := c.stream.Conn().RemotePeer()
			if n.m.adm.isBanned(p) {
				c.Close()
				continue
			}
			return c, p.String(), nil
		}
	}
}

// accept is the stream handler; admission was checked before.
func (n *streamNetwork) accept(h *lanHost, s network.Stream) {
	c := n.wrap(h, s)
	select {
	case n.incoming <- c:
	default:
		c.Close()
	}
}

func (n *streamNetwork) wrap(h *lanHost, s network.Stream) *streamConn {
	p := s.Conn().RemotePeer()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.open[p]++
	h.ConnManager().Protect(p, string(btProtocol))
	return &streamConn{stream: s, local: syntheticAddr(n.m.self), remote: syntheticAddr(p), done: func() { n.release(h, p) }}
}

func (n *streamNetwork) release(h *lanHost, p peer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[p]--; n.open[p] <= 0 {
		delete(n.open, p)
		h.ConnManager().Unprotect(p, string(btProtocol))
	}
}

// streamConn is a stream as a net.Conn for the torrent engine, which panics
// when a deadline cannot be set and when an address is not IP and port.
type streamConn struct {
	stream        network.Stream
	local, remote net.Addr
	ended         atomic.Bool // the other side has said its last byte, and it was read
	once          sync.Once
	done          func()
}

func (c *streamConn) Read(b []byte) (int, error) {
	n, err := c.stream.Read(b)
	if errors.Is(err, io.EOF) {
		c.ended.Store(true)
	}
	return n, err
}

func (c *streamConn) Write(b []byte) (int, error) { return c.stream.Write(b) }

// Close ends both directions. What the other side still sends would pile up
// unread, so the stream is reset unless its end was seen.
func (c *streamConn) Close() error {
	c.once.Do(func() {
		if c.ended.Load() {
			c.stream.Close()
		} else {
			c.stream.Reset()
		}
		c.done()
	})
	return nil
}

func (c *streamConn) LocalAddr() net.Addr  { return c.local }
func (c *streamConn) RemoteAddr() net.Addr { return c.remote }

func (c *streamConn) SetDeadline(t time.Time) error      { c.stream.SetDeadline(t); return nil }
func (c *streamConn) SetReadDeadline(t time.Time) error  { c.stream.SetReadDeadline(t); return nil }
func (c *streamConn) SetWriteDeadline(t time.Time) error { c.stream.SetWriteDeadline(t); return nil }

// syntheticAddr stands for an identity where an address is asked for: an address
// in fd00::/8 that nobody has, the same for the same device always.
func syntheticAddr(p peer.ID) net.Addr {
	sum := sha256.Sum256([]byte("meshupd address\x00" + string(p)))
	ip := make(net.IP, net.IPv6len)
	copy(ip, sum[:])
	ip[0] = 0xfd
	return &net.TCPAddr{IP: ip, Port: 1}
}
