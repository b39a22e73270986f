package verify_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// document is an ordinary manifest as text, for cases that no encoder would write.
func document(t testing.TB) string {
	t.Helper()
	raw, err := verify.EncodeManifest(newSite(t).manifest(1))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestManifestIsReadStrictly(t *testing.T) {
	good := document(t)
	replace := func(old, new string) string {
		t.Helper()
		if !strings.Contains(good, old) {
			t.Fatalf("the manifest has no %s", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	field := func(text string) string { return replace(`"product"`, text+`, "product"`) }
	many := func(n int, one string) string {
		return "[" + strings.TrimSuffix(strings.Repeat(one+",", n), ",") + "]"
	}
	for _, c := range []struct {
		name, doc string
		want      verify.Code
	}{
		{"ordinary", good, ""},
		{"unknown field", field(`"colour": {"name": [1, 2.5, true]}`), ""},
		{"unknown critical field", field(`"critical": ["colour"], "colour": 1`), verify.CodeCritical},
		{"known critical field", field(`"critical": ["requires"]`), ""},
		{"critical recalls", field(`"critical": ["recalls", "min_meshupd"]`), ""},
		{"recalls", field(`"recalls": ["` + strings.Repeat("ab", 32) + `"]`), ""},
		{"recalls itself", field(`"recalls": ["` + digestOf(good) + `"]`), verify.CodeFormat},
		{"recalls nothing", field(`"recalls": ["` + strings.Repeat("00", 32) + `"]`), verify.CodeFormat},
		{"too many recalls", field(`"recalls": ` + many(1025, `"`+strings.Repeat("ab", 32)+`"`)), verify.CodeFormat},
		{"min_meshupd", field(`"min_meshupd": "1.2.0"`), ""},
		{"min_meshupd nonsense", field(`"min_meshupd": "new"`), verify.CodeFormat},
		{"hardware pattern", field(`"hardware": ["rev-*", "x1"]`), ""},
		{"hardware pattern for everything", field(`"hardware": ["*"]`), verify.CodeFormat},
		{"hardware pattern of stars", field(`"hardware": ["a*a*a*a*a*"]`), verify.CodeFormat},
		{"product with a dot at the end", replace("kiosk-a", "kiosk-a."), verify.CodeFormat},
		{"product with two dots", replace("kiosk-a", "kiosk..a"), verify.CodeFormat},
		{"product in another alphabet", replace("kiosk-a", "kiоsk-a"), verify.CodeFormat},
		{"product with a joiner", replace("kiosk-a", "kiosk\u200d-a"), verify.CodeFormat},
		{"product with a space", replace("kiosk-a", "kiosk-a "), verify.CodeFormat},
		{"channel in upper case", replace(`"stable"`, `"Stable"`), verify.CodeFormat},
		{"empty", "", verify.CodeFormat},
		{"not JSON", "hello", verify.CodeFormat},
		{"an array", "[]", verify.CodeFormat},
		{"cut", good[:len(good)-3], verify.CodeFormat},
		{"two documents", good + good, verify.CodeFormat},
		{"bytes after it", good + "x", verify.CodeFormat},
		{"byte order mark", "\ufeff" + good, verify.CodeFormat},
		{"bad UTF-8", replace("kiosk-a", "kiosk-\xff"), verify.CodeFormat},
		{"a key twice", field(`"seq": 7`), verify.CodeFormat},
		{"a key twice below", replace(`"length"`, `"length": 65536, "length"`), verify.CodeFormat},
		{"a key twice in an unknown field", field(`"x": {"a": 1, "a": 1}`), verify.CodeFormat},
		{"a key in another case", field(`"Seq": 7`), verify.CodeFormat},
		{"a key with a long s", field(`"iſſued_at": 7`), verify.CodeFormat},
		{"null", field(`"requires": null`), verify.CodeFormat},
		{"null in an unknown field", field(`"x": [null]`), verify.CodeFormat},
		{"nested too deep", field(`"x": ` + strings.Repeat("[", 20) + strings.Repeat("]", 20)), verify.CodeFormat},
		{"too many parts", field(`"x": ` + many(70_000, "1")), verify.CodeFormat},
		{"too long", good + strings.Repeat(" ", verify.MaxManifest), verify.CodeSize},
		{"wrong format", replace("meshupd.manifest/1", "meshupd.manifest/2"), verify.CodeFormat},
		{"product in upper case", replace("kiosk-a", "Kiosk-a"), verify.CodeFormat},
		{"product that climbs", replace("kiosk-a", "../kiosk"), verify.CodeFormat},
		{"product too long", replace("kiosk-a", strings.Repeat("k", 65)), verify.CodeFormat},
		{"empty channel", replace(`"stable"`, `""`), verify.CodeFormat},
		{"version with a v", replace(`"1.0.0"`, `"v1.0.0"`), verify.CodeFormat},
		{"version of two numbers", replace(`"1.0.0"`, `"1.0"`), verify.CodeFormat},
		{"version with a leading zero", replace(`"1.0.0"`, `"1.00.0"`), verify.CodeFormat},
		{"pre-release", replace(`"1.0.0"`, `"1.0.0-rc.1+b5"`), ""},
		{"seq zero", replace(`"seq": 1`, `"seq": 0`), verify.CodeFormat},
		{"seq negative", replace(`"seq": 1`, `"seq": -1`), verify.CodeFormat},
		{"seq with a fraction", replace(`"seq": 1`, `"seq": 1.0`), verify.CodeFormat},
		{"seq as text", replace(`"seq": 1`, `"seq": "1"`), verify.CodeFormat},
		{"largest seq", replace(`"seq": 1`, `"seq": 9007199254740991`), ""},
		{"seq too large", replace(`"seq": 1`, `"seq": 9007199254740992`), verify.CodeFormat},
		{"requires", field(`"requires": ">=1.2.0 <3.0.0"`), ""},
		{"requires nonsense", field(`"requires": "newer"`), verify.CodeFormat},
		{"date with an offset", replace("2026-03-02T00:00:00Z", "2026-03-02T00:00:00+02:00"), verify.CodeFormat},
		{"date with a fraction", replace("2026-03-02T00:00:00Z", "2026-03-02T00:00:00.5Z"), verify.CodeFormat},
		{"date that is none", replace("2026-03-02T00:00:00Z", "2026-02-30T00:00:00Z"), verify.CodeFormat},
		{"date missing", replace(`"issued_at": "2026-03-02T00:00:00Z",`, ""), verify.CodeFormat},
		{"note with an escape sequence", field(`"notes": ["\u001b[2J"]`), verify.CodeFormat},
		{"note of two lines", field(`"notes": ["a\n\tb"]`), ""},
		{"too many notes", field(`"notes": ` + many(65, `"a"`)), verify.CodeFormat},
		{"note too long", field(`"notes": ["` + strings.Repeat("a", 5000) + `"]`), verify.CodeFormat},
		{"no images", field(`"images": []`), verify.CodeFormat},
		{"unknown kind", replace(`"slot"`, `"moon"`), verify.CodeFormat},
		{"unknown encoding", replace(`"none"`, `"gzip"`), verify.CodeFormat},
		{"image name that climbs", replace(`"rootfs"`, `"../rootfs"`), verify.CodeFormat},
		{"image size zero", strings.ReplaceAll(good, `"size": 5`, `"size": 0`), verify.CodeFormat},
		{"image too large", strings.ReplaceAll(good, `"size": 5`, `"size": 1099511627777`), verify.CodeFormat},
		{"content differs", replace(`"size": 5,`, `"size": 6,`), verify.CodeFormat},
		{"piece length", replace("65536", "65535"), verify.CodeFormat},
		{"piece length too small", replace("65536", "8192"), verify.CodeFormat},
		{"piece length too large", replace("65536", "33554432"), verify.CodeFormat},
		{"digest in upper case", strings.Replace(good, digestOf(good), strings.ToUpper(digestOf(good)), 1), verify.CodeFormat},
		{"digest too short", strings.Replace(good, digestOf(good), digestOf(good)[:62], 1), verify.CodeFormat},
		{"via without digest", field(`"via": {"version": "1.0.0"}`), verify.CodeFormat},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := verify.ParseUnverifiedManifest([]byte(c.doc))
			wantCode(t, err, c.want)
		})
	}
}

// digestOf finds the first digest in a document.
func digestOf(doc string) string {
	i := strings.Index(doc, `"sha256": "`) + len(`"sha256": "`)
	return doc[i : i+64]
}

func TestManifestImagesDoNotClash(t *testing.T) {
	m := newSite(t).manifest(1)
	second := m.Images[0]
	second.SHA256, second.Content.SHA256 = verify.Digest{1}, verify.Digest{1}
	for _, c := range []struct {
		name   string
		change func(a, b *verify.Image)
		want   verify.Code
	}{
		{"one name for all hardware", func(a, b *verify.Image) {}, verify.CodeFormat},
		{"one name for two kinds of hardware", func(a, b *verify.Image) {
			a.Hardware, b.Hardware = []string{"rev-1"}, []string{"rev-2"}
		}, ""},
		{"one name and common hardware", func(a, b *verify.Image) {
			a.Hardware, b.Hardware = []string{"rev-1", "rev-2"}, []string{"rev-2"}
		}, verify.CodeFormat},
		{"two names", func(a, b *verify.Image) { b.Name = "boot" }, ""},
		{"one digest", func(a, b *verify.Image) {
			b.Name, b.SHA256, b.Content.SHA256 = "boot", a.SHA256, a.SHA256
		}, verify.CodeFormat},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := m.Images[0], second
			c.change(&a, &b)
			m := m
			m.Images = []verify.Image{a, b}
			_, err := verify.EncodeManifest(m)
			wantCode(t, err, c.want)
		})
	}
}

func TestEncodedManifestComesBackTheSame(t *testing.T) {
	m := newSite(t).manifest(1)
	m.Requires, m.Notes = ">=1.0.0", []string{"a <b> & c"}
	raw, err := verify.EncodeManifest(m)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(raw, []byte(">=1.0.0")) || !bytes.HasSuffix(raw, []byte("}\n")) {
		t.Fatalf("not written for people: %s", raw)
	}
	got, err := verify.ParseUnverifiedManifest(raw)
	if err != nil {
		t.Fatal(err)
	}
	again, err := verify.EncodeManifest(got)
	if err != nil || !bytes.Equal(again, raw) {
		t.Fatalf("came back as %s (%v)", again, err)
	}
}

func TestFits(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	via := &verify.Via{Version: "2.2.0", SHA256: verify.Digest{1}}
	any, _ := v.Verified(t, verifytest.Opts{Version: "2.4.0"})
	strict, _ := v.Verified(t, verifytest.Opts{Version: "2.4.0", Requires: ">=2.2.0", Via: via})
	back, _ := v.Verified(t, verifytest.Opts{Version: "1.0.0", Downgrade: true})
	mixed, _ := v.Verified(t, verifytest.Opts{Version: "2.4.0", Hardware: []string{"rev-1", "rev-2"}, Images: []verifytest.Image{
		{Name: "rootfs", Hardware: []string{"rev-1"}}, {Name: "rootfs", Hardware: []string{"rev-2"}}, {Name: "app", Kind: verify.KindFiles}}})
	dev := func(change func(*verify.Device)) verify.Device {
		d := verify.Device{Product: "kiosk-a", Hardware: "rev-1", Channel: "stable", Running: "2.3.0"}
		change(&d)
		return d
	}
	for i, c := range []struct {
		rel    *verify.Release
		change func(d *verify.Device)
		want   verify.Code
	}{
		{any, func(d *verify.Device) {}, ""},
		{any, func(d *verify.Device) { d.Product = "kiosk-b" }, verify.CodeProduct},
		{any, func(d *verify.Device) { d.Channel = "beta" }, verify.CodeChannel},
		{any, func(d *verify.Device) { d.Channel = "" }, ""},
		{any, func(d *verify.Device) { d.Running = "2.4.0" }, ""},
		{any, func(d *verify.Device) { d.Running = "2.4.1" }, verify.CodeDowngrade},
		{any, func(d *verify.Device) { d.Running = "2.10.0" }, verify.CodeDowngrade},
		{any, func(d *verify.Device) { d.Running = "2.4.0-rc.1" }, ""},
		{any, func(d *verify.Device) { d.Running = "" }, ""},
		{any, func(d *verify.Device) { d.Running = "factory" }, ""},
		{back, func(d *verify.Device) {}, ""},
		{strict, func(d *verify.Device) {}, ""},
		{strict, func(d *verify.Device) { d.Running = "2.2.0-rc.1" }, verify.CodeRequires},
		{strict, func(d *verify.Device) { d.Running = "2.3.0-rc.1" }, ""},
		{strict, func(d *verify.Device) { d.Running = "2.1.9" }, verify.CodeRequires},
		{strict, func(d *verify.Device) { d.Running = "" }, verify.CodeRequires},
		{mixed, func(d *verify.Device) {}, ""},
		{mixed, func(d *verify.Device) { d.Hardware = "rev-3" }, verify.CodeHardware},
		{any, func(d *verify.Device) { d.Takes = []verify.Kind{verify.KindContainer} }, verify.CodeKind},
		{mixed, func(d *verify.Device) { d.Takes = []verify.Kind{verify.KindSlot} }, verify.CodeKind},
		{mixed, func(d *verify.Device) { d.Takes = []verify.Kind{verify.KindSlot, verify.KindFiles} }, ""},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) { wantCode(t, c.rel.Fits(dev(c.change)), c.want) })
	}
	var names []string
	for _, img := range mixed.ImagesFor("rev-2") {
		names = append(names, img.Name+fmt.Sprint(img.Hardware))
	}
	if got := strings.Join(names, " "); got != "rootfs[rev-2] app[]" {
		t.Errorf("images for rev-2: %s", got)
	}
	if any.Compare(back) != -1 || back.Compare(any) != 1 || any.Compare(any) != 0 {
		t.Error("releases are not ordered by seq")
	}
	if err := strict.Fits(dev(func(d *verify.Device) { d.Running = "1.0.0" })); !strings.Contains(err.Error(), "2.2.0 first") {
		t.Errorf("the way through is not named: %v", err)
	}
}

func TestDigestHasOneSpelling(t *testing.T) {
	text := strings.Repeat("0a", 32)
	d, err := verify.ParseDigest(text)
	if err != nil || d.String() != text {
		t.Fatal(d, err)
	}
	for _, bad := range []string{"", text[1:], text + "0", strings.ToUpper(text), strings.Replace(text, "0", "g", 1)} {
		if _, err := verify.ParseDigest(bad); verify.CodeOf(err) != verify.CodeFormat {
			t.Errorf("%q: %v, want E-FORMAT", bad, err)
		}
	}
	if raw, err := json.Marshal(d); err != nil || string(raw) != `"`+text+`"` {
		t.Errorf("in JSON: %s, %v", raw, err)
	}
}
