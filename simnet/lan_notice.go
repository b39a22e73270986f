package simnet

import (
	"context"
	"net/netip"
)

// notice is something a host says to its whole LAN, over and over.
type notice struct {
	from    *LANHost
	service string
	payload []byte
}

// Announce tells the LAN that this host offers a service, until stop is called.
// It stands for multicast DNS: everyone in reach who browses hears of it, sooner
// or later, and cannot tell whether it is true.
func (h *LANHost) Announce(service string, payload []byte) (stop func()) {
	n := &notice{from: h, service: service, payload: append([]byte(nil), payload...)}
	l := h.lan
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.notices = append(l.notices, n)
		l.wakeLocked()
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.notices = remove(l.notices, n)
	}
}

// Browse calls found for every announcement of the service in reach, this host's
// own among them, and for each that comes into reach later, until ctx ends or
// the LAN closes. Whoever was out of reach is found again. found gets a payload
// of its own and may block.
func (h *LANHost) Browse(ctx context.Context, service string, found func(from netip.Addr, payload []byte)) error {
	told := make(map[*notice]bool)
	for {
		if err := sleep(ctx, nil, h.lan.cfg.Latency); err != nil {
			return err
		}
		news, changed, open := h.hear(service, told)
		for _, n := range news {
			found(n.from.addr, append([]byte(nil), n.payload...))
		}
		if !open {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// hear returns what is in reach and not yet told, and forgets what no longer is.
func (h *LANHost) hear(service string, told map[*notice]bool) (news []*notice, changed <-chan struct{}, open bool) {
	l := h.lan
	l.mu.Lock()
	defer l.mu.Unlock()
	inReach := make(map[*notice]bool)
	for _, n := range l.notices {
		if n.service == service && reachable(h, n.from) {
			inReach[n] = true
			if !told[n] {
				told[n] = true
				news = append(news, n)
			}
		}
	}
	for n := range told {
		if !inReach[n] {
			delete(told, n)
		}
	}
	return news, l.changed, !l.closed
}
