package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	if err := os.Mkdir(gate, 0o755); err != nil {
		t.Fatal(err)
	}
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
	want := fmt.Sprintf("s%d>s%d\n", 2*maxStates-1, 2*maxStates)
	for {
		if data, _ := os.ReadFile(told); strings.HasSuffix(string(data), want) {
			if n := strings.Count(string(data), "\n"); n != maxStates {
				t.Errorf("%d changes were told, want the newest %d", n, maxStates)
			}
			break
		}
		time.Sleep(time.Millisecond)
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
