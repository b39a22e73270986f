package lab_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// The figures that the project is held to. All are ratios within one run, or
// counts, so that they hold on a shared machine; `make bench` prints them.

var (
	idleFor  = flag.Duration("lab.idle", time.Minute, "how long BenchmarkIdle looks at idle daemons")
	bigImage = flag.Int64("lab.big", 1<<30, "bytes of the image of BenchmarkBigImage")
)

// BenchmarkColdStart plugs a release in at one device of a site whose links are
// shaped, and measures when the last of the others holds it whole, as a multiple
// of the bound max(F/u_s, F/d_min, N*F/(u_s+sum u_i)), which is F/u_s here.
func BenchmarkColdStart(b *testing.B) {
	for _, c := range []struct {
		devices int
		size    int64
		rate    int64
	}{{8, 64 << 20, 50e6}, {16, 64 << 20, 25e6}, {8, 256 << 20, 50e6}} {
		b.Run(fmt.Sprintf("N=%d/%dMiB/%dMbit", c.devices, c.size>>20, c.rate/1e6), func(b *testing.B) {
			for b.Loop() {
				coldStart(b, c.devices, c.size, c.rate)
			}
		})
	}
}

func coldStart(b *testing.B, n int, size, rate int64) {
	l := newLab(b)
	ctx := within(b, 10*time.Minute)
	for i := range n + 1 {
		add(b, l, lab.DeviceConfig{Name: fmt.Sprintf("d%02d", i), Up: rate, Down: rate, Policy: "fetch"})
	}
	goodput, err := l.Site.Goodput(l.Devices[0].Node, l.Devices[1].Node, 8<<20)
	if err != nil {
		b.Fatal(err)
	}
	startAll(b, ctx, l)
	bundle, image := release(b, ctx, l, size)
	cpu := cpuOf(b, l)
	txBefore, _, err := l.Devices[0].Node.Counters()
	if err != nil {
		b.Fatal(err)
	}
	if _, err := l.Devices[0].Import(ctx, bundle); err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	ends := whenHeld(b, ctx, l.Devices[1:], image)
	last := slices.MaxFunc(ends, time.Time.Compare).Sub(began)
	first := slices.MinFunc(ends, time.Time.Compare).Sub(began)
	txAfter, _, err := l.Devices[0].Node.Counters()
	if err != nil {
		b.Fatal(err)
	}
	bound := float64(size) / goodput
	b.ReportMetric(last.Seconds()/bound, "last/bound")
	b.ReportMetric((last-first).Seconds()/bound, "spread/bound")
	st, err := l.Devices[0].API.Status(ctx, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(*lab.Self(st).Sent)/float64(size), "first-sent/F")
	// With TCP, IP and Ethernet headers, which alone are 1.05 of any payload.
	b.ReportMetric(float64(txAfter-txBefore)/float64(size), "first-wire/F")
	b.ReportMetric((cpuOf(b, l)-cpu)/float64(n), "cpu-s/device")
	b.ReportMetric(float64(peakRSS(b, l))/(1<<20), "peak-MiB")
	b.ReportMetric(0, "ns/op")
	b.Logf("raw goodput %.2f MB/s, bound %.2f s, first %.2f s, last %.2f s", goodput/1e6, bound, first.Seconds(), last.Seconds())
}

// BenchmarkDiscovery measures from the start of a daemon to its first admitted neighbour, 20 times.
func BenchmarkDiscovery(b *testing.B) {
	for b.Loop() {
		l := newLab(b)
		ctx := within(b, 5*time.Minute)
		add(b, l, lab.DeviceConfig{Name: "stays"})
		joiner := add(b, l, lab.DeviceConfig{Name: "joins"})
		if err := l.Devices[0].Start(); err != nil {
			b.Fatal(err)
		}
		if _, err := l.Devices[0].Until(ctx, func(control.SiteStatus) bool { return true }); err != nil {
			b.Fatal(err)
		}
		var took []time.Duration
		for range 20 {
			began := time.Now()
			if err := joiner.Start(); err != nil {
				b.Fatal(err)
			}
			if _, err := joiner.Until(ctx, func(st control.SiteStatus) bool { return st.Site.Heard == 2 }); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(began))
			if err := joiner.Kill(); err != nil {
				b.Fatal(err)
			}
		}
		slices.Sort(took)
		b.ReportMetric(took[len(took)/2].Seconds(), "median-s")
		b.ReportMetric(took[len(took)-1].Seconds(), "worst-s")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkIdle looks at the daemons of a site of four in which nothing happens, with a release confirmed.
func BenchmarkIdle(b *testing.B) {
	for b.Loop() {
		l := newLab(b)
		ctx := within(b, *idleFor+5*time.Minute)
		for i := range 4 {
			add(b, l, lab.DeviceConfig{Name: fmt.Sprintf("d%02d", i)})
		}
		startAll(b, ctx, l)
		bundle, _ := release(b, ctx, l, 16<<20)
		if _, err := l.Devices[0].Import(ctx, bundle); err != nil {
			b.Fatal(err)
		}
		if _, err := l.Devices[1].Until(ctx, func(st control.SiteStatus) bool {
			return !slices.ContainsFunc(st.Devices, func(d control.DeviceStatus) bool { return d.Version != "2.0.0" })
		}); err != nil {
			b.Fatal(err)
		}
		rest(ctx, 10*time.Second)
		cpu, began := cpuOf(b, l), time.Now()
		rest(ctx, *idleFor)
		b.ReportMetric(100*(cpuOf(b, l)-cpu)/float64(len(l.Devices))/time.Since(began).Seconds(), "cpu-%")
		b.ReportMetric(float64(rssOf(b, l))/(1<<20), "rss-MiB")
		b.ReportMetric(0, "ns/op")
	}
}

// BenchmarkBigImage hands a large image from one device to another over unshaped links.
func BenchmarkBigImage(b *testing.B) {
	for b.Loop() {
		l := newLab(b)
		ctx := within(b, 10*time.Minute)
		for i := range 2 {
			add(b, l, lab.DeviceConfig{Name: fmt.Sprintf("d%02d", i), Policy: "fetch"})
		}
		startAll(b, ctx, l)
		bundle, image := release(b, ctx, l, *bigImage)
		if _, err := l.Devices[0].Import(ctx, bundle); err != nil {
			b.Fatal(err)
		}
		began, cpu := time.Now(), cpuOf(b, l)
		ends := whenHeld(b, ctx, l.Devices[1:], image)
		took := ends[0].Sub(began).Seconds()
		b.ReportMetric(float64(*bigImage)/took/1e6, "MB/s")
		b.ReportMetric((cpuOf(b, l)-cpu)/(float64(*bigImage)/(1<<30)), "cpu-s/GiB-both")
		b.ReportMetric(float64(peakRSS(b, l))/(1<<20), "peak-MiB")
		b.ReportMetric(0, "ns/op")
	}
}

func add(tb testing.TB, l *lab.Lab, cfg lab.DeviceConfig) *lab.Device {
	tb.Helper()
	d, err := l.Add(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// startAll starts every device and waits until the first hears all of them.
func startAll(tb testing.TB, ctx context.Context, l *lab.Lab) {
	tb.Helper()
	for _, d := range l.Devices {
		if err := d.Start(); err != nil {
			tb.Fatal(err)
		}
	}
	for _, d := range l.Devices {
		if _, err := d.Until(ctx, func(st control.SiteStatus) bool { return st.Site.Heard == len(l.Devices) }); err != nil {
			tb.Fatal(err)
		}
	}
}

// release makes a signed bundle of one image and returns its path and the image's digest.
func release(tb testing.TB, ctx context.Context, l *lab.Lab, size int64) (string, verify.Digest) {
	tb.Helper()
	bundle, err := l.Vendor.Bundle(ctx, publish.VendorRelease{Version: "2.0.0", Size: size})
	if err != nil {
		tb.Fatal(err)
	}
	rel, err := publish.Verify(ctx, bundle, l.Vendor.Anchor(), nil)
	if err != nil {
		tb.Fatal(err)
	}
	return bundle, rel.Manifest().Images[0].SHA256
}

// whenHeld notes when each device holds the image whole: it takes its final name
// only after the whole digest was checked. A file system has no long poll, and
// the daemon's own would round the times.
func whenHeld(tb testing.TB, ctx context.Context, devices []*lab.Device, image verify.Digest) []time.Time {
	tb.Helper()
	ends := make([]time.Time, len(devices))
	var wg sync.WaitGroup
	for i, d := range devices {
		wg.Go(func() {
			name := filepath.Join(d.Dir, "state", "store", "images", image.String())
			for ctx.Err() == nil {
				if _, err := os.Stat(name); err == nil {
					ends[i] = time.Now()
					return
				}
				rest(ctx, 5*time.Millisecond)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		tb.Fatal("not every device got the image: ", ctx.Err())
	}
	return ends
}

func rest(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// cpuOf sums user and system seconds of all daemons.
func cpuOf(tb testing.TB, l *lab.Lab) float64 {
	tb.Helper()
	var sum float64
	for _, d := range l.Devices {
		u, err := d.Usage()
		if err != nil {
			tb.Fatal(err)
		}
		sum += u.CPU.Seconds()
	}
	return sum
}

// rssOf is the largest resident set of the daemons now, peakRSS the largest that any ever had.
func rssOf(tb testing.TB, l *lab.Lab) int64 {
	return largest(tb, l, func(u lab.Usage) int64 { return u.RSS })
}
func peakRSS(tb testing.TB, l *lab.Lab) int64 {
	return largest(tb, l, func(u lab.Usage) int64 { return u.Peak })
}

func largest(tb testing.TB, l *lab.Lab, of func(lab.Usage) int64) int64 {
	tb.Helper()
	var most int64
	for _, d := range l.Devices {
		u, err := d.Usage()
		if err != nil {
			tb.Fatal(err)
		}
		most = max(most, of(u))
	}
	return most
}
