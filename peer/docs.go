package peer

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/libp2p/go-libp2p-pubsub/pb"

	pubsub "github.com/libp2p/go-libp2p-pubsub"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"golang.org/x/time/rate"

	"meshupd/verify"
)

// Documents travel three ways. Gossip is the fast one: heads up to maxGossip and
// statuses. On each new connection both sides push what the other may lack over
// syncProtocol, so that a partition heals. And whoever hears of a head it
// lacks pulls it over headProtocol (heads.go), whatever its size.
const (
	headTopic   = "/meshupd/head/1"
	statusTopic = "/meshupd/status/1"

	gossipProtocol             = pubsub.GossipSubID_v12
	syncProtocol   protocol.ID = "/meshupd/sync/1"

	maxGossip        = 768 << 10 // a larger head is only announced
	maxGossipMessage = 1 << 20
	syncTimeout      = 20 * time.Second
	joinDelay        = time.Second
	announceDelay    = 100 * time.Millisecond // lets the news of one moment travel together
)

// documents exchanges heads and statuses with the neighbours.
type documents struct {
	m     *Mesh
	heads *headDesk
	// syncs bounds how often one neighbour can make this device check a whole site's signatures.
	syncs *peerLimits

	announce chan struct{} // this device has heads that the neighbours may lack

	// Set by start.
	host     *lanHost
	joins    event.Emitter
	headSay  *pubsub.Topic
	statuses *pubsub.Topic
}

func newDocuments(m *Mesh) *documents {
	d := &documents{m: m, announce: make(chan struct{}, 1), syncs: newPeerLimits(rate.Every(time.Second), 8)}
	d.heads = newHeadDesk(m)
	return d
}

// gossipHost is the host as gossip sees it: devices appear on its bus when they are admitted, not when they connect.
type gossipHost struct {
	*lanHost
	bus event.Bus
}

func (h gossipHost) EventBus() event.Bus { return h.bus }

// start joins the topics. It ends with ctx.
func (d *documents) start(ctx context.Context, h *lanHost) error {
	bus := eventbus.NewBus()
	joins, err := bus.Emitter(new(event.EvtPeerIdentificationCompleted))
	if err != nil {
		return fmt.Errorf("set up gossip: %w", err)
	}
	gossip, err := pubsub.NewGossipSub(ctx, gossipHost{h, bus}, d.gossipOptions()...)
	if err != nil {
		return fmt.Errorf("set up gossip: %w", err)
	}
	d.host, d.joins = h, joins
	if d.headSay, err = joinTopic(gossip, headTopic, d.judgeHead); err != nil {
		return err
	}
	if d.statuses, err = joinTopic(gossip, statusTopic, d.judgeStatus); err != nil {
		return err
	}
	h.SetStreamHandler(syncProtocol, func(s network.Stream) { d.receive(s) })
	h.SetStreamHandler(headProtocol, func(s network.Stream) { d.heads.serve(ctx, s) })
	return nil
}

func (d *documents) gossipOptions() []pubsub.Option {
	params := pubsub.DefaultGossipSubParams()
	// Each status crosses the site about D times. While a site fetches, that is most of what is sent beside the image.
	params.D, params.Dlo, params.Dhi, params.Dscore, params.Dout, params.Dlazy = 4, 3, 6, 2, 1, 4
	params.IDontWantMessageThreshold = 512 // a status is above, the announcement itself well below
	quiet := slog.New(slog.DiscardHandler)
	return []pubsub.Option{
		pubsub.WithGossipSubParams(params),
		pubsub.WithGossipSubProtocols([]protocol.ID{gossipProtocol}, pubsub.GossipSubDefaultFeatures),
		// Statuses are signed by their device and heads by the vendor; a second signature around them proves nothing more.
		pubsub.WithMessageSignaturePolicy(pubsub.StrictNoSign),
		pubsub.WithNoAuthor(),
		pubsub.WithMessageIdFn(messageByContent),
		pubsub.WithMaxMessageSize(maxGossipMessage),
		pubsub.WithPeerFilter(func(p peer.ID, _ string) bool { return d.m.adm.has(p) }),
		pubsub.WithSubscriptionFilter(pubsub.NewAllowlistSubscriptionFilter(headTopic, statusTopic)),
		pubsub.WithPeerOutboundQueueSize(64),
		pubsub.WithValidateQueueSize(64),
		pubsub.WithValidateThrottle(64),
		pubsub.WithValidateWorkers(2),
		pubsub.WithLogger(quiet),
		pubsub.WithRPCLogger(quiet),
	}
}

func joinTopic(gossip *pubsub.PubSub, name string, judge pubsub.ValidatorEx, opts ...pubsub.TopicOpt) (*pubsub.Topic, error) {
	err := gossip.RegisterTopicValidator(name, judge, pubsub.WithValidatorConcurrency(8), pubsub.WithValidatorTimeout(judgeTimeout))
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", name, err)
	}
	topic, err := gossip.Join(name, opts...)
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", name, err)
	}
	// The validator has already taken what there is to take: nobody has to read, only to pass on.
	if _, err := topic.Relay(); err != nil {
		return nil, fmt.Errorf("join %s: %w", name, err)
	}
	return topic, nil
}

// messageByContent makes the same words one message, whoever says them. Half of a digest is enough to tell messages
// apart: who finds two that share it can withhold their own second one.
func messageByContent(msg *pubsub_pb.Message) string {
	sum := sha256.Sum256(msg.GetData())
	return string(sum[:16])
}

// judgeHead decides whether a gossiped head is passed on: only believed ones are.
func (d *documents) judgeHead(ctx context.Context, from peer.ID, msg *pubsub.Message) pubsub.ValidationResult {
	if from == d.m.self {
		return pubsub.ValidationAccept
	}
	if len(msg.Data) > maxGossip {
		d.heads.blame(from, verify.Refuse(verify.CodeSize, "a gossiped head has %d bytes", len(msg.Data)))
		return pubsub.ValidationReject
	}
	switch d.heads.judge(ctx, from, msg.Data) {
	case headBelieved:
		return pubsub.ValidationAccept
	case headForged:
		return pubsub.ValidationReject
	default:
		return pubsub.ValidationIgnore
	}
}

// judgeStatus takes a gossiped status in, and passes on only news.
func (d *documents) judgeStatus(_ context.Context, from peer.ID, msg *pubsub.Message) pubsub.ValidationResult {
	if from == d.m.self {
		return pubsub.ValidationAccept
	}
	news, _, err := d.m.hearStatus(msg.Data, 0)
	if err != nil {
		return pubsub.ValidationReject
	}
	if !news {
		return pubsub.ValidationIgnore
	}
	return pubsub.ValidationAccept
}

// joined runs when a device was admitted: gossip may begin, and it gets what it may lack.
func (d *documents) joined(ctx context.Context, c network.Conn) {
	p := c.RemotePeer()
	if err := d.joins.Emit(event.EvtPeerIdentificationCompleted{Peer: p, Conn: c, Protocols: []protocol.ID{gossipProtocol}}); err != nil {
		d.m.log.Debug("gossip does not take a device", "peer", p.String(), "why", err.Error())
	}
	d.m.tasks.Go(func() { d.push(ctx, p, d.everything()) })
	// Those behind the newcomer hear of this device when gossip has taken up the connection.
	time.AfterFunc(joinDelay, d.m.teller.again)
	if s, ok := d.m.roster.status(p); ok {
		d.learn(p, s.Heads)
	}
}

func (d *documents) left(p peer.ID) {
	d.syncs.forget(p)
	d.heads.left(p)
}

// run announces and pulls heads until ctx ends.
func (d *documents) run(ctx context.Context, h *lanHost) error {
	d.m.tasks.Go(func() { d.heads.run(ctx, h) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.announce:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(announceDelay):
		}
		refs := parcel{refs: d.refs()}
		for _, p := range d.m.adm.members() {
			d.m.tasks.Go(func() { d.push(ctx, p, refs) })
		}
	}
}

// changed makes run tell the neighbours what heads there are.
func (d *documents) changed() {
	select {
	case d.announce <- struct{}{}:
	default:
	}
	d.m.teller.again()
}

// refs names the heads this device can hand on; nil when it was not told.
func (d *documents) refs() []HeadRef {
	if d.m.cfg.Heads == nil {
		return nil
	}
	refs := d.m.cfg.Heads()
	return refs[:min(len(refs), maxRefs)]
}

// learn notes which heads a device holds. Only from a neighbour they can be pulled.
func (d *documents) learn(from peer.ID, refs []HeadRef) {
	if d.m.adm.has(from) {
		d.heads.learn(from, refs)
	}
}

// loopback says whether this device itself listens on a loopback address.
func (d *documents) loopback() bool {
	return isLoopback(d.m.Addrs())
}

func isLoopback(list []netip.AddrPort) bool {
	for _, at := range list {
		if at.Addr().IsLoopback() {
			return true
		}
	}
	return false
}

// spread gives a head to the site.
func (d *documents) spread(ctx context.Context, head []byte) error {
	select {
	case <-d.m.started:
	default:
		return nil
	}
	d.changed()
	if len(head) > maxGossip {
		return nil
	}
	if err := d.headSay.Publish(ctx, head); err != nil && !errors.As(err, new(pubsub.ValidationError)) {
		return fmt.Errorf("spread a release: %w", err)
	}
	return nil
}

func (d *documents) publishStatus(ctx context.Context, signed []byte) error {
	if err := d.statuses.Publish(ctx, signed); err != nil {
		return fmt.Errorf("gossip a status: %w", err)
	}
	return nil
}

// A parcel is what one side pushes to the other: frames of a kind byte, a
// 4-byte length and a body, until the end of the stream.
type parcel struct {
	refs     []HeadRef
	statuses []agedStatus
}

const (
	frameRefs   byte = 'r' // JSON list of HeadRef
	frameStatus byte = 's' // 4 bytes age in milliseconds, then a signed status

	maxRefsFrame   = 16 << 10
	maxStatusFrame = 4 + maxSignedStatus
)

// everything is what a newcomer may lack: heads, this device's status, and what it heard lately.
func (d *documents) everything() parcel {
	p := parcel{refs: d.refs()}
	if own := d.m.teller.last(); own != nil {
		p.statuses = append(p.statuses, agedStatus{signed: own})
	}
	p.statuses = append(p.statuses, d.m.roster.recent(time.Now())...)
	return p
}

func (d *documents) push(ctx context.Context, to peer.ID, p parcel) {
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	s, err := d.host.NewStream(ctx, to, syncProtocol)
	if err != nil {
		d.m.log.Debug("a neighbour does not take documents", "peer", to.String(), "why", err.Error())
		return
	}
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	defer stop()
	s.SetDeadline(time.Now().Add(syncTimeout))
	w := bufio.NewWriter(s)
	if err := writeParcel(w, p); err != nil {
		s.Reset()
		return
	}
	if err := w.Flush(); err != nil {
		s.Reset()
		return
	}
	s.Close()
}

func writeParcel(w io.Writer, p parcel) error {
	if p.refs != nil {
		body, err := json.Marshal(p.refs)
		if err != nil {
			return err
		}
		if err := writeFrame(w, frameRefs, body); err != nil {
			return err
		}
	}
	for _, s := range p.statuses {
		body := binary.BigEndian.AppendUint32(nil, uint32(max(s.age, 0).Milliseconds()))
		if err := writeFrame(w, frameStatus, append(body, s.signed...)); err != nil {
			return err
		}
	}
	return nil
}

func writeFrame(w io.Writer, kind byte, body []byte) error {
	head := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)))
	if _, err := w.Write(head); err != nil {
		return err
	}
	_, err := w.Write(body)
	return err
}

// receive serves a parcel that a neighbour pushes.
func (d *documents) receive(s network.Stream) {
	from := s.Conn().RemotePeer()
	if !d.syncs.allow(from) {
		s.Reset()
		return
	}
	s.SetDeadline(time.Now().Add(syncTimeout))
	if err := d.readParcel(bufio.NewReader(s), from); err != nil {
		d.m.log.Debug("a neighbour's documents were not read", "peer", from.String(), "why", err.Error())
		s.Reset()
		return
	}
	s.Close()
}

// readParcel reads frames to the end; what came before a bad frame was taken.
func (d *documents) readParcel(r io.Reader, from peer.ID) error {
	for range maxMembers + 2 {
		kind, body, err := readFrame(r)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch kind {
		case frameRefs:
			refs, err := parseRefs(body)
			if err != nil {
				return err
			}
			d.learn(from, refs)
		case frameStatus:
			age := time.Duration(binary.BigEndian.Uint32(body)) * time.Millisecond
			if _, _, err := d.m.hearStatus(body[4:], min(age, handOnAge)); err != nil {
				return err
			}
		}
	}
	return verify.Refuse(verify.CodePeer, "a parcel has more than %d documents", maxMembers)
}

// readFrame returns io.EOF only between frames.
func readFrame(r io.Reader) (kind byte, body []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:1]); err != nil {
		return 0, nil, err
	}
	if _, err := io.ReadFull(r, head[1:]); err != nil {
		return 0, nil, io.ErrUnexpectedEOF
	}
	size, least, most := int(binary.BigEndian.Uint32(head[1:])), 0, 0
	switch head[0] {
	case frameRefs:
		most = maxRefsFrame
	case frameStatus:
		least, most = 4, maxStatusFrame
	default:
		return 0, nil, verify.Refuse(verify.CodePeer, "a frame of kind %d is not known here", head[0])
	}
	if size < least || size > most {
		return 0, nil, verify.Refuse(verify.CodePeer, "a frame of kind %q has %d bytes", head[0], size)
	}
	body = make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return head[0], body, nil
}

// parseRefs reads a list of heads.
func parseRefs(b []byte) ([]HeadRef, error) {
	if len(b) > maxRefsFrame {
		return nil, verify.Refuse(verify.CodePeer, "a list of heads has %d bytes", len(b))
	}
	var refs []HeadRef
	if err := json.Unmarshal(b, &refs); err != nil {
		return nil, verify.Refuse(verify.CodePeer, "read a list of heads: %w", err)
	}
	if len(refs) > maxRefs {
		return nil, verify.Refuse(verify.CodePeer, "a list names %d heads; at most %d are read", len(refs), maxRefs)
	}
	return refs, nil
}
