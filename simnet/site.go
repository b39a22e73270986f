package simnet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
)

// ErrLoopback is returned by what a loopback site cannot do: it has no links.
var ErrLoopback = errors.New("a loopback site has no links of its own")

// maxNodes is a little less than the kernel's limit of 1024 ports on a bridge.
const maxNodes = 1000

// SiteConfig of a Site.
type SiteConfig struct {
	// MTU of all links in bytes; 0 means 1500.
	MTU int
}

// NodeConfig of a Node. The rates are bits per second on the wire, see
// Site.Goodput for what TCP makes of them; 0 means not shaped.
type NodeConfig struct {
	Name         string // for people; empty means "node1", "node2", ...
	UpBitsPerSec int64  // what the node can send

	DownBitsPerSec int64 // what the node can receive
}

// A Site is one broadcast domain: nodes with one cable each to a bridge.
// Its methods may be called from any goroutine.
type Site struct {
	cfg      SiteConfig
	isolated bool
	nl       *netlink.Handle // the namespace of the bridges

	mu      sync.Mutex
	closed  bool
	bridges []*netlink.Bridge // the first is the site's, the others exist for Partition
	nodes   []*Node
}

// NewSite makes an empty site. Enter must have been called: a site is never made
// in the machine's own network.
func NewSite(cfg SiteConfig) (*Site, error) {
	entered.Lock()
	inside := entered.yes
	entered.Unlock()
	if !inside {
		return nil, errors.New("make site: simnet.Enter was not called, this is the machine's own network")
	}
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	if cfg.MTU < 1280 || cfg.MTU > 65535 { // RFC 8200, section 5
		return nil, fmt.Errorf("make site: MTU %d is not within 1280 and 65535", cfg.MTU)
	}
	nl, err := netlink.NewHandle()
	if err != nil {
		return nil, fmt.Errorf("make site: open netlink: %w", err)
	}
	s := &Site{cfg: cfg, isolated: true, nl: nl}
	if _, err := s.bridge(0); err != nil {
		nl.Close()
		return nil, fmt.Errorf("make site: %w", err)
	}
	return s, nil
}

// Isolated says whether nodes have networks of their own. On a loopback site
// they share the machine's.
func (s *Site) Isolated() bool { return s.isolated }

// Shaped says whether the rates of NodeConfig are kept.
func (s *Site) Shaped() bool { return s.isolated }

// bridge returns the i-th bridge and makes it if there is none yet.
func (s *Site) bridge(i int) (*netlink.Bridge, error) {
	for len(s.bridges) <= i {
		name := linkName("site")
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		attrs.MTU = s.cfg.MTU
		// Snooping would learn who wants which multicast group, and forget. A site
		// stands for the simple switch that floods.
		snooping := false
		br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
		if err := s.nl.LinkAdd(br); err != nil {
			return nil, fmt.Errorf("make bridge %s: %w", name, err)
		}
		s.bridges = append(s.bridges, br)
		if err := quietUp(s.nl, br); err != nil {
			return nil, err
		}
	}
	return s.bridges[i], nil
}

// AddNode plugs in a node and returns when its addresses work.
func (s *Site) AddNode(cfg NodeConfig) (*Node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := len(s.nodes) + 1
	if cfg.Name == "" {
		cfg.Name = fmt.Sprintf("node%d", i)
	}
	n := &Node{site: s, cfg: cfg, number: i}
	if s.closed {
		return nil, fmt.Errorf("add node %s: site is closed", cfg.Name)
	}
	if i > maxNodes {
		return nil, fmt.Errorf("add node %s: a site has at most %d nodes", cfg.Name, maxNodes)
	}
	if s.isolated {
		if err := n.plugIn(); err != nil {
			n.tearDown()
			return nil, fmt.Errorf("add node %s: %w", cfg.Name, err)
		}
	}
	s.nodes = append(s.nodes, n)
	return n, nil
}

// Nodes lists all nodes in the order they were added.
func (s *Site) Nodes() []*Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*Node(nil), s.nodes...)
}

// Partition splits the site: nodes of different groups no longer hear each other,
// though all keep their link. Nodes in no group form one more.
func (s *Site) Partition(groups ...[]*Node) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isolated {
		return fmt.Errorf("partition site: %w", ErrLoopback)
	}
	at := make(map[*Node]int)
	for i, g := range groups {
		for _, n := range g {
			at[n] = i + 1
		}
	}
	for _, n := range s.nodes {
		br, err := s.bridge(at[n])
		if err != nil {
			return fmt.Errorf("partition site: %w", err)
		}
		if err := s.nl.LinkSetMaster(n.port, br); err != nil {
			return fmt.Errorf("partition site: move %s to %s: %w", n.cfg.Name, br.Name, err)
		}
	}
	return nil
}

// Heal undoes Partition.
func (s *Site) Heal() error { return s.Partition() }

// Goodput moves n bytes over one TCP connection between two nodes and returns
// the payload bytes per second: the bound for anything that runs on TCP.
func (s *Site) Goodput(from, to *Node, n int64) (float64, error) {
	l, err := to.Listen("tcp", netip.AddrPortFrom(to.Addr4(), 0).String())
	if err != nil {
		return 0, fmt.Errorf("measure goodput: %w", err)
	}
	defer l.Close()
	out, err := from.Dial(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		return 0, fmt.Errorf("measure goodput: %w", err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		return 0, fmt.Errorf("measure goodput: %w", err)
	}
	defer in.Close()
	rate, err := pour(out, in, n)
	if err != nil {
		return 0, fmt.Errorf("measure goodput from %s to %s: %w", from.cfg.Name, to.cfg.Name, err)
	}
	return rate, nil
}

// Close kills what was started on its nodes and takes the site apart.
func (s *Site) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	var errs []error
	for _, n := range s.nodes {
		errs = append(errs, n.tearDown())
	}
	for _, br := range s.bridges {
		if err := s.nl.LinkDel(br); err != nil {
			errs = append(errs, fmt.Errorf("remove bridge %s: %w", br.Name, err))
		}
	}
	if s.nl != nil {
		s.nl.Close()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close site: %w", err)
	}
	return nil
}

// NewLoopbackSite makes a site on a machine that allows no namespaces: its nodes
// are plain processes on addresses of 127.77.0.0/16, told apart by nothing else.
// No link can be shaped, pulled or counted, there is no IPv6, and a node hears
// all that this machine says to itself. Isolated and Shaped say false.
func NewLoopbackSite() *Site { return &Site{} }

// links counts the names given to links. All sites of a process share one
// namespace, and nobody else is in it.
var links atomic.Int64

func linkName(prefix string) string { return fmt.Sprintf("%s%d", prefix, links.Add(1)) }
