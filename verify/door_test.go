package verify_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func TestCountersOnlyRise(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	anchor, state := s.anchor(1), t.TempDir()
	door := s.door(anchor, state)
	check := func(seq uint64, version string) *verify.Release {
		t.Helper()
		m := s.manifest(seq)
		m.Version, m.Line = version, door.Trust().Line
		rel, err := door.Check(t.Context(), s.signed(m, a))
		wantCode(t, err, "")
		return rel
	}
	old, three, twin := check(2, "2.0.0"), check(3, "3.0.0"), check(3, "3.0.1")
	wantCode(t, door.Accept(three), "")
	wantCode(t, door.Accept(three), "")
	wantCode(t, door.Accept(old), verify.CodeOrder)
	wantCode(t, door.Accept(twin), verify.CodeFork)
	wantCode(t, door.Confirmed(old), "")
	if got := door.Counters(); got != (verify.Counters{Line: 1, Accepted: 3, Floor: 2}) {
		t.Fatalf("counters %+v", got)
	}
	wantCode(t, door.Confirmed(three), "")
	wantCode(t, door.Confirmed(old), "")
	want := verify.Counters{Line: 1, Accepted: 3, Floor: 3}

	// A restart, and the loss of either copy, changes nothing; the other copy comes back.
	for _, damage := range []func(path string) error{
		func(string) error { return nil },
		os.Remove,
		func(path string) error { return os.WriteFile(path, []byte("junk"), 0o600) },
		func(path string) error { return os.Truncate(path, 20) },
		func(path string) error { return os.Truncate(path, 0) },
	} {
		for _, name := range []string{"counters.a", "counters.b"} {
			if err := damage(filepath.Join(state, name)); err != nil {
				t.Fatal(err)
			}
			door = s.door(anchor, state)
			if got := door.Counters(); got != want {
				t.Fatalf("after damage to %s: %+v", name, got)
			}
			if !bytes.Equal(readFile(t, filepath.Join(state, "counters.a")), readFile(t, filepath.Join(state, "counters.b"))) {
				t.Fatalf("%s was not repaired", name)
			}
			wantCode(t, door.Accept(old), verify.CodeOrder)
		}
	}

	// A higher line ends the old order: its seq starts again.
	raised := s.trust(s.set(1, a), s.set(1, a))
	raised.Line = 2
	s.add(raised, a)
	_, err := door.Check(t.Context(), s.signed(s.manifest(9), a)) // of line 1, which its own chain ends
	wantCode(t, err, verify.CodeOrder)
	first := check(1, "5.0.0")
	wantCode(t, door.Accept(first), "")
	wantCode(t, door.Accept(three), verify.CodeOrder)
	if got := door.Counters(); got != (verify.Counters{Line: 2, Accepted: 1}) {
		t.Fatalf("counters %+v", got)
	}
}

func TestNewerCopyOfTheCountersWins(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	anchor, state := s.anchor(1), t.TempDir()
	door := s.door(anchor, state)
	accept := func(seq uint64) {
		t.Helper()
		rel, err := door.Check(t.Context(), s.signed(s.manifest(seq), a))
		wantCode(t, err, "")
		wantCode(t, door.Accept(rel), "")
	}
	accept(1)
	stale := readFile(t, filepath.Join(state, "counters.a"))
	accept(2)
	for _, name := range []string{"counters.a", "counters.b"} { // a cut between the two writes
		if err := os.WriteFile(filepath.Join(state, name), stale, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := s.door(anchor, state).Counters().Accepted; got != 2 {
			t.Fatalf("with a stale %s the accepted seq is %d", name, got)
		}
	}
	for _, name := range []string{"counters.a", "counters.b"} {
		if err := os.WriteFile(filepath.Join(state, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: anchor})
	wantCode(t, err, verify.CodeIO) // starting at zero would let old releases in
}

func TestProvenTimeRisesWithWhatWasAccepted(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	anchor, state := s.anchor(1), t.TempDir()
	door := s.door(anchor, state)
	late := s.manifest(1)
	late.IssuedAt = day.AddDate(1, 0, 0)
	rel, err := door.Check(t.Context(), s.signed(late, a))
	wantCode(t, err, "")
	short := s.manifest(2)
	until := day.AddDate(0, 6, 0)
	short.NotAfter = &until
	_, err = door.Check(t.Context(), s.signed(short, a))
	wantCode(t, err, "") // checking alone proves nothing
	wantCode(t, door.Accept(rel), "")
	_, err = s.door(anchor, state).Check(t.Context(), s.signed(short, a))
	wantCode(t, err, verify.CodeExpired)
}

func TestDamagedTrustStateFallsBackToTheFactory(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	anchor, state := s.anchor(1), t.TempDir()
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	head := s.signed(s.manifest(1), a)
	_, err := s.door(anchor, state).Check(t.Context(), head)
	wantCode(t, err, "")
	first, second := filepath.Join(state, "trust", "trust.2.json"), filepath.Join(state, "trust.copy", "trust.2.json")
	damage := func(paths ...string) {
		t.Helper()
		for _, path := range paths {
			if err := os.WriteFile(path, []byte("junk"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	// One copy is enough, and brings the other one back.
	for _, path := range []string{first, second} {
		good := readFile(t, path)
		damage(path)
		if got := s.door(anchor, state).Trust(); got.Epoch != 2 || got.Damage != "" {
			t.Fatalf("with damage to %s trust is %+v", path, got)
		}
		if !bytes.Equal(readFile(t, path), good) {
			t.Fatalf("%s was not repaired", path)
		}
	}
	damage(first, second)
	door := s.door(anchor, state)
	if got := door.Trust(); got.Epoch != 1 || got.Damage == "" {
		t.Fatalf("trust is %+v", got)
	}
	_, err = door.Check(t.Context(), head)
	wantCode(t, err, "")
	if got := s.door(anchor, state).Trust(); got.Epoch != 2 || got.Damage != "" {
		t.Fatalf("after it was learned again trust is %+v", got)
	}
}

func TestOpenDoorRefusals(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	_, err := verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: v.Anchor(), Product: "kiosk-b"})
	wantCode(t, err, verify.CodeProduct)
	_, err = verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: t.TempDir()})
	wantCode(t, err, verify.CodeTrust)
	_, err = verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: filepath.Join(t.TempDir(), "none")})
	wantCode(t, err, verify.CodeTrust)
	a, b := newKey(t, "A"), newKey(t, "B")
	s := newSite(t)
	s.add(s.trust(s.set(2, a, b), s.set(1, a)), a) // one of its own two root keys is missing
	_, err = verify.OpenDoor(verify.DoorConfig{Dir: t.TempDir(), Anchor: s.anchor(1)})
	wantCode(t, err, verify.CodeTrust)
}

func TestCheckEndsWithItsContext(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	b, err := verify.OpenFolder(v.Release(t, verifytest.Opts{}))
	wantCode(t, err, "")
	defer b.Close()
	ctx, cancel := newCancelled(t)
	defer cancel()
	if _, err := v.Door(t).Check(ctx, b.Head()); !errors.Is(err, ctx.Err()) {
		t.Fatalf("got %v", err)
	}
}
