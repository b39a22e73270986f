package discovery

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/mdns"
	"github.com/miekg/dns"
)

const (
	ours   = "12D3KooWGRUaAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
	theirs = "12D3KooWGRUbBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB"
)

var eth0 = link{name: "eth0", prefixes: []netip.Prefix{
	netip.MustParsePrefix("10.0.4.2/24"), netip.MustParsePrefix("fe80::2/64"), netip.MustParsePrefix("fd00:4::2/64"), netip.MustParsePrefix("203.0.113.2/24"),
}}

func entry(edit func(*mdns.ServiceEntry)) *mdns.ServiceEntry {
	e := &mdns.ServiceEntry{
		Name: theirs + suffix, Port: 7610, AddrV4: net.IP{10, 0, 4, 9},
		InfoFields: []string{"id=" + theirs, "tag=good", "port=7610"},
	}
	if edit != nil {
		edit(e)
	}
	return e
}

func TestHintFrom(t *testing.T) {
	field := func(i int, s string) func(*mdns.ServiceEntry) {
		return func(e *mdns.ServiceEntry) { e.InfoFields[i] = s }
	}
	tests := []struct {
		name string
		edit func(*mdns.ServiceEntry)
		want string // addresses; "" is refused
	}{
		{"plain", nil, "10.0.4.9:7610"},
		{"all addresses of the TXT record", func(e *mdns.ServiceEntry) {
			e.InfoFields = append(e.InfoFields, "ip=10.0.4.9", "ip=fd00:4::9", "ip=fe80::9")
			e.AddrV6 = net.ParseIP("fe80::9")
		}, "10.0.4.9:7610 [fd00:4::9]:7610 [fe80::9%eth0]:7610"},
		{"off-link address dropped", func(e *mdns.ServiceEntry) { e.InfoFields = append(e.InfoFields, "ip=10.9.9.9") }, "10.0.4.9:7610"},
		{"newer field ignored", func(e *mdns.ServiceEntry) { e.InfoFields = append(e.InfoFields, "x=1") }, "10.0.4.9:7610"},
		{"another service", func(e *mdns.ServiceEntry) { e.Name = theirs + "._ipp._tcp.local." }, ""},
		{"name and id differ", func(e *mdns.ServiceEntry) { e.Name = ours + suffix }, ""},
		{"this device", func(e *mdns.ServiceEntry) { e.Name = ours + suffix; e.InfoFields[0] = "id=" + ours }, ""},
		{"no id", field(0, "id="), ""},
		{"not base58", func(e *mdns.ServiceEntry) {
			id := strings.Replace(theirs, "B", "0", 1)
			e.Name, e.InfoFields[0] = id+suffix, "id="+id
		}, ""},
		{"two ids", field(1, "id="+theirs), ""},
		{"another site", field(1, "tag=bad"), ""},
		{"no tag", field(1, "x=y"), ""},
		{"system port", func(e *mdns.ServiceEntry) { e.Port = 22; e.InfoFields[2] = "port=22" }, ""},
		{"ports differ", field(2, "port=7611"), ""},
		{"port overflows", field(2, "port=73146"), ""},
		{"public address", func(e *mdns.ServiceEntry) { e.AddrV4 = net.IP{203, 0, 113, 9} }, ""},
		{"private, but not here", func(e *mdns.ServiceEntry) { e.AddrV4 = net.IP{192, 168, 1, 1} }, ""},
		{"loopback", func(e *mdns.ServiceEntry) { e.AddrV4 = net.IP{127, 0, 0, 1} }, ""},
		{"multicast", func(e *mdns.ServiceEntry) { e.AddrV4 = net.IP{224, 0, 0, 251} }, ""},
		{"broken address", func(e *mdns.ServiceEntry) { e.AddrV4 = net.IP{1, 2, 3} }, ""},
		{"too many fields", func(e *mdns.ServiceEntry) { e.InfoFields = append(e.InfoFields, make([]string, maxFields)...) }, ""},
		{"foreign zone", func(e *mdns.ServiceEntry) { e.AddrV4 = nil; e.InfoFields = append(e.InfoFields, "ip=fe80::9%lo") }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h, err := hintFrom(entry(tt.edit), eth0, ours, func(tag string) bool { return tag == "good" })
			var got []string
			for _, a := range h.Addrs {
				got = append(got, a.String())
			}
			slices.Sort(got)
			if s := strings.Join(got, " "); s != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v, want %q", s, err, tt.want)
			}
		})
	}
}

func TestHintHasFewAddresses(t *testing.T) {
	h, err := hintFrom(entry(func(e *mdns.ServiceEntry) {
		for i := range maxFields - 3 {
			e.InfoFields = append(e.InfoFields, fmt.Sprintf("ip=10.0.4.%d", i+20))
		}
	}), eth0, ours, nil)
	if err != nil || len(h.Addrs) != maxAddrs {
		t.Errorf("%d addresses, %v", len(h.Addrs), err)
	}
}

// What this device announces is what another one takes, through the library's own records.
func TestAnswerIsTaken(t *testing.T) {
	var crowd atomic.Int32
	zone := newAnswerer(Advert{
		ID: theirs, Port: 7610, Tag: func() string { return "good" },
		Addrs: func() []netip.Addr {
			return []netip.Addr{netip.MustParseAddr("10.0.4.9"), netip.MustParseAddr("fe80::9%lan"), netip.MustParseAddr("8.8.8.8")}
		},
	}, &crowd)
	records := zone.Records(dns.Question{Name: service + "." + domain + ".", Qtype: dns.TypePTR, Qclass: dns.ClassINET})
	e := &mdns.ServiceEntry{}
	for _, rr := range records {
		if strings.Contains(rr.String(), "8.8.8.8") {
			t.Errorf("a public address is announced: %s", rr)
		}
		switch rr := rr.(type) {
		case *dns.PTR:
			e.Name = rr.Ptr
		case *dns.SRV:
			e.Port = int(rr.Port)
		case *dns.TXT:
			e.InfoFields = rr.Txt
		case *dns.A:
			e.AddrV4 = rr.A
		}
	}
	h, err := hintFrom(e, eth0, ours, func(tag string) bool { return tag == "good" })
	if err != nil || h.ID != theirs || len(h.Addrs) != 2 {
		t.Errorf("%+v, %v", h, err)
	}
	msg := dns.Msg{Answer: records, Compress: true}
	if n := msg.Len(); n > 1200 {
		t.Errorf("an answer has %d bytes", n)
	}
	if zone.Records(dns.Question{Name: "_services._dns-sd._udp.local.", Qtype: dns.TypePTR}) != nil {
		t.Error("the device answers for more than its service")
	}
}

func TestAnswersArePaced(t *testing.T) {
	var crowd atomic.Int32
	zone := newAnswerer(Advert{
		ID: theirs, Port: 7610, Tag: func() string { return "" },
		Addrs: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("10.0.4.9")} },
	}, &crowd)
	synctest.Test(t, func(t *testing.T) {
		answered := 0
		for range 10 * answersBurst {
			if zone.Records(dns.Question{Name: service + "." + domain + ".", Qtype: dns.TypePTR}) != nil {
				answered++
			}
		}
		if answered != answersBurst {
			t.Errorf("%d answers at once", answered)
		}
	})
}

func TestSeenIsCapped(t *testing.T) {
	n := 0
	s := newSeen(func(Hint) { n++ })
	now := time.Now()
	for i := range 10 * maxHints {
		s.yield(Hint{ID: fmt.Sprint(i)}, now)
	}
	if n != maxHints {
		t.Errorf("%d devices were yielded", n)
	}
	s.yield(Hint{ID: "0"}, now)
	s.yield(Hint{ID: "late"}, now.Add(hintTime+1))
	if n != maxHints+2 {
		t.Errorf("%d after a known one and a late one", n)
	}
}

func TestPace(t *testing.T) {
	at := time.Duration(0)
	var schedule []time.Duration
	for step := range 5 {
		schedule = append(schedule, at)
		at += pause(step)
	}
	if want := []time.Duration{0, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second}; !slices.Equal(schedule, want) {
		t.Errorf("queries at %v", schedule)
	}
	for range 100 {
		if p := pause(9); p < 30*time.Second || p >= 90*time.Second {
			t.Errorf("slow pause %v", p)
		}
	}
}

func TestStaticSeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		got := make(chan Hint, 16)
		ended := make(chan error, 1)
		go func() {
			s := Static{Seeds: []string{"10.0.4.12:7610", "[fe80::1%eth0]:7610"}}
			ended <- s.Run(ctx, func(h Hint) { got <- h })
		}()
		for range 4 { // each at once, and again later
			h := <-got
			if h.ID != "" || h.Via != "seed" || len(h.Addrs) != 1 || h.Addrs[0].Port() != 7610 {
				t.Errorf("%+v", h)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func TestSeedsThatCannotBe(t *testing.T) {
	for _, seed := range []string{"", "10.0.0.1", "host:", ":7610", "host:0", "host:70000", "host:port"} {
		if CheckSeed(seed) == nil {
			t.Errorf("%q was taken", seed)
		}
		s := Static{Seeds: []string{seed}}
		if err := s.Run(t.Context(), nil); err == nil {
			t.Errorf("Run took %q", seed)
		}
	}
}

func FuzzEntry(f *testing.F) {
	f.Add(theirs+suffix, 7610, "id="+theirs+"\ntag=good\nport=7610", []byte{10, 0, 4, 9}, []byte(nil))
	f.Add(theirs+suffix, 7610, "id="+theirs+"\nport=7610\nip=fe80::9\nip=::ffff:10.0.4.9", []byte{}, []byte(net.ParseIP("fd00:4::1")))
	f.Add(suffix, -1, "id=\nid=\nport=99999999999999999999", []byte{1}, []byte{2, 3})
	f.Fuzz(func(t *testing.T, name string, port int, txt string, v4, v6 []byte) {
		e := &mdns.ServiceEntry{Name: name, Port: port, InfoFields: strings.Split(txt, "\n"), AddrV4: v4, AddrV6: v6}
		h, err := hintFrom(e, eth0, ours, nil)
		if err != nil {
			return
		}
		if !isID(h.ID) || h.ID == ours || len(h.Addrs) == 0 || len(h.Addrs) > maxAddrs {
			t.Fatalf("%+v", h)
		}
		for _, at := range h.Addrs {
			a := at.Addr()
			if at.Port() < minPort || !a.IsPrivate() && !a.IsLinkLocalUnicast() || a.Is4In6() {
				t.Fatalf("hint to %v", at)
			}
		}
	})
}
