package simnet

import (
	"time"
)

// The way of a segment: out of the sending host over its uplink, along the wire
// for the latency, over the downlink of the receiving host, into the stream.
//
//	Write -> [up: fair queue, rate] -> [wire: latency] -> [down: fair queue, rate] -> Read
//
// Each stage is handed the moment at which the segment reached it, and reckons
// from that, not from when its timer got to run. In real time timers are late;
// reckoned this way lateness shifts single segments and does not add up.

// maxSegment is how much moves in one piece: small enough that connections
// sharing a link take turns, large enough to be cheap.
const maxSegment = 16 << 10

// segment is a piece of a stream, or its end.
type segment struct {
	s    *stream
	kind segmentKind
	data []byte
	off  int // how much of it has been read
}

type segmentKind uint8

const (
	segData segmentKind = iota
	segFin              // the sender will send no more
	segRst              // the sender has dropped the connection
)

// fifo is a queue that keeps its memory.
type fifo[T any] struct {
	items []T
	head  int
}

func (q *fifo[T]) len() int { return len(q.items) - q.head }

func (q *fifo[T]) push(v T) { q.items = append(q.items, v) }

func (q *fifo[T]) first() *T { return &q.items[q.head] }

func (q *fifo[T]) pop() T {
	var none T
	v := q.items[q.head]
	q.items[q.head] = none
	q.head++
	switch {
	case q.head == len(q.items):
		q.items, q.head = q.items[:0], 0
	case q.head >= 64 && q.head*2 >= len(q.items):
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	return v
}

// A stream has one queue per link it crosses.
const (
	upQueue = iota
	downQueue
)

// link sends segments one after the other at its rate. Streams that have some
// waiting take turns.
type link struct {
	lan   *LAN
	rate  int64 // bytes per second, 0 is no limit
	queue int   // which queue of a stream is this link's
	out   func(seg *segment, at time.Time)

	turn  fifo[*stream] // streams with something in their queue, each once
	busy  *segment      // is being sent
	free  time.Time     // when that has been sent
	timer *time.Timer
}

func (k *link) push(seg *segment, at time.Time) {
	s := seg.s
	idle := k.busy == nil && k.turn.len() == 0 && s.queues[k.queue].len() == 0
	if idle && k.rate == 0 && !(k.queue == upQueue && s.blocked()) {
		k.out(seg, at) // the queue would do the same, slower
		return
	}
	s.queues[k.queue].push(seg)
	k.join(s, at)
}

// join gives a stream with something to send its place in the order of turns.
func (k *link) join(s *stream, at time.Time) {
	if s.waits[k.queue] || s.queues[k.queue].len() == 0 {
		return
	}
	s.waits[k.queue] = true
	k.turn.push(s)
	if k.busy == nil {
		k.begin(at)
		k.run()
	}
}

// begin takes up the next segment at the given moment, or none.
func (k *link) begin(at time.Time) {
	k.busy = nil
	for k.turn.len() > 0 {
		s := k.turn.pop()
		s.waits[k.queue] = false
		if s.queues[k.queue].len() == 0 {
			continue // it was reset meanwhile
		}
		if k.queue == upQueue && s.blocked() {
			s.stall()
			continue
		}
		seg := s.queues[k.queue].pop()
		if s.queues[k.queue].len() > 0 {
			s.waits[k.queue] = true
			k.turn.push(s)
		}
		if at.Before(k.free) {
			at = k.free
		}
		k.busy, k.free = seg, at.Add(k.duration(len(seg.data)))
		return
	}
}

func (k *link) duration(n int) time.Duration {
	if k.rate == 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(k.rate) * float64(time.Second))
}

// run sends on what is through by now and sets the timer for what is not.
func (k *link) run() {
	now := time.Now()
	for k.busy != nil && !k.free.After(now) {
		seg, at := k.busy, k.free
		k.begin(at)
		k.out(seg, at)
	}
	if k.busy == nil {
		return
	}
	if k.timer == nil {
		k.timer = time.AfterFunc(k.free.Sub(now), func() {
			k.lan.mu.Lock()
			defer k.lan.mu.Unlock()
			if !k.lan.closed {
				k.run()
			}
		})
		return
	}
	k.timer.Reset(k.free.Sub(now))
}

func (k *link) stop() {
	if k.timer != nil {
		k.timer.Stop()
	}
	k.busy, k.turn = nil, fifo[*stream]{}
}

// delayLine hands segments to the receiver's downlink after the latency.
type delayLine struct {
	lan   *LAN
	line  fifo[delayed]
	timer *time.Timer
}

type delayed struct {
	seg *segment
	due time.Time
}

func (d *delayLine) push(seg *segment, at time.Time) {
	if d.lan.cfg.Latency == 0 {
		seg.s.to.down.push(seg, at)
		return
	}
	d.line.push(delayed{seg, at.Add(d.lan.cfg.Latency)})
	if d.line.len() == 1 {
		d.run()
	}
}

func (d *delayLine) run() {
	now := time.Now()
	for d.line.len() > 0 && !d.line.first().due.After(now) {
		e := d.line.pop()
		e.seg.s.to.down.push(e.seg, e.due)
	}
	if d.line.len() == 0 {
		return
	}
	wait := d.line.first().due.Sub(now)
	if d.timer == nil {
		d.timer = time.AfterFunc(wait, func() {
			d.lan.mu.Lock()
			defer d.lan.mu.Unlock()
			if !d.lan.closed {
				d.run()
			}
		})
		return
	}
	d.timer.Reset(wait)
}

func (d *delayLine) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
	d.line = fifo[delayed]{}
}
