package swarm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// FuzzInlet lets a peer send messages of any length in any cuts, puts messages of
// our own at any moment, and reads all of it in bites of any size: the peer's bytes
// come out unchanged, and ours only between two of its messages.
func FuzzInlet(f *testing.F) {
	f.Add([]byte{0, 3, 250, 7}, []byte{1, 9, 200}, uint8(3))
	f.Add([]byte{}, []byte{255, 255}, uint8(0))
	f.Add(bytes.Repeat([]byte{1}, 40), []byte{5, 0, 5}, uint8(255))
	f.Fuzz(func(t *testing.T, lengths, cuts []byte, bite uint8) {
		if len(lengths) > 200 {
			return
		}
		sent := bytes.Repeat([]byte{0xaa}, handshakeBytes)
		for _, n := range lengths {
			sent = binary.BigEndian.AppendUint32(sent, uint32(n))
			sent = append(sent, bytes.Repeat([]byte{0xaa}, int(n))...)
		}
		ours := append(binary.BigEndian.AppendUint32(nil, 2), 0xbb, 0xbb)
		far, near := net.Pipe()
		in := newInlet(near)
		puts := 0
		go func() {
			rest := sent
			for i := 0; len(rest) > 0; i++ {
				n := len(rest)
				if len(cuts) > 0 {
					n = min(n, 1+int(cuts[i%len(cuts)]))
				}
				if _, err := far.Write(rest[:n]); err != nil {
					return
				}
				rest = rest[n:]
			}
			far.Close()
		}()
		var got []byte
		buf := make([]byte, 1+int(bite))
		for i := 0; ; i++ {
			if i%3 == 0 && puts < 20 {
				in.put(ours)
				puts++
			}
			n, err := in.Read(buf)
			got = append(got, buf[:n]...)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		theirs, mine := part(t, got)
		if !bytes.Equal(theirs, sent) {
			t.Errorf("the peer sent %d bytes, %d came out, or others", len(sent), len(theirs))
		}
		if mine > puts {
			t.Errorf("%d messages were put and %d came out", puts, mine)
		}
	})
}

// part takes a stream apart into the peer's bytes and the number of our messages.
func part(t *testing.T, stream []byte) (theirs []byte, ours int) {
	if len(stream) < handshakeBytes {
		return stream, 0
	}
	theirs, rest := stream[:handshakeBytes:handshakeBytes], stream[handshakeBytes:]
	for len(rest) >= 4 {
		n := 4 + int(binary.BigEndian.Uint32(rest))
		if n > len(rest) {
			t.Fatalf("a message of %d bytes with %d left", n, len(rest))
		}
		if n == 6 && rest[4] == 0xbb {
			ours++
		} else {
			if bytes.IndexByte(rest[:n], 0xbb) >= 4 {
				t.Fatal("one of ours inside one of theirs")
			}
			theirs = append(theirs, rest[:n]...)
		}
		rest = rest[n:]
	}
	return theirs, ours
}

// A Read that waits for a silent peer returns what is put, and the engine's own deadline still holds after it.
func TestWhatIsPutWakesAReadThatWaits(t *testing.T) {
	t.Parallel()
	l := newLAN()
	near, far := newPipe(l.join("a"), l.join("b"))
	in := newInlet(near)
	if _, err := far.Write(make([]byte, handshakeBytes)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := in.Read(buf); n != handshakeBytes || err != nil {
		t.Fatal(n, err)
	}
	read := make(chan []byte)
	go func() {
		n, err := in.Read(buf)
		if err != nil {
			t.Error(err)
		}
		read <- buf[:n]
	}()
	in.put([]byte{0, 0, 0, 1, 13})
	if got := <-read; !bytes.Equal(got, []byte{0, 0, 0, 1, 13}) {
		t.Errorf("read %x", got)
	}
	in.setReadDeadline(time.Now().Add(-time.Second))
	if _, err := in.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	in.put([]byte{0, 0, 0, 0})
	if n, err := in.Read(buf); n != 4 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if _, err := in.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the deadline was forgotten: %v", err)
	}
}
