// Guest is the first process of a machine in the boot lab. It takes a signed release from the second disk through
// verify's door and does with package install, step by step in the order of peer's lifecycle, what a daemon does. There is no
// shell and no other program: NVMe, GPT, ext4 and DMI are built into Debian's cloud kernel.
//
// What it shall do comes as the serial number of the machine (DMI), so that nothing on the disk has to change; see
// bootlab.Scenario. What it does it says on the serial line.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"meshupd/install"
	"meshupd/install/bootlab"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "restart" {
		restart(os.Getenv("MESHUPD_REBOOT_ARG"))
	}
	if len(os.Args) > 1 && os.Args[1] == "healthy" {
		os.Exit(healthy())
	}
	if err := setUp(); err != nil {
		say("FAIL", "%v", err)
		off()
	}
	if err := run(context.Background()); err != nil {
		say("FAIL", "%v", err)
	}
	off()
}

// say writes one marker, and waits until it is out: a marker that is cut off must not hide what came after it. The line feed
// before it ends whatever the kernel was saying.
func say(marker bootlab.Marker, format string, args ...any) {
	fmt.Printf("\n%s%s %s\n", bootlab.MarkerPrefix, marker, fmt.Sprintf(format, args...))
	_ = unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1) // tcdrain(3)
}

// run is one start of the machine, from the slots as they are found to a restart or the end.
func run(ctx context.Context) error {
	sc, err := scenario()
	if err != nil {
		return err
	}
	if sc.Daemon {
		return live()
	}
	g, err := openGuest(ctx, sc)
	if err != nil {
		return err
	}
	for range 20 {
		st, err := g.slots.State(ctx)
		if err != nil {
			return err
		}
		more, err := g.step(ctx, st)
		if err != nil || !more {
			return err
		}
	}
	return fmt.Errorf("no end after 20 steps")
}

// setUp makes a file system tree of what the kernel started.
func setUp() error {
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) { // some kernels have mounted it
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	toConsole()
	return nil
}

func toConsole() {
	if c, err := os.OpenFile("/dev/console", os.O_RDWR, 0); err == nil {
		os.Stdout, os.Stderr = c, c
	}
}

// scenario reads the serial number of the machine; a user-mode kernel has none, and gets a word instead.
func scenario() (bootlab.Scenario, error) {
	if text := word("lab.scenario"); text != "" {
		return bootlab.ParseScenario(text)
	}
	text, err := os.ReadFile("/sys/class/dmi/id/product_serial")
	if err != nil {
		return bootlab.Scenario{}, err
	}
	return bootlab.ParseScenario(strings.TrimSpace(string(text)))
}

// word reads NAME=VALUE from the kernel command line.
func word(name string) string {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for _, w := range strings.Fields(string(text)) {
		if value, found := strings.CutPrefix(w, name+"="); found {
			return value
		}
	}
	return ""
}

// restart is the restart command of the slots. It does not sync: what has to be durable is durable by now.
func restart(arg string) {
	if sc, err := scenario(); err == nil && sc.Daemon {
		toConsole() // what a restart command prints is the daemon's
		say(bootlab.MarkerRestart, "")
	}
	var err error
	if arg == "" {
		err = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	} else if text, e := unix.BytePtrFromString(arg); e != nil {
		err = e
	} else {
		_, _, errno := unix.Syscall6(unix.SYS_REBOOT, unix.LINUX_REBOOT_MAGIC1, unix.LINUX_REBOOT_MAGIC2,
			unix.LINUX_REBOOT_CMD_RESTART2, uintptr(unsafe.Pointer(text)), 0, 0)
		err = errno
	}
	say("FAIL", "restart: %v", err)
	select {}
}

func off() {
	say(bootlab.MarkerOff, "")
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	say("FAIL", "power off: %v", err)
	select {}
}

// slotsOf opens the slots of the machine behind its bootloader.
func slotsOf(ctx context.Context, sc bootlab.Scenario) (*install.Block, error) {
	kind, err := bootlab.KindOf(word("lab.loader"))
	if err != nil {
		return nil, err
	}
	boot, err := mounts(kind)
	if err != nil {
		return nil, err
	}
	if sc.Rename {
		if boot, err = shadow(boot); err != nil {
			return nil, err
		}
	}
	loader, err := kind.Loader(boot, "/run")
	if err != nil {
		return nil, err
	}
	return install.OpenBlock(ctx, install.BlockConfig{
		A: device(bootlab.PartA), B: device(bootlab.PartB), State: "/data/slots", FactoryVersion: version(), Loader: loader,
		Starts: sc.Starts, Restart: []string{"/sbin/init", "restart"},
		Wrote: func(slot install.SlotName, written, same int64) {
			say(bootlab.MarkerSynced, "slot=%s written=%d same=%d", slot, written, same)
		},
	})
}
