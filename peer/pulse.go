package peer

import (
	"fmt"
	"sync"
	"time"
)

// pulse is the life of the loop, told to whoever watches over it. The loop says before each thing it does how long that may
// be silent, and a long step says so again each time it got further. So a watchdog can tell a loop that hangs from one that
// has much to do. It has a lock of its own: a loop that hangs may hold any other.
type pulse struct {
	mu     sync.Mutex // owns:
	doing  string
	beaten time.Time
	silent time.Duration // how long the loop may say nothing after beaten
}

// quietLook is how long a look at the facts, or a small change of the slots, may take: tools of bootloaders and installers
// have 30 s each time they are run, and their disk may be slow.
const quietLook = 5 * time.Minute

// beat says that the loop lives, and that it may be silent for so long from now on.
func (p *pulse) beat(doing string, silent time.Duration) {
	p.mu.Lock()
	p.doing, p.beaten, p.silent = doing, time.Now(), silent
	p.mu.Unlock()
}

// again says that what the loop does got further.
func (p *pulse) again() {
	p.mu.Lock()
	p.beaten = time.Now()
	p.mu.Unlock()
}

// alive is nil while the loop may be silent, and before its first beat.
func (p *pulse) alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if late := time.Since(p.beaten); !p.beaten.IsZero() && late > p.silent {
		return fmt.Errorf("nothing was heard of the device's loop for %s, and %q may be silent for %s", late.Round(time.Second), p.doing, p.silent)
	}
	return nil
}

// Alive says nil while the loop that takes releases through their life goes round, or is in a step that takes its time, and
// else since when it hangs and where. It never waits, so that a watchdog can ask it.
func (n *Node) Alive() error { return n.pulse.alive() }

// quietFor is how long a step may be silent.
func (n *Node) quietFor(s Step) time.Duration {
	if n.cfg.Quiet == nil {
		return quietLook
	}
	return max(quietLook, n.cfg.Quiet(s))
}
