package peer

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/control"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	ma "github.com/multiformats/go-multiaddr"

	"meshupd/verify"
)

// helloProtocol is the one stream that a connection carries before admission:
//
//	dialler  -> listener  hello: version, group, nonce
//	listener -> dialler   hello: version, group, nonce
//	dialler  -> listener  proof as dialler
//	listener -> dialler   proof as listener
//
// The dialler proves first, so that who merely connects learns nothing. A
// connection that is not admitted within helloTimeout is closed.
const helloProtocol protocol.ID = "/meshupd/hello/1"

const (
	helloTimeout = 5 * time.Second
	helloVersion = 1
	nonceSize    = 32
	helloSize    = 1 + sha256.Size + nonceSize
	// minSiteKey is the shortest site key: a proof can be tried against guesses without asking anybody.
	minSiteKey = 16
	// maxRejected and maxBanned cap what strangers can make this device remember.
	maxRejected = 1024
	maxBanned   = 4096
)

// hello is the first message of both sides.
type hello struct {
	group verify.Digest
	nonce [nonceSize]byte
}

func (h hello) bytes() []byte {
	b := make([]byte, 0, helloSize)
	b = append(b, helloVersion)
	b = append(b, h.group[:]...)
	return append(b, h.nonce[:]...)
}

// parseHello reads exactly helloSize bytes.
func parseHello(b []byte) (hello, error) {
	var h hello
	if len(b) != helloSize {
		return h, verify.Refuse(verify.CodeAdmission, "a hello has %d bytes, not %d", helloSize, len(b))
	}
	if b[0] != helloVersion {
		return h, verify.Refuse(verify.CodeAdmission, "hello version %d is not known here", b[0])
	}
	copy(h.group[:], b[1:])
	copy(h.nonce[:], b[1+len(h.group):])
	return h, nil
}

// credential is what this device proves membership with.
type credential struct {
	group verify.Digest
	key   []byte // the site key, or the group where there is none: then a proof shows no more than the hello did
}

func newCredential(group verify.Digest, siteKey []byte) (credential, error) {
	if siteKey == nil {
		return credential{group: group, key: group[:]}, nil
	}
	if len(siteKey) < minSiteKey {
		return credential{}, verify.Refuse(verify.CodeConfig, "the site key has %d bytes; at least %d are needed", len(siteKey), minSiteKey)
	}
	return credential{group: group, key: siteKey}, nil
}

// proof binds the key to both authenticated identities, both nonces and the
// prover's role: it cannot be replayed, relayed to a third device or reflected.
func (c credential) proof(role byte, dialler, listener peer.ID, dialled, listened hello) []byte {
	mac := hmac.New(sha256.New, c.key)
	io.WriteString(mac, "meshupd hello 1\x00")
	mac.Write([]byte{role})
	for _, part := range [][]byte{c.group[:], []byte(dialler), []byte(listener), dialled.nonce[:], listened.nonce[:]} {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(part)))
		mac.Write(n[:])
		mac.Write(part)
	}
	return mac.Sum(nil)
}

const (
	roleDialler  byte = 'd'
	roleListener byte = 'l'
)

// greetAsDialler and greetAsListener run the handshake on rw; nil means that the other side proved membership.
func (c credential) greetAsDialler(rw io.ReadWriter, self, other peer.ID) error {
	mine, err := c.newHello()
	if err != nil {
		return err
	}
	if _, err := rw.Write(mine.bytes()); err != nil {
		return notAdmitted(err)
	}
	theirs, err := c.readHello(rw)
	if err != nil {
		return err
	}
	if _, err := rw.Write(c.proof(roleDialler, self, other, mine, theirs)); err != nil {
		return notAdmitted(err)
	}
	return checkProof(rw, c.proof(roleListener, self, other, mine, theirs))
}

func (c credential) greetAsListener(rw io.ReadWriter, self, other peer.ID) error {
	theirs, err := c.readHello(rw)
	if err != nil && verify.CodeOf(err) != verify.CodeProduct {
		return err
	}
	// A device of another product gets an answer too, so that its log can say why it is alone.
	mine, helloErr := c.newHello()
	if helloErr != nil {
		return helloErr
	}
	if _, err := rw.Write(mine.bytes()); err != nil {
		return notAdmitted(err)
	}
	if err != nil {
		return err
	}
	if err := checkProof(rw, c.proof(roleDialler, other, self, theirs, mine)); err != nil {
		return err
	}
	if _, err := rw.Write(c.proof(roleListener, other, self, theirs, mine)); err != nil {
		return notAdmitted(err)
	}
	return nil
}

func (c credential) newHello() (hello, error) {
	h := hello{group: c.group}
	if _, err := rand.Read(h.nonce[:]); err != nil {
		return h, fmt.Errorf("make a nonce: %w", err)
	}
	return h, nil
}

func (c credential) readHello(r io.Reader) (hello, error) {
	var b [helloSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return hello{}, notAdmitted(err)
	}
	h, err := parseHello(b[:])
	if err != nil {
		return hello{}, err
	}
	if h.group != c.group {
		return hello{}, verify.Refuse(verify.CodeProduct, "the device belongs to another product")
	}
	return h, nil
}

func checkProof(r io.Reader, want []byte) error {
	got := make([]byte, len(want))
	if _, err := io.ReadFull(r, got); err != nil {
		return notAdmitted(err)
	}
	if !hmac.Equal(got, want) {
		return verify.Refuse(verify.CodeAdmission, "the device did not prove the site key")
	}
	return nil
}

func notAdmitted(err error) error {
	return verify.Refuse(verify.CodeAdmission, "the device ended the hello: %w", err)
}

// admission knows who may talk to this device. It is also libp2p's gater, for banned devices.
type admission struct {
	cred credential
	self peer.ID
	log  *slog.Logger

	mu       sync.Mutex
	conns    map[network.Conn]bool     // open connections; true once admitted
	waiting  map[peer.ID]chan struct{} // closed when the device is admitted
	rejected map[peer.ID]int
	banned   map[peer.ID]struct{}
}

func newAdmission(cred credential, self peer.ID, log *slog.Logger) *admission {
	return &admission{
		cred: cred, self: self, log: log,
		conns: map[network.Conn]bool{}, waiting: map[peer.ID]chan struct{}{}, rejected: map[peer.ID]int{}, banned: map[peer.ID]struct{}{},
	}
}

// opened remembers a connection that still has to be admitted.
func (a *admission) opened(c network.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns[c] = false
}

// closed forgets a connection and says whether it was the last admitted one of its device.
func (a *admission) closed(c network.Conn) (left bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.conns[c]
	delete(a.conns, c)
	if !a.connectedLocked(c.RemotePeer()) {
		delete(a.waiting, c.RemotePeer())
	}
	return was && !a.hasLocked(c.RemotePeer())
}

// admit marks a connection and says whether its device is new here. It is false
// for ok when the connection was closed, or the device banned, in the meantime.
func (a *admission) admit(c network.Conn) (first, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	p := c.RemotePeer()
	if _, open := a.conns[c]; !open || a.bannedLocked(p) {
		return false, false
	}
	first = !a.hasLocked(p)
	a.conns[c] = true
	if ready := a.waiting[p]; ready != nil {
		close(ready)
		delete(a.waiting, p)
	}
	return first, true
}

// reject counts a refusal; the first one of each device is logged.
func (a *admission) reject(p peer.ID, why error) {
	a.mu.Lock()
	if len(a.rejected) >= maxRejected {
		for old := range a.rejected {
			delete(a.rejected, old)
			break
		}
	}
	a.rejected[p]++
	first := a.rejected[p] == 1
	a.mu.Unlock()
	if first {
		a.log.Info("a device was not admitted", "peer", p.String(), "code", string(verify.CodeOf(why)), "why", why.Error())
	}
}

// rejections says how often a device was refused lately.
func (a *admission) rejections(p peer.ID) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rejected[p]
}

// has says whether the device is admitted on at least one open connection.
func (a *admission) has(p peer.ID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.hasLocked(p)
}

func (a *admission) hasLocked(p peer.ID) bool {
	for c, admitted := range a.conns {
		if admitted && c.RemotePeer() == p {
			return true
		}
	}
	return false
}

// overdue says whether the connection is open and still not admitted.
func (a *admission) overdue(c network.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	admitted, open := a.conns[c]
	return open && !admitted
}

// members lists the admitted devices.
func (a *admission) members() []peer.ID {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen := make(map[peer.ID]struct{}, len(a.conns))
	var list []peer.ID
	for c, admitted := range a.conns {
		p := c.RemotePeer()
		if _, dup := seen[p]; admitted && !dup {
			seen[p] = struct{}{}
			list = append(list, p)
		}
	}
	return list
}

// wait blocks until the device is admitted or the time of a hello is over. The
// other side may admit first and then open streams at once.
func (a *admission) wait(ctx context.Context, p peer.ID) error {
	a.mu.Lock()
	if a.bannedLocked(p) {
		a.mu.Unlock()
		return verify.Refuse(verify.CodePeer, "the device %s is refused", p)
	}
	if a.hasLocked(p) {
		a.mu.Unlock()
		return nil
	}
	ready := a.waiting[p]
	if ready == nil {
		ready = make(chan struct{})
		a.waiting[p] = ready
	}
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		a.giveUp(p, ready)
		return verify.Refuse(verify.CodeAdmission, "the device %s was not admitted: %w", p, ctx.Err())
	}
}

// giveUp lets a later caller start a new wait; others on the same channel have
// the same deadline within moments, and lose nothing but that.
func (a *admission) giveUp(p peer.ID, ready chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting[p] == ready && !a.connectedLocked(p) {
		delete(a.waiting, p)
	}
}

func (a *admission) connectedLocked(p peer.ID) bool {
	for c := range a.conns {
		if c.RemotePeer() == p {
			return true
		}
	}
	return false
}

// ban refuses the device from now on.
func (a *admission) ban(p peer.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.banned) >= maxBanned {
		for old := range a.banned {
			delete(a.banned, old)
			break
		}
	}
	a.banned[p] = struct{}{}
}

func (a *admission) isBanned(p peer.ID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bannedLocked(p)
}

func (a *admission) bannedLocked(p peer.ID) bool {
	_, is := a.banned[p]
	return is
}

// The gater of libp2p: addresses are not judged, only identities.

func (a *admission) InterceptPeerDial(p peer.ID) bool                                { return !a.isBanned(p) }
func (a *admission) InterceptAddrDial(peer.ID, ma.Multiaddr) bool                    { return true }
func (a *admission) InterceptAccept(network.ConnMultiaddrs) bool                     { return true }
func (a *admission) InterceptUpgraded(network.Conn) (bool, control.DisconnectReason) { return true, 0 }

func (a *admission) InterceptSecured(_ network.Direction, p peer.ID, _ network.ConnMultiaddrs) bool {
	return !a.isBanned(p)
}

// greet runs the hello on a connection that this device opened.
func (a *admission) greet(ctx context.Context, c network.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	s, err := c.NewStream(ctx)
	if err != nil {
		return notAdmitted(err)
	}
	defer s.Reset()
	if err := agree(ctx, s, helloProtocol); err != nil {
		return notAdmitted(err)
	}
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	return a.cred.greetAsDialler(s, a.self, c.RemotePeer())
}

// answer runs the hello on a stream that the dialler of its connection opened.
func (a *admission) answer(ctx context.Context, s network.Stream) error {
	c := s.Conn()
	if c.Stat().Direction != network.DirInbound {
		s.Reset()
		return notAdmitted(errors.New("a hello by the side that was dialled"))
	}
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	if err := a.cred.greetAsListener(s, a.self, c.RemotePeer()); err != nil {
		s.CloseWrite() // let a hello that was sent arrive; the connection is closed soon
		return err
	}
	return s.Close()
}
