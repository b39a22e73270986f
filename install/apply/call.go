package apply

import (
	"context"
	"errors"
	"sync"
	"time"

	"meshupd/verify"
)

// errGone is why a write stops when nobody waits for it any more.
var errGone = errors.New("the client went away")

// progressEvery bounds the lines of a write; the first and the last are always told.
const progressEvery = 100 * time.Millisecond

// call is one request while it is carried out.
type call struct {
	l    *lines
	acks chan struct{}

	mu   sync.Mutex // orders the lines that are written, and owns:
	told time.Time
	full bool // the end of the progress was told; reading back goes on
	gone context.CancelCauseFunc
}

// run carries do out. Meanwhile it sends beats, and listens: for the client's notes of progress, and for its end. alive
// says whether the connection can take another request after the last line, which the caller writes.
func (c *call) run(ctx context.Context, do func(ctx, stop context.Context) answer) (last answer, alive bool) {
	stop, gone := context.WithCancelCause(ctx)
	defer gone(nil)
	c.gone = gone
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(2)
	go func() {
		defer wg.Done()
		c.beat(done)
	}()
	alive = true
	go func() {
		defer wg.Done()
		if err := c.listen(done); err != nil {
			alive = false
			gone(err)
		}
	}()
	last = do(ctx, stop)
	close(done)
	c.l.interrupt(false)
	wg.Wait()
	c.l.resume()
	return last, alive
}

// beat tells at once that the request was read, and then that it is still being worked on.
func (c *call) beat(done <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		c.send(answer{})
		select {
		case <-done:
			return
		case <-tick.C:
		}
	}
}

func (c *call) send(a answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.l.write(a) != nil {
		c.gone(errGone)
	}
}

// listen returns nil when done is closed.
func (c *call) listen(done <-chan struct{}) error {
	for {
		line, err := c.l.read(24 * time.Hour)
		select {
		case <-done:
			if err == nil || c.l.in.Buffered() > 0 {
				return errGone // it does not keep to its turn
			}
			return nil
		default:
		}
		if err != nil {
			return errGone
		}
		if req, err := parseRequest(line); err != nil || !req.Go {
			return verify.Refuse(verify.CodeFormat, "a second request before the end of the first")
		}
		select {
		case c.acks <- struct{}{}:
		default:
			return verify.Refuse(verify.CodeFormat, "progress was answered that was not told")
		}
	}
}

// progress tells the client and waits until it took note: a client that stopped is noticed before the next chunk.
func (c *call) progress(ctx context.Context, done, total int64) {
	if (done < total || c.full) && time.Since(c.told) < progressEvery || total == 0 {
		return
	}
	c.told, c.full = time.Now(), done == total
	c.send(answer{Done: done, Total: total})
	limit := time.NewTimer(ackTime)
	defer limit.Stop()
	select {
	case <-c.acks:
	case <-ctx.Done():
	case <-limit.C:
		c.gone(errGone)
	}
}
