package verify

import (
	"slices"
	"strings"
)

// Hardware is named by ids; a release may also name it by patterns, in which '*'
// stands for any characters, none included. A pattern begins with a letter or
// digit, because "every device" already has a spelling: no list at all.

// maxStars bounds the work of matching.
const maxStars = 4

func isPattern(s string) bool {
	stars := strings.Count(s, "*")
	if stars > maxStars || strings.HasPrefix(s, "*") || strings.Contains(s, "**") {
		return false
	}
	// A star takes the place of something that may stand there.
	return isID(strings.ReplaceAll(s, "*", "x"))
}

// serves reports whether a hardware list includes hw; an empty list includes all.
func serves(list []string, hw string) bool {
	return len(list) == 0 || slices.ContainsFunc(list, func(p string) bool { return isPattern(p) && meet(p, hw) })
}

// overlap reports whether two hardware lists may have a device in common; an empty list is every device.
func overlap(a, b []string) bool {
	if len(a) == 0 || len(b) == 0 {
		return true
	}
	return slices.ContainsFunc(a, func(s string) bool {
		return slices.ContainsFunc(b, func(t string) bool { return meet(s, t) })
	})
}

// meet reports whether some text matches both patterns; for a pattern and a plain
// name that is whether the name matches. It fills a table of prefixes, so its
// work is the product of the lengths, whatever the patterns are.
func meet(a, b string) bool {
	row := make([]bool, len(b)+1) // row[j]: the first i bytes of a meet the first j of b
	row[0] = true
	for j := range len(b) {
		row[j+1] = row[j] && b[j] == '*'
	}
	for i := range len(a) {
		next := make([]bool, len(b)+1)
		next[0] = row[0] && a[i] == '*'
		for j := range len(b) {
			if a[i] == '*' || b[j] == '*' {
				next[j+1] = row[j+1] || next[j] // the star is at its end, or takes one more
			} else {
				next[j+1] = row[j] && a[i] == b[j]
			}
		}
		row = next
	}
	return row[len(b)]
}
