package verify_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// BenchmarkBundleAgainstSHA256 verifies a bundle of 64 MiB from memory in one pass
// and compares with a plain SHA-256 over the same bytes in the same run. sha256/x
// is the share of the plain rate that is reached.
func BenchmarkBundleAgainstSHA256(b *testing.B) {
	v := verifytest.NewVendor(b, "bench")
	raw := readFile(b, v.Bundle(b, verifytest.Opts{Size: 64 << 20}))
	door := v.Door(b)
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	var plain, whole time.Duration
	for b.Loop() {
		begin := time.Now()
		h := sha256.New()
		if _, err := io.CopyBuffer(h, onlyReader{bytes.NewReader(raw)}, make([]byte, 256<<10)); err != nil {
			b.Fatal(err)
		}
		plain += time.Since(begin)
		begin = time.Now()
		bundle, err := verify.OpenBundle(bytes.NewReader(raw))
		if err != nil {
			b.Fatal(err)
		}
		rel, err := door.Check(b.Context(), bundle.Head())
		if err != nil {
			b.Fatal(err)
		}
		for {
			_, r, err := bundle.NextImage(rel)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.CopyBuffer(onlyWriter{io.Discard}, r, make([]byte, 256<<10)); err != nil {
				b.Fatal(err)
			}
		}
		whole += time.Since(begin)
	}
	b.ReportMetric(float64(plain)/float64(whole), "sha256/x")
}

type onlyReader struct{ io.Reader }

type onlyWriter struct{ io.Writer }
