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

	"meshupd/verify/durable"
)

// trustFolders hold the learned chain twice, so that a bad sector costs nothing.
var trustFolders = [2]string{"trust", "trust.copy"}

func sweepState(dir string) error {
	dirs := []string{dir}
	for _, name := range trustFolders {
		kept := filepath.Join(dir, name)
		dirs = append(dirs, kept, filepath.Join(kept, "certs"))
	}
	for _, dir := range dirs {
		if err := durable.MkdirAll(dir, 0o755); err != nil {
			return Refuse(CodeIO, "open the trust state: %w", err)
		}
		if err := durable.Sweep(dir); err != nil {
			return Refuse(CodeIO, "open the trust state: %w", err)
		}
	}
	return nil
}

// loadLearned continues the factory's chain by what was learned since: the longer
// of both copies. A copy that is behind is written again.
func (d *Door) loadLearned(factory trustChain) error {
	d.chain = factory
	var lengths [len(trustFolders)]int
	for i, name := range trustFolders {
		chain, err := loadChain(factory, filepath.Join(d.dir, name))
		if err != nil {
			// What was learned can be learned again; what holds is used meanwhile.
			d.damage = err.Error()
		}
		lengths[i] = len(chain)
		if len(chain) > len(d.chain) {
			d.chain = chain
		}
	}
	for _, n := range lengths {
		if n < len(d.chain) && len(d.chain) > len(factory) {
			// The other copy had it all.
			d.damage = ""
			return d.keep(d.chain)
		}
	}
	return nil
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
	cert := func(d Digest) []byte { return certs[d] }
	chain := d.chain
	var fork error
	for i, doc := range h.trust {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if i < len(chain) {
			if fork == nil && !bytes.Equal(doc.document, chain[i].raw) {
				if fork = d.noteFork(i, doc, cert); CodeOf(fork) != CodeFork {
					return nil, fork
				}
			}
			continue
		}
		longer, err := chain.extend(doc, cert)
		switch {
		case err != nil && fork != nil:
			return nil, fork
		case err != nil:
			return nil, err
		}
		chain = longer
	}
	// A later document that both sides of a fork lead to settles it: each device keeps its own middle.
	if last := len(h.trust) - 1; fork != nil && !bytes.Equal(h.trust[last].document, chain[last].raw) {
		return nil, fork
	}
	if err := checkPinned(chain[:len(h.trust)].certs(), certs); fork == nil && err != nil {
		return nil, err
	}
	if len(chain) > len(d.chain) {
		if err := d.keep(chain); err != nil {
			return nil, err
		}
	}
	return chain, nil
}

// checkPinned compares the certificates that came with those that are pinned.
func checkPinned(pinned, came map[Digest][]byte) error {
	for digest := range came {
		if pinned[digest] == nil {
			return Refuse(CodeBundle, "%s belongs to no trust document", CertificateName(digest))
		}
	}
	if len(came) != len(pinned) {
		return Refuse(CodeBundle, "a certificate that a trust document pins is missing")
	}
	return nil
}

// noteFork is about a document that differs from the one in its place here. When
// it is as good as ours, the alarm is kept and the answer E-FORK; else it is E-TRUST.
func (d *Door) noteFork(at int, doc unverifiedTrust, cert func(Digest) []byte) error {
	ours, other := Digest(sha256.Sum256(d.chain[at].raw)), Digest(sha256.Sum256(doc.document))
	next, same := d.counters.record.alarm(Alarm{CodeFork, fmt.Sprintf("trust document %d", at+1), ours, other})
	if _, err := d.chain[:at].extend(doc, cert); err != nil {
		return Refuse(CodeTrust, "trust document %d differs from the one this device holds: %w", at+1, err)
	}
	if !same {
		if err := d.counters.raise(next); err != nil {
			return err
		}
	}
	return Refuse(CodeFork, "two signed documents claim to be trust document %d: %s, which came first here, and %s", at+1, ours, other)
}

// foreign explains a head whose trust starts with another document. Nothing it
// says about keys is believed; our own keys decide what to call it, so that a
// stranger's release is E-SIG-KEY and the publisher's release for another product E-PRODUCT.
func (d *Door) foreign(h *UnverifiedHead) error {
	if _, _, err := d.chain.checkManifest(d.product, h.manifest, h.signature, new(ledger)); err != nil {
		return err
	}
	return Refuse(CodeTrust, "the release comes with another trust root than this device has")
}

// keep writes the documents that the folders lack, one document after the other
// into both. Each is written after what it needs (certificates, signature), so a
// cut leaves a shorter chain, never a broken one; and what is durable counts at once.
func (d *Door) keep(chain trustChain) error {
	for i, t := range chain {
		for _, name := range trustFolders {
			if err := d.keepOne(filepath.Join(d.dir, name), i+1, t); err != nil {
				return err
			}
		}
		if i >= len(d.chain) {
			d.chain = chain[:i+1]
		}
	}
	return nil
}

func (d *Door) keepOne(dir string, epoch int, t *trusted) error {
	write := func(name string, data []byte) error {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
			return nil
		}
		if err := d.write(path, data, 0o644); err != nil {
			return Refuse(CodeIO, "keep the trust chain: %w", err)
		}
		return nil
	}
	pinned := trustChain{t}.certs()
	for _, digest := range slices.SortedFunc(maps.Keys(pinned), compareDigests) {
		if err := write(CertificateName(digest), pinned[digest]); err != nil {
			return err
		}
	}
	if err := write(fmt.Sprintf("trust.%d.sig", epoch), t.signature); err != nil {
		return err
	}
	return write(fmt.Sprintf("trust.%d.json", epoch), t.raw)
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
