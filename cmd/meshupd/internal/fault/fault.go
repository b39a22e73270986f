//go:build linux && amd64

// Package fault runs a program under ptrace(2) and lets one chosen system call of it fail, or kills the program there.
//
// It counts over all threads, which strace's when= does not: a call is named by what it does to which file below a folder
// ("fsync state/counters.a", the third time), and not by its number, so that the same cut is found again though
// goroutines run in another order. The programs that it starts are followed when asked for; their calls are named "child ...".
// It is for tests.
package fault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Spec says what is to happen where.
type Spec struct {
	Log  string // gets a line for each call that changes a file below Root
	Root string
	Call string // a line of the log
	Nth  int    // of these calls, from 1; 0: none
	// Kill ends the program before the call; else the call does not happen and fails with Errno.
	Kill  bool
	Errno syscall.Errno
	// Children follows the programs that the program starts, too.
	Children bool
	// Alone makes Kill at a child's call end the child's process group, and the program goes on.
	Alone bool
	// Stays makes all later ones of these calls fail too.
	Stays bool
}

// ExitKilled is the exit code of Run when the program was killed as asked.
const ExitKilled = 99

// Run runs argv to its end and returns its exit code. SIGTERM and SIGQUIT are passed on, and SIGUSR1 kills the program: when
// Run has then returned, the program is gone, which the death of the tracer alone would not promise. Run must be called on the
// main goroutine of a process that has nothing else to wait for.
func Run(spec Spec, argv []string) (int, error) {
	runtime.LockOSThread()
	log, err := os.OpenFile(spec.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	asked := make(chan os.Signal, 2)
	signal.Notify(asked, unix.SIGTERM, unix.SIGQUIT, unix.SIGUSR1) // before there is a program that could be left behind
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	t := &tracer{spec: spec, log: log, leader: cmd.Process.Pid, known: map[int]bool{}, failing: map[int]syscall.Errno{}}
	go func() { // ends with the process
		for sig := range asked {
			if sig == unix.SIGUSR1 {
				sig = unix.SIGKILL
			}
			_ = unix.Kill(t.leader, sig.(unix.Signal))
		}
	}()
	return t.run()
}

type tracer struct {
	spec    Spec
	log     *os.File
	leader  int
	known   map[int]bool // threads
	failing map[int]syscall.Errno
	seen    int
	killed  bool
}

func (t *tracer) run() (int, error) {
	var ws unix.WaitStatus
	if _, err := unix.Wait4(t.leader, &ws, unix.WALL, nil); err != nil {
		return 0, fmt.Errorf("wait for the start: %w", err)
	}
	options := unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEEXEC | unix.PTRACE_O_EXITKILL
	if t.spec.Children {
		options |= unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK
	}
	if err := unix.PtraceSetOptions(t.leader, options); err != nil {
		return 0, fmt.Errorf("trace: %w", err)
	}
	t.known[t.leader] = true
	for tid, sig := t.leader, 0; ; {
		if tid != 0 {
			_ = unix.PtraceSyscall(tid, sig) // a thread that was killed meanwhile is gone
		}
		got, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			tid = 0
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		tid, sig = got, 0
		switch {
		case ws.Exited() || ws.Signaled():
			if tid == t.leader {
				return t.end(ws), nil
			}
			tid = 0
		case ws.StopSignal() == unix.SIGTRAP|0x80:
			if err := t.call(tid); err != nil {
				return 0, err
			}
		case ws.StopSignal() == unix.SIGTRAP && ws.TrapCause() > 0:
		case ws.StopSignal() == unix.SIGSTOP && !t.known[tid]:
			t.known[tid] = true
		default:
			sig = int(ws.StopSignal())
		}
	}
}

func (t *tracer) end(ws unix.WaitStatus) int {
	switch {
	case t.killed && ws.Signaled():
		return ExitKilled
	case ws.Signaled():
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// callInfo is struct ptrace_syscall_info of ptrace(2).
type callInfo struct {
	op     uint8
	_      [3]uint8
	_      uint32
	_, _   uint64
	number uint64
	args   [6]uint64
	_      [2]uint64
}

const (
	ptraceGetSyscallInfo = 0x420e
	opEntry              = 1
	opExit               = 2
)

func (t *tracer) call(tid int) error {
	var info callInfo
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0); errno != 0 {
		if errno == unix.ESRCH {
			return nil
		}
		return fmt.Errorf("look at a system call: %w", errno)
	}
	switch info.op {
	case opEntry:
		return t.entry(tid, info)
	case opExit:
		if errno, failing := t.failing[tid]; failing {
			delete(t.failing, tid)
			return t.change(tid, func(r *unix.PtraceRegs) { r.Rax = uint64(-int64(errno)) })
		}
	}
	return nil
}

func (t *tracer) entry(tid int, info callInfo) error {
	what := t.name(tid, info)
	if what == "" {
		return nil
	}
	if _, err := fmt.Fprintln(t.log, what); err != nil {
		return err
	}
	if what != t.spec.Call || t.spec.Nth == 0 {
		return nil
	}
	if t.seen++; t.seen < t.spec.Nth || t.seen > t.spec.Nth && !t.spec.Stays {
		return nil
	}
	if t.spec.Kill {
		t.killed = true
		if t.spec.Alone && t.child(tid) {
			return t.killGroup(tid)
		}
		return unix.Kill(t.leader, unix.SIGKILL)
	}
	t.failing[tid] = t.spec.Errno
	return t.change(tid, func(r *unix.PtraceRegs) { r.Orig_rax = ^uint64(0) }) // no such call: nothing happens
}

// child says whether a thread is one of a program that the program started.
func (t *tracer) child(tid int) bool {
	if !t.spec.Children {
		return false
	}
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", t.leader, tid))
	return err != nil
}

func (t *tracer) killGroup(tid int) error {
	group, err := unix.Getpgid(tid)
	if err != nil {
		return fmt.Errorf("look for the group of a child: %w", err)
	}
	if own, err := unix.Getpgid(t.leader); err != nil || own == group {
		return fmt.Errorf("a child without a group of its own (%v)", err)
	}
	return unix.Kill(-group, unix.SIGKILL)
}

func (t *tracer) change(tid int, change func(*unix.PtraceRegs)) error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return fmt.Errorf("read the registers: %w", err)
	}
	change(&regs)
	return unix.PtraceSetRegs(tid, &regs)
}

// name says what a call does, or "" when it changes nothing below the root.
func (t *tracer) name(tid int, info callInfo) string {
	name, path := "", ""
	a := info.args
	switch info.number {
	case unix.SYS_FSYNC:
		name, path = "fsync", fdPath(tid, a[0])
	case unix.SYS_FDATASYNC:
		name, path = "fdatasync", fdPath(tid, a[0])
	case unix.SYS_WRITE:
		name, path = "write", fdPath(tid, a[0])
	case unix.SYS_PWRITE64:
		name, path = "pwrite", fdPath(tid, a[0])
	case unix.SYS_FTRUNCATE:
		name, path = "ftruncate", fdPath(tid, a[0])
	case unix.SYS_FALLOCATE:
		name, path = "fallocate", fdPath(tid, a[0])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		name, path = "rename", atPath(tid, a[2], a[3])
	case unix.SYS_RENAME:
		name, path = "rename", atPath(tid, atCWD, a[1])
	case unix.SYS_UNLINKAT:
		name, path = "unlink", atPath(tid, a[0], a[1])
	case unix.SYS_UNLINK, unix.SYS_RMDIR:
		name, path = "unlink", atPath(tid, atCWD, a[0])
	case unix.SYS_MKDIRAT:
		name, path = "mkdir", atPath(tid, a[0], a[1])
	case unix.SYS_LINKAT:
		name, path = "link", atPath(tid, a[2], a[3])
	case unix.SYS_SYMLINKAT:
		name, path = "symlink", atPath(tid, a[1], a[2])
	default:
		return ""
	}
	rel, err := filepath.Rel(t.spec.Root, path)
	if err != nil || !filepath.IsAbs(path) || strings.HasPrefix(rel, "..") {
		return ""
	}
	if t.child(tid) {
		name = "child " + name
	}
	return name + " " + volatile.ReplaceAllStringFunc(rel, func(s string) string {
		if name, _, numbered := strings.Cut(s, "-"); numbered {
			return name + "-*"
		}
		return "DIGEST"
	})
}

// volatile are the parts of a name that differ from run to run.
var volatile = regexp.MustCompile(`[0-9a-f]{64}|\.(tmp|spool)-[0-9]+`)

const atCWD = ^uint64(99) // AT_FDCWD, -100

func fdPath(tid int, fd uint64) string {
	path, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(fd)))
	return strings.TrimSuffix(path, " (deleted)")
}

func atPath(tid int, dir, addr uint64) string {
	path := text(tid, addr)
	if filepath.IsAbs(path) || path == "" {
		return path
	}
	if int32(dir) == unix.AT_FDCWD {
		cwd, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", tid))
		return filepath.Join(cwd, path)
	}
	return filepath.Join(fdPath(tid, dir), path)
}

// text reads a string of the program.
func text(tid int, addr uint64) string {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return ""
	}
	defer mem.Close()
	buf := make([]byte, unix.PathMax)
	n, _ := mem.ReadAt(buf, int64(addr)) // up to the end of the mapping
	s, _, _ := bytes.Cut(buf[:n], []byte{0})
	return string(s)
}
