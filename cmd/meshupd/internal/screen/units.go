package screen

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Bytes writes a size: "642 MiB".
func Bytes(n int64) string {
	if n < 0 {
		return "-"
	}
	return humanize.IBytes(uint64(n))
}

// Rate writes a speed: "12 MiB/s".
func Rate(bytesPerSecond float64) string {
	if math.IsNaN(bytesPerSecond) || bytesPerSecond < 0 || bytesPerSecond > math.MaxInt64/2 {
		return "-"
	}
	return Bytes(int64(bytesPerSecond)) + "/s"
}

// Percent never says 100 before all is there.
func Percent(done, size int64) string {
	if size <= 0 || done < 0 {
		return "-"
	}
	return fmt.Sprintf("%d %%", share(done, size, 100))
}

// share is done of size in parts, rounded down, without overflow.
func share(done, size int64, parts int) int {
	if done >= size {
		return parts
	}
	return min(int(float64(done)/float64(size)*float64(parts)), parts-1)
}

// Span writes a duration for people: "19 s", "4 min", "6 h", "12 d".
func Span(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

// Took writes how long something took, to the second: "6m12s".
func Took(seconds float64) string {
	if math.IsNaN(seconds) || seconds < 0 || seconds > 1e9 {
		return "-"
	}
	return (time.Duration(seconds) * time.Second).String()
}

// Clock writes a time as near as needed: the time of day, else the date.
func (c Canvas) Clock(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	t, now = t.In(c.Location), now.In(c.Location)
	switch {
	case t.Year() == now.Year() && t.YearDay() == now.YearDay():
		return t.Format("15:04")
	case t.Year() == now.Year():
		return t.Format("Jan 2")
	}
	return t.Format("2006")
}

// Stamp writes date and time.
func (c Canvas) Stamp(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.In(c.Location).Format("2006-01-02 15:04")
}

// Bar draws how much of a whole is done.
func Bar(done, size int64, width int) string {
	n := 0
	if size > 0 && done > 0 {
		n = share(done, size, width)
	}
	return "[" + strings.Repeat("#", n) + strings.Repeat("-", width-n) + "]"
}

// Fingerprint groups hex digits by four. What is not hex is no fingerprint, and
// is not shown: cutting other text apart could also cut its escapes.
func Fingerprint(s string) string {
	if len(s) > 64 || strings.Trim(s, "0123456789ABCDEFabcdef") != "" {
		return "(no fingerprint)"
	}
	var parts []string
	for len(s) > 4 {
		parts, s = append(parts, s[:4]), s[4:]
	}
	return strings.Join(append(parts, s), " ")
}
