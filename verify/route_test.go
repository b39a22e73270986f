package verify_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func id(s string) (d verify.Digest) { copy(d[:], s); return d }

// country is a set of manifests by the name that stands for their digest; unlike
// real digests these can form circles.
type country map[string]verify.Manifest

func (c country) add(t testing.TB, name, version, requires, via string) {
	m := newSite(t).manifest(1)
	m.Version, m.Requires = version, requires
	if via != "" {
		at, viaVersion, _ := strings.Cut(via, "@")
		m.Via = &verify.Via{Version: viaVersion, SHA256: id(at)}
	}
	c[name] = m
}

func (c country) find(d verify.Digest) (verify.Manifest, bool) {
	m, ok := c[strings.TrimRight(string(d[:]), "\x00")]
	return m, ok
}

func TestRoute(t *testing.T) {
	c := country{}
	c.add(t, "plain", "2.4.0", "", "")
	c.add(t, "goal", "2.4.0", ">=1.5.0", "mid@1.5.0")
	c.add(t, "mid", "1.5.0", ">=1.2.0", "low@1.2.0")
	c.add(t, "low", "1.2.0", "", "")
	c.add(t, "no way", "2.4.0", ">=2.0.0", "")
	c.add(t, "missing", "2.4.0", ">=2.0.0", "nowhere@2.0.0")
	c.add(t, "useless", "2.4.0", ">=2.0.0", "low@1.2.0")
	c.add(t, "misnamed", "2.4.0", ">=1.1.0", "low@1.3.0")
	c.add(t, "circle", "2.4.0", ">=2.0.0", "circle2@2.1.0")
	c.add(t, "circle2", "2.1.0", ">=2.0.0", "circle@2.4.0")
	c.add(t, "itself", "2.4.0", ">=2.4.0", "itself@2.4.0")
	for n := range 40 {
		c.add(t, fmt.Sprint("long", n), fmt.Sprintf("2.%d.0", 100-n), fmt.Sprintf(">=2.%d.0", 99-n), fmt.Sprintf("long%d@2.%d.0", n+1, 99-n))
	}
	beta := newSite(t).manifest(1)
	beta.Version, beta.Channel = "1.5.0", "beta"
	c["beta"] = beta
	c.add(t, "via beta", "2.4.0", ">=1.5.0", "beta@1.5.0")
	for _, x := range []struct {
		goal, running string
		want          string
		code          verify.Code
		says          string
	}{
		{"plain", "1.0.0", "plain", "", ""},
		{"goal", "1.5.0", "goal", "", ""},
		{"goal", "2.0.0", "goal", "", ""},
		{"goal", "1.2.0", "mid goal", "", ""},
		{"goal", "1.0.0", "low mid goal", "", ""},
		{"goal", "3.0.0", "", verify.CodeDowngrade, "3.0.0"},
		{"goal", "", "low mid goal", "", ""},
		{"no way", "1.0.0", "", verify.CodeRequires, ">=2.0.0"},
		{"missing", "1.0.0", "", verify.CodeRequires, "2.0.0 to be installed first, which is not here"},
		{"useless", "1.0.0", "", verify.CodeRequires, "cannot be installed either"},
		{"misnamed", "1.0.0", "", verify.CodeRequires, "that release is 1.2.0"},
		{"circle", "1.0.0", "", verify.CodeRequires, "circle"},
		{"itself", "1.0.0", "", verify.CodeRequires, "circle"},
		{"long0", "1.0.0", "", verify.CodeRequires, "more than 16 steps"},
		{"via beta", "1.0.0", "", verify.CodeChannel, "beta"},
		{"unknown", "1.0.0", "", verify.CodeNotFound, ""},
	} {
		t.Run(x.goal+" from "+x.running, func(t *testing.T) {
			way, err := verify.Route(id(x.goal), c.find, verify.Device{Product: "kiosk-a", Channel: "stable", Running: x.running})
			wantCode(t, err, x.code)
			if err != nil && !strings.Contains(err.Error(), x.says) {
				t.Errorf("%q does not say %q", err, x.says)
			}
			var got []string
			for _, d := range way {
				got = append(got, strings.TrimRight(string(d[:]), "\x00"))
			}
			if strings.Join(got, " ") != x.want {
				t.Errorf("the way is %v, want %s", got, x.want)
			}
		})
	}
	if got := verify.Stones(c["goal"], c.find); !slices.Equal(got, []verify.Digest{id("mid"), id("low")}) {
		t.Errorf("stones %v", got)
	}
	if got := verify.Stones(c["circle"], c.find); len(got) != 2 {
		t.Errorf("stones of a circle %v", got)
	}
}

// What was accepted later shuts the door for older releases, except for those
// that the newest one itself says it has to go through.
func TestSteppingStonesStayWelcome(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	door := v.Door(t)
	take := func(o verifytest.Opts) *verify.Release {
		t.Helper()
		rel, _ := verifytest.Open(t, door, v.Bundle(t, o))
		return rel
	}
	low := take(verifytest.Opts{Seq: 10, Version: "1.2.0"})
	mid := take(verifytest.Opts{Seq: 20, Version: "1.5.0", Requires: ">=1.2.0", Via: &verify.Via{Version: "1.2.0", SHA256: low.ID()}})
	goal := take(verifytest.Opts{Seq: 30, Version: "2.4.0", Requires: ">=1.5.0", Via: &verify.Via{Version: "1.5.0", SHA256: mid.ID()}})
	other := take(verifytest.Opts{Seq: 25, Version: "1.9.0"})
	wantCode(t, door.Accept(goal), "")
	known := []*verify.Release{goal}
	find := func(d verify.Digest) (verify.Manifest, bool) {
		for _, rel := range known {
			if rel.ID() == d {
				return rel.Manifest(), true
			}
		}
		return verify.Manifest{}, false
	}
	wantCode(t, door.Accept(mid), verify.CodeOrder)
	wantCode(t, door.AllowVia(goal, mid, find), "")
	wantCode(t, door.AllowVia(goal, low, find), verify.CodeOrder) // named only by mid, which is not here yet
	known = append(known, mid)
	wantCode(t, door.AllowVia(goal, low, find), "")
	wantCode(t, door.AllowVia(goal, other, find), verify.CodeOrder)
	if got := door.Counters(); got.Accepted != 30 {
		t.Fatalf("a stepping stone moved the counters to %+v", got)
	}
	// Only the newest that was accepted has a say.
	newer := take(verifytest.Opts{Seq: 31, Version: "2.5.0"})
	wantCode(t, door.Accept(newer), "")
	wantCode(t, door.AllowVia(goal, mid, find), verify.CodeOrder)
	wantCode(t, door.AllowVia(newer, mid, find), verify.CodeOrder)
	recall := take(verifytest.Opts{Seq: 32, Version: "2.6.0", Requires: ">=1.5.0", Via: &verify.Via{Version: "1.5.0", SHA256: mid.ID()},
		Recalls: []verify.Digest{mid.ID()}})
	wantCode(t, door.Accept(recall), "")
	wantCode(t, door.AllowVia(recall, mid, find), verify.CodeRecalled)
}

func TestHardwarePatterns(t *testing.T) {
	for _, x := range []struct {
		pattern, hardware string
		want              bool
	}{
		{"rev-2", "rev-2", true}, {"rev-2", "rev-20", false}, {"rev-*", "rev-2", true}, {"rev-*", "rev-", true}, {"rev-*", "rev", false},
		{"rev-*", "xrev-2", false}, {"r*2", "rev-2", true}, {"r*2", "rev-23", false}, {"r*-*b", "rev-2-b", true}, {"r*-*b", "rev-2-c", false},
		{"rev-*", "REV-2", false}, {"rev-*", "", false},
	} {
		m := newSite(t).manifest(1)
		m.Hardware = []string{"other", x.pattern}
		if got := len(m.ImagesFor(x.hardware)) > 0; got != x.want {
			t.Errorf("%s for %q: %v", x.pattern, x.hardware, got)
		}
	}
	// Two images of one name need hardware that cannot be the same.
	for _, x := range []struct {
		a, b string
		want verify.Code
	}{
		{"rev-1*", "rev-2*", ""}, {"rev-*", "rev-2", verify.CodeFormat}, {"rev-*", "r*b", verify.CodeFormat},
		{"a*c", "a*b", ""}, {"a*", "b*", ""}, {"a*c*", "ab*", verify.CodeFormat},
	} {
		m := newSite(t).manifest(1)
		second := m.Images[0]
		second.SHA256, second.Content.SHA256 = verify.Digest{9}, verify.Digest{9}
		m.Images[0].Hardware, second.Hardware = []string{x.a}, []string{x.b}
		m.Images = append(m.Images, second)
		_, err := verify.EncodeManifest(m)
		if verify.CodeOf(err) != x.want {
			t.Errorf("%s and %s: %v, want %q", x.a, x.b, err, x.want)
		}
	}
}

func TestMinimumMeshupd(t *testing.T) {
	m := newSite(t).manifest(1)
	m.MinMeshupd = "1.4.0"
	for have, want := range map[string]verify.Code{
		"1.4.0": "", "v1.4.0": "", "1.10.0": "", "v2.0.0+dirty": "",
		"1.3.9": verify.CodeMeshupd, "1.4.0-rc.1": verify.CodeMeshupd, "": verify.CodeMeshupd, "(devel)": verify.CodeMeshupd,
		"v0.0.0-20260101000000-abcdefabcdef": verify.CodeMeshupd,
	} {
		if err := m.Fits(verify.Device{Product: "kiosk-a", Meshupd: have}); verify.CodeOf(err) != want {
			t.Errorf("with meshupd %q: %v, want %q", have, err, want)
		}
	}
}
