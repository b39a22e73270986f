package fleet

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"

	"meshupd/discovery"
	"meshupd/simnet"
)

// finder stands for multicast DNS on a simulated LAN. It says what discovery.MDNS
// would say, and yields hints as unproven as those.
type finder struct {
	host   *simnet.LANHost
	advert discovery.Advert
}

// service that devices announce.
const service = "_meshupd._tcp"

// notice is the announcement of one device.
type notice struct {
	ID    string           `json:"id"`
	Addrs []netip.AddrPort `json:"addrs"`
	Tag   string           `json:"tag"`
}

// Run announces this device and calls found for the others until ctx ends.
func (f *finder) Run(ctx context.Context, found func(discovery.Hint)) error {
	own := notice{ID: f.advert.ID, Tag: f.advert.Tag()}
	for _, addr := range f.advert.Addrs() {
		own.Addrs = append(own.Addrs, netip.AddrPortFrom(addr, uint16(f.advert.Port)))
	}
	payload, err := json.Marshal(own)
	if err != nil {
		return fmt.Errorf("announce the device: %w", err)
	}
	defer f.host.Announce(service, payload)()
	return f.host.Browse(ctx, service, func(_ netip.Addr, payload []byte) {
		var n notice
		if json.Unmarshal(payload, &n) != nil || n.ID == own.ID || !f.advert.Match(n.Tag) {
			return
		}
		found(discovery.Hint{ID: n.ID, Addrs: n.Addrs, Via: "simulated LAN"})
	})
}
