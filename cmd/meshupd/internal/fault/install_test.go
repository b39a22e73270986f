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
	"meshupd/verify/publish"
)

var binary string

// TestMain is the tracer when it is called so, else it builds the program and runs the tests.
func TestMain(m *testing.M) {
	if len(os.Args) > 7 && os.Args[1] == "fault" {
		os.Exit(trace(os.Args[2:]))
	}
	dir, err := os.MkdirTemp("", "fault-bin")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "meshupd")
	build := exec.Command("go", "build", "-o", binary, "meshupd/cmd/meshupd")
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
	spec := fault.Spec{Log: args[0], Root: args[1], Call: args[2], Nth: nth, Kill: args[4] == "kill", Errno: errnos[args[4]], Stays: true}
	code, err := fault.Run(spec, args[5:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "tracer:", err)
		return 98
	}
	return code
}

// point is one durable call of the whole install.
type point struct {
	start int // which start of the daemon, from 1
	call  string
	nth   int
	how   string // "kill"; "EIO" or "ENOSPC" from this call on; "none"
}

func (p point) String() string {
	return fmt.Sprintf("start %d, %s (%d), %s", p.start, p.call, p.nth, p.how)
}

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

func sell(t *testing.T) sold {
	t.Helper()
	vendor, err := publish.NewVendor(filepath.Join(t.TempDir(), "vendor"), product)
	must(t, err)
	s := sold{binary: binary, anchor: vendor.Anchor(), size: 600_000}
	s.bundle, err = vendor.Bundle(t.Context(), publish.VendorRelease{Version: "2.0.0", Size: s.size})
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
	s := sell(t)
	for _, kind := range []string{"files", "grub"} {
		t.Run(kind, func(t *testing.T) {
			if kind != "files" && os.Getuid() != 0 {
				cannotRun(t, "no private mounts without root; slots with a bootloader were not cut")
			}
			all := dryRun(t, s, kind)
			points := all
			if os.Getenv("MESHUPD_TORTURE") == "" {
				points = sample(all)
			}
			t.Logf("%d durable calls from the first start until confirmed; %d of them are met here, each by a kill, EIO and ENOSPC", len(all), len(points))
			for _, how := range []string{"kill", "EIO", "ENOSPC"} {
				var met atomic.Int32
				t.Run(how, func(t *testing.T) {
					for _, p := range points {
						p.how = how
						t.Run(p.String(), func(t *testing.T) {
							t.Parallel()
							if meet(t, s, kind, p) {
								met.Add(1)
							}
						})
					}
				})
				t.Logf("%s: %d of %d were met and recovered from", how, met.Load(), len(points))
			}
		})
	}
}

// dryRun returns all points, in the order of one life.
func dryRun(t *testing.T, s sold, kind string) []point {
	l := &life{t: t, machine: newMachine(t, s, kind)}
	if !l.run(none) {
		t.Fatal("without a fault the machine did not come to the end")
	}
	l.off()
	var all []point
	for start := 1; start <= l.starts; start++ {
		raw, err := os.ReadFile(l.at(fmt.Sprintf("calls.%d", start)))
		must(t, err)
		count := map[string]int{}
		for call := range strings.Lines(string(raw)) {
			call = strings.TrimSuffix(call, "\n")
			count[call]++
			all = append(all, point{start: start, call: call, nth: count[call]})
		}
	}
	return all
}

// sample keeps the last of each call on each file: of every fourth file, and all that slots and boot state go through.
func sample(all []point) (some []point) {
	last := map[string]point{}
	var order []string
	for _, p := range all {
		key := fmt.Sprint(p.start, p.call)
		if _, met := last[key]; !met {
			order = append(order, key)
		}
		last[key] = p
	}
	for i, key := range order {
		p := last[key]
		if i%4 == 0 || strings.Contains(p.call, "grubenv") || strings.HasSuffix(p.call, "slots/current") || strings.HasPrefix(p.call, "rename slots/") {
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
func meet(t *testing.T, s sold, kind string, p point) bool {
	l := &life{t: t, machine: newMachine(t, s, kind)}
	met := l.run(p)
	l.off()
	l.judge(t, "after the fault")
	if t.Failed() {
		return false
	}
	if l.kind != "files" && p.fails() {
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

// run goes on until the release is confirmed, the fault has ended the daemon, or the device says what is wrong. It
// reports whether the fault was met, or without one whether the end was.
func (l *life) run(p point) (met bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	for first := l.starts; ; {
		l.starts++
		now := none
		if l.starts-first == p.start {
			now = p
		}
		l.start(l.t, fmt.Sprintf("calls.%d", l.starts), now)
		switch how := l.follow(ctx, p); how {
		case "reboot":
			l.off()
			l.judge(l.t, "at a restart")
			l.powerOn()
		case "ended":
			l.endedBy(p)
			return true
		default:
			return how == "confirmed" && p == none || how == "trouble"
		}
	}
}

// endedBy judges a daemon that ended: killed as asked, or by itself because of a disk that fails.
func (l *life) endedBy(p point) {
	code := l.daemon.ProcessState.ExitCode()
	l.daemon = nil
	switch {
	case p == none:
		l.t.Fatalf("the daemon ended by itself with %d", code)
	case p.how == "kill" && code != fault.ExitKilled:
		l.t.Errorf("the daemon ended with %d and was not killed", code)
	case p.fails():
		log, _ := os.ReadFile(l.at("daemon.log"))
		if l.said = "ended"; !strings.Contains(string(log), "[E-") {
			l.t.Errorf("the daemon ended with %d and did not say with which code", code)
		}
	}
}

// follow watches one start of the daemon: "confirmed", "ended", "reboot", "trouble" or "rolled back".
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
	case <-l.ended:
		return "ended"
	case how := <-news:
		return how
	case <-ctx.Done():
		_ = l.daemon.Process.Signal(syscall.SIGQUIT) // shows where it hangs
		<-l.ended
		l.daemon = nil
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
			case <-l.ended:
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
		case self.State == control.StateRolledBack && l.said != "":
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
	case ctx.Err() != nil || p.how == "kill":
	case p.fails() && errors.As(err, &exit) && strings.Contains(out, "[E-"):
		l.said = out
		return "trouble"
	default:
		l.t.Errorf("the import failed: %v: %s", err, out)
		return "trouble"
	}
	return ""
}
