package simnet

import (
	"sync"
	"time"
)

// deadline wakes those who wait on cond when it passes. Guarded by cond.L.
type deadline struct {
	cond   *sync.Cond
	passed bool
	timer  *time.Timer
	number int // of the setting that counts
}

// set replaces the deadline; the zero time is none.
func (d *deadline) set(t time.Time) {
	d.stop()
	d.passed = false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.passed = true
		d.cond.Broadcast()
		return
	}
	number := d.number
	d.timer = time.AfterFunc(wait, func() {
		d.cond.L.Lock()
		defer d.cond.L.Unlock()
		// A timer may already run when it is stopped; then its number is an old one.
		if d.number == number {
			d.passed = true
			d.cond.Broadcast()
		}
	})
}

func (d *deadline) stop() {
	d.number++
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
}
