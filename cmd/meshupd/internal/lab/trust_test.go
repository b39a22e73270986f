package lab_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify/publish"
)

// A vendor's release key is stolen. With the command line alone the vendor puts a
// new key in its place and begins a new line; devices that were built with the old
// trust learn it from one stick and from each other, and the thief's release,
// with the highest number there is, is worth nothing to any of them.
func TestStolenKeyIsReplacedAcrossTheSite(t *testing.T) {
	l := newLab(t)
	ctx := within(t, 3*time.Minute)
	for _, name := range []string{"one", "two", "three"} {
		add(t, l, lab.DeviceConfig{Name: name})
	}
	startAll(t, ctx, l)
	one, three := l.Devices[0], l.Devices[2]
	if _, err := one.Import(ctx, bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "1.5.0", Seq: 5})); err != nil {
		t.Fatal(err)
	}
	for _, d := range l.Devices {
		confirmed(t, ctx, d, "1.5.0")
	}

	// The thief first: what the stolen key signs is believed, as it has to be.
	stolen := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "6.6.6", Seq: 1<<53 - 1, Seed: 666})
	if _, err := one.Import(ctx, stolen); err != nil {
		t.Fatal(err)
	}
	for _, d := range l.Devices {
		confirmed(t, ctx, d, "6.6.6")
	}

	sh := newShell(t)
	secret, err := l.Vendor.Key.SecretArmored()
	if err != nil {
		t.Fatal(err)
	}
	sh.write("old.sec.asc", string(secret), 0o600)
	sh.write("rootfs", strings.Repeat("the answer to the theft\n", 50_000), 0o644)
	if err := os.CopyFS(filepath.Join(sh.dir, "trust"), os.DirFS(l.Vendor.Anchor())); err != nil {
		t.Fatal(err)
	}
	sh.run(ctx, `
meshupd key new --name="New Releases" --out=new --no-passphrase
meshupd trust next trust --add-release=new.pub.asc --drop-release=`+l.Vendor.Key.Fingerprint()+` --raise-line
meshupd trust sign trust --key=old.sec.asc
meshupd release create --version=7.0.0 --trust=trust --image=rootfs
meshupd release sign dist/lab-kiosk_7.0.0 --key=new.sec.asc
meshupd release verify dist/lab-kiosk_7.0.0 --trust=trust --explain
meshupd release pack dist/lab-kiosk_7.0.0 --out=answer.update
`)
	if _, err := three.Import(ctx, filepath.Join(sh.dir, "answer.update")); err != nil {
		t.Fatal(err)
	}
	for _, d := range l.Devices {
		confirmed(t, ctx, d, "7.0.0")
	}
	again := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "9.9.9", Seq: 1<<53 - 1, Seed: 999})
	for _, d := range l.Devices {
		before := snapshot(t, d)
		if code, out := tryImport(t, ctx, d, again); code != 6 {
			t.Errorf("%s takes the thief's next release: exit %d\n%s", d.Name, code, out)
		}
		if after := snapshot(t, d); len(after) != len(before) {
			t.Errorf("%s: the thief's next release left something behind", d.Name)
		}
	}
}
