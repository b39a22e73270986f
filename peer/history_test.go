package peer

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func historyWith(t *testing.T, n int) (string, *History) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "history.log")
	h, err := OpenHistory(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if err := h.Append(Event{At: time.Unix(int64(i), 0).UTC(), Device: "dev", Name: "kiosk", Kind: EventConfirmed, To: "1.0." + string(rune('0'+i))}); err != nil {
			t.Fatal(err)
		}
	}
	return path, h
}

func TestHistorySurvivesRestart(t *testing.T) {
	path, _ := historyWith(t, 3)
	h, err := OpenHistory(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Append(Event{Device: "other", Kind: EventBlocked}); err != nil {
		t.Fatal(err)
	}
	h, err = OpenHistory(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := h.Events("", 10); len(got) != 4 || got[0].Device != "other" || got[3].To != "1.0.0" {
		t.Fatalf("after two restarts: %+v", got)
	}
	if got := h.Events("kiosk", 2); len(got) != 2 || got[0].To != "1.0.2" {
		t.Fatalf("of one device: %+v", got)
	}
}

func TestHistoryDropsATornLine(t *testing.T) {
	path, _ := historyWith(t, 3)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw[:len(raw)-5], 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := OpenHistory(path)
	if err != nil {
		t.Fatalf("a torn end is no damage: %v", err)
	}
	if got := h.Events("", 10); len(got) != 2 {
		t.Fatalf("kept %d events, want the two whole ones", len(got))
	}
	if err := h.Append(Event{Kind: EventImported}); err != nil {
		t.Fatal(err)
	}
	if h, err = OpenHistory(path); err != nil || len(h.Events("", 10)) != 3 {
		t.Fatalf("the chain does not go on after a torn line: %v", err)
	}
}

func TestHistoryShowsTampering(t *testing.T) {
	path, _ := historyWith(t, 3)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(raw), "1.0.1", "9.9.9", 1)
	if err := os.WriteFile(path, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := OpenHistory(path)
	if err == nil {
		t.Fatal("a changed line in the middle went unnoticed")
	}
	if _, err := os.Stat(path + ".broken"); err != nil {
		t.Fatalf("the damaged log was not kept: %v", err)
	}
	if err := h.Append(Event{Kind: EventImported}); err != nil {
		t.Fatalf("no usable history after damage: %v", err)
	}
}

func FuzzHistory(f *testing.F) {
	f.Add([]byte(`{"at":"1970-01-01T00:00:00Z","device":"d","name":"n","kind":"confirmed","prev":""}` + "\n"))
	f.Add([]byte("{}\n{}\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		events, good, _, err := parseHistory(raw)
		if err == nil && (good > int64(len(raw)) || len(events) > len(raw)) {
			t.Fatalf("read %d events and %d bytes out of %d bytes", len(events), good, len(raw))
		}
	})
}
