package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// memLAN is a LAN in memory: listeners by address, and links that can be cut.
type memLAN struct {
	mu        sync.Mutex
	listeners map[netip.AddrPort]*memListener
	cut       map[[2]netip.Addr]bool
	conns     map[*memConn][2]netip.Addr
	nextPort  uint16
}

func newMemLAN() *memLAN {
	return &memLAN{listeners: map[netip.AddrPort]*memListener{}, cut: map[[2]netip.Addr]bool{}, conns: map[*memConn][2]netip.Addr{}, nextPort: 40000}
}

// at is the LAN as one device sees it.
func (l *memLAN) at(host netip.Addr) LAN { return memPort{l, host} }

func pair(a, b netip.Addr) [2]netip.Addr {
	if b.Less(a) {
		a, b = b, a
	}
	return [2]netip.Addr{a, b}
}

// link cuts or joins the link between two devices; a cut breaks its connections.
func (l *memLAN) link(a, b netip.Addr, up bool) {
	l.mu.Lock()
	l.cut[pair(a, b)] = !up
	var broken []*memConn
	for c, ends := range l.conns {
		if !up && ends == pair(a, b) {
			broken = append(broken, c)
		}
	}
	l.mu.Unlock()
	for _, c := range broken {
		c.Close()
	}
}

type memPort struct {
	lan  *memLAN
	host netip.Addr
}

func (p memPort) Listen(at netip.AddrPort) (net.Listener, error) {
	p.lan.mu.Lock()
	defer p.lan.mu.Unlock()
	if at.Port() == 0 {
		at = netip.AddrPortFrom(at.Addr(), 7610)
	}
	if p.lan.listeners[at] != nil {
		return nil, errors.New("address in use")
	}
	l := &memListener{lan: p.lan, at: at, conns: make(chan net.Conn), closed: make(chan struct{})}
	p.lan.listeners[at] = l
	return l, nil
}

func (p memPort) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	p.lan.mu.Lock()
	l := p.lan.listeners[to]
	ends := pair(p.host, to.Addr())
	if l == nil || p.lan.cut[ends] {
		p.lan.mu.Unlock()
		return nil, errors.New("no route to host")
	}
	p.lan.nextPort++
	from := netip.AddrPortFrom(p.host, p.lan.nextPort)
	here, there := net.Pipe()
	a, b := newMemConn(here, from, to), newMemConn(there, to, from)
	p.lan.conns[a], p.lan.conns[b] = ends, ends
	p.lan.mu.Unlock()
	select {
	case l.conns <- b:
		return a, nil
	case <-l.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type memListener struct {
	lan    *memLAN
	at     netip.AddrPort
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.lan.mu.Lock()
		delete(l.lan.listeners, l.at)
		l.lan.mu.Unlock()
	})
	return nil
}

func (l *memListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

// memConn is a pipe that behaves like TCP: it buffers what is written, and deadlines never fail.
type memConn struct {
	net.Conn
	local, remote net.Addr

	mu     sync.Mutex
	wake   *sync.Cond
	queue  bytes.Buffer
	closed bool
}

func newMemConn(c net.Conn, local, remote netip.AddrPort) *memConn {
	m := &memConn{Conn: c, local: net.TCPAddrFromAddrPort(local), remote: net.TCPAddrFromAddrPort(remote)}
	m.wake = sync.NewCond(&m.mu)
	go m.pump()
	return m
}

func (c *memConn) pump() {
	for {
		c.mu.Lock()
		for c.queue.Len() == 0 && !c.closed {
			c.wake.Wait()
		}
		if c.queue.Len() == 0 {
			c.mu.Unlock()
			c.Conn.Close()
			return
		}
		chunk := bytes.Clone(c.queue.Next(64 << 10))
		c.mu.Unlock()
		if _, err := c.Conn.Write(chunk); err != nil {
			c.Conn.Close()
			c.mu.Lock()
			c.closed = true
			c.queue.Reset()
			c.mu.Unlock()
		}
	}
}

func (c *memConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, io.ErrClosedPipe
	}
	c.queue.Write(b)
	c.wake.Signal()
	return len(b), nil
}

func (c *memConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.queue.Reset()
	c.wake.Signal()
	c.mu.Unlock()
	return c.Conn.Close()
}

func (c *memConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errors.Is(err, io.ErrClosedPipe) {
		err = net.ErrClosed
	}
	return n, err
}

func (c *memConn) LocalAddr() net.Addr                { return c.local }
func (c *memConn) RemoteAddr() net.Addr               { return c.remote }
func (c *memConn) SetDeadline(t time.Time) error      { c.Conn.SetReadDeadline(t); return nil }
func (c *memConn) SetReadDeadline(t time.Time) error  { c.Conn.SetReadDeadline(t); return nil }
func (c *memConn) SetWriteDeadline(t time.Time) error { return nil }

// onLAN starts devices on a LAN in memory.
func onLAN(t *testing.T, lan *memLAN, hosts ...string) []*testMesh {
	t.Helper()
	var list []*testMesh
	for _, host := range hosts {
		addr := netip.MustParseAddr(host)
		m := newTestMesh(t, t.TempDir(), func(c *MeshConfig) {
			c.LAN = lan.at(addr)
			c.Listen = []netip.AddrPort{netip.AddrPortFrom(addr, 7610)}
		})
		m.start()
		list = append(list, m)
	}
	return list
}

func stopAll(list []*testMesh) {
	for _, m := range list {
		m.stop()
	}
	time.Sleep(10 * time.Minute) // fake time: what libp2p and gossip clean up behind themselves ends
}

func TestSiteInFakeTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lan := newMemLAN()
		site := onLAN(t, lan, "10.0.0.1", "10.0.0.2", "10.0.0.3", "fe80::4%lan0", "fe80::5%lan0")
		defer stopAll(site)
		for i, m := range site {
			m.Tell(DeviceStatus{Name: fmt.Sprint(i), State: "idle"})
		}
		for _, m := range site[1:] {
			m.sees(site[0])
		}
		site[3].sees(site[4]) // link-local addresses travel only by discovery
		began := time.Now()
		for _, m := range site {
			m.until("knows the site", func() bool { return len(m.Members()) == len(site)-1 })
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v of fake time", took)
		}
		// Unchanged devices are heard again and again.
		time.Sleep(5 * time.Minute)
		for _, m := range site {
			for _, x := range m.Members() {
				if silent := time.Since(x.LastHeard); silent > 2*heartbeatMax {
					t.Errorf("%s was silent for %v", x.Status.Name, silent)
				}
			}
		}
	})
}

func TestPartitionHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lan := newMemLAN()
		site := onLAN(t, lan, "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
		defer stopAll(site)
		for i, m := range site {
			m.Tell(DeviceStatus{Name: fmt.Sprint(i), State: "idle"})
			if i > 0 {
				m.sees(site[0])
			}
		}
		for _, m := range site {
			m.until("knows the site", func() bool { return len(m.Members()) == len(site)-1 })
		}
		split := func(up bool) {
			for _, a := range site[:2] {
				for _, b := range site[2:] {
					lan.link(a.Addrs()[0].Addr(), b.Addrs()[0].Addr(), up)
				}
			}
		}
		split(false)
		site[0].until("the other half is gone", func() bool { return !site[0].connectedTo(site[2].ID()) && !site[0].connectedTo(site[3].ID()) })
		left, right := []byte("left news"), bytes.Repeat([]byte("right news, too large for gossip"), maxGossip/16)
		leftID, rightID := site[0].hold(left), site[3].hold(right)
		if err := errors.Join(site[0].docs.spread(t.Context(), left), site[3].docs.spread(t.Context(), right)); err != nil {
			t.Fatal(err)
		}
		site[1].until("holds the left head", func() bool { return site[1].holds(leftID) })
		site[2].until("holds the right head", func() bool { return site[2].holds(rightID) })
		time.Sleep(3 * time.Minute)
		if site[1].holds(rightID) || site[2].holds(leftID) {
			t.Fatal("the partition leaks")
		}
		split(true)
		time.Sleep(retryMax * 2)
		for _, m := range site {
			m.until("holds both heads", func() bool { return m.holds(leftID) && m.holds(rightID) })
		}
	})
}

func TestAddressForms(t *testing.T) {
	for _, s := range []string{"10.0.0.1:7610", "[fd00::1]:7610", "[fe80::1%eth0]:7610", "[::1]:1"} {
		at := netip.MustParseAddrPort(s)
		dial, err := multiaddrOf(at)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := plainMultiaddr(at)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := addrPortOf(dial); err != nil || got != at {
			t.Errorf("%v, %v", got, err)
		}
		if got, err := addrPortOf(plain); err != nil || got != at {
			t.Errorf("%v, %v", got, err)
		}
	}
}
