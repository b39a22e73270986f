package swarm

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"meshupd/verify"
)

// drawSite draws devices that all see each other: who had the image from the
// start, who fetches, how far each is.
func drawSite(t *rapid.T, wholeAtLeast int) site {
	image := verify.Digest{1}
	n := rapid.IntRange(max(1, wholeAtLeast), 12).Draw(t, "devices")
	var s site
	for i := range n {
		id := fmt.Sprintf("d%d", i)
		whole := i < wholeAtLeast || rapid.IntRange(0, 4).Draw(t, "whole") == 0
		r := relay{id: id, complete: whole, have: 100}
		rank := uint32(0)
		if !whole {
			r.have = rapid.Int64Range(0, 99).Draw(t, "have")
			rank = rapid.Uint32Range(1, 4).Draw(t, "rank")
		}
		r.place = placeOf(id, image, rank)
		s = append(s, r)
	}
	return s
}

// parents asks every device that is not complete, each seeing all others.
func parents(s site, slack int64, level func(asks, of string) trust) map[string]string {
	got := map[string]string{}
	for _, r := range s {
		if r.complete {
			continue
		}
		others := append(site{}, s...).without(func(id string) bool { return id == r.id })
		got[r.id] = others.parentFor(r.place, r.have, slack, func(id string) trust { return level(r.id, id) })
	}
	return got
}

func trustAll(string, string) trust { return trusted }

func checkNoLoop(t *rapid.T, got map[string]string) {
	for id := range got {
		at, steps := id, 0
		for at != "" {
			if steps++; steps > len(got)+1 {
				t.Fatalf("a loop through %s: %v", id, got)
			}
			at = got[at] // "" for a complete device: it needs no parent
		}
	}
}

func TestGraphHasNoLoopWhateverAnyoneSuspects(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSite(t, 0)
		slack := rapid.Int64Range(0, 50).Draw(t, "slack")
		levels := map[string]trust{}
		got := parents(s, slack, func(asks, of string) trust {
			key := asks + ">" + of
			if _, ok := levels[key]; !ok {
				levels[key] = trust(rapid.IntRange(0, 2).Draw(t, key))
			}
			return levels[key]
		})
		checkNoLoop(t, got)
	})
}

func TestGraphEveryDeviceHasAParentWhileSomeoneIsComplete(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSite(t, 1)
		slack := rapid.Int64Range(0, 50).Draw(t, "slack")
		for id, parent := range parents(s, slack, trustAll) {
			if parent == "" {
				t.Fatalf("%s has no parent in %v", id, s)
			}
			p, _ := s.find(parent)
			r, _ := s.find(id)
			if !p.complete && p.have+slack < r.have {
				t.Fatalf("%s takes from %s, which is behind", id, parent)
			}
		}
	})
}

// The devices with no complete device left still hang together: all but the first have a parent.
func TestGraphStaysOnePieceWithoutACompleteDevice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSite(t, 0).without(func(id string) bool { return false })
		for i := range s {
			s[i].complete = false
		}
		orphans := 0
		got := parents(s, 0, trustAll)
		for _, p := range got {
			if p == "" {
				orphans++
			}
		}
		if orphans != 1 {
			t.Fatalf("%d devices without a parent: %v", orphans, got)
		}
		checkNoLoop(t, got)
	})
}

func TestGraphIsAChainWhenNobodyIsBehindHisPlace(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := drawSite(t, 1)
		// In a flow that started together, who is further back in the order has less.
		for i := range s {
			if !s[i].complete {
				s[i].have = 0
			}
		}
		children := map[string]int{}
		for _, p := range parents(s, 0, trustAll) {
			children[p]++
		}
		for id, n := range children {
			if n > 1 {
				t.Fatalf("%s has %d children", id, n)
			}
		}
	})
}

// Devices die and restart, and each time the views agree again the rest is one chain.
func TestGraphHealsAfterDeathsAndRestarts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		image := verify.Digest{2}
		s := site{{id: "importer", place: placeOf("importer", image, 0), complete: true}}
		next := 0
		for range rapid.IntRange(1, 30).Draw(t, "events") {
			if fetching := len(s) - 1; fetching > 0 && rapid.Bool().Draw(t, "dies") {
				i := 1 + rapid.IntRange(0, fetching-1).Draw(t, "who")
				s = append(s[:i:i], s[i+1:]...)
			} else {
				id := fmt.Sprintf("d%d", next)
				next++
				s = append(s, relay{id: id, place: placeOf(id, image, s.claim())})
			}
			got := parents(s, 0, trustAll)
			checkNoLoop(t, got)
			children := map[string]int{}
			for id, p := range got {
				children[p]++
				if p == "" || children[p] > 1 {
					t.Fatalf("%s takes from %q: %v", id, p, got)
				}
			}
		}
	})
}

func TestOnlyTheDeviceBehindAFailureSeesIt(t *testing.T) {
	image := verify.Digest{3}
	// importer -> cut -> b -> c: cut has stopped in the middle, b and c have all that it passed on.
	at := func(id string, rank uint32, have int64, whole bool) relay {
		return relay{id: id, place: placeOf(id, image, rank), have: have, complete: whole}
	}
	const mid = 100 << 20
	s := site{at("importer", 0, 200<<20, true), at("cut", 1, mid+100, false), at("b", 2, mid, false), at("c", 3, mid, false)}
	for id, want := range map[string]bool{"importer": false, "cut": true, "b": false, "c": false} {
		if got := s.withholds(id, slackBytes); got != want {
			t.Errorf("withholds(%s) = %v", id, got)
		}
	}
}

func TestSiteOfTakesOneWordPerMemberAndNeverItself(t *testing.T) {
	image := verify.Digest{4}
	s := siteOf([]Member{
		{ID: "self", Holdings: []Holding{{Image: image, Rank: 7}}},
		{ID: "a", Holdings: []Holding{{Image: image, Rank: 1}, {Image: image, Rank: 9}, {Image: verify.Digest{5}, Rank: 8}}},
		{ID: "a", Holdings: []Holding{{Image: image, Rank: 3}}},
		{ID: "liar", Holdings: []Holding{{Image: image, Rank: 1<<32 - 1}}},
	}, "self", image)
	if len(s) != 2 || s[0].place.rank != 1 {
		t.Errorf("%v", s)
	}
	if got := s.claim(); got != maxRank {
		t.Errorf("a rank wraps to %d", got)
	}
}

func TestTurnAway(t *testing.T) {
	image := verify.Digest{6}
	s := site{{id: "first", place: placeOf("first", image, 1)}, {id: "second", place: placeOf("second", image, 2)}}
	for _, c := range []struct {
		name     string
		child    string
		children []string
		refusals int
		want     bool
	}{
		{"nobody else takes from here", "second", nil, 0, false},
		{"a better parent takes from here", "second", []string{"first"}, 0, true},
		{"it insists", "second", []string{"first"}, maxRefusals, false},
		{"it is the better one", "first", []string{"second"}, 0, false},
		{"unknown, while another takes from here", "stranger", []string{"first"}, 0, true},
		{"unknown, alone", "stranger", nil, 0, false},
	} {
		if got := s.turnAway(c.child, c.children, c.refusals); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
