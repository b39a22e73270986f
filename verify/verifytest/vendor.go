// Package verifytest gives tests of every room a vendor with a real key, a trust
// anchor and small signed releases. Nothing in it is faked: what it hands out
// went through publish and verify.
package verifytest

import (
	"bytes"
	"io"
	"os"
	"testing"

	"meshupd/verify"
	"meshupd/verify/publish"
)

// Opts says how a release differs from the ordinary one; see publish.VendorRelease.
type Opts = publish.VendorRelease

// Image is one image of Opts.
type Image = publish.VendorImage

// Vendor is a publisher whose folder ends with the test.
type Vendor struct {
	*publish.Vendor
}

// NewVendor makes a vendor with a new key.
func NewVendor(t testing.TB, product string) *Vendor {
	t.Helper()
	v, err := publish.NewVendor(t.TempDir(), product)
	if err != nil {
		t.Fatalf("make a vendor: %v", err)
	}
	return &Vendor{v}
}

// Release creates a signed release folder.
func (v *Vendor) Release(t testing.TB, o Opts) string {
	t.Helper()
	dir, err := v.Vendor.Release(t.Context(), o)
	if err != nil {
		t.Fatalf("make a release: %v", err)
	}
	return dir
}

// Bundle creates a signed .update file.
func (v *Vendor) Bundle(t testing.TB, o Opts) string {
	t.Helper()
	path, err := v.Vendor.Bundle(t.Context(), o)
	if err != nil {
		t.Fatalf("make a bundle: %v", err)
	}
	return path
}

// Door opens the door of a new device that trusts the vendor.
func (v *Vendor) Door(t testing.TB) *verify.Door {
	t.Helper()
	return v.DoorAt(t, t.TempDir())
}

// DoorAt opens the door of the device whose state is in dir.
func (v *Vendor) DoorAt(t testing.TB, dir string) *verify.Door {
	t.Helper()
	d, err := verify.OpenDoor(verify.DoorConfig{Dir: dir, Anchor: v.Anchor(), Product: v.Product})
	if err != nil {
		t.Fatalf("open the door: %v", err)
	}
	return d
}

// Verified creates a release, takes it through the door of a new device, and
// returns it with the bytes of its first image.
func (v *Vendor) Verified(t testing.TB, o Opts) (*verify.Release, []byte) {
	t.Helper()
	rel, images := v.VerifiedImages(t, o)
	return rel, images[0]
}

// VerifiedImages is Verified with the bytes of every image, in the manifest's order.
func (v *Vendor) VerifiedImages(t testing.TB, o Opts) (*verify.Release, [][]byte) {
	t.Helper()
	return Open(t, v.Door(t), v.Bundle(t, o))
}

// Open takes a .update file through a door.
func Open(t testing.TB, door *verify.Door, path string) (*verify.Release, [][]byte) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := verify.OpenBundle(bytes.NewReader(raw))
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	rel, err := door.Check(t.Context(), bundle.Head())
	if err != nil {
		t.Fatalf("check %s: %v", path, err)
	}
	var images [][]byte
	for range rel.Manifest().Images {
		_, r, err := bundle.NextImage(rel)
		if err != nil {
			t.Fatalf("next image of %s: %v", path, err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("read an image of %s: %v", path, err)
		}
		images = append(images, data)
	}
	if _, _, err := bundle.NextImage(rel); err != io.EOF {
		t.Fatalf("after the last image of %s: %v, not io.EOF", path, err)
	}
	return rel, images
}

// Tamper copies a file to a new one with change applied to its bytes.
func Tamper(t testing.TB, path string, change func([]byte) []byte) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "tampered-*.update")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(change(bytes.Clone(raw))); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}
