package peer

import (
	"net/netip"
	"testing"
)

func TestSameHostKnowsABoundLinkLocalAddress(t *testing.T) {
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{"fe80::1%eth0", "fe80::1", true}, // as the switch reports it
		{"fe80::1%eth0", "fe80::1%eth1", false},
		{"10.0.0.1", "::ffff:10.0.0.1", true},
		{"10.0.0.1", "10.0.0.2", false},
	} {
		if got := sameHost(netip.MustParseAddr(c.a), netip.MustParseAddr(c.b)); got != c.same {
			t.Errorf("%s and %s: %v", c.a, c.b, got)
		}
	}
}
