package discovery

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// groupV4 is the group of multicast DNS (RFC 6762, section 3).
var groupV4 = &net.UDPAddr{IP: net.IPv4(224, 0, 0, 251), Port: 5353}

// probeWait is how long a packet may take that never leaves the machine.
const probeWait = 500 * time.Millisecond

// Probe joins the group of multicast DNS on an interface, sends questions that nobody can answer, and counts those that it
// hears itself: none are when port 5353 cannot be shared, or a packet filter of this machine drops them. Whether a switch
// passes multicast on only another device can tell.
func Probe(ctx context.Context, name string) (sent, heard int, err error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return 0, 0, fmt.Errorf("probe multicast on %s: %w", name, err)
	}
	in, err := net.ListenMulticastUDP("udp4", ifi, groupV4)
	if err != nil {
		return 0, 0, fmt.Errorf("join the multicast group on %s: %w", name, err)
	}
	defer in.Close()
	out, err := sendOn(ctx, ifi)
	if err != nil {
		return 0, 0, fmt.Errorf("send multicast on %s: %w", name, err)
	}
	defer out.Close()
	for sent < 3 && ctx.Err() == nil {
		question := new(dns.Msg)
		question.SetQuestion(fmt.Sprintf("probe-%016x.meshupd.local.", rand.Uint64()), dns.TypeTXT)
		question.RecursionDesired = false
		raw, err := question.Pack()
		if err != nil {
			return sent, heard, fmt.Errorf("probe multicast: %w", err)
		}
		if _, err := out.WriteTo(raw, groupV4); err != nil {
			return sent, heard, fmt.Errorf("send multicast on %s: %w", name, err)
		}
		sent++
		if hears(in, raw) {
			heard++
		}
	}
	return sent, heard, ctx.Err()
}

// sendOn makes a socket whose multicast leaves by one interface.
func sendOn(ctx context.Context, ifi *net.Interface) (net.PacketConn, error) {
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_MULTICAST_IF, &unix.IPMreqn{Ifindex: int32(ifi.Index)})
		})
		if cerr != nil {
			return cerr
		}
		return err
	}}
	return cfg.ListenPacket(ctx, "udp4", ":0")
}

// hears waits for exactly these bytes among what others say meanwhile.
func hears(in *net.UDPConn, want []byte) bool {
	if in.SetReadDeadline(time.Now().Add(probeWait)) != nil {
		return false
	}
	buf := make([]byte, 9000)
	for {
		n, _, err := in.ReadFromUDP(buf)
		if err != nil {
			return false
		}
		if bytes.Equal(buf[:n], want) {
			return true
		}
	}
}
