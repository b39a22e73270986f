package simnet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

var (
	addrA = netip.MustParseAddr("10.0.0.1")
	addrB = netip.MustParseAddr("10.0.0.2")
	addrC = netip.MustParseAddr("10.0.0.3")
)

// A network under test: where to listen, and how.
type testNet struct {
	dial   func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	listen func(at netip.AddrPort) (net.Listener, error)
	at     netip.Addr // where listen listens
}

// The conns of a LAN pass the same tests as those of the kernel.
func TestConnsBehaveLikeTCP(t *testing.T) {
	nets := map[string]func(t *testing.T) testNet{
		"kernel": func(t *testing.T) testNet {
			var d net.Dialer
			return testNet{
				dial: func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
					return d.DialContext(ctx, "tcp", to.String())
				},
				listen: func(at netip.AddrPort) (net.Listener, error) { return net.Listen("tcp", at.String()) },
				at:     netip.MustParseAddr("127.0.0.1"),
			}
		},
		"lan": func(t *testing.T) testNet { return lanForTest(t, LANConfig{}, 0) },
		"slow lan": func(t *testing.T) testNet {
			return lanForTest(t, LANConfig{Latency: time.Millisecond, Window: 100 << 10}, 64<<20)
		},
		"own host": func(t *testing.T) testNet {
			l := NewLAN(LANConfig{Latency: time.Hour}) // which must not matter
			t.Cleanup(func() { l.Close() })
			h := l.Host(addrA, 1, 1)
			return testNet{dial: h.Dial, listen: h.Listen, at: addrA}
		},
	}
	for name, make := range nets {
		t.Run(name, func(t *testing.T) {
			for _, story := range tcpStories {
				t.Run(story.name, func(t *testing.T) { story.tell(t, make(t)) })
			}
		})
	}
}

func lanForTest(t *testing.T, cfg LANConfig, rate int64) testNet {
	l := NewLAN(cfg)
	t.Cleanup(func() { l.Close() })
	a, b := l.Host(addrA, rate, rate), l.Host(addrB, rate, rate)
	return testNet{dial: a.Dial, listen: b.Listen, at: addrB}
}

var tcpStories = []struct {
	name string
	tell func(t *testing.T, n testNet)
}{
	{"bytes come in order both ways at once", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		data := noise(3<<20 + 17)
		var all sync.WaitGroup
		for _, c := range []net.Conn{a, b} {
			all.Go(func() {
				if _, err := c.Write(data); err != nil {
					t.Error(err)
				}
				if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				got, err := io.ReadAll(c)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes and %v, want the %d bytes written", len(got), err, len(data))
				}
			})
		}
		all.Wait()
	}},
	{"writes of several goroutines do not mix", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		const writers, size = 4, 200_000
		var all sync.WaitGroup
		for i := range writers {
			all.Go(func() {
				if _, err := a.Write(bytes.Repeat([]byte{byte(i)}, size)); err != nil {
					t.Error(err)
				}
			})
		}
		buf := make([]byte, size)
		for range writers {
			if _, err := io.ReadFull(b, buf); err != nil {
				t.Fatal(err)
			}
			if bytes.Count(buf, buf[:1]) != size {
				t.Fatal("the bytes of two writes were mixed")
			}
		}
		all.Wait()
	}},
	{"what was written before close arrives, then EOF", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		mustWrite(t, a, "goodbye")
		mustClose(t, a)
		got, err := io.ReadAll(b)
		if string(got) != "goodbye" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
		if k, err := b.Read(make([]byte, 1)); k != 0 || err != io.EOF {
			t.Fatalf("read %d, %v after EOF", k, err)
		}
	}},
	{"half closed, the other way stays open", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		mustWrite(t, a, "question")
		if err := a.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write after CloseWrite: %v, want EPIPE", err)
		}
		if got, err := io.ReadAll(b); string(got) != "question" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
		mustWrite(t, b, "answer")
		mustClose(t, b)
		if got, err := io.ReadAll(a); string(got) != "answer" || err != nil {
			t.Fatalf("read %q, %v", got, err)
		}
	}},
	{"closing over unread data resets", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		mustWrite(t, a, "never read")
		one := make([]byte, 1)
		if _, err := io.ReadFull(b, one); err != nil { // so that it has surely arrived
			t.Fatal(err)
		}
		mustClose(t, b)
		if _, err := a.Read(one); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want ECONNRESET", err)
		}
		_, err := a.Write(one)
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) { // Linux reports a reset once
			t.Errorf("write: %v, want ECONNRESET or EPIPE", err)
		}
	}},
	{"writing to one who is gone fails in the end", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		mustClose(t, b)
		a.SetDeadline(time.Now().Add(patience))
		for {
			if _, err := a.Write(make([]byte, 1000)); errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}},
	{"a passed deadline fails reads and writes, a new one revives", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		mustWrite(t, b, "x")
		a.SetDeadline(time.Unix(1, 0))
		for range 2 {
			_, err := a.Read(make([]byte, 1))
			wantTimeout(t, err)
			_, err = a.Write([]byte("y"))
			wantTimeout(t, err)
		}
		a.SetDeadline(time.Time{})
		if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		mustWrite(t, a, "y")
	}},
	{"a deadline wakes a waiting read", func(t *testing.T, n testNet) {
		a, _ := n.pair(t)
		a.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err := a.Read(make([]byte, 1))
		wantTimeout(t, err)
	}},
	{"a deadline set meanwhile wakes a waiting read", func(t *testing.T, n testNet) {
		a, _ := n.pair(t)
		done := make(chan error)
		go func() {
			_, err := a.Read(make([]byte, 1))
			done <- err
		}()
		a.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		wantTimeout(t, <-done)
	}},
	{"a deadline put off does not wake", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		a.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
		a.SetReadDeadline(time.Now().Add(patience))
		go func() {
			time.Sleep(30 * time.Millisecond) // not a wait for a state: time itself is the point
			b.Write([]byte("x"))
		}()
		if _, err := io.ReadFull(a, make([]byte, 1)); err != nil {
			t.Error(err)
		}
	}},
	{"a reader who does not read stops the writer, a deadline frees it", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		const more = 64 << 20
		data, k := make([]byte, more), 0
		for k == 0 { // on a busy machine a deadline may pass before anything was written
			a.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			var err error
			k, err = a.Write(data)
			wantTimeout(t, err)
		}
		if k == more {
			t.Fatal("all was taken, and nothing read")
		}
		mustClose(t, a)
		got, err := io.Copy(io.Discard, b)
		if got != int64(k) || err != nil {
			t.Errorf("%d bytes were taken, %d arrived, %v", k, got, err)
		}
	}},
	{"close frees a waiting read", func(t *testing.T, n testNet) {
		a, _ := n.pair(t)
		done := make(chan error)
		go func() {
			_, err := a.Read(make([]byte, 1))
			done <- err
		}()
		mustClose(t, a)
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write: %v, want net.ErrClosed", err)
		}
		if err := a.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("close again: %v, want net.ErrClosed", err)
		}
	}},
	{"close frees a waiting write", func(t *testing.T, n testNet) {
		a, _ := n.pair(t)
		begun, done := make(chan struct{}), make(chan error)
		go func() {
			a.Write([]byte("x"))
			close(begun)
			_, err := a.Write(make([]byte, 64<<20))
			done <- err
		}()
		<-begun
		mustClose(t, a)
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
	}},
	{"everything may be called at once", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		go io.Copy(b, b)
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				a.SetDeadline(time.Now().Add(20 * time.Millisecond))
				a.Write(make([]byte, 1000))
				a.LocalAddr()
				a.Read(make([]byte, 1000))
				a.SetReadDeadline(time.Time{})
				a.RemoteAddr()
				a.Close()
			})
		}
		all.Wait()
	}},
	{"addresses are TCP addresses and mirror each other", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		at := func(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }
		if at(a.LocalAddr()) != at(b.RemoteAddr()) || at(a.RemoteAddr()) != at(b.LocalAddr()) {
			t.Errorf("%s to %s here, %s to %s there", a.LocalAddr(), a.RemoteAddr(), b.LocalAddr(), b.RemoteAddr())
		}
		if at(b.LocalAddr()).Addr() != n.at || at(a.LocalAddr()).Port() == 0 {
			t.Errorf("%s to %s", a.LocalAddr(), a.RemoteAddr())
		}
	}},
	{"a dial is refused where nobody listens", func(t *testing.T, n testNet) {
		l := n.mustListen(t, 0)
		mustCloseListener(t, l)
		_, err := n.dial(context.Background(), l.Addr().(*net.TCPAddr).AddrPort())
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
	}},
	{"a dial obeys its context", func(t *testing.T, n testNet) {
		l := n.mustListen(t, 0)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := n.dial(ctx, l.Addr().(*net.TCPAddr).AddrPort()); err == nil {
			t.Error("connected with a cancelled context")
		}
	}},
	{"a port is listened on once", func(t *testing.T, n testNet) {
		l := n.mustListen(t, 0)
		port := l.Addr().(*net.TCPAddr).AddrPort().Port()
		if _, err := n.listen(netip.AddrPortFrom(n.at, port)); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("%v, want EADDRINUSE", err)
		}
		mustCloseListener(t, l)
		n.mustListen(t, port)
	}},
	{"nobody listens at another's address", func(t *testing.T, n testNet) {
		if _, err := n.listen(netip.MustParseAddrPort("192.0.2.1:0")); !errors.Is(err, syscall.EADDRNOTAVAIL) {
			t.Errorf("%v, want EADDRNOTAVAIL", err)
		}
	}},
	{"closing a listener frees accept and spares accepted conns", func(t *testing.T, n testNet) {
		a, b := n.pair(t)
		l := n.mustListen(t, 0)
		done := make(chan error)
		go func() {
			_, err := l.Accept()
			done <- err
		}()
		mustCloseListener(t, l)
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want net.ErrClosed", err)
		}
		mustWrite(t, a, "still")
		if _, err := io.ReadFull(b, make([]byte, 5)); err != nil {
			t.Error(err)
		}
	}},
	{"closing a listener resets who was not accepted", func(t *testing.T, n testNet) {
		l := n.mustListen(t, 0)
		c, err := n.dial(context.Background(), l.Addr().(*net.TCPAddr).AddrPort())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		mustCloseListener(t, l)
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want ECONNRESET", err)
		}
	}},
}

// pair connects: a has dialled, b was accepted.
func (n testNet) pair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l := n.mustListen(t, 0)
	a, err := n.dial(context.Background(), l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return a, b
}

func (n testNet) mustListen(t *testing.T, port uint16) net.Listener {
	t.Helper()
	l, err := n.listen(netip.AddrPortFrom(n.at, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func mustWrite(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if n, err := io.WriteString(c, s); n != len(s) || err != nil {
		t.Fatalf("wrote %d of %q: %v", n, s, err)
	}
}

func mustClose(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func mustCloseListener(t *testing.T, l net.Listener) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

func wantTimeout(t *testing.T, err error) {
	t.Helper()
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%v, want a timeout", err)
	}
}

// noise is the same random bytes every time.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}
