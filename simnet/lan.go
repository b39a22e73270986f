package simnet

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// LANConfig of a LAN.
type LANConfig struct {
	// Latency of every path, one way.
	Latency time.Duration
	// Window is how many bytes of a connection may be under way or unread, in
	// each direction; 0 means 256 KiB. One connection carries at most a Window
	// per Latency.
	Window int
}

// A LAN is a switched network in memory. It lives in the time of its caller: in
// a testing/synctest bubble, where all goroutines of the LAN's users must then
// be, it takes no time but the bubble's.
//
// Each host has an uplink and a downlink, which its connections share fairly.
// Rates count payload bytes; headers weigh nothing. Nothing is lost or reordered
// on the way: what a cut or partition holds up arrives when it is over, as if
// TCP had sent it again, without TCP's pause before that.
//
// A LAN runs no goroutine. Everything that moves, moves in a caller or in the
// callback of a timer, and waits on nothing but sync.Cond, channels and timers.
type LAN struct {
	cfg LANConfig

	// mu guards everything below, and all hosts, links, streams and conns of this
	// LAN. It is never held while waiting: to synctest a goroutine that waits for a
	// mutex is busy, and fake time would stand still.
	mu      sync.Mutex
	closed  bool
	hosts   map[netip.Addr]*LANHost
	conns   map[*lanConn]struct{}
	stalled []*stream     // have something a cut or partition holds up
	changed chan struct{} // closed and replaced when reachability or announcements change
	notices []*notice     // see lan_notice.go
	spare   [][]byte      // segment buffers to use again
}

// NewLAN makes a LAN without hosts.
func NewLAN(cfg LANConfig) *LAN {
	if cfg.Window == 0 {
		cfg.Window = 256 << 10
	}
	return &LAN{
		cfg:     cfg,
		hosts:   make(map[netip.Addr]*LANHost),
		conns:   make(map[*lanConn]struct{}),
		changed: make(chan struct{}),
	}
}

// A LANHost is one machine on a LAN.
type LANHost struct {
	lan  *LAN
	addr netip.Addr

	// Guarded by lan.mu.
	up, down  link
	wire      delayLine
	cut       bool
	group     int // by Partition; hosts hear each other within a group
	listeners map[uint16]*lanListener
	lastPort  uint16
	sent, got int64
}

// Host adds a host with the given bandwidths in bytes per second; 0 is no limit.
// Asked again for the same address it returns the same host with new bandwidths.
func (l *LAN) Host(addr netip.Addr, up, down int64) *LANHost {
	addr = addr.Unmap()
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.hosts[addr]
	if h == nil {
		h = &LANHost{lan: l, addr: addr, listeners: make(map[uint16]*lanListener), lastPort: firstEphemeral - 1}
		h.up = link{lan: l, queue: upQueue, out: func(seg *segment, at time.Time) { h.sent += int64(len(seg.data)); h.wire.push(seg, at) }}
		h.wire = delayLine{lan: l}
		h.down = link{lan: l, queue: downQueue, out: (*segment).arrive}
		l.hosts[addr] = h
		l.wakeLocked()
	}
	h.up.rate, h.down.rate = up, down
	return h
}

// Addr of the host.
func (h *LANHost) Addr() netip.Addr { return h.addr }

// SetRate changes the bandwidths, in bytes per second; 0 is no limit.
func (h *LANHost) SetRate(up, down int64) {
	h.lan.mu.Lock()
	defer h.lan.mu.Unlock()
	h.up.rate, h.down.rate = up, down
}

// Counters returns the payload bytes the host sent and received so far. What it
// told itself does not count.
func (h *LANHost) Counters() (sent, received int64) {
	h.lan.mu.Lock()
	defer h.lan.mu.Unlock()
	return h.sent, h.got
}

// Cut pulls the host's cable: from now on nothing comes or goes, and nobody is
// told.
func (l *LAN) Cut(h *LANHost) { l.rewire(func() { h.cut = true }) }

// Restore plugs it back in.
func (l *LAN) Restore(h *LANHost) { l.rewire(func() { h.cut = false }) }

// Partition splits the LAN: hosts of different groups no longer hear each other.
// Hosts in no group form one more.
func (l *LAN) Partition(groups ...[]*LANHost) {
	l.rewire(func() {
		for _, h := range l.hosts {
			h.group = 0
		}
		for i, g := range groups {
			for _, h := range g {
				h.group = i + 1
			}
		}
	})
}

// Heal undoes Partition.
func (l *LAN) Heal() { l.Partition() }

func (l *LAN) rewire(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	now := time.Now()
	held := l.stalled
	l.stalled = nil
	for _, s := range held {
		s.stalled = false
		s.resume(now)
	}
	l.wakeLocked()
}

// reachable says whether what a sends now comes to b. A host always hears itself.
func reachable(a, b *LANHost) bool {
	return a == b || !a.cut && !b.cut && a.group == b.group
}

// wakeLocked wakes those who wait for the LAN to change.
func (l *LAN) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Close ends all connections and listeners, stops all timers, and lets nothing
// new begin.
func (l *LAN) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	for c := range l.conns {
		c.vanish()
	}
	for _, h := range l.hosts {
		for _, ln := range h.listeners {
			ln.shut()
		}
		h.up.stop()
		h.down.stop()
		h.wire.stop()
	}
	l.notices, l.stalled, l.spare = nil, nil, nil
	l.wakeLocked()
	return nil
}

// String helps in failing tests.
func (h *LANHost) String() string { return fmt.Sprintf("host %s", h.addr) }

// buffer returns a buffer of n bytes, n at most maxSegment.
func (l *LAN) buffer(n int) []byte {
	if n <= maxSegment/8 || len(l.spare) == 0 {
		if n > maxSegment/8 {
			return make([]byte, maxSegment)[:n]
		}
		return make([]byte, n)
	}
	last := len(l.spare) - 1
	b := l.spare[last]
	l.spare = l.spare[:last]
	return b[:n]
}

// recycle takes a buffer back. Large ones only, and not without end.
func (l *LAN) recycle(b []byte) {
	if cap(b) == maxSegment && len(l.spare) < 256 {
		l.spare = append(l.spare, b[:0])
	}
}

// remove takes the first occurrence of v out of s.
func remove[T comparable](s []T, v T) []T {
	if i := slices.Index(s, v); i >= 0 {
		return slices.Delete(s, i, i+1)
	}
	return s
}
