package verify_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"meshupd/verify"
	"meshupd/verify/publish"
)

// five makes a chain of five documents in which root and release keys all change.
func five(t testing.TB) (s *site, last *publish.SecretKey) {
	t.Helper()
	s = newSite(t)
	root, release := newKey(t, "Root 1"), newKey(t, "Release 1")
	s.add(s.trust(s.set(1, root), s.set(1, release)), root)
	for n := range 4 {
		oldRoot := root
		if n%2 == 1 {
			root = newKey(t, "Root")
		}
		release = newKey(t, "Release")
		doc := s.trust(s.set(1, root), s.set(1, release))
		doc.IssuedAt = day.AddDate(n+1, 0, 0)
		doc.ReleaseUntil = day.AddDate(20, 0, 0)
		if n == 2 {
			doc.Line = 2
		}
		if n == 3 {
			doc.Line, doc.MinSeq = 2, 7
		}
		s.add(doc, oldRoot, root)
	}
	return s, release
}

// Ten years in a drawer: the factory's document, no network, no clock, one stick.
func TestDeviceAtEpochOneMeetsAReleaseAtEpochFive(t *testing.T) {
	s, release := five(t)
	factory, state := s.anchor(1), t.TempDir()
	door := s.door(factory, state)
	m := s.manifest(7)
	m.Line, m.TrustEpoch, m.IssuedAt = 2, 5, day.AddDate(10, 0, 0)
	stick := s.signed(m, release)
	rel, err := door.Check(t.Context(), stick)
	wantCode(t, err, "")
	wantCode(t, door.Accept(rel), "")
	if got := door.Trust(); got.Epoch != 5 || got.Line != 2 {
		t.Fatalf("trust is %+v", got)
	}
	door = s.door(factory, state)
	if got := door.Trust(); got.Epoch != 5 || got.Damage != "" || door.Counters() != (verify.Counters{Line: 2, Accepted: 7}) {
		t.Fatalf("after a restart trust is %+v, counters %+v", got, door.Counters())
	}

	// A stick whose chain lacks one document in the middle teaches nothing.
	torn := *s
	torn.files = append(slices.Clone(s.files[:4]), s.files[6:]...)
	for i, f := range torn.files {
		if i >= 4 { // the tar of a head cannot skip a number
			n := i/2 + 1
			torn.files[i] = plain(fmt.Sprintf("trust.%d%s", n, filepath.Ext(f.Name)), f.data)
		}
	}
	other := s.door(factory, t.TempDir())
	_, err = other.Check(t.Context(), torn.signed(m, release))
	wantCode(t, err, verify.CodeTrust)
	if other.Trust().Epoch != 1 {
		t.Fatal("a part of a broken chain was believed")
	}
}

// A document that does not hold leaves the one before in force, also after a
// restart and another try, and the good one is then taken.
func TestFailedDocumentLeavesTheOneBefore(t *testing.T) {
	a, b, c, stranger := newKey(t, "A"), newKey(t, "B"), newKey(t, "C"), newKey(t, "Stranger")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, b)), a)
	factory, state := s.anchor(1), t.TempDir()
	bad := *s
	bad.add(bad.trust(s.set(1, stranger), s.set(1, stranger)), stranger)
	for range 2 {
		door := s.door(factory, state)
		for range 2 {
			before := snapshot(t, state)
			_, err := door.Check(t.Context(), bad.signed(s.manifest(1), stranger))
			wantCode(t, err, verify.CodeTrust)
			if snapshot(t, state) != before || door.Trust().Epoch != 1 || len(door.Alarms()) != 0 {
				t.Fatal("a document that does not hold left a trace")
			}
		}
	}
	s.add(s.trust(s.set(1, a), s.set(1, c)), a)
	door := s.door(factory, state)
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), c))
	wantCode(t, err, "")
}

// Two documents for one place, both signed well: the root's keys were used twice.
func TestForkOfTrustKeepsTheFirstAndRaisesAnAlarm(t *testing.T) {
	a, b, c := newKey(t, "A"), newKey(t, "B"), newKey(t, "C")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, b)), a)
	factory, state := s.anchor(1), t.TempDir()
	fork := newSite(t)
	fork.certs, fork.files = s.certs, slices.Clone(s.files)
	s.add(s.trust(s.set(1, a), s.set(1, b)), a)
	fork.add(fork.trust(s.set(1, a), s.set(1, c)), a)
	door := s.door(factory, state)
	_, err := door.Check(t.Context(), s.signed(s.manifest(1), b))
	wantCode(t, err, "")

	want := []verify.Alarm{{Code: verify.CodeFork, Place: "trust document 2",
		Kept: sha256.Sum256(s.files[2].data), Other: sha256.Sum256(fork.files[2].data)}}
	for range 3 { // once, again, and after a restart: one alarm, and the first stays in force
		_, err = door.Check(t.Context(), fork.signed(s.manifest(2), c))
		wantCode(t, err, verify.CodeFork)
		if got := door.Alarms(); !slices.Equal(got, want) {
			t.Fatalf("alarms %+v, want %+v", got, want)
		}
		if door.Trust().Keys[0].Name != "B" {
			t.Fatal("the second document came into force")
		}
		door = s.door(factory, state)
	}
	// What only looks like a fork raises no alarm.
	forged := newSite(t)
	forged.certs, forged.files = s.certs, slices.Clone(s.files[:2])
	forged.add(forged.trust(s.set(1, a), s.set(1, c)), c)
	_, err = door.Check(t.Context(), forged.signed(s.manifest(2), c))
	wantCode(t, err, verify.CodeTrust)
	if len(door.Alarms()) != 1 {
		t.Fatal("a forgery raised an alarm")
	}

	// The next document settles it for both sides: it follows either.
	third := s.trust(s.set(1, a), s.set(1, b))
	third.Epoch = 3
	s.add(third, a)
	fork.add(third, a)
	other := s.door(factory, t.TempDir())
	_, err = other.Check(t.Context(), fork.signed(s.manifest(3), b)) // knows only the fork
	wantCode(t, err, "")
	for name, d := range map[string]*verify.Door{"first": door, "second": other} {
		for _, side := range []*site{s, fork} {
			_, err = d.Check(t.Context(), side.signed(s.manifest(4), b))
			if err != nil || d.Trust().Epoch != 3 {
				t.Fatalf("the %s side is not healed: %v", name, err)
			}
		}
	}
}

// Two manifests for one place: the first stays, the alarm outlasts a restart.
func TestEquivocationRaisesAnAlarm(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	factory, state := s.anchor(1), t.TempDir()
	door := s.door(factory, state)
	take := func(seq uint64, version string) (*verify.Release, error) {
		m := s.manifest(seq)
		m.Version = version
		rel, err := door.Check(t.Context(), s.signed(m, a))
		wantCode(t, err, "")
		return rel, door.Accept(rel)
	}
	first, err := take(5, "1.5.0")
	wantCode(t, err, "")
	twin, err := take(5, "1.5.1")
	wantCode(t, err, verify.CodeFork)
	door = s.door(factory, state)
	wantCode(t, door.Accept(twin), verify.CodeFork)
	wantCode(t, door.Accept(first), "")
	want := []verify.Alarm{{Code: verify.CodeFork, Place: "release 1.5", Kept: first.ID(), Other: twin.ID()}}
	if got := door.Alarms(); !slices.Equal(got, want) {
		t.Fatalf("alarms %+v, want %+v", got, want)
	}
	_, err = take(6, "1.6.0") // and the next one in the order settles it
	wantCode(t, err, "")
}

// A thief with the release keys pushes seq to its end. A new line, signed by the
// root alone, takes the fleet back: no device has to be touched.
func TestRaisingTheLineRecoversAFleetWhoseSeqWasPushedToTheEnd(t *testing.T) {
	root, stolen, fresh := newKey(t, "Root"), newKey(t, "Stolen"), newKey(t, "Fresh")
	s := newSite(t)
	s.add(s.trust(s.set(1, root), s.set(1, stolen)), root)
	factory, state := s.anchor(1), t.TempDir()
	door := s.door(factory, state)
	evil := s.manifest(verify.MaxSeq)
	evil.Recalls = []verify.Digest{{7}}
	rel, err := door.Check(t.Context(), s.signed(evil, stolen))
	wantCode(t, err, "")
	wantCode(t, door.Accept(rel), "")
	wantCode(t, door.Confirmed(rel), "")

	doc := s.trust(s.set(1, root), s.set(1, fresh))
	doc.Line = 2
	s.add(doc, root)
	m := s.manifest(1)
	m.Line, m.TrustEpoch = 2, 2
	good, err := door.Check(t.Context(), s.signed(m, fresh))
	wantCode(t, err, "")
	wantCode(t, door.Accept(good), "")
	door = s.door(factory, state)
	if got := door.Counters(); got != (verify.Counters{Line: 2, Accepted: 1}) {
		t.Fatalf("counters %+v", got)
	}
	if door.Recalled(verify.Digest{7}) {
		t.Error("what the thief withdrew is still withdrawn")
	}
	_, err = door.Check(t.Context(), s.signed(evil, stolen))
	wantCode(t, err, verify.CodeSigKey)
	wantCode(t, door.Accept(rel), verify.CodeOrder)
}

// What is built into an image outlasts the loss of all state.
func TestFactoryResetDoesNotFallBelowTheImage(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	factory := s.anchor(1)
	baked := `{"format": "meshupd.baked/1", "line": 1, "accepted": 17, "floor": 16}`
	if err := os.WriteFile(filepath.Join(factory, verify.BakedFile), []byte(baked), 0o644); err != nil {
		t.Fatal(err)
	}
	check := func(door *verify.Door, seq uint64, want verify.Code) {
		t.Helper()
		rel, err := door.Check(t.Context(), s.signed(s.manifest(seq), a))
		wantCode(t, err, "")
		wantCode(t, door.Accept(rel), want)
	}
	state := t.TempDir()
	door := s.door(factory, state)
	if got := door.Counters(); got != (verify.Counters{Line: 1, Accepted: 17, Floor: 16}) {
		t.Fatalf("counters %+v", got)
	}
	check(door, 16, verify.CodeOrder)
	check(door, 17, "") // the release that the image is
	check(door, 18, "")
	if got := s.door(factory, state).Counters(); got.Accepted != 18 {
		t.Fatalf("the image's counters undid the device's: %+v", got)
	}
	higher, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: factory, Baked: verify.Counters{Line: 1, Accepted: 30, Floor: 30}})
	wantCode(t, err, "")
	if got := higher.Counters(); got.Accepted != 30 || got.Floor != 30 {
		t.Fatalf("counters %+v", got)
	}
	for _, bad := range []string{"", "{}", `{"format":"meshupd.baked/1","line":1,"accepted":1,"floor":2}`, `{"format":"meshupd.baked/1","line":9007199254740992}`} {
		if err := os.WriteFile(filepath.Join(factory, verify.BakedFile), []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: factory})
		wantCode(t, err, verify.CodeFormat)
	}
}

func FuzzBaked(f *testing.F) {
	f.Add([]byte(`{"format": "meshupd.baked/1", "line": 1, "accepted": 17, "floor": 16}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := verify.ParseBaked(raw)
		refusedWell(t, err)
		if err == nil && (c.Floor > c.Accepted || c.Accepted > verify.MaxSeq) {
			t.Fatalf("accepted %+v", c)
		}
	})
}

// A recall takes effect with the release that says it, and stays.
func TestRecalledReleasesAreRefused(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	factory, state := s.anchor(1), t.TempDir()
	door := s.door(factory, state)
	image := s.manifest(0).Images[0]
	with := func(seq uint64, content byte) verify.Manifest {
		m := s.manifest(seq)
		img := image
		img.SHA256, img.Content.SHA256 = verify.Digest{content}, verify.Digest{content}
		m.Images = []verify.Image{img}
		return m
	}
	check := func(m verify.Manifest, want verify.Code) *verify.Release {
		t.Helper()
		rel, err := door.Check(t.Context(), s.signed(m, a))
		wantCode(t, err, want)
		return rel
	}
	byID, byImage, fine := check(with(1, 1), ""), check(with(2, 2), ""), check(with(3, 3), "")
	wantCode(t, door.Accept(fine), "")
	word := s.manifest(4)
	word.Images, word.Recalls, word.Critical = nil, []verify.Digest{byID.ID(), {2}}, []string{"recalls"}
	recall := check(word, "")
	if door.Withdrawn(byID) {
		t.Fatal("a recall took effect before it was accepted")
	}
	wantCode(t, door.Accept(recall), "")
	for range 2 {
		check(with(1, 1), verify.CodeRecalled)
		check(with(2, 2), verify.CodeRecalled)
		check(with(9, 2), verify.CodeRecalled) // the same image in a newer release
		check(with(3, 3), "")
		wantCode(t, door.Accept(byImage), verify.CodeRecalled)
		if !door.Withdrawn(byImage) || !door.Recalled(byID.ID()) || door.Withdrawn(fine) {
			t.Fatal("the wrong ones are withdrawn")
		}
		door = s.door(factory, state)
	}
	later := check(with(5, 5), "")
	wantCode(t, door.Accept(later), "")
	check(with(1, 1), verify.CodeRecalled) // a release without recalls does not take them back
}
