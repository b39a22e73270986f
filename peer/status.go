package peer

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"

	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// Caps of a status. All of it is claims by a device that may be hostile, and it
// is kept for every device of the site and shown on terminals.
const (
	maxStatus   = 8 << 10 // bytes of JSON
	maxName     = 63
	maxWord     = 64  // state, code, source
	maxVersion  = 128 // version, target, hardware
	maxDetail   = 512
	maxFrom     = 8
	maxRefs     = 32
	maxHoldings = 16
	maxSent     = 16
	maxAddrs    = 8
)

// A signed status is one version byte, the ed25519 public key, the signature
// and the JSON. It stands alone, so that a third device can hand it on.
const (
	signedStatusVersion = 1
	signedStatusHeader  = 1 + ed25519.PublicKeySize + ed25519.SignatureSize
	maxSignedStatus     = signedStatusHeader + maxStatus
)

// statusDomain keeps the signature from being taken for one of something else, or of another product's site.
func statusDomain(group verify.Digest, body []byte) []byte {
	msg := make([]byte, 0, 128+len(body))
	msg = append(msg, "meshupd status 1\x00"...)
	msg = append(msg, group[:]...)
	return append(msg, body...)
}

// signStatus cleans s, shortens it if it does not fit, and signs it.
func signStatus(key crypto.PrivKey, group verify.Digest, s DeviceStatus) ([]byte, error) {
	body, err := encodeStatus(s)
	if err != nil {
		return nil, err
	}
	pub, err := key.GetPublic().Raw()
	if err != nil {
		return nil, fmt.Errorf("sign a status: %w", err)
	}
	sig, err := key.Sign(statusDomain(group, body))
	if err != nil {
		return nil, fmt.Errorf("sign a status: %w", err)
	}
	b := make([]byte, 0, signedStatusHeader+len(body))
	b = append(b, signedStatusVersion)
	b = append(b, pub...)
	b = append(b, sig...)
	return append(b, body...), nil
}

func encodeStatus(s DeviceStatus) ([]byte, error) {
	cleanStatus(&s)
	for _, shorten := range []func(){
		func() {},
		func() { s.Sent = nil },
		func() { s.Kept = nil },
		func() { s.Holdings = s.Holdings[:min(len(s.Holdings), 4)] },
		func() { s.Heads = s.Heads[:min(len(s.Heads), 4)] },
	} {
		shorten()
		body, err := json.Marshal(s)
		if err != nil {
			return nil, fmt.Errorf("encode a status: %w", err)
		}
		if len(body) <= maxStatus {
			return body, nil
		}
	}
	return nil, verify.Refuse(verify.CodeSize, "a status does not fit into %d bytes", maxStatus)
}

// openStatus checks the signature and reads the status, and returns who said it.
func openStatus(group verify.Digest, b []byte) (peer.ID, DeviceStatus, error) {
	var s DeviceStatus
	if len(b) < signedStatusHeader || len(b) > maxSignedStatus {
		return "", s, verify.Refuse(verify.CodePeer, "a signed status has %d bytes", len(b))
	}
	if b[0] != signedStatusVersion {
		return "", s, verify.Refuse(verify.CodePeer, "status version %d is not known here", b[0])
	}
	rawKey, sig, body := b[1:1+ed25519.PublicKeySize], b[1+ed25519.PublicKeySize:signedStatusHeader], b[signedStatusHeader:]
	key, err := crypto.UnmarshalEd25519PublicKey(rawKey)
	if err != nil {
		return "", s, verify.Refuse(verify.CodePeer, "read the key of a status: %w", err)
	}
	if ok, err := key.Verify(statusDomain(group, body), sig); err != nil || !ok {
		return "", s, verify.Refuse(verify.CodePeer, "the signature of a status does not hold")
	}
	id, err := peer.IDFromPublicKey(key)
	if err != nil {
		return "", s, verify.Refuse(verify.CodePeer, "read the key of a status: %w", err)
	}
	s, err = parseStatus(body)
	return id, s, err
}

// parseStatus reads the JSON of a status and cleans it. Fields it does not know are those of a newer device.
func parseStatus(body []byte) (DeviceStatus, error) {
	var s DeviceStatus
	if len(body) > maxStatus {
		return s, verify.Refuse(verify.CodePeer, "a status has %d bytes; at most %d are read", len(body), maxStatus)
	}
	if err := json.Unmarshal(body, &s); err != nil {
		return DeviceStatus{}, verify.Refuse(verify.CodePeer, "read a status: %w", err)
	}
	cleanStatus(&s)
	return s, nil
}

// cleanStatus makes a status fit to be kept, passed on and shown: no control
// characters, nothing longer or larger than its cap, no negative amounts.
func cleanStatus(s *DeviceStatus) {
	s.Name = cleanText(s.Name, maxName)
	s.Hardware = cleanText(s.Hardware, maxVersion)
	s.Version = cleanText(s.Version, maxVersion)
	s.Target = cleanText(s.Target, maxVersion)
	s.State = cleanText(s.State, maxWord)
	s.Source = cleanText(s.Source, maxWord)
	if y := s.Since.Year(); y < 1 || y > 9998 { // what encoding/json writes again in any zone
		s.Since = time.Time{}
	}
	s.Since = s.Since.UTC().Round(0)
	if s.Reason != nil {
		r := *s.Reason
		r.Code = verify.Code(cleanText(string(r.Code), maxWord))
		r.Detail = cleanText(r.Detail, maxDetail)
		r.NeedBytes = max(r.NeedBytes, 0)
		s.Reason = &r
	}
	s.Done, s.Size = max(s.Done, 0), max(s.Size, 0)
	if !(s.Rate >= 0) || math.IsInf(s.Rate, 0) {
		s.Rate = 0
	}
	s.From = cleanList(s.From, maxFrom, maxWord)
	s.Addrs = cleanList(s.Addrs, maxAddrs, maxWord)
	s.Kept = cleanList(s.Kept, install.MaxKept, maxVersion)
	s.Heads = s.Heads[:min(len(s.Heads), maxRefs)]
	s.Holdings = s.Holdings[:min(len(s.Holdings), maxHoldings)]
	if len(s.Holdings) > 0 {
		held := append(s.Holdings[:0:0], s.Holdings...)
		for i := range held {
			held[i].Have = max(held[i].Have, 0)
		}
		s.Holdings = held
	}
	s.Sent = cleanSent(s.Sent)
}

func cleanSent(sent map[string]int64) map[string]int64 {
	if len(sent) == 0 {
		return nil
	}
	clean := make(map[string]int64, min(len(sent), maxSent))
	for digest, n := range sent {
		if _, err := verify.ParseDigest(digest); err == nil && n >= 0 && len(clean) < maxSent {
			clean[digest] = n
		}
	}
	return clean
}

func cleanList(list []string, count, length int) []string {
	var clean []string
	for _, s := range list {
		if s = cleanText(s, length); s != "" && len(clean) < count {
			clean = append(clean, s)
		}
	}
	return clean
}

// cleanText drops what a terminal would act on, and cuts at a rune's end.
func cleanText(s string, limit int) string {
	if len(s) <= limit && isCleanText(s) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			continue
		}
		if b.Len()+utf8.RuneLen(r) > limit {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}

func isCleanText(s string) bool {
	for _, r := range s {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// newer orders the statuses of one device: by its starts, then by its count.
func (s DeviceStatus) newer(than DeviceStatus) bool {
	if s.Boot != than.Boot {
		return s.Boot > than.Boot
	}
	return s.N > than.N
}

// dialable lists the addresses of a status that may be worth a dial. Link-local
// ones mean nothing on another device, and loopback ones only where all devices
// of a site share one machine.
func (s DeviceStatus) dialable(loopback bool) []netip.AddrPort {
	var list []netip.AddrPort
	for _, text := range s.Addrs {
		at, err := netip.ParseAddrPort(text)
		if err != nil || at.Addr().Zone() != "" || at.Port() < 1024 {
			continue
		}
		at = unmapped(at)
		if a := at.Addr(); (a.IsGlobalUnicast() || loopback && a.IsLoopback()) && len(list) < maxAddrs {
			list = append(list, at)
		}
	}
	return list
}

// Times of telling.
const (
	tellGap      = time.Second // between two statuses that differ only in numbers, at a site of up to tellSite devices
	tellSite     = 8
	tellGapMax   = 5 * time.Second
	tellUrgent   = 50 * time.Millisecond // between two whose State differs
	heartbeatMin = 10 * time.Second
	heartbeatMax = 15 * time.Second
)

// tellGapAt is the gap at a site of so many devices. Each of them passes on what all others say, so without it this
// would grow with the site until no room is left for the image.
func tellGapAt(devices int) time.Duration {
	return min(max(tellGap, tellGap*time.Duration(devices)/tellSite), tellGapMax)
}

// tellAt says when the next status is due.
func tellAt(lastSent time.Time, dirty, urgent bool, gap, heartbeat time.Duration) time.Time {
	switch {
	case lastSent.IsZero():
		return lastSent
	case urgent:
		return lastSent.Add(tellUrgent)
	case dirty:
		return lastSent.Add(gap)
	default:
		return lastSent.Add(heartbeat)
	}
}

// bootFile counts the starts of this device, in decimal.
const bootFile = "boot"

// countBoot raises the counter durably and returns it. A lost or damaged file
// starts again from 1; the device catches up when a neighbour hands back a
// status of its earlier life (see Mesh.hearOwn).
func countBoot(dir string) (uint64, error) {
	path := filepath.Join(dir, bootFile)
	last, err := readBoot(path)
	if err != nil {
		return 0, err
	}
	if err := writeBoot(dir, last+1); err != nil {
		return 0, err
	}
	return last + 1, nil
}

func readBoot(path string) (uint64, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, verify.Refuse(verify.CodeIO, "read the start counter: %w", err)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 53)
	if err != nil {
		return 0, nil
	}
	return n, nil
}

func writeBoot(dir string, n uint64) error {
	if err := durable.WriteFile(filepath.Join(dir, bootFile), []byte(strconv.FormatUint(n, 10)+"\n"), 0o600); err != nil {
		return verify.Refuse(verify.CodeIO, "keep the start counter: %w", err)
	}
	return nil
}
