package peer

import (
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func TestChoose(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	known := map[string]*verify.Release{}
	add := func(name string, o verifytest.Opts) *verify.Release {
		known[name], _ = v.Verified(t, o)
		return known[name]
	}
	low := add("1.1", verifytest.Opts{Seq: 1, Version: "1.1.0"})
	mid := add("1.5", verifytest.Opts{Seq: 2, Version: "1.5.0", Requires: ">=1.1.0", Via: &verify.Via{Version: "1.1.0", SHA256: low.ID()}})
	add("2.4", verifytest.Opts{Seq: 3, Version: "2.4.0", Requires: ">=1.5.0", Via: &verify.Via{Version: "1.5.0", SHA256: mid.ID()}})
	add("2.5", verifytest.Opts{Seq: 4, Version: "2.5.0"})
	add("rev2", verifytest.Opts{Seq: 5, Version: "2.6.0", Hardware: []string{"rev-2*"}})
	add("beta", verifytest.Opts{Seq: 6, Version: "2.7.0", Channel: "beta"})
	add("down", verifytest.Opts{Seq: 7, Version: "1.0.0"})
	add("down on purpose", verifytest.Opts{Seq: 8, Version: "1.0.0", Downgrade: true})
	for _, x := range []struct {
		name      string
		known     []string
		running   string // name of the release; "" factory
		version   string
		floor     uint64
		withdrawn string
		failed    string
		want      string
		target    Target
		code      verify.Code
	}{
		{name: "nothing known", want: "", target: TargetNone},
		{name: "the newest", known: []string{"1.1", "2.5"}, version: "1.0.0", want: "2.5", target: TargetNew},
		{name: "runs it", known: []string{"1.1", "2.5"}, running: "2.5", version: "2.5.0", floor: 4, want: "2.5", target: TargetRunning},
		{name: "failed", known: []string{"1.1", "2.5"}, running: "1.1", version: "1.1.0", failed: "2.5", want: "2.5", target: TargetFailed},
		{name: "other hardware and channel", known: []string{"2.5", "rev2", "beta"}, version: "1.0.0", want: "2.5", target: TargetNew},
		{name: "only for others", known: []string{"rev2", "beta"}, version: "1.0.0", target: TargetNone},
		{name: "through the version in between", known: []string{"1.1", "1.5", "2.4"}, version: "1.1.0", want: "1.5", target: TargetNew},
		{name: "through two", known: []string{"1.1", "1.5", "2.4"}, version: "1.0.0", want: "1.1", target: TargetNew},
		{name: "the last step", known: []string{"1.1", "1.5", "2.4"}, running: "1.5", version: "1.5.0", floor: 2, want: "2.4", target: TargetNew},
		{name: "the version in between is not here", known: []string{"2.4"}, version: "1.1.0", want: "2.4", target: TargetUnfit, code: verify.CodeRequires},
		{name: "the version in between failed", known: []string{"1.5", "2.4"}, version: "1.1.0", failed: "1.5", want: "1.5", target: TargetFailed},
		{name: "the version in between is withdrawn", known: []string{"1.5", "2.4"}, version: "1.1.0", withdrawn: "1.5", want: "2.4", target: TargetUnfit, code: verify.CodeRequires},
		{name: "a downgrade", known: []string{"down"}, version: "2.0.0", want: "down", target: TargetUnfit, code: verify.CodeDowngrade},
		{name: "a downgrade on purpose", known: []string{"down", "down on purpose"}, version: "2.0.0", want: "down on purpose", target: TargetNew},
		{name: "below the floor", known: []string{"1.1"}, version: "2.0.0", floor: 4, target: TargetNone},
		{name: "the newest is withdrawn", known: []string{"1.1", "2.5"}, version: "1.0.0", withdrawn: "2.5", want: "1.1", target: TargetNew},
		{name: "runs what is withdrawn", known: []string{"1.1", "2.5"}, running: "2.5", version: "2.5.0", floor: 4, withdrawn: "2.5", want: "1.1", target: TargetNew},
		{name: "runs what is withdrawn, and the older failed", known: []string{"1.1", "2.5"}, running: "2.5", version: "2.5.0", floor: 4, withdrawn: "2.5", failed: "1.1",
			target: TargetUnfit, code: verify.CodeRecalled},
		{name: "runs what is withdrawn, and there is a newer one", known: []string{"1.1", "2.4", "2.5"}, running: "2.4", version: "2.4.0", floor: 3, withdrawn: "2.4", want: "2.5", target: TargetNew},
		{name: "runs what is withdrawn, alone", known: []string{"beta"}, running: "2.5", version: "2.5.0", floor: 4, withdrawn: "2.5", target: TargetUnfit, code: verify.CodeRecalled},
		{name: "went back below the floor", known: []string{"1.1"}, running: "1.1", version: "1.1.0", floor: 4, want: "1.1", target: TargetRunning},
	} {
		t.Run(x.name, func(t *testing.T) {
			is := func(name string) func(verify.Digest) bool {
				return func(d verify.Digest) bool { return name != "" && known[name].ID() == d }
			}
			c := choice{dev: verify.Device{Product: "kiosk-a", Hardware: "rev-1", Channel: "stable", Running: x.version},
				counters: verify.Counters{Line: 1, Floor: x.floor}, withdrawn: is(x.withdrawn), failed: is(x.failed)}
			for _, name := range x.known {
				c.known = append(c.known, known[name])
			}
			if x.running != "" {
				c.running = known[x.running].ID()
			}
			rel, target, err := choose(c)
			got := ""
			for name, r := range known {
				if rel != nil && r.ID() == rel.ID() {
					got = name
				}
			}
			if got != x.want || target != x.target || verify.CodeOf(err) != x.code {
				t.Errorf("chose %q, %d, %v; want %q, %d, %q", got, target, err, x.want, x.target, x.code)
			}
		})
	}
}

func TestKeepers(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	var all []*verify.Release
	for n := range 25 {
		o := verifytest.Opts{Seq: uint64(n + 1), Size: 100}
		if n == 24 {
			o.Requires, o.Via = ">=1.3.0", &verify.Via{Version: "1.3.0", SHA256: all[2].ID()}
		}
		rel, _ := v.Verified(t, o)
		all = append(all, rel)
	}
	keep := keepers(all, verify.Counters{Line: 1, Floor: 2}, all[0].ID(), verify.Digest{})
	if len(keep) != maxKept {
		t.Errorf("%d are kept", len(keep))
	}
	for n, want := range map[int]bool{0: true, 2: true, 1: false, 3: false, 5: false, 24: true, 23: true} {
		if keep[all[n].ID()] != want {
			t.Errorf("release %d kept: %v", n+1, !want)
		}
	}
	keep = keepers(all[:20], verify.Counters{Line: 1, Floor: 20}, all[18].ID(), all[19].ID())
	if len(keep) != 2 {
		t.Errorf("%d are kept above the floor", len(keep))
	}
}
