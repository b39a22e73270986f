package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

const delegateLines = `product = "kiosk-a"
trust = "/usr/lib/meshupd/trust"
[slots]
kind = "KIND"
`

func TestDelegatesAreChecked(t *testing.T) {
	for add, want := range map[string]string{
		"command":                                                 "slots.delegate.command is missing",
		"command\ndelegate.command = [\"\"]":                      "a.toml:5:1: slots.delegate.command names no command",
		"rauc\ndelegate.a = \"A\"":                                "slots.delegate.a and slots.delegate.b belong together",
		"rauc\ndelegate.a = \"A\"\ndelegate.b = \"A\"":            "slots.delegate.b is the same",
		"rauc\ndelegate.timeout = \"1ms\"":                        "slots.delegate.timeout is less than",
		"swupdate":                                                "slots.bootloader is missing",
		"swupdate\nbootloader = \"grub\"":                         "slots.a is missing",
		"swupdate\nbootloader = \"lilo\"\na = \"/a\"\nb = \"/b\"": "slots.bootloader is \"lilo\"",
		"mender\ndelegate.command = [\"mender\", \"install\"]":    "slots.delegate.command has no {file}",
		"rau": `slots.kind is "rau", not one of`,
	} {
		kind, rest, _ := strings.Cut(add, "\n")
		_, err := parse(t, strings.ReplaceAll(delegateLines, "KIND", kind)+rest+"\n")
		if verify.CodeOf(err) != verify.CodeConfig || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", add, err, want)
		}
	}
	for kind, rest := range map[string]string{
		"rauc": "", "command": "delegate.command = [\"/x\"]\n",
		"swupdate": "bootloader = \"grub\"\na = \"/a\"\nb = \"/b\"\n",
		"mender":   "bootloader = \"custom\"\nboot.command = [\"/x\"]\n",
	} {
		cfg, err := parse(t, strings.ReplaceAll(delegateLines, "KIND", kind)+rest)
		if err != nil || cfg.Slots.delegate() == nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func TestDelegateOpens(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "installer")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho '{\"default\":\"b\",\"booted\":\"b\"}'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg, err := parse(t, strings.ReplaceAll(delegateLines, "KIND", "command")+"factory = \"1.0.0\"\ndelegate.command = [\""+script+"\"]\n")
	if err != nil {
		t.Fatal(err)
	}
	cfg.State = filepath.Join(dir, "state")
	slots, err := openSlots(context.Background(), cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := slots.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := slots.State(t.Context())
	if err != nil || st.Booted != install.SlotB || !st.Slots[install.SlotB].Whole || st.Slots[install.SlotB].Version != "1.0.0" {
		t.Fatalf("the slots are %+v, %v", st, err)
	}
}
