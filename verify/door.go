package verify

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"time"

	"meshupd/verify/durable"
)

// DoorConfig says where a device keeps its trust.
type DoorConfig struct {
	Dir     string // durable state: newest trust chain, counters in two copies
	Anchor  string // factory folder with trust.N.json, trust.N.sig and certs/, and perhaps a BakedFile; read-only
	Product string // must be the anchor's; empty: whatever the anchor says
	// Baked are counters below which the device must not fall, as a BakedFile; the higher of both holds.
	Baked Counters
	// BuildTime is when this program or image was made: the earliest time it can
	// be. Zero: unknown. No document proves a time more than 20 years later, so
	// that a slip of the pen in a signed date cannot make everything expire.
	BuildTime time.Time

	write writer // nil: durable.WriteFile
}

// maxAhead is how many years after the build a signed date may move proven time.
const maxAhead = 20

// Door is the one way from unverified bytes to a Release. Safe for concurrent use.
type Door struct {
	dir     string
	product string
	built   time.Time
	write   writer
	damage  string // why the stored chain was not used to its end, for people

	mu       sync.Mutex // owns the fields below and the files in dir
	chain    trustChain
	counters *counterStore
}

// OpenDoor loads and re-verifies the trust that the device has: the factory's
// chain, and the longer one it has learned since if that continues the factory's.
// Errors are Refusals: E-TRUST or E-FORMAT (the anchor cannot be used), E-PRODUCT,
// E-IO.
func OpenDoor(cfg DoorConfig) (*Door, error) {
	if err := sweepState(cfg.Dir); err != nil {
		return nil, err
	}
	chain, err := loadChain(nil, cfg.Anchor)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, Refuse(CodeTrust, "the trust anchor %s has no trust.1.json", cfg.Anchor)
	}
	d := &Door{dir: cfg.Dir, product: chain[0].Product, built: cfg.BuildTime.UTC(), write: cfg.write}
	if d.write == nil {
		d.write = durable.WriteFile
	}
	if cfg.Product != "" && cfg.Product != d.product {
		return nil, Refuse(CodeProduct, "the trust anchor is for product %s, this device is %s", d.product, cfg.Product)
	}
	if err := d.loadLearned(chain); err != nil {
		return nil, err
	}
	return d, d.loadCounters(cfg)
}

// loadCounters reads the counters and raises them to what is built in.
func (d *Door) loadCounters(cfg DoorConfig) error {
	var err error
	if d.counters, err = openCounters(cfg.Dir, d.write); err != nil {
		return err
	}
	baked, err := readBaked(cfg.Anchor)
	if err != nil {
		return err
	}
	for _, c := range []Counters{baked, cfg.Baked} {
		if next, same := d.counters.record.atLeast(c); !same {
			if err := d.counters.raise(next); err != nil {
				return err
			}
		}
	}
	return nil
}

// Check verifies a head: continues the trust chain (and keeps a newer document
// durably, even when the release itself is then refused: news about keys is worth
// having), then signatures, product, line and dates, recalls, then the piece
// tables. It does not touch the counters. Errors are Refusals, or that of ctx.
func (d *Door) Check(ctx context.Context, h *UnverifiedHead) (*Release, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.judge(ctx, h, new(ledger))
}

// Explain is Check with its reasons: every rule in its order and what came of it,
// to the one that refused, and also those of Accept and, when dev has a product,
// of Release.Fits. It accepts nothing. The error is that of the refusal.
func (d *Door) Explain(ctx context.Context, h *UnverifiedHead, dev Device) (*Release, []Rule, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var l ledger
	rel, err := d.judge(ctx, h, &l)
	if err != nil {
		return nil, l.full(), err
	}
	_, _, err = d.counters.record.accept(rel)
	c := d.counters.record.Counters
	if l.hold(ruleOrder, err, "%d.%d, accepted so far is %d.%d", rel.manifest.Line, rel.manifest.Seq, c.Line, c.Accepted) != nil {
		return nil, l.full(), err
	}
	if dev.Product == "" {
		return rel, l.rules, nil
	}
	if err := rel.Fits(dev); l.hold(ruleDevice, err, "hardware %s", dev.Hardware) != nil {
		return nil, l.full(), err
	}
	return rel, l.rules, nil
}

func (d *Door) judge(ctx context.Context, h *UnverifiedHead, l *ledger) (*Release, error) {
	chain, err := d.continueChain(ctx, h)
	if l.hold(ruleChain, err, "%d documents here, %d came along", len(chain), len(h.trust)) != nil {
		return nil, err
	}
	m, signers, err := chain.checkManifest(d.product, h.manifest, h.signature, l)
	if err != nil {
		return nil, err
	}
	proven := d.provenTime()
	if err := checkNotAfter(&m, proven); l.hold(ruleNotAfter, err, "proven time is %s", day(proven)) != nil {
		return nil, err
	}
	rel := &Release{manifest: m, id: sha256.Sum256(h.manifest), signers: signers}
	if d.counters.record.recalled(rel) {
		err = Refuse(CodeRecalled, "the publisher withdrew version %s", m.Version)
	}
	if l.hold(ruleRecalled, err, "%d digests are withdrawn", len(d.counters.record.Recalled)) != nil {
		return nil, err
	}
	rel.tables, err = h.checkTables(m)
	if l.hold(ruleTables, err, "%d images", len(m.Images)) != nil {
		return nil, err
	}
	rel.head = d.outgoing(h).Bytes()
	return rel, nil
}

// provenTime is a time before which it cannot be: the build, and every date that
// a trusted signature vouches for. It never falls and no clock takes part.
func (d *Door) provenTime() time.Time {
	p := d.built
	for _, t := range []time.Time{d.chain.provenTime(), d.counters.record.Proven} {
		if t.After(p) {
			p = t
		}
	}
	if latest := d.built.AddDate(maxAhead, 0, 0); !d.built.IsZero() && p.After(latest) {
		return latest
	}
	return p
}

// checkTables verifies the piece table of every image and that there are no others.
func (h *UnverifiedHead) checkTables(m Manifest) (map[Digest]*PieceTable, error) {
	tables := map[Digest]*PieceTable{}
	layers := 0
	for _, img := range m.Images {
		raw, there := h.tables[img.SHA256]
		if there && len(raw) == 0 {
			return nil, Refuse(CodeBundle, "the piece table of image %s is empty", img.Name)
		}
		t, err := ParseTable(img, raw)
		if err != nil {
			return nil, err
		}
		if there {
			layers++
		}
		tables[img.SHA256] = t
	}
	if layers != len(h.tables) {
		return nil, Refuse(CodeBundle, "there is a piece table for an image that the manifest does not have")
	}
	return tables, nil
}

// Accept raises the accepted counter to rel, durably, or refuses with E-ORDER
// (older than accepted, or of a line that is no longer in force), E-RECALLED, or
// E-FORK (same place, other manifest; an Alarm stays). What rel recalls is
// recalled in the same write. Accepting the same release again is fine.
func (d *Door) Accept(rel *Release) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.chain.newest(); rel.manifest.Line != t.Line || rel.manifest.Seq < t.MinSeq {
		return Refuse(CodeOrder, "the release has place %d.%d in the order, the publisher allows %d.%d and up",
			rel.manifest.Line, rel.manifest.Seq, t.Line, t.MinSeq)
	}
	next, same, err := d.counters.record.accept(rel)
	if same {
		return err
	}
	return errors.Join(err, d.counters.raise(next))
}

// AllowVia says whether rel may be kept and installed although newer releases
// were accepted: nil when it is a stepping stone, named by the Via chain of goal,
// and goal is the release that was accepted last. It raises nothing. find returns
// the manifests of releases that came through this door. It refuses with E-ORDER
// or E-RECALLED.
func (d *Door) AllowVia(goal, rel *Release, find func(Digest) (Manifest, bool)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.counters.record
	if r.recalled(rel) {
		return Refuse(CodeRecalled, "the publisher withdrew version %s", rel.manifest.Version)
	}
	m := &rel.manifest
	if goal.id == r.AcceptedID && m.Line == r.Line && slices.Contains(Stones(goal.manifest, find), rel.id) {
		return nil
	}
	return Refuse(CodeOrder, "the release has place %d.%d in the order, %d.%d was already accepted and does not lead through it",
		m.Line, m.Seq, r.Line, r.Accepted)
}

// Recalled says whether the publisher withdrew this manifest or image.
func (d *Door) Recalled(digest Digest) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Contains(d.counters.record.Recalled, digest)
}

// Withdrawn says whether the publisher withdrew the release or one of its images.
func (d *Door) Withdrawn(rel *Release) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counters.record.recalled(rel)
}

// Alarms lists what was found of two signed documents in one place, oldest first.
func (d *Door) Alarms() []Alarm {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.counters.record.Alarms)
}

// ProvenTime is a time before which it cannot be, by signed documents and the build alone.
func (d *Door) ProvenTime() time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.provenTime()
}

// Confirmed raises the floor to rel, durably.
func (d *Door) Confirmed(rel *Release) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	next, same := d.counters.record.confirm(rel)
	if same {
		return nil
	}
	return d.counters.raise(next)
}

// AcceptedID is the ID of the release that was accepted last; zero when only its place is known.
func (d *Door) AcceptedID() Digest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counters.record.AcceptedID
}

// Counters returns the present values.
func (d *Door) Counters() Counters {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counters.record.Counters
}

// TrustInfo is what status and doctor tell about the trust in force.
type TrustInfo struct {
	Product   string   `json:"product"`
	Epoch     uint64   `json:"epoch"`
	RootID    Digest   `json:"root_id"` // SHA-256 of the first trust document: names the product's trust root
	Line      uint64   `json:"line"`
	Threshold int      `json:"threshold"`
	Keys      []Signer `json:"keys"`
	// Damage says why the chain kept in the state folder was not used to its end, or is empty.
	Damage string `json:"damage,omitempty"`
}

// Trust tells what is in force.
func (d *Door) Trust() TrustInfo {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.chain.newest()
	info := TrustInfo{
		Product:   t.Product,
		Epoch:     t.Epoch,
		RootID:    sha256.Sum256(d.chain[0].raw),
		Line:      t.Line,
		Threshold: t.release.threshold,
		Damage:    d.damage,
	}
	for _, c := range t.release.certs {
		info.Keys = append(info.Keys, c.signer())
	}
	return info
}
