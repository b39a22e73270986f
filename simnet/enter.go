package simnet

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// insideVar marks the process that Enter re-executed. Its value is the inode of
// the network namespace it came from. Enter removes it again, so that programs
// started from within may make a site of their own.
const insideVar = "MESHUPD_SIMNET_INSIDE"

// reportFD is where the re-executed process says how far it came: nothing but
// "ok", or the error. os/exec numbers ExtraFiles from 3.
const reportFD = 3

// entered is set once, by Enter in the re-executed process.
var entered struct {
	sync.Mutex
	yes   bool
	outer uint64 // inode of the network namespace outside
}

// Enter moves this process into a private network before it does anything else.
// Call it first in main or TestMain.
//
// The first call does not return if all goes well: it runs this program again
// (same arguments, environment and standard streams) inside fresh network and
// mount namespaces, hands on signals, waits, and exits with its code. In that
// second process Enter brings lo up and returns nil. Whatever is made from there,
// bridges, cables, nodes, lives in namespaces that only this family of processes
// holds open: it vanishes with them, however they end, and the machine's own
// network is never touched.
//
// Without CAP_SYS_ADMIN and CAP_NET_ADMIN a user namespace is made too, in which
// the caller is root. If the kernel refuses, Enter returns an error that says
// what was refused and what to do; the process goes on where it was and may
// settle for NewLoopbackSite.
func Enter() error {
	entered.Lock()
	defer entered.Unlock()
	if entered.yes {
		return nil
	}
	if was := os.Getenv(insideVar); was != "" {
		return arrive(was)
	}
	return reexec()
}

// Available says whether Enter would be let in, as nil or the reason. It leaves
// nothing behind.
func Available() error {
	entered.Lock()
	yes := entered.yes
	entered.Unlock()
	if yes {
		return nil
	}
	// The kernel makes the namespaces before it looks at the program to run. One
	// that cannot exist answers the question and runs nothing.
	_, err := syscall.ForkExec("/proc/self/exe/none", []string{"none"}, &syscall.ProcAttr{Sys: namespaces()})
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ENOENT) {
		return restrictedByAppArmor()
	}
	return refused("make namespaces", err)
}

// namespaces asks for what a site needs: net and mount, and user if this process
// may not make those.
func namespaces() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
	if !privileged() {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// privileged says whether this process may make and furnish a network namespace
// without a user namespace. Being root is not enough: root in a container often
// has neither capability.
func privileged() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	const need = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN
	return data[0].Effective&need == need
}

// reexec returns only if the private network could not be made.
func reexec() error {
	outer, err := netnsInode()
	if err != nil {
		return fmt.Errorf("find own network namespace: %w", err)
	}
	report, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make pipe to private network: %w", err)
	}
	defer report.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), insideVar+"="+strconv.FormatUint(outer, 10))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = namespaces()
	// If this process is killed the site must not live on. The kernel counts the
	// death of the starting thread as the parent's, so that thread is kept.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	// From before the start, so that no signal finds nobody at home.
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, handedOn...)
	var handing sync.WaitGroup
	defer func() {
		signal.Stop(signals)
		close(signals)
		handing.Wait()
	}()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return refused("make namespaces", err)
	}
	handing.Go(func() { handOn(signals, cmd.Process) })

	said, _ := io.ReadAll(report)
	err = cmd.Wait()
	if string(said) != "ok" {
		if len(said) == 0 {
			said = []byte("it ended before it came to simnet.Enter: " + cmd.ProcessState.String())
		}
		return refused("set up private network", errors.New(string(said)))
	}
	os.Exit(exitCode(cmd.ProcessState, err))
	return nil
}

func exitCode(state *os.ProcessState, err error) int {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal()) // as a shell says it
	}
	if code := state.ExitCode(); code != 0 || err == nil {
		return code
	}
	return 1
}

var handedOn = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

func handOn(signals <-chan os.Signal, to *os.Process) {
	for s := range signals {
		// A key pressed at the terminal reaches the whole process group, the inner
		// process too; handing it on would count it twice.
		if (s == syscall.SIGINT || s == syscall.SIGQUIT) && terminalIsOurs() {
			continue
		}
		_ = to.Signal(s) // fails only if it has ended, and then reexec is about to
	}
}

func terminalIsOurs() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// arrive is Enter in the re-executed process.
func arrive(was string) error {
	os.Unsetenv(insideVar)
	unix.CloseOnExec(reportFD)
	report := os.NewFile(reportFD, "report")
	outer, err := furnish(was)
	if err != nil {
		fmt.Fprint(report, err)
		os.Exit(1) // the process outside returns this error to its caller
	}
	fmt.Fprint(report, "ok")
	report.Close()
	entered.yes, entered.outer = true, outer
	return nil
}

func furnish(was string) (outer uint64, err error) {
	outer, err = strconv.ParseUint(was, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", insideVar, err)
	}
	here, err := netnsInode()
	if err != nil {
		return 0, fmt.Errorf("find private network namespace: %w", err)
	}
	if here == outer {
		return 0, fmt.Errorf("%s is set, but this process is not in a private network; unset it", insideVar)
	}
	// Mounts made for nodes must not reach the machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, fmt.Errorf("make mounts private: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return 0, fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return 0, fmt.Errorf("bring lo up: %w", err)
	}
	return outer, nil
}

// netnsInode names the network namespace of the calling thread.
func netnsInode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// refused explains a step the kernel did not allow.
func refused(step string, err error) error {
	hint := "run as root, or allow unprivileged user namespaces; in a container, add the capabilities SYS_ADMIN and NET_ADMIN"
	if errors.Is(err, syscall.ENOSPC) {
		hint = "the limit is reached or zero: raise the sysctls user.max_user_namespaces, user.max_net_namespaces and user.max_mnt_namespaces"
	}
	if errors.Is(err, syscall.EINVAL) {
		hint = "this kernel was built without network or user namespaces"
	}
	if restricted := restrictedByAppArmor(); restricted != nil {
		return fmt.Errorf("%s: %w (%w)", step, err, restricted)
	}
	return fmt.Errorf("%s: %w (%s)", step, err, hint)
}

// restrictedByAppArmor knows the one refusal that comes late: the namespace is
// made and then has no rights inside (Ubuntu since 23.10).
func restrictedByAppArmor() error {
	b, err := os.ReadFile("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
	if err != nil || privileged() || strings.TrimSpace(string(b)) != "1" {
		return nil
	}
	return errors.New("AppArmor takes away all rights in user namespaces: run as root, or set the sysctl kernel.apparmor_restrict_unprivileged_userns=0")
}
