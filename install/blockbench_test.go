package install_test

import (
	"crypto/sha256"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// BenchmarkBlockWrite compares the rate of a whole Write, up to the sync, with that of dd conv=fsync on the same file
// system in the same run. ratio is meshupd's rate divided by dd's; readback is the share of the time that reading back
// took. On a disk that is faster than this machine can hash, sha256-MiB/s is what bounds the rate.
func BenchmarkBlockWrite(b *testing.B) {
	const size = 256 << 20
	dir := b.TempDir()
	slots := [2]string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	for _, path := range slots {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			b.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			b.Fatal(err)
		}
	}
	image := filepath.Join(dir, "image")
	var ours, dds, back time.Duration
	for i := range b.N {
		if err := os.WriteFile(image, noise(uint64(i+1), size), 0o600); err != nil {
			b.Fatal(err)
		}
		rel, _ := verifytest.NewVendor(b, "bench").Verified(b, verifytest.Opts{Images: []verifytest.Image{{Name: "rootfs", Path: image}}})
		fw := grubFirmware(b)
		fw.at(1)
		var opened time.Time
		cfg := fw.config(filepath.Join(b.TempDir(), "state"))
		cfg.A, cfg.B = slots[0], slots[1]
		dev, err := install.OpenBlock(b.Context(), install.BlockTest{Step: func(name string, do func() error) error {
			if name == "image.open" {
				opened = time.Now()
			}
			return do()
		}}.With(cfg))
		if err != nil {
			b.Fatal(err)
		}
		dd := func() {
			start := time.Now()
			if out, err := exec.Command("dd", "if="+image, "of="+slots[1], "bs=1M", "conv=fsync,notrunc").CombinedOutput(); err != nil {
				b.Fatalf("dd: %v: %s", err, out)
			}
			dds += time.Since(start)
		}
		ddFirst := i%2 == 0 // neither always meets the warmer disk
		if ddFirst {
			dd()
			// The slot must not hold the image already.
			if err := os.WriteFile(slots[1], noise(uint64(i+1000), size), 0o600); err != nil {
				b.Fatal(err)
			}
			if out, err := exec.Command("sync", slots[1]).CombinedOutput(); err != nil {
				b.Fatalf("sync: %v: %s", err, out)
			}
		}
		start := time.Now()
		if err := dev.Write(b.Context(), rel, rel.Manifest().Images, func(verify.Image) (io.ReadCloser, error) { return os.Open(image) }, nil); err != nil {
			b.Fatal(err)
		}
		ours += opened.Sub(start)
		back += time.Since(opened)
		if !ddFirst {
			dd()
		}
	}
	data := noise(7, size)
	start := time.Now()
	sha256.Sum256(data)
	sums := time.Since(start)
	mib := float64(b.N) * size / (1 << 20)
	b.ReportMetric(mib/ours.Seconds(), "MiB/s")
	b.ReportMetric(mib/dds.Seconds(), "dd-MiB/s")
	b.ReportMetric(size/(1<<20)/sums.Seconds(), "sha256-MiB/s")
	b.ReportMetric(dds.Seconds()/ours.Seconds(), "ratio")
	b.ReportMetric(back.Seconds()/(ours+back).Seconds(), "readback")
}
