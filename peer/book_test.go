package peer

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

func addr(i int) []netip.AddrPort {
	return []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 7610)}
}

func nobody(peer.ID) bool { return false }

func TestWanted(t *testing.T) {
	tests := []struct{ known, linked, maxPeers, want int }{
		{5, 0, 64, 5}, {5, 5, 64, 0}, {32, 30, 64, 2}, {33, 0, 64, sparseDegree}, {500, 9, 64, 1}, {500, 40, 64, 0}, {3, 0, 1, 1},
	}
	for _, tt := range tests {
		if got := wanted(tt.known, tt.linked, tt.maxPeers); got != tt.want {
			t.Errorf("%+v: %d", tt, got)
		}
	}
}

func TestFailedDeviceIsTriedLessAndLess(t *testing.T) {
	b, now := newBook("a"), time.Now()
	b.hint("b", addr(1), now)
	calls, _ := b.due(now, nobody, 64)
	if len(calls) != 1 {
		t.Fatalf("%d calls", len(calls))
	}
	last := time.Duration(0)
	for i := range 12 {
		b.failed("b", false, now)
		calls, again := b.due(now, nobody, 64)
		if wait := again.Sub(now); len(calls) != 0 || wait < last/2 && i < 4 || wait > retryMax*3/2 {
			t.Errorf("try %d: %d calls, again after %v", i, len(calls), wait)
		} else {
			last = wait
		}
	}
	b.hint("b", addr(2), now) // a new address is a reason to try soon
	if _, again := b.due(now, nobody, 64); again.Sub(now) > retryMin {
		t.Errorf("again after %v", again.Sub(now))
	}
	b.met("b", addr(3)[0])
	if got := b.addrs("b"); got[0] != addr(3)[0] || len(got) != 3 {
		t.Errorf("%v", got)
	}
}

func TestInventedDevicesDoNotPushOutRealOnes(t *testing.T) {
	b, now := newBook("a"), time.Now()
	b.hint("real", addr(1), now)
	b.met("real", addr(1)[0])
	for i := range 2 * maxContacts {
		b.hint(peer.ID(fmt.Sprint("invented ", i)), addr(i), now)
	}
	if len(b.contacts) != maxContacts || b.addrs("real") == nil {
		t.Errorf("%d contacts, real at %v", len(b.contacts), b.addrs("real"))
	}
	for i := range 100 {
		b.hint("real", addr(i), now)
	}
	if got := b.addrs("real"); len(got) != contactAddrs || got[0] != addr(1)[0] {
		t.Errorf("%v", got)
	}
}

func TestSeedIsAskedWhoItIs(t *testing.T) {
	b, now := newBook("a"), time.Now()
	at := addr(1)[0]
	if !b.plant(at, now) || b.plant(at, now) {
		t.Error("a seed is planted once")
	}
	calls, _ := b.due(now, nobody, 64)
	if len(calls) != 1 || calls[0].at != at || calls[0].id != "" {
		t.Fatalf("%+v", calls)
	}
	b.seeded(at, "", now)
	if calls, again := b.due(now, nobody, 64); len(calls) != 0 || again.Sub(now) > retryMin {
		t.Errorf("%+v, again after %v", calls, again.Sub(now))
	}
	b.seeded(at, "b", now)
	if calls, _ := b.due(now.Add(time.Second), nobody, 64); len(calls) != 1 || calls[0].id != "b" {
		t.Errorf("%+v", calls)
	}
	for range 3 {
		b.failed("b", false, now)
	}
	calls, _ = b.due(now.Add(2*time.Minute), nobody, 64)
	asks := 0
	for _, c := range calls {
		if c.id == "" {
			asks++
		}
	}
	if asks != 1 {
		t.Errorf("a device that moved away from its seed is not asked for again: %+v", calls)
	}
}

func TestADeviceFoundNearbyIsTriedSoon(t *testing.T) {
	b, now := newBook("a"), time.Now()
	b.hint("b", addr(1), now)
	for range 12 {
		b.failed("b", false, now)
	}
	if !b.near("b", now.Add(time.Second)) {
		t.Fatal("an announcement changed nothing")
	}
	if _, again := b.due(now, nobody, 64); again.Sub(now) != nearAgain {
		t.Errorf("again after %v", again.Sub(now))
	}
	now = now.Add(nearAgain)
	calls, _ := b.due(now, nobody, 64)
	if len(calls) != 1 {
		t.Fatalf("%d calls", len(calls))
	}
	b.hold(calls[0], now)
	if b.near("b", now) {
		t.Error("it is dialled a second time while a dial runs")
	}
	b.failed("b", true, now)
	if b.near("b", now.Add(nearAgain)) {
		t.Error("a device that was rejected is dialled because it announces itself")
	}
}
