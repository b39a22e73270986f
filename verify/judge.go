package verify

import (
	"fmt"
	"time"
)

// Rule is one thing that has to hold before a device believes a release, and how it stands.
type Rule struct {
	Name    string  `json:"rule"`
	Verdict Verdict `json:"verdict"`
	Code    Code    `json:"code,omitempty"` // when refused
	Detail  string  `json:"detail,omitempty"`
}

// Verdict on one rule.
type Verdict string

// The verdicts.
const (
	VerdictGood       Verdict = "good"
	VerdictRefused    Verdict = "refused"
	VerdictNotReached Verdict = "not-reached" // an earlier rule refused, so this one was not looked at
)

// The rules, in the order in which they are looked at.
const (
	ruleChain      = "trust chain"
	ruleSignatures = "signatures"
	ruleDocument   = "manifest"
	ruleProduct    = "product"
	ruleDevKey     = "development keys"
	ruleEpoch      = "trust epoch"
	ruleLine       = "line"
	ruleMinSeq     = "min_seq"
	ruleUntil      = "release_until"
	ruleNotAfter   = "not_after"
	ruleRecalled   = "recalls"
	ruleTables     = "piece tables"
	ruleOrder      = "order"
	ruleDevice     = "this device"
)

var allRules = []string{ruleChain, ruleSignatures, ruleDocument, ruleProduct, ruleDevKey, ruleEpoch, ruleLine,
	ruleMinSeq, ruleUntil, ruleNotAfter, ruleRecalled, ruleTables, ruleOrder, ruleDevice}

// ledger keeps the verdicts of one check. Check and Explain fill it on the same
// way, so an explanation cannot differ from the decision.
type ledger struct{ rules []Rule }

// hold notes what came of a rule and returns err.
func (l *ledger) hold(rule string, err error, good string, args ...any) error {
	r := Rule{Name: rule, Verdict: VerdictGood}
	if err != nil {
		r.Verdict, r.Code, r.Detail = VerdictRefused, CodeOf(err), err.Error()
	} else {
		r.Detail = fmt.Sprintf(good, args...)
	}
	l.rules = append(l.rules, r)
	return err
}

// full lists every rule: those after a refusal were not reached.
func (l *ledger) full() []Rule {
	out := l.rules
	for _, name := range allRules[len(out):] {
		out = append(out, Rule{Name: name, Verdict: VerdictNotReached})
	}
	return out
}

// checkManifest verifies a manifest's raw bytes under the newest document and
// only then parses them. Errors are Refusals.
func (c trustChain) checkManifest(product string, raw, signature []byte, l *ledger) (Manifest, []Signer, error) {
	t := c.newest()
	signers, err := t.release.check(raw, signature, "the manifest")
	if l.hold(ruleSignatures, err, "%d of the %d needed, by %d keys in force", len(signers), t.release.threshold, len(t.release.certs)) != nil {
		return Manifest{}, nil, err
	}
	m, err := ParseUnverifiedManifest(raw)
	if l.hold(ruleDocument, err, "version %s, %d images", m.Version, len(m.Images)) != nil {
		return Manifest{}, nil, err
	}
	if m.Product != product {
		err = Refuse(CodeProduct, "the release is for product %s, this device is %s", m.Product, product)
	}
	if l.hold(ruleProduct, err, "%s", product) != nil {
		return Manifest{}, nil, err
	}
	if err := t.checkSigners(&m, signers); l.hold(ruleDevKey, err, "channel %s", m.Channel) != nil {
		return Manifest{}, nil, err
	}
	if m.TrustEpoch > t.Epoch {
		err = Refuse(CodeTrust, "the release needs trust document %d, the newest known here is %d", m.TrustEpoch, t.Epoch)
	}
	if l.hold(ruleEpoch, err, "made under document %d, in force is %d", m.TrustEpoch, t.Epoch) != nil {
		return Manifest{}, nil, err
	}
	if m.Line != t.Line {
		err = Refuse(CodeOrder, "the release is of line %d, the line in force is %d", m.Line, t.Line)
	}
	if l.hold(ruleLine, err, "%d", m.Line) != nil {
		return Manifest{}, nil, err
	}
	if m.Seq < t.MinSeq {
		err = Refuse(CodeOrder, "the release has seq %d, the publisher allows %d and up", m.Seq, t.MinSeq)
	}
	if l.hold(ruleMinSeq, err, "seq %d, at least %d is allowed", m.Seq, t.MinSeq) != nil {
		return Manifest{}, nil, err
	}
	if m.IssuedAt.After(t.ReleaseUntil) {
		err = Refuse(CodeExpired, "the release was issued %s, after the day %s up to which its keys may sign",
			m.IssuedAt.Format(time.RFC3339), t.ReleaseUntil.Format(time.RFC3339))
	}
	if l.hold(ruleUntil, err, "issued %s, its keys may sign until %s", day(m.IssuedAt), day(t.ReleaseUntil)) != nil {
		return Manifest{}, nil, err
	}
	return m, signers, nil
}

// checkSigners keeps what was signed for trying out away from real devices: on
// the stable channel a development key counts for nothing.
func (t *trusted) checkSigners(m *Manifest, signers []Signer) error {
	if m.Channel != StableChannel {
		return nil
	}
	counted := 0
	development := ""
	for _, s := range signers {
		if s.Development {
			development = s.Name
		} else {
			counted++
		}
	}
	if counted >= t.release.threshold || development == "" {
		return nil
	}
	return Refuse(CodeDevKey, "%s is a development key, which does not count on the channel %s", development, StableChannel)
}

// checkNotAfter holds a release's own date against proven time: the device's
// clock may say 1970 or 2099, and is not asked.
func checkNotAfter(m *Manifest, proven time.Time) error {
	if m.NotAfter == nil {
		return nil
	}
	if m.IssuedAt.After(proven) {
		proven = m.IssuedAt
	}
	if m.NotAfter.Before(proven) {
		return Refuse(CodeExpired, "the release could be installed until %s, and signed documents prove that it is %s or later; the device's clock was not asked",
			m.NotAfter.Format(time.RFC3339), proven.Format(time.RFC3339))
	}
	return nil
}

// ClockWarning says that by this clock the release is past its own date. A clock
// proves nothing, so this is for people only: "" when there is nothing to say.
func (r *Release) ClockWarning(now time.Time) string {
	if n := r.manifest.NotAfter; n != nil && now.After(*n) {
		return fmt.Sprintf("by this clock, which says %s, the release is past its day %s; that is no proof, so it is still taken",
			day(now), day(*n))
	}
	return ""
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }
