package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/control/controltest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"meshupd": main,
		"fill":    fill,
	})
}

// fill writes a file of a size with bytes that depend on the seed only.
func fill() {
	size, _ := strconv.Atoi(os.Args[2])
	seed := os.Args[3]
	data := make([]byte, size)
	x := uint32(2166136261)
	for _, c := range []byte(seed) {
		x = (x ^ uint32(c)) * 16777619
	}
	for i := range data {
		x = x*1664525 + 1013904223
		data[i] = byte(x >> 24)
	}
	if err := os.WriteFile(os.Args[1], data, 0o644); err != nil {
		os.Exit(1)
	}
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(env *testscript.Env) error {
			env.Setenv("TZ", "UTC")
			env.Setenv("LANG", "C.UTF-8")
			env.Setenv("LC_ALL", "")
			env.Setenv("LC_CTYPE", "")
			env.Setenv("NO_COLOR", "")
			env.Setenv("COLUMNS", "")
			env.Setenv("ACCESSIBLE", "")
			env.Setenv("SOURCE_DATE_EPOCH", "1790000000")
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			packaging, err := filepath.Abs("../../packaging")
			if err != nil {
				return err
			}
			env.Setenv("PACKAGING", packaging)
			env.Setenv("MESHUPD_SOCKET", filepath.Join(env.WorkDir, "api.sock"))
			return os.Mkdir(filepath.Join(env.WorkDir, "home"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"until":      until,
			"fakedaemon": fakeDaemon,
			"step":       step,
			"flip":       flip,
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Getuid() == 0, nil
			}
			return false, errors.New("no such condition")
		},
	})
}

// exits N COMMAND runs a command and wants exactly that exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N command ...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("run %s: %v", args[1], err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// until [-match=PATTERN] COMMAND runs a command again and again, until it exits with 0 and what it prints has a line of
// the pattern. What it printed then can be looked at as stdout.
func until(ts *testscript.TestScript, neg bool, args []string) {
	pattern := regexp.MustCompile("")
	if len(args) > 0 && strings.HasPrefix(args[0], "-match=") {
		pattern = regexp.MustCompile("(?m)" + strings.TrimPrefix(args[0], "-match="))
		args = args[1:]
	}
	if neg || len(args) == 0 {
		ts.Fatalf("usage: until [-match=PATTERN] command ...")
	}
	for range 6000 { // five minutes, and then it is never: a guard against a test that hangs, however busy the machine is
		err := ts.Exec(args[0], args[1:]...)
		if err == nil && pattern.MatchString(ts.ReadFile("stdout")) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	ts.Fatalf("%s never came", args)
}

// fakeDaemon FILE serves a scenario on api.sock until the script ends.
func fakeDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: fakedaemon FILE")
	}
	var s controltest.Scenario
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[0])), &s))
	if s.Anchor != "" {
		s.Anchor = ts.MkAbs(s.Anchor)
	}
	backend, err := controltest.New(s, ts.MkAbs("door"))
	ts.Check(err)
	ln, err := control.Listen(ts.MkAbs("api.sock"))
	ts.Check(err)
	ctx, cancel := context.WithCancel(context.Background())
	server := control.NewServer(control.ServerConfig{Backend: backend,
		Version: control.VersionInfo{Version: "9.9.9", Commit: "0123456789abcdef", Go: "go1.0", Platform: "linux/test"}})
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ln) }()
	// The script's scratch socket: what is written to it moves the scenario on.
	steps, err := control.Listen(ts.MkAbs("step.sock"))
	ts.Check(err)
	go func() {
		for {
			c, err := steps.Accept()
			if err != nil {
				return
			}
			backend.Step()
			_ = c.Close()
		}
	}()
	ts.Defer(func() {
		_ = steps.Close()
		cancel()
		if err := <-done; err != nil {
			ts.Logf("serve: %v", err)
		}
	})
}

// step moves the fake daemon to its next status.
func step(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: step")
	}
	c, err := net.Dial("unix", ts.MkAbs("step.sock"))
	ts.Check(err)
	_ = c.Close()
}

// flip FILE OFFSET changes one bit; a negative offset counts from the end.
func flip(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: flip FILE OFFSET")
	}
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	at, err := strconv.Atoi(args[1])
	ts.Check(err)
	if at < 0 {
		at += len(data)
	}
	data[at] ^= 1
	ts.Check(os.WriteFile(path, data, 0o644))
}

// A signal that comes while a command waits ends it with 130, in time.
func TestInterrupt(t *testing.T) {
	b, err := controltest.New(controltest.Scenario{}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := control.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- control.NewServer(control.ServerConfig{Backend: b}).Serve(ctx, ln) }()
	defer func() { cancel(); <-served }()

	runCtx, stop := signal.NotifyContext(t.Context(), syscall.SIGUSR1)
	defer stop()
	time.AfterFunc(50*time.Millisecond, func() { _ = syscall.Kill(os.Getpid(), syscall.SIGUSR1) })
	var out, errs bytes.Buffer
	if got := run(runCtx, []string{"wait", "--socket", socket}, stdio{Out: &out, Err: &errs}); got != exitInterrupted {
		t.Errorf("exit %d, want %d: %s", got, exitInterrupted, errs.String())
	}
}
