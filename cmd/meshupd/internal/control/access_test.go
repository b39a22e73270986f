package control

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"meshupd/verify"
)

func TestMayAct(t *testing.T) {
	const own, group = 500, 600
	for _, tt := range []struct {
		name   string
		caller caller
		have   bool
		want   bool
	}{
		{"root", caller{who: Who{UID: 0, GID: 0}}, true, true},
		{"the daemon's user", caller{who: Who{UID: own, GID: 1}}, true, true},
		{"first group", caller{who: Who{UID: 1000, GID: group}}, true, true},
		{"further group", caller{who: Who{UID: 1000, GID: 1000}, groups: []uint32{4, group}}, true, true},
		{"nobody", caller{who: Who{UID: 1000, GID: 1000}, groups: []uint32{4, 24}}, true, false},
		{"no such group on the system", caller{who: Who{UID: 1000, GID: 0}, groups: []uint32{0}}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := mayAct(tt.caller, own, group, tt.have); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// All that changes something is closed to a stranger, and all that reads is open.
func TestStrangersOnlyRead(t *testing.T) {
	s := NewServer(ServerConfig{Backend: nobody{}, Group: "no-such-group-here"})
	stranger := context.WithValue(t.Context(), callerKey{}, caller{who: Who{UID: 4_000_000_000, GID: 4_000_000_000}})
	zero := strings.Repeat("0", 64)
	for _, call := range []struct {
		method, path string
		want         int
	}{
		{"POST", "/v1/imports", http.StatusForbidden},
		{"PUT", "/v1/imports/x/images/" + zero, http.StatusForbidden},
		{"POST", "/v1/imports/x/commit", http.StatusForbidden},
		{"DELETE", "/v1/imports/x", http.StatusForbidden},
		{"POST", "/v1/rollback", http.StatusForbidden},
		{"GET", "/v1/status", http.StatusOK},
		{"GET", "/v1/history", http.StatusOK},
		{"GET", "/v1/version", http.StatusOK},
	} {
		for name, ctx := range map[string]context.Context{"stranger": stranger, "nameless": t.Context()} {
			w := httptest.NewRecorder()
			s.routes().ServeHTTP(w, httptest.NewRequestWithContext(ctx, call.method, call.path, nil))
			if w.Code != call.want {
				t.Errorf("%s %s as %s: status %d, want %d", call.method, call.path, name, w.Code, call.want)
			}
			if call.want == http.StatusForbidden && !strings.Contains(w.Body.String(), string(verify.CodePermission)) {
				t.Errorf("%s %s: %s", call.method, call.path, w.Body)
			}
		}
	}
}

// nobody is a backend without a site.
type nobody struct{}

func (nobody) Status(context.Context) (SiteStatus, error)            { return SiteStatus{}, nil }
func (nobody) History(context.Context, string, int) ([]Event, error) { return nil, nil }
func (nobody) Watch(context.Context) <-chan struct{}                 { return nil }
func (nobody) Rollback(context.Context, Who, string) error           { return nil }
func (nobody) OpenImport(context.Context, *verify.UnverifiedHead, Who) (Import, error) {
	return nil, verify.Refuse(verify.CodeSigKey, "nobody is trusted")
}

// No request, whatever it holds, gets more than a coded answer.
func FuzzRequest(f *testing.F) {
	f.Add("GET", "/v1/status?wait=1", "")
	f.Add("GET", "/v1/status?wait=18446744073709551616", "")
	f.Add("GET", "/v1/history?device=x&limit=-1", "")
	f.Add("POST", "/v1/imports", "trust.1.json")
	f.Add("PUT", "/v1/imports/x/images/"+strings.Repeat("a", 64), "image")
	f.Add("PUT", "/v1/imports/../images/zz", "")
	f.Add("DELETE", "/v1/imports/%2e%2e", "")
	f.Add("BREW", "/", "tea")
	root := context.WithValue(context.Background(), callerKey{}, caller{})
	f.Fuzz(func(t *testing.T, method, target, body string) {
		u, err := url.ParseRequestURI(target)
		if err != nil || strings.Contains(target, "wait=1") {
			return // waits for a change, as it should
		}
		r, err := http.NewRequestWithContext(root, method, "http://x/", strings.NewReader(body))
		if err != nil {
			return
		}
		r.URL = u
		w := httptest.NewRecorder()
		NewServer(ServerConfig{Backend: nobody{}}).routes().ServeHTTP(w, r)
		if w.Code == http.StatusInternalServerError {
			t.Errorf("%s %s: %s", method, target, w.Body)
		}
	})
}

// No answer makes the client do more than return an error with a sound code.
func FuzzErrorBody(f *testing.F) {
	f.Add(500, `{"error":{"code":"E-IO","detail":"x"}}`)
	f.Add(422, `{"error":{"code":"\u001b[2J","detail":"x"}}`)
	f.Add(422, `{"error":{"code":"E-SPACE","detail":"x","need_bytes":1e99}}`)
	f.Add(404, `<html>`)
	f.Fuzz(func(t *testing.T, status int, raw string) {
		err := parseError(status, []byte(raw))
		if err == nil {
			t.Fatal("no error")
		}
		if code := verify.CodeOf(err); code != "" && !codePattern.MatchString(string(code)) {
			t.Errorf("code %q", code)
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("wait=3&device=a&limit=5")
	f.Add("limit=%zz")
	f.Add("wait=&limit=10001")
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := url.ParseQuery(raw)
		if err != nil {
			return
		}
		if _, err := parseWait(q); err != nil && verify.CodeOf(err) != verify.CodeUsage {
			t.Error(err)
		}
		device, limit, err := parseHistory(q)
		if err != nil && verify.CodeOf(err) != verify.CodeUsage {
			t.Error(err)
		}
		if err == nil && (limit < 1 || limit > maxHistory || len(device) > maxDeviceName) {
			t.Errorf("device of %d bytes, limit %d", len(device), limit)
		}
	})
}
