package simnet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const mib = 1 << 20

// connect dials from a to b within a bubble.
func connect(t testing.TB, a, b *LANHost) (here, there net.Conn) {
	t.Helper()
	l, err := b.Listen(netip.AddrPortFrom(b.Addr(), 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if here, err = a.Dial(context.Background(), l.Addr().(*net.TCPAddr).AddrPort()); err != nil {
		t.Fatal(err)
	}
	if there, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return here, there
}

// transfer sends n bytes and returns how long it took until all were read.
func transfer(t testing.TB, from, to net.Conn, n int) time.Duration {
	t.Helper()
	begin := time.Now()
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := from.Write(make([]byte, n)); err != nil {
			t.Error(err)
		}
	})
	if _, err := io.CopyN(io.Discard, to, int64(n)); err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	sending.Wait()
	return took
}

// about says whether got is within 1 % of want. Exact: in a bubble time does not
// depend on the machine.
func about(got, want time.Duration) bool { return (got - want).Abs() <= want/100 }

func TestBandwidthInFakeTime(t *testing.T) {
	for _, c := range []struct {
		name     string
		up, down int64 // of sender and receiver
		want     time.Duration
	}{
		{"uplink", mib, 0, 8 * time.Second},
		{"downlink", 0, mib, 8 * time.Second},
		{"the slower of both", 2 * mib, mib, 8 * time.Second},
		{"the same twice", mib, mib, 8 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLAN(LANConfig{Latency: time.Millisecond})
				defer l.Close()
				a, b := l.Host(addrA, c.up, 0), l.Host(addrB, 0, c.down)
				here, there := connect(t, a, b)
				if took := transfer(t, here, there, 8*mib); !about(took, c.want) {
					t.Errorf("8 MiB took %v, want %v", took, c.want)
				}
				if sent, _ := a.Counters(); sent != 8*mib {
					t.Errorf("counted %d bytes sent", sent)
				}
				if _, got := b.Counters(); got != 8*mib {
					t.Errorf("counted %d bytes received", got)
				}
			})
		})
	}
}

func TestLatencyIsOneWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const lat = 40 * time.Millisecond
		l := NewLAN(LANConfig{Latency: lat})
		defer l.Close()
		begin := time.Now()
		here, there := connect(t, l.Host(addrA, 0, 0), l.Host(addrB, 0, 0))
		if took := time.Since(begin); took != 2*lat {
			t.Errorf("connecting took %v, want %v", took, 2*lat)
		}
		if took := transfer(t, here, there, 1); took != lat {
			t.Errorf("a byte took %v, want %v", took, lat)
		}
	})
}

func TestFanOutSharesTheUplink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: time.Millisecond})
		defer l.Close()
		source := l.Host(addrA, 4*mib, 0)
		var all sync.WaitGroup
		took := make([]time.Duration, 4)
		for i := range took {
			here, there := connect(t, source, l.Host(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), 0, 0))
			all.Go(func() { took[i] = transfer(t, here, there, 2*mib) })
		}
		all.Wait()
		slices.Sort(took)
		if want := 2 * time.Second; !about(took[3], want) {
			t.Errorf("4 times 2 MiB over 4 MiB/s took %v, want %v", took[3], want)
		}
		// Fairly: they all end at the end.
		if took[0] < took[3]*95/100 {
			t.Errorf("the first was done after %v, the last after %v", took[0], took[3])
		}
	})
}

func TestFanInSharesTheDownlink(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: time.Millisecond})
		defer l.Close()
		sink := l.Host(addrA, 0, 2*mib)
		var all sync.WaitGroup
		var slow, fast time.Duration
		for i, rate := range []int64{mib / 2, 0} {
			here, there := connect(t, l.Host(netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), rate, 0), sink)
			all.Go(func() {
				if took := transfer(t, here, there, 2*mib); rate == 0 {
					fast = took
				} else {
					slow = took
				}
			})
		}
		all.Wait()
		// The slow sender takes its half MiB/s; what it leaves is the other's.
		if want := 2 * mib * time.Second / (3 * mib / 2); !about(fast, want) {
			t.Errorf("the fast sender took %v, want %v", fast, want)
		}
		if want := 4 * time.Second; !about(slow, want) {
			t.Errorf("the slow sender took %v, want %v", slow, want)
		}
	})
}

func TestCutHostStallsWithoutError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: 5 * time.Millisecond})
		defer l.Close()
		a, b, c := l.Host(addrA, mib, 0), l.Host(addrB, 0, mib), l.Host(addrC, 0, 0)
		here, there := connect(t, a, b)
		toC, atC := connect(t, a, c)
		begin := time.Now()
		done := make(chan time.Duration)
		go func() {
			transfer(t, here, there, 4*mib)
			done <- time.Since(begin)
		}()
		time.Sleep(2 * time.Second)
		l.Cut(b)
		_, before := b.Counters()
		time.Sleep(time.Hour)
		if _, after := b.Counters(); after != before {
			t.Errorf("%d bytes reached a cut host", after-before)
		}
		select {
		case <-done:
			t.Error("the transfer ended while the host was cut")
		default:
		}
		if took := transfer(t, toC, atC, mib); !about(took, time.Second+5*time.Millisecond) {
			t.Errorf("beside the stalled conn 1 MiB took %v, want 1 s", took)
		}
		l.Restore(b)
		if took, want := <-done, time.Hour+5*time.Second; took < want || took > want+time.Second {
			t.Errorf("took %v in all, want about %v", took, want)
		}
	})
}

func TestCutsLoseAndReorderNothing(t *testing.T) {
	for name, c := range map[string]struct {
		rate    int64
		latency time.Duration
		pause   time.Duration // of the writer, so that the transfer meets some cuts
	}{
		"shaped":             {mib, 3 * time.Millisecond, 0},
		"unlimited":          {0, 3 * time.Millisecond, 10 * time.Millisecond},
		"without latency":    {mib, 0, 0},
		"nothing slows down": {0, 0, 10 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLAN(LANConfig{Latency: c.latency, Window: 64 << 10})
				defer l.Close()
				a, b := l.Host(addrA, c.rate, 0), l.Host(addrB, 0, c.rate)
				here, there := connect(t, a, b)
				data := noise(2 * mib)
				stop := make(chan struct{})
				var all sync.WaitGroup
				all.Go(func() { disturb(l, a, b, stop) })
				all.Go(func() {
					for rest := data; len(rest) > 0; {
						k := min(len(rest), 1+len(rest)%20000)
						if _, err := here.Write(rest[:k]); err != nil {
							t.Error(err)
							return
						}
						rest = rest[k:]
						time.Sleep(c.pause)
					}
					here.Close()
				})
				got, err := io.ReadAll(there)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, %v; want the %d that were written", len(got), err, len(data))
				}
				close(stop)
				all.Wait()
			})
		})
	}
}

// disturb cuts and restores, splits and heals and changes rates at random.
func disturb(l *LAN, a, b *LANHost, stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.IntN(30)) * time.Millisecond):
		}
		switch i % 5 {
		case 0:
			l.Cut([]*LANHost{a, b}[rng.IntN(2)])
		case 1:
			l.Restore(a)
			l.Restore(b)
		case 2:
			l.Partition([]*LANHost{a})
		case 3:
			l.Heal()
		case 4:
			a.SetRate([]int64{0, mib, 3 * mib}[rng.IntN(3)], 0)
		}
	}
}

func TestEndOfAConnIsHeardAfterTheCut(t *testing.T) {
	for name, end := range map[string]struct {
		unread string
		want   error
	}{"closed": {"", io.EOF}, "reset": {"unread", syscall.ECONNRESET}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := NewLAN(LANConfig{Latency: time.Millisecond})
				defer l.Close()
				a, b := l.Host(addrA, 0, 0), l.Host(addrB, 0, 0)
				here, there := connect(t, a, b)
				io.WriteString(here, end.unread)
				time.Sleep(time.Second)
				l.Cut(b)
				there.Close()
				here.SetReadDeadline(time.Now().Add(time.Hour))
				_, err := here.Read(make([]byte, 1))
				wantTimeout(t, err)
				l.Restore(b)
				here.SetReadDeadline(time.Time{})
				if _, err := here.Read(make([]byte, 1)); !errors.Is(err, end.want) {
					t.Errorf("%v, want %v", err, end.want)
				}
			})
		})
	}
}

func TestDialWaitsForAHostThatComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: time.Millisecond})
		defer l.Close()
		a, b := l.Host(addrA, 0, 0), l.Host(addrB, 0, 0)
		ln, err := b.Listen(netip.AddrPortFrom(addrB, 80))
		if err != nil {
			t.Fatal(err)
		}
		l.Cut(b)
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := a.Dial(ctx, netip.AddrPortFrom(addrB, 80)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v, want the context's error", err)
		}
		if took := time.Since(begin); took != 5*time.Second {
			t.Errorf("gave up after %v", took)
		}
		if _, err := a.Dial(t.Context(), netip.AddrPortFrom(addrB, 80)); !errors.Is(err, syscall.ETIMEDOUT) {
			t.Errorf("%v, want ETIMEDOUT", err)
		}
		if _, err := a.Dial(t.Context(), netip.AddrPortFrom(addrC, 80)); !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("%v, want EHOSTUNREACH", err)
		}
		time.AfterFunc(10*time.Second, func() { l.Restore(b) })
		c, err := a.Dial(t.Context(), netip.AddrPortFrom(addrB, 80))
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		ln.Close()
	})
}

func TestPartitionSplitsTheLAN(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{})
		defer l.Close()
		a, b, c := l.Host(addrA, 0, 0), l.Host(addrB, 0, 0), l.Host(addrC, 0, 0)
		ab, ba := connect(t, a, b)
		ac, ca := connect(t, a, c)
		l.Partition([]*LANHost{a, b})
		transfer(t, ab, ba, 1000)
		mustWrite(t, ac, "x")
		ca.SetReadDeadline(time.Now().Add(time.Minute))
		_, err := ca.Read(make([]byte, 1))
		wantTimeout(t, err)
		l.Heal()
		ca.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := ca.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
	})
}

func TestBrowseHearsWhoIsInReach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: time.Millisecond})
		a, b, c := l.Host(addrA, 0, 0), l.Host(addrB, 0, 0), l.Host(addrC, 0, 0)
		var mu sync.Mutex
		var heard []string
		expect := func(want ...string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(heard)
			if !slices.Equal(heard, want) {
				t.Errorf("heard %q, want %q", heard, want)
			}
			heard = nil
		}
		b.Announce("_mesh", []byte("b was first"))
		var browsing sync.WaitGroup
		browsing.Go(func() {
			err := a.Browse(context.Background(), "_mesh", func(from netip.Addr, payload []byte) {
				mu.Lock()
				defer mu.Unlock()
				heard = append(heard, from.String()+" "+string(payload))
			})
			if err != nil {
				t.Error(err)
			}
		})
		expect("10.0.0.2 b was first")
		l.Cut(c)
		stop := c.Announce("_mesh", []byte("c"))
		b.Announce("_other", []byte("another service"))
		expect()
		l.Restore(c)
		expect("10.0.0.3 c")
		l.Cut(c)
		l.Restore(c)
		l.Cut(b)
		expect()
		l.Restore(b)
		expect("10.0.0.2 b was first")
		l.Cut(c)
		stop()
		expect()
		l.Restore(c)
		expect()
		l.Close()
		browsing.Wait()
	})
}

func TestCloseFreesEveryone(t *testing.T) {
	// synctest.Test itself fails if a goroutine is left behind.
	synctest.Test(t, func(t *testing.T) {
		l := NewLAN(LANConfig{Latency: time.Second})
		a, b := l.Host(addrA, 1000, 0), l.Host(addrB, 0, 0)
		here, there := connect(t, a, b)
		ln, err := b.Listen(netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		ended := func(f func() error) {
			all.Go(func() {
				if err := f(); !errors.Is(err, net.ErrClosed) {
					t.Errorf("%v, want net.ErrClosed", err)
				}
			})
		}
		ended(func() error { _, err := here.Write(make([]byte, mib)); return err })
		ended(func() error { _, err := here.Read(make([]byte, 1)); return err })
		ended(func() error { _, err := io.Copy(io.Discard, there); return err })
		ended(func() error { _, err := ln.Accept(); return err })
		there.SetWriteDeadline(time.Now().Add(time.Hour))
		synctest.Wait()
		l.Cut(b)
		ended(func() error { _, err := a.Dial(context.Background(), netip.AddrPortFrom(addrB, 1)); return err })
		synctest.Wait()
		l.Close()
		all.Wait()
		if _, err := b.Listen(netip.AddrPort{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("listen on a closed LAN: %v", err)
		}
	})
}

func BenchmarkTransfer(b *testing.B) {
	for _, c := range []struct {
		name string
		rate int64
	}{{"unlimited", 0}, {"1GBps", 1 << 30}} {
		b.Run(c.name, func(b *testing.B) {
			l := NewLAN(LANConfig{Window: mib})
			defer l.Close()
			here, there := connect(b, l.Host(addrA, c.rate, c.rate), l.Host(addrB, c.rate, c.rate))
			b.SetBytes(mib)
			b.ReportAllocs()
			go func() {
				buf := make([]byte, mib)
				for {
					if _, err := here.Write(buf); err != nil {
						return
					}
				}
			}()
			buf := make([]byte, mib)
			for b.Loop() {
				if _, err := io.ReadFull(there, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
