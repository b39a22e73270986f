package publish

import (
	"fmt"
	"slices"
	"time"

	"meshupd/verify"
)

// TrustView is what a trust folder holds, verified as by a new device.
type TrustView struct {
	Documents []verify.TrustDocument `json:"documents"` // oldest first
	// Signers names the keys of all documents by fingerprint.
	Signers  map[string]verify.Signer `json:"signers"`
	Proposal *Proposal                `json:"proposal,omitempty"`
}

// ShowTrust reads a trust folder.
func ShowTrust(dir string) (TrustView, error) {
	v := TrustView{Signers: map[string]verify.Signer{}}
	last, err := newestTrust(dir)
	if err != nil {
		return v, err
	}
	if v.Documents, err = readTrust(dir); err != nil {
		return v, err
	}
	all := slices.Clone(v.Documents)
	raw, doc, err := readProposal(dir, last)
	switch {
	case err == nil:
		p, err := readProgress(dir, last, doc, raw)
		if err != nil {
			return v, err
		}
		v.Proposal = &p
		all = append(all, doc)
	case verify.CodeOf(err) != verify.CodeNotFound:
		return v, err
	}
	for _, d := range all {
		for _, set := range []verify.KeySet{d.Root, d.Release} {
			certs, err := certificatesOf(dir, set)
			if err != nil {
				return v, err
			}
			for _, c := range certs {
				v.Signers[c.Fingerprint()] = verify.Signer{Name: c.Name(), Fingerprint: c.Fingerprint(), Development: c.Development()}
			}
		}
	}
	return v, nil
}

// Change is one difference between two trust documents. Key is a fingerprint, when it is about a key.
type Change struct {
	What string `json:"what"`
	Key  string `json:"key,omitempty"`
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
}

// DiffTrust lists what differs from a to b.
func DiffTrust(a, b verify.TrustDocument) []Change {
	var out []Change
	value := func(what, from, to string) {
		if from != to {
			out = append(out, Change{What: what, From: from, To: to})
		}
	}
	value("product", a.Product, b.Product)
	value("epoch", fmt.Sprint(a.Epoch), fmt.Sprint(b.Epoch))
	for _, r := range []struct {
		role     string
		from, to verify.KeySet
	}{{"root", a.Root, b.Root}, {"release", a.Release, b.Release}} {
		value(r.role+" threshold", fmt.Sprint(r.from.Threshold), fmt.Sprint(r.to.Threshold))
		for _, k := range r.from.Keys {
			if at := indexOf(r.to.Keys, k.Fingerprint); at < 0 {
				out = append(out, Change{What: "drop " + r.role + " key", Key: k.Fingerprint})
			} else if to := r.to.Keys[at].Cert; to != k.Cert {
				out = append(out, Change{What: r.role + " certificate", Key: k.Fingerprint, From: k.Cert.String(), To: to.String()})
			}
		}
		for _, k := range r.to.Keys {
			if indexOf(r.from.Keys, k.Fingerprint) < 0 {
				out = append(out, Change{What: "add " + r.role + " key", Key: k.Fingerprint})
			}
		}
	}
	value("line", fmt.Sprint(a.Line), fmt.Sprint(b.Line))
	value("min_seq", fmt.Sprint(a.MinSeq), fmt.Sprint(b.MinSeq))
	value("issued_at", a.IssuedAt.Format(time.RFC3339), b.IssuedAt.Format(time.RFC3339))
	value("release_until", a.ReleaseUntil.Format(time.RFC3339), b.ReleaseUntil.Format(time.RFC3339))
	return out
}

func indexOf(keys []verify.KeyRef, fingerprint string) int {
	return slices.IndexFunc(keys, func(k verify.KeyRef) bool { return k.Fingerprint == fingerprint })
}
