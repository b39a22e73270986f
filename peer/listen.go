package peer

import (
	"context"
	"net/netip"
	"slices"
	"time"
)

// askAddrs is how often the machine is asked for its addresses. A cable that is
// plugged in is worth a few seconds, and a look costs microseconds.
const askAddrs = 3 * time.Second

// listen binds the addresses that there are. With ListenNow it waits for the
// first: before there is one, there is nobody to talk to either.
func (m *Mesh) listen(ctx context.Context, h *lanHost) error {
	if m.cfg.ListenNow == nil {
		return h.listen(m.cfg.Listen, m.log)
	}
	said := false
	for {
		if m.rebind(h); len(h.bound()) > 0 {
			return nil
		}
		if !said {
			m.log.Warn("no network yet: waiting for a private address")
			said = true
		}
		if err := pause(ctx, askAddrs); err != nil {
			return err
		}
	}
}

// followAddrs binds addresses that appear and gives up those that went, until ctx ends.
func (m *Mesh) followAddrs(ctx context.Context, h *lanHost) error {
	if m.cfg.ListenNow == nil {
		return nil
	}
	for {
		if err := pause(ctx, askAddrs); err != nil {
			return nil
		}
		if m.rebind(h) {
			m.log.Info("the addresses changed", "listen", m.Addrs())
			m.teller.again()
			m.changed()
		}
	}
}

// rebind makes what is bound equal to what ListenNow says, and reports whether anything changed.
func (m *Mesh) rebind(h *lanHost) bool {
	want, bound := m.cfg.ListenNow(), h.bound()
	changed := false
	for _, at := range want {
		// A picked port is bound under another number than 0: the address alone tells.
		if slices.ContainsFunc(bound, func(b netip.AddrPort) bool { return sameHost(b.Addr(), at.Addr()) }) {
			continue
		}
		if err := h.listenOn(at, 0); err != nil {
			m.log.Debug("an address cannot be bound yet", "addr", at.String(), "why", err.Error())
			continue
		}
		changed = true
	}
	for _, b := range bound {
		if slices.ContainsFunc(want, func(at netip.AddrPort) bool { return sameHost(b.Addr(), at.Addr()) }) {
			continue
		}
		if addr, err := plainMultiaddr(b); err == nil {
			h.swarm.ListenClose(addr)
			changed = true
		}
	}
	return changed
}

// sameHost compares addresses. The switch names a bound link-local address without its zone.
func sameHost(a, b netip.Addr) bool {
	if a.Zone() == "" || b.Zone() == "" {
		a, b = a.WithZone(""), b.WithZone("")
	}
	return a.Unmap() == b.Unmap()
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
