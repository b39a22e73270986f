package swarm

import (
	"context"

	"github.com/anacrolix/missinggo/v2/pubsub"
	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
)

// In the chain a device asks its parent for pieces that the parent does not have
// yet. Such a request stands until the parent has verified the piece, and is
// answered that moment: a piece goes down the whole chain without waiting for
// anybody to hear of it and to ask.
//
// The engine knows no such requests. It asks only for what a peer says it has, and
// takes a request for anything else for an error. So it is told that a parent has
// everything (what the parent really has is noted in the link), and on the other
// side requests that come early are kept from it until the piece is there.
//
// While no device of the site has all of the image, a request for what nobody has would
// stand in the way of what the parent does have. Then only that is asked for.
//
// Its queue of requests is filled up in one step, and only when it is empty, which
// costs a round trip of silence each time; and each message that could make it look
// earlier shrinks the queue if there is little to add (peakRequests in engine
// v1.62). So it hears nothing of what the parent gets, and one message of our own
// makes it look when half of the queue is answered.

// maxStanding is how many requests of one peer may wait. Ours ask for no more than maxRequests.
const maxStanding = 2 * maxRequests

// request is what a peer asks for: a part of a piece.
type request struct{ index, begin, length uint32 }

func requestOf(m *pp.Message) request {
	return request{uint32(m.Index), uint32(m.Begin), uint32(m.Length)}
}

func (r request) message(as pp.MessageType) []byte {
	return pp.Message{Type: as, Index: pp.Integer(r.index), Begin: pp.Integer(r.begin), Length: pp.Integer(r.length)}.MustMarshalBinary()
}

// The engine's callbacks below come with the client's lock held.

// stands keeps a request for a piece that is not here yet from the engine. ok is false when the peer asks for too much.
func (t *transfer) stands(a *peerAddr, r request) (kept, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[a]
	if l == nil || int64(r.index) >= int64(t.g.pieces()) || t.offered.has(int(r.index)) {
		return false, true
	}
	if len(l.standing) >= maxStanding {
		return false, false
	}
	l.standing = append(l.standing, r)
	return true, true
}

// withdrawn forgets a standing request that the peer cancels. The peer waits for an answer (BEP 6).
func (t *transfer) withdrawn(a *peerAddr, r request) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[a]
	if l == nil {
		return false
	}
	for i, s := range l.standing {
		if s == r {
			l.standing = append(l.standing[:i], l.standing[i+1:]...)
			return true
		}
	}
	return false
}

// offer follows which pieces the engine can send, and hands it the requests that waited for them.
func (t *transfer) offer(i int, complete bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !complete {
		t.offered.remove(i)
		return
	}
	if t.offered.has(i) {
		return
	}
	t.offered.add(i)
	for a, l := range t.links {
		rest := l.standing[:0]
		for _, r := range l.standing {
			if int(r.index) != i {
				rest = append(rest, r)
			} else if c := a.conn.Load(); c != nil {
				c.in.put(r.message(pp.Request))
			}
		}
		l.standing = rest
	}
}

// shows notes what a peer says it has, and says what the engine is to hear of it.
func (t *transfer) shows(a *peerAddr, m *pp.Message) {
	source := t.s.siteOf(t.g.image).hasSource()
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[a]
	if l == nil {
		return
	}
	n := t.g.pieces()
	switch m.Type {
	case pp.HaveAll:
		l.has.addAll(n)
	case pp.Bitfield:
		for i, has := range m.Bitfield[:min(len(m.Bitfield), n)] {
			if has {
				l.has.add(i)
			}
		}
	case pp.Have:
		if i := int64(m.Index); i < int64(n) {
			l.has.add(int(i))
		}
	}
	switch {
	case a.incoming():
	case m.Type == pp.Have:
		m.Keepalive = l.expects && int64(m.Index) < int64(n)
	case source:
		l.expects = true
		m.Type, m.Bitfield = pp.HaveAll, nil
	}
}

// expect begins to let requests stand at a parent that was taken when no device had all of the image.
func (t *transfer) expect(l *link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := l.addr.conn.Load(); c != nil && !l.expects {
		l.expects = true
		c.in.put(pp.Message{Type: pp.HaveAll}.MustMarshalBinary())
	}
}

// asked and answered follow the engine's queue of requests to a peer.
func (t *transfer) asked(a *peerAddr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.links[a]; l != nil {
		l.asked++
		l.most = max(l.most, l.asked)
	}
}

func (t *transfer) answered(a *peerAddr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[a]
	if l == nil {
		return
	}
	l.asked--
	// The engine doubles its queue with each time it fills it up from empty; looking before it is full would keep it small.
	full := l.most >= requestDepth(t.g.length)
	if l.asked == 0 {
		l.most = 0 // the engine looks by itself now
	}
	if full && l.asked > 0 && 2*l.asked <= l.most {
		l.nudge()
	}
}

// refused makes the engine look again: after a refusal it asks for nothing more by itself, not even when its queue is
// empty, before it hears of a new piece. The refusal is mostly the end of a request that it took back.
func (t *transfer) refused(a *peerAddr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.links[a]; l != nil {
		l.nudge()
	}
}

// nudge puts a suggestion before the engine, the one message at which it looks what else to ask a parent for.
func (l *link) nudge() {
	if c := l.addr.conn.Load(); c != nil && !l.nudged && !l.addr.incoming() {
		l.nudged = true
		c.in.put(pp.Message{Type: pp.Suggest}.MustMarshalBinary())
	}
}

// suggested says whether a suggestion is ours, and not the peer's, and whether the engine is to hear of it. Its queue may have run
// empty and been filled up meanwhile; looking again with nothing to add would shrink it to one request.
func (t *transfer) suggested(a *peerAddr) (ours, pass bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.links[a]
	if l == nil || !l.nudged {
		return false, false
	}
	l.nudged = false
	if 2*l.asked > l.most && l.asked > 0 {
		return true, false
	}
	l.most = l.asked
	return true, true
}

func (e *engine) onAsked(ev torrent.PeerRequestEvent)    { ofPeer(ev, (*transfer).asked) }
func (e *engine) onAnswered(ev torrent.PeerRequestEvent) { ofPeer(ev, (*transfer).answered) }

func ofPeer(ev torrent.PeerRequestEvent, note func(*transfer, *peerAddr)) {
	if a, ok := ev.Peer.RemoteAddr.(*peerAddr); ok {
		if t := a.owner.Load(); t != nil {
			note(t, a)
		}
	}
}

// follow hands on what the engine says of its pieces, until ctx ends.
func (t *transfer) follow(ctx context.Context, changes *pubsub.Subscription[torrent.PieceStateChange]) {
	defer changes.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case c, ok := <-changes.Values:
			if !ok {
				return
			}
			if c.Ok {
				t.offer(c.Index, c.Complete)
			}
		}
	}
}
