package lab_test

import (
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/lab"
	"meshupd/verify/publish"
)

// A mixed site: the stick holds images for two kinds of hardware. The device
// that had it is taken away before the first device of the other kind comes; a
// neighbour that cannot install that image has fetched it to hand it on.
func TestANeighbourHandsOnWhatItCannotInstall(t *testing.T) {
	l := newLab(t)
	ctx := within(t, 3*time.Minute)
	stick := add(t, l, lab.DeviceConfig{Name: "stick", Hardware: "rev-a"})
	relay := add(t, l, lab.DeviceConfig{Name: "relay", Hardware: "rev-a", Relay: "64MiB"})
	late := add(t, l, lab.DeviceConfig{Name: "late", Hardware: "rev-b"})
	for _, d := range []*lab.Device{stick, relay} {
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
	}
	bundle := bundleOf(t, ctx, l.Vendor, publish.VendorRelease{Version: "2.0.0", Images: []publish.VendorImage{
		{Name: lab.ImageName, Hardware: []string{"rev-a"}, Size: 2 << 20, Seed: 1},
		{Name: "other", Hardware: []string{"rev-b"}, Size: 3 << 20, Seed: 2},
	}})
	rel, err := publish.Verify(ctx, bundle, l.Vendor.Anchor(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stick.Import(ctx, bundle); err != nil {
		t.Fatal(err)
	}
	confirmed(t, ctx, relay, "2.0.0")
	whenHeld(t, ctx, []*lab.Device{relay}, rel.Manifest().Images[1].SHA256)
	if err := stick.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := late.Start(); err != nil {
		t.Fatal(err)
	}
	st, err := late.Until(ctx, func(st control.SiteStatus) bool { return lab.Self(st).Version == "2.0.0" })
	if err != nil {
		t.Fatal(err)
	}
	if d := lab.Self(st); d.State != control.StateConfirmed && d.State != control.StateTrial {
		t.Errorf("the late device is %s", d.State)
	}
}
