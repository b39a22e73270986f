package discovery

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/mdns"
)

// Names and caps of an advert.
const (
	service = "_meshupd._tcp"
	domain  = "local"
	suffix  = "." + service + "." + domain + "."

	minPort     = 1024 // no device listens below, and a forged advert must not point at a system service
	maxAddrs    = 8
	maxFields   = 16
	maxField    = 255
	minIDLength = 40
	maxIDLength = 63 // an instance name is one DNS label
)

// link is what an entry is judged against: the interface it came in on.
type link struct {
	name     string
	prefixes []netip.Prefix
}

// hintFrom turns an answer from the network into a hint, or says why not. It
// looks only at its arguments. match may be nil.
func hintFrom(e *mdns.ServiceEntry, on link, self string, match func(string) bool) (Hint, error) {
	instance, ok := strings.CutSuffix(e.Name, suffix)
	if !ok {
		return Hint{}, fmt.Errorf("an answer for another service")
	}
	if len(e.InfoFields) > maxFields {
		return Hint{}, fmt.Errorf("an advert has %d fields", len(e.InfoFields))
	}
	fields, addrs, err := readFields(e.InfoFields)
	if err != nil {
		return Hint{}, err
	}
	id := fields["id"]
	switch {
	case !isID(id) || id != instance:
		return Hint{}, fmt.Errorf("an advert without the id of a device")
	case id == self:
		return Hint{}, fmt.Errorf("an advert of this device")
	case match != nil && !match(fields["tag"]):
		return Hint{}, fmt.Errorf("an advert of another site")
	}
	port, err := strconv.ParseUint(fields["port"], 10, 16)
	if err != nil || port < minPort || int(port) != e.Port {
		return Hint{}, fmt.Errorf("an advert with a port that cannot be")
	}
	addrs = append(addrs, ofIP(e.AddrV4), ofIP(e.AddrV6))
	h := Hint{ID: id, Via: "mdns " + on.name}
	for _, a := range addrs {
		if a, ok := on.reaches(a); ok && len(h.Addrs) < maxAddrs {
			if at := netip.AddrPortFrom(a, uint16(port)); !slices.Contains(h.Addrs, at) {
				h.Addrs = append(h.Addrs, at)
			}
		}
	}
	if len(h.Addrs) == 0 {
		return Hint{}, fmt.Errorf("an advert without an address on this link")
	}
	return h, nil
}

// readFields reads TXT strings: id, tag and port once each, ip any number of times.
// The library keeps only the last A and AAAA record of an answer; the ip fields carry all addresses.
func readFields(txt []string) (map[string]string, []netip.Addr, error) {
	fields := map[string]string{}
	var addrs []netip.Addr
	for _, f := range txt {
		if len(f) > maxField {
			return nil, nil, fmt.Errorf("an advert with an over-long field")
		}
		key, value, _ := strings.Cut(f, "=")
		switch key {
		case "ip":
			if a, err := netip.ParseAddr(value); err == nil && a.Zone() == "" && len(addrs) < maxAddrs {
				addrs = append(addrs, a)
			}
		case "id", "tag", "port":
			if _, twice := fields[key]; twice {
				return nil, nil, fmt.Errorf("an advert with two %s fields", key)
			}
			fields[key] = value
		}
	}
	return fields, addrs, nil
}

// isID knows the shape of a peer id, base58 (Bitcoin's alphabet); only peer can read one.
func isID(s string) bool {
	if len(s) < minIDLength || len(s) > maxIDLength {
		return false
	}
	for _, c := range s {
		switch {
		case c >= '1' && c <= '9', c >= 'A' && c <= 'Z' && c != 'I' && c != 'O', c >= 'a' && c <= 'z' && c != 'l':
		default:
			return false
		}
	}
	return true
}

func ofIP(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// reaches says whether an address is private and on this link, and adds the zone that a link-local IPv6 address needs.
func (l link) reaches(a netip.Addr) (netip.Addr, bool) {
	a = a.Unmap().WithZone("")
	if !a.IsPrivate() && !a.IsLinkLocalUnicast() {
		return a, false
	}
	for _, p := range l.prefixes {
		if p.Contains(a) {
			if a.Is6() && a.IsLinkLocalUnicast() {
				return a.WithZone(l.name), true
			}
			return a, true
		}
	}
	return a, false
}
