package peer

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"golang.org/x/time/rate"

	"meshupd/verify"
)

// headProtocol hands over one head: the asker writes the 32 bytes of its ID, the
// holder answers with a 4-byte length and the head; length 0 is "not here".
const headProtocol protocol.ID = "/meshupd/head/1"

const (
	judgeTimeout  = time.Minute      // for one head to be checked
	pullTimeout   = 2 * time.Minute  // for one head to arrive
	askAgain      = 10 * time.Minute // after a neighbour could not hand over what it named
	parallelPulls = 2
	parallelServe = 4
	parallelJudge = 2

	verdictTime = 10 * time.Minute
	maxVerdicts = 512
	maxWants    = 256
	maxSources  = 8
	maxAsked    = 2048
	maxStrikes  = 3 // forged heads until a neighbour is refused
)

// verdict on the bytes of a head.
type verdict int

const (
	headBelieved  verdict = iota + 1
	headUnwelcome         // authentic or not, it is of no use here and now, and no proof of malice
	headForged            // no honest device passes such bytes on
)

// headDesk judges, pulls and serves heads.
type headDesk struct {
	m      *Mesh
	wake   chan struct{}
	judges chan struct{} // tickets: checking signatures is work that others cause
	serves chan struct{}
	pulls  chan struct{}
	asks   *peerLimits

	mu       sync.Mutex
	verdicts map[[sha256.Size]byte]judged
	strikes  map[peer.ID]int
	wants    map[verify.Digest]want
	busy     map[verify.Digest]bool
	asked    map[asked]time.Time // not to be asked again before
}

type judged struct {
	verdict verdict
	until   time.Time
}

// want is a head that is lacked here, or that others hold with newer trust.
type want struct {
	epoch   uint64
	sources []peer.ID // who says to hold it
}

type asked struct {
	who   peer.ID
	id    verify.Digest
	epoch uint64
}

func newHeadDesk(m *Mesh) *headDesk {
	return &headDesk{
		m: m, wake: make(chan struct{}, 1), asks: newPeerLimits(rate.Every(time.Second), 2*maxRefs),
		judges: make(chan struct{}, parallelJudge), serves: make(chan struct{}, parallelServe), pulls: make(chan struct{}, parallelPulls),
		verdicts: map[[sha256.Size]byte]judged{}, strikes: map[peer.ID]int{},
		wants: map[verify.Digest]want{}, busy: map[verify.Digest]bool{}, asked: map[asked]time.Time{},
	}
}

// judge asks CheckHead once for the same bytes, and blames who sent forged ones.
func (d *headDesk) judge(ctx context.Context, from peer.ID, head []byte) verdict {
	sum := sha256.Sum256(head)
	if v := d.known(sum); v != 0 {
		return v
	}
	select {
	case d.judges <- struct{}{}:
		defer func() { <-d.judges }()
	case <-ctx.Done():
		return headUnwelcome
	}
	if v := d.known(sum); v != 0 { // another neighbour sent it meanwhile
		return v
	}
	if d.m.cfg.CheckHead == nil {
		return headUnwelcome
	}
	err := d.m.cfg.CheckHead(ctx, from.String(), head)
	if err != nil && ctx.Err() != nil {
		return headUnwelcome
	}
	v := verdictOn(err)
	d.remember(sum, v)
	switch v {
	case headBelieved:
		d.reconsider()
		d.m.docs.changed()
	case headForged:
		d.blame(from, err)
	default:
		d.m.log.Info("a head from a neighbour is not taken", "peer", from.String(), "code", string(verify.CodeOf(err)), "why", err.Error())
	}
	return v
}

// reconsider gives heads that were of no use another chance: the one that was just
// believed may bring the keys, or name the versions in between, that they lacked.
func (d *headDesk) reconsider() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for sum, j := range d.verdicts {
		if j.verdict == headUnwelcome {
			delete(d.verdicts, sum)
		}
	}
	clear(d.asked)
}

// verdictOn tells forgeries from heads that only do not fit what this device
// knows. A neighbour that missed a key change or a release hands on what it
// believes: that is no malice. Broken bytes and signatures nobody believes.
func verdictOn(err error) verdict {
	if err == nil {
		return headBelieved
	}
	switch verify.CodeOf(err) {
	case verify.CodeSigNone, verify.CodeSigBad, verify.CodeSigProfile, verify.CodeFormat, verify.CodeBundle,
		verify.CodeTruncated, verify.CodeSize, verify.CodeDigest:
		return headForged
	default:
		return headUnwelcome
	}
}

func (d *headDesk) known(sum [sha256.Size]byte) verdict {
	d.mu.Lock()
	defer d.mu.Unlock()
	if j, ok := d.verdicts[sum]; ok && time.Now().Before(j.until) {
		return j.verdict
	}
	return 0
}

func (d *headDesk) remember(sum [sha256.Size]byte, v verdict) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.verdicts) >= maxVerdicts {
		for old := range d.verdicts {
			delete(d.verdicts, old)
			break
		}
	}
	d.verdicts[sum] = judged{verdict: v, until: time.Now().Add(verdictTime)}
}

// blame counts a proof of malice; after maxStrikes the device is refused.
func (d *headDesk) blame(who peer.ID, why error) {
	d.mu.Lock()
	if len(d.strikes) >= maxRejected {
		for old := range d.strikes {
			delete(d.strikes, old)
			break
		}
	}
	d.strikes[who]++
	n := d.strikes[who]
	d.mu.Unlock()
	d.m.log.Warn("a neighbour sent a forged head", "peer", who.String(), "times", n, "code", string(verify.CodeOf(why)), "why", why.Error())
	if n >= maxStrikes {
		d.m.Ban(who.String(), why)
	}
}

// learn notes that a neighbour holds heads.
func (d *headDesk) learn(from peer.ID, refs []HeadRef) {
	if len(refs) == 0 {
		return
	}
	held := d.held()
	d.mu.Lock()
	news := false
	for _, ref := range refs[:min(len(refs), maxRefs)] {
		w, wanted := d.wants[ref.ID]
		if held.has(ref.ID, ref.Epoch) || ref.ID.IsZero() || !wanted && len(d.wants) >= maxWants {
			continue
		}
		if ref.Epoch > w.epoch {
			w = want{epoch: ref.Epoch} // who has it with older trust is no source of this
		}
		if ref.Epoch == w.epoch && len(w.sources) < maxSources && !containsID(w.sources, from) &&
			!d.asked[asked{from, ref.ID, ref.Epoch}].After(time.Now()) {
			w.sources = append(w.sources, from)
			d.wants[ref.ID] = w
			news = true
		}
	}
	d.mu.Unlock()
	if news {
		d.poke()
	}
}

func containsID(list []peer.ID, id peer.ID) bool {
	for _, p := range list {
		if p == id {
			return true
		}
	}
	return false
}

// heldHeads are this device's own, by the newest trust that comes with each.
type heldHeads map[verify.Digest]uint64

func (h heldHeads) has(id verify.Digest, epoch uint64) bool {
	own, ok := h[id]
	return ok && own >= epoch
}

func (d *headDesk) held() heldHeads {
	held := heldHeads{}
	if d.m.cfg.Heads != nil {
		for _, ref := range d.m.cfg.Heads() {
			held[ref.ID] = ref.Epoch
		}
	}
	return held
}

func (d *headDesk) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *headDesk) left(p peer.ID) { d.asks.forget(p) }

// run pulls wanted heads until ctx ends.
func (d *headDesk) run(ctx context.Context, h *lanHost) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.wake:
		}
		for {
			select {
			case d.pulls <- struct{}{}:
			case <-ctx.Done():
				return
			}
			what, ok := d.next()
			if !ok {
				<-d.pulls
				break
			}
			d.m.tasks.Go(func() {
				defer d.poke()
				defer func() { <-d.pulls }()
				d.pull(ctx, h, what)
			})
		}
	}
}

// next picks a head to pull and a neighbour to pull it from, and forgets heads that nobody can hand over.
func (d *headDesk) next() (what asked, ok bool) {
	held := d.held()
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, w := range d.wants {
		if held.has(id, w.epoch) {
			delete(d.wants, id)
			continue
		}
		if d.busy[id] {
			continue
		}
		for i, p := range w.sources {
			if d.m.adm.has(p) {
				d.wants[id] = want{w.epoch, w.sources[i+1:]}
				d.busy[id] = true
				return asked{p, id, w.epoch}, true
			}
		}
		delete(d.wants, id)
	}
	return asked{}, false
}

func (d *headDesk) pull(ctx context.Context, h *lanHost, what asked) {
	from, id := what.who, what.id
	ctx, cancel := context.WithTimeout(ctx, pullTimeout)
	defer cancel()
	head, err := fetchHead(ctx, h, from, id)
	if err == nil && head != nil {
		d.judge(ctx, from, head)
	}
	if err != nil {
		d.m.log.Debug("a head was not handed over", "peer", from.String(), "release", id.String(), "why", err.Error())
		if verify.CodeOf(err) == verify.CodeSize {
			d.blame(from, err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.busy, id)
	if len(d.asked) >= maxAsked {
		clear(d.asked)
	}
	// Held by now, or not to be had from this neighbour for a while: its claim did not hold, or it is of no use here.
	d.asked[what] = time.Now().Add(askAgain)
}

// fetchHead asks one neighbour for a head; nil and no error is "not here".
func fetchHead(ctx context.Context, h *lanHost, from peer.ID, id verify.Digest) ([]byte, error) {
	s, err := h.NewStream(ctx, from, headProtocol)
	if err != nil {
		return nil, err
	}
	defer s.Reset()
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	if _, err := s.Write(id[:]); err != nil {
		return nil, fmt.Errorf("ask for a head: %w", err)
	}
	s.CloseWrite()
	return readHeadAnswer(s)
}

// readHeadAnswer trusts the length only as a cap: memory grows with what arrives.
func readHeadAnswer(r io.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, fmt.Errorf("ask for a head: %w", err)
	}
	n := int64(binary.BigEndian.Uint32(size[:]))
	if n == 0 {
		return nil, nil
	}
	if n > verify.MaxHead {
		return nil, verify.Refuse(verify.CodeSize, "a head has %d bytes; at most %d are taken", n, verify.MaxHead)
	}
	head, err := io.ReadAll(io.LimitReader(r, n))
	if err != nil {
		return nil, fmt.Errorf("read a head: %w", err)
	}
	if int64(len(head)) != n {
		return nil, fmt.Errorf("read a head: %w", io.ErrUnexpectedEOF)
	}
	return head, nil
}

// serve hands over one head.
func (d *headDesk) serve(ctx context.Context, s network.Stream) {
	defer s.Reset()
	if !d.asks.allow(s.Conn().RemotePeer()) {
		return
	}
	s.SetDeadline(time.Now().Add(pullTimeout))
	var id verify.Digest
	if _, err := io.ReadFull(s, id[:]); err != nil {
		return
	}
	select {
	case d.serves <- struct{}{}:
		defer func() { <-d.serves }()
	case <-ctx.Done():
		return
	}
	var head []byte
	if d.m.cfg.Head != nil {
		head = d.m.cfg.Head(id)
	}
	if len(head) > verify.MaxHead {
		head = nil
	}
	if _, err := s.Write(binary.BigEndian.AppendUint32(nil, uint32(len(head)))); err != nil {
		return
	}
	if _, err := s.Write(head); err != nil {
		return
	}
	s.CloseWrite()
	// The asker ends the stream when it has read everything; a reset before that would take the bytes back.
	io.Copy(io.Discard, io.LimitReader(s, 1))
}

// peerLimits is one rate limit for each neighbour.
type peerLimits struct {
	limit rate.Limit
	burst int

	mu   sync.Mutex
	each map[peer.ID]*rate.Limiter
}

func newPeerLimits(limit rate.Limit, burst int) *peerLimits {
	return &peerLimits{limit: limit, burst: burst, each: map[peer.ID]*rate.Limiter{}}
}

func (l *peerLimits) allow(p peer.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.each[p] == nil {
		l.each[p] = rate.NewLimiter(l.limit, l.burst)
	}
	return l.each[p].Allow()
}

// forget keeps the map as small as the neighbourhood.
func (l *peerLimits) forget(p peer.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.each, p)
}
