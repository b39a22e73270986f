//go:build linux && amd64

package fault_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/fault"
	"meshupd/install/ocitest"
	"meshupd/verify"
	"meshupd/verify/publish"
)

// binary is meshupd, and engine a podman that runs nothing.
var binary, engine string

// TestMain is the tracer when it is called so, else it builds the program and runs the tests.
func TestMain(m *testing.M) {
	if len(os.Args) > 8 && os.Args[1] == "fault" {
		os.Exit(trace(os.Args[2:]))
	}
	dir, err := os.MkdirTemp("", "fault-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // for the user nobody
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary, engine = filepath.Join(dir, "meshupd"), filepath.Join(dir, "podman")
	build := exec.Command("go", "build", "-o", dir, "meshupd/cmd/meshupd", "meshupd/install/ocitest/podman")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the program: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

var errnos = map[string]syscall.Errno{"EIO": syscall.EIO, "ENOSPC": syscall.ENOSPC}

func trace(args []string) int {
	nth, _ := strconv.Atoi(args[3])
	spec := fault.Spec{Log: args[0], Root: args[1], Call: args[2], Nth: nth, Kill: args[4] == "kill" || args[4] == "kill alone", Errno: errnos[args[4]], Stays: args[4] != "kill alone",
		Children: args[5] == "true", Alone: args[4] == "kill alone"}
	code, err := fault.Run(spec, args[6:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "tracer:", err)
		return 98
	}
	return code
}

// point is one durable call of the whole install.
type point struct {
	half  string // "daemon" or "apply"
	start int    // which start of the machine, from 1
	call  string
	nth   int
	how   string // "kill"; "kill alone": of a child program only; "EIO" or "ENOSPC" from this call on; "none"
}

func (p point) String() string {
	return fmt.Sprintf("%s, start %d, %s (%d), %s", p.half, p.start, p.call, p.nth, p.how)
}

// ends says that the half is killed, and how it exits then.
func (p point) ends() bool { return p.how == "kill" }

// ofChild says that a program that the half started makes the call.
func (p point) ofChild() bool { return strings.HasPrefix(p.call, "child ") }

// fails says that the disk fails, and the daemon lives to tell of it.
func (p point) fails() bool { return errnos[p.how] != 0 }

var none = point{how: "none"}

func cannotRun(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("CI must be able to: "+format, args...)
	}
	t.Skipf(format, args...)
}

func sell(t *testing.T, kind model) sold {
	t.Helper()
	dir, err := os.MkdirTemp("", "fault-vendor")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755)) // for the user nobody
	vendor, err := publish.NewVendor(filepath.Join(dir, "vendor"), product)
	must(t, err)
	s := sold{binary: binary, anchor: vendor.Anchor(), size: 600_000}
	release := publish.VendorRelease{Version: "2.0.0", Size: s.size}
	if kind.kind == "container" {
		img := ocitest.Image{File: bytes.Repeat([]byte("program."), int(s.size)/8)}
		s.config = sha256.Sum256(img.Blobs()[1].Data)
		path := filepath.Join(dir, "archive")
		write(path, img.Archive())
		release.Images = []publish.VendorImage{{Name: "rootfs", Path: path, Kind: verify.KindContainer}}
	}
	s.bundle, err = vendor.Bundle(t.Context(), release)
	must(t, err)
	rel, err := publish.Verify(t.Context(), s.bundle, s.anchor, nil)
	must(t, err)
	s.release, s.image = rel.ID(), rel.Manifest().Images[0].Content.SHA256
	s.factory = bytes.Repeat([]byte("factory."), int(s.size)/8)
	return s
}

// TestInstallOutlivesEveryCut runs the real daemon through a whole install, from its very first start until the release
// is confirmed, and kills it before every call that changes something on its disk, each time on a new machine. It has then to
// come to the end by itself; only an import that was cut is made again. The same calls then fail, with EIO and with
// ENOSPC: the device says so with a code, what it runs is untouched, and with a sound disk it comes to the end.
func TestInstallOutlivesEveryCut(t *testing.T) {
	if testing.Short() {
		t.Skip("hundreds of lives of a daemon; not in the short run")
	}
	for _, kind := range []model{{kind: "files"}, {kind: "grub"}, {kind: "custom"}, {kind: "container"}, {kind: "files", split: true}, {kind: "grub", split: true}} {
		t.Run(kind.String(), func(t *testing.T) {
			if (kind.block() || kind.split) && os.Getuid() != 0 {
				cannotRun(t, "no private mounts and no other users without root; %s was not cut", kind)
			}
			s := sell(t, kind)
			all := dryRun(t, s, kind)
			points := all
			if os.Getenv("MESHUPD_TORTURE") == "" {
				points = sample(all)
			}
			t.Logf("%d durable calls from the first start until confirmed; %d of them are met here, each by a kill, EIO and ENOSPC", len(all), len(points))
			for _, how := range []string{"kill", "kill alone", "EIO", "ENOSPC"} {
				var met atomic.Int32
				tried := 0
				t.Run(how, func(t *testing.T) {
					for _, p := range points {
						if how == "kill alone" && !p.ofChild() {
							continue
						}
						p.how = how
						tried++
						t.Run(p.String(), func(t *testing.T) {
							t.Parallel()
							if meet(t, s, kind, p) {
								met.Add(1)
							}
						})
					}
				})
				if tried > 0 {
					t.Logf("%s: %d of %d were met and recovered from", how, met.Load(), tried)
				}
			}
		})
	}
}

// dryRun returns all points, in the order of one life.
func dryRun(t *testing.T, s sold, kind model) []point {
	l := &life{t: t, machine: newMachine(t, s, kind)}
	if !l.run(none) {
		t.Fatal("without a fault the machine did not come to the end")
	}
	l.off()
	var all []point
	halves := []string{"daemon"}
	if kind.split {
		halves = []string{"daemon", "apply"}
	}
	for start := 1; start <= l.starts; start++ {
		for _, half := range halves {
			raw, err := os.ReadFile(l.at(fmt.Sprintf("calls.%s.%d", half, start)))
			must(t, err)
			count := map[string]int{}
			for call := range strings.Lines(string(raw)) {
				call = strings.TrimSuffix(call, "\n")
				count[call]++
				all = append(all, point{half: half, start: start, call: call, nth: count[call]})
			}
		}
	}
	return all
}

// sample keeps the last of each call on each file: of every fourth file, and all that slots and boot state go through.
func sample(all []point) (some []point) {
	last := map[string]point{}
	var order []string
	for _, p := range all {
		key := fmt.Sprint(p.half, p.start, p.call)
		if _, met := last[key]; !met {
			order = append(order, key)
		}
		last[key] = p
	}
	for i, key := range order {
		p := last[key]
		if i%4 == 0 || strings.Contains(p.call, "grubenv") || p.ofChild() || strings.HasSuffix(p.call, "slots/current") || strings.HasPrefix(p.call, "rename slots/") {
			some = append(some, p)
		}
	}
	return some
}

// life is a machine on its way to the release.
type life struct {
	t *testing.T
	*machine
	starts   int
	imported bool
	said     string // what the device gave as the reason, with a disk that fails
}

// meet lets the point fail and then expects the end. It reports false when this life did not come to the point: what
// goroutines do beside the install is not in every life.
func meet(t *testing.T, s sold, kind model, p point) bool {
	l := &life{t: t, machine: newMachine(t, s, kind)}
	met := l.run(p)
	l.off()
	l.judge(t, "after the fault")
	if t.Failed() {
		return false
	}
	if l.block() && p.fails() {
		l.powerOn()
	}
	if !l.run(none) && l.said == "" {
		t.Fatal("the machine did not come to the end")
	}
	l.off()
	l.judge(t, "in the end")
	if sum, _, err := l.startable(); err != nil || sum != s.image && !l.rolledBack() {
		t.Errorf("in the end %v would start (%v)", sum, err)
	}
	if !met {
		t.Log("this life did not come to the point, or the fault did no harm")
	}
	return met && !t.Failed()
}

// rolledBack: a disk that fails while the trial starts condemns the trial, as a crash of the new system would.
func (l *life) rolledBack() bool {
	sum, _, _ := l.startable()
	return l.said != "" && sum == sha256.Sum256(l.factory)
}

// run goes on until the release is confirmed, the fault has ended the device, or it says what is wrong. It reports
// whether the fault was met, or without one whether the end was. Of two halves the other one goes on; the one that was killed is started again.
func (l *life) run(p point) (met bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	fault := p
	for first, fresh := l.starts, true; ; {
		if fresh {
			l.starts++
			now := none
			if l.starts-first == p.start {
				now = p
			}
			l.start(l.t, l.starts, now)
		}
		fresh = false
		switch how := l.follow(ctx, p); how {
		case "reboot":
			l.off()
			l.judge(l.t, "at a restart")
			l.powerOn()
			fresh = true
		case "daemon", "apply":
			l.endedBy(p, how)
			if !l.split {
				return true
			}
			l.revive(how)
			met, p = true, none
		default:
			return how == "trouble" || how == "rolled back" && l.metInside(fault) || how == "confirmed" && (met || fault == none || l.metInside(fault))
		}
	}
}

// metInside says whether a child program was killed where the fault says; its end is the half's to notice.
func (l *life) metInside(p point) bool {
	if p.how != "kill alone" {
		return false
	}
	raw, err := os.ReadFile(l.at(fmt.Sprintf("calls.%s.%d", p.half, p.start)))
	return err == nil && strings.Count(string(raw), p.call+"\n") >= p.nth
}

// revive starts a half again, as systemd does.
func (l *life) revive(half string) {
	again := l.startHalf(l.t, half, 1000+l.starts, none)
	if half == "apply" {
		l.apply = again
	} else {
		l.daemon = again
	}
}

// endedBy judges a half that ended: killed as asked, or by itself because of a disk that fails.
func (l *life) endedBy(p point, half string) {
	ended := l.daemon
	if half == "apply" {
		ended = l.apply
		l.apply = gone
	} else {
		l.daemon = nil
	}
	code := ended.cmd.ProcessState.ExitCode()
	switch {
	case p == none || p.half != half:
		l.t.Fatalf("the %s ended by itself with %d", half, code)
	case p.ends() && code != fault.ExitKilled:
		l.t.Errorf("the %s ended with %d and was not killed", half, code)
	case p.how == "kill alone":
		l.t.Errorf("the %s ended with %d because a program that it started was killed", half, code)
	case p.fails():
		log, _ := os.ReadFile(l.at("log." + half))
		if l.said = "ended"; !strings.Contains(string(log), "[E-") {
			l.t.Errorf("the %s ended with %d and did not say with which code", half, code)
		}
	}
}

// follow watches one start of the machine: "confirmed", "daemon" or "apply" (that ended), "reboot", "trouble" or "rolled back".
func (l *life) follow(ctx context.Context, p point) string {
	ctx, cancel := context.WithCancel(ctx)
	news := make(chan string, 8)
	done := make(chan struct{}, 2)
	go func() { l.watchStatus(ctx, p, news); done <- struct{}{} }()
	go func() { l.watchReboots(ctx, news); done <- struct{}{} }()
	defer func() {
		cancel()
		_ = l.reboots.SetReadDeadline(time.Now())
		<-done
		<-done
		_ = l.reboots.SetReadDeadline(time.Time{})
	}()
	select {
	case <-l.daemon.ended:
		return "daemon"
	case <-l.apply.ended:
		return "apply"
	case how := <-news:
		return how
	case <-ctx.Done():
		for _, p := range []*process{l.daemon, l.apply} { // shows where it hangs
			if p.cmd != nil {
				_ = p.cmd.Process.Signal(syscall.SIGQUIT)
				<-p.ended
			}
		}
		l.daemon, l.apply = nil, gone
		l.t.Fatal("no end")
		return ""
	}
}

func (l *life) watchReboots(ctx context.Context, news chan<- string) {
	buf := make([]byte, 64)
	if n, err := l.reboots.Read(buf); err == nil && n > 0 && ctx.Err() == nil {
		news <- "reboot"
	}
}

// watchStatus imports what was not imported yet, and follows what the device says of itself.
func (l *life) watchStatus(ctx context.Context, p point, news chan<- string) {
	var after uint64
	for ctx.Err() == nil {
		st, err := l.api.Status(ctx, after)
		if err != nil {
			after = 0
			select {
			case <-ctx.Done():
			case <-l.daemon.ended:
				return
			case <-time.After(20 * time.Millisecond): // not up yet
			}
			continue
		}
		after = st.Generation
		if !l.imported {
			if how := l.tryImport(ctx, p); how != "" {
				news <- how
				return
			}
			continue
		}
		self := st.Devices[0]
		switch {
		case self.State == control.StateConfirmed && self.Version == "2.0.0":
			news <- "confirmed"
			return
		case self.Reason != nil && self.Reason.Code != "" && p.fails():
			l.said = string(self.Reason.Code)
			news <- "trouble"
			return
		case self.State == control.StateRolledBack && (l.said != "" || p.how == "kill alone" && self.Reason != nil):
			// A program that is killed while it starts the trial is the trial's failure, and not forgotten either.
			if l.said == "" {
				l.said = string(self.Reason.Code)
			}
			news <- "rolled back"
			return
		}
	}
}

// tryImport imports once. With a disk that fails it may fail, and then says with which code.
func (l *life) tryImport(ctx context.Context, p point) string {
	out, err := l.bring(ctx)
	var exit *exec.ExitError
	switch {
	case err == nil && !strings.Contains(out, "Done"):
		// What it says is what a technician acts on: silence is not success.
		l.t.Errorf("the import exits with 0 and is not done: %s", out)
		return "trouble"
	case err == nil:
		l.imported = true
	case ctx.Err() != nil || p.how == "kill" || p.how == "kill alone":
	case p.fails() && errors.As(err, &exit) && strings.Contains(out, "[E-"):
		l.said = out
		return "trouble"
	default:
		l.t.Errorf("the import failed: %v: %s", err, out)
		return "trouble"
	}
	return ""
}
