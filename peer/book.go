package peer

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

const (
	maxContacts  = 1024
	maxSeeds     = 64
	contactAddrs = 8
	// sparseDegree is how many neighbours a device looks for in a site that is too large to know all of them.
	sparseDegree = 10
	// yieldTime lets the device with the smaller id dial first, so that two that
	// find each other at the same moment do not end up with two connections.
	yieldTime = 300 * time.Millisecond

	retryMin    = 2 * time.Second // after a dial that failed
	retryMax    = 5 * time.Minute
	rejectedMin = 30 * time.Second // after a hello that failed
	rejectedMax = 10 * time.Minute
	// nearAgain is how soon after a failed dial a device is tried again that discovery finds on this LAN.
	nearAgain = 30 * time.Second
)

// book remembers where devices may be dialled, and when to try again. What is in
// it came from hints and claims; only met says that an address once led to the
// device, proven by its key.
type book struct {
	self peer.ID

	mu       sync.Mutex
	contacts map[peer.ID]*contact
	seeds    map[netip.AddrPort]*seed
}

type contact struct {
	addrs []netip.AddrPort // the most promising first
	met   bool             // was admitted in this run
	fails int
	next  time.Time // not to be dialled before
	// silent is when it last did not answer a dial; zero: it did, or a dial runs.
	silent time.Time
}

// seed is a configured address whose device has to be asked for its id.
type seed struct {
	id    peer.ID // "" while unknown
	fails int
	next  time.Time
}

func newBook(self peer.ID) *book {
	return &book{self: self, contacts: map[peer.ID]*contact{}, seeds: map[netip.AddrPort]*seed{}}
}

// hint takes claimed addresses of a device and says whether there was something new.
func (b *book) hint(id peer.ID, addrs []netip.AddrPort, now time.Time) bool {
	if id == b.self || len(addrs) == 0 {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.contacts[id]
	fresh := c == nil
	if fresh {
		if len(b.contacts) >= maxContacts && !b.evictLocked() {
			return false
		}
		c = &contact{next: now}
		if b.self > id {
			c.next = now.Add(yieldTime)
		}
		b.contacts[id] = c
	}
	news := false
	for _, at := range addrs[:min(len(addrs), contactAddrs)] {
		if at = unmapped(at); !slices.Contains(c.addrs, at) {
			c.addrs = append(c.addrs, at)
			news = true
		}
	}
	if over := len(c.addrs) - contactAddrs; over > 0 {
		// The first one was good or is the oldest claim that nothing spoke against; the next oldest go.
		c.addrs = slices.Delete(c.addrs, 1, 1+over)
	}
	if news && !fresh && c.fails > 0 {
		c.next = earlier(c.next, now.Add(retryMin))
	}
	return news
}

// near notes that discovery found the device, new addresses or not, and says
// whether it is to be dialled sooner for that. A cable that is plugged in again,
// or a switch that is back, shows here first; without it the site would wait for
// retryMax. A device that answered and was rejected gains nothing by announcing itself.
func (b *book) near(id peer.ID, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.contacts[id]
	if c == nil || c.silent.IsZero() {
		return false
	}
	at := now
	if b.self > id {
		at = now.Add(yieldTime)
	}
	if again := c.silent.Add(nearAgain); again.After(at) {
		at = again
	}
	if !at.Before(c.next) {
		return false
	}
	c.next = at
	return true
}

// evictLocked drops a device that was never met: a flood of invented ones must not push out a real one.
func (b *book) evictLocked() bool {
	var worst peer.ID
	for id, c := range b.contacts {
		if !c.met && (worst == "" || c.fails > b.contacts[worst].fails) {
			worst = id
		}
	}
	delete(b.contacts, worst)
	return worst != ""
}

// plant takes a configured address.
func (b *book) plant(at netip.AddrPort, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	at = unmapped(at)
	if b.seeds[at] != nil || len(b.seeds) >= maxSeeds {
		return false
	}
	b.seeds[at] = &seed{next: now}
	return true
}

// seeded takes what a seed's device said it was; "" means that the seed did not answer.
func (b *book) seeded(at netip.AddrPort, id peer.ID, now time.Time) {
	b.mu.Lock()
	s := b.seeds[at]
	if s != nil && id == "" {
		s.next = now.Add(backoff(s.fails, retryMin/2, time.Minute))
		s.fails++
	} else if s != nil {
		*s = seed{id: id, next: now.Add(time.Minute)}
	}
	b.mu.Unlock()
	if id != "" {
		b.hint(id, []netip.AddrPort{at}, now)
	}
}

// met notes that the device was admitted; at is where it was dialled, or zero.
func (b *book) met(id peer.ID, at netip.AddrPort) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.contacts[id]
	if c == nil {
		if len(b.contacts) >= maxContacts && !b.evictLocked() {
			return
		}
		c = &contact{}
		b.contacts[id] = c
	}
	c.met, c.fails, c.silent = true, 0, time.Time{}
	if at = unmapped(at); at.IsValid() {
		c.addrs = slices.DeleteFunc(c.addrs, func(a netip.AddrPort) bool { return a == at })
		c.addrs = slices.Insert(c.addrs, 0, at)
		c.addrs = c.addrs[:min(len(c.addrs), contactAddrs)]
	}
}

// failed notes a dial or a hello that failed.
func (b *book) failed(id peer.ID, rejected bool, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.contacts[id]
	if c == nil {
		return
	}
	first, last := retryMin, retryMax
	c.silent = now
	if rejected {
		first, last = rejectedMin, rejectedMax
		c.silent = time.Time{}
	}
	c.next = now.Add(backoff(c.fails, first, last))
	c.fails++
	if len(c.addrs) > 1 && c.fails%2 == 0 {
		c.addrs = append(c.addrs[1:], c.addrs[0]) // a device that moved: let another claim be the first
	}
}

// lost notes that the last connection to a device ended.
func (b *book) lost(id peer.ID, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c := b.contacts[id]; c != nil {
		c.next = now.Add(yieldTime + rand.N(yieldTime))
		if b.self > id {
			c.next = c.next.Add(2 * yieldTime)
		}
	}
}

// addrs lists where a device may be dialled.
func (b *book) addrs(id peer.ID) []netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.contacts[id]
	if c == nil {
		return nil
	}
	return slices.Clone(c.addrs)
}

// call is a dial that is due.
type call struct {
	id  peer.ID        // "" for a seed whose device is not known
	at  netip.AddrPort // of a seed
	met bool
}

// due says whom to dial now, in random order, and when to look again.
func (b *book) due(now time.Time, connected func(peer.ID) bool, maxPeers int) (calls []call, again time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	again = now.Add(time.Minute)
	linked := 0
	for id, c := range b.contacts {
		switch {
		case connected(id):
			linked++
		case len(c.addrs) == 0:
		case c.next.After(now):
			again = earlier(again, c.next)
		default:
			calls = append(calls, call{id: id, met: c.met})
		}
	}
	rand.Shuffle(len(calls), func(i, j int) { calls[i], calls[j] = calls[j], calls[i] })
	calls = calls[:min(len(calls), wanted(len(b.contacts), linked, maxPeers))]
	for at, s := range b.seeds {
		switch {
		case s.id == b.self || s.id != "" && (connected(s.id) || b.trustedLocked(s.id)):
		case s.next.After(now):
			again = earlier(again, s.next)
		default:
			calls = append(calls, call{at: at, met: true})
		}
	}
	return calls, again
}

// trustedLocked says that the device behind a seed may be dialled by its id; after some failures the seed is asked again.
func (b *book) trustedLocked(id peer.ID) bool {
	c := b.contacts[id]
	return c != nil && c.fails < 3
}

// wanted says how many more neighbours to look for: everybody in a small site, a few in a large one.
func wanted(known, linked, maxPeers int) int {
	target := known
	if known > max(maxPeers/2, 1) {
		target = min(sparseDegree, maxPeers)
	}
	return max(target-linked, 0)
}

// hold keeps a device from being dialled again while a dial runs.
func (b *book) hold(c call, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	until := now.Add(dialTimeout + helloTimeout)
	if known := b.contacts[c.id]; c.id != "" && known != nil {
		known.next, known.silent = until, time.Time{}
	}
	if s := b.seeds[c.at]; c.id == "" && s != nil {
		s.next = until
	}
}

// backoff doubles from first to last, and spreads devices that failed together.
func backoff(fails int, first, last time.Duration) time.Duration {
	d := first << min(fails, 10)
	if d > last {
		d = last
	}
	return d - d/4 + rand.N(d/2)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
