package verify_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"meshupd/verify"
)

// The room that decides has no clock: no file of it calls one.
func TestNothingHereReadsAClock(t *testing.T) {
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files := 0
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files++
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "time" {
				switch sel.Sel.Name {
				case "Now", "Since", "Until", "After", "Tick", "NewTimer":
					t.Errorf("time.%s is called", sel.Sel.Name)
				}
			}
			return true
		})
	}
	if files < 15 {
		t.Fatalf("only %d files: the test looks in the wrong place", files)
	}
}

// decisions are the cases in which dates matter, each with what a device says.
func decisions(t *testing.T) map[string]verify.Code {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	door := s.door(s.anchor(1), t.TempDir())
	got := map[string]verify.Code{}
	try := func(name string, change func(m *verify.Manifest)) {
		m := s.manifest(10)
		change(&m)
		_, err := door.Check(t.Context(), s.signed(m, a))
		got[name] = verify.CodeOf(err)
		if err != nil && verify.CodeOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	date := func(y int) *time.Time { d := time.Date(y, 6, 1, 0, 0, 0, 0, time.UTC); return &d }
	try("ordinary", func(m *verify.Manifest) {})
	try("not_after long ago by every clock but the oldest", func(m *verify.Manifest) { m.IssuedAt = *date(2020); m.NotAfter = date(2021) })
	try("not_after after all that is proven", func(m *verify.Manifest) { m.NotAfter = date(2027) })
	try("not_after in the next century", func(m *verify.Manifest) { m.NotAfter = date(2105) })
	try("issued before the trust", func(m *verify.Manifest) { m.IssuedAt = *date(1990) })
	try("issued after release_until", func(m *verify.Manifest) { m.IssuedAt = *date(2040) })
	try("issued in the future of most clocks", func(m *verify.Manifest) { m.IssuedAt = *date(2030) })
	return got
}

// The same decision at every clock. In a synctest bubble the clock is fake: it
// starts in 2000, decades before any of these keys were made, and sleeps on to 2099.
func TestEveryClockGivesTheSameDecision(t *testing.T) {
	want := map[string]verify.Code{
		"ordinary": "",
		"not_after long ago by every clock but the oldest": verify.CodeExpired,
		"not_after after all that is proven":               "",
		"not_after in the next century":                    "",
		"issued before the trust":                          "",
		"issued after release_until":                       verify.CodeExpired,
		"issued in the future of most clocks":              "",
	}
	compare := func(t *testing.T) {
		for name, code := range decisions(t) {
			if code != want[name] {
				t.Errorf("by a clock of %d, %s: %q, want %q", time.Now().Year(), name, code, want[name])
			}
		}
	}
	t.Run("this machine's clock", compare)
	for _, year := range []int{2000, 2038, 2099} {
		t.Run(time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC).Format("2006"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)))
				compare(t)
			})
		})
	}
}

func TestProvenTime(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	anchor := s.anchor(1)
	open := func(state string, built time.Time) *verify.Door {
		t.Helper()
		d, err := verify.OpenDoor(verify.DoorConfig{Dir: state, Anchor: anchor, BuildTime: built})
		wantCode(t, err, "")
		return d
	}
	is := func(d *verify.Door, want time.Time) {
		t.Helper()
		if got := d.ProvenTime(); !got.Equal(want) {
			t.Fatalf("proven time is %s, want %s", got, want)
		}
	}
	state := t.TempDir()
	is(open(state, time.Time{}), day)
	is(open(state, day.AddDate(-3, 0, 0)), day)
	is(open(state, day.AddDate(2, 0, 0)), day.AddDate(2, 0, 0))

	// A checked release proves nothing; an accepted one does, for good.
	door := open(state, day)
	m := s.manifest(1)
	m.IssuedAt = day.AddDate(1, 0, 0)
	rel, err := door.Check(t.Context(), s.signed(m, a))
	wantCode(t, err, "")
	is(door, day)
	wantCode(t, door.Accept(rel), "")
	is(door, m.IssuedAt)
	is(open(state, day), m.IssuedAt)

	// A slip of the pen in a trust document: 2226. Nothing older than the build plus 20 years expires by it.
	doc := s.trust(s.set(1, a), s.set(1, a))
	doc.IssuedAt = day.AddDate(200, 0, 0)
	doc.ReleaseUntil = day.AddDate(201, 0, 0)
	s.add(doc, a)
	until := day.AddDate(21, 0, 0)
	m = s.manifest(2)
	m.NotAfter = &until
	_, err = door.Check(t.Context(), s.signed(m, a))
	wantCode(t, err, "")
	is(door, day.AddDate(20, 0, 0))
	until = day.AddDate(19, 0, 0)
	_, err = door.Check(t.Context(), s.signed(m, a))
	wantCode(t, err, verify.CodeExpired)
	for _, word := range []string{"2045-03-01", "2046-03-01", "the device's clock was not asked"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), "key") {
		t.Errorf("%q blames the key", err)
	}
}

// A clock that says that a release is too old is worth a word, not a refusal.
func TestClockOnlyWarns(t *testing.T) {
	a := newKey(t, "A")
	s := newSite(t)
	s.add(s.trust(s.set(1, a), s.set(1, a)), a)
	m := s.manifest(1)
	until := day.AddDate(1, 0, 0)
	m.NotAfter = &until
	rel, err := s.door(s.anchor(1), t.TempDir()).Check(t.Context(), s.signed(m, a))
	wantCode(t, err, "")
	if got := rel.ClockWarning(until); got != "" {
		t.Errorf("warns on its last second: %s", got)
	}
	if got := rel.ClockWarning(until.AddDate(70, 0, 0)); !strings.Contains(got, "2097-03-01") || !strings.Contains(got, "2027-03-01") {
		t.Errorf("the warning is %q", got)
	}
}
