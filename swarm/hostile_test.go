package swarm

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"
)

// handshake is what an admitted device sends first, for the image's infohash.
func handshake(p picture) []byte {
	short := infohashOf(geometryOf(p.img))
	out := append([]byte{19}, "BitTorrent protocol"...)
	out = append(out, 0, 0, 0, 0, 0, 0x10, 0, 0x04)
	out = append(out, short[:]...)
	return append(out, "-XX0000-abcdefghijkl"...)
}

func message(id byte, body ...byte) []byte {
	out := binary.BigEndian.AppendUint32(nil, uint32(1+len(body)))
	return append(append(out, id), body...)
}

func numbers(n ...uint32) (out []byte) {
	for _, v := range n {
		out = binary.BigEndian.AppendUint32(out, v)
	}
	return out
}

// hostile is byte streams that a member of the site might send.
func hostile(p picture) map[string][]byte {
	hello := handshake(p)
	root := p.img.Pieces.Root
	after := func(m ...[]byte) []byte { return append(bytes.Clone(hello), bytes.Join(m, nil)...) }
	unchokeAndAsk := after(message(15), message(2))
	for i := range uint32(3000) {
		unchokeAndAsk = append(unchokeAndAsk, message(6, numbers(i%16, 0, 64<<10)...)...)
	}
	return map[string][]byte{
		"nothing":                   {},
		"noise":                     bytes.Repeat([]byte{0x13, 0xff, 0, 7}, 5000),
		"half a handshake":          hello[:30],
		"unknown infohash":          append(bytes.Clone(hello[:28]), bytes.Repeat([]byte{9}, 40)...),
		"huge message":              after(numbers(0xffffffff), make([]byte, 1000)),
		"long bitfield":             after(message(5, bytes.Repeat([]byte{0xff}, 100000)...)),
		"have out of range":         after(message(4, numbers(0xfffffff0)...)),
		"piece out of range":        after(message(7, append(numbers(0xfffffff0, 0), make([]byte, 100)...)...)),
		"piece unasked":             after(message(14), message(7, append(numbers(0, 0), make([]byte, 64<<10)...)...)),
		"request out of range":      after(message(15), message(2), message(6, numbers(0xffffffff, 0xffffffff, 0xffffffff)...)),
		"empty request":             after(message(15), message(2), message(6, numbers(0, 0, 0)...)),
		"reject unasked":            after(message(14), message(16, numbers(0, 0, 64<<10)...)),
		"cancel unasked":            after(message(14), message(8, numbers(0xffffffff, 0, 1)...)),
		"allowed fast everywhere":   after(message(17, numbers(1, 2, 3)...), message(17, numbers(0xffffffff)...)),
		"broken extended":           after(message(20, append([]byte{0}, "d1:md11:ut_metadatai99999999999999999999e"...)...)),
		"negative reqq":             after(message(20, append([]byte{0}, "d4:reqqi-1ee"...)...)),
		"metadata size":             after(message(20, append([]byte{0}, "d13:metadata_sizei1099511627776ee"...)...)),
		"metadata request":          after(message(20, append([]byte{1}, "d8:msg_typei0e5:piecei0ee"...)...)),
		"hash request":              after(message(21, append(bytes.Clone(root[:]), numbers(0, 0xffffffff, 8192, 0)...)...)),
		"hashes unasked":            after(message(22, append(bytes.Clone(root[:]), numbers(0, 0, 2, 0)...)...)),
		"port":                      after(message(9, 0, 0)),
		"unknown type":              after(message(99, 1, 2, 3)),
		"requests nobody reads":     unchokeAndAsk,
		"claims all, gives nothing": after(message(14), message(1)),
	}
}

func TestHostileStreamsNeitherCrashNorStop(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 1<<20, 64<<10, 30)
	source := w.add("source", "")
	w.seed(source, p)
	d := w.add("fetcher", "", upLimit(8<<20))
	evil := w.lan.join("evil")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var conns []net.Conn
	for name, stream := range hostile(p) {
		for _, target := range []string{"source", "fetcher"} {
			c, err := evil.Dial(ctx, target)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			conns = append(conns, c)
			go c.Write(stream)
		}
	}
	d.start(p.img, p.table)
	w.allHave(p, d)
	for _, c := range conns {
		c.Close()
	}
	late := w.add("late", "")
	late.start(p.img, p.table)
	w.allHave(p, late)
}

// What no device of ours sends ends the connection: the engine would answer some
// of it at length and queue the answers without bound.
func TestForeignMessagesEndTheConnection(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	p := newPicture(t, 1<<20, 64<<10, 31)
	source := w.add("source", "")
	w.seed(source, p)
	w.until("it is offered", func() bool { return len(source.Holdings()) == 1 })
	evil := w.lan.join("evil")
	streams := hostile(p)
	for _, name := range []string{"metadata request", "hash request", "hashes unasked", "port", "unknown type", "huge message"} {
		c, err := evil.Dial(context.Background(), "source")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(streams[name]); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		c.Close()
	}
}

// A peer that asks and asks and never reads is cut off before its answers fill the memory.
func TestAPeerThatNeverReadsIsCutOff(t *testing.T) {
	t.Parallel()
	l := newLAN()
	a, b := newPipe(l.join("a"), l.join("b"))
	addr := &peerAddr{id: "b", ip: ipOf("b"), port: 1}
	closed := make(chan struct{})
	c := newPeerConn(a, addr, nil, nil, func(*peerConn) { close(closed) })
	writing := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, 4*pipeBuffer))
		writing <- err
	}()
	go func() {
		buf := make([]byte, 64<<10)
		for {
			if _, err := b.Write(buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 64<<10)
	var read int64
	for {
		n, err := c.Read(buf)
		read += int64(n)
		if err != nil {
			break
		}
		if read > 4*maxUnanswered {
			t.Fatal("still reading")
		}
	}
	<-closed
	if err := <-writing; err == nil {
		t.Error("the write ended without an error")
	}
}

func TestSyntheticAddressesAreUniqueLocalAndSteady(t *testing.T) {
	t.Parallel()
	a, b := ipOf("12D3KooWa"), ipOf("12D3KooWb")
	if a == b || a != ipOf("12D3KooWa") || !a.IsPrivate() || !a.Is6() {
		t.Errorf("%v %v", a, b)
	}
}
