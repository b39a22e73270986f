package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"meshupd/peer"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func putHook(t *testing.T, dir, name, script string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// The loop is never held up: with a hook that takes for ever the oldest changes are missed, and told to be.
func TestStateHookNeverHoldsTheLoop(t *testing.T) {
	dir := t.TempDir()
	told, gate := filepath.Join(dir, "told"), filepath.Join(dir, "gate")
	if err := errors.Join(os.Mkdir(gate, 0o755), unix.Mkfifo(told, 0o600)); err != nil {
		t.Fatal(err)
	}
	// Open for both, so that it does not end between two hooks.
	pipe, err := os.OpenFile(told, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	putHook(t, dir, "state", `echo "$MESHUPD_PREVIOUS>$MESHUPD_STATE" >>`+told+`; while test -e `+gate+`; do sleep 0.01; done; exit 1`)
	cfg := defaultConfig()
	cfg.Hooks.Dir = dir
	var log bytes.Buffer
	s := newStateHook(cfg, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	state := func(n int) { s.changed(peer.DeviceStatus{State: fmt.Sprint("s", n)}) }
	state(0)
	state(0) // no change
	for n := range 2*maxStates + 1 {
		state(n) // nobody takes them out yet, and it returns all the same
	}
	go func() { ended <- s.run(ctx) }()
	if err := os.Remove(gate); err != nil {
		t.Fatal(err)
	}
	last, lines := fmt.Sprintf("s%d>s%d", 2*maxStates-1, 2*maxStates), 0
	for said := bufio.NewScanner(pipe); said.Scan(); {
		if lines++; said.Text() == last {
			break
		}
	}
	if lines != maxStates {
		t.Errorf("%d changes were told, want the newest %d", lines, maxStates)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if got := strings.Count(log.String(), "the state hook is too slow"); got != maxStates+1 {
		t.Errorf("%d changes are said to be missed, want %d", got, maxStates+1)
	}
}

// On a device in two halves the hooks around the slots are root's, whatever the network half says.
func TestHooksRunInRootsHalf(t *testing.T) {
	h := newHalfWith(t, func(cfg *Config) {
		cfg.Hooks.Dir = filepath.Join(filepath.Dir(cfg.State), "hooks.d")
		if err := os.Mkdir(cfg.Hooks.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		putHook(t, cfg.Hooks.Dir, "pre-install", "echo in service >&2; exit 1")
	})
	rel, _ := h.release(t, verifytest.Opts{})
	if code := h.askWrite(t, rel.ID()); code != verify.CodeHook {
		t.Fatalf("pre-install refused, and the write ends with %q", code)
	}
	if c := h.slotB(t); c.Whole {
		t.Fatal("the slot was written")
	}
	putHook(t, h.cfg.Hooks.Dir, "pre-install", "exit 0")
	putHook(t, h.cfg.Hooks.Dir, "pre-reboot", "exit 1")
	if code := h.askWrite(t, rel.ID()); code != "" {
		t.Fatal(code)
	}
	if code := h.ask(t, `{"do":"try","slot":"b"}`); code != verify.CodeHeld {
		t.Fatalf("pre-reboot refused, and the try ends with %q", code)
	}
}
