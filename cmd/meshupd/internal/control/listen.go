package control

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"meshupd/verify"
)

// Connections are few and local; the caps only keep one user from shutting all others out.
const (
	maxConns        = 128
	maxConnsPerUser = 24
)

// Listen makes the socket, open for all users of the machine: who may do what
// is decided by peer credentials. A socket that a killed daemon left behind is
// replaced; E-BUSY when a daemon still answers on it.
func Listen(path string) (net.Listener, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("look at the socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return nil, verify.Refuse(verify.CodeConfig, "%s is there and is not a socket", path)
	default:
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = c.Close()
			return nil, verify.Refuse(verify.CodeBusy, "a daemon already answers on %s", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the old socket: %w", err)
		}
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("open the control socket to local users: %w", err)
	}
	return &gate{UnixListener: ln, byUser: map[uint32]int{}}, nil
}

// gate admits connections whose other end the kernel can name, within the caps.
type gate struct {
	*net.UnixListener

	mu     sync.Mutex // guards the fields below
	total  int
	byUser map[uint32]int
}

// Accept implements net.Listener.
func (g *gate) Accept() (net.Conn, error) {
	for {
		c, err := g.AcceptUnix()
		if err != nil {
			return nil, err
		}
		who, err := peerCaller(c)
		if err != nil || !g.take(who.who.UID) {
			_ = c.Close()
			continue
		}
		return &heldConn{UnixConn: c, caller: who, release: sync.OnceFunc(func() { g.give(who.who.UID) })}, nil
	}
}

func (g *gate) take(uid uint32) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	// Root is let in beyond the caps: it has to be able to look at a machine that someone floods.
	if uid != 0 && (g.total >= maxConns || g.byUser[uid] >= maxConnsPerUser) {
		return false
	}
	g.total++
	g.byUser[uid]++
	return true
}

func (g *gate) give(uid uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.byUser[uid]--; g.byUser[uid] == 0 {
		delete(g.byUser, uid)
	}
}

// heldConn is an admitted connection; it gives its place back when it is closed.
type heldConn struct {
	*net.UnixConn
	caller  caller
	release func()
}

// Close implements net.Conn.
func (c *heldConn) Close() error {
	c.release()
	return c.UnixConn.Close()
}
