package peer

import (
	"bytes"
	"context"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"meshupd/swarm"
	"meshupd/verify"
)

// teller says this device's status, often enough and not too often.
type teller struct {
	m    *Mesh
	wake chan struct{}

	mu     sync.Mutex
	own    DeviceStatus
	said   bool // own was set
	dirty  bool // own differs from what was sent
	urgent bool // and others act on the difference: its State, or its ranks in the relay chains
	boot   uint64
	n      uint64
	spoken DeviceStatus // last sent
	sent   time.Time
	signed []byte // last sent
}

func newTeller(m *Mesh, boot uint64) *teller {
	return &teller{m: m, boot: boot, wake: make(chan struct{}, 1)}
}

func (t *teller) tell(s DeviceStatus) {
	t.mu.Lock()
	same := t.said && reflect.DeepEqual(t.own, s)
	t.own, t.said = s, true
	if !same {
		t.dirty = true
		t.urgent = t.urgent || s.State != t.spoken.State || !sameRanks(s.Holdings, t.spoken.Holdings)
	}
	t.mu.Unlock()
	if !same {
		t.poke()
	}
}

// sameRanks says whether both lists put the device in the same places. How much
// it holds changes all the time and can wait; where it stands decides who takes from whom.
func sameRanks(a, b []swarm.Holding) bool {
	return slices.EqualFunc(a, b, func(x, y swarm.Holding) bool {
		return x.Image == y.Image && x.Rank == y.Rank && x.Complete == y.Complete
	})
}

// again sends the status anew because something the mesh adds to it changed.
func (t *teller) again() {
	t.mu.Lock()
	t.dirty = true
	t.mu.Unlock()
	t.poke()
}

func (t *teller) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run sends the status when it is due, until ctx ends.
func (t *teller) run(ctx context.Context) error {
	heartbeat := newHeartbeat()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.wake:
		case <-timer.C:
		}
		now := time.Now()
		if at, ok := t.due(heartbeat); !ok {
			timer.Reset(heartbeatMax) // nothing to say yet; tell pokes
		} else if wait := at.Sub(now); wait > 0 {
			timer.Reset(wait)
		} else {
			t.send(ctx, now)
			heartbeat = newHeartbeat()
			timer.Reset(heartbeat)
		}
		if t.m.roster.forget(now) {
			t.m.changed()
		}
	}
}

func newHeartbeat() time.Duration { return heartbeatMin + rand.N(heartbeatMax-heartbeatMin) }

func (t *teller) due(heartbeat time.Duration) (at time.Time, ok bool) {
	gap := tellGapAt(t.m.roster.size())
	t.mu.Lock()
	defer t.mu.Unlock()
	return tellAt(t.sent, t.dirty, t.urgent, gap, heartbeat), t.said
}

func (t *teller) send(ctx context.Context, now time.Time) {
	signed, err := t.sign(now)
	if err != nil {
		t.m.log.Error("the status cannot be said", "why", err.Error())
		return
	}
	if err := t.m.docs.publishStatus(ctx, signed); err != nil && ctx.Err() == nil {
		t.m.log.Warn("the status was not sent", "why", err.Error())
	}
}

// sign makes the next status of this device and remembers it as sent.
func (t *teller) sign(now time.Time) ([]byte, error) {
	heads := t.m.docs.refs()
	addrs := t.m.Addrs()
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.own
	t.n++
	s.Boot, s.N, s.Addrs = t.boot, t.n, nil
	if heads != nil {
		s.Heads = heads
	}
	for _, at := range addrs {
		if at.Addr().Zone() == "" && len(s.Addrs) < maxAddrs {
			s.Addrs = append(s.Addrs, at.String())
		}
	}
	t.dirty, t.urgent, t.spoken, t.sent = false, false, s, now
	signed, err := signStatus(t.m.key, t.m.cfg.Group, s)
	if err == nil {
		t.signed = signed
	}
	return signed, err
}

// last is the status that was sent last, or nil.
func (t *teller) last() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.signed
}

// hearOwn takes a status of this device that came back. One from a later life
// than this one means that the start counter was lost: the site would take all
// that this device says for old, so it goes on from there.
func (m *Mesh) hearOwn(s DeviceStatus) {
	t := m.teller
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.Boot < t.boot || s.Boot == t.boot && s.N <= t.n || s.Boot >= 1<<53 {
		return
	}
	if err := writeBoot(m.cfg.StateDir, s.Boot+1); err != nil {
		m.log.Error("the start counter cannot be kept", "why", err.Error())
	}
	t.boot, t.n, t.dirty, t.urgent = s.Boot+1, 0, true, true
	t.poke()
}

// hearStatus takes a signed status that came by way of a neighbour, said age
// ago. It is true for news, and an error for a forgery.
func (m *Mesh) hearStatus(signed []byte, age time.Duration) (news bool, author peer.ID, err error) {
	id, s, err := openStatus(m.cfg.Group, signed)
	if err != nil {
		return false, "", err
	}
	if id == m.self {
		m.hearOwn(s)
		return false, id, nil
	}
	if m.adm.isBanned(id) {
		return false, id, verify.Refuse(verify.CodePeer, "the device %s is refused", id)
	}
	now := time.Now()
	if !m.roster.hear(id, bytes.Clone(signed), s, now, age) {
		return false, id, nil
	}
	if m.book.hint(id, s.dialable(m.docs.loopback()), now) {
		m.dialler.poke()
	}
	m.docs.learn(id, s.Heads)
	m.changed()
	return true, id, nil
}
