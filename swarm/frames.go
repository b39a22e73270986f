package swarm

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"
)

// handshakeBytes is the size of the handshake that opens a BitTorrent stream (BEP 3).
const handshakeBytes = 68

// frames follows where the messages of a BitTorrent stream begin: after the
// handshake each has a length of 4 bytes and as many bytes.
type frames struct {
	left int64 // bytes of the present message that are still to come
	head [4]byte
	got  int // bytes of the next message's length that are here
}

func newFrames() frames { return frames{left: handshakeBytes} }

// between says that the last message is whole and the next one has not begun.
func (f *frames) between() bool { return f.left == 0 && f.got == 0 }

// toNext is how many bytes may be read without reading past the end of the present message, or of its length.
func (f *frames) toNext() int64 {
	if f.left > 0 {
		return f.left
	}
	return int64(len(f.head) - f.got)
}

func (f *frames) passed(b []byte) {
	for len(b) > 0 {
		if f.left > 0 {
			n := min(f.left, int64(len(b)))
			f.left -= n
			b = b[n:]
			continue
		}
		n := copy(f.head[f.got:], b)
		f.got += n
		b = b[n:]
		if f.got == len(f.head) {
			f.left, f.got = int64(binary.BigEndian.Uint32(f.head[:])), 0
		}
	}
}

// inlet lets this device put a message of its own among those that the engine
// reads from a peer. There is no other way to hand the engine a request late, or
// to make it ask for more before its queue is empty.
type inlet struct {
	conn net.Conn
	at   frames // only Read uses it

	mu       sync.Mutex
	waiting  []byte    // whole messages, to be read at the next boundary
	deadline time.Time // what the engine asked for
	woken    bool      // the deadline was moved to end a Read that waits
}

func newInlet(c net.Conn) *inlet { return &inlet{conn: c, at: newFrames()} }

// put makes Read return the message as soon as no other one is under way. It does not block.
func (in *inlet) put(message []byte) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.waiting = append(in.waiting, message...)
	if !in.woken {
		in.woken = true
		_ = in.conn.SetReadDeadline(longAgo)
	}
}

var longAgo = time.Unix(1, 0)

func (in *inlet) setReadDeadline(t time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.deadline = t
	if !in.woken {
		_ = in.conn.SetReadDeadline(t)
	}
}

// Read reads from the peer, or what was put.
func (in *inlet) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		n, most := in.take(b)
		if n > 0 {
			return n, nil
		}
		n, err := in.conn.Read(b[:most])
		in.at.passed(b[:n])
		if n == 0 && in.onlyWoken(err) {
			continue
		}
		if n > 0 && in.onlyWoken(err) {
			err = nil
		}
		return n, err
	}
}

// take returns what was put, or else how many bytes may be read from the peer: with
// something waiting no more than up to the next boundary.
func (in *inlet) take(b []byte) (n, most int) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.waiting) == 0 {
		return 0, len(b)
	}
	if !in.at.between() {
		in.restLocked() // the peer's bytes come first
		return 0, int(min(int64(len(b)), in.at.toNext()))
	}
	n = copy(b, in.waiting)
	in.waiting = in.waiting[n:]
	if len(in.waiting) == 0 {
		in.waiting = nil
		in.restLocked()
	}
	return n, 0
}

// restLocked puts the engine's own deadline back.
func (in *inlet) restLocked() {
	if in.woken {
		in.woken = false
		_ = in.conn.SetReadDeadline(in.deadline)
	}
}

// onlyWoken says that a Read ended only because something was put.
func (in *inlet) onlyWoken(err error) bool {
	var late net.Error
	if err == nil || !errors.As(err, &late) || !late.Timeout() {
		return false
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if !in.woken && len(in.waiting) == 0 {
		return false
	}
	in.restLocked()
	return true
}
