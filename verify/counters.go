package verify

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"meshupd/verify/durable"
)

// Counters of a device; they only rise. Order is (Line, Seq).
type Counters struct {
	Line     uint64 `json:"line"`
	Accepted uint64 `json:"accepted"` // largest seq that was accepted: nothing older is taken any more
	Floor    uint64 `json:"floor"`    // largest seq that was confirmed
}

// counterRecord is what one copy on disk says.
type counterRecord struct {
	Format     string    `json:"format"`
	Generation uint64    `json:"generation"` // rises with every write: tells which copy is newer
	Counters             // flat in the JSON
	AcceptedID Digest    `json:"accepted_id"` // manifest at Accepted, so that a second one for its place is noticed
	Proven     time.Time `json:"proven"`      // latest issued_at of an accepted manifest
}

const (
	counterFormat = "meshupd.counters/1"
	maxCounters   = 4 << 10 // bytes of one copy
)

var counterFiles = [2]string{"counters.a", "counters.b"}

// counterStore keeps the record in two files. They are written one after the
// other, so a cut or a bad sector spoils at most one of them, and the newer one
// that its own checksum confirms is in force.
type counterStore struct {
	dir    string
	record counterRecord
}

// openCounters reads both copies and rewrites one that is missing or damaged.
// With no copies the counters start at zero; with none that is valid it refuses,
// because starting at zero would undo every protection against old releases.
func openCounters(dir string) (*counterStore, error) {
	s := &counterStore{dir: dir, record: counterRecord{Format: counterFormat}}
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
	if found > 0 && records[0] != records[1] {
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
		if err := durable.WriteFile(filepath.Join(s.dir, name), raw, 0o600); err != nil {
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
	r.Proven = r.Proven.UTC()
	return r, nil
}

// accept is the record after rel was accepted; same says that nothing changes.
func (r counterRecord) accept(rel *Release) (next counterRecord, same bool, err error) {
	m := &rel.manifest
	next = r
	switch {
	case m.Line < r.Line || m.Line == r.Line && m.Seq < r.Accepted:
		return r, true, Refuse(CodeOrder, "the release has place %d.%d in the order, %d.%d was already accepted", m.Line, m.Seq, r.Line, r.Accepted)
	case m.Line == r.Line && m.Seq == r.Accepted:
		if rel.id != r.AcceptedID {
			return r, true, Refuse(CodeFork, "two signed releases claim the place %d.%d: %s and %s", m.Line, m.Seq, r.AcceptedID, rel.id)
		}
		return r, true, nil
	case m.Line > r.Line:
		// The seq of an abandoned line says nothing about the new one.
		next.Counters = Counters{Line: m.Line}
	}
	next.Accepted, next.AcceptedID = m.Seq, rel.id
	if m.IssuedAt.After(next.Proven) {
		next.Proven = m.IssuedAt
	}
	return next, false, nil
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
