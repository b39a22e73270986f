package control

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/user"
	"runtime"
	"slices"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// caller is the other end of a connection as the kernel reported it when the
// connection was made: it cannot be claimed, and it stays right when the process is gone.
type caller struct {
	who    Who
	groups []uint32 // supplementary groups of the process
}

type callerKey struct{}

// withCaller keeps the caller for the requests of one connection.
func withCaller(ctx context.Context, c net.Conn) context.Context {
	if pc, ok := c.(*heldConn); ok {
		return context.WithValue(ctx, callerKey{}, pc.caller)
	}
	return ctx
}

func callerOf(ctx context.Context) (caller, bool) {
	c, ok := ctx.Value(callerKey{}).(caller)
	return c, ok
}

// peerCaller asks the kernel who connected.
func peerCaller(c *net.UnixConn) (caller, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return caller{}, fmt.Errorf("ask who connected: %w", err)
	}
	var got caller
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			inner = err
			return
		}
		got.who = Who{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}
		got.groups = peerGroups(int(fd))
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return caller{}, fmt.Errorf("ask who connected: %w", err)
	}
	if u, err := user.LookupId(strconv.FormatUint(uint64(got.who.UID), 10)); err == nil {
		got.who.Name = u.Username
	}
	return got, nil
}

// peerGroups reads SO_PEERGROUPS, for which x/sys has no call of its own. No answer means no groups: it can only refuse.
func peerGroups(fd int) []uint32 {
	groups := make([]uint32, 256)
	size := uint32(len(groups) * 4)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
		uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
	runtime.KeepAlive(groups)
	if errno != 0 {
		return nil
	}
	return groups[:min(int(size/4), len(groups))]
}

// mayAct says whether a caller may change something: root, the daemon's own
// user, or a member of the group.
func mayAct(c caller, ownUID uint32, gid uint32, haveGroup bool) bool {
	if c.who.UID == 0 || c.who.UID == ownUID {
		return true
	}
	return haveGroup && (c.who.GID == gid || slices.Contains(c.groups, gid))
}

// authorize returns who calls, or E-PERMISSION.
func (s *Server) authorize(ctx context.Context) (Who, error) {
	c, ok := callerOf(ctx)
	if !ok {
		return Who{}, verify.Refuse(verify.CodePermission, "the caller is unknown")
	}
	gid, haveGroup := groupID(s.cfg.Group)
	if !mayAct(c, uint32(os.Getuid()), gid, haveGroup) {
		return Who{}, verify.Refuse(verify.CodePermission, "%s is neither root nor in the group %q", c.who, s.cfg.Group)
	}
	return c.who, nil
}

// groupID is asked each time: the group may be made while the daemon runs.
func groupID(name string) (uint32, bool) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, false
	}
	gid, err := strconv.ParseUint(g.Gid, 10, 32)
	return uint32(gid), err == nil
}
