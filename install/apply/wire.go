package apply

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"regexp"
	"sync"
	"time"
	"unicode"

	"meshupd/install"
	"meshupd/verify"
)

const (
	maxLine    = 4 << 10 // bytes of one line, both ways
	maxDetail  = 1 << 10 // bytes of an error's text
	beatEvery  = 5 * time.Second
	idleConn   = 5 * time.Second  // a connection without a request is closed
	lineTime   = 5 * time.Second  // from the first byte of a line to its last
	ackTime    = time.Minute      // for a client to take note of progress
	answerTime = 30 * time.Second // without any line of the server: it hangs
)

// request is the one line that a client sends. Release and Slot stand only where the verb takes them.
type request struct {
	Do      verb             `json:"do,omitempty"`
	Release *verify.Digest   `json:"release,omitempty"` // of write, learn and restore: ID of the manifest
	Slot    install.SlotName `json:"slot,omitempty"`    // of try and check
	Go      bool             `json:"go,omitempty"`      // the line that answers progress; nothing else is then set
}

type verb string

const (
	doState    verb = "state"
	doStart    verb = "start"
	doLearn    verb = "learn"
	doWrite    verb = "write"
	doTry      verb = "try"
	doRestart  verb = "restart"
	doCheck    verb = "check"
	doConfirm  verb = "confirm"
	doFallback verb = "fallback"
	doForget   verb = "forget"
	doRestore  verb = "restore"
)

// answer is one line of the server: a beat (nothing set), progress, or the last one with End.
type answer struct {
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`

	End       bool           `json:"end,omitempty"`
	State     *install.State `json:"state,omitempty"` // of state
	Code      verify.Code    `json:"code,omitempty"`
	Detail    string         `json:"detail,omitempty"` // set when it failed
	NeedBytes int64          `json:"need_bytes,omitempty"`
}

// parseRequest is strict: a field too many, or one that the verb does not take, is E-FORMAT.
func parseRequest(line []byte) (request, error) {
	var r request
	if err := decode(line, &r); err != nil {
		return request{}, err
	}
	if r.Go {
		if r != (request{Go: true}) {
			return request{}, verify.Refuse(verify.CodeFormat, "a request that also answers progress")
		}
		return r, nil
	}
	release, slot := false, false
	switch r.Do {
	case doState, doStart, doRestart, doConfirm, doFallback, doForget:
	case doWrite, doLearn, doRestore:
		release = true
	case doTry, doCheck:
		slot = true
	default:
		return request{}, verify.Refuse(verify.CodeFormat, "a request to do %.20q", string(r.Do))
	}
	if release != (r.Release != nil) || slot != (r.Slot != "") || r.Release != nil && r.Release.IsZero() {
		return request{}, verify.Refuse(verify.CodeFormat, "a request to %s with too much or too little", r.Do)
	}
	if slot && r.Slot != install.SlotA && r.Slot != install.SlotB {
		// As Slots.Try says it.
		return request{}, verify.Refuse(verify.CodeBoot, "%s slot %.8q: there is no such slot", r.Do, string(r.Slot))
	}
	return r, nil
}

var codePattern = regexp.MustCompile(`^E-[A-Z]+(-[A-Z]+)*$`)

// parseAnswer bounds what the client believes.
func parseAnswer(line []byte) (answer, error) {
	var a answer
	if err := decode(line, &a); err != nil {
		return answer{}, err
	}
	switch {
	case a.Done < 0 || a.Total < a.Done || a.NeedBytes < 0,
		len(a.Code) > 32 || a.Code != "" && (!codePattern.MatchString(string(a.Code)) || a.Detail == ""),
		!a.End && (a.State != nil || a.Code != "" || a.Detail != "" || a.NeedBytes != 0),
		a.End && a.Total != 0, a.State != nil && !plausible(a.State):
		return answer{}, verify.Refuse(verify.CodeFormat, "an answer that cannot be")
	}
	return a, nil
}

func plausible(s *install.State) bool {
	name := func(n install.SlotName, empty bool) bool {
		return n == install.SlotA || n == install.SlotB || empty && n == ""
	}
	if !name(s.Booted, false) || !name(s.Default, false) || !name(s.Trial, true) || !name(s.Failed, true) || s.Left < 0 || len(s.Slots) > 2 || len(s.Why) > maxDetail {
		return false
	}
	for n := range s.Slots {
		if !name(n, false) {
			return false
		}
	}
	if len(s.Kept) > install.MaxKept {
		return false
	}
	return s.Phase == install.PhaseSettled || s.Phase == install.PhaseArmed || s.Phase == install.PhaseTrial
}

func decode(line []byte, v any) error {
	if len(line) > maxLine {
		return verify.Refuse(verify.CodeSize, "a line of more than %d bytes", maxLine)
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return verify.Refuse(verify.CodeFormat, "read a line: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return verify.Refuse(verify.CodeFormat, "something follows the end of a line")
	}
	return nil
}

// failed is the last line for an error, nil for one that went well.
func failed(err error) answer {
	a := answer{End: true}
	if err == nil {
		return a
	}
	a.Code, a.Detail = verify.CodeOf(err), plain(err.Error())
	var r *verify.Refusal
	if errors.As(err, &r) {
		a.NeedBytes = max(0, r.NeedBytes)
	}
	return a
}

// plain makes a text fit for a line and a terminal; it is never empty.
func plain(s string) string {
	out := []byte(nil)
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			r = ' '
		}
		if len(out) > maxDetail {
			break
		}
		out = append(out, string(r)...)
	}
	if len(out) == 0 {
		return "failed"
	}
	return string(out)
}

// err is what a last line says.
func (a answer) err() error {
	switch {
	case a.Detail == "":
		return nil
	case a.Code == "":
		return errors.New(plain(a.Detail))
	}
	return &verify.Refusal{Code: a.Code, Detail: plain(a.Detail), NeedBytes: a.NeedBytes}
}

// lines reads and writes the lines of one connection. One goroutine reads, any may interrupt it.
type lines struct {
	conn net.Conn
	in   *bufio.Reader

	mu    sync.Mutex // owns the read deadline, and:
	held  bool       // reading is over until resume
	ended bool       // and for good
}

func newLines(c net.Conn) *lines { return &lines{conn: c, in: bufio.NewReaderSize(c, maxLine)} }

// past is a deadline that is over.
var past = time.Unix(1, 0)

func (l *lines) allow(d time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held || l.ended {
		return l.conn.SetReadDeadline(past)
	}
	return l.conn.SetReadDeadline(time.Now().Add(d))
}

// interrupt makes reads fail until resume, also one that waits; with forGood resume does nothing.
func (l *lines) interrupt(forGood bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held, l.ended = true, l.ended || forGood
	_ = l.conn.SetReadDeadline(past)
}

func (l *lines) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = false
}

// read waits for the first byte for at most wait, and then for the rest of the line for lineTime.
func (l *lines) read(wait time.Duration) ([]byte, error) {
	if err := l.allow(wait); err != nil {
		return nil, err
	}
	if _, err := l.in.Peek(1); err != nil {
		return nil, err
	}
	if err := l.allow(lineTime); err != nil {
		return nil, err
	}
	line, err := l.in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	return bytes.Clone(line), nil
}

func (l *lines) write(v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := l.conn.SetWriteDeadline(time.Now().Add(lineTime)); err != nil {
		return err
	}
	_, err = l.conn.Write(append(raw, '\n'))
	return err
}
