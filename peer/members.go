package peer

import (
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

const (
	maxMembers = 1000
	forgetTime = 24 * time.Hour
	// handOnAge is how old a status may be that is handed to a newcomer.
	handOnAge = time.Minute
)

// roster holds the last status of every device heard of.
type roster struct {
	mu    sync.Mutex
	heard map[peer.ID]*heardStatus
}

type heardStatus struct {
	signed []byte
	status DeviceStatus
	at     time.Time // by this device's own clock, which need not be right
}

func newRoster() *roster { return &roster{heard: map[peer.ID]*heardStatus{}} }

// hear takes a status whose signature held, said age ago. It is false for one that is not newer than what is known.
func (r *roster) hear(id peer.ID, signed []byte, s DeviceStatus, now time.Time, age time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.heard[id]
	if known != nil && !s.newer(known.status) {
		return false
	}
	at := now.Add(-max(age, 0))
	if known != nil && known.at.After(at) {
		at = known.at // a neighbour's idea of the age cannot make a device look more silent
	}
	if known == nil && len(r.heard) >= maxMembers {
		r.dropOldestLocked()
	}
	r.heard[id] = &heardStatus{signed: signed, status: s, at: at}
	return true
}

func (r *roster) dropOldestLocked() {
	var oldest peer.ID
	var at time.Time
	for id, h := range r.heard {
		if oldest == "" || h.at.Before(at) {
			oldest, at = id, h.at
		}
	}
	delete(r.heard, oldest)
}

// forget drops devices that were silent for a day, and says whether there were any.
func (r *roster) forget(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := len(r.heard)
	for id, h := range r.heard {
		if now.Sub(h.at) > forgetTime {
			delete(r.heard, id)
		}
	}
	return len(r.heard) != before
}

// status returns what was last heard from a device.
func (r *roster) status(id peer.ID) (DeviceStatus, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := r.heard[id]
	if h == nil {
		return DeviceStatus{}, false
	}
	return h.status, true
}

// size is the number of devices heard of.
func (r *roster) size() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.heard)
}

// agedStatus is a signed status on its way to a newcomer.
type agedStatus struct {
	age    time.Duration
	signed []byte
}

// recent lists what was heard within handOnAge.
func (r *roster) recent(now time.Time) []agedStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []agedStatus
	for _, h := range r.heard {
		if age := now.Sub(h.at); age <= handOnAge {
			list = append(list, agedStatus{age: age, signed: h.signed})
		}
	}
	return list
}

// members lists all devices by id, and those that are connected but have said nothing yet.
func (r *roster) members(connected []peer.ID, now time.Time) []Member {
	here := make(map[peer.ID]bool, len(connected))
	for _, id := range connected {
		here[id] = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Member, 0, len(r.heard)+len(connected))
	for id, h := range r.heard {
		list = append(list, Member{ID: id.String(), Status: h.status, LastHeard: h.at, Connected: here[id]})
		delete(here, id)
	}
	for id := range here {
		list = append(list, Member{ID: id.String(), LastHeard: now, Connected: true})
	}
	slices.SortFunc(list, func(a, b Member) int { return strings.Compare(a.ID, b.ID) })
	return list
}
