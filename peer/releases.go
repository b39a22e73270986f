package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"meshupd/swarm"
	"meshupd/verify"
	"meshupd/verify/durable"
)

// ErrOutdated is the answer to an authentic head that newer ones have replaced.
// Whoever sent it did nothing wrong, and it is not passed on.
var ErrOutdated = errors.New("newer releases have replaced this one")

// check takes raw bytes through the door.
func (n *Node) check(ctx context.Context, raw []byte) (*verify.Release, error) {
	head, err := verify.ReadHead(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	return n.checkHead(ctx, head)
}

// checkHead is Door.Check. A head may bring news about keys even when its release
// is refused; then what is kept is looked at again.
func (n *Node) checkHead(ctx context.Context, head *verify.UnverifiedHead) (*verify.Release, error) {
	before := n.door.Trust().Epoch
	rel, err := n.door.Check(ctx, head)
	if n.door.Trust().Epoch != before {
		n.reviewKnown(ctx)
	}
	return rel, err
}

// outdated says whether the order of releases has moved past rel, and the newest
// does not lead through it.
func (n *Node) outdated(rel *verify.Release) error {
	m, c := rel.Manifest(), n.door.Counters()
	if (m.Line < c.Line || m.Line == c.Line && m.Seq < c.Accepted) && !n.isStone(rel) {
		return verify.Refuse(verify.CodeOrder, "release %s is number %d of line %d; this device already accepted number %d of line %d",
			m.Version, m.Seq, m.Line, c.Accepted, c.Line)
	}
	return nil
}

// isStone says whether the newest release goes through rel.
func (n *Node) isStone(rel *verify.Release) bool {
	known := n.known()
	goal := newestOf(known)
	return goal != nil && n.door.AllowVia(goal, rel, finder(known, n.withdrawn)) == nil
}

func newestOf(known []*verify.Release) *verify.Release {
	var newest *verify.Release
	for _, rel := range known {
		if newest == nil || rel.Compare(newest) > 0 {
			newest = rel
		}
	}
	return newest
}

// hearHead is asked about a head from a neighbour. A release that is authentic
// but outdated is no offence: the neighbour has only not heard the news.
func (n *Node) hearHead(ctx context.Context, from string, raw []byte) error {
	rel, err := n.check(ctx, raw)
	if err != nil {
		n.log.Warn("refused a release from a neighbour", "from", from, "code", verify.CodeOf(err), "err", err)
		return err
	}
	if err := n.outdated(rel); err != nil {
		return ErrOutdated
	}
	return n.adopt(rel, Origin{Kind: "mesh", Detail: from})
}

// adopt keeps a release and lets the loop look at it. The head is durable before
// the counter rises: the other way round a cut could leave a device that refuses
// every older release and has lost the newest.
func (n *Node) adopt(rel *verify.Release, from Origin) error {
	n.adopting.Lock() // the same head comes from several neighbours at once
	defer n.adopting.Unlock()
	n.mu.Lock()
	had, have := n.releases[rel.ID()]
	n.mu.Unlock()
	if have && bytes.Equal(had.Head(), rel.Head()) {
		return nil
	}
	if err := n.store.Keep(rel); err != nil {
		return fmt.Errorf("keep the release: %w", err)
	}
	if have { // with a longer trust chain or more signatures than before
		n.mu.Lock()
		n.releases[rel.ID()] = rel
		n.mu.Unlock()
		n.poke()
		return nil
	}
	if err := n.door.Accept(rel); err != nil && !n.isStone(rel) {
		n.poke() // there may be an alarm to show
		return errors.Join(err, n.store.Drop(rel, n.known()))
	}
	from.At = time.Now().UTC()
	if err := n.origin.set(rel.ID(), from); err != nil {
		n.log.Warn("remember where a release came from", "err", err)
	}
	n.mu.Lock()
	n.releases[rel.ID()] = rel
	n.mu.Unlock()
	m := rel.Manifest()
	n.log.Info("release accepted", "version", m.Version, "seq", m.Seq, "from", from.Kind)
	if warning := rel.ClockWarning(time.Now()); warning != "" {
		n.log.Warn("the clock of this device or the release is late", "version", m.Version, "why", warning)
	}
	if len(m.Recalls) > 0 {
		n.withdrawKnown()
	}
	n.pruneToQuota()
	n.poke()
	return nil
}

// heads says what this device can hand on.
func (n *Node) heads() []HeadRef {
	epoch := n.door.Trust().Epoch
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.headsLocked(epoch)
}

func (n *Node) head(id verify.Digest) []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	if rel := n.releases[id]; rel != nil {
		return rel.Head()
	}
	return nil
}

// Import is a release on its way in from a stick or a file.
type Import struct {
	n      *Node
	rel    *verify.Release
	by     string
	source string
	end    sync.Once
	done   bool
}

// OpenImport takes a head through the door and says whether its images are
// wanted. Nothing is stored yet. by and source are for the history.
func (n *Node) OpenImport(ctx context.Context, head *verify.UnverifiedHead, by, source string) (*Import, error) {
	rel, err := n.checkHead(ctx, head)
	if err != nil {
		return nil, err
	}
	if err := n.outdated(rel); err != nil {
		return nil, err
	}
	i := &Import{n: n, rel: rel, by: by, source: source}
	n.mu.Lock()
	n.importing[i] = true // what is to be installed may need no space in the store
	n.mu.Unlock()
	var missing []verify.Image
	for _, img := range rel.Manifest().Images {
		if !n.store.Has(img.SHA256) {
			missing = append(missing, img)
		}
	}
	if err := n.store.CheckSpace(missing...); err != nil {
		i.close()
		return nil, err
	}
	return i, nil
}

// Release is what is being imported.
func (i *Import) Release() *verify.Release { return i.rel }

// Has says whether an image needs no copying.
func (i *Import) Has(d verify.Digest) bool { return i.n.store.Has(d) }

// Put stores one image of the release whole, or nothing.
func (i *Import) Put(ctx context.Context, d verify.Digest, r io.Reader, progress func(int64)) error {
	img, ok := i.rel.Image(d)
	if !ok {
		return verify.Refuse(verify.CodeBundle, "image %s is not part of release %s", d, i.rel.Manifest().Version)
	}
	return i.n.store.Put(ctx, i.rel, img, r, progress)
}

// Commit makes the release this device's and tells the site. All images have to be there.
func (i *Import) Commit(ctx context.Context) error {
	m := i.rel.Manifest()
	for _, img := range m.Images {
		if !i.n.store.Has(img.SHA256) {
			return verify.Refuse(verify.CodeBundle, "image %s of release %s was not copied", img.Name, m.Version)
		}
	}
	if err := i.n.adopt(i.rel, Origin{Kind: i.source, Detail: i.by}); err != nil {
		return err
	}
	i.done = true
	i.close()
	i.n.record(Event{Kind: EventImported, To: m.Version, By: i.by, Detail: i.source})
	if err := i.n.mesh.Spread(ctx, i.rel); err != nil {
		// Neighbours also learn it from this device's heads, so this is a delay and not a loss.
		i.n.log.Warn("spread the release", "err", err)
	}
	i.n.poke()
	return nil
}

// Abort drops images of an import that was not committed. It does nothing after Commit.
func (i *Import) Abort() {
	if i.done {
		return
	}
	i.close()
	i.n.mu.Lock()
	_, kept := i.n.releases[i.rel.ID()]
	i.n.mu.Unlock()
	if kept {
		return // the same release came another way meanwhile
	}
	if err := i.n.store.Drop(i.rel, i.n.known()); err != nil {
		i.n.log.Warn("drop an import that was given up", "err", err)
	}
}

func (i *Import) close() {
	i.end.Do(func() {
		i.n.mu.Lock()
		delete(i.n.importing, i)
		i.n.mu.Unlock()
	})
}

// badPeer notes a neighbour that was proven to send bad pieces, and refuses it.
func (n *Node) badPeer(id string, img verify.Digest) {
	err := verify.Refuse(verify.CodePeer, "sent a piece of image %s that is not what was signed", img)
	n.mesh.Ban(id, err)
	n.record(Event{Device: id, Name: n.nameOf(id), Kind: EventBanned, Code: verify.CodePeer, Detail: err.Error()})
}

// Origin says where this device has a release from.
type Origin struct {
	Kind   string    `json:"kind"`   // "usb", "file", "mesh"
	Detail string    `json:"detail"` // who imported it, or which neighbour told of it
	At     time.Time `json:"at"`
}

// origins remembers the Origin of each release, for people only.
type origins struct {
	path string
	mu   sync.Mutex
	by   map[verify.Digest]Origin
}

const maxOrigins = 64

func openOrigins(path string) (*origins, error) {
	o := &origins{path: path, by: map[verify.Digest]Origin{}}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return o, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read where releases came from: %w", err)
	}
	if err := json.Unmarshal(raw, &o.by); err != nil || len(o.by) > maxOrigins {
		o.by = map[verify.Digest]Origin{} // only words for people are lost
	}
	return o, nil
}

func (o *origins) get(id verify.Digest) (Origin, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	from, ok := o.by[id]
	return from, ok
}

func (o *origins) set(id verify.Digest, from Origin) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.by) >= maxOrigins {
		var oldest verify.Digest
		for d, e := range o.by {
			if oldest.IsZero() || e.At.Before(o.by[oldest].At) {
				oldest = d
			}
		}
		delete(o.by, oldest)
	}
	o.by[id] = from
	raw, err := json.Marshal(o.by)
	if err != nil {
		return err
	}
	return durable.WriteFile(o.path, raw, 0o640)
}

// members is what the swarm needs to know of the admitted devices that were heard lately.
func (n *Node) members() []swarm.Member {
	var out []swarm.Member
	for _, m := range n.mesh.Members() {
		if m.Connected || time.Since(m.LastHeard) < SilentAfter {
			out = append(out, swarm.Member{ID: m.ID, Holdings: m.Status.Holdings})
		}
	}
	return out
}

// Transfers tells of the images that this device fetches or serves now.
func (n *Node) Transfers() []swarm.Transfer { return n.swarm.Transfers() }

// SetReserve changes how many bytes stay free on the store's file system.
func (n *Node) SetReserve(bytes int64) {
	n.store.SetReserve(bytes)
	n.poke()
}
