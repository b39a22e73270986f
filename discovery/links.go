package discovery

import (
	"errors"
	"net"
	"net/netip"
	"slices"
)

var errNoAddress = errors.New("no private address to announce")

// nic is an interface as it is now.
type nic struct {
	iface net.Interface
	link  link
	v4    bool // has an IPv4 address
	v6    bool
}

// observe lists those of the named interfaces that are up, carry multicast and have an address.
func observe(names []string) []nic {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var list []nic
	for _, iface := range all {
		if !slices.Contains(names, iface.Name) || iface.Flags&net.FlagUp == 0 || iface.Flags&net.FlagMulticast == 0 {
			continue
		}
		addrs, err := iface.Addrs()
		if err != nil {
			continue
		}
		n := nic{iface: iface, link: link{name: iface.Name}}
		for _, a := range addrs {
			prefix, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			n.link.prefixes = append(n.link.prefixes, prefix)
			n.v4 = n.v4 || prefix.Addr().Is4()
			n.v6 = n.v6 || prefix.Addr().Is6()
		}
		if n.v4 || n.v6 {
			slices.SortFunc(n.link.prefixes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
			list = append(list, n)
		}
	}
	return list
}

// same says whether nothing changed that a server or a query depends on.
func (n nic) same(o nic) bool {
	return n.iface.Index == o.iface.Index && n.iface.Name == o.iface.Name && slices.Equal(n.link.prefixes, o.link.prefixes)
}

func sameNICs(a, b []nic) bool {
	return slices.EqualFunc(a, b, nic.same)
}
