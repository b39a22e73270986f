package simnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Node is a machine on a Site: a network of its own with lo and eth0.
type Node struct {
	site   *Site
	cfg    NodeConfig
	number int // from 1; its addresses follow from it

	// Set by plugIn, nil on a loopback site.
	space *space
	eth0  netlink.Link // the node's end of the cable, in space
	port  netlink.Link // the bridge's end, in the namespace of the site

	mu      sync.Mutex
	closed  bool
	started []*exec.Cmd // loopback only: elsewhere the namespace knows
}

// Name of the node.
func (n *Node) Name() string { return n.cfg.Name }

// Addr4 is the node's IPv4 address, in a /16 that all nodes share.
func (n *Node) Addr4() netip.Addr {
	high, low := byte(n.number/250), byte(1+n.number%250) // never .0 or .255
	if !n.site.isolated {
		return netip.AddrFrom4([4]byte{127, 77, high, low})
	}
	return netip.AddrFrom4([4]byte{10, 77, high, low})
}

// Addr6 is the node's unique local IPv6 address, in a /64 that all nodes share.
// On a loopback site it is the zero Addr.
func (n *Node) Addr6() netip.Addr {
	if !n.site.isolated {
		return netip.Addr{}
	}
	return n.addr6(0xfd, 0x77)
}

// linkLocal is the node's address in fe80::/64.
func (n *Node) linkLocal() netip.Addr { return n.addr6(0xfe, 0x80) }

func (n *Node) addr6(b0, b1 byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0: b0, 1: b1, 14: byte(n.number >> 8), 15: byte(n.number)})
}

// plugIn makes the node's namespace and its cable.
func (n *Node) plugIn() error {
	var err error
	if n.space, err = newSpace(); err != nil {
		return err
	}
	br, err := n.site.bridge(0)
	if err != nil {
		return err
	}
	if n.port, err = n.layCable(br); err != nil {
		return err
	}
	if n.eth0, err = n.space.nl.LinkByName("eth0"); err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := n.setRate(n.cfg.UpBitsPerSec, n.cfg.DownBitsPerSec); err != nil {
		return err
	}
	if err := quietUp(n.site.nl, n.port); err != nil {
		return err
	}
	if err := quietUp(n.space.nl, n.eth0); err != nil {
		return err
	}
	if err := n.address(); err != nil {
		return err
	}
	return n.awaitCarrier()
}

// carrierLimit is how long the kernel may take over a carrier. It handles many
// at once, and sometimes pauses for a second between two batches.
const carrierLimit = 10 * time.Second

// awaitCarrier returns when the cable carries. Up is only asked for: the kernel
// notices a carrier later, in a worker of its own, and until then silently drops
// what either end sends. TCP would try again after a second, multicast never.
func (n *Node) awaitCarrier() error {
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		near, err := carries(n.space.nl, n.eth0)
		if err != nil {
			return err
		}
		far, err := carries(n.site.nl, n.port)
		if err != nil {
			return err
		}
		if near && far {
			break
		}
		if time.Since(begin) > carrierLimit {
			return fmt.Errorf("the cable of %s has no carrier after %s", n.cfg.Name, carrierLimit)
		}
	}
	// The worker says so before it acts on it, but holds the kernel's link lock
	// until it has; a change that changes nothing waits for that lock.
	return quietUp(n.site.nl, n.port)
}

func carries(nl *netlink.Handle, link netlink.Link) (bool, error) {
	now, err := nl.LinkByIndex(link.Attrs().Index)
	if err != nil {
		return false, fmt.Errorf("look at %s: %w", link.Attrs().Name, err)
	}
	return now.Attrs().OperState == netlink.OperUp, nil
}

// layCable makes a pair of virtual Ethernet ends: one in the bridge, one in the
// node as eth0.
func (n *Node) layCable(br netlink.Link) (port netlink.Link, err error) {
	name := linkName("port")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.MTU = n.site.cfg.MTU
	attrs.MasterIndex = br.Attrs().Index
	veth := netlink.NewVeth(attrs)
	veth.PeerName = "eth0"
	veth.PeerMTU = uint32(n.site.cfg.MTU)
	veth.PeerHardwareAddr = net.HardwareAddr{0x02, 0x77, 0, 0, byte(n.number >> 8), byte(n.number)} // locally administered
	veth.PeerNamespace = netlink.NsFd(int(n.space.ns))
	if err := n.site.nl.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("make cable %s: %w", name, err)
	}
	return veth, nil
}

// address gives eth0 its addresses. Duplicate address detection is off: it would
// leave them useless for a second, and here nobody else can have them.
func (n *Node) address() error {
	for _, p := range []netip.Prefix{
		netip.PrefixFrom(n.Addr4(), 16),
		netip.PrefixFrom(n.Addr6(), 64),
		netip.PrefixFrom(n.linkLocal(), 64),
	} {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := n.space.nl.AddrAdd(n.eth0, a); err != nil {
			return fmt.Errorf("give eth0 the address %s: %w", p, err)
		}
	}
	// IPv6 has such a route by itself.
	multicast := &netlink.Route{LinkIndex: n.eth0.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: ipNet(netip.MustParsePrefix("224.0.0.0/4"))}
	if err := n.space.nl.RouteAdd(multicast); err != nil {
		return fmt.Errorf("route multicast to eth0: %w", err)
	}
	return nil
}

// quietUp brings a link up without an address of the kernel's choice, which
// would have to be waited for.
func quietUp(nl *netlink.Handle, link netlink.Link) error {
	const none = 1 // IN6_ADDR_GEN_MODE_NONE
	if err := nl.LinkSetIP6AddrGenMode(link, none); err != nil {
		return fmt.Errorf("turn off generated addresses of %s: %w", link.Attrs().Name, err)
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Start starts cmd on the node; the caller waits for it as usual. The command is
// killed with the node, unless its SysProcAttr.Pdeathsig says otherwise, and no
// later than by Site.Close, with all it started itself.
func (n *Node) Start(cmd *exec.Cmd) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("start %s on %s: the node is closed", cmd.Path, n.cfg.Name)
	}
	var err error
	if n.space != nil {
		err = n.space.start(cmd)
	} else if err = cmd.Start(); err == nil {
		n.started = append(n.started, cmd)
	}
	if err != nil {
		return fmt.Errorf("start %s on %s: %w", cmd.Path, n.cfg.Name, err)
	}
	return nil
}

// Do runs fn inside the node's network and returns its error. Sockets that fn
// makes belong to the node for good. Only fn's own goroutine is on the node: what
// it starts with go is not, nor is a dial that the net package spreads over
// several addresses; give literal addresses, or use Dial.
func (n *Node) Do(fn func() error) error {
	if n.space == nil {
		return fn()
	}
	return n.space.do(fn)
}

// Dial connects from the node. The address must be literal: there are no names.
func (n *Node) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	d := net.Dialer{}
	if n.space == nil {
		d.LocalAddr = &net.TCPAddr{IP: n.Addr4().AsSlice()}
	}
	err = n.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens on the node.
func (n *Node) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// SetLink pulls the node's cable (false) or plugs it back in (true) and returns
// when it carries. The node notices as a machine does: eth0 keeps its addresses
// and has no carrier.
func (n *Node) SetLink(up bool) error {
	if n.space == nil {
		return fmt.Errorf("set link of %s: %w", n.cfg.Name, ErrLoopback)
	}
	err := error(nil)
	if !up {
		err = n.site.nl.LinkSetDown(n.port)
	} else if err = n.site.nl.LinkSetUp(n.port); err == nil {
		err = n.awaitCarrier()
	}
	if err != nil {
		return fmt.Errorf("set link of %s: %w", n.cfg.Name, err)
	}
	return nil
}

// SetRate changes what the node can send and receive, bits per second on the
// wire; 0 means not shaped.
func (n *Node) SetRate(up, down int64) error {
	if n.space == nil {
		return fmt.Errorf("set rate of %s: %w", n.cfg.Name, ErrLoopback)
	}
	if err := n.setRate(up, down); err != nil {
		return fmt.Errorf("set rate of %s: %w", n.cfg.Name, err)
	}
	return nil
}

// setRate shapes each direction where it is sent: up leaves the node, down leaves
// the bridge.
func (n *Node) setRate(up, down int64) error {
	if err := shape(n.space.nl, n.eth0, up); err != nil {
		return err
	}
	return shape(n.site.nl, n.port, down)
}

// Counters returns the bytes that eth0 sent and received so far, with headers.
func (n *Node) Counters() (tx, rx uint64, err error) {
	if n.space == nil {
		return 0, 0, fmt.Errorf("count bytes of %s: %w", n.cfg.Name, ErrLoopback)
	}
	link, err := n.space.nl.LinkByIndex(n.eth0.Attrs().Index)
	if err != nil {
		return 0, 0, fmt.Errorf("count bytes of %s: %w", n.cfg.Name, err)
	}
	st := link.Attrs().Statistics
	if st == nil {
		return 0, 0, fmt.Errorf("count bytes of %s: the kernel gave no statistics", n.cfg.Name)
	}
	return st.TxBytes, st.RxBytes, nil
}

// tearDown kills what runs on the node and removes it. It also takes apart what
// plugIn left half done.
func (n *Node) tearDown() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil
	}
	n.closed = true
	for _, cmd := range n.started {
		_ = cmd.Process.Kill() // fails only if it has ended
	}
	if n.space == nil {
		return nil
	}
	errs := []error{n.space.killInside()}
	if n.port != nil {
		if err := n.site.nl.LinkDel(n.port); err != nil { // takes eth0 with it
			errs = append(errs, fmt.Errorf("remove cable of %s: %w", n.cfg.Name, err))
		}
	}
	n.space.close()
	return errors.Join(errs...)
}

// stallLimit is how long pour goes without a byte before it gives up.
const stallLimit = 30 * time.Second

// pour sends n zero bytes from out to in and returns bytes per second, from the
// first sent to the last received.
func pour(out, in net.Conn, n int64) (float64, error) {
	var sending sync.WaitGroup
	var sendErr error
	begin := time.Now()
	sending.Go(func() {
		buf := make([]byte, 256<<10)
		for left := n; left > 0 && sendErr == nil; {
			var k int
			out.SetWriteDeadline(time.Now().Add(stallLimit))
			k, sendErr = out.Write(buf[:min(left, int64(len(buf)))])
			left -= int64(k)
		}
		if sendErr == nil {
			sendErr = out.(*net.TCPConn).CloseWrite()
		}
	})
	var got int64
	var recvErr error
	buf := make([]byte, 256<<10)
	for recvErr == nil {
		var k int
		in.SetReadDeadline(time.Now().Add(stallLimit))
		k, recvErr = in.Read(buf)
		got += int64(k)
	}
	took := time.Since(begin)
	if recvErr != io.EOF {
		in.Close() // or the sender would wait on
	} else {
		recvErr = nil
	}
	sending.Wait()
	if err := errors.Join(sendErr, recvErr); err != nil {
		return 0, err
	}
	if got != n {
		return 0, fmt.Errorf("%d of %d bytes came through", got, n)
	}
	return float64(n) / took.Seconds(), nil
}
