package control

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"time"

	"meshupd/verify"
)

// maxImports are open at once; the rest hear E-BUSY.
const maxImports = 4

// openImport is an Import with its place in the table.
type openImport struct {
	Import
	id    string
	owner uint32

	// Guarded by imports.mu.
	busy  bool // a call is in progress: calls on one import do not overlap
	ended bool
	timer *time.Timer
}

// imports is the table of open imports.
type imports struct {
	idle time.Duration

	mu      sync.Mutex // guards the fields below
	byID    map[string]*openImport
	opening int // places taken by imports that are still being opened
	closed  bool
}

func newImports(idle time.Duration) *imports {
	return &imports{idle: idle, byID: map[string]*openImport{}}
}

// reserve takes a place; the caller calls exactly one of add and unreserve.
func (t *imports) reserve() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return verify.Refuse(verify.CodeDaemon, "the daemon stops")
	}
	if len(t.byID)+t.opening >= maxImports {
		return verify.Refuse(verify.CodeBusy, "%d imports are open already", maxImports)
	}
	t.opening++
	return nil
}

func (t *imports) unreserve() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opening--
}

func (t *imports) add(imp Import, owner uint32) *openImport {
	o := &openImport{Import: imp, id: rand.Text(), owner: owner}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opening--
	t.byID[o.id] = o
	o.timer = time.AfterFunc(t.idle, func() { t.expire(o) })
	return o
}

// expire ends an import whose caller went away. One that has a call in progress
// is left: the body reader has its own deadline.
func (t *imports) expire(o *openImport) {
	t.mu.Lock()
	if o.busy || o.ended {
		t.mu.Unlock()
		return
	}
	o.ended = true
	delete(t.byID, o.id)
	t.mu.Unlock()
	o.Abort()
}

// take gives a caller its import for one call.
func (t *imports) take(id string, uid uint32) (*openImport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o, ok := t.byID[id]
	if !ok || (o.owner != uid && uid != 0) {
		return nil, verify.Refuse(verify.CodeNotFound, "no such import (it ends when nothing comes for %s)", t.idle)
	}
	if o.busy {
		return nil, verify.Refuse(verify.CodeBusy, "a call on this import is in progress")
	}
	o.busy = true
	o.timer.Stop()
	return o, nil
}

// give ends the call that take began; ended says that the import is over.
func (t *imports) give(o *openImport, ended bool) {
	t.mu.Lock()
	o.busy = false
	abort := t.closed && !ended
	if ended || abort {
		o.ended = true
		delete(t.byID, o.id)
	} else {
		o.timer.Reset(t.idle)
	}
	t.mu.Unlock()
	if abort {
		o.Abort()
	}
}

// abortAll ends what is open; an import with a call in progress ends with that call.
func (t *imports) abortAll() {
	t.mu.Lock()
	t.closed = true
	var left []*openImport
	for _, o := range t.byID {
		o.timer.Stop()
		if !o.busy {
			o.ended = true
			left = append(left, o)
			delete(t.byID, o.id)
		}
	}
	t.mu.Unlock()
	for _, o := range left {
		o.Abort()
	}
}

func (s *Server) postImport(w http.ResponseWriter, r *http.Request) error {
	who, err := s.authorize(r.Context())
	if err != nil {
		return err
	}
	if r.ContentLength < 0 || r.ContentLength > verify.MaxHead {
		return verify.Refuse(verify.CodeSize, "the head of a release has a length of at most %d bytes", verify.MaxHead)
	}
	if err := s.imports.reserve(); err != nil {
		return err
	}
	head, err := readHead(s.body(w, r), r.ContentLength)
	if err != nil {
		s.imports.unreserve()
		return bodyError(err)
	}
	imp, err := s.cfg.Backend.OpenImport(r.Context(), head, who)
	if err != nil {
		s.imports.unreserve()
		s.cfg.Log.Info("import refused", "by", who, "code", verify.CodeOf(err), "err", err)
		return err
	}
	o := s.imports.add(imp, who.UID)
	info := imp.Info()
	info.Schema, info.ID = ImportSchema, o.id
	s.cfg.Log.Info("import opened", "by", who, "version", info.Release.Version)
	return answer(w, info)
}

// readHead reads a head of exactly that many bytes.
func readHead(r io.Reader, length int64) (*verify.UnverifiedHead, error) {
	lr := &io.LimitedReader{R: r, N: length}
	head, err := verify.ReadHead(lr)
	if err != nil {
		return nil, err
	}
	if rest, err := io.Copy(io.Discard, lr); err != nil || rest > maxTarEnd {
		return nil, verify.Refuse(verify.CodeBundle, "bytes follow the head")
	}
	return head, nil
}

// maxTarEnd is what may follow the last entry of a head: the two zero blocks that end a tar, padded to a record.
const maxTarEnd = 10240

func (s *Server) putImage(w http.ResponseWriter, r *http.Request) error {
	sending, err := s.takeImage(w, r)
	if err == nil {
		return answer(w, struct{}{})
	}
	if !sending {
		return err
	}
	s.refuseEarly(w, r, err)
	return nil
}

// takeImage says with its error whether the caller was asked for the bytes before: it may then still be sending.
func (s *Server) takeImage(w http.ResponseWriter, r *http.Request) (sending bool, err error) {
	who, err := s.authorize(r.Context())
	if err != nil {
		return false, err
	}
	digest, err := verify.ParseDigest(r.PathValue("sha256"))
	if err != nil {
		return false, err
	}
	o, err := s.imports.take(r.PathValue("id"), who.UID)
	if err != nil {
		return false, err
	}
	defer s.imports.give(o, false)
	img, err := imageOf(o.Info(), digest)
	if err != nil {
		return false, err
	}
	if r.ContentLength != img.Size {
		return false, verify.Refuse(verify.CodeSize, "image %s has %d bytes, %d were announced", img.Name, img.Size, r.ContentLength)
	}
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
		return false, fmt.Errorf("take an image: %w", err)
	}
	return true, bodyError(o.Put(r.Context(), digest, s.body(w, r)))
}

// refuseEarly answers a caller that is still sending, and takes what it sends until it has read the answer and stops: who
// writes to a connection that is closed learns of a broken pipe, and not of the full disk that was the reason.
func (s *Server) refuseEarly(w http.ResponseWriter, r *http.Request, err error) {
	s.refuse(w, r, err)
	ctl := http.NewResponseController(w)
	if ctl.Flush() != nil || ctl.SetReadDeadline(time.Now().Add(stopTimeout)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, r.Body)
}

func imageOf(info ImportInfo, digest verify.Digest) (ImportImage, error) {
	for _, img := range info.Images {
		if img.Digest == digest {
			return img, nil
		}
	}
	return ImportImage{}, verify.Refuse(verify.CodeBundle, "the release has no image %s", digest)
}

func (s *Server) postCommit(w http.ResponseWriter, r *http.Request) error {
	who, err := s.authorize(r.Context())
	if err != nil {
		return err
	}
	o, err := s.imports.take(r.PathValue("id"), who.UID)
	if err != nil {
		return err
	}
	if err := o.Commit(r.Context()); err != nil {
		s.imports.give(o, false)
		return err
	}
	s.imports.give(o, true)
	s.cfg.Log.Info("import done", "by", who, "version", o.Info().Release.Version)
	return answer(w, struct{}{})
}

func (s *Server) deleteImport(w http.ResponseWriter, r *http.Request) error {
	who, err := s.authorize(r.Context())
	if err != nil {
		return err
	}
	o, err := s.imports.take(r.PathValue("id"), who.UID)
	if err != nil {
		return err
	}
	s.imports.give(o, true)
	o.Abort()
	return answer(w, struct{}{})
}

func (s *Server) body(w http.ResponseWriter, r *http.Request) io.Reader {
	return &bodyReader{body: r.Body, ctl: http.NewResponseController(w), idle: bodyIdleTimeout}
}

// bodyError names a body that stopped coming; other errors stay as they are.
func bodyError(err error) error {
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return verify.Refuse(verify.CodeTimeout, "no bytes came for %s: %w", bodyIdleTimeout, err)
	case errors.Is(err, context.Canceled), errors.Is(err, io.ErrUnexpectedEOF) && verify.CodeOf(err) == "":
		return verify.Refuse(verify.CodeTruncated, "the bytes stopped coming: %w", err)
	}
	return err
}
