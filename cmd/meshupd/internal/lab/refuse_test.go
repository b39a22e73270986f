package lab_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify/publish"
)

// A technician plugs in everything that must not work, one after the other, at
// a real daemon. Each is refused with its code and exit number, and afterwards
// not a byte of what the device keeps has changed; then the good one works.
func TestRefusedSticksLeaveNothing(t *testing.T) {
	l := newLab(t)
	ctx := within(t, 3*time.Minute)
	d := add(t, l, lab.DeviceConfig{Name: "kiosk"})
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	old := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "1.5.0", Seq: 1})
	if _, err := d.Import(ctx, old); err != nil {
		t.Fatal(err)
	}
	newer := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "2.0.0", Seq: 3})
	first := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "1.6.0", Seq: 2})
	if _, err := d.Import(ctx, first); err != nil {
		t.Fatal(err)
	}
	confirmed(t, ctx, d, "1.6.0")

	for _, c := range badSticks(t, ctx, l, old, newer) {
		before := snapshot(t, d)
		code, out := tryImport(t, ctx, d, c.path)
		if code != c.exit || !strings.Contains(out, c.code) {
			t.Errorf("%s: exit %d, want %d with %s:\n%s", c.what, code, c.exit, c.code, out)
		}
		if after := snapshot(t, d); !maps.Equal(before, after) {
			t.Errorf("%s: what the device keeps changed:\n%v\n%v", c.what, before, after)
		}
	}
	if _, err := d.Import(ctx, newer); err != nil {
		t.Fatalf("after all that, the good stick: %v", err)
	}
	confirmed(t, ctx, d, "2.0.0")
}

type badStick struct {
	what, path, code string
	exit             int
}

func badSticks(t *testing.T, ctx context.Context, l *lab.Lab, old, good string) []badStick {
	t.Helper()
	stranger, err := publish.NewVendor(t.TempDir(), lab.Product)
	if err != nil {
		t.Fatal(err)
	}
	other, err := publish.NewVendor(t.TempDir(), "another-product")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	changed := func(name string, b []byte) string {
		path := filepath.Join(dir, name+".update")
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flipped := bytes.Clone(raw)
	flipped[len(flipped)-100_000] ^= 1 // in the image
	product := bytes.Replace(bytes.Clone(raw), []byte(`"2.0.0"`), []byte(`"2.0.1"`), 1)
	if bytes.Equal(product, raw) {
		t.Fatal("the manifest holds no version to change")
	}
	return []badStick{
		{"another vendor's release", bundleOf(t, ctx, stranger, publish.VendorRelease{Version: "3.0.0", Seq: 9}), "E-", 6},
		{"another product's release", bundleOf(t, ctx, other, publish.VendorRelease{Version: "3.0.0", Seq: 9}), "E-", 6},
		{"an older release", old, "E-ORDER", 6},
		{"a changed manifest", changed("manifest", product), "E-SIG-BAD", 6},
		{"a flipped bit in the image", changed("flipped", flipped), "E-DIGEST", 6},
		{"half a file", changed("half", raw[:len(raw)/2]), "E-TRUNCATED", 6},
		{"a file that ends in the head", changed("head", raw[:2000]), "E-", 6},
		{"more than belongs there", changed("long", append(bytes.Clone(raw), []byte("and then some")...)), "E-BUNDLE", 6},
		{"no release at all", changed("noise", bytes.Repeat([]byte("noise"), 4000)), "E-", 6},
		{"a file that is not there", filepath.Join(dir, "none.update"), "E-NOT-FOUND", 5},
	}
}

func bundleOf(t *testing.T, ctx context.Context, v *publish.Vendor, r publish.VendorRelease) string {
	t.Helper()
	path, err := v.Bundle(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func confirmed(t *testing.T, ctx context.Context, d *lab.Device, version string) {
	t.Helper()
	if _, err := d.Until(ctx, func(st control.SiteStatus) bool {
		self := lab.Self(st)
		return self.State == control.StateConfirmed && self.Version == version
	}); err != nil {
		t.Fatal(err)
	}
}

func tryImport(t *testing.T, ctx context.Context, d *lab.Device, path string) (int, string) {
	t.Helper()
	out, err := exec.CommandContext(ctx, binary, "import", "--socket", d.Socket, path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit == nil {
		return 0, string(out)
	}
	return exit.ExitCode(), string(out)
}

// snapshot hashes every file that the device keeps: state, store and slots.
func snapshot(t *testing.T, d *lab.Device) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, dir := range []string{"state", "slots"} {
		err := filepath.WalkDir(filepath.Join(d.Dir, dir), func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			files[strings.TrimPrefix(path, d.Dir)] = fmt.Sprintf("%d bytes %x", len(raw), sha256.Sum256(raw))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}
