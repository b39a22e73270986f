package verifytest_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func TestVendorMakesWhatDevicesBelieve(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	rel, data := v.Verified(t, verifytest.Opts{})
	img := rel.Manifest().Images[0]
	if sha256.Sum256(data) != img.SHA256 || int64(len(data)) != img.Size {
		t.Fatal("the image is not the one in the manifest")
	}
	next, _ := v.Verified(t, verifytest.Opts{Channel: "beta", Hardware: []string{"rev-2"}})
	if next.Compare(rel) != 1 || next.Manifest().Channel != "beta" || next.Manifest().Version != "1.2.0" {
		t.Fatalf("the second release is %+v", next.Manifest())
	}
}

func TestSeedDecidesTheBytes(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	_, a := v.Verified(t, verifytest.Opts{Seed: 7, Size: 100})
	_, b := v.Verified(t, verifytest.Opts{Seed: 7, Size: 100})
	_, c := v.Verified(t, verifytest.Opts{Seed: 8, Size: 100})
	if !bytes.Equal(a, b) || bytes.Equal(a, c) {
		t.Fatal("the seed does not decide the bytes")
	}
}

func TestTamperedBundleIsRefused(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	path := verifytest.Tamper(t, v.Bundle(t, verifytest.Opts{}), func(raw []byte) []byte { return raw[:700] })
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := verify.OpenBundle(f); verify.CodeOf(err) != verify.CodeTruncated {
		t.Fatalf("got %v, want E-TRUNCATED", err)
	}
}
