package discovery

import (
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/mdns"
	"github.com/miekg/dns"
	"golang.org/x/time/rate"
)

// answerer is the mdns.Zone of this device: it answers for our service and for nothing else.
type answerer struct {
	advert Advert
	// pace bounds the answers that a flood of queries, perhaps with forged senders, can cause.
	pace *rate.Limiter
	// crowd is how many devices were seen lately: when many answer at once, they
	// overflow the asker's socket buffer, so each waits a random moment.
	crowd *atomic.Int32
}

const (
	answersPerSecond = 50
	answersBurst     = 100
	crowdFrom        = 24 // devices; below that, answers fit into a default socket buffer
	maxAnswerDelay   = 100 * time.Millisecond
)

func newAnswerer(advert Advert, crowd *atomic.Int32) *answerer {
	return &answerer{advert: advert, pace: rate.NewLimiter(answersPerSecond, answersBurst), crowd: crowd}
}

// Records implements mdns.Zone.
func (a *answerer) Records(q dns.Question) []dns.RR {
	if !strings.HasSuffix(strings.ToLower(q.Name), service+"."+domain+".") || !a.pace.Allow() {
		return nil
	}
	zone, err := a.service()
	if err != nil {
		return nil
	}
	records := zone.Records(q)
	if n := a.crowd.Load(); n >= crowdFrom && len(records) > 0 {
		time.Sleep(rand.N(min(time.Duration(n)*time.Millisecond, maxAnswerDelay)))
	}
	return records
}

// service describes this device as it is now: addresses come and go.
func (a *answerer) service() (*mdns.MDNSService, error) {
	txt := []string{"id=" + a.advert.ID, "tag=" + a.advert.Tag(), "port=" + strconv.Itoa(a.advert.Port)}
	var ips []net.IP
	for _, addr := range a.advert.Addrs() {
		if addr = addr.Unmap().WithZone(""); !adverted(addr) || len(ips) >= maxAddrs {
			continue
		}
		txt = append(txt, "ip="+addr.String())
		ips = append(ips, addr.AsSlice())
	}
	if len(ips) == 0 {
		return nil, errNoAddress
	}
	// The id, not the host name, is the name on the air.
	return mdns.NewMDNSService(a.advert.ID, service, domain+".", a.advert.ID+"."+domain+".", a.advert.Port, ips, txt)
}

// adverted says whether an address is one to announce: those that hintFrom takes.
func adverted(a netip.Addr) bool { return a.IsPrivate() || a.IsLinkLocalUnicast() }

// libraryLog passes the library's lines on as debug, but says once, in plain words, what a person can mend.
type libraryLog struct {
	log      *slog.Logger
	on       string
	no4, no6 atomic.Bool
}

func (l *libraryLog) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	switch {
	case strings.Contains(text, "Failed to bind to udp4"):
		if !l.no4.Swap(true) {
			l.log.Warn("no discovery over IPv4 here: nothing routes multicast (224.0.0.0/4); IPv6 goes on", "interface", l.on)
		}
	case strings.Contains(text, "Failed to bind to udp6"):
		if !l.no6.Swap(true) {
			l.log.Warn("no discovery over IPv6 here: multicast cannot be joined; IPv4 goes on", "interface", l.on)
		}
	default:
		l.log.Debug("mdns", "interface", l.on, "line", text)
	}
	return len(line), nil
}
