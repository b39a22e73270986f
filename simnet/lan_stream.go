package simnet

import (
	"sync"
	"time"
)

// stream is one direction of a connection. Guarded by lan.mu.
type stream struct {
	lan      *LAN
	from, to *LANHost
	reader   *lanConn
	writer   *lanConn

	// cond is told of everything a reader or writer of this stream may wait for.
	cond *sync.Cond

	queues      [2]fifo[*segment] // waiting for a link, by link
	waits       [2]bool           // in that link's order of turns
	held        fifo[*segment]    // arrived while the path was cut
	stalled     bool              // in lan.stalled
	outstanding int               // written and not yet read; at most the window

	arrived fifo[*segment] // to be read
	unread  int            // bytes in arrived
	ended   bool           // the writer's end has arrived, behind arrived
	finSent bool           // nothing can be written any more
	deaf    bool           // nobody will read any more
}

func newStream(from, to *LANHost) *stream {
	return &stream{lan: from.lan, from: from, to: to, cond: sync.NewCond(&from.lan.mu)}
}

// send puts a segment on its way.
func (s *stream) send(kind segmentKind, data []byte) {
	seg := &segment{s: s, kind: kind, data: data}
	now := time.Now()
	if s.from == s.to { // a host talking to itself needs no cable
		seg.arrive(now)
		return
	}
	s.from.up.push(seg, now)
}

// blocked says whether the path is cut.
func (s *stream) blocked() bool { return !reachable(s.from, s.to) }

// stall notes that the stream has something to go on with when the LAN is rewired.
func (s *stream) stall() {
	if !s.stalled {
		s.stalled = true
		s.lan.stalled = append(s.lan.stalled, s)
	}
}

// resume goes on after the LAN was rewired, if it can.
func (s *stream) resume(now time.Time) {
	if s.blocked() {
		s.stall()
		return
	}
	for s.held.len() > 0 {
		s.held.pop().take()
	}
	s.from.up.join(s, now)
}

// arrive is the end of a segment's way.
func (seg *segment) arrive(time.Time) {
	s := seg.s
	if s.blocked() || s.held.len() > 0 {
		s.held.push(seg)
		s.stall()
		return
	}
	seg.take()
}

// take does what the segment came for.
func (seg *segment) take() {
	s := seg.s
	defer s.cond.Broadcast()
	switch seg.kind {
	case segData:
		if s.from != s.to {
			s.to.got += int64(len(seg.data))
		}
		if s.deaf {
			s.outstanding -= len(seg.data)
			s.lan.recycle(seg.data)
			// As TCP does: data for nobody is answered with a reset, RFC 9293, 3.10.7.1.
			// But nobody answers a reset.
			if !s.reader.reset {
				s.reader.abort()
			}
			return
		}
		s.arrived.push(seg)
		s.unread += len(seg.data)
	case segFin:
		s.ended = true
	case segRst:
		s.reader.wasReset()
	}
}

// discard forgets what has not left the host yet.
func (s *stream) discard() {
	q := &s.queues[upQueue]
	for q.len() > 0 {
		seg := q.pop()
		s.outstanding -= len(seg.data)
		s.lan.recycle(seg.data)
	}
}

// read moves what has arrived into p.
func (s *stream) read(p []byte) (n int) {
	for n < len(p) && s.arrived.len() > 0 {
		seg := *s.arrived.first()
		k := copy(p[n:], seg.data[seg.off:])
		n += k
		if seg.off += k; seg.off == len(seg.data) {
			s.arrived.pop()
			s.lan.recycle(seg.data)
		}
	}
	s.unread -= n
	s.outstanding -= n
	if n > 0 {
		s.cond.Broadcast()
	}
	return n
}

// drop forgets what has arrived; nobody reads it any more.
func (s *stream) drop() {
	s.deaf = true
	for s.arrived.len() > 0 {
		s.lan.recycle(s.arrived.pop().data)
	}
	s.outstanding -= s.unread
	s.unread = 0
}

// room is how many of n bytes may be written now. Not a few at a time: a writer
// waits until a good piece fits, RFC 9293, 3.8.6.2.1.
func (s *stream) room(n int) int {
	free := s.lan.cfg.Window - s.outstanding
	if free < min(n, maxSegment, max(s.lan.cfg.Window/2, 1)) {
		return 0
	}
	return min(n, maxSegment, free)
}
