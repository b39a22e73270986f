package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
)

// An alarm stands above all devices, with both digests whole, and in the JSON.
func TestAlarmsAreShownFirst(t *testing.T) {
	st := control.SiteStatus{Alarms: []control.Alarm{{Code: verify.CodeFork, Place: "trust document 2", Kept: verify.Digest{1}, Other: verify.Digest{2}}},
		Devices: []control.DeviceStatus{{Name: "kiosk-1", State: control.StateBlocked}}}
	text := siteScreen(screen.Canvas{Width: 80, Height: 24, Location: time.UTC}, st, false)
	at := 0
	for _, want := range []string{"NEEDS YOU  two signed documents claim to be trust document 2 [E-FORK]", "in force  " + verify.Digest{1}.String(),
		"refused   " + verify.Digest{2}.String(), "meshupd help E-FORK", "kiosk-1"} {
		i := strings.Index(text[at:], want)
		if i < 0 {
			t.Fatalf("%q is not in its place in\n%s", want, text)
		}
		at += i
	}
	raw, err := json.Marshal(st)
	if err != nil || !strings.Contains(string(raw), `"alarms":[{"code":"E-FORK","place":"trust document 2","kept":"01`) {
		t.Errorf("%s (%v)", raw, err)
	}
	if raw, _ = json.Marshal(control.SiteStatus{}); strings.Contains(string(raw), "alarms") {
		t.Error("no alarm is not an empty list")
	}
}
