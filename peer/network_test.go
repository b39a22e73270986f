package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"meshupd/verify"
)

func TestStreamsBetweenDevices(t *testing.T) {
	a, b := startMesh(t, nil), startMesh(t, nil)
	a.book.hint(b.self, b.Addrs(), time.Now().Add(time.Hour)) // known, and not dialled by itself: Dial does
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := a.Network().Dial(ctx, b.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	in, id, err := b.Network().Accept(ctx)
	if err != nil || id != a.ID() {
		t.Fatalf("from %s, %v", id, err)
	}
	buf := make([]byte, 4)
	if _, err := io.ReadFull(in, buf); err != nil || string(buf) != "ping" {
		t.Fatalf("%q, %v", buf, err)
	}
	for _, c := range []net.Conn{in, out} {
		host, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err != nil || net.ParseIP(host) == nil || c.RemoteAddr().Network() == "" {
			t.Errorf("remote address %v", c.RemoteAddr())
		}
	}
	if in.RemoteAddr().String() != out.LocalAddr().String() || in.RemoteAddr().String() == in.LocalAddr().String() {
		t.Error("a device has one address, and its own")
	}
	in.Write([]byte("unread"))
	in.Close()
	in.Close()
	if _, err := io.ReadAll(out); err == nil {
		t.Log("the unread bytes arrived before the reset")
	}
	out.Close()
	for _, c := range []net.Conn{in, out} {
		if err := errors.Join(c.SetDeadline(time.Now()), c.SetReadDeadline(time.Now()), c.SetWriteDeadline(time.Time{})); err != nil {
			t.Errorf("a deadline on a closed stream: %v", err)
		}
	}
}

func TestStreamsThatCannotBe(t *testing.T) {
	a, b := neighbours(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, stranger := testKey(t)
	for _, id := range []string{"", "10.0.0.1:7610", "not an id", a.ID(), stranger.String()} {
		if _, err := a.Network().Dial(ctx, id); err == nil {
			t.Errorf("a stream to %q", id)
		}
	}
	a.Ban(b.ID(), errors.New("test"))
	if _, err := a.Network().Dial(ctx, b.ID()); verify.CodeOf(err) != verify.CodePeer {
		t.Errorf("a stream to a banned device: %v", err)
	}
	b.until("a is gone", func() bool { return !b.connectedTo(a.ID()) })
	short, stop := context.WithTimeout(ctx, 2*time.Second)
	defer stop()
	if _, err := b.Network().Dial(short, a.ID()); err == nil {
		t.Error("a banned device opened a stream")
	}
	if _, _, err := a.Network().Accept(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("accept: %v", err)
	}
}
