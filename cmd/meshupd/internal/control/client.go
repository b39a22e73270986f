package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"meshupd/verify"
)

// maxAnswer bounds what is read of an answer: a site of thousands of devices fits.
const maxAnswer = 64 << 20

// Client talks to a daemon. Errors of the daemon come back as *verify.Refusal with their code.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient prepares a client; it connects with the first call.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: dial,
		// An image is sent only after the daemon said that it wants it.
		ExpectContinueTimeout: time.Minute,
		DisableCompression:    true,
		MaxIdleConns:          2,
	}}}
}

// Close frees idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Version asks which build runs the daemon.
func (c *Client) Version(ctx context.Context) (VersionInfo, error) {
	var v VersionInfo
	return v, c.call(ctx, http.MethodGet, "/v1/version", nil, 0, &v)
}

// Status asks for the site's state. With after not 0 it waits some seconds for a
// generation other than that and then answers in any case.
func (c *Client) Status(ctx context.Context, after uint64) (SiteStatus, error) {
	path := "/v1/status"
	if after != 0 {
		path += "?wait=" + strconv.FormatUint(after, 10)
	}
	var st SiteStatus
	return st, c.call(ctx, http.MethodGet, path, nil, 0, &st)
}

// History asks for the newest events.
func (c *Client) History(ctx context.Context, device string, limit int) (History, error) {
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	if device != "" {
		q.Set("device", device)
	}
	var h History
	return h, c.call(ctx, http.MethodGet, "/v1/history?"+q.Encode(), nil, 0, &h)
}

// Rollback asks for the version before, or for one that is kept, by its name.
func (c *Client) Rollback(ctx context.Context, to string) error {
	path := "/v1/rollback"
	if to != "" {
		path += "?to=" + url.QueryEscape(to)
	}
	return c.call(ctx, http.MethodPost, path, nil, 0, nil)
}

// OpenImport shows a head to the daemon.
func (c *Client) OpenImport(ctx context.Context, head []byte) (ImportInfo, error) {
	var info ImportInfo
	return info, c.call(ctx, http.MethodPost, "/v1/imports", bytes.NewReader(head), int64(len(head)), &info)
}

// Put sends an image of exactly size bytes.
func (c *Client) Put(ctx context.Context, id string, img ImportImage, r io.Reader) error {
	path := "/v1/imports/" + url.PathEscape(id) + "/images/" + img.Digest.String()
	return c.call(ctx, http.MethodPut, path, r, img.Size, nil)
}

// Commit ends an import: the release is accepted and offered.
func (c *Client) Commit(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodPost, "/v1/imports/"+url.PathEscape(id)+"/commit", nil, 0, nil)
}

// Abort gives an import up.
func (c *Client) Abort(ctx context.Context, id string) error {
	return c.call(ctx, http.MethodDelete, "/v1/imports/"+url.PathEscape(id), nil, 0, nil)
}

// sourceReader remembers that the caller's own reader failed: then that is the
// error to tell, not the broken request that follows from it.
type sourceReader struct {
	io.Reader
	err atomic.Pointer[error] // the transport may still read when the call returns
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if err != nil && err != io.EOF {
		s.err.Store(&err)
	}
	return n, err
}

func (c *Client) call(ctx context.Context, method, path string, body io.Reader, size int64, out any) error {
	var src *sourceReader
	if body != nil {
		src = &sourceReader{Reader: io.LimitReader(body, size)}
		body = io.NopCloser(src)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://meshupd"+path, body)
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	if body != nil {
		req.ContentLength = size
		req.Header.Set("Expect", "100-continue")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if src != nil {
			if failed := src.err.Load(); failed != nil {
				return *failed
			}
		}
		return c.dialError(ctx, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return c.dialError(ctx, err)
	}
	if resp.StatusCode != http.StatusOK {
		return parseError(resp.StatusCode, raw)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return verify.Refuse(verify.CodeDaemon, "the answer on %s is not from this kind of daemon: %w", c.socket, err)
	}
	return nil
}

// dialError words a daemon that is not there.
func (c *Client) dialError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return verify.Refuse(verify.CodeDaemon, "the daemon does not run (nothing answers on %s)", c.socket)
	case errors.Is(err, fs.ErrPermission):
		return verify.Refuse(verify.CodePermission, "the socket %s may not be opened", c.socket)
	}
	return verify.Refuse(verify.CodeDaemon, "the daemon stopped answering on %s: %w", c.socket, err)
}

var codePattern = regexp.MustCompile(`^E-[A-Z]+(-[A-Z]+)*$`)

// parseError turns an error body into the Refusal that the daemon meant.
func parseError(status int, raw []byte) error {
	var body errorBody
	if err := json.Unmarshal(raw, &body); err != nil || body.Error.Detail == "" {
		return verify.Refuse(verify.CodeDaemon, "the daemon answered with status %d and no reason", status)
	}
	code := body.Error.Code
	if len(code) > 32 || !codePattern.MatchString(string(code)) {
		return errors.New(body.Error.Detail)
	}
	return &verify.Refusal{Code: code, Detail: body.Error.Detail, NeedBytes: body.Error.NeedBytes}
}
