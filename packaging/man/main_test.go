package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const tree = `{"schema": "meshupd.help/1", "use": "meshupd", "short": "Root", "long": "All of it.",
 "flags": [{"name": "json", "type": "string", "no_value": "1", "usage": "in JSON", "persistent": true}],
 "topics": [{"name": "exit-codes", "text": "EXIT CODES\n    0  fine"}],
 "commands": [{"use": "status [DEVICE]", "short": "Show the site", "example": "  meshupd status",
   "flags": [{"name": "all", "shorthand": "a", "type": "bool", "default": "false", "usage": "every device"}]}]}`

func TestPages(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1790000000")
	dir := t.TempDir()
	if err := run(strings.NewReader(tree), dir); err != nil {
		t.Fatal(err)
	}
	for page, wants := range map[string][]string{
		"meshupd.1":        {"EXIT CODES", "0  fine", "meshupd-status(1)", "Sep 2026"},
		"meshupd-status.1": {"Show the site", "-a", "--json", "meshupd(1)"},
	} {
		raw, err := os.ReadFile(filepath.Join(dir, page))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(raw), want) {
				t.Errorf("%s has no %q:\n%s", page, want, raw)
			}
		}
	}
}

func TestOtherInputIsRefused(t *testing.T) {
	for _, in := range []string{"", "{}", `{"schema": "meshupd.help/2"}`} {
		if err := run(strings.NewReader(in), t.TempDir()); err == nil {
			t.Errorf("%q was taken", in)
		}
	}
}
