package swarm

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/anacrolix/torrent"

	"meshupd/verify"
)

// How long things may take before the transfer looks elsewhere.
const (
	// claimAfter is how long a device waits for a first word of others before it takes a rank on its own.
	claimAfter = 2 * time.Second
	// settleTime is how long a device that took its rank listens before it dials: when a release arrives the whole site
	// takes ranks at once, and who dials on the first word takes from the importer and sends it a second copy's worth of
	// requests until it has heard of its neighbours in the order.
	settleTime = 100 * time.Millisecond
	// connectPatience is for a stream and its handshake.
	connectPatience = 2 * time.Second
	// stallAfter is how long a parent that has what is wanted may send next to nothing.
	stallAfter = 1500 * time.Millisecond
	// starvedAfter is how long a parent without anything new is given before it is asked whether its own parent is ahead.
	starvedAfter = 2 * stallAfter
	// uselessAfter is how long it may send anything but wanted pieces.
	uselessAfter = 15 * time.Second
	// overlap is how long the old parent is kept when the new one has not sent a piece yet.
	overlap = 2 * time.Second

	suspectStalled = 30 * time.Second
	suspectLost    = 3 * time.Second
	firstRetry     = 250 * time.Millisecond
	longestRetry   = 10 * time.Second
)

// tickle is the number of bytes per tick below which a connection counts as silent.
const tickle = 1 << 10

// slackBytes and slackTime say how far behind a parent may seem: what others say
// of themselves is up to some seconds old.
const (
	slackBytes = 4 << 20
	slackTime  = 8 * time.Second
)

// transfer is one image that is being fetched or served.
//
//	new -> open -> fetching -> serving
//	         \________\__________\___> ended (stopped, or with an error)
//
// The goroutine in run owns the connections' choice; the engine's callbacks only
// count and note what happened, and wake it.
type transfer struct {
	s     *Swarm
	img   verify.Image
	g     geometry
	table *verify.PieceTable
	prev  *transfer // an earlier transfer of this image, which has begun and may still be ending; or nil. Swarm.mu
	begun time.Time

	started bool // guarded by Swarm.mu: run has a goroutine

	stopped context.Context // ends when stop is called
	stop    context.CancelFunc
	done    chan struct{} // run has returned
	wake    chan struct{} // has room for one

	bytes *bytesOf // set before the engine knows of the transfer, then constant
	want  *window  // likewise

	mu        sync.Mutex
	opened    bool
	err       error
	failAt    time.Time
	claimed   bool
	claimedAt time.Time
	rank      uint32
	whole     bool
	links     map[*peerAddr]*link
	parent    *link // whom the image is taken from
	former    *link // the one before, until the new one has sent a piece
	trying    *peerAddr
	leaving   []*peerAddr // to be hung up by steer
	offered   pieceSet    // pieces that the engine can send
	counts    counts

	suspects map[string]suspicion
	retryAt  map[string]time.Time // not dialled before then
	retries  map[string]int       // failures in a row
	refusals map[string]int       // how often a child was turned away
}

// suspicion is why a device is passed over, and until when.
type suspicion struct {
	is    trust
	until time.Time
}

// link is one connection of the engine for this image.
type link struct {
	addr   *peerAddr
	pc     *torrent.PeerConn
	since  time.Time
	useful time.Time // when the last wanted chunk came
	hungry time.Time // since when it has something that is lacking here and is silent about it; zero: not so
	got    int64     // bytes read at the last look
	ours   bool      // this end hung up

	has      pieceSet  // what it says it has
	standing []request // what it asked for and is not here yet
	asked    int       // requests under way to it
	most     int       // and the most since the engine looked last
	nudged   bool      // the engine was told to look again
	expects  bool      // requests for what it does not have stand; see standing.go
}

func newTransfer(s *Swarm, img verify.Image, table *verify.PieceTable, prev *transfer) *transfer {
	t := &transfer{
		s: s, img: img, g: geometryOf(img), table: table, prev: prev, begun: time.Now(),
		done: make(chan struct{}), wake: make(chan struct{}, 1),
		links: map[*peerAddr]*link{}, suspects: map[string]suspicion{}, retryAt: map[string]time.Time{},
		retries: map[string]int{}, refusals: map[string]int{}, counts: newCounts(),
	}
	t.stopped, t.stop = context.WithCancel(context.Background())
	return t
}

func (t *transfer) poke() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// outdated says whether Fetch should begin anew: after an error, or because the image was stored by other means.
func (t *transfer) outdated() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return time.Since(t.failAt) >= retryAfter
	}
	return t.s.cfg.Store.overtaken(t.g.image)
}

// run fetches and serves until ctx ends, stop is called or an error.
func (t *transfer) run(ctx context.Context, e *engine) {
	defer close(t.done)
	if t.prev != nil {
		<-t.prev.done
		t.s.mu.Lock()
		t.prev = nil
		t.s.mu.Unlock()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.stopped, cancel)()
	err := t.serve(ctx, e)
	if err != nil && ctx.Err() == nil {
		t.fail(err)
		t.s.cfg.Log.Error("transfer stopped", "image", t.g.image, "err", err)
	}
	t.s.cfg.Changed()
}

func (t *transfer) serve(ctx context.Context, e *engine) (err error) {
	b, err := t.s.cfg.Store.openBytes(ctx, t.img, t.table)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	t.open(b)
	workCtx, stopWork := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer stopWork()
	if t.g.pieces() == 0 {
		return t.serveEmpty(ctx)
	}
	tor, err := e.add(t)
	if err != nil {
		return err
	}
	defer t.hangUpAll()
	defer tor.Drop()
	defer e.forget(t)
	if !t.isWhole() {
		work.Go(func() { t.follow(workCtx, tor.SubscribePieceStateChanges()) })
	}
	t.want.open(tor)
	t.want.advance(t.bytes.prefix())
	if !t.isWhole() {
		work.Go(func() { t.complete(workCtx, tor) })
	}
	return t.steer(ctx, e, tor)
}

// serveEmpty handles an image without bytes: there is nothing to swarm.
func (t *transfer) serveEmpty(ctx context.Context) error {
	if !t.isWhole() {
		if err := t.bytes.run(ctx, func(int) {}); err != nil {
			return err
		}
		t.becomeWhole()
	}
	<-ctx.Done()
	return nil
}

func (t *transfer) open(b *bytesOf) {
	t.mu.Lock()
	t.bytes, t.opened = b, true
	t.want = &window{g: t.g}
	_, t.whole = b.bytesVerified()
	t.offered = b.pieces()
	if t.whole {
		t.claimed = true // rank 0: it was here from the start
	}
	t.mu.Unlock()
	t.s.cfg.Changed()
}

// complete does the disk's part of a fetch beside the engine.
func (t *transfer) complete(ctx context.Context, tor *torrent.Torrent) {
	err := t.bytes.run(ctx, func(piece int) { tor.Piece(piece).UpdateCompletion() })
	switch {
	case ctx.Err() != nil:
	case err != nil:
		t.fail(err)
	default:
		t.becomeWhole()
	}
}

func (t *transfer) becomeWhole() {
	t.mu.Lock()
	t.whole = true
	t.mu.Unlock()
	t.s.cfg.Log.Info("image is whole", "image", t.g.image, "took", time.Since(t.begun).Round(time.Millisecond))
	t.s.cfg.Changed()
	t.poke()
}

func (t *transfer) isWhole() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.whole
}

// fail ends the transfer with an error; the process and other transfers go on.
func (t *transfer) fail(err error) {
	t.mu.Lock()
	if t.err == nil {
		t.err, t.failAt = codeDisk(err, 0), time.Now()
	}
	t.mu.Unlock()
	t.poke()
}

func (t *transfer) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// steer looks after parent and children until ctx ends or the transfer fails.
// It sleeps while nothing happens: the longer nothing moved, the longer.
func (t *transfer) steer(ctx context.Context, e *engine, tor *torrent.Torrent) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if ctx.Err() != nil {
			return nil
		}
		if err := t.failed(); err != nil {
			return err
		}
		now := time.Now()
		t.reportBans(e)
		if t.measure(now) {
			t.s.flowed()
		}
		t.choose(now, e, tor)
		var due <-chan time.Time
		if wait, ok := t.nextLook(now); ok {
			timer.Reset(wait)
			due = timer.C
		}
		select {
		case <-ctx.Done():
		case <-t.wake:
		case <-due:
		}
	}
}

// How often steer looks while bytes move, and when long nothing moved.
const (
	shortLook = 250 * time.Millisecond
	longLook  = 5 * time.Second
)

// nextLook is when to look again without being woken; ok is false if only an event can change anything.
func (t *transfer) nextLook(now time.Time) (time.Duration, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if settling := t.claimedAt.Add(settleTime).Sub(now); t.claimed && settling > 0 {
		return settling, true
	}
	if len(t.links) == 0 && t.trying == nil && (t.whole || t.claimed && len(t.retryAt) == 0 && len(t.suspects) == 0) {
		return 0, false
	}
	if !t.claimed || t.trying != nil || t.former != nil {
		return shortLook, true
	}
	return min(max(shortLook, now.Sub(t.counts.moved)/4), longLook), true
}

// choose brings the connections in line with the graph.
func (t *transfer) choose(now time.Time, e *engine, tor *torrent.Torrent) {
	others := t.s.siteOf(t.g.image)
	others = others.without(e.isBanned)
	changed := t.claim(now, others)
	t.judge(now, others)
	want := t.wanted(now, others)
	hangUp, dial := t.align(now, want)
	for _, a := range hangUp {
		e.takeDial(a.String())
		a.hangUp()
	}
	if dial {
		a := e.connect(t, tor, want)
		t.mu.Lock()
		t.trying = a
		t.mu.Unlock()
	}
	if changed {
		t.s.cfg.Changed()
	}
}

// claim takes the rank, once.
func (t *transfer) claim(now time.Time, others site) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.claimed || (len(others) == 0 && now.Sub(t.begun) < claimAfter) {
		return false
	}
	t.claimed, t.rank, t.claimedAt = true, others.claim(), now
	return true
}

// judge passes over a parent that has what is wanted and does not send it, and
// an attempt that takes too long. A parent that has nothing new is most likely
// starved, not dead: whoever is to blame is further up, and the child of that one moves.
func (t *transfer) judge(now time.Time, others site) {
	p, lastUseful, trying := t.watched()
	t.widen(now)
	if trying != nil && now.Sub(trying.made) > connectPatience {
		t.mu.Lock()
		t.backOff(trying.id, now)
		t.mu.Unlock()
	}
	if p == nil {
		return
	}
	source := others.hasSource()
	if source {
		t.expect(p)
	}
	got := int64(0)
	if c := p.addr.conn.Load(); c != nil {
		got = c.got.Load()
	}
	silent := got-p.got < tickle
	has := false
	if silent || now.Sub(lastUseful) > stallAfter {
		has = t.hasLacking(p)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	slack := t.slack(now)
	p.got = got
	if has && silent && p.asked == 0 {
		p.nudge() // what is lacking may be asked of a peer that does not answer
	}
	switch {
	case !has && silent && now.Sub(p.lastUseful()) > starvedAfter && others.withholds(p.addr.id, slack):
	case !has:
		p.hungry = time.Time{}
		return
	case !silent && now.Sub(p.lastUseful()) < uselessAfter:
		p.hungry = time.Time{}
		return
	case p.hungry.IsZero():
		p.hungry = now
		if !silent {
			p.hungry = p.lastUseful()
		}
		return
	case now.Sub(p.hungry) < stallAfter:
		return
	}
	p.hungry = time.Time{}
	if has && p.expects && !source {
		// The last source is gone. What stands at the parent may never be there and keeps the rest from being asked for.
		t.leaving = append(t.leaving, t.letGo(p))
		return
	}
	if t.suspects[p.addr.id].is == stalled {
		return // nobody better was found
	}
	t.s.cfg.Log.Info("parent stalls", "image", t.g.image, "parent", p.addr.id, "has", has)
	t.suspects[p.addr.id] = suspicion{stalled, now.Add(suspectStalled)}
}

// widen wants all pieces when nothing comes although someone, parent or child,
// has what is lacking: it may lie beyond the window.
func (t *transfer) widen(now time.Time) {
	var idle []*link
	t.mu.Lock()
	if !t.whole && now.Sub(t.counts.moved) > stallAfter/3 {
		for _, l := range t.links {
			idle = append(idle, l)
		}
	}
	t.mu.Unlock()
	if slices.ContainsFunc(idle, t.hasLacking) {
		t.want.all()
	}
}

// lastUseful is when the link last brought something, or began.
func (l *link) lastUseful() time.Time {
	if l.useful.IsZero() {
		return l.since
	}
	return l.useful
}

// slack is how many bytes a device may have got since what it said last arrived here. t.mu is held.
func (t *transfer) slack(now time.Time) int64 {
	return slackBytes + int64(t.counts.downRate(now)*slackTime.Seconds())
}

func (t *transfer) watched() (parent *link, lastUseful time.Time, trying *peerAddr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.parent != nil {
		lastUseful = t.parent.lastUseful()
	}
	return t.parent, lastUseful, t.trying
}

// hasLacking says whether the peer says it has a piece that is lacking here.
func (t *transfer) hasLacking(l *link) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes.lacksOf(l.has)
}

// wanted is the parent that the graph asks for now.
func (t *transfer) wanted(now time.Time, others site) string {
	have, _ := t.bytes.bytesVerified()
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, s := range t.suspects {
		if !now.Before(s.until) {
			delete(t.suspects, id)
		}
	}
	if t.whole || !t.claimed || have == t.g.size || now.Sub(t.claimedAt) < settleTime {
		return ""
	}
	slack := t.slack(now)
	return others.parentFor(placeOf(t.s.cfg.Self, t.g.image, t.rank), have, slack, func(id string) trust { return t.suspects[id].is })
}

// align says what to hang up and whether to dial want. The present parent is
// kept until the next one stands, so that the flow does not stop in between.
func (t *transfer) align(now time.Time, want string) (hangUp []*peerAddr, dial bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	hangUp, t.leaving = t.leaving, nil
	if t.trying != nil && (t.trying.id != want || now.Sub(t.trying.made) > connectPatience) {
		hangUp = append(hangUp, t.trying)
		t.trying = nil
	}
	if f := t.former; f != nil && (now.Sub(t.parentSince()) > overlap || t.parentSent()) {
		hangUp = append(hangUp, t.letGo(f))
		t.former = nil
	}
	if want == "" || t.trying != nil || (t.parent != nil && t.parent.addr.id == want) {
		return hangUp, false
	}
	if at, ok := t.retryAt[want]; ok && now.Before(at) {
		return hangUp, false
	}
	delete(t.retryAt, want)
	if t.former != nil {
		hangUp = append(hangUp, t.letGo(t.former))
		t.former = nil
	}
	// A device that is a child by an older view and the parent by the newer one: only one connection is kept.
	for a, l := range t.links {
		if a.id == want && a.incoming() {
			hangUp = append(hangUp, t.letGo(l))
		}
	}
	return hangUp, true
}

func (t *transfer) parentSince() time.Time {
	if t.parent == nil {
		return time.Time{}
	}
	return t.parent.since
}

func (t *transfer) parentSent() bool { return t.parent != nil && !t.parent.useful.IsZero() }

// letGo marks a link as ended by this side; the caller hangs up without the lock.
func (t *transfer) letGo(l *link) *peerAddr {
	l.ours = true
	return l.addr
}

// doubt passes over a device for a while, unless something worse is known of it.
func (t *transfer) doubt(id string, until time.Time) {
	if t.suspects[id].is != stalled {
		t.suspects[id] = suspicion{doubtful, until}
	}
}

// backOff delays the next attempt to reach a device, longer each time in a row.
func (t *transfer) backOff(id string, now time.Time) {
	wait := min(firstRetry<<min(t.retries[id], 8), longestRetry)
	t.retries[id]++
	t.retryAt[id] = now.Add(wait)
	t.doubt(id, now.Add(wait))
}

// turnedAway waits a little for word of the better parent that a device has in mind when it turns this one away (see
// site.turnAway). Going up the order instead would end at the importer. Who does it more often gets a doubt.
func (t *transfer) turnedAway(id string, now time.Time) {
	if t.retries[id] >= maxRefusals {
		t.backOff(id, now)
		return
	}
	t.retries[id]++
	t.retryAt[id] = now.Add(firstRetry)
}

// added takes in a connection that the engine has made, or refuses it. The client's lock is held.
func (t *transfer) added(a *peerAddr, pc *torrent.PeerConn) bool {
	others := t.s.siteOf(t.g.image)
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	defer t.poke()
	l := &link{addr: a, pc: pc, since: now, has: newPieceSet(t.g.pieces())}
	if a.incoming() {
		if !t.takeChild(a.id, others) {
			return false
		}
		t.links[a] = l
		return true
	}
	if t.trying != a {
		return false // too late, another was chosen
	}
	t.trying = nil
	t.links[a] = l
	t.former, t.parent = t.parent, l // align has let go of an earlier former
	if f := t.former; f != nil {
		if r, ok := others.find(f.addr.id); ok && r.complete {
			// The upload of a complete device is what the site has least of; the new parent is there for the rest.
			t.former = nil
			t.leaving = append(t.leaving, t.letGo(f))
		}
	}
	t.s.cfg.Log.Debug("take from a new parent", "image", t.g.image, "parent", a.id)
	return true
}

func (t *transfer) takeChild(id string, others site) bool {
	var children []string
	for a := range t.links {
		if a.incoming() && a.id != id {
			children = append(children, a.id)
		}
	}
	if len(children) >= maxChildren {
		return false
	}
	if others.turnAway(id, children, t.refusals[id]) {
		t.refusals[id]++
		return false
	}
	delete(t.refusals, id)
	return true
}

// replaceOlder ends an older connection from the same device: it dialled again,
// so the older one is dead, and the engine would refuse the new one as its
// duplicate. The client's lock is not held.
func (t *transfer) replaceOlder(a *peerAddr) {
	t.mu.Lock()
	var older []*peerAddr
	for other, l := range t.links {
		if other.incoming() && other.id == a.id {
			older = append(older, t.letGo(l))
		}
	}
	t.mu.Unlock()
	for _, o := range older {
		o.hangUp()
		select {
		case <-o.dropped:
		case <-time.After(time.Second):
		}
	}
}

// gone notes the end of a connection or of an attempt. No lock is held.
func (t *transfer) gone(a *peerAddr) {
	now := time.Now()
	t.mu.Lock()
	l := t.links[a]
	delete(t.links, a)
	switch {
	case t.trying == a:
		t.trying = nil
		t.backOff(a.id, now)
	case l == nil:
	case t.parent == l:
		switch {
		case l.ours || t.whole:
		case l.useful.IsZero():
			t.turnedAway(a.id, now)
		default:
			delete(t.retries, a.id)
			t.doubt(a.id, now.Add(suspectLost))
			t.retryAt[a.id] = now.Add(firstRetry)
		}
		t.parent, t.former = t.former, nil
	case t.former == l:
		t.former = nil
	}
	if l != nil {
		t.counts.retire(a.id, l.pc)
	}
	t.mu.Unlock()
	t.poke()
}

func (t *transfer) hangUpAll() {
	t.mu.Lock()
	var all []*peerAddr
	for _, l := range t.links {
		all = append(all, t.letGo(l))
	}
	if t.trying != nil {
		all = append(all, t.trying)
	}
	t.mu.Unlock()
	for _, a := range all {
		a.hangUp()
	}
}

// reportBans passes on whom the engine has proven to have sent a bad piece.
func (t *transfer) reportBans(e *engine) {
	t.mu.Lock()
	look := t.counts.newFailed
	t.counts.newFailed = false
	t.mu.Unlock()
	if !look {
		return
	}
	for _, id := range e.newBans() {
		t.s.cfg.Log.Warn("refuse a device that sent a bad piece", "image", t.g.image, "device", id)
		t.s.cfg.BadPeer(id, t.g.image)
	}
}
