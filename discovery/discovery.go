// Package discovery finds out who may be on this LAN.
//
// Everything it yields is a hint from an unauthenticated source: an address to
// dial at a limited rate, nothing more. Whether the other end is a neighbour is
// decided after the dial, by peer's admission.
//
// MDNS asks and answers by multicast DNS (RFC 6762) on chosen interfaces; Static
// yields configured addresses where multicast is blocked.
package discovery

import "net/netip"

// Hint is an unauthenticated claim that a device can be dialled.
type Hint struct {
	ID    string           // claimed libp2p peer id, text form; "" from a bare static seed
	Addrs []netip.AddrPort // on-link private addresses only, capped; from a seed: as configured
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
