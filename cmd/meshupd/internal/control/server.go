package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"meshupd/verify"
)

// Times and sizes that bound what one caller can hold of the daemon.
const (
	headerTimeout   = 10 * time.Second
	idleTimeout     = 60 * time.Second
	answerTimeout   = 30 * time.Second // to take an answer
	stopTimeout     = 5 * time.Second  // to stop sending after a refusal
	bodyIdleTimeout = 30 * time.Second // between two reads of a body
	longPoll        = 25 * time.Second
	maxLongPolls    = 64
	maxHistory      = 10000
	maxDeviceName   = 256
)

// ServerConfig of a Server.
type ServerConfig struct {
	Backend Backend
	Version VersionInfo
	Group   string       // may act besides root and the daemon's user; "" means "meshupd"
	Log     *slog.Logger // nil discards
	// ImportIdle ends an import whose caller says nothing for that long; 0 means 30 s.
	ImportIdle time.Duration
}

// Server answers on the control socket.
type Server struct {
	cfg     ServerConfig
	imports *imports
	polls   chan struct{} // a place for each long-poll

	mu      sync.Mutex // guards the fields below
	gen     uint64
	changed chan struct{} // closed and replaced when gen rises
}

// NewServer prepares a server; Serve runs it.
func NewServer(cfg ServerConfig) *Server {
	if cfg.Group == "" {
		cfg.Group = "meshupd"
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.ImportIdle == 0 {
		cfg.ImportIdle = 30 * time.Second
	}
	return &Server{cfg: cfg, imports: newImports(cfg.ImportIdle), polls: make(chan struct{}, maxLongPolls), gen: 1,
		changed: make(chan struct{})}
}

// Serve answers on ln until ctx ends, then aborts open imports and closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	// Requests end with the server, so that a long-poll or a copy does not hold a stop up.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hs := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    16 << 10,
		ConnContext:       withCaller,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	var wg sync.WaitGroup
	wg.Go(func() { s.follow(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		stop, done := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer done()
		if hs.Shutdown(stop) != nil {
			_ = hs.Close()
		}
	})
	err := hs.Serve(ln)
	cancel()
	wg.Wait()
	s.imports.abortAll()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve the control socket: %w", err)
}

// follow turns the backend's changes into generations.
func (s *Server) follow(ctx context.Context) {
	changes := s.cfg.Backend.Watch(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-changes:
			if !ok {
				return
			}
		}
		s.mu.Lock()
		s.gen++
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
	}
}

func (s *Server) generation() (uint64, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gen, s.changed
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(http.ResponseWriter, *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			// The deadline of the answer before this one on the same connection is over.
			_ = http.NewResponseController(w).SetWriteDeadline(time.Time{})
			if err := h(w, r); err != nil {
				s.refuse(w, r, err)
			}
		})
	}
	handle("GET /v1/version", s.getVersion)
	handle("GET /v1/status", s.getStatus)
	handle("GET /v1/history", s.getHistory)
	handle("POST /v1/rollback", s.postRollback)
	handle("POST /v1/imports", s.postImport)
	handle("PUT /v1/imports/{id}/images/{sha256}", s.putImage)
	handle("POST /v1/imports/{id}/commit", s.postCommit)
	handle("DELETE /v1/imports/{id}", s.deleteImport)
	handle("/", func(_ http.ResponseWriter, r *http.Request) error {
		return verify.Refuse(verify.CodeNotFound, "no such call: %s %q", r.Method, r.URL.Path)
	})
	return mux
}

func (s *Server) getVersion(w http.ResponseWriter, _ *http.Request) error {
	v := s.cfg.Version
	v.Schema = VersionSchema
	return answer(w, v)
}

func (s *Server) getStatus(w http.ResponseWriter, r *http.Request) error {
	after, err := parseWait(r.URL.Query())
	if err != nil {
		return err
	}
	gen, changed := s.generation()
	if after != 0 && gen == after {
		select {
		case s.polls <- struct{}{}:
			defer func() { <-s.polls }()
		default:
			return verify.Refuse(verify.CodeBusy, "%d callers are waiting already", maxLongPolls)
		}
		timer := time.NewTimer(longPoll)
		defer timer.Stop()
		select {
		case <-changed:
		case <-timer.C:
		case <-r.Context().Done():
			return r.Context().Err()
		}
		gen, _ = s.generation()
	}
	st, err := s.cfg.Backend.Status(r.Context())
	if err != nil {
		return err
	}
	st.Schema, st.Generation = StatusSchema, gen
	if st.Counts == nil {
		st.Counts = map[State]int{}
		for _, d := range st.Devices {
			st.Counts[d.State]++
		}
	}
	if st.Devices == nil {
		st.Devices = []DeviceStatus{}
	}
	return answer(w, st)
}

func (s *Server) getHistory(w http.ResponseWriter, r *http.Request) error {
	device, limit, err := parseHistory(r.URL.Query())
	if err != nil {
		return err
	}
	events, err := s.cfg.Backend.History(r.Context(), device, limit)
	if err != nil {
		return err
	}
	if events == nil {
		events = []Event{}
	}
	return answer(w, History{Schema: HistorySchema, Events: events[:min(limit, len(events))]})
}

func (s *Server) postRollback(w http.ResponseWriter, r *http.Request) error {
	who, err := s.authorize(r.Context())
	if err != nil {
		return err
	}
	to := r.URL.Query().Get("to")
	if len(to) > maxDeviceName {
		return verify.Refuse(verify.CodeUsage, "the version is longer than %d bytes", maxDeviceName)
	}
	if err := s.cfg.Backend.Rollback(r.Context(), who, to); err != nil {
		return err
	}
	s.cfg.Log.Info("rollback asked", "by", who, "to", to)
	return answer(w, struct{}{})
}

// parseWait reads ?wait=: answer only when the generation is another one. 0 is no wait.
func parseWait(q url.Values) (uint64, error) {
	v := q.Get("wait")
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		return 0, verify.Refuse(verify.CodeUsage, "wait is not a number: %q", v)
	}
	return n, nil
}

// parseHistory reads ?device= and ?limit=.
func parseHistory(q url.Values) (device string, limit int, err error) {
	device = q.Get("device")
	if len(device) > maxDeviceName {
		return "", 0, verify.Refuse(verify.CodeUsage, "the device name is longer than %d bytes", maxDeviceName)
	}
	limit = 100
	if v := q.Get("limit"); v != "" {
		limit, err = strconv.Atoi(v)
		if err != nil || limit < 1 || limit > maxHistory {
			return "", 0, verify.Refuse(verify.CodeUsage, "limit is not a number from 1 to %d: %q", maxHistory, v)
		}
	}
	return device, limit, nil
}

// takeAnswer gives the caller its time to take the answer, however long that took to find.
func takeAnswer(w http.ResponseWriter) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout))
	w.Header().Set("Content-Type", "application/json")
}

// answer writes v as JSON, and never half of it.
func answer(w http.ResponseWriter, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	takeAnswer(w)
	_, _ = w.Write(append(body, '\n'))
	return nil
}

// refuse sends an error with its code.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		err = verify.Refuse(verify.CodeDaemon, "the daemon stops")
	}
	body := errorBody{Schema: ErrorSchema, Error: wireError{Code: verify.CodeOf(err), Detail: err.Error()}}
	var refusal *verify.Refusal
	if errors.As(err, &refusal) {
		body.Error.NeedBytes = refusal.NeedBytes
	}
	s.cfg.Log.Debug("call refused", "method", r.Method, "path", r.URL.Path, "code", body.Error.Code, "err", err)
	raw, err := json.Marshal(body)
	if err != nil { // not with these types
		s.cfg.Log.Error("write a refusal", "err", err)
		return
	}
	takeAnswer(w)
	// With its length an answer is whole for the caller before the call ends.
	w.Header().Set("Content-Length", strconv.Itoa(len(raw)+1))
	w.WriteHeader(httpStatus(body.Error.Code))
	_, _ = w.Write(append(raw, '\n'))
}

// httpStatus is for people with curl; the client goes by the code in the body.
func httpStatus(code verify.Code) int {
	switch code {
	case "":
		return http.StatusInternalServerError
	case verify.CodePermission:
		return http.StatusForbidden
	case verify.CodeNotFound:
		return http.StatusNotFound
	case verify.CodeBusy:
		return http.StatusConflict
	case verify.CodeUsage:
		return http.StatusBadRequest
	case verify.CodeSpace:
		return http.StatusInsufficientStorage
	case verify.CodeTimeout:
		return http.StatusRequestTimeout
	case verify.CodeDaemon:
		return http.StatusServiceUnavailable
	}
	return http.StatusUnprocessableEntity
}

// bodyReader reads a request body as long as it keeps coming: the deadline moves
// with every read, so a large image takes its time and a stalled caller does not.
type bodyReader struct {
	body io.Reader
	ctl  *http.ResponseController
	idle time.Duration
}

func (b *bodyReader) Read(p []byte) (int, error) {
	_ = b.ctl.SetReadDeadline(time.Now().Add(b.idle))
	return b.body.Read(p)
}
