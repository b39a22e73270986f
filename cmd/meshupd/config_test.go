package main

import (
	"os"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
)

var epoch = time.Date(2026, 11, 23, 14, 32, 7, 0, time.UTC)

const sixLines = `product = "kiosk-a"
trust = "/usr/lib/meshupd/trust"
[slots]
folder = "/var/lib/app"
[health]
command = ["/usr/lib/app/healthy"]
`

func parse(t *testing.T, texts ...string) (Config, error) {
	t.Helper()
	var files []configFile
	for i, text := range texts {
		files = append(files, configFile{string(rune('a'+i)) + ".toml", []byte(text)})
	}
	return parseConfig(files)
}

func TestSixLinesAreEnough(t *testing.T) {
	cfg, err := parse(t, sixLines)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Channel != "stable" || cfg.Mesh.Port != 7610 || cfg.Store.Reserve != 64<<20 || !cfg.Mesh.MDNS ||
		time.Duration(cfg.Health.Deadline) != 2*time.Minute || cfg.Policy.Auto != "install" || cfg.Socket() != "/run/meshupd/api.sock" {
		t.Errorf("other defaults than documented: %+v", cfg)
	}
}

// The half that talks to the network never holds a slot that it could write.
func TestStraightIsRefusedWithSeparatedPrivileges(t *testing.T) {
	block := "[slots]\nkind = \"block\"\na = \"/dev/a\"\nb = \"/dev/b\"\nbootloader = \"grub\"\n[store]\nstraight = true\n"
	if cfg, err := parse(t, sixLines, block); err != nil || !cfg.Store.Straight {
		t.Fatalf("as one process: %v", err)
	}
	_, err := parse(t, sixLines, block+"[apply]\nsocket = \"/run/meshupd-apply/socket\"\n")
	if verify.CodeOf(err) != verify.CodeConfig || !strings.Contains(err.Error(), "store.straight cannot be with apply.socket") {
		t.Fatalf("as two: %v", err)
	}
}

func TestLayersWinValueByValue(t *testing.T) {
	cfg, err := parse(t, sixLines+"[mesh]\nport = 1\nseeds = [\"a:1\"]\n", "[mesh]\nport = 2\n", "[limits]\nupload = \"4MiB/s\"\n")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Mesh.Port != 2 || len(cfg.Mesh.Seeds) != 1 || cfg.Limits.Upload != 4<<20 || cfg.Product != "kiosk-a" {
		t.Errorf("got %+v", cfg)
	}
}

func TestConfigErrorsHavePlaceAndPicture(t *testing.T) {
	for _, tt := range []struct{ name, add, want, picture string }{
		{"unknown key", "[store]\nreserv = \"1MiB\"\n", `a.toml:8:1: unknown key "store.reserv": did you mean store.reserve?`,
			"    7 | [store]\n    8 | reserv = \"1MiB\"\n      | ^^^^^^\n"},
		{"wrong type", "[mesh]\nport = \"x\"\n", "a.toml:8:8: mesh.port has a value of the wrong type: a whole number is wanted",
			"    7 | [mesh]\n    8 | port = \"x\"\n      |        ^\n"},
		{"bad size", "[store]\nreserve = \"much\"\n", `a.toml:8:11: "much" is not a size like "64MiB"`, ""},
		{"bad rate", "[limits]\nupload = \"fast\"\n", `a.toml:8:10: "fast" is not a rate like "4MiB/s"`, ""},
		{"bare number as duration", "interval = 5\n", `a.toml:7:1: health.interval is less than 10ms (write it like "90s")`, ""},
		{"grace", "grace = \"5m\"\n", "a.toml:7:1: health.grace is not shorter than health.deadline", ""},
		{"http", "http = [\"ftp://x\"]\n", `a.toml:7:1: health.http has "ftp://x", which is not like`, ""},
		{"unit", "units = [\"--all\"]\n", `a.toml:7:1: health.units has "--all", which is not a unit`, ""},
		{"file", "files = [\"run/x\"]\n", `a.toml:7:1: health.files has "run/x", which does not begin with /`, ""},
		{"port", "[mesh]\nport = 70000\n", "a.toml:8:1: mesh.port is not a port: 0 to 65535", ""},
		{"seed", "[mesh]\nseeds = [\"nope\"]\n", `a.toml:8:1: mesh.seeds has "nope", which is not host:port`, ""},
		{"pattern", "[mesh]\ninterfaces = [\"eth[\"]\n", "a.toml:8:1: mesh.interfaces has a pattern", ""},
		{"straight", "[store]\nstraight = true\n", `a.toml:8:1: store.straight needs slots.kind = "block"`, ""},
		{"policy", "[policy]\nauto = \"sometimes\"\n", "a.toml:8:1: policy.auto is not", ""},
		{"broken", "[policy\n", "a.toml:7:8: expected ']'", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parse(t, sixLines+tt.add)
			if verify.CodeOf(err) != verify.CodeConfig || !strings.HasPrefix(err.Error(), tt.want) {
				t.Fatalf("got %v, want %s", err, tt.want)
			}
			f := explain(t.Context(), err)
			if f.picture == "" || tt.picture != "" && f.picture != tt.picture {
				t.Errorf("got picture\n%swant\n%s", f.picture, tt.picture)
			}
		})
	}
}

// The value that won is the one to correct, so the error names its file.
func TestConfigErrorNamesTheLayerThatWon(t *testing.T) {
	_, err := parse(t, sixLines+"[mesh]\nport = 1\n", "[mesh]\nport = -1\n")
	if err == nil || !strings.HasPrefix(err.Error(), "b.toml:2:1: mesh.port") {
		t.Errorf("got %v", err)
	}
}

func TestMissingValues(t *testing.T) {
	for _, key := range []string{"product", "trust", "folder"} {
		var kept []string
		for line := range strings.Lines(sixLines) {
			if !strings.HasPrefix(line, key) {
				kept = append(kept, line)
			}
		}
		if _, err := parse(t, strings.Join(kept, "")); err == nil || !strings.Contains(err.Error(), key+" is missing") {
			t.Errorf("without %s: %v", key, err)
		}
	}
}

func TestLoadConfigBoundsTheFile(t *testing.T) {
	path := t.TempDir() + "/big.toml"
	if err := os.WriteFile(path, make([]byte, maxConfig+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadConfig(path); verify.CodeOf(err) != verify.CodeConfig {
		t.Errorf("got %v", err)
	}
	if _, err := loadConfig(path + ".no"); verify.CodeOf(err) != verify.CodeConfig {
		t.Errorf("got %v", err)
	}
}

func TestUnitsReadBackWhatTheyWrite(t *testing.T) {
	for _, n := range []Size{0, 1, 1023, 1024, 64 << 20, 3 << 40, 1<<40 + 1} {
		text, _ := n.MarshalText()
		var got Size
		if err := got.UnmarshalText(text); err != nil || got != n {
			t.Errorf("%d is written %s and read as %d (%v)", n, text, got, err)
		}
		text, _ = Rate(n).MarshalText()
		var rate Rate
		if err := rate.UnmarshalText(text); err != nil || rate != Rate(n) {
			t.Errorf("%d is written %s and read as %d (%v)", n, text, rate, err)
		}
	}
}
