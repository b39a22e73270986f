package verify_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/iotest"

	"meshupd/verify"
	"meshupd/verify/publish"
	"meshupd/verify/verifytest"
)

// The attacks of the published lists, by their names: The Update Framework
// specification 1.0.34 section 1.5.2, Uptane Standard 2.1 section 4, SUIT threat
// model RFC 9124 section 4.2. For each the answer, and that the device is as it was.

// target is a device with a state that must not change.
type target struct {
	t     *testing.T
	v     *verifytest.Vendor
	state string
	door  *verify.Door
}

func newTarget(t *testing.T) *target {
	v := verifytest.NewVendor(t, "kiosk-a")
	state := t.TempDir()
	return &target{t, v, state, v.DoorAt(t, state)}
}

// refuses says that taking the bundle is refused with the code, and leaves no trace.
func (a *target) refuses(raw []byte, want verify.Code) {
	a.t.Helper()
	before := snapshot(a.t, a.state)
	err := a.take(bytes.NewReader(raw))
	if verify.CodeOf(err) != want {
		a.t.Errorf("got %v (%s), want %s", err, verify.CodeOf(err), want)
	}
	if snapshot(a.t, a.state) != before {
		a.t.Error("the device is not as it was")
	}
	if _, err := takeFresh(a.t, a.v, a.door); err != nil {
		a.t.Errorf("the next good one is refused: %v", err)
	}
}

func (a *target) take(r io.Reader) error {
	b, err := verify.OpenBundle(r)
	if err != nil {
		return err
	}
	rel, err := a.door.Check(a.t.Context(), b.Head())
	if err != nil {
		return err
	}
	for {
		_, img, err := b.NextImage(rel)
		if errors.Is(err, io.EOF) {
			return a.door.Accept(rel)
		}
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, img); err != nil {
			return err
		}
	}
}

// takeFresh checks a new good release without accepting it.
func takeFresh(t *testing.T, v *verifytest.Vendor, door *verify.Door) (*verify.Release, error) {
	b, err := verify.OpenBundle(bytes.NewReader(readFile(t, v.Bundle(t, verifytest.Opts{}))))
	if err != nil {
		return nil, err
	}
	return door.Check(t.Context(), b.Head())
}

func (a *target) bundle(o verifytest.Opts) []byte { return readFile(a.t, a.v.Bundle(a.t, o)) }

func TestTUFArbitrarySoftware(t *testing.T) {
	a, stranger := newTarget(t), verifytest.NewVendor(t, "kiosk-a")
	a.refuses(readFile(t, stranger.Bundle(t, verifytest.Opts{})), verify.CodeSigKey)
	files := untar(t, a.bundle(verifytest.Opts{}))
	i := find(t, files, "images/")
	files[i].data = bytes.Repeat([]byte{1}, len(files[i].data))
	a.refuses(retar(t, files), verify.CodeDigest)
	files = untar(t, a.bundle(verifytest.Opts{}))
	files = remove(files, find(t, files, "manifest.sig"))
	a.refuses(retar(t, files), verify.CodeSigNone)
}

func TestTUFEndlessData(t *testing.T) {
	a := newTarget(t)
	raw := a.bundle(verifytest.Opts{})
	for name, r := range map[string]io.Reader{
		"after the end":     io.MultiReader(bytes.NewReader(raw), endless{}),
		"from the start":    endless{},
		"inside the images": io.MultiReader(bytes.NewReader(raw[:len(raw)-4096]), endless{1}),
	} {
		c := &counted{r: r}
		if err := a.take(c); verify.CodeOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if limit := int64(len(raw)) + 2<<20; c.n > limit {
			t.Errorf("%s: %d bytes were read, more than %d", name, c.n, limit)
		}
	}
	files := untar(t, raw)
	i := find(t, files, "images/")
	files[i].data = append(files[i].data, 0)
	a.refuses(retar(t, files), verify.CodeSize)
}

type endless struct{ b byte }

func (e endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = e.b
	}
	return len(p), nil
}

type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func TestTUFExtraneousDependencies(t *testing.T) {
	a := newTarget(t)
	// Nothing beside what was signed is taken along, whatever it is called.
	for _, name := range []string{"images/" + verify.Digest{1}.String(), "certs/" + verify.Digest(sha256.Sum256([]byte("x"))).String() + ".pgp", "install.sh", "../x"} {
		files := untar(t, a.bundle(verifytest.Opts{}))
		at := len(files)
		if name[:1] == "c" {
			at = find(t, files, "manifest.json")
		}
		a.refuses(retar(t, insert(files, at, plain(name, []byte("x")))), verify.CodeBundle)
	}
}

func TestTUFFastForward(t *testing.T) {
	TestRaisingTheLineRecoversAFleetWhoseSeqWasPushedToTheEnd(t)
	a := newTarget(t)
	_, err := verify.ParseUnverifiedManifest(bytes.Replace(untar(t, a.bundle(verifytest.Opts{}))[3].data, []byte(`"seq": 1`), []byte(`"seq": 9007199254740992`), 1))
	wantCode(t, err, verify.CodeFormat)
}

// A site that is fed nothing new cannot know; what it must not do is take the old
// for new, forget what it once heard, or believe a clock. Any newer word ends the freeze.
func TestTUFFreeze(t *testing.T) {
	a := newTarget(t)
	old, err := takeFresh(t, a.v, a.door)
	wantCode(t, err, "")
	wantCode(t, a.door.Accept(old), "")
	newer, err := takeFresh(t, a.v, a.door)
	wantCode(t, err, "")
	wantCode(t, a.door.Accept(newer), "")
	wantCode(t, a.door.Accept(old), verify.CodeOrder)
	wantCode(t, a.v.DoorAt(t, a.state).Accept(old), verify.CodeOrder)
}

// Parts of two releases, each well signed, make no third one (also Uptane: mixed bundles).
func TestTUFMixAndMatch(t *testing.T) {
	a := newTarget(t)
	one, two := untar(t, a.bundle(verifytest.Opts{})), untar(t, a.bundle(verifytest.Opts{}))
	for _, c := range []struct {
		part string
		want verify.Code
	}{{"manifest.json", verify.CodeSigBad}, {"manifest.sig", verify.CodeSigBad}, {"images/", verify.CodeBundle}} {
		mixed := append([]file{}, one...)
		mixed[find(t, mixed, c.part)] = two[find(t, two, c.part)]
		a.refuses(retar(t, mixed), c.want)
	}
	mixed := append([]file{}, one...)
	mixed[find(t, mixed, "pieces/")].data = two[find(t, two, "pieces/")].data
	a.refuses(retar(t, mixed), verify.CodeDigest)
}

func TestTUFRollback(t *testing.T) {
	a := newTarget(t)
	old := a.bundle(verifytest.Opts{Seq: 4})
	wantCode(t, a.take(bytes.NewReader(a.bundle(verifytest.Opts{Seq: 5}))), "")
	a.refuses(old, verify.CodeOrder)
	// Signed on purpose it is another release, with a place of its own.
	down := verifytest.Opts{Seq: 6, Version: "0.9.0", Downgrade: true}
	rel, _ := verifytest.Open(t, a.door, a.v.Bundle(t, down))
	dev := verify.Device{Product: "kiosk-a", Running: "1.5.0"}
	wantCode(t, rel.Fits(dev), "")
	down.Seq, down.Downgrade = 7, false
	rel, _ = verifytest.Open(t, a.door, a.v.Bundle(t, down))
	wantCode(t, rel.Fits(dev), verify.CodeDowngrade)
}

// The reader itself never waits for more than it needs, and a cut is a clean end;
// deadlines belong to whoever owns the wire.
func TestTUFSlowRetrieval(t *testing.T) {
	a := newTarget(t)
	raw := a.bundle(verifytest.Opts{})
	wantCode(t, a.take(iotest.OneByteReader(bytes.NewReader(raw[:60_000]))), verify.CodeTruncated)
	wantCode(t, a.take(iotest.DataErrReader(bytes.NewReader(raw))), "")
	err := a.take(iotest.TimeoutReader(bytes.NewReader(raw)))
	wantCode(t, err, verify.CodeIO)
	if !errors.Is(err, iotest.ErrTimeout) {
		t.Errorf("the reason is lost: %v", err)
	}
}

func TestTUFKeyCompromise(t *testing.T) {
	root, one, two, three := newKey(t, "Root"), newKey(t, "One"), newKey(t, "Two"), newKey(t, "Three")
	s := newSite(t)
	s.add(s.trust(s.set(1, root), s.set(2, one, two)), root)
	door := s.door(s.anchor(1), t.TempDir())
	// One stolen key of two is not enough; nor is it, twice.
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), one))
	wantCode(t, err, verify.CodeSigKey)
	_, err = door.Check(t.Context(), s.signed(s.manifest(1), one, one))
	wantCode(t, err, verify.CodeSigKey)
	// After the rotation the stolen one counts for nothing.
	s.add(s.trust(s.set(1, root), s.set(2, two, three)), root)
	_, err = door.Check(t.Context(), s.signed(s.manifest(1), one, two))
	wantCode(t, err, verify.CodeSigKey)
	_, err = door.Check(t.Context(), s.signed(s.manifest(1), three, two))
	wantCode(t, err, "")
	// Release keys cannot make trust documents.
	s.add(s.trust(s.set(1, two), s.set(1, two)), two, three)
	_, err = door.Check(t.Context(), s.signed(s.manifest(1), two))
	wantCode(t, err, verify.CodeTrust)
}

// CVE-2020-15163 (python-tuf): versions of the root may not be skipped.
func TestTUF_CVE_2020_15163_RootsAreNotSkipped(t *testing.T) {
	a, b := newKey(t, "A"), newKey(t, "B")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	door := s.door(s.anchor(1), t.TempDir())
	// The key of document 2 was stolen and document 3 drops it: nobody may jump from 1 to a forged 3.
	doc := s.trust(s.set(1, b), s.set(1, b))
	doc.Epoch = 3
	s.add(doc, b, a)
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), b))
	wantCode(t, err, verify.CodeTrust)
	if door.Trust().Epoch != 1 {
		t.Fatal("a document was skipped")
	}
}

// CVE-2020-25860 (RAUC): the bundle is swapped between check and use. There is no
// "between" here: the bytes that are hashed are those that the reader hands out.
func TestRAUC_CVE_2020_25860_BundleSwappedAfterTheCheck(t *testing.T) {
	a := newTarget(t)
	for round := range 50 {
		dir := a.v.Release(t, verifytest.Opts{Size: 70_000})
		b, err := verify.OpenFolder(dir)
		wantCode(t, err, "")
		rel, err := a.door.Check(t.Context(), b.Head())
		wantCode(t, err, "")
		image := filepath.Join(dir, filepath.FromSlash(verify.ImageName(rel.Manifest().Images[0].SHA256)))
		evil := bytes.Repeat([]byte{byte(round)}, 70_000)
		swap := func() {
			other := filepath.Join(dir, "other")
			if err := errors.Join(os.WriteFile(other, evil, 0o644), os.Rename(other, image)); err != nil {
				t.Fatal(err)
			}
		}
		if round%2 == 0 {
			swap() // after the manifest was checked
		}
		_, r, err := b.NextImage(rel)
		wantCode(t, err, "")
		var got bytes.Buffer
		_, err = io.CopyN(&got, r, 1000)
		wantCode(t, err, "")
		if round%2 == 1 {
			swap() // while it is read
		}
		_, err = io.Copy(&got, r)
		if err == nil && verify.Digest(sha256.Sum256(got.Bytes())) != rel.Manifest().Images[0].SHA256 {
			t.Fatal("other bytes than were signed came through")
		}
		if round%2 == 0 {
			wantCode(t, err, verify.CodeDigest)
		}
		b.Close()
	}
}

// Uptane: a partial bundle is not installed in part; a device takes every image or none.
func TestUptanePartialBundle(t *testing.T) {
	a := newTarget(t)
	files := untar(t, a.bundle(verifytest.Opts{Images: []verifytest.Image{{Name: "one", Size: 999}, {Name: "two", Size: 999}}}))
	a.refuses(retar(t, files[:len(files)-1]), verify.CodeBundle)
}

// RFC 9124 THREAT.IMG.INCOMPATIBLE and THREAT.IMG.EXPIRED.OFFLINE.
func TestSUITIncompatibleAndExpiredOffline(t *testing.T) {
	a := newTarget(t)
	rel, _ := verifytest.Open(t, a.door, a.v.Bundle(t, verifytest.Opts{Hardware: []string{"rev-1"}}))
	wantCode(t, rel.Fits(verify.Device{Product: "kiosk-a", Hardware: "rev-2"}), verify.CodeHardware)
	wantCode(t, rel.Fits(verify.Device{Product: "kiosk-b", Hardware: "rev-1"}), verify.CodeProduct)
	key := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, key), s.set(1, key)), key)
	door := s.door(s.anchor(1), t.TempDir())
	doc := s.trust(s.set(1, key), s.set(1, key))
	doc.MinSeq = 4
	s.add(doc, key)
	// Newer than what a device that was away long has, and yet too old for the publisher.
	_, err := door.Check(t.Context(), s.signed(s.manifest(3), key))
	wantCode(t, err, verify.CodeOrder)
}

// A development key is for trying out: real devices give nothing for it.
func TestDevelopmentKeysDoNotReachStable(t *testing.T) {
	dev, err := publish.NewKey(publish.KeyOptions{Name: "Acme", Development: true, Now: day})
	wantCode(t, err, "")
	real := newKey(t, "Acme")
	s := newSite(t)
	s.add(s.trust(s.set(1, real), s.set(1, real, dev)), real)
	door := s.door(s.anchor(1), t.TempDir())
	stable, beta := s.manifest(1), s.manifest(1)
	beta.Channel = "beta"
	for _, c := range []struct {
		name    string
		m       verify.Manifest
		signers []*publish.SecretKey
		want    verify.Code
	}{
		{"stable by the development key", stable, []*publish.SecretKey{dev}, verify.CodeDevKey},
		{"stable by both", stable, []*publish.SecretKey{dev, real}, ""},
		{"beta by the development key", beta, []*publish.SecretKey{dev}, ""},
	} {
		_, err := door.Check(t.Context(), s.signed(c.m, c.signers...))
		if verify.CodeOf(err) != c.want {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// Every rule is named with its verdict, and the last one is that of the door.
func TestExplainTellsEveryRule(t *testing.T) {
	a, b := newKey(t, "A"), newKey(t, "B")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	state := t.TempDir()
	door := s.door(s.anchor(1), state)
	dev := verify.Device{Product: "kiosk-a", Hardware: "x", Running: "0.9.0"}
	long := day.AddDate(-1, 0, 0)
	cases := map[string]func(m *verify.Manifest){
		"":              func(*verify.Manifest) {},
		"signatures":    nil,
		"product":       func(m *verify.Manifest) { m.Product = "kiosk-b" },
		"trust epoch":   func(m *verify.Manifest) { m.TrustEpoch = 2 },
		"line":          func(m *verify.Manifest) { m.Line = 2 },
		"release_until": func(m *verify.Manifest) { m.IssuedAt = day.AddDate(9, 0, 0) },
		"not_after":     func(m *verify.Manifest) { m.NotAfter, m.IssuedAt = &long, long },
		"this device":   func(m *verify.Manifest) { m.Requires = ">=1.0.0" },
		"piece tables":  func(m *verify.Manifest) { m.Images[0].Size, m.Images[0].Content.Size = 1<<20, 1<<20 },
		"order":         func(m *verify.Manifest) { m.Seq = 3 },
	}
	accepted, err := door.Check(t.Context(), s.signed(s.manifest(4), a))
	wantCode(t, err, "")
	wantCode(t, door.Accept(accepted), "")
	before := snapshot(t, state)
	for rule, change := range cases {
		m, key := s.manifest(5), a
		m.Images = append([]verify.Image{}, m.Images...)
		if change == nil {
			key = b
		} else {
			change(&m)
		}
		rel, rules, err := door.Explain(t.Context(), s.signed(m, key), dev)
		if len(rules) != 14 {
			t.Fatalf("%q: %d rules", rule, len(rules))
		}
		refused := ""
		for i, r := range rules {
			switch {
			case r.Verdict == verify.VerdictRefused && refused == "":
				refused = r.Name
				if r.Code == "" || r.Code != verify.CodeOf(err) || r.Detail == "" {
					t.Errorf("%q: %+v beside %v", rule, r, err)
				}
			case refused == "" && r.Verdict != verify.VerdictGood, refused != "" && r.Verdict != verify.VerdictNotReached:
				t.Errorf("%q: rule %d is %+v", rule, i, r)
			}
		}
		if refused != rule || (err == nil) != (rule == "") || (rel == nil) != (err != nil) {
			t.Errorf("refused by %q (%v), want %q", refused, err, rule)
		}
	}
	if snapshot(t, state) != before {
		t.Error("an explanation left a trace")
	}
}
