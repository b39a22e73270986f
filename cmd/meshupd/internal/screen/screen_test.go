package screen

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestClean(t *testing.T) {
	for _, tt := range []struct{ in, utf8, ascii string }{
		{"kiosk-1", "kiosk-1", "kiosk-1"},
		{"\x1b[2J", `\x1b[2J`, `\x1b[2J`},
		{"a\nb\tc\r\x00\x7f", `a\x0ab\x09c\x0d\x00\x7f`, `a\x0ab\x09c\x0d\x00\x7f`},
		{"\u009b31m", `\u009b31m`, `\u009b31m`},
		{"\u202eabc\u200b\u2028", `\u202eabc\u200b\u2028`, `\u202eabc\u200b\u2028`},
		{"\xff\xc3", `\xff\xc3`, `\xff\xc3`},
		{"\uFFFD", "\uFFFD", `\ufffd`},
		{"Küche", "Küche", `K\u00fcche`},
		{"a\u0301\u0301\u0301\u0301", "a\u0301\u0301" + `\u0301\u0301`, `a\u0301\u0301\u0301\u0301`},
		{"\U000e0041", `\U000e0041`, `\U000e0041`},
		{strings.Repeat("x", 2000), strings.Repeat("x", maxClean) + "…", strings.Repeat("x", maxClean) + "~"},
	} {
		if got := (Canvas{}).Clean(tt.in); got != tt.utf8 {
			t.Errorf("Clean(%q) = %q, want %q", tt.in, got, tt.utf8)
		}
		if got := (Canvas{ASCII: true}).Clean(tt.in); got != tt.ascii {
			t.Errorf("ASCII Clean(%q) = %q, want %q", tt.in, got, tt.ascii)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("kiosk-1", "\x1b[2J\u009b\u202e\xff")
	f.Add("", "a\u0301")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, c := range []Canvas{{Width: 80}, {Width: 20, ASCII: true}} {
			table := Table{Columns: []Column{{Title: "A", Min: 4, Max: 10}, {Title: "B", Min: 4}}, Rows: [][]string{{c.Clean(a), c.Clean(b)}}}
			for _, r := range table.Draw(c) + c.Flow("L  ", c.Clean(a), c.Clean(b)) {
				if r != '\n' && (!unicode.IsPrint(r) || c.ASCII && r > 0x7e) {
					t.Fatalf("%q came through", r)
				}
			}
		}
		raw, err := json.Marshal([]string{a, b})
		if err != nil {
			t.Fatal(err)
		}
		clean := CleanJSON(raw)
		for _, r := range string(clean) {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q came through in JSON", r)
			}
		}
		var want, got []string
		if json.Unmarshal(raw, &want) != nil || json.Unmarshal(clean, &got) != nil || got[0] != want[0] || got[1] != want[1] {
			t.Fatalf("%q became %q", want, got)
		}
	})
}

func TestTableKeepsTheWidth(t *testing.T) {
	long := strings.Repeat("word ", 30)
	table := Table{Columns: []Column{{Title: "A", Min: 4, Max: 12}, {Title: "B", Min: 4, Max: 12}, {Title: "C", Min: 10}},
		Rows: [][]string{{"short", "1", "x"}, {strings.Repeat("ä", 40), strings.Repeat("2", 40), long + strings.Repeat("y", 90)}}}
	for _, width := range []int{40, 80, 200} {
		for line := range strings.Lines(table.Draw(Canvas{Width: width})) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
				t.Errorf("width %d: a line of %d: %q", width, n, line)
			}
		}
	}
}

func TestUnits(t *testing.T) {
	now := time.Date(2026, 11, 23, 14, 32, 0, 0, time.UTC)
	c := Canvas{Location: time.UTC}
	for _, tt := range []struct{ got, want string }{
		{Bytes(673185792), "642 MiB"},
		{Bytes(-1), "-"},
		{Rate(1 << 20), "1.0 MiB/s"},
		{Rate(-1), "-"},
		{Percent(999, 1000), "99 %"},
		{Percent(1000, 1000), "100 %"},
		{Percent(5, 0), "-"},
		{Bar(1, 4, 8), "[##------]"},
		{Bar(399, 400, 8), "[#######-]"},
		{Bar(9, 4, 8), "[########]"},
		{Span(95 * time.Second), "95 s"},
		{Span(90 * time.Minute), "90 min"},
		{Span(-time.Second), "0 s"},
		{Span(72 * time.Hour), "3 d"},
		{Took(372), "6m12s"},
		{c.Clock(now.Add(-time.Hour), now), "13:32"},
		{c.Clock(now.AddDate(0, 0, -1), now), "Nov 22"},
		{c.Clock(now.AddDate(-1, 0, 0), now), "2025"},
		{c.Clock(time.Time{}, now), "-"},
		{Fingerprint("95125CE774"), "9512 5CE7 74"},
		{Fingerprint("9512\u009b31m"), "(no fingerprint)"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %q, want %q", tt.got, tt.want)
		}
	}
}
