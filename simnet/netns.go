package simnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A space is one network namespace and the thread that lives in it.
//
// A network namespace belongs to a thread, not to a process, while goroutines
// wander between threads. So each space has a goroutine locked to a thread, its
// home, which moves into the namespace once and never moves back: commands start
// from there. When the goroutine ends, still locked, the runtime destroys the
// thread, and nothing that ran elsewhere can ever find itself in the wrong
// network. The namespace itself is held by an open file, not by a name below
// /run, so that it cannot outlive the process.
type space struct {
	ns    netns.NsHandle
	inode uint64
	nl    *netlink.Handle // speaks to this namespace from any thread

	jobs chan func()    // to home
	home sync.WaitGroup // the goroutine that lives there
}

func newSpace() (*space, error) {
	s := &space{ns: netns.None(), jobs: make(chan func())}
	settled := make(chan error)
	s.home.Go(func() {
		if runtime.LockOSThread(); unix.Gettid() != unix.Getpid() {
			s.live(settled)
			return
		}
		// The first thread of a process cannot be destroyed, only parked for good,
		// in whichever network it was. While it is held here another one serves.
		var other sync.WaitGroup
		other.Go(func() {
			runtime.LockOSThread()
			s.live(settled)
		})
		other.Wait()
		runtime.UnlockOSThread()
	})
	if err := <-settled; err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// live runs on the locked home thread and never unlocks it.
func (s *space) live(settled chan<- error) {
	settled <- s.settle()
	for job := range s.jobs {
		job()
	}
}

// settle moves the calling thread into namespaces of its own.
func (s *space) settle() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	if s.ns, err = netns.Get(); err != nil {
		return fmt.Errorf("hold network namespace: %w", err)
	}
	if s.inode, err = netnsInode(); err != nil {
		return fmt.Errorf("name network namespace: %w", err)
	}
	// A sysfs shows the interfaces of the namespace it was mounted in. Where the
	// kernel refuses a new one, /sys/class/net of the node shows those outside;
	// sockets and netlink are right all the same. Control groups go out of sight.
	_ = unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if s.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("speak to network namespace: %w", err)
	}
	lo, err := s.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := s.nl.LinkSetUp(lo); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// start starts cmd from home, so that it is born into the namespace.
func (s *space) start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// The parent is, to the kernel, the home thread: the command dies with the
	// node, and with this process, even if this process is killed.
	if cmd.SysProcAttr.Pdeathsig == 0 {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	done := make(chan error)
	s.jobs <- func() { done <- cmd.Start() }
	return <-done
}

// do runs fn on a thread of its own inside the namespace. Not at home: fn may
// block, or call do.
func (s *space) do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("the function ended its goroutine")
		defer func() { done <- err }() // also on runtime.Goexit
		err = s.visit(fn)
	}()
	return <-done
}

// visit takes the calling goroutine's thread into the namespace and back. If it
// cannot be brought back it stays locked, and is destroyed when its goroutine,
// which do made for this, ends: a thread in the wrong network must never carry
// another goroutine.
func (s *space) visit(fn func() error) error {
	runtime.LockOSThread()
	from, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("hold own network namespace: %w", err)
	}
	defer func() {
		if netns.Set(from) == nil {
			runtime.UnlockOSThread()
		}
		from.Close()
	}()
	if err := netns.Set(s.ns); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return fn()
}

// close ends the home thread, and with it all commands that were started there.
func (s *space) close() {
	close(s.jobs)
	s.home.Wait()
	if s.nl != nil {
		s.nl.Close()
	}
	if s.ns.IsOpen() {
		s.ns.Close()
	}
}

// killInside kills every process in the namespace but this one and returns when
// they are dead. Whoever is in there was started there, or by one that was: no
// door leads in from outside.
func (s *space) killInside() error {
	// One that was being born during a round is found in the next.
	for range 100 {
		n, err := s.killRound()
		if err != nil || n == 0 {
			return err
		}
	}
	return errors.New("kill what runs in network namespace: there is always one more")
}

func (s *space) killRound() (killed int, err error) {
	dir, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	for _, e := range dir {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		was, err := s.killIfInside(pid)
		if err != nil {
			return killed, fmt.Errorf("kill process %d: %w", pid, err)
		}
		if was {
			killed++
		}
	}
	return killed, nil
}

func (s *space) killIfInside(pid int) (was bool, err error) {
	// The descriptor is taken before the look, so that the process looked at is
	// the one killed, whatever becomes of its number.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false, nil // gone
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if unix.Stat("/proc/"+strconv.Itoa(pid)+"/ns/net", &st) != nil || st.Ino != s.inode {
		return false, nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return false, nil
		}
		return false, err
	}
	dead := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(dead, int(killLimit.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return false, err
		case n == 0:
			return false, fmt.Errorf("still there after %s", killLimit)
		default:
			return true, nil
		}
	}
}

// killLimit is how long a killed process may take to go, for instance while it
// waits for a disk.
const killLimit = 10 * time.Second
