package swarm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// asker is a device that speaks the protocol by hand.
type asker struct {
	t *testing.T
	net.Conn
}

func (w *town) asker(t *testing.T, p picture, to string) asker {
	t.Helper()
	c, err := w.lan.join("asker").Dial(context.Background(), to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a := asker{t, c}
	a.say(handshake(p), message(15), message(2)) // has nothing, is interested
	hello := make([]byte, handshakeBytes)
	if _, err := io.ReadFull(c, hello); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a asker) say(m ...[]byte) {
	a.t.Helper()
	if _, err := a.Write(bytes.Join(m, nil)); err != nil {
		a.t.Fatal(err)
	}
}

// hear reads messages until one of this kind comes.
func (a asker) hear(kind byte) []byte {
	a.t.Helper()
	a.SetReadDeadline(time.Now().Add(time.Minute))
	for {
		var size [4]byte
		if _, err := io.ReadFull(a, size[:]); err != nil {
			a.t.Fatalf("waiting for message %d: %v", kind, err)
		}
		body := make([]byte, binary.BigEndian.Uint32(size[:]))
		if _, err := io.ReadFull(a, body); err != nil {
			a.t.Fatal(err)
		}
		if len(body) > 0 && body[0] == kind {
			return body[1:]
		}
	}
}

// A device that has nothing yet is asked for a piece, and answers when it has it; what is taken back is not answered
// but refused (BEP 6).
func TestARequestStandsUntilThePieceIsThere(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 1<<20, 64<<10, 40)
	d := w.add("relay", "")
	d.start(p.img, p.table)
	w.until("it says where it stands", func() bool { return len(d.Holdings()) == 1 })
	a := w.asker(t, p, "relay")
	a.hear(1) // unchoked
	a.say(message(6, numbers(3, 0, 64<<10)...), message(6, numbers(5, 0, 64<<10)...), message(8, numbers(5, 0, 64<<10)...))
	source := w.add("source", "")
	w.seed(source, p)
	w.allHave(p, d)
	if refused := a.hear(16); !bytes.Equal(refused, numbers(5, 0, 64<<10)) {
		t.Errorf("refused was %x", refused)
	}
	piece := a.hear(7)
	if at := binary.BigEndian.Uint32(piece); at != 3 || !bytes.Equal(piece[8:], p.data[3*64<<10:4*64<<10]) {
		t.Errorf("the answer is for piece %d", at)
	}
	// The relay is whole now.
	a.say(message(6, numbers(9, 0, 64<<10)...))
	if at := binary.BigEndian.Uint32(a.hear(7)); at != 9 {
		t.Errorf("the answer is for piece %d", at)
	}
}

// Who lets more requests stand than any device of ours makes is cut off.
func TestTooManyStandingRequestsEndTheConnection(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 16<<20, 64<<10, 41)
	d := w.add("relay", "")
	d.start(p.img, p.table)
	w.until("it says where it stands", func() bool { return len(d.Holdings()) == 1 })
	a := w.asker(t, p, "relay")
	a.hear(1)
	for i := range uint32(maxStanding + 1) {
		a.say(message(6, numbers(i, 0, 64<<10)...))
	}
	a.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(io.Discard, a); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("the connection did not end: %v", err)
	}
}
