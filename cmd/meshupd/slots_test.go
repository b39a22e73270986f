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

const blockLines = `product = "kiosk-a"
trust = "/usr/lib/meshupd/trust"
[slots]
kind = "block"
a = "/dev/disk/by-partlabel/a"
b = "/dev/disk/by-partlabel/b"
`

func TestBlockSlotsAreChecked(t *testing.T) {
	for add, want := range map[string]string{
		"":                        "slots.bootloader is missing",
		"bootloader = \"lilo\"\n": `a.toml:7:1: slots.bootloader is "lilo", not one of`,
		"bootloader = \"efi\"\n":  "slots.boot.a is missing",
		"bootloader = \"efi\"\nboot.a = \"0001\"\n":                         "slots.boot.b is missing",
		"bootloader = \"custom\"\n":                                         "slots.boot.command names no command",
		"bootloader = \"uboot\"\nboot.scheme = \"x\"\n":                     "a.toml:8:1: slots.boot.scheme is neither",
		"bootloader = \"tryboot\"\nboot.a = \"2\"\nboot.b = \"256\"\n":      "a.toml:9:1: slots.boot.b is not the number of a partition",
		"bootloader = \"tryboot\"\n[slots.boot]\na = \"p2\"\nb = \"255\"\n": "a.toml:9:1: slots.boot.a is not the number of a partition",
	} {
		_, err := parse(t, blockLines+add)
		if verify.CodeOf(err) != verify.CodeConfig || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", add, err, want)
		}
	}
	for name, boot := range map[string]string{
		"grub": "", "uboot": "", "efi": "boot.a = \"0001\"\nboot.b = \"0002\"\n", "tryboot": "boot.a = \"2\"\nboot.b = \"3\"\n",
		"systemd-boot": "boot.a = \"/a\"\nboot.b = \"/b\"\n", "custom": "boot.command = [\"/x\"]\n",
	} {
		cfg, err := parse(t, blockLines+"bootloader = \""+name+"\"\n"+boot)
		if err != nil || cfg.Slots.bootloader() == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBlockSlotsOpen(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	script := filepath.Join(dir, "boot")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho '{\"default\":\"b\",\"booted\":\"b\"}'\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	cfg, err := parse(t, strings.ReplaceAll(blockLines, "/dev/disk/by-partlabel", dir)+"bootloader = \"custom\"\nfactory = \"1.0.0\"\nboot.command = [\""+script+"\"]\n")
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
