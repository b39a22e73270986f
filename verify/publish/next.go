package publish

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// A trust folder may hold one proposed document beside its chain. Copies of the
// folder, or of these two files, go to whoever holds a root key; when enough
// signed, the proposal becomes the next document of the chain.
const (
	proposalName      = "trust.next.json"
	proposalSignature = "trust.next.sig"
)

// TrustChanges say how the next trust document differs from the newest.
type TrustChanges struct {
	AddRoot, AddRelease   []*verify.Certificate
	DropRoot, DropRelease []string // fingerprints, or unique ends of them of 8 digits and more
	RootThreshold         int      // 0: as before
	ReleaseThreshold      int      // 0: as before
	RaiseLine             bool     // a new order of releases: min_seq starts again at 1
	MinSeq                uint64   // 0: as before
	ReleaseUntil          time.Time
	IssuedAt              time.Time // zero: Now()
	Replace               bool      // drop an older proposal and its signatures
}

// NextTrust writes a proposal for the next trust document into the folder. It
// refuses with E-USAGE what changes nothing or what is there already, with
// E-NOT-FOUND a key to drop that is not there, and with E-TRUST or E-FORMAT what
// devices would refuse.
func NextTrust(dir string, c TrustChanges) (verify.TrustDocument, error) {
	last, err := newestTrust(dir)
	if err != nil {
		return last, err
	}
	if _, _, err := readProposal(dir, last); verify.CodeOf(err) != verify.CodeNotFound && !c.Replace {
		return last, verify.Refuse(verify.CodeUsage, "there is already a proposal in %s: have it signed, or replace it", dir)
	}
	next, err := c.apply(last)
	if err != nil {
		return last, err
	}
	raw, err := verify.EncodeTrust(next)
	if err != nil {
		return last, err
	}
	if err := writeCertificates(dir, append(slices.Clone(c.AddRoot), c.AddRelease...)); err != nil {
		return last, err
	}
	if _, err := certificatesOf(dir, next.Root); err != nil {
		return last, err
	}
	// Signatures of an older proposal must not stand beside the new one.
	if err := durable.Remove(filepath.Join(dir, proposalSignature)); err != nil {
		return last, verify.Refuse(verify.CodeIO, "write the proposal: %w", err)
	}
	return next, writeTrustFile(dir, proposalName, raw)
}

func newestTrust(dir string) (verify.TrustDocument, error) {
	if err := checkTrust(dir); err != nil {
		return verify.TrustDocument{}, err
	}
	docs, err := readTrust(dir)
	if err != nil {
		return verify.TrustDocument{}, err
	}
	return docs[len(docs)-1], nil
}

// apply is the document after the changes.
func (c *TrustChanges) apply(last verify.TrustDocument) (verify.TrustDocument, error) {
	next := last
	next.Epoch++
	next.IssuedAt = c.IssuedAt
	if next.IssuedAt.IsZero() {
		var err error
		if next.IssuedAt, err = Now(); err != nil {
			return next, err
		}
	}
	next.IssuedAt = next.IssuedAt.UTC().Truncate(time.Second)
	if err := notAhead(next.IssuedAt); err != nil {
		return next, err
	}
	var err error
	if next.Root, err = changeKeys("root", last.Root, c.AddRoot, c.DropRoot, c.RootThreshold); err != nil {
		return next, err
	}
	if next.Release, err = changeKeys("release", last.Release, c.AddRelease, c.DropRelease, c.ReleaseThreshold); err != nil {
		return next, err
	}
	if c.RaiseLine {
		next.Line, next.MinSeq = last.Line+1, 1
	}
	if c.MinSeq != 0 {
		if next.MinSeq = c.MinSeq; !c.RaiseLine && c.MinSeq < last.MinSeq {
			return next, verify.Refuse(verify.CodeTrust, "min_seq is %d and cannot go back to %d", last.MinSeq, c.MinSeq)
		}
	}
	if !c.ReleaseUntil.IsZero() {
		next.ReleaseUntil = c.ReleaseUntil.UTC().Truncate(time.Second)
	}
	same := next
	same.Epoch, same.IssuedAt = last.Epoch, last.IssuedAt
	if len(DiffTrust(last, same)) == 0 {
		return next, verify.Refuse(verify.CodeUsage, "the next trust document would change nothing")
	}
	return next, nil
}

func changeKeys(role string, set verify.KeySet, add []*verify.Certificate, drop []string, threshold int) (verify.KeySet, error) {
	out := verify.KeySet{Threshold: set.Threshold, Keys: slices.Clone(set.Keys)}
	if threshold != 0 {
		out.Threshold = threshold
	}
	for _, name := range drop {
		at, err := findKey(role, out.Keys, name)
		if err != nil {
			return out, err
		}
		out.Keys = slices.Delete(out.Keys, at, at+1)
	}
	for _, cert := range add {
		if indexOf(out.Keys, cert.Fingerprint()) >= 0 {
			return out, verify.Refuse(verify.CodeTrust, "the %s role has the key %s already", role, cert.Fingerprint())
		}
		out.Keys = append(out.Keys, verify.KeyRef{Fingerprint: cert.Fingerprint(), Cert: cert.Digest()})
	}
	if len(out.Keys) < out.Threshold {
		return out, verify.Refuse(verify.CodeTrust, "the %s role would have %d keys and ask for %d of them", role, len(out.Keys), out.Threshold)
	}
	return out, nil
}

func findKey(role string, keys []verify.KeyRef, name string) (int, error) {
	end := strings.ToUpper(strings.ReplaceAll(name, " ", ""))
	found := -1
	for i, k := range keys {
		if len(end) < 8 || !strings.HasSuffix(k.Fingerprint, end) {
			continue
		}
		if found >= 0 {
			return 0, verify.Refuse(verify.CodeUsage, "more than one %s key ends with %s", role, name)
		}
		found = i
	}
	if found < 0 {
		return 0, verify.Refuse(verify.CodeNotFound, "no %s key has the fingerprint %q (its last 8 digits or more)", role, name)
	}
	return found, nil
}

// Proposal is a trust document on its way.
type Proposal struct {
	Document verify.TrustDocument `json:"document"`
	// Old are the root keys of the newest document, New those of the proposal: both sets have to reach their threshold.
	Old Progress `json:"old_root"`
	New Progress `json:"new_root"`
}

// SignTrust adds the signatures of the keys to the proposal in a trust folder, and
// takes up those that gpg left beside it (trust.next.json.asc or .sig) and those
// given. A key that is root neither before nor after is refused (E-SIG-KEY). When
// both sets of root keys are complete the proposal becomes the next document; done
// says so. It refuses with E-NOT-FOUND when there is no proposal.
func SignTrust(dir string, keys []*SecretKey, signatures ...[]byte) (p Proposal, done bool, err error) {
	last, err := newestTrust(dir)
	if err != nil {
		return p, false, err
	}
	raw, doc, err := readProposal(dir, last)
	if err != nil {
		return p, false, err
	}
	if err := notAhead(doc.IssuedAt); err != nil {
		return p, false, err
	}
	for _, k := range keys {
		sig, err := k.DetachSign(raw, signingTime(doc.IssuedAt, k))
		if err != nil {
			return p, false, err
		}
		signatures = append(signatures, sig)
	}
	left, err := gpgSignatures(dir)
	if err != nil {
		return p, false, err
	}
	if err := addTrustSignatures(dir, last, doc, raw, append(signatures, left...)); err != nil {
		return p, false, err
	}
	for _, name := range gpgTrustLeaves {
		if err := durable.Remove(filepath.Join(dir, name)); err != nil {
			return p, false, verify.Refuse(verify.CodeIO, "take up %s: %w", name, err)
		}
	}
	if p, err = readProgress(dir, last, doc, raw); err != nil {
		return p, false, err
	}
	if p.Old.Missing() > 0 || p.New.Missing() > 0 {
		return p, false, nil
	}
	return p, true, finishTrust(dir, doc, raw)
}

var gpgTrustLeaves = []string{proposalName + ".asc", proposalName + ".sig"}

func gpgSignatures(dir string) ([][]byte, error) {
	var out [][]byte
	for _, name := range gpgTrustLeaves {
		raw, err := readAtMost(filepath.Join(dir, name), 4*verify.MaxSignature)
		if verify.CodeOf(err) == verify.CodeNotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, raw)
	}
	return out, nil
}

// readProposal finds the proposal that follows last. One that has its place in
// the chain already is what a cut left of finishTrust, and counts as none.
func readProposal(dir string, last verify.TrustDocument) ([]byte, verify.TrustDocument, error) {
	none := verify.Refuse(verify.CodeNotFound, "there is no proposal for trust document %d in %s: make one with `meshupd trust next`", last.Epoch+1, dir)
	raw, err := readAtMost(filepath.Join(dir, proposalName), verify.MaxTrustDocument)
	if verify.CodeOf(err) == verify.CodeNotFound {
		return nil, verify.TrustDocument{}, none
	}
	if err != nil {
		return nil, verify.TrustDocument{}, err
	}
	doc, err := verify.ParseUnverifiedTrust(raw)
	if err == nil && doc.Epoch != last.Epoch+1 {
		err = none
	}
	return raw, doc, err
}

func addTrustSignatures(dir string, last, doc verify.TrustDocument, raw []byte, signatures [][]byte) error {
	certs, err := certificatesOf(dir, last.Root)
	if err != nil {
		return err
	}
	more, err := certificatesOf(dir, doc.Root)
	if err != nil {
		return err
	}
	certs = append(certs, more...)
	old, err := readAtMost(filepath.Join(dir, proposalSignature), verify.MaxSignature)
	if err != nil && verify.CodeOf(err) != verify.CodeNotFound {
		return err
	}
	var kept [][]byte
	if len(old) > 0 {
		if kept, err = verify.SplitSignatures(old); err != nil {
			return err
		}
	}
	for _, text := range signatures {
		binary, err := dearmor(text)
		if err != nil {
			return verify.Refuse(verify.CodeFormat, "read the signature: %w", err)
		}
		parts, err := verify.SplitSignatures(binary)
		if err != nil {
			return err
		}
		for _, part := range parts {
			cert, err := signerOf(certs, raw, part)
			if err != nil {
				return verify.Refuse(verify.CodeOf(err), "trust document %d: %w", doc.Epoch, err)
			}
			kept = append(without(kept, cert), part)
		}
	}
	joined := bytes.Join(kept, nil)
	if len(joined) == 0 || bytes.Equal(joined, old) {
		return nil
	}
	if _, err := verify.SplitSignatures(joined); err != nil {
		return err
	}
	return writeTrustFile(dir, proposalSignature, joined)
}

func readProgress(dir string, last, doc verify.TrustDocument, raw []byte) (Proposal, error) {
	p := Proposal{Document: doc}
	signature, err := readAtMost(filepath.Join(dir, proposalSignature), verify.MaxSignature)
	if err != nil && verify.CodeOf(err) != verify.CodeNotFound {
		return p, err
	}
	if p.Old, err = progressOf(dir, last.Root, raw, signature); err != nil {
		return p, err
	}
	p.New, err = progressOf(dir, doc.Root, raw, signature)
	return p, err
}

// finishTrust gives the proposal its place in the chain, as a device would check
// it. The document is written last, so a cut leaves the proposal as it was.
func finishTrust(dir string, doc verify.TrustDocument, raw []byte) error {
	signature, err := readAtMost(filepath.Join(dir, proposalSignature), verify.MaxSignature)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("trust.%d", doc.Epoch)
	if err := writeTrustFile(dir, name+".sig", signature); err != nil {
		return err
	}
	if err := writeTrustFile(dir, name+".json", raw); err != nil {
		return err
	}
	if err := checkTrust(dir); err != nil {
		// Nothing but a fault of ours gets here; the chain must stay usable all the same.
		if gone := durable.Remove(filepath.Join(dir, name+".json")); gone != nil {
			return verify.Refuse(verify.CodeIO, "take the document back: %w", gone)
		}
		return err
	}
	for _, name := range []string{proposalName, proposalSignature} {
		if err := durable.Remove(filepath.Join(dir, name)); err != nil {
			return verify.Refuse(verify.CodeIO, "end the proposal: %w", err)
		}
	}
	return nil
}
