package swarm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// peerAddr is a device as the engine sees it. The engine bans, counts and
// compares by IP address and takes a peer whose address is none for a crash
// (a nil IP in its ban list), so each device gets one address of its own, made
// from its id. The port only tells connections apart.
type peerAddr struct {
	id   string
	ip   netip.Addr
	port uint16
	made time.Time

	conn  atomic.Pointer[peerConn] // set once the connection stands
	owner atomic.Pointer[transfer] // set once it is known for which image it is

	drop    sync.Once
	dropped chan struct{} // closed when the engine let go of the connection

	// For an outgoing connection: what ends the attempt.
	ctx    context.Context
	cancel context.CancelFunc
}

// incoming says that the other device opened the connection: it is a child.
func (a *peerAddr) incoming() bool { return a.port == 1 }

func (a *peerAddr) Network() string { return "swarm" }
func (a *peerAddr) String() string  { return netip.AddrPortFrom(a.ip, a.port).String() }

// hangUp ends the connection or the attempt to make one.
func (a *peerAddr) hangUp() {
	if a.cancel != nil {
		a.cancel()
	}
	if c := a.conn.Load(); c != nil {
		c.Close()
	}
}

// ipOf is a device's synthetic address: a unique local address (RFC 4193) whose
// other 15 bytes are from the hash of its id.
func ipOf(id string) netip.Addr {
	sum := sha256.Sum256([]byte("meshupd swarm address\x00" + id))
	var ip [16]byte
	copy(ip[:], sum[:])
	ip[0] = 0xfd
	return netip.AddrFrom16(ip)
}

// maxUnanswered is how many bytes a peer may send while it does not take one
// message from us. What the engine queues for a peer that never reads has no
// other bound. It is far above the pieces that can be under way to us.
const maxUnanswered = 32 << 20

// peerConn makes a stream of the Network fit for the engine: deadlines that
// never fail (the engine panics if one does), a Close that is heard by a blocked
// Read, limits of rate, and a count of what arrived.
type peerConn struct {
	net.Conn
	addr *peerAddr

	ctx    context.Context
	cancel context.CancelFunc
	once   sync.Once
	closed func(*peerConn)

	in         *inlet        // what the engine reads
	down, up   *rate.Limiter // nil: no limit
	got        atomic.Int64  // bytes read
	writing    atomic.Bool
	unanswered atomic.Int64 // bytes read while one write is blocked

	mu    sync.Mutex
	extra []byte // messages of our own, to be written before the engine's next

	order    sync.Mutex // one writer at a time
	flushing sync.WaitGroup
}

func newPeerConn(c net.Conn, addr *peerAddr, down, up *rate.Limiter, closed func(*peerConn)) *peerConn {
	p := &peerConn{Conn: c, in: newInlet(c), addr: addr, down: down, up: up, closed: closed}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	addr.conn.Store(p)
	return p
}

func (p *peerConn) RemoteAddr() net.Addr { return p.addr }

// A stream that is closed already may refuse a deadline; its next Read or Write says so anyway.
func (p *peerConn) SetDeadline(t time.Time) error {
	_ = p.SetReadDeadline(t)
	return p.SetWriteDeadline(t)
}
func (p *peerConn) SetReadDeadline(t time.Time) error  { p.in.setReadDeadline(t); return nil }
func (p *peerConn) SetWriteDeadline(t time.Time) error { _ = p.Conn.SetWriteDeadline(t); return nil }

func (p *peerConn) Read(b []byte) (int, error) {
	if p.down != nil && len(b) > p.down.Burst() {
		b = b[:p.down.Burst()]
	}
	n, err := p.in.Read(b)
	p.got.Add(int64(n))
	if p.writing.Load() && p.unanswered.Add(int64(n)) > maxUnanswered {
		p.Close()
		return 0, errors.New("swarm: the peer does not take what it asks for")
	}
	if p.down != nil && n > 0 {
		if waitErr := p.down.WaitN(p.ctx, n); waitErr != nil && err == nil {
			return n, net.ErrClosed
		}
	}
	return n, err
}

// say writes a message of our own between two writes of the engine, which writes whole messages. It does not block.
func (p *peerConn) say(message []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return
	}
	if p.extra == nil {
		p.flushing.Go(func() { _, _ = p.Write(nil) }) // an error is the engine's to find
	}
	p.extra = append(p.extra, message...)
}

func (p *peerConn) Write(b []byte) (int, error) {
	p.order.Lock()
	defer p.order.Unlock()
	p.mu.Lock()
	extra := p.extra
	p.extra = nil
	p.mu.Unlock()
	if _, err := p.write(extra); err != nil {
		return 0, err
	}
	return p.write(b)
}

func (p *peerConn) write(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	p.unanswered.Store(0)
	p.writing.Store(true)
	defer p.writing.Store(false)
	for len(b) > 0 {
		part := b
		if p.up != nil {
			part = b[:min(len(b), p.up.Burst())]
			if p.up.WaitN(p.ctx, len(part)) != nil {
				return n, net.ErrClosed
			}
		}
		m, err := p.Conn.Write(part)
		n += m
		if err != nil {
			return n, err
		}
		if m > 0 {
			p.unanswered.Store(0)
		}
		b = b[m:]
	}
	return n, nil
}

// Close is heard at once by whoever reads, writes or waits for the rate limit.
func (p *peerConn) Close() error {
	var err error
	p.once.Do(func() {
		p.mu.Lock()
		p.cancel()
		p.mu.Unlock()
		err = p.Conn.Close()
		p.flushing.Wait()
		p.closed(p)
	})
	return err
}

// listener hands the engine the streams that admitted devices opened. The
// engine calls Accept again at once after an error, so Accept only returns an
// error when it is over.
type listener struct {
	addr  *peerAddr
	conns chan net.Conn
	done  chan struct{}
}

func newListener(self string) *listener {
	return &listener{addr: &peerAddr{id: self, ip: ipOf(self), port: 1}, conns: make(chan net.Conn, maxPending), done: make(chan struct{})}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Addr() net.Addr { return l.addr }
func (l *listener) Close() error   { return nil }

// dialTimeout is how long a device may take to open a stream. It is admitted and
// was heard lately; one that needs longer is dead or cut off.
const dialTimeout = 5 * time.Second

// Dial opens the stream that connect announced under addr.
func (e *engine) Dial(ctx context.Context, addr string) (net.Conn, error) {
	a := e.takeDial(addr)
	if a == nil {
		return nil, fmt.Errorf("dial %s: nobody asked for it", addr)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	stop := context.AfterFunc(a.ctx, cancel)
	defer stop()
	c, err := e.cfg.Network.Dial(ctx, a.id)
	if err != nil {
		e.gone(a)
		return nil, fmt.Errorf("dial %s: %w", a.id, err)
	}
	p := newPeerConn(c, a, e.down, e.up, func(*peerConn) { e.gone(a) })
	if a.ctx.Err() != nil {
		p.Close()
		return nil, fmt.Errorf("dial %s: %w", a.id, a.ctx.Err())
	}
	return p, nil
}

// DialerNetwork names the network for the engine.
func (e *engine) DialerNetwork() string { return "swarm" }

// maxPending is how many accepted streams may wait for the engine.
const maxPending = 16

// accept takes streams from the Network until ctx ends.
func (e *engine) accept(ctx context.Context) error {
	for {
		c, id, err := e.cfg.Network.Accept(ctx)
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept swarm streams: %w", err)
		}
		if e.isBanned(id) {
			c.Close()
			continue
		}
		a := &peerAddr{id: id, ip: ipOf(id), port: 1, made: time.Now(), dropped: make(chan struct{})}
		p := newPeerConn(c, a, e.down, e.up, func(*peerConn) { e.gone(a) })
		select {
		case e.in.conns <- p:
		case <-ctx.Done():
			p.Close()
			return nil
		}
	}
}
