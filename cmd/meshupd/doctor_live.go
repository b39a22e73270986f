package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/install"
	"meshupd/install/apply"
	"meshupd/verify"
)

// liveChecks are for the device that this runs on.
var liveChecks = []check{
	{ID: "trust.state", Needs: (*patient).needDoor, Look: (*patient).checkTrustState},
	{ID: "clock", Needs: (*patient).needDoor, Look: (*patient).checkClock},
	{ID: "state.folder", Needs: (*patient).needConfig, Look: (*patient).checkStateFolder},
	{ID: "state.space", Needs: (*patient).needConfig, Look: (*patient).checkStateSpace},
	{ID: "run.folder", Needs: (*patient).needConfig, Look: (*patient).checkRunFolder},
	{ID: "daemon.answers", Look: (*patient).checkDaemon},
	{ID: "apply.answers", Needs: (*patient).needConfig, Look: (*patient).checkApply},
	{ID: "slots.folder", Needs: (*patient).needFolder, Look: (*patient).checkFolder},
	{ID: "slots.known", Needs: (*patient).needBlock, Look: (*patient).checkSlotsKnown},
	{ID: "slots.running", Needs: (*patient).needBlock, Look: (*patient).checkSlotRuns},
	{ID: "slots.idle", Needs: (*patient).needBlock, Look: (*patient).checkSlotIdle},
	{ID: "boot.settings", Needs: (*patient).needBootloader, Look: (*patient).checkBootSettings},
	{ID: "boot.place", Needs: (*patient).needBootloader, Look: (*patient).checkBootPlaces},
	{ID: "net.interfaces", Needs: (*patient).needConfig, Look: (*patient).checkInterfaces},
	{ID: "net.multicast", Needs: (*patient).needConfig, Look: (*patient).checkMulticast},
	{ID: "net.port", Needs: (*patient).needConfig, Look: (*patient).checkPort},
	{ID: "kernel.sticks", Look: (*patient).checkKernel},
	{ID: "limits.files", Look: (*patient).checkFiles},
	{ID: "limits.memory", Look: (*patient).checkMemory},
}

func (p *patient) checkTrustState(context.Context) doctor.Finding {
	if alarms := p.door.Alarms(); len(alarms) > 0 {
		a := alarms[len(alarms)-1]
		f := doctor.Fail(fmt.Sprintf("two signed documents claim to be %s: %s and %s", a.Place, a.Kept, a.Other),
			"the vendor's keys were used twice for one place, by mistake or by a thief", codeTexts[verify.CodeFork].fix)
		f.Code = verify.CodeFork
		return f
	}
	c := p.door.Counters()
	return doctor.OK("accepted %d.%d, floor %d, proven time %s", c.Line, c.Accepted, c.Floor, p.door.ProvenTime().Format(time.DateOnly))
}

// checkClock compares the clock with signed dates. A wrong clock refuses nothing, but people are misled by it.
func (p *patient) checkClock(context.Context) doctor.Finding {
	now, proven := p.now(), p.door.ProvenTime()
	if !proven.IsZero() && now.Before(proven) {
		return doctor.Warn(fmt.Sprintf("the clock says %s, signed dates prove that it is %s or later", now.UTC().Format(time.DateOnly), proven.Format(time.DateOnly)),
			"releases are judged by signed dates, so they install; windows, history and logs have the wrong time", "set the clock, or give the device NTP or a battery for it")
	}
	if now.Year() < 2020 {
		return doctor.Warn("the clock says "+now.UTC().Format(time.DateOnly), "windows, history and logs have the wrong time", "set the clock, or give the device NTP or a battery for it")
	}
	return doctor.OK("%s, not before %s, the latest signed date", now.UTC().Format(time.DateTime), proven.Format(time.DateOnly))
}

// nearest is the path, or the first folder above it that is there.
func nearest(name string) string {
	for name != "/" && name != "." {
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			return name
		}
		name = filepath.Dir(name)
	}
	return name
}

func nearestFileSystem(name string) (install.FileSystem, string, error) {
	at := nearest(name)
	fs, err := install.FileSystemOf(at)
	return fs, at, err
}

// daemonUser is the user that the daemon runs as, by config and unit.
func (p *patient) daemonUser() string {
	if p.cfg.Apply.Socket != "" {
		return p.cfg.Apply.User
	}
	if u, at, err := p.tree.UnitFile("meshupd.service"); err == nil && at != "" && u.Last("Service.User") != "" {
		return u.Last("Service.User")
	}
	return ""
}

func (p *patient) checkStateFolder(context.Context) doctor.Finding {
	name := p.cfg.State
	system, at, err := nearestFileSystem(name)
	if err != nil {
		return doctor.Skip("%v", err)
	}
	forgets := "the device forgets at each restart what runs, what failed and who it is"
	switch {
	case system.Type == "tmpfs" || system.Type == "ramfs":
		return doctor.Fail(name+" lies in memory ("+system.Type+")", forgets, "put `state` on a disk that outlasts restarts and updates")
	case system.ReadOnly:
		return doctor.Fail(name+" lies on a file system that is mounted read-only", "the daemon does not start", "mount a partition that can be written there")
	case at != name:
		return doctor.Warn(name+" is not there yet", "the daemon makes it at its first start, if it may", "nothing, if systemd's StateDirectory= or tmpfiles.d makes it")
	}
	info, err := os.Stat(name)
	if err != nil {
		return doctor.Skip("%v", err)
	}
	if !info.IsDir() {
		return doctor.Fail(name+" is no folder", "the daemon does not start", "remove it, or correct `state`")
	}
	owner, mode := int(info.Sys().(*syscall.Stat_t).Uid), info.Mode().Perm()
	if user := p.daemonUser(); user != "" {
		if uid, err := userID(user); err == nil && int(uid) != owner {
			return doctor.Fail(fmt.Sprintf("%s belongs to user %d, the daemon runs as %s (%d)", name, owner, user, uid), "the daemon cannot write its state", "chown -R "+user+": "+name)
		}
	}
	switch {
	case mode&0o200 == 0:
		return doctor.Fail(fmt.Sprintf("%s cannot be written by its owner (mode %o)", name, mode), "the daemon cannot write its state", "chmod u+w "+name)
	case mode&0o022 != 0:
		return doctor.Fail(fmt.Sprintf("others than its owner may write %s (mode %o)", name, mode), "any program could give the device another identity", "chmod go-w "+name)
	case system.Type == "overlay":
		return doctor.Warn(name+" lies on an overlay", "if its upper half is in memory, "+forgets, "put `state` on a partition of its own")
	}
	return doctor.OK("%s, owner %d, mode %o, %s", name, owner, mode, orUnknownType(system.Type))
}

func orUnknownType(t string) string {
	if t == "" {
		return "a file system not known here"
	}
	return t
}

// checkStateSpace asks for room for an image as large as a slot can hold.
func (p *patient) checkStateSpace(context.Context) doctor.Finding {
	system, at, err := nearestFileSystem(p.cfg.State)
	if err != nil {
		return doctor.Skip("%v", err)
	}
	reserve := int64(p.cfg.Store.Reserve)
	if system.Free <= reserve {
		f := doctor.Fail(fmt.Sprintf("%s free on the disk of %s, and store.reserve keeps %s", screen.Bytes(system.Free), at, screen.Bytes(reserve)),
			"no image can be stored", codeTexts[verify.CodeSpace].fix)
		f.Code = verify.CodeSpace
		return f
	}
	if p.cfg.Slots.Kind == "block" && !p.cfg.Store.Straight {
		var largest int64
		for _, size := range p.slots().Size {
			largest = max(largest, size)
		}
		if system.Free < largest+reserve {
			return doctor.Warn(fmt.Sprintf("%s free on the disk of %s, a raw image of a whole slot has %s", screen.Bytes(system.Free), at, screen.Bytes(largest)),
				"an image that large is refused with E-SPACE; a packed or smaller one fits", "free space, or set store.straight")
		}
	}
	return doctor.OK("%s free on the disk of %s", screen.Bytes(system.Free), at)
}

func (p *patient) checkRunFolder(context.Context) doctor.Finding {
	system, at, err := nearestFileSystem(p.cfg.Run)
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case system.ReadOnly:
		return doctor.Fail(p.cfg.Run+" lies on a file system that is mounted read-only", "the daemon does not start", "use a folder below /run")
	case at != p.cfg.Run:
		return doctor.OK("%s is made when the daemon starts", p.cfg.Run)
	}
	return doctor.OK("%s, %s", p.cfg.Run, orUnknownType(system.Type))
}

// checkDaemon asks the daemon who it is and how it is.
func (p *patient) checkDaemon(ctx context.Context) doctor.Finding {
	if p.cfg != nil && p.getenv("MESHUPD_SOCKET") == "" && p.socket == defaultSocket {
		p.socket = p.cfg.Socket()
	}
	client := p.client()
	defer client.Close()
	v, err := client.Version(ctx)
	if err != nil {
		return failed(err, "the device takes no part in the site")
	}
	st, err := client.Status(ctx, 0)
	if err != nil {
		return failed(err, "the device takes no part in the site")
	}
	if v.Version != buildVersion().Version {
		return doctor.Warn("the daemon is meshupd "+v.Version+", this program is "+buildVersion().Version, "the daemon was not started again after an update of the program", "systemctl restart meshupd")
	}
	for _, d := range st.Devices {
		if label := d.Name; label != st.Observer && d.ID != st.Observer {
			continue
		}
		p.seen.running = d.Version
		if d.Reason != nil && (d.State == "blocked" || d.State == "rolled-back") {
			f := doctor.Warn(fmt.Sprintf("meshupd %s answers; the device is %s: %s", v.Version, d.State, d.Reason.Detail), codeTexts[d.Reason.Code].sentence, codeTexts[d.Reason.Code].fix)
			f.Code = d.Reason.Code
			return f
		}
		return doctor.OK("meshupd %s answers on %s, runs %s, %s, %d of %s heard", v.Version, p.socket, orUnknown(d.Version), d.State, st.Site.Heard, count(st.Site.Devices, "device"))
	}
	return doctor.OK("meshupd %s answers on %s", v.Version, p.socket)
}

// checkApply asks root's half for the state of the slots.
func (p *patient) checkApply(ctx context.Context) doctor.Finding {
	if p.cfg.Apply.Socket == "" {
		return doctor.OK("not used: the daemon writes the slots itself")
	}
	client := apply.NewClient(p.cfg.Apply.Socket)
	defer client.Close()
	st, err := client.State(ctx)
	if err != nil {
		var nobody bool
		if conn, derr := unixDial(p.cfg.Apply.Socket); derr != nil {
			nobody = errors.Is(derr, fs.ErrPermission)
		} else {
			conn()
		}
		if nobody || os.Geteuid() != 0 && verify.CodeOf(err) == verify.CodeApply && p.mayNotAsk() {
			return doctor.Skip("only root and %s may ask %s: ask again as root", p.cfg.Apply.User, p.cfg.Apply.Socket)
		}
		return failed(err, "no slot can be written")
	}
	if err := ownedHere("apply.state", p.cfg.Apply.State); err != nil {
		return failed(err, "meshupd apply refuses to start")
	}
	if p.seen.running == "" {
		p.seen.running = st.Slots[st.Booted].Version
	}
	return doctor.OK("%s: %s on slot %s, which holds %s", p.cfg.Apply.Socket, st.Phase, st.Booted, orUnknown(st.Slots[st.Booted].Version))
}

func unixDial(path string) (closeIt func(), err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return func() { unix.Close(fd) }, nil
}

// mayNotAsk says whether this user is neither root nor the daemon's.
func (p *patient) mayNotAsk() bool {
	uid, err := userID(p.cfg.Apply.User)
	return err == nil && int(uid) != os.Geteuid()
}

// checkKernel looks for what reading a stick takes.
func (p *patient) checkKernel(context.Context) doctor.Finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return doctor.Skip("%v", err)
	}
	release := unix.ByteSliceToString(u.Release[:])
	major, minor := kernelVersion(release)
	if major < 5 || major == 5 && minor < 2 {
		return doctor.Warn("Linux "+release+" is older than 5.2", "a stick cannot be imported by its device", "mount sticks, and import from there")
	}
	builtIn, _ := p.tree.ReadFile("/proc/filesystems", 64<<10)
	known := string(builtIn)
	for _, list := range []string{"modules.builtin", "modules.dep"} {
		data, err := p.tree.ReadFile(filepath.Join("/lib/modules", release, list), 8<<20)
		if err == nil {
			known += string(data)
		}
	}
	var missing []string
	for _, kind := range stickTypes {
		if !strings.Contains(known, "\t"+kind.name+"\n") && !strings.Contains(known, "/"+kind.name+".ko") {
			missing = append(missing, kind.name)
		}
	}
	if len(missing) > 0 {
		return doctor.Warn("this kernel has no driver for "+strings.Join(missing, ", "), "sticks with such a file system cannot be imported", "build the kernel with it, or hand out sticks with another one")
	}
	return doctor.OK("Linux %s on %s reads vfat, exfat and ext4", release, runtime.GOARCH)
}

// kernelVersion reads "6.1.0-18-amd64"; 0, 0 when it is none.
func kernelVersion(release string) (major, minor int) {
	parts := strings.SplitN(release, ".", 3)
	if len(parts) < 2 {
		return 0, 0
	}
	major, _ = strconv.Atoi(parts[0])
	minor, _ = strconv.Atoi(strings.TrimRight(parts[1], "-+abcdefghijklmnopqrstuvwxyz"))
	return major, minor
}

// leastFiles is what connections, images and sockets of a site take, with room to spare.
const leastFiles = 1024

func (p *patient) checkFiles(context.Context) doctor.Finding {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return doctor.Skip("%v", err)
	}
	if limit.Max < leastFiles {
		return doctor.Warn(fmt.Sprintf("at most %d files may be open", limit.Max), "a busy site needs more", fmt.Sprintf("set LimitNOFILE=%d in the unit", leastFiles))
	}
	return doctor.OK("%d may be open", limit.Max)
}

// leastMemory is the daemon's own limit and as much again for the rest of a transfer.
const leastMemory = 2 * memoryLimit

func (p *patient) checkMemory(context.Context) doctor.Finding {
	data, err := p.tree.ReadFile("/proc/meminfo", 64<<10)
	if err != nil {
		return doctor.Skip("%v", err)
	}
	free, found := memAvailable(data)
	if !found {
		return doctor.Skip("/proc/meminfo has no MemAvailable")
	}
	if free < leastMemory {
		return doctor.Warn(screen.Bytes(free)+" of memory are available", "the daemon may be killed while it fetches an image", fmt.Sprintf("leave it %s", screen.Bytes(leastMemory)))
	}
	return doctor.OK("%s available", screen.Bytes(free))
}

// memAvailable reads /proc/meminfo (proc_meminfo(5)).
func memAvailable(meminfo []byte) (int64, bool) {
	for line := range strings.Lines(string(meminfo)) {
		f := strings.Fields(line)
		if len(f) > 1 && f[0] == "MemAvailable:" {
			kib, err := strconv.ParseInt(f[1], 10, 50)
			return kib << 10, err == nil
		}
	}
	return 0, false
}
