package peer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Event is one entry of the history: what changed on a device, how it ended and why.
type Event struct {
	At     time.Time     `json:"at"` // this device's clock, which may be wrong
	Device string        `json:"device"`
	Name   string        `json:"name"`
	Kind   EventKind     `json:"kind"`
	From   string        `json:"from,omitempty"` // version before
	To     string        `json:"to,omitempty"`   // version after, or wanted
	Took   time.Duration `json:"took,omitempty"` // nanoseconds, from the first news of the release
	By     string        `json:"by,omitempty"`
	Code   verify.Code   `json:"code,omitempty"`
	Detail string        `json:"detail,omitempty"`
	// Prev is the SHA-256 of the line before, so that a line taken out or
	// changed later shows. It is set by Append.
	Prev string `json:"prev"`
}

// EventKind names what happened.
type EventKind string

// The kinds of event.
const (
	EventImported   EventKind = "imported"
	EventWritten    EventKind = "written" // the idle slot holds it
	EventConfirmed  EventKind = "confirmed"
	EventRolledBack EventKind = "rolled-back"
	EventBlocked    EventKind = "blocked"
	EventBanned     EventKind = "banned"
)

const (
	maxHistoryLine = 4 << 10
	maxHistory     = 1 << 20 // bytes of one log before the next is begun; the one before is kept
)

// History is the log of events as JSON lines, each bound to the one before it by
// its hash. Safe for concurrent use.
type History struct {
	path string

	mu   sync.Mutex // guards the fields below
	prev string
	size int64
	log  []Event
}

// OpenHistory reads the log at path. A last line that a power cut tore is
// dropped; a log whose chain is broken is set aside and said so in err together
// with a usable, empty History.
func OpenHistory(path string) (*History, error) {
	h := &History{path: path}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return h, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	if len(raw) > 2*maxHistory {
		return h, h.setAside(fmt.Errorf("%d bytes, more than is ever written", len(raw)))
	}
	events, good, prev, err := parseHistory(raw)
	if err != nil {
		return h, h.setAside(err)
	}
	if good < int64(len(raw)) {
		if err := durable.WriteFile(path, raw[:good], 0o640); err != nil {
			return nil, fmt.Errorf("drop the torn end of the history: %w", err)
		}
	}
	h.log, h.size, h.prev = events, good, prev
	return h, nil
}

// parseHistory reads lines as far as they are whole. good is the length of the whole lines, prev the hash of the last.
func parseHistory(raw []byte) (events []Event, good int64, prev string, err error) {
	r := bufio.NewReaderSize(bytes.NewReader(raw), maxHistoryLine)
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return events, good, prev, nil
		}
		if err != nil {
			return nil, 0, "", fmt.Errorf("line %d is too long", len(events)+1)
		}
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, 0, "", fmt.Errorf("line %d: %w", len(events)+1, err)
		}
		// The first line of a log may continue one that was set aside by size.
		if len(events) > 0 && e.Prev != prev {
			return nil, 0, "", fmt.Errorf("line %d does not follow from the one before it", len(events)+1)
		}
		events = append(events, e)
		good += int64(len(line))
		prev = lineHash(line)
	}
}

func lineHash(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

func (h *History) setAside(why error) error {
	aside := h.path + ".broken"
	if err := durable.Rename(h.path, aside); err != nil {
		return err
	}
	return fmt.Errorf("the history was damaged (%w); kept as %s, a new one is begun", why, filepath.Base(aside))
}

// Append makes e durable as the newest entry.
func (h *History) Append(e Event) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.size > maxHistory {
		if err := durable.Rename(h.path, h.path+".1"); err != nil {
			return fmt.Errorf("begin a new history: %w", err)
		}
		h.size, h.log = 0, nil
	}
	e.Prev = h.prev
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode an event: %w", err)
	}
	if len(line)+1 > maxHistoryLine {
		e.Detail = ""
		if line, err = json.Marshal(e); err != nil || len(line)+1 > maxHistoryLine {
			return fmt.Errorf("an event of %d bytes is too long to keep", len(line))
		}
	}
	line = append(line, '\n')
	if err := durable.Append(h.path, h.size, line, 0o640); err != nil {
		return fmt.Errorf("append to the history: %w", err)
	}
	h.size += int64(len(line))
	h.prev = lineHash(line)
	h.log = append(h.log, e)
	return nil
}

// Events returns the newest entries first, those of one device (id or name) when device is not empty, at most limit.
func (h *History) Events(device string, limit int) []Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []Event
	for i := len(h.log) - 1; i >= 0 && len(out) < limit; i-- {
		if e := h.log[i]; device == "" || e.Device == device || e.Name == device {
			out = append(out, e)
		}
	}
	return out
}
