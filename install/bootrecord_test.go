package install

import (
	"encoding/json"
	"strings"
	"testing"

	"meshupd/verify"
)

// TestWake holds the table above Files, line by line.
func TestWake(t *testing.T) {
	a, b := SlotA, SlotB
	settled := bootRecord{Phase: PhaseSettled, Booted: a, Default: a, BootID: "1"}
	armed := settled.armed(b, 1, "1")
	open := armed.begin("1")
	trial := open.ended()
	failed := bootRecord{Phase: PhaseSettled, Booted: b, Default: a, Failed: b, BootID: "1"}
	with := func(r bootRecord, change func(*bootRecord)) bootRecord { change(&r); return r }
	silent := with(failed, func(r *bootRecord) { r.Why = "the new system was started once and did not confirm itself" })
	left := func(r bootRecord, n int) bootRecord { return with(r, func(r *bootRecord) { r.Left = n }) }
	opened := func(r bootRecord, id string) bootRecord {
		return with(r, func(r *bootRecord) { r.Open, r.BootID = true, id })
	}
	at := func(r bootRecord, id string) bootRecord { return with(r, func(r *bootRecord) { r.BootID = id }) }

	for _, c := range []struct {
		name    string
		r       bootRecord
		id      string
		pointed SlotName
		machine bool
		want    bootRecord
		do      deed
	}{
		{"settled", settled, "2", a, false, settled, deedNone},
		{"settled, pointer gone", settled, "1", "", false, opened(settled, "1"), deedTake},
		{"counted, not switched", open, "1", a, false, open, deedTake},
		{"counted, not switched, power cut", open, "2", a, false, at(open, "2"), deedTake},
		{"crash in the restart, none left", open, "1", b, false, opened(silent, "1"), deedTake},
		{"crash in the restart, one left", left(open, 1), "1", b, false, open, deedTake},
		{"power cut in the restart, none left", open, "2", b, false, opened(silent, "2"), deedTake},
		{"machine has not restarted", open, "1", b, true, open, deedTake},
		{"machine has restarted", open, "2", b, true, at(trial, "2"), deedSave},
		{"given up, not restarted", failed, "1", b, false, opened(failed, "1"), deedTake},
		{"fallback cut after the pointer", opened(failed, "1"), "1", a, false,
			with(opened(failed, "1"), func(r *bootRecord) { r.Reruns = 1 }), deedTake},
		{"fallback cut too often", with(opened(failed, "1"), func(r *bootRecord) { r.Reruns = maxReruns }), "1", a, false,
			with(failed, func(r *bootRecord) { r.Booted = a }), deedSave},
		{"armed, daemon restarts", armed, "1", a, false, armed, deedNone},
		{"armed, power cut", armed, "2", a, false, at(open, "2"), deedTake},
		{"trial, daemon restarts", trial, "1", b, false, trial, deedNone},
		{"trial, power cut, one left", left(trial, 1), "2", b, false, at(trial, "2"), deedSave},
		{"trial, power cut, none left", trial, "2", b, false, opened(silent, "2"), deedTake},
	} {
		t.Run(c.name, func(t *testing.T) {
			if what := c.r.wrong(); what != "" {
				t.Fatalf("the record before is wrong: %s", what)
			}
			got, do := c.r.wake(c.id, c.pointed, c.machine)
			if got != c.want || do != c.do {
				t.Errorf("got %+v and %d,\nwant %+v and %d", got, do, c.want, c.do)
			}
			if what := got.wrong(); what != "" {
				t.Errorf("the record after is wrong: %s", what)
			}
		})
	}
}

// TestEveryTransitionIsSound walks all records that can be reached and checks that none breaks the rules, and that each
// comes to rest when the machine only restarts.
func TestEveryTransitionIsSound(t *testing.T) {
	type node struct {
		r       bootRecord
		pointed SlotName
	}
	start := node{bootRecord{Phase: PhaseSettled, Booted: SlotA, Default: SlotA, BootID: "1"}, SlotA}
	seen := map[node]bool{start: true}
	queue := []node{start}
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		if what := n.r.wrong(); what != "" {
			t.Fatalf("%+v can be reached: %s", n.r, what)
		}
		for _, next := range []node{
			{n.r.ended(), n.r.target()}, {n.r, n.r.target()}, {n.r.begin("1"), n.pointed}, {n.r.begin("2"), n.pointed},
			{n.r.fallenBack(), n.pointed}, {n.r.settledOn(n.r.target()), n.pointed}, {n.r.armed(n.r.Default.Other(), 2, "1"), n.pointed},
			{first(n.r.wake("1", n.pointed, false)), n.pointed}, {first(n.r.wake("2", n.pointed, true)), n.pointed},
		} {
			if allowed(n.r, n.pointed, next.r, next.pointed) && !seen[next] {
				seen[next] = true
				queue = append(queue, next)
			}
		}
		r, at := n.r, n.pointed
		for range 4 {
			var do deed
			if r, do = r.wake("other", at, false); do == deedTake {
				at, r = r.target(), r.ended()
			}
			r.BootID = "1"
		}
		if r.Phase != PhaseSettled || r.Booted != r.Default || at != r.Default {
			t.Fatalf("%+v with pointer %s does not come to rest, but to %+v", n.r, n.pointed, r)
		}
	}
	if len(seen) < 20 {
		t.Fatalf("only %d records were reached", len(seen))
	}
}

func first(r bootRecord, _ deed) bootRecord { return r }

// allowed leaves out what the pointer's methods never do in a phase.
func allowed(r bootRecord, at SlotName, next bootRecord, nextAt SlotName) bool {
	switch {
	case nextAt != at && !r.Open:
		return false // the pointer is only switched in a restart
	case r.Open && !next.Open && next.Phase == r.Phase && at != r.target():
		return false // a restart does not end before the pointer was switched
	case next.Phase == PhaseArmed && r.Phase != PhaseArmed:
		return r.Phase == PhaseSettled && r.Booted == r.Default && (!r.Open || at == r.Default)
	case r.Phase == PhaseTrial && next.Phase == PhaseSettled && next.Failed == "":
		return !r.Open // confirmed
	case r.Phase == PhaseSettled && next.Failed == "" && next.Default != r.Default:
		return false
	}
	return true
}

func FuzzBootState(f *testing.F) {
	for _, r := range []bootRecord{
		{Phase: PhaseSettled, Booted: SlotA, Default: SlotA},
		{Phase: PhaseArmed, Booted: SlotA, Default: SlotA, Trial: SlotB, Left: 3, BootID: "1"},
		{Phase: PhaseTrial, Booted: SlotB, Default: SlotA, Trial: SlotB, Open: true},
	} {
		data, err := seal(bootSchema, r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add([]byte(strings.Replace(string(data), "a", "b", 1)))
		f.Add(data[:len(data)/2])
		f.Add(bodyOf(f, data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseBoot(resealed(bootSchema, data))
		if err != nil {
			if r != (bootRecord{}) {
				t.Fatalf("an error with a record: %+v", r)
			}
			return
		}
		for _, pointed := range []SlotName{SlotA, SlotB, ""} {
			for _, machine := range []bool{false, true} {
				if next, _ := r.wake("x", pointed, machine); next.wrong() != "" {
					t.Fatalf("%+v wakes up as %+v: %s", r, next, next.wrong())
				}
			}
		}
		again, err := seal(bootSchema, r)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := parseBoot(again); err != nil || back != r {
			t.Fatalf("%+v comes back as %+v, %v", r, back, err)
		}
	})
}

func FuzzSlotRecord(f *testing.F) {
	data, err := seal(recordSchema, Content{Version: "1.2.3", Whole: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(bodyOf(f, data))
	f.Add([]byte(`{"schema":"meshupd.slot/1","sha256":"","body":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseRecord(resealed(recordSchema, data))
		if err != nil && c != (Content{}) {
			t.Fatalf("an error with a record: %+v", c)
		}
	})
}

// bodyOf is what is below the checksum of a sealed file.
func bodyOf(f *testing.F, data []byte) []byte {
	var outer sealed
	if err := strictJSON(data, &outer); err != nil {
		f.Fatal(err)
	}
	return outer.Body
}

// resealed gives JSON that is not a sealed file a checksum that holds, or a fuzzer would never get past it.
func resealed(schema string, data []byte) []byte {
	var outer sealed
	if strictJSON(data, &outer) == nil {
		return data
	}
	out, err := seal(schema, json.RawMessage(data))
	if err != nil {
		return data
	}
	return out
}

func FuzzKeptVersion(f *testing.F) {
	good, err := seal(versionSchema, keptVersion{Content: Content{Release: verify.Digest{1}, Version: "2.0.0", Whole: true}, Images: []keptImage{{Name: "app"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := parseKept(data)
		if err != nil {
			return
		}
		if name := v.name(); strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") || len(name) > 255 {
			t.Fatalf("the name is %q", name)
		}
	})
}
