package apply

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Config of a Server.
type Config struct {
	// State is a folder that only this half can write. The door's files are in it too, as a rule.
	State  string
	Door   *verify.Door
	Device verify.Device // Running is looked up in the slots
	Slots  Slots
	Shelf  Shelf
	// UIDs may ask, besides root and this process's own user.
	UIDs []uint32
	// Idle is how long nobody asks before Serve returns nil; 0: for ever.
	Idle time.Duration
	Log  *slog.Logger
}

// maxConns is far above what one daemon uses: one for a write, one beside it.
const maxConns = 16

// Server does what it is asked, if it may be done.
type Server struct {
	cfg   Config
	judge *judge

	mu    sync.Mutex // owns:
	conns int
	ended time.Time // when the last connection ended
}

// NewServer prepares the folder of heads and starts nothing.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	heads := filepath.Join(cfg.State, "heads")
	if err := durable.MkdirAll(heads, 0o700); err != nil {
		return nil, verify.Refuse(verify.CodeIO, "%w", err)
	}
	if err := durable.Sweep(heads); err != nil {
		return nil, verify.Refuse(verify.CodeIO, "%w", err)
	}
	return &Server{cfg: cfg, judge: &judge{door: cfg.Door, dev: cfg.Device, slots: cfg.Slots, shelf: cfg.Shelf, folder: heads, log: cfg.Log}}, nil
}

// Serve answers until ctx ends, or nobody asked for Config.Idle. It returns when all that it began has ended, and closes ln.
//
// A connection that comes while it decides to end waits in the socket, which systemd holds open too, and starts the next one.
func (s *Server) Serve(ctx context.Context, ln *net.UnixListener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer ln.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { ln.SetDeadline(past) })()
	s.ended = time.Now()
	for {
		if s.cfg.Idle > 0 {
			if err := ln.SetDeadline(time.Now().Add(s.cfg.Idle)); err != nil {
				return fmt.Errorf("wait for requests: %w", err)
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		conn, err := ln.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			if s.idle() {
				return nil
			}
			continue
		case err != nil:
			return fmt.Errorf("wait for requests: %w", err)
		}
		if !s.take() {
			conn.Close()
			continue
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer s.give()
			defer conn.Close()
			if err := s.mayAsk(conn); err != nil {
				s.cfg.Log.Warn("refused a caller", "err", err)
				_ = newLines(conn).write(failed(err))
				return
			}
			s.talk(ctx, conn)
		}()
	}
}

func (s *Server) take() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns >= maxConns {
		return false
	}
	s.conns++
	return true
}

func (s *Server) give() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns--
	s.ended = time.Now()
}

func (s *Server) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conns == 0 && time.Since(s.ended) >= s.cfg.Idle
}

// mayAsk asks the kernel who connected. Members of the daemon's group may act on its own socket, not on this one.
func (s *Server) mayAsk(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return fmt.Errorf("ask who connected: %w", err)
	}
	var cred *unix.Ucred
	var inner error
	if err := raw.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || inner != nil {
		return fmt.Errorf("ask who connected: %w", errors.Join(err, inner))
	}
	if cred.Uid == 0 || int(cred.Uid) == os.Geteuid() || slices.Contains(s.cfg.UIDs, cred.Uid) {
		return nil
	}
	return verify.Refuse(verify.CodePermission, "user %d may not ask for slots to be written", cred.Uid)
}

// talk answers one request after the other. A request that cannot be read ends the connection: what follows it means nothing.
func (s *Server) talk(ctx context.Context, conn *net.UnixConn) {
	l := newLines(conn)
	defer context.AfterFunc(ctx, func() { l.interrupt(true) })()
	for ctx.Err() == nil {
		line, err := l.read(idleConn)
		if err != nil {
			return
		}
		req, err := parseRequest(line)
		if err == nil && req.Go {
			err = verify.Refuse(verify.CodeFormat, "an answer to nothing")
		}
		if err != nil {
			s.cfg.Log.Warn("refused a request", "code", verify.CodeOf(err), "err", err)
			_ = l.write(failed(err))
			if verify.CodeOf(err) == verify.CodeBoot {
				continue
			}
			return
		}
		c := &call{l: l, acks: make(chan struct{}, 1)}
		last, alive := c.run(ctx, func(ctx, stop context.Context) answer { return s.do(ctx, stop, req, c) })
		if last.Detail != "" {
			s.cfg.Log.Info("did not", "do", req.Do, "code", last.Code, "err", last.Detail)
		} else if req.Do != doState {
			s.cfg.Log.Info("did", "do", req.Do)
		}
		if l.write(last) != nil || !alive {
			return
		}
	}
}

// do carries one request out. stop also ends when the client goes away; a restart goes on without it.
func (s *Server) do(ctx, stop context.Context, req request, c *call) answer {
	j := s.judge
	if req.Do != doStart {
		j.started(ctx)
	}
	switch req.Do {
	case doState:
		return s.state(ctx)
	case doStart:
		return failed(j.start(ctx))
	case doLearn:
		return failed(j.learn(stop, *req.Release))
	case doWrite:
		return failed(j.alone(stop, func(ctx context.Context) error {
			return j.write(ctx, *req.Release, func(done, total int64) { c.progress(ctx, done, total) })
		}))
	case doRestore:
		return failed(j.alone(stop, func(ctx context.Context) error { return j.restore(ctx, *req.Release) }))
	case doTry:
		return failed(j.alone(ctx, func(ctx context.Context) error { return j.try(ctx, req.Slot) }))
	case doRestart:
		return failed(j.alone(ctx, j.restart))
	case doCheck:
		return failed(j.checkHealth(stop, req.Slot))
	case doConfirm:
		return failed(j.alone(stop, j.confirm))
	case doFallback:
		return failed(j.alone(ctx, s.cfg.Slots.Fallback))
	default: // doForget: parseRequest knows no other
		return failed(j.alone(ctx, s.cfg.Slots.Forget))
	}
}

func (s *Server) state(ctx context.Context) answer {
	st, err := s.cfg.Slots.State(ctx)
	a := failed(err)
	if err == nil {
		for slot, c := range st.Slots {
			c.Version = plain(c.Version)
			if len(c.Version) > 256 {
				c.Version = c.Version[:256]
			}
			st.Slots[slot] = c
		}
		if st.Why != "" {
			st.Why = plain(st.Why)
			st.Why = strings.ToValidUTF8(st.Why[:min(len(st.Why), maxDetail)], "")
		}
		a.State = &st
	}
	return a
}
