package discovery

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/mdns"
)

// MDNS queries and answers on chosen interfaces, v4 and v6.
//
// The library answers by unicast to whatever address a query claims to come
// from, and parses packets in goroutines of its own: a panic there could not be
// caught here. Its parser is miekg/dns. Everything after the parser runs in our
// goroutines and is caught.
type MDNS struct {
	Interfaces func() []string // names; asked again on link changes; empty result: none
	Advert     Advert
	Log        *slog.Logger
	// Poke, if not nil, starts the fast query schedule again (a link came up).
	Poke <-chan struct{}
}

const (
	// linkPoll is how often the interfaces are looked at: two small netlink requests.
	linkPoll = 4 * time.Second
	// The first question waits briefly, because its answers are read only when
	// it ends; the later ones give slow networks (Wi-Fi power saving) time.
	firstWait = 200 * time.Millisecond
	laterWait = 900 * time.Millisecond
	slowPace  = 60 * time.Second

	maxEntries = 1024 // per query: the library drops what does not fit
	maxHints   = 256  // devices yielded per hintTime
	hintTime   = 10 * time.Minute
)

// fastPace holds the pauses before the second and later queries of a schedule: queries at 0, 1, 2, 4 and 8 s.
var fastPace = []time.Duration{time.Second, time.Second, 2 * time.Second, 4 * time.Second}

// Run answers and queries until ctx ends; found must not block for long. It
// calls found from one goroutine at a time.
func (m *MDNS) Run(ctx context.Context, found func(Hint)) error {
	if m.Log == nil {
		m.Log = slog.New(slog.DiscardHandler)
	}
	if !isID(m.Advert.ID) {
		return fmt.Errorf("announce a device: %q is not a peer id", m.Advert.ID)
	}
	r := &mdnsRun{MDNS: m, seen: newSeen(found), logs: map[string]*libraryLog{}, servers: map[string]*mdns.Server{}}
	defer r.serve(nil)
	poll := time.NewTicker(linkPoll)
	defer poll.Stop()
	step := 0
	next := time.NewTimer(0)
	defer next.Stop()
	r.relink()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.Poke:
			step = 0
			next.Reset(0)
		case <-poll.C:
			if r.relink() {
				step = 0
				next.Reset(0)
			}
		case <-next.C:
			began := time.Now()
			wait := laterWait
			if step == 0 {
				r.relink() // a poke means that something changed
				wait = firstWait
			}
			r.query(ctx, wait)
			next.Reset(max(pause(step)-time.Since(began), 0))
			step++
		}
	}
}

// pause is the time between query number step and the one after it.
func pause(step int) time.Duration {
	if step < len(fastPace) {
		return fastPace[step]
	}
	return slowPace/2 + rand.N(slowPace) // +- 50 %: a site that was switched on at once must not ask at once
}

// mdnsRun is the state of one Run; its loop owns it.
type mdnsRun struct {
	*MDNS
	seen    *seen
	crowd   atomic.Int32
	nics    []nic
	servers map[string]*mdns.Server
	logs    map[string]*libraryLog
}

// relink looks at the interfaces and says whether they changed.
func (r *mdnsRun) relink() bool {
	var names []string
	if r.Interfaces != nil {
		names = r.Interfaces()
	}
	now := observe(names)
	if sameNICs(now, r.nics) {
		return false
	}
	r.serve(now)
	r.nics = now
	return true
}

// serve runs one server for each interface; those whose interface changed start anew, because a join belongs to addresses.
func (r *mdnsRun) serve(now []nic) {
	for _, old := range r.nics {
		if s := r.servers[old.iface.Name]; s != nil && !slices.ContainsFunc(now, old.same) {
			s.Shutdown()
			delete(r.servers, old.iface.Name)
		}
	}
	for _, n := range now {
		if r.servers[n.iface.Name] != nil {
			continue
		}
		iface := n.iface
		s, err := mdns.NewServer(&mdns.Config{Zone: newAnswerer(r.Advert, &r.crowd), Iface: &iface, Logger: r.logger(n)})
		if err != nil {
			r.Log.Warn("this device cannot be found here: multicast cannot be joined", "interface", n.iface.Name, "why", err.Error())
			continue
		}
		r.servers[n.iface.Name] = s
		r.Log.Info("discovery is on", "interface", n.iface.Name, "ipv4", n.v4, "ipv6", n.v6)
	}
}

func (r *mdnsRun) logger(n nic) *log.Logger {
	l := r.logs[n.iface.Name]
	if l == nil {
		l = &libraryLog{log: r.Log, on: n.iface.Name}
		r.logs[n.iface.Name] = l
	}
	return log.New(io.Writer(l), "", 0)
}

// query asks once on all interfaces and yields what was answered.
func (r *mdnsRun) query(ctx context.Context, wait time.Duration) {
	answers := make([][]*mdns.ServiceEntry, len(r.nics))
	var wg sync.WaitGroup
	for i, n := range r.nics {
		logger := r.logger(n)
		wg.Go(func() {
			var err error
			if answers[i], err = ask(ctx, n, wait, logger); err != nil && ctx.Err() == nil {
				r.Log.Debug("a query failed", "interface", n.iface.Name, "why", err.Error())
			}
		})
	}
	wg.Wait()
	for i, n := range r.nics {
		for _, e := range answers[i] {
			h, err := hintFrom(e, n.link, r.Advert.ID, r.Advert.Match)
			if err == nil {
				r.seen.yield(h, time.Now())
			}
		}
	}
	r.crowd.Store(int32(r.seen.count(time.Now())))
}

// ask runs one query of the library. Its entries change under the reader's hands
// until it has returned, so they are read only then.
func ask(ctx context.Context, n nic, wait time.Duration, logger *log.Logger) (list []*mdns.ServiceEntry, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the mdns library panicked: %v", p)
		}
	}()
	entries := make(chan *mdns.ServiceEntry, maxEntries)
	iface := n.iface
	err = mdns.QueryContext(ctx, &mdns.QueryParam{
		Service: service, Domain: domain, Timeout: wait, Interface: &iface, Entries: entries,
		DisableIPv4: !n.v4, DisableIPv6: !n.v6, Logger: logger,
	})
	if err != nil && n.v4 && n.v6 {
		// One family can spoil the query for both (no route for multicast): ask over the other alone.
		err = mdns.QueryContext(ctx, &mdns.QueryParam{
			Service: service, Domain: domain, Timeout: wait, Interface: &iface, Entries: entries, DisableIPv4: true, Logger: logger,
		})
	}
	for {
		select {
		case e := <-entries:
			list = append(list, e)
		default:
			return list, err
		}
	}
}

// seen passes on each device's hints, but only those of maxHints devices in hintTime.
type seen struct {
	found func(Hint)
	last  map[string]time.Time
}

func newSeen(found func(Hint)) *seen { return &seen{found: found, last: map[string]time.Time{}} }

func (s *seen) yield(h Hint, now time.Time) {
	if _, known := s.last[h.ID]; !known && s.count(now) >= maxHints {
		return
	}
	s.last[h.ID] = now
	s.found(h)
}

// count forgets old devices and says how many there are.
func (s *seen) count(now time.Time) int {
	for id, at := range s.last {
		if now.Sub(at) > hintTime {
			delete(s.last, id)
		}
	}
	return len(s.last)
}
