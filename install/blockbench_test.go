package install_test

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// rateSize is the content of the image that is written.
const rateSize = 256 << 20

// BenchmarkBlockWrite compares a whole Write, up to the sync, with dd conv=fsync of the same content to the same medium,
// in pairs one after the other in one run; neither is always the first. Before each the slot holds the same old bytes, on the medium and not in the
// page cache. The figures are medians over the pairs:
//
//	ratio         meshupd's rate divided by dd's: the median over the pairs
//	whole-ratio   the same when reading back counts as well, which dd does not do
//	MiB/s, dd-MiB/s, readback-MiB/s   rates of content; reading back comes after the write and is in neither
//	written-MiB   what went to the medium
//	cpu-s, dd-cpu-s                   user and system time
//	allocs/MiB    of content
//
// Where the medium is faster than this machine can hash (sha256-MiB/s), that is what bounds the rate. "flash" is memory behind
// the kernel's throttle, at the rates of a good eMMC: there dd is bounded by the medium, as on a device.
func BenchmarkBlockWrite(b *testing.B) {
	data := noise(7, rateSize)
	start := time.Now()
	sha256.Sum256(data)
	sums := time.Since(start)
	for _, on := range []struct {
		name string
		slot func(b *testing.B) string
	}{
		{"file", func(b *testing.B) string { return sparse(b, b.TempDir()) }},
		{"partition", func(b *testing.B) string { return loopOver(b, sparse(b, b.TempDir())) }},
		{"ram", func(b *testing.B) string { return loopOver(b, sparse(b, ramDir(b))) }},
		{"flash", func(b *testing.B) string { return loopOver(b, sparse(b, ramDir(b))) }},
	} {
		b.Run(on.name, func(b *testing.B) {
			r := newRate(b, on.slot(b))
			if on.name == "flash" {
				r.limit = throttle(b, r.slot)
			}
			for _, coding := range []string{"raw", "zstd"} {
				for _, old := range []string{"fresh", "changed-5%", "identical"} {
					b.Run(coding+"/"+old, func(b *testing.B) {
						r.run(b, coding == "zstd", old)
						b.ReportMetric(rateSize/(1<<20)/sums.Seconds(), "sha256-MiB/s")
					})
				}
			}
		})
	}
}

func sparse(b *testing.B, dir string) string {
	path := filepath.Join(dir, "slot")
	f, err := os.Create(path)
	must(b, "make a slot", err)
	must(b, "make a slot", f.Truncate(rateSize+1<<20))
	must(b, "make a slot", f.Close())
	return path
}

// rate is a machine whose slot b is written again and again.
type rate struct {
	slot  string
	limit func(on bool) // nil: none
	fw    *firmware

	content []byte
	old     map[string][]byte // what the slot holds before
	plain   string            // content as a file: the image of raw, and dd's input
	packed  string            // the same as zstd
}

func newRate(b *testing.B, slot string) *rate {
	dir := b.TempDir()
	r := &rate{slot: slot, fw: grubFirmware(b), plain: filepath.Join(dir, "plain"), packed: filepath.Join(dir, "packed")}
	r.fw.at(1)
	r.content = noise(1, rateSize)
	for at := 0; at < rateSize; at += 4096 { // half of it can be packed
		clear(r.content[at+2048 : at+4096])
	}
	changed := slices.Clone(r.content)
	for at := 0; at+64<<10 <= rateSize; at += 20 * 64 << 10 { // one run of 64 KiB in 20
		for i := at; i < at+64<<10; i += 512 {
			changed[i] ^= 1
		}
	}
	r.old = map[string][]byte{"fresh": noise(2, rateSize), "changed-5%": changed, "identical": r.content}
	must(b, "write the image", os.WriteFile(r.plain, r.content, 0o600))
	f, err := os.Create(r.packed)
	must(b, "pack the image", err)
	enc, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest))
	must(b, "pack the image", err)
	_, err = enc.Write(r.content)
	must(b, "pack the image", err)
	must(b, "pack the image", enc.Close())
	must(b, "pack the image", f.Close())
	return r
}

// lay puts the old bytes on the medium and nothing of them in the cache.
func (r *rate) lay(b *testing.B, old string) {
	f, err := os.OpenFile(r.slot, os.O_WRONLY, 0)
	must(b, "lay the old bytes", err)
	_, err = f.Write(r.old[old])
	must(b, "lay the old bytes", err)
	must(b, "lay the old bytes", f.Sync())
	must(b, "lay the old bytes", f.Close())
	must(b, "drop the cache", install.DropCache(r.slot))
	runtime.GC() // what the test made is not meshupd's work
}

// measured is one write.
type measured struct {
	took, back, cpu time.Duration
	written         int64
	mallocs         uint64
}

func (r *rate) run(b *testing.B, packed bool, old string) {
	image := r.plain
	if packed {
		image = r.packed
	}
	rel, _ := verifytest.NewVendor(b, "bench").Verified(b, verifytest.Opts{Images: []verifytest.Image{{Name: "rootfs", Path: image}}})
	var ours, dds []measured
	var ratios, wholes []float64
	for i := range b.N {
		var m, d measured
		for k := range 2 {
			r.lay(b, old)
			if r.limit != nil {
				r.limit(true)
			}
			if (i+k)%2 == 0 {
				d = r.dd(b)
			} else {
				m = r.write(b, rel, image)
			}
			if r.limit != nil {
				r.limit(false)
			}
		}
		ours, dds, ratios = append(ours, m), append(dds, d), append(ratios, d.took.Seconds()/m.took.Seconds())
		wholes = append(wholes, d.took.Seconds()/(m.took+m.back).Seconds())
	}
	const mib = rateSize / (1 << 20)
	of := func(list []measured, value func(measured) float64) float64 {
		var all []float64
		for _, m := range list {
			all = append(all, value(m))
		}
		return median(all)
	}
	b.ReportMetric(0, "ns/op") // says nothing
	b.ReportMetric(median(ratios), "ratio")
	b.ReportMetric(median(wholes), "whole-ratio")
	b.ReportMetric(of(ours, func(m measured) float64 { return mib / m.took.Seconds() }), "MiB/s")
	b.ReportMetric(of(dds, func(m measured) float64 { return mib / m.took.Seconds() }), "dd-MiB/s")
	b.ReportMetric(of(ours, func(m measured) float64 { return mib / m.back.Seconds() }), "readback-MiB/s")
	b.ReportMetric(of(ours, func(m measured) float64 { return float64(m.written) / (1 << 20) }), "written-MiB")
	b.ReportMetric(of(ours, func(m measured) float64 { return m.cpu.Seconds() }), "cpu-s")
	b.ReportMetric(of(dds, func(m measured) float64 { return m.cpu.Seconds() }), "dd-cpu-s")
	b.ReportMetric(of(ours, func(m measured) float64 { return float64(m.mallocs) / mib }), "allocs/MiB")
}

func median(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

func (r *rate) dd(b *testing.B) measured {
	cmd := exec.Command("dd", "if="+r.plain, "of="+r.slot, "bs=1M", "conv=fsync,notrunc")
	start := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("dd: %v: %s", err, out)
	}
	return measured{took: time.Since(start), cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), written: rateSize}
}

// write also reads back, and says how long that took.
func (r *rate) write(b *testing.B, rel *verify.Release, image string) (m measured) {
	cfg := r.fw.config(b.TempDir())
	cfg.A, cfg.B = filepath.Join(b.TempDir(), "a"), r.slot
	writeFile(b, cfg.A, "factory")
	cfg.Wrote = func(_ install.SlotName, written, _ int64) { m.written = written }
	var opened time.Time
	var cpu time.Duration
	dev, err := install.OpenBlock(b.Context(), install.BlockTest{Step: func(name string, do func() error) error {
		if name == "image.open" {
			opened, cpu = time.Now(), cpuTime()
		}
		return do()
	}}.With(cfg))
	must(b, "open the slots", err)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start, startCPU := time.Now(), cpuTime()
	open := func(verify.Image) (io.ReadCloser, error) { return os.Open(image) }
	must(b, "write", dev.Write(b.Context(), rel, rel.Manifest().Images, open, nil))
	m.back = time.Since(opened)
	runtime.ReadMemStats(&after)
	m.took, m.cpu, m.mallocs = opened.Sub(start), cpu-startCPU, after.Mallocs-before.Mallocs
	return m
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(fmt.Sprint("getrusage: ", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// The rates of flash: bytes per second.
const (
	flashWrite = 160 << 20
	flashRead  = 320 << 20
)

// throttle limits what this process and its children do on a device, by the blkio controller of cgroup v1: it counts a write where it is
// submitted, which for dd and meshupd is their own sync.
func throttle(b *testing.B, dev string) func(on bool) {
	const all = "/sys/fs/cgroup/blkio"
	group, err := os.MkdirTemp(all, "meshupd-bench-")
	if err != nil {
		b.Skipf("no blkio controller (%v); nothing was measured on a medium of a known rate", err)
	}
	join := func(group string) {
		must(b, "join a control group", os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0))
	}
	b.Cleanup(func() {
		join(all)
		must(b, "remove a control group", os.Remove(group))
	})
	var st syscall.Stat_t
	must(b, "look at a device", syscall.Stat(dev, &st))
	for file, rate := range map[string]int{"write_bps_device": flashWrite, "read_bps_device": flashRead} {
		limit := fmt.Appendf(nil, "%d:%d %d", unix.Major(st.Rdev), unix.Minor(st.Rdev), rate)
		must(b, "limit a device", os.WriteFile(filepath.Join(group, "blkio.throttle."+file), limit, 0))
	}
	return func(on bool) {
		if on {
			join(group)
		} else {
			join(all)
		}
	}
}
