// Package discovery finds out who may be on this LAN.
//
// Everything it yields is a hint from an unauthenticated source: an address to
// dial at a limited rate, nothing more. Whether the other end is a neighbour is
// decided after the dial, by peer's admission.
package discovery

import (
	"context"
	"log/slog"
	"net/netip"
)

// Hint is an unauthenticated claim that a device can be dialled.
type Hint struct {
	ID    string           // claimed libp2p peer id, text form; "" from a bare static seed
	Addrs []netip.AddrPort // on-link private addresses only, capped
	Via   string           // "mdns eth0", "seed"
}

// Advert is what this device announces. It holds no version, model or host name.
type Advert struct {
	ID    string
	Port  int
	Addrs func() []netip.Addr // asked anew for every answer
	// Tag and Match tie adverts to a site without naming it: a nonce and an HMAC over it.
	Tag   func() string
	Match func(tag string) bool
}

// MDNS queries and answers on chosen interfaces, v4 and v6.
type MDNS struct {
	Interfaces func() []string // names; asked again on link changes; empty result: none
	Advert     Advert
	Log        *slog.Logger
	// Poke, if not nil, starts the fast query schedule again (a link came up).
	Poke <-chan struct{}
}

// Run answers and queries until ctx ends; found must not block for long.
func (m *MDNS) Run(ctx context.Context, found func(Hint)) error { panic("stub") }

// Static yields configured seeds, again from time to time.
type Static struct {
	Seeds []string // host:port, IP or name
	Log   *slog.Logger
}

// Run resolves and yields the seeds until ctx ends.
func (s *Static) Run(ctx context.Context, found func(Hint)) error { panic("stub") }
