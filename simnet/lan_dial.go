package simnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	firstEphemeral = 32768 // as Linux picks them
	lastEphemeral  = 60999

	backlog = 128 // connections a listener keeps for Accept

	// How long a dial tries: with an address nobody has, until ARP gives up; with
	// a host that does not answer, until TCP does (Linux, tcp_syn_retries 6).
	noHostLimit   = 3 * time.Second
	noAnswerLimit = 127 * time.Second
	synInterval   = time.Second
)

// Dial connects to a listener on the LAN, from this host. It is refused at once
// when nobody listens there, and tries on while the way is cut.
func (h *LANHost) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	to = netip.AddrPortFrom(to.Addr().Unmap().WithZone(""), to.Port())
	c, err := h.connect(ctx, to)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Source: &net.TCPAddr{IP: h.addr.AsSlice()}, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return c, nil
}

func (h *LANHost) connect(ctx context.Context, to netip.AddrPort) (*lanConn, error) {
	l := h.lan
	begin := time.Now()
	for {
		if err := sleep(ctx, nil, h.latencyTo(to.Addr())); err != nil { // SYN
			return nil, err
		}
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return nil, net.ErrClosed
		}
		dst, limit, why := h.find(to.Addr()), noAnswerLimit, syscall.ETIMEDOUT
		if dst == nil {
			limit, why = noHostLimit, syscall.EHOSTUNREACH
		} else if reachable(h, dst) {
			ln := dst.listeners[to.Port()]
			if ln == nil {
				l.mu.Unlock()
				if err := sleep(ctx, nil, h.latencyTo(to.Addr())); err != nil {
					return nil, err
				}
				return nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
			}
			if len(ln.queue) < backlog {
				c := ln.greet(h)
				l.mu.Unlock()
				if err := sleep(ctx, nil, h.latencyTo(to.Addr())); err != nil { // SYN+ACK
					c.Close()
					return nil, err
				}
				return c, nil
			}
		}
		changed := l.changed
		l.mu.Unlock()
		left := limit - time.Since(begin)
		if left <= 0 {
			return nil, os.NewSyscallError("connect", why)
		}
		if err := sleep(ctx, changed, min(left, synInterval)); err != nil {
			return nil, err
		}
	}
}

// find returns the host at an address, as this host would.
func (h *LANHost) find(addr netip.Addr) *LANHost {
	if addr.IsLoopback() || addr.IsUnspecified() {
		return h
	}
	return h.lan.hosts[addr]
}

func (h *LANHost) latencyTo(addr netip.Addr) time.Duration {
	if addr == h.addr || addr.IsLoopback() || addr.IsUnspecified() {
		return 0
	}
	return h.lan.cfg.Latency
}

// sleep waits for d to pass or for wake to be closed; a nil wake never is.
func sleep(ctx context.Context, wake <-chan struct{}, d time.Duration) error {
	if err := ctx.Err(); err != nil || d <= 0 {
		return err
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-wake:
	case <-t.C:
	}
	return nil
}

// Listen listens on this host. Port 0 picks one. An unspecified address means the
// host's only one, and Addr of the listener says so.
func (h *LANHost) Listen(at netip.AddrPort) (net.Listener, error) {
	l := h.lan
	l.mu.Lock()
	defer l.mu.Unlock()
	addr := at.Addr().Unmap()
	at = netip.AddrPortFrom(h.addr, at.Port())
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: "tcp", Addr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, at.Port())), Err: err}
	}
	if l.closed {
		return fail(net.ErrClosed)
	}
	if addr.IsValid() && addr != h.addr && !addr.IsUnspecified() && !addr.IsLoopback() {
		return fail(os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	if at.Port() == 0 {
		port, err := h.freePort()
		if err != nil {
			return fail(err)
		}
		at = netip.AddrPortFrom(h.addr, port)
	}
	if h.listeners[at.Port()] != nil {
		return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	ln := &lanListener{host: h, at: at, cond: sync.NewCond(&l.mu)}
	h.listeners[at.Port()] = ln
	return ln, nil
}

// freePort picks the next ephemeral port nobody listens on.
func (h *LANHost) freePort() (uint16, error) {
	for range lastEphemeral - firstEphemeral + 1 {
		if h.lastPort++; h.lastPort > lastEphemeral {
			h.lastPort = firstEphemeral
		}
		if h.listeners[h.lastPort] == nil {
			return h.lastPort, nil
		}
	}
	return 0, fmt.Errorf("every port is taken: %w", syscall.EADDRINUSE)
}

type lanListener struct {
	host *LANHost
	at   netip.AddrPort

	// Guarded by lan.mu.
	cond   *sync.Cond
	closed bool
	queue  []*lanConn // to be accepted
}

func (ln *lanListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(ln.at) }

// greet makes the connection when a SYN has come in, and returns the caller's end.
func (ln *lanListener) greet(from *LANHost) *lanConn {
	port, err := from.freePort()
	if err != nil {
		port = lastEphemeral // all taken by listeners; connections may share one
	}
	here, there := newConnPair(from, ln.host, netip.AddrPortFrom(from.addr, port), ln.at)
	ln.queue = append(ln.queue, there)
	ln.cond.Signal()
	return here
}

func (ln *lanListener) Accept() (net.Conn, error) {
	mu := &ln.host.lan.mu
	mu.Lock()
	defer mu.Unlock()
	for len(ln.queue) == 0 && !ln.closed {
		ln.cond.Wait()
	}
	if ln.closed {
		return nil, ln.fail("accept")
	}
	c := ln.queue[0]
	ln.queue = ln.queue[1:]
	return c, nil
}

// Close refuses from now on. Connections not yet accepted are reset, accepted
// ones live on.
func (ln *lanListener) Close() error {
	mu := &ln.host.lan.mu
	mu.Lock()
	defer mu.Unlock()
	if ln.closed {
		return ln.fail("close")
	}
	ln.shut()
	return nil
}

func (ln *lanListener) shut() {
	ln.closed = true
	delete(ln.host.listeners, ln.at.Port())
	for _, c := range ln.queue {
		if !c.closed {
			c.abort()
			c.end()
		}
	}
	ln.queue = nil
	ln.cond.Broadcast()
}

func (ln *lanListener) fail(op string) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: ln.Addr(), Err: net.ErrClosed}
}
