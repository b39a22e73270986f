package peer

import (
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func TestRelaysStayWithinQuotaAndNewestFirst(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk")
	mixed := func(seq uint64, sizeB int64) *verify.Release {
		rel, _ := v.VerifiedImages(t, verifytest.Opts{Seq: seq, Images: []verifytest.Image{
			{Name: "a", Hardware: []string{"rev-a"}, Size: 1000, Seed: seq*10 + 1},
			{Name: "b", Hardware: []string{"rev-b"}, Size: sizeB, Seed: seq*10 + 2},
		}})
		return rel
	}
	old, middle, newest := mixed(1, 5000), mixed(2, 6000), mixed(3, 7000)
	known := []*verify.Release{middle, newest, old}
	names := func(list []relayed) (sizes []int64) {
		for _, r := range list {
			if r.img.Name != "b" {
				t.Errorf("relays %s, which is the device's own", r.img.Name)
			}
			sizes = append(sizes, r.img.Size)
		}
		return sizes
	}
	for _, c := range []struct {
		quota int64
		floor uint64
		want  []int64
	}{
		{0, 0, nil},
		{6999, 0, []int64{6000}}, // the newest does not fit, the next does
		{7000, 0, []int64{7000}},
		{13000, 0, []int64{7000, 6000}},
		{1 << 30, 0, []int64{7000, 6000, 5000}},
		{1 << 30, 2, []int64{7000, 6000}}, // below the floor nobody may go
	} {
		got := names(relays(known, "rev-a", verify.Counters{Line: newest.Manifest().Line, Floor: c.floor}, c.quota))
		if len(got) != len(c.want) {
			t.Errorf("quota %d floor %d: %v, want %v", c.quota, c.floor, got, c.want)
			continue
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("quota %d floor %d: %v, want %v", c.quota, c.floor, got, c.want)
			}
		}
	}
}
