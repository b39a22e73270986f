package apply

import (
	"context"
	"errors"
	"maps"
	"net"
	"sync"
	"time"

	"meshupd/install"
	"meshupd/verify"
)

// Client asks a Server for everything. It is a full install.Slots for the half without rights. Errors of the server come
// back with their code; E-APPLY is one that cannot be reached or breaks off.
//
// State is asked for many times a second while an image is fetched, and at least once a minute all day. Nothing but
// this client's own requests changes it while the machine runs, so the last answer is kept until the next request
// that changes something, and for stateHolds at most: the server can end when it has nothing to do, and an idle device does not
// start it every minute only to be told the same. For the same reason no connection is held for longer than the server
// keeps one without requests.
type Client struct {
	socket string

	mu    sync.Mutex // owns:
	spare *lines     // a connection without a request
	busy  int        // requests under way that may change the state
	turn  uint64     // counts the ends of those
	kept  *install.State
	asked time.Time // when kept was true
}

var _ install.Slots = (*Client)(nil)

// stateHolds bounds how long a state counts that something else may have changed after all: a person as root, say.
const stateHolds = time.Hour

// stopTime is how long a client that gives up waits for the server's last word.
const stopTime = 10 * time.Second

// NewClient prepares a client of the server at a socket; it connects with the first request.
func NewClient(socket string) *Client { return &Client{socket: socket} }

// Close closes the connection, if there is one. The client can be used again.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spare != nil {
		c.spare.conn.Close()
		c.spare = nil
	}
}

// State implements install.Slots.
func (c *Client) State(ctx context.Context) (install.State, error) {
	c.mu.Lock()
	turn := c.turn
	if c.busy == 0 && c.kept != nil && time.Since(c.asked) < stateHolds {
		defer c.mu.Unlock()
		return copyState(*c.kept), nil
	}
	c.mu.Unlock()
	asked := time.Now()
	a, err := c.call(ctx, request{Do: doState}, nil)
	if err != nil {
		return install.State{}, err
	}
	if a.State == nil {
		return install.State{}, verify.Refuse(verify.CodeApply, "the process that writes the slots did not tell their state")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy == 0 && c.turn == turn {
		kept := copyState(*a.State)
		c.kept, c.asked = &kept, asked
	}
	return *a.State, nil
}

func copyState(s install.State) install.State {
	s.Slots = maps.Clone(s.Slots)
	return s
}

// Write implements install.Slots. The server finds the images by itself: open is not used.
func (c *Client) Write(ctx context.Context, rel *verify.Release, images []verify.Image, _ install.Source, progress func(done, total int64)) error {
	if err := install.CheckImages(rel, images); err != nil {
		return err
	}
	id := rel.ID()
	return c.change(ctx, request{Do: doWrite, Release: &id}, progress)
}

// Try implements install.Slots.
func (c *Client) Try(ctx context.Context, slot install.SlotName) error {
	return c.change(ctx, request{Do: doTry, Slot: slot}, nil)
}

// Restore fills the idle slot with a version that is kept beside the slots, unless it was withdrawn.
func (c *Client) Restore(ctx context.Context, release verify.Digest) error {
	return c.change(ctx, request{Do: doRestore, Release: &release}, nil)
}

// Restart implements install.Slots.
func (c *Client) Restart(ctx context.Context) error {
	return c.change(ctx, request{Do: doRestart}, nil)
}

// Confirm implements install.Slots. The server checks the slot's health once more: E-HEALTH.
func (c *Client) Confirm(ctx context.Context) error {
	return c.change(ctx, request{Do: doConfirm}, nil)
}

// Fallback implements install.Slots.
func (c *Client) Fallback(ctx context.Context) error {
	return c.change(ctx, request{Do: doFallback}, nil)
}

// Forget implements install.Slots.
func (c *Client) Forget(ctx context.Context) error {
	return c.change(ctx, request{Do: doForget}, nil)
}

// Start does what a power-on has left to do.
func (c *Client) Start(ctx context.Context) error { return c.change(ctx, request{Do: doStart}, nil) }

// Learn tells the server of a release that was accepted, whatever becomes of it.
func (c *Client) Learn(ctx context.Context, release verify.Digest) error {
	return c.change(ctx, request{Do: doLearn, Release: &release}, nil) // what it recalls may be among State.Kept
}

// Check runs the health check there. The server looks up the version by itself.
func (c *Client) Check(ctx context.Context, slot install.SlotName, _ string) error {
	_, err := c.call(ctx, request{Do: doCheck, Slot: slot}, nil)
	return err
}

// change is a request after which a kept state is worth nothing, also when it failed.
func (c *Client) change(ctx context.Context, req request, progress func(done, total int64)) error {
	c.mu.Lock()
	c.busy++
	c.kept = nil
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.busy--
		c.turn++
		c.kept = nil
		c.mu.Unlock()
	}()
	_, err := c.call(ctx, req, progress)
	return err
}

func (c *Client) call(ctx context.Context, req request, progress func(done, total int64)) (answer, error) {
	if err := ctx.Err(); err != nil {
		return answer{}, err
	}
	c.mu.Lock()
	l := c.spare
	c.spare = nil
	c.mu.Unlock()
	if l != nil {
		a, begun, err := c.ask(ctx, l, req, progress)
		if begun || err == nil || ctx.Err() != nil {
			return a, err
		}
		// The server had closed it for want of requests, or has ended since.
	}
	conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", c.socket)
	if err != nil {
		if ctx.Err() != nil {
			return answer{}, ctx.Err()
		}
		return answer{}, verify.Refuse(verify.CodeApply, "the process that writes the slots cannot be reached: %w", err)
	}
	a, _, err := c.ask(ctx, newLines(conn), req, progress)
	return a, err
}

// ask sends a request over l and waits for the last line. begun says whether the server had read it. Afterwards l is the
// spare connection, or closed.
func (c *Client) ask(ctx context.Context, l *lines, req request, progress func(done, total int64)) (last answer, begun bool, err error) {
	var stopped time.Time
	stop := context.AfterFunc(ctx, func() { l.conn.(*net.UnixConn).CloseWrite() })
	defer func() {
		if !stop() || err != nil && !last.End {
			l.conn.Close()
			return
		}
		c.putBack(l)
	}()
	if err := l.write(req); err != nil {
		return answer{}, false, c.broken(ctx, err)
	}
	for {
		a, err := c.next(l)
		switch {
		case err != nil:
			return answer{}, begun, c.broken(ctx, err)
		case a.End:
			if err := a.err(); err != nil && ctx.Err() != nil {
				return a, true, ctx.Err()
			}
			return a, true, a.err()
		}
		begun = true
		if a.Total > 0 {
			if progress != nil {
				progress(a.Done, a.Total)
			}
			if ctx.Err() == nil {
				if err := l.write(request{Go: true}); err != nil && ctx.Err() == nil {
					return answer{}, true, c.broken(ctx, err)
				}
			}
		}
		if ctx.Err() != nil {
			if stopped.IsZero() {
				stopped = time.Now()
			} else if time.Since(stopped) > stopTime {
				return answer{}, true, ctx.Err()
			}
		}
	}
}

func (c *Client) next(l *lines) (answer, error) {
	line, err := l.read(answerTime)
	if err != nil {
		return answer{}, err
	}
	return parseAnswer(line)
}

func (c *Client) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return verify.Refuse(verify.CodeApply, "the process that writes the slots gives no sign of life")
	}
	return verify.Refuse(verify.CodeApply, "the process that writes the slots stopped answering: %w", err)
}

func (c *Client) putBack(l *lines) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spare != nil {
		l.conn.Close()
		return
	}
	c.spare = l
}
