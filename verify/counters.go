package verify

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Counters of a device; they only rise. Order is (Line, Seq).
type Counters struct {
	Line     uint64 `json:"line"`
	Accepted uint64 `json:"accepted"` // largest seq that was accepted: nothing older is taken any more
	Floor    uint64 `json:"floor"`    // largest seq that was confirmed
}

// Alarm is something that only a person can put right: two signed documents claim
// one place, so whoever holds the keys made a mistake or is not alone. The first
// one that came stays in force here; the next document in the order settles it.
type Alarm struct {
	Code  Code   `json:"code"`  // CodeFork
	Place string `json:"place"` // "trust document 2", "release 1.17" (line and seq)
	Kept  Digest `json:"kept"`  // SHA-256 of the document in force here
	Other Digest `json:"other"` // SHA-256 of the other
}

// counterRecord is what one copy on disk says. Recalls and alarms are part of it,
// so that what a release brings with it is durable in one write.
type counterRecord struct {
	Format     string    `json:"format"`
	Generation uint64    `json:"generation"` // rises with every write: tells which copy is newer
	Counters             // flat in the JSON
	AcceptedID Digest    `json:"accepted_id"`        // manifest at Accepted, so that a second one for its place is noticed; zero when only the number is known
	Proven     time.Time `json:"proven"`             // latest issued_at of an accepted manifest
	Recalled   []Digest  `json:"recalled,omitempty"` // withdrawn on this line, oldest first
	Alarms     []Alarm   `json:"alarms,omitempty"`
}

const (
	counterFormat = "meshupd.counters/1"
	maxCounters   = 1 << 20 // bytes of one copy

	// maxRecalled is beyond what a publisher withdraws in ten years. The oldest
	// give way: what they name is far below the accepted counter by then.
	maxRecalled = 4096
	maxAlarms   = 32
)

var counterFiles = [2]string{"counters.a", "counters.b"}

// counterStore keeps the record in two files. They are written one after the
// other, so a cut or a bad sector spoils at most one of them, and the newer one
// that its own checksum confirms is in force.
type counterStore struct {
	dir       string
	writeFile writer
	record    counterRecord
}

// writer is durable.WriteFile, or in tests one that ends in a power cut.
type writer func(path string, data []byte, perm fs.FileMode) error

// openCounters reads both copies and rewrites one that is missing or damaged.
// With no copies the counters start at zero; with none that is valid it refuses,
// because starting at zero would undo every protection against old releases.
func openCounters(dir string, writeFile writer) (*counterStore, error) {
	s := &counterStore{dir: dir, writeFile: writeFile, record: counterRecord{Format: counterFormat}}
	var found, valid int
	var records [2]counterRecord
	var damage error
	for i, name := range counterFiles {
		raw, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		found++
		if err == nil {
			records[i], err = parseCounters(raw)
		}
		if err != nil {
			damage = fmt.Errorf("%s: %w", name, err)
			continue
		}
		valid++
		if records[i].Generation >= s.record.Generation {
			s.record = records[i]
		}
	}
	if found > 0 && valid == 0 {
		return nil, Refuse(CodeIO, "read the counters: no valid copy is left: %w", damage)
	}
	// Equal generations were written from one record.
	if found > 0 && (valid < 2 || records[0].Generation != records[1].Generation) {
		if err := s.write(s.record); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// raise writes a record that must not be behind the present one.
func (s *counterStore) raise(next counterRecord) error {
	next.Format = counterFormat
	next.Generation = s.record.Generation + 1
	if err := s.write(next); err != nil {
		return err
	}
	s.record = next
	return nil
}

func (s *counterStore) write(r counterRecord) error {
	raw, err := encodeCounters(r)
	if err != nil {
		return err
	}
	for _, name := range counterFiles {
		if err := s.writeFile(filepath.Join(s.dir, name), raw, 0o600); err != nil {
			return Refuse(CodeIO, "write the counters: %w", err)
		}
	}
	return nil
}

// encodeCounters writes the record and a line with its SHA-256.
func encodeCounters(r counterRecord) ([]byte, error) {
	raw, err := encodeCanonical(r)
	if err != nil {
		return nil, Refuse(CodeIO, "write the counters: %w", err)
	}
	return fmt.Appendf(raw, "%s\n", Digest(sha256.Sum256(raw))), nil
}

func parseCounters(raw []byte) (counterRecord, error) {
	var r counterRecord
	const check = 2*sha256.Size + 1 // the digest and its newline
	if len(raw) > maxCounters || len(raw) <= check {
		return r, Refuse(CodeFormat, "the counters have %d bytes", len(raw))
	}
	body, line := raw[:len(raw)-check], raw[len(raw)-check:]
	want := fmt.Appendf(nil, "%s\n", Digest(sha256.Sum256(body)))
	if !bytes.Equal(line, want) {
		return r, Refuse(CodeDigest, "the counters do not match their checksum")
	}
	if err := decodeStrict(body, "the counters", &r); err != nil {
		return counterRecord{}, err
	}
	if r.Format != counterFormat {
		return counterRecord{}, Refuse(CodeFormat, "the counters have format %q, not %q", clip(r.Format), counterFormat)
	}
	if len(r.Recalled) > maxRecalled || len(r.Alarms) > maxAlarms {
		return counterRecord{}, Refuse(CodeFormat, "the counters hold more than %d recalls or %d alarms", maxRecalled, maxAlarms)
	}
	r.Proven = r.Proven.UTC()
	return r, nil
}

// accept is the record after rel was accepted, or after it was refused as the
// second one for its place; same says that nothing changes.
func (r counterRecord) accept(rel *Release) (next counterRecord, same bool, err error) {
	m := &rel.manifest
	next = r
	if r.recalled(rel) {
		return r, true, Refuse(CodeRecalled, "the publisher withdrew version %s", m.Version)
	}
	switch {
	case m.Line < r.Line || m.Line == r.Line && m.Seq < r.Accepted:
		return r, true, Refuse(CodeOrder, "the release has place %d.%d in the order, %d.%d was already accepted", m.Line, m.Seq, r.Line, r.Accepted)
	case m.Line == r.Line && m.Seq == r.Accepted && rel.id == r.AcceptedID:
		return r, true, nil
	case m.Line == r.Line && m.Seq == r.Accepted && !r.AcceptedID.IsZero():
		next, same = r.alarm(Alarm{CodeFork, fmt.Sprintf("release %d.%d", m.Line, m.Seq), r.AcceptedID, rel.id})
		return next, same, Refuse(CodeFork, "two signed releases claim the place %d.%d: %s, which came first here, and %s",
			m.Line, m.Seq, r.AcceptedID, rel.id)
	case m.Line > r.Line:
		// The seq of an abandoned line says nothing about the new one, and what
		// a thief withdrew there is not withdrawn any more.
		next.Counters, next.Recalled = Counters{Line: m.Line}, nil
	}
	next.Recalled = withRecalls(next.Recalled, m.Recalls)
	next.Accepted, next.AcceptedID = m.Seq, rel.id
	if m.IssuedAt.After(next.Proven) {
		next.Proven = m.IssuedAt
	}
	return next, false, nil
}

// recalled says whether the publisher withdrew the release or one of its images.
func (r *counterRecord) recalled(rel *Release) bool {
	return slices.Contains(r.Recalled, rel.id) ||
		slices.ContainsFunc(rel.manifest.Images, func(img Image) bool { return slices.Contains(r.Recalled, img.SHA256) })
}

func withRecalls(old, more []Digest) []Digest {
	out := slices.Clone(old)
	for _, d := range more {
		if !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	return out[max(0, len(out)-maxRecalled):]
}

// alarm is the record with one more alarm; same says that it is not new, or one too many.
func (r counterRecord) alarm(a Alarm) (next counterRecord, same bool) {
	if slices.Contains(r.Alarms, a) || len(r.Alarms) == maxAlarms {
		return r, true
	}
	r.Alarms = append(slices.Clone(r.Alarms), a)
	return r, false
}

// atLeast is the record raised to counters that were built in; same says that it is there already.
func (r counterRecord) atLeast(c Counters) (next counterRecord, same bool) {
	next = r
	switch {
	case c.Line < r.Line:
		return r, true
	case c.Line > r.Line:
		next.Counters, next.AcceptedID, next.Recalled = c, Digest{}, nil
		return next, false
	}
	if c.Accepted > r.Accepted {
		next.Accepted, next.AcceptedID = c.Accepted, Digest{}
	}
	next.Floor = max(r.Floor, c.Floor)
	return next, next.Counters == r.Counters
}

// confirm is the record after rel was confirmed.
func (r counterRecord) confirm(rel *Release) (next counterRecord, same bool) {
	m := &rel.manifest
	if m.Line != r.Line || m.Seq <= r.Floor {
		return r, true
	}
	next = r
	next.Floor = m.Seq
	return next, false
}
