package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// maxWorking rows are shown without --all: 48 devices fit a screen of 30 lines.
const maxWorking = 10

// siteScreen draws the whole site. Pure: the clock is the status's own.
func siteScreen(c screen.Canvas, st control.SiteStatus, all bool) string {
	var b strings.Builder
	b.WriteString(siteHead(c, st))
	b.WriteString(alarmLines(c, st))
	needs, working, fine := sortOut(st)
	if len(needs) > 0 {
		b.WriteString("\n" + needsTable(c, st, needs))
	}
	shown := working
	if !all {
		shown = slices.DeleteFunc(slices.Clone(working), func(d control.DeviceStatus) bool {
			return d.State == control.StateWaiting && d.Reason == nil
		})
		shown = shown[:min(len(shown), maxWorking)]
	}
	if len(shown) > 0 {
		b.WriteString("\n" + workingTable(c, shown))
	}
	if all && len(fine) > 0 {
		b.WriteString("\n" + fineTable(c, st, fine))
	}
	b.WriteString(foldedLine(st, len(working)-len(shown), fine, all))
	return b.String()
}

// alarmLines come before all devices: they are about the keys of every one of them.
// Both digests are shown whole, because a person reads them to the publisher.
func alarmLines(c screen.Canvas, st control.SiteStatus) string {
	var b strings.Builder
	for _, a := range st.Alarms {
		fmt.Fprintf(&b, "\n%s  two signed documents claim to be %s [%s]\n", c.Paint(screen.Red, "NEEDS YOU"), c.Clean(a.Place), c.Clean(string(a.Code)))
		fmt.Fprintf(&b, "  in force  %s\n  refused   %s\n  tell the publisher: meshupd help %s\n", a.Kept, a.Other, c.Clean(string(a.Code)))
	}
	return b.String()
}

// sortOut splits the devices by who has to do something: a person, the device, nobody.
func sortOut(st control.SiteStatus) (needs, working, fine []control.DeviceStatus) {
	for _, d := range st.Devices {
		switch d.State {
		case control.StateBlocked, control.StateRolledBack, control.StateSilent:
			needs = append(needs, d)
		case control.StateConfirmed:
			fine = append(fine, d)
		default:
			working = append(working, d)
		}
	}
	rank := func(d control.DeviceStatus) int { return -slices.Index(control.States, d.State) }
	slices.SortStableFunc(needs, func(a, b control.DeviceStatus) int { return rank(b) - rank(a) })
	slices.SortStableFunc(working, func(a, b control.DeviceStatus) int { return rank(a) - rank(b) })
	return needs, working, fine
}

// siteHead is the four lines on top: site, release, rollout, traffic.
func siteHead(c screen.Canvas, st control.SiteStatus) string {
	head := c.Flow("Site     ",
		c.Clean(st.Site.ID),
		fmt.Sprintf("%s, %d heard in 60 s", count(st.Site.Devices, "device"), st.Site.Heard),
		"seen from "+c.Clean(st.Observer),
		st.GeneratedAt.In(c.Location).Format("15:04:05"))
	rel := st.Release
	if rel == nil {
		return head + c.Flow("Release  ", "none yet: meshupd import PATH")
	}
	line := c.Clean(rel.Product) + " " + c.Clean(rel.Version)
	if rel.Channel != "" {
		line += ", channel " + c.Clean(rel.Channel)
	}
	signed := ""
	if rel.Signer != "" {
		signed = "signed by " + c.Clean(rel.Signer)
		if fpr := screen.Fingerprint(rel.SignerFpr); len(rel.SignerFpr) >= 8 {
			signed += " (" + fpr[:9] + ")"
		}
	}
	from := ""
	if rel.Source != "" {
		from = "from " + sourceName(c, rel.Source)
		if !rel.Since.IsZero() {
			from += " at " + c.Clock(rel.Since, st.GeneratedAt)
		}
	}
	head += c.Flow("Release  ", line, signed, from)
	done, total := confirmed(st), len(st.Devices)
	bar := min(40, max(10, c.Width-50))
	head += c.Flow("Rollout  ", screen.Bar(int64(done), int64(total), bar), fmt.Sprintf("%d of %d confirmed", done, total), slowest(st))
	return head + traffic(c, st.Bytes)
}

// slowest is how long the last of the fetching devices still needs: what comes after has no rate to reckon with.
func slowest(st control.SiteStatus) string {
	left := int64(-1)
	for _, d := range st.Devices {
		if d.State == control.StateFetching && d.Left != nil {
			left = max(left, *d.Left)
		}
	}
	if left < 0 {
		return ""
	}
	return "last copy in " + screen.Span(time.Duration(left)*time.Second)
}

func sourceName(c screen.Canvas, source string) string {
	switch source {
	case "usb":
		return "USB"
	case "lan":
		return "a neighbour"
	case "web":
		return "the internet"
	}
	return c.Clean(source)
}

func traffic(c screen.Canvas, b control.Bytes) string {
	var parts []string
	for _, p := range []struct {
		name string
		n    *int64
	}{{"USB", b.USB}, {"between devices", b.LAN}, {"internet", b.Web}} {
		if p.n != nil {
			parts = append(parts, p.name+" "+screen.Bytes(*p.n))
		}
	}
	if b.Rate != nil {
		parts = append(parts, "now "+screen.Rate(*b.Rate))
	}
	if len(parts) == 0 {
		return ""
	}
	return c.Flow("Traffic  ", parts...)
}

// Widths of the columns that all three tables share, so that they stand below each other.
var (
	deviceColumn  = screen.Column{Min: 10, Max: 20}
	versionColumn = screen.Column{Title: "VERSION", Min: 14, Max: 22}
	stateColumn   = screen.Column{Title: "STATE", Min: 11}
)

func titled(col screen.Column, title string) screen.Column {
	col.Title = title
	return col
}

func needsTable(c screen.Canvas, st control.SiteStatus, devices []control.DeviceStatus) string {
	t := screen.Table{Columns: []screen.Column{titled(deviceColumn, "NEEDS YOU"), versionColumn, stateColumn,
		{Title: "SINCE", Min: 5}, {Title: "WHY, AND WHAT TO DO", Min: 20}}}
	for _, d := range devices {
		t.Rows = append(t.Rows, []string{c.Clean(d.Label()), versions(c, d), c.Clean(string(d.State)),
			c.Clock(d.Since, st.GeneratedAt), why(c, st.GeneratedAt, d)})
	}
	return t.Draw(c)
}

func workingTable(c screen.Canvas, devices []control.DeviceStatus) string {
	t := screen.Table{Columns: []screen.Column{titled(deviceColumn, "WORKING"), versionColumn, stateColumn,
		{Title: "DONE", Min: 5}, {Title: "SPEED", Min: 10}, {Title: "LEFT", Min: 6}, {Title: "FROM", Min: 4}}}
	for _, d := range devices {
		done, speed, left, from := "-", "-", "-", "-"
		if d.Done != nil && d.Size != nil {
			done = screen.Percent(*d.Done, *d.Size)
		}
		if d.Rate != nil {
			speed = screen.Rate(*d.Rate)
		}
		if d.Left != nil {
			left = screen.Span(time.Duration(*d.Left) * time.Second)
		}
		if len(d.From) > 0 {
			from = sources(c, d.From)
		} else if d.Reason != nil {
			from = reasonText(c, d.Reason)
		}
		t.Rows = append(t.Rows, []string{c.Clean(d.Label()), versions(c, d), c.Clean(string(d.State)), done, speed, left, from})
	}
	return t.Draw(c)
}

func fineTable(c screen.Canvas, st control.SiteStatus, devices []control.DeviceStatus) string {
	t := screen.Table{Columns: []screen.Column{titled(deviceColumn, "FINE"), versionColumn, stateColumn, {Title: "SINCE", Min: 5}}}
	for _, d := range devices {
		t.Rows = append(t.Rows, []string{c.Clean(d.Label()), versions(c, d), c.Clean(string(d.State)), c.Clock(d.Since, st.GeneratedAt)})
	}
	return t.Draw(c)
}

// foldedLine counts what the tables leave out.
func foldedLine(st control.SiteStatus, hidden int, fine []control.DeviceStatus, all bool) string {
	if all || len(st.Devices) == 0 {
		return ""
	}
	var parts []string
	done := confirmed(st)
	if done > 0 {
		parts = append(parts, fmt.Sprintf("%d confirmed", done))
	}
	if other := len(fine) - done; other > 0 {
		parts = append(parts, fmt.Sprintf("%d confirmed on another version", other))
	}
	if hidden > 0 {
		parts = append(parts, fmt.Sprintf("%d waiting or working", hidden))
	}
	if len(parts) == 0 {
		return ""
	}
	return "\n" + strings.Join(parts, ", ") + " not shown: meshupd status --all\n"
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.Itoa(n) + " " + noun + "s"
}

// versions is "2.3.2 > 2.4.0" for a device on its way.
func versions(c screen.Canvas, d control.DeviceStatus) string {
	v := c.Clean(d.Version)
	if v == "" {
		v = "-"
	}
	if d.Target != "" && d.Target != d.Version {
		v += " > " + c.Clean(d.Target)
	}
	return v
}

// sources is "kiosk-02, gw-03 and 4 more".
func sources(c screen.Canvas, from []string) string {
	shown := make([]string, 0, 2)
	for _, f := range from[:min(len(from), 2)] {
		shown = append(shown, c.Fit(c.Clean(f), 20))
	}
	text := strings.Join(shown, ", ")
	if more := len(from) - len(shown); more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// why says what is wrong with a device and what to do about it.
func why(c screen.Canvas, now time.Time, d control.DeviceStatus) string {
	if d.State == control.StateSilent {
		if d.LastHeard.IsZero() {
			return "never heard: power or cable?"
		}
		return "not heard for " + screen.Span(now.Sub(d.LastHeard)) + ": power or cable?"
	}
	if d.Reason == nil {
		return "no reason given: meshupd status " + c.Clean(d.Label())
	}
	text := reasonText(c, d.Reason)
	switch row := codeTexts[d.Reason.Code].row; {
	case d.Reason.Code == verify.CodeHealth:
		text += ": meshupd history " + c.Clean(d.Label())
	case row != "":
		text += ": " + row
	}
	return text + " [" + c.Clean(string(d.Reason.Code)) + "]"
}

// reasonText is the reason in words, without what to do.
func reasonText(c screen.Canvas, r *control.Reason) string {
	if r.Code == verify.CodeSpace && r.NeedBytes > 0 {
		text := screen.Bytes(r.NeedBytes) + " short"
		if r.Path != "" {
			text += " on " + c.Clean(r.Path)
		}
		return text
	}
	if r.Detail != "" {
		return c.Clean(r.Detail)
	}
	if t, ok := codeTexts[r.Code]; ok {
		return strings.TrimSuffix(t.sentence, ".")
	}
	return c.Clean(string(r.Code))
}

// deviceScreen draws all about one device.
func deviceScreen(c screen.Canvas, st control.SiteStatus, d control.DeviceStatus, events []control.Event) string {
	var b strings.Builder
	line := func(label, text string) {
		if text == "" {
			return
		}
		parts := screen.Wrap(text, c.Width-12)
		fmt.Fprintf(&b, "%-10s  %s\n", label, parts[0])
		for _, p := range parts[1:] {
			fmt.Fprintf(&b, "%-10s  %s\n", "", p)
		}
	}
	line("Device", c.Clean(d.Label()))
	line("Id", c.Clean(d.ID))
	line("Hardware", c.Clean(d.Hardware))
	line("Version", versions(c, d))
	state := c.Clean(string(d.State))
	if !d.Since.IsZero() {
		state += " since " + c.Stamp(d.Since)
	}
	line("State", state)
	if d.Reason != nil {
		line("Why", reasonText(c, d.Reason)+" ["+c.Clean(string(d.Reason.Code))+"]")
		line("Fix", codeTexts[d.Reason.Code].fix)
	} else if d.State == control.StateSilent {
		line("Why", why(c, st.GeneratedAt, d))
	}
	if d.Done != nil && d.Size != nil {
		line("Progress", screen.Bar(*d.Done, *d.Size, 30)+"  "+screen.Percent(*d.Done, *d.Size)+" of "+screen.Bytes(*d.Size))
	}
	if d.Rate != nil {
		line("Speed", screen.Rate(*d.Rate))
	}
	if len(d.From) > 0 {
		line("From", c.Clean(strings.Join(d.From, ", ")))
	}
	if d.Left != nil {
		line("Left", screen.Span(time.Duration(*d.Left)*time.Second))
	}
	if !d.LastHeard.IsZero() {
		line("Heard", screen.Span(st.GeneratedAt.Sub(d.LastHeard))+" ago")
	}
	if len(d.Addrs) > 0 {
		line("Addresses", c.Clean(strings.Join(d.Addrs, ", ")))
	}
	if len(events) > 0 {
		b.WriteString("\n" + historyTable(c, events))
	}
	return b.String()
}

// plainStatus is one device a line: the fields of JSON in a fixed order, "-" for what is absent.
func plainStatus(c screen.Canvas, st control.SiteStatus) string {
	var b strings.Builder
	for _, d := range st.Devices {
		b.WriteString(plainDevice(c, d))
	}
	return b.String()
}

func plainDevice(c screen.Canvas, d control.DeviceStatus) string {
	number := func(n *int64) string {
		if n == nil {
			return ""
		}
		return strconv.FormatInt(*n, 10)
	}
	code, detail, rate, since := "", "", "", ""
	if d.Reason != nil {
		code, detail = string(d.Reason.Code), d.Reason.Detail
	}
	if d.Rate != nil {
		rate = strconv.FormatFloat(*d.Rate, 'f', 0, 64)
	}
	if !d.Since.IsZero() {
		since = d.Since.UTC().Format(time.RFC3339)
	}
	return plainLine(c, d.ID, d.Name, d.Version, d.Target, string(d.State), since, number(d.Done), number(d.Size), rate, code, detail)
}

// plainLine joins fields by tabs; Clean leaves no tab in them.
func plainLine(c screen.Canvas, fields ...string) string {
	for i, f := range fields {
		if f == "" {
			f = "-"
		}
		fields[i] = c.Clean(f)
	}
	return strings.Join(fields, "\t") + "\n"
}

// changeLines tells what changed since the last status, one line each; for the first it tells where all stand.
func changeLines(c screen.Canvas, last *control.SiteStatus, st control.SiteStatus, only string) string {
	before := map[string]control.DeviceStatus{}
	if last != nil {
		for _, d := range last.Devices {
			before[d.ID] = d
		}
	}
	var b strings.Builder
	at := st.GeneratedAt.In(c.Location).Format("15:04:05")
	for _, d := range st.Devices {
		if only != "" && d.ID != only && d.Name != only {
			continue
		}
		old, known := before[d.ID]
		if known && old.State == d.State && old.Version == d.Version && old.Target == d.Target {
			continue
		}
		fmt.Fprintf(&b, "%s  %s  %s  %s", at, c.Clean(d.Label()), versions(c, d), c.Clean(string(d.State)))
		switch d.State {
		case control.StateBlocked, control.StateRolledBack, control.StateSilent:
			b.WriteString(": " + why(c, st.GeneratedAt, d))
		}
		b.WriteByte('\n')
	}
	if only == "" && (last == nil || confirmed(*last) != confirmed(st)) {
		fmt.Fprintf(&b, "%s  %d of %d confirmed\n", at, confirmed(st), len(st.Devices))
	}
	return b.String()
}
