// Package screen draws tables, bars and lines for terminals of any width.
//
// Names, versions and reasons come from other machines. Nothing of them reaches
// a terminal but through Canvas.Clean: a device name must not move a cursor,
// hide a line or turn text around.
package screen

import (
	"bytes"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Canvas says how to draw.
type Canvas struct {
	Width, Height int
	ASCII         bool // only bytes 32 to 126
	Color         bool
	Location      *time.Location
}

// maxClean bounds one piece of foreign text on a screen, in bytes.
const maxClean = 1024

// Clean makes foreign text safe to show: control, format and invalid characters
// are written as escapes, and what is too long is cut.
func (c Canvas) Clean(s string) string {
	cut := ""
	if len(s) > maxClean {
		s, cut = s[:maxClean], c.ellipsis()
	}
	var b strings.Builder
	marks := 0
	for i, r := range s {
		if unicode.Is(unicode.M, r) {
			marks++
		} else {
			marks = 0
		}
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD"):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r < 0x80 && unicode.IsPrint(r), r >= 0x80 && !c.ASCII && unicode.IsPrint(r) && marks < 3:
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String() + cut
}

// CleanLines is Clean for text of our own making that may hold foreign parts: line ends and tabs stay.
func (c Canvas) CleanLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = c.Clean(strings.ReplaceAll(line, "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

// CleanJSON escapes, inside encoded JSON, the characters that JSON allows and terminals obey.
func CleanJSON(raw []byte) []byte {
	if bytes.IndexFunc(raw, unsafeInJSON) < 0 {
		return raw
	}
	var b bytes.Buffer
	for _, r := range string(raw) {
		switch {
		case !unsafeInJSON(r):
			b.WriteRune(r)
		case r > 0xffff:
			r -= 0x10000
			fmt.Fprintf(&b, `\u%04x\u%04x`, 0xd800+(r>>10), 0xdc00+(r&0x3ff))
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.Bytes()
}

// unsafeInJSON leaves ASCII to the encoder, which escapes control characters
// inside strings and uses line ends between values.
func unsafeInJSON(r rune) bool { return r == 0x7f || r >= 0x80 && !unicode.IsPrint(r) }

func (c Canvas) ellipsis() string {
	if c.ASCII {
		return "~"
	}
	return "…"
}

// Fit cuts clean text to a width.
func (c Canvas) Fit(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	if width < 1 {
		return ""
	}
	return string([]rune(s)[:width-1]) + c.ellipsis()
}

// Pad fits and fills to a width.
func (c Canvas) Pad(s string, width int) string {
	s = c.Fit(s, width)
	return s + strings.Repeat(" ", width-utf8.RuneCountInString(s))
}

// Wrap breaks clean text into lines of at most width, at spaces where it can.
func Wrap(s string, width int) []string {
	width = max(width, 8)
	var lines []string
	line := ""
	for _, word := range strings.Fields(s) {
		for utf8.RuneCountInString(word) > width {
			if line != "" {
				lines, line = append(lines, line), ""
			}
			r := []rune(word)
			lines, word = append(lines, string(r[:width])), string(r[width:])
		}
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			lines, line = append(lines, line), word
		}
	}
	if line != "" || len(lines) == 0 {
		lines = append(lines, line)
	}
	return lines
}

// Flow writes parts with gaps behind a label, and goes on below the first part where the width ends.
func (c Canvas) Flow(label string, parts ...string) string {
	const gap = "   "
	labelWidth := utf8.RuneCountInString(label)
	lines := []string{label}
	for _, part := range parts {
		if part == "" {
			continue
		}
		last := &lines[len(lines)-1]
		used := utf8.RuneCountInString(*last)
		switch {
		case used == labelWidth:
			*last += part
		case used+len(gap)+utf8.RuneCountInString(part) <= c.Width:
			*last += gap + part
		default:
			lines = append(lines, strings.Repeat(" ", labelWidth)+part)
		}
	}
	return strings.Join(lines, "\n") + "\n"
}

// Colours, never the only sign of anything.
const (
	Bold   = "1"
	Red    = "31"
	Green  = "32"
	Yellow = "33"
)

// Paint colours text where the canvas has colour.
func (c Canvas) Paint(color, s string) string {
	if !c.Color || s == "" {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}
