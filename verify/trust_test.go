package verify_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/publish"
)

var day = time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)

func newKey(t testing.TB, name string) *publish.SecretKey {
	t.Helper()
	k, err := publish.NewKey(publish.KeyOptions{Name: name, Now: day})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// site builds chains of trust documents and heads by hand, so that it can build wrong ones too.
type site struct {
	t     testing.TB
	files []file // trust documents and signatures
	certs map[verify.Digest][]byte
}

func newSite(t testing.TB) *site { return &site{t: t, certs: map[verify.Digest][]byte{}} }

func (s *site) set(threshold int, keys ...*publish.SecretKey) verify.KeySet {
	set := verify.KeySet{Threshold: threshold}
	for _, k := range keys {
		c := k.Certificate()
		s.certs[c.Digest()] = c.Bytes()
		set.Keys = append(set.Keys, verify.KeyRef{Fingerprint: c.Fingerprint(), Cert: c.Digest()})
	}
	return set
}

// trust is an ordinary document for the next place in the chain.
func (s *site) trust(root, release verify.KeySet) verify.TrustDocument {
	return verify.TrustDocument{
		Format: verify.TrustFormat, Product: "kiosk-a", Epoch: uint64(len(s.files)/2 + 1), Root: root, Release: release,
		Line: 1, MinSeq: 1, IssuedAt: day, ReleaseUntil: day.AddDate(5, 0, 0),
	}
}

func (s *site) add(doc verify.TrustDocument, signers ...*publish.SecretKey) {
	s.t.Helper()
	raw, err := verify.EncodeTrust(doc)
	if err != nil {
		s.t.Fatal(err)
	}
	s.addRaw(raw, signers...)
}

func (s *site) addRaw(raw []byte, signers ...*publish.SecretKey) {
	n := len(s.files)/2 + 1
	s.files = append(s.files, plain(fmt.Sprintf("trust.%d.json", n), raw),
		plain(fmt.Sprintf("trust.%d.sig", n), signAll(s.t, raw, signers...)))
}

func signAll(t testing.TB, raw []byte, signers ...*publish.SecretKey) []byte {
	t.Helper()
	var sig []byte
	for _, k := range signers {
		one, err := k.DetachSign(raw, day)
		if err != nil {
			t.Fatal(err)
		}
		sig = append(sig, one...)
	}
	return sig
}

// anchor writes the first n documents as a factory folder.
func (s *site) anchor(n int) string {
	s.t.Helper()
	dir := s.t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "certs"), 0o755); err != nil {
		s.t.Fatal(err)
	}
	files := slices.Clone(s.files[:2*n])
	for d, c := range s.certs {
		files = append(files, plain(verify.CertificateName(d), c))
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(dir, f.Name), f.data, 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	return dir
}

func (s *site) door(anchor, state string) *verify.Door {
	s.t.Helper()
	d, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: anchor})
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// manifest is an ordinary one of one small image.
func (s *site) manifest(seq uint64) verify.Manifest {
	d := verify.Digest(sha256.Sum256([]byte("image")))
	return verify.Manifest{
		Format: verify.ManifestFormat, Product: "kiosk-a", Channel: "stable", Version: "1.0.0", Line: 1, Seq: seq, TrustEpoch: 1,
		IssuedAt: day.AddDate(0, 0, 1),
		Images: []verify.Image{{Name: "rootfs", Kind: verify.KindSlot, Size: 5, SHA256: d, Encoding: verify.EncodingNone,
			Content: verify.Content{Size: 5, SHA256: d}, Pieces: verify.Pieces{Length: 64 << 10, Root: d}}},
	}
}

// head is a head with the whole chain.
func (s *site) head(manifest, signature []byte) *verify.UnverifiedHead {
	s.t.Helper()
	h, err := verify.ReadHead(bytes.NewReader(s.headTar(manifest, signature)))
	if err != nil {
		s.t.Fatal(err)
	}
	return h
}

func (s *site) headTar(manifest, signature []byte) []byte {
	files := slices.Clone(s.files)
	// Only the certificates that the documents pin belong in a head.
	var names []file
	for d, c := range s.certs {
		for _, f := range s.files {
			if bytes.Contains(f.data, []byte(d.String())) {
				names = append(names, plain(verify.CertificateName(d), c))
				break
			}
		}
	}
	slices.SortFunc(names, func(a, b file) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) })
	files = append(append(files, names...), plain("manifest.json", manifest))
	if signature != nil {
		files = append(files, plain("manifest.sig", signature))
	}
	for i := range files {
		files[i].Typeflag = tar.TypeReg
	}
	return retar(s.t, files)
}

func (s *site) signed(m verify.Manifest, signers ...*publish.SecretKey) *verify.UnverifiedHead {
	s.t.Helper()
	raw, err := verify.EncodeManifest(m)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.head(raw, signAll(s.t, raw, signers...))
}

func wantCode(t *testing.T, err error, want verify.Code) {
	t.Helper()
	if verify.CodeOf(err) != want || (want == "" && err != nil) {
		t.Fatalf("got %v (%s), want %q", err, verify.CodeOf(err), want)
	}
}

func TestThresholdCountsDistinctKeys(t *testing.T) {
	a, b, c, stranger := newKey(t, "A"), newKey(t, "B"), newKey(t, "C"), newKey(t, "Stranger")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(2, a, b, c)), a)
	door := s.door(s.anchor(1), t.TempDir())
	for _, x := range []struct {
		name    string
		signers []*publish.SecretKey
		want    verify.Code
		count   int
	}{
		{"one of two", []*publish.SecretKey{a}, verify.CodeSigKey, 0},
		{"one key twice", []*publish.SecretKey{a, a}, verify.CodeSigKey, 0},
		{"one and a stranger", []*publish.SecretKey{a, stranger}, verify.CodeSigKey, 0},
		{"two", []*publish.SecretKey{c, a}, "", 2},
		{"two and a stranger", []*publish.SecretKey{b, stranger, a}, "", 2},
		{"three", []*publish.SecretKey{a, b, c}, "", 3},
		{"only strangers", []*publish.SecretKey{stranger}, verify.CodeSigKey, 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			rel, err := door.Check(t.Context(), s.signed(s.manifest(1), x.signers...))
			wantCode(t, err, x.want)
			if err == nil && len(rel.Signers()) != x.count {
				t.Fatalf("signers %+v", rel.Signers())
			}
		})
	}
	t.Run("a bad signature does not spoil two good ones", func(t *testing.T) {
		raw, _ := verify.EncodeManifest(s.manifest(1))
		sig := signAll(t, raw, b, c)
		sig = append(signAll(t, []byte("something else"), a), sig...)
		_, err := door.Check(t.Context(), s.head(raw, sig))
		wantCode(t, err, "")
	})
}

func TestChainRotatesKeys(t *testing.T) {
	a, b, c, d := newKey(t, "A"), newKey(t, "B"), newKey(t, "C"), newKey(t, "D")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, b)), a)
	factory := s.anchor(1)
	state := t.TempDir()
	door := s.door(factory, state)
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), b))
	wantCode(t, err, "")
	root := door.Trust().RootID

	// The release key is replaced, then the root itself.
	s.add(s.trust(s.set(1, a), s.set(1, c)), a)
	s.add(s.trust(s.set(1, d), s.set(1, c)), a, d)
	rel, err := door.Check(t.Context(), s.signed(s.manifest(2), c))
	wantCode(t, err, "")
	if got := door.Trust(); got.Epoch != 3 || got.RootID != root || got.Keys[0].Name != "C" {
		t.Fatalf("trust is %+v", got)
	}
	_, err = door.Check(t.Context(), s.signed(s.manifest(3), b))
	wantCode(t, err, verify.CodeSigKey) // the old key is worth nothing any more

	// A restart with the factory's anchor keeps what was learned.
	again := s.door(factory, state)
	if got := again.Trust(); got.Epoch != 3 || got.Damage != "" {
		t.Fatalf("after a restart trust is %+v", got)
	}
	// The head this device hands on carries the chain: a new device learns it.
	head, err := verify.ReadHead(bytes.NewReader(rel.Head()))
	wantCode(t, err, "")
	fresh := s.door(factory, t.TempDir())
	_, err = fresh.Check(t.Context(), head)
	wantCode(t, err, "")
	if fresh.Trust().Epoch != 3 {
		t.Fatal("the chain did not travel with the head")
	}
	// An older bundle with a shorter chain, signed by a key that still counts, is fine, and leaves with the long chain.
	short := *s
	short.files = s.files[:4]
	rel, err = fresh.Check(t.Context(), short.signed(s.manifest(4), c))
	wantCode(t, err, "")
	head, err = verify.ReadHead(bytes.NewReader(rel.Head()))
	wantCode(t, err, "")
	if len(head.UnverifiedTrust()) != 3 {
		t.Fatal("the head was handed on with a shorter chain than this device has")
	}
}

func TestNewsAboutKeysIsKeptEvenWithABadRelease(t *testing.T) {
	a, b, c := newKey(t, "A"), newKey(t, "B"), newKey(t, "C")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, b)), a)
	door := s.door(s.anchor(1), t.TempDir())
	s.add(s.trust(s.set(1, a), s.set(1, c)), a)
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), b))
	wantCode(t, err, verify.CodeSigKey)
	if door.Trust().Epoch != 2 {
		t.Fatal("the revocation of a key was dropped with the release that carried it")
	}
}

func TestBadChainsAreRefusedAndLeaveNoTrace(t *testing.T) {
	a, b, c, stranger := newKey(t, "A"), newKey(t, "B"), newKey(t, "C"), newKey(t, "Stranger")
	type chain = func(s *site)
	next := func(change func(s *site, d *verify.TrustDocument), signers ...*publish.SecretKey) chain {
		return func(s *site) {
			doc := s.trust(s.set(2, a, b, c), s.set(1, b))
			doc.Line, doc.MinSeq = 2, 5
			change(s, &doc)
			s.add(doc, signers...)
		}
	}
	same := func(*site, *verify.TrustDocument) {}
	cases := []struct {
		name string
		add  chain
		want verify.Code
	}{
		{"signed by two of three", next(same, a, c), ""},
		{"signed by one of three", next(same, a), verify.CodeTrust},
		{"signed by one key twice", next(same, a, a), verify.CodeTrust},
		{"not signed", next(same), verify.CodeTrust},
		{"signed by a stranger", next(same, stranger, stranger), verify.CodeTrust},
		{"a new root that did not sign", next(func(s *site, d *verify.TrustDocument) { d.Root = s.set(1, stranger) }, a, b), verify.CodeTrust},
		{"a new root that signed alone", next(func(s *site, d *verify.TrustDocument) { d.Root = s.set(1, stranger) }, stranger), verify.CodeTrust},
		{"a new root that both signed", next(func(s *site, d *verify.TrustDocument) { d.Root = s.set(1, stranger) }, a, b, stranger), ""},
		{"an epoch left out", next(func(s *site, d *verify.TrustDocument) { d.Epoch++ }, a, b), verify.CodeTrust},
		{"the same epoch again", next(func(s *site, d *verify.TrustDocument) { d.Epoch-- }, a, b), verify.CodeTrust},
		{"another product", next(func(s *site, d *verify.TrustDocument) { d.Product = "kiosk-b" }, a, b), verify.CodeTrust},
		{"a lower line", next(func(s *site, d *verify.TrustDocument) { d.Line = 1 }, a, b), verify.CodeTrust},
		{"a lower min_seq", next(func(s *site, d *verify.TrustDocument) { d.MinSeq = 4 }, a, b), verify.CodeTrust},
		{"a lower min_seq on a higher line", next(func(s *site, d *verify.TrustDocument) { d.Line, d.MinSeq = 3, 1 }, a, b), ""},
		{"not JSON", func(s *site) { s.addRaw([]byte("{"), a, b) }, verify.CodeFormat},
		{"a critical field", func(s *site) {
			raw, _ := verify.EncodeTrust(s.trust(s.set(2, a, b, c), s.set(1, b)))
			s.addRaw(bytes.Replace(raw, []byte("{"), []byte(`{"critical":["moon"],`), 1), a, b)
		}, verify.CodeCritical},
		{"a wrong certificate", next(func(s *site, d *verify.TrustDocument) {
			d.Release.Keys[0].Cert = c.Certificate().Digest()
		}, a, b), verify.CodeTrust},
		{"an unknown certificate", next(func(s *site, d *verify.TrustDocument) {
			d.Release.Keys[0].Cert = verify.Digest{1}
		}, a, b), verify.CodeBundle},
	}
	for _, x := range cases {
		t.Run(x.name, func(t *testing.T) {
			s := newSite(t)
			first := s.trust(s.set(2, a, b, c), s.set(1, b))
			first.Line, first.MinSeq = 2, 5
			s.add(first, a, b)
			state := t.TempDir()
			door := s.door(s.anchor(1), state)
			before := snapshot(t, state)
			x.add(s)
			m := s.manifest(7)
			m.Line = 2
			head := s.signed(m, b)
			_, err := door.Check(t.Context(), head)
			if x.name == "a lower min_seq on a higher line" {
				wantCode(t, err, verify.CodeOrder) // the chain holds, the release is of the line that ended
				return
			}
			wantCode(t, err, x.want)
			if x.want != "" && (snapshot(t, state) != before || door.Trust().Epoch != 1) {
				t.Fatal("a refused chain left a trace")
			}
		})
	}
}

func TestChainThatDiffersFromOurs(t *testing.T) {
	a, b := newKey(t, "A"), newKey(t, "B")
	one := newSite(t)
	one.add(one.trust(one.set(1, a), one.set(1, b)), a)
	two := newSite(t)
	two.add(one.trust(two.set(1, a), two.set(1, b)), a)
	later := one.trust(one.set(1, a), one.set(1, b))
	one.add(later, a)
	later.MinSeq = 2
	two.certs = one.certs
	two.files = slices.Clone(one.files[:2])
	two.add(later, a)
	door := one.door(one.anchor(2), t.TempDir())
	_, err := door.Check(t.Context(), two.signed(two.manifest(3), b))
	wantCode(t, err, verify.CodeFork)

	// The same keys, but another first document: signed well, yet not our product's root.
	three := newSite(t)
	doc := three.trust(three.set(1, a), three.set(1, b))
	doc.MinSeq = 3
	three.add(doc, a)
	_, err = door.Check(t.Context(), three.signed(three.manifest(3), b))
	wantCode(t, err, verify.CodeTrust)
}

func TestManifestUnderTheTrustInForce(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	doc := s.trust(s.set(1, a), s.set(1, a))
	doc.Line, doc.MinSeq = 3, 10
	s.add(doc, a)
	door := s.door(s.anchor(1), t.TempDir())
	past, future := day.AddDate(0, 0, -1), day.AddDate(1, 0, 0)
	for _, x := range []struct {
		name   string
		change func(m *verify.Manifest)
		want   verify.Code
	}{
		{"ordinary", func(m *verify.Manifest) {}, ""},
		{"another product", func(m *verify.Manifest) { m.Product = "kiosk-b" }, verify.CodeProduct},
		{"an older line", func(m *verify.Manifest) { m.Line = 2 }, verify.CodeOrder},
		{"a line that was never declared", func(m *verify.Manifest) { m.Line = 4 }, verify.CodeOrder},
		{"below min_seq", func(m *verify.Manifest) { m.Seq = 9 }, verify.CodeOrder},
		{"a later trust epoch", func(m *verify.Manifest) { m.TrustEpoch = 2 }, verify.CodeTrust},
		{"issued after release_until", func(m *verify.Manifest) { m.IssuedAt = day.AddDate(6, 0, 0) }, verify.CodeExpired},
		{"issued at release_until", func(m *verify.Manifest) { m.IssuedAt = day.AddDate(5, 0, 0) }, ""},
		{"good until before proven time", func(m *verify.Manifest) { m.NotAfter = &past; m.IssuedAt = past.AddDate(0, -1, 0) }, verify.CodeExpired},
		{"good until later", func(m *verify.Manifest) { m.NotAfter = &future }, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			m := s.manifest(10)
			m.Line = 3
			x.change(&m)
			_, err := door.Check(t.Context(), s.signed(m, a))
			wantCode(t, err, x.want)
		})
	}
	t.Run("signatures come before parsing", func(t *testing.T) {
		_, err := door.Check(t.Context(), s.head([]byte("{not json"), signAll(t, []byte("{not json"), newKey(t, "X"))))
		wantCode(t, err, verify.CodeSigKey)
		_, err = door.Check(t.Context(), s.head([]byte("{not json"), signAll(t, []byte("{not json"), a)))
		wantCode(t, err, verify.CodeFormat)
	})
}

func TestKeySetsWithOneKeyPairTwiceAreRefused(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	doc := s.trust(s.set(1, a), s.set(2, a, a))
	_, err := verify.EncodeTrust(doc)
	wantCode(t, err, verify.CodeTrust)
	for _, set := range []verify.KeySet{{Threshold: 1, Keys: []verify.KeyRef{}}, {Threshold: 0, Keys: doc.Root.Keys}, {Threshold: 2, Keys: doc.Root.Keys}} {
		doc := s.trust(s.set(1, a), set)
		_, err := verify.EncodeTrust(doc)
		wantCode(t, err, verify.CodeTrust)
	}
}
