package verify

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"meshupd/verify/durable"
)

// DoorConfig says where a device keeps its trust.
type DoorConfig struct {
	Dir     string // durable state: newest trust chain, counters in two copies
	Anchor  string // factory folder with trust.N.json, trust.N.sig and certs/; read-only
	Product string // must be the anchor's; empty: whatever the anchor says
}

// Door is the one way from unverified bytes to a Release. Safe for concurrent use.
type Door struct {
	dir     string
	product string
	damage  string // why the stored chain was not used to its end, for people

	mu       sync.Mutex // owns the fields below and the files in dir
	chain    trustChain
	counters *counterStore
}

const trustFolder = "trust"

// OpenDoor loads and re-verifies the trust that the device has: the factory's
// chain, and the longer one it has learned since if that continues the factory's.
// Errors are Refusals: E-TRUST or E-FORMAT (the anchor cannot be used), E-PRODUCT,
// E-IO.
func OpenDoor(cfg DoorConfig) (*Door, error) {
	kept := filepath.Join(cfg.Dir, trustFolder)
	for _, dir := range []string{cfg.Dir, kept, filepath.Join(kept, "certs")} {
		if err := durable.MkdirAll(dir, 0o755); err != nil {
			return nil, Refuse(CodeIO, "open the trust state: %w", err)
		}
		if err := durable.Sweep(dir); err != nil {
			return nil, Refuse(CodeIO, "open the trust state: %w", err)
		}
	}
	chain, err := loadChain(nil, cfg.Anchor)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, Refuse(CodeTrust, "the trust anchor %s has no trust.1.json", cfg.Anchor)
	}
	d := &Door{dir: cfg.Dir, product: chain[0].Product}
	if cfg.Product != "" && cfg.Product != d.product {
		return nil, Refuse(CodeProduct, "the trust anchor is for product %s, this device is %s", d.product, cfg.Product)
	}
	if d.chain, err = loadChain(chain, kept); err != nil {
		// What was learned can be learned again; the factory's part holds meanwhile.
		d.damage = err.Error()
	}
	if d.counters, err = openCounters(cfg.Dir); err != nil {
		return nil, err
	}
	return d, nil
}

// loadChain reads and verifies a chain from a folder. A chain in hand must agree
// with the folder as far as both go. On an error the part that held is returned too.
func loadChain(chain trustChain, dir string) (trustChain, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return chain, Refuse(CodeTrust, "open the trust folder: %w", err)
	}
	defer root.Close()
	f := &folder{root: root}
	cert := func(d Digest) []byte {
		raw, err := f.readSmall(CertificateName(d), MaxCertificate)
		if err != nil {
			return nil
		}
		return raw
	}
	for n := 1; n <= maxTrustDocuments; n++ {
		document, err := f.readSmall(fmt.Sprintf("trust.%d.json", n), MaxTrustDocument)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return chain, err
		}
		if n <= len(chain) {
			if !bytes.Equal(document, chain[n-1].raw) {
				return chain, Refuse(CodeTrust, "trust document %d in %s is not the factory's", n, dir)
			}
			continue
		}
		signature, err := f.readSmall(fmt.Sprintf("trust.%d.sig", n), MaxSignature)
		if err != nil {
			return chain, Refuse(CodeTrust, "trust document %d in %s has no signature: %w", n, dir, err)
		}
		if chain, err = extendOrKeep(chain, unverifiedTrust{document, signature}, cert); err != nil {
			return chain, err
		}
	}
	return chain, nil
}

func extendOrKeep(chain trustChain, doc unverifiedTrust, cert func(Digest) []byte) (trustChain, error) {
	longer, err := chain.extend(doc, cert)
	if err != nil {
		return chain, err
	}
	return longer, nil
}

// readSmall reads a whole file of at most limit bytes.
func (f *folder) readSmall(name string, limit int64) ([]byte, error) {
	if !f.exists(name) {
		return nil, fmt.Errorf("read %s: %w", name, fs.ErrNotExist)
	}
	file, size, err := f.openFile(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if size > limit {
		return nil, Refuse(CodeSize, "%s has %d bytes, more than %d", name, size, limit)
	}
	raw := make([]byte, size)
	if _, err := file.ReadAt(raw, 0); err != nil && size > 0 {
		return nil, Refuse(CodeIO, "read %s: %w", name, err)
	}
	return raw, nil
}

// Check verifies a head: continues the trust chain (and keeps a newer document
// durably, even when the release itself is then refused: news about keys is worth
// having), then signatures, product, line and dates, then the piece tables. It
// does not touch the counters. Errors are Refusals, or that of ctx.
func (d *Door) Check(ctx context.Context, h *UnverifiedHead) (*Release, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	chain, err := d.continueChain(ctx, h)
	if err != nil {
		return nil, err
	}
	m, signers, err := chain.checkManifest(d.product, h.manifest, h.signature)
	if err != nil {
		return nil, err
	}
	proven := d.counters.record.Proven
	if p := chain.provenTime(); p.After(proven) {
		proven = p
	}
	if m.NotAfter != nil && (m.NotAfter.Before(proven) || m.NotAfter.Before(m.IssuedAt)) {
		return nil, Refuse(CodeExpired, "the release was good until %s", m.NotAfter.Format(time.RFC3339))
	}
	tables, err := h.checkTables(m)
	if err != nil {
		return nil, err
	}
	return &Release{
		manifest: m,
		id:       sha256.Sum256(h.manifest),
		tables:   tables,
		signers:  signers,
		head:     d.outgoing(h).Bytes(),
	}, nil
}

// continueChain verifies what the head adds to the chain and keeps it.
func (d *Door) continueChain(ctx context.Context, h *UnverifiedHead) (trustChain, error) {
	if len(h.trust) == 0 {
		return nil, Refuse(CodeBundle, "the head has no trust document")
	}
	if !bytes.Equal(h.trust[0].document, d.chain[0].raw) {
		return nil, d.foreign(h)
	}
	certs := map[Digest][]byte{}
	for _, c := range h.certs {
		certs[sha256.Sum256(c)] = c
	}
	chain := d.chain
	for i, doc := range h.trust {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if i < len(chain) {
			if !bytes.Equal(doc.document, chain[i].raw) {
				return nil, Refuse(CodeTrust, "trust document %d differs from the one this device holds", i+1)
			}
			continue
		}
		var err error
		if chain, err = chain.extend(doc, func(d Digest) []byte { return certs[d] }); err != nil {
			return nil, err
		}
	}
	pinned := chain[:len(h.trust)].certs()
	for digest := range certs {
		if pinned[digest] == nil {
			return nil, Refuse(CodeBundle, "%s belongs to no trust document", CertificateName(digest))
		}
	}
	if len(certs) != len(pinned) {
		return nil, Refuse(CodeBundle, "a certificate that a trust document pins is missing")
	}
	if len(chain) > len(d.chain) {
		if err := d.keep(chain); err != nil {
			return nil, err
		}
		d.chain = chain
	}
	return chain, nil
}

// foreign explains a head whose trust starts with another document. Nothing it
// says about keys is believed; our own keys decide what to call it, so that a
// stranger's release is E-SIG-KEY and the publisher's release for another product E-PRODUCT.
func (d *Door) foreign(h *UnverifiedHead) error {
	if _, _, err := d.chain.checkManifest(d.product, h.manifest, h.signature); err != nil {
		return err
	}
	return Refuse(CodeTrust, "the release comes with another trust root than this device has")
}

// keep writes the documents that the folder lacks. Each is written after what it
// needs (certificates, signature), so a cut leaves a shorter chain, never a broken one.
func (d *Door) keep(chain trustChain) error {
	dir := filepath.Join(d.dir, trustFolder)
	write := func(name string, data []byte) error {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
			return nil
		}
		if err := durable.WriteFile(path, data, 0o644); err != nil {
			return Refuse(CodeIO, "keep the trust chain: %w", err)
		}
		return nil
	}
	for i, t := range chain {
		pinned := trustChain{t}.certs()
		for _, digest := range slices.SortedFunc(maps.Keys(pinned), compareDigests) {
			if err := write(CertificateName(digest), pinned[digest]); err != nil {
				return err
			}
		}
		if err := write(fmt.Sprintf("trust.%d.sig", i+1), t.signature); err != nil {
			return err
		}
		if err := write(fmt.Sprintf("trust.%d.json", i+1), t.raw); err != nil {
			return err
		}
	}
	return nil
}

// outgoing is the head as this device hands it on: with its own chain, which is
// verified and may be longer than the one that came.
func (d *Door) outgoing(h *UnverifiedHead) *UnverifiedHead {
	out := *h
	out.trust = nil
	for _, t := range d.chain {
		out.trust = append(out.trust, unverifiedTrust{t.raw, t.signature})
	}
	pinned := d.chain.certs()
	out.certs = nil
	for _, digest := range slices.SortedFunc(maps.Keys(pinned), compareDigests) {
		out.certs = append(out.certs, pinned[digest])
	}
	return &out
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
// (older than accepted, or of a line that is no longer in force) or E-FORK (same
// place, other manifest). Accepting the same release again is fine.
func (d *Door) Accept(rel *Release) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.chain.newest(); rel.manifest.Line != t.Line || rel.manifest.Seq < t.MinSeq {
		return Refuse(CodeOrder, "the release has place %d.%d in the order, the publisher allows %d.%d and up",
			rel.manifest.Line, rel.manifest.Seq, t.Line, t.MinSeq)
	}
	next, same, err := d.counters.record.accept(rel)
	if err != nil || same {
		return err
	}
	return d.counters.raise(next)
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
		info.Keys = append(info.Keys, Signer{Name: c.name, Fingerprint: c.fingerprint})
	}
	return info
}
