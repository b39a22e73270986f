package simnet

import (
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
)

// lanConn is one end of a connection, a net.Conn that behaves like *net.TCPConn.
type lanConn struct {
	lan           *LAN
	host          *LANHost
	local, remote net.Addr // *net.TCPAddr
	in, out       *stream

	// Guarded by lan.mu.
	closed  bool
	reset   bool // by the other side, or by this one
	writing bool // one Write at a time, its bytes together
	rd, wd  deadline
}

// newConnPair makes both ends.
func newConnPair(a, b *LANHost, aAt, bAt netip.AddrPort) (*lanConn, *lanConn) {
	there, back := newStream(a, b), newStream(b, a)
	ca := &lanConn{lan: a.lan, host: a, local: net.TCPAddrFromAddrPort(aAt), remote: net.TCPAddrFromAddrPort(bAt), in: back, out: there}
	cb := &lanConn{lan: a.lan, host: b, local: net.TCPAddrFromAddrPort(bAt), remote: net.TCPAddrFromAddrPort(aAt), in: there, out: back}
	there.writer, there.reader = ca, cb
	back.writer, back.reader = cb, ca
	for _, c := range []*lanConn{ca, cb} {
		c.rd.cond, c.wd.cond = c.in.cond, c.out.cond
		c.lan.conns[c] = struct{}{}
	}
	return ca, cb
}

func (c *lanConn) LocalAddr() net.Addr  { return c.local }
func (c *lanConn) RemoteAddr() net.Addr { return c.remote }

func (c *lanConn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Source: c.local, Addr: c.remote, Err: err}
}

func (c *lanConn) Read(p []byte) (int, error) {
	c.lan.mu.Lock()
	defer c.lan.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case c.rd.passed:
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case c.in.unread > 0: // also after a reset: what has arrived is not lost
			return c.in.read(p), nil
		case c.reset:
			return 0, c.fail("read", os.NewSyscallError("read", syscall.ECONNRESET))
		case c.in.ended:
			return 0, io.EOF
		}
		c.in.cond.Wait()
	}
}

// Write returns when all of p is in the window, not when it has arrived.
func (c *lanConn) Write(p []byte) (n int, err error) {
	c.lan.mu.Lock()
	defer c.lan.mu.Unlock()
	for c.writing && c.writeErr() == nil {
		c.out.cond.Wait()
	}
	if err := c.writeErr(); err != nil {
		return 0, err
	}
	c.writing = true
	defer func() {
		c.writing = false
		c.out.cond.Broadcast()
	}()
	for n < len(p) {
		if err := c.writeErr(); err != nil {
			return n, err
		}
		k := c.out.room(len(p) - n)
		if k == 0 {
			c.out.cond.Wait()
			continue
		}
		data := c.lan.buffer(k)
		copy(data, p[n:n+k])
		n += k
		c.out.outstanding += k
		c.out.send(segData, data)
	}
	return n, nil
}

// writeErr says why nothing can be written now.
func (c *lanConn) writeErr() error {
	switch {
	case c.closed:
		return c.fail("write", net.ErrClosed)
	case c.wd.passed:
		return c.fail("write", os.ErrDeadlineExceeded)
	case c.reset:
		return c.fail("write", os.NewSyscallError("write", syscall.ECONNRESET))
	case c.out.finSent:
		return c.fail("write", os.NewSyscallError("write", syscall.EPIPE))
	}
	return nil
}

// CloseWrite ends this direction: the other side reads io.EOF behind all that
// was written.
func (c *lanConn) CloseWrite() error {
	c.lan.mu.Lock()
	defer c.lan.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.sendFin()
	return nil
}

func (c *lanConn) sendFin() {
	if !c.out.finSent && !c.reset {
		c.out.finSent = true
		c.out.send(segFin, nil)
		c.out.cond.Broadcast()
	}
}

// Close drops the connection. What was written is still delivered, unless there
// was something to read: closing over unread data resets the connection, as TCP
// does (RFC 2525, section 2.17), so that the other side does not believe it read.
func (c *lanConn) Close() error {
	c.lan.mu.Lock()
	defer c.lan.mu.Unlock()
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.end()
	return nil
}

func (c *lanConn) end() {
	c.closed = true
	if c.in.unread > 0 && !c.reset {
		c.abort()
	}
	c.sendFin()
	c.in.drop()
	c.quit()
}

// abort tells the other side that the connection is gone.
func (c *lanConn) abort() {
	c.reset = true
	c.out.discard()
	c.out.send(segRst, nil)
}

// wasReset is told by the other side that the connection is gone.
func (c *lanConn) wasReset() {
	c.reset = true
	c.out.discard()
	c.in.cond.Broadcast()
	c.out.cond.Broadcast()
}

// vanish closes without a word, when the LAN closes.
func (c *lanConn) vanish() {
	c.closed = true
	c.in.drop()
	c.quit()
}

func (c *lanConn) quit() {
	c.rd.stop()
	c.wd.stop()
	delete(c.lan.conns, c)
	c.in.cond.Broadcast()
	c.out.cond.Broadcast()
}

// SetDeadline, SetReadDeadline and SetWriteDeadline never fail.
func (c *lanConn) SetDeadline(t time.Time) error { return c.setDeadlines(t, &c.rd, &c.wd) }

func (c *lanConn) SetReadDeadline(t time.Time) error { return c.setDeadlines(t, &c.rd) }

func (c *lanConn) SetWriteDeadline(t time.Time) error { return c.setDeadlines(t, &c.wd) }

func (c *lanConn) setDeadlines(t time.Time, which ...*deadline) error {
	c.lan.mu.Lock()
	defer c.lan.mu.Unlock()
	if c.closed {
		return nil
	}
	for _, d := range which {
		d.set(t)
	}
	return nil
}
