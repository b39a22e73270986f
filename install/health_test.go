package install

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"meshupd/verify"
)

// quick gives up early, so that a failing check costs no time.
func quick(h Health) Health {
	h.Deadline, h.Interval, h.Timeout, h.Retries = time.Minute, time.Millisecond, 2*time.Second, 1
	return h
}

func TestHealthNamesTheCheckThatFails(t *testing.T) {
	var asked atomic.Int32
	far := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer far.Close()
	mux := http.NewServeMux()
	mux.HandleFunc("/good", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "fine") })
	mux.HandleFunc("/bad", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no paper\x1b[31m", http.StatusServiceUnavailable)
	})
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, far.URL, http.StatusFound) })
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	here := httptest.NewServer(mux)
	defer here.Close()

	dir := t.TempDir()
	beat := filepath.Join(dir, "beat")
	if err := os.WriteFile(beat, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// What systemctl says is believed by its exit code; the word it prints is the reason.
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	script := "#!/bin/sh\ncase $3 in up.service) echo active; exit 0;; *) echo failed; exit 3;; esac\n"
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		name, want string // "": healthy
		health     Health
	}{
		{"all good", "", Health{Command: sh("exit 0"), HTTP: []string{here.URL + "/good"}, Units: []string{"up.service"}, Files: []string{beat}, Fresh: time.Hour}},
		{"a command", "command /bin/sh: exit status 1: stuck", Health{Command: []string{"/bin/sh", "-c", "echo stuck >&2; exit 1"}, HTTP: []string{here.URL + "/good"}}},
		{"a status", "http " + here.URL + "/bad: 503 Service Unavailable: no paper[31m", Health{HTTP: []string{here.URL + "/good", here.URL + "/bad"}}},
		{"a redirect", "http " + here.URL + "/away: 302 Found", Health{HTTP: []string{here.URL + "/away"}}},
		{"an endless body", "", Health{HTTP: []string{here.URL + "/endless"}}},
		{"nobody there", "connection refused", Health{HTTP: []string{"http://127.0.0.1:1/"}}},
		{"another machine", "192.0.2.1 is not an address of this machine", Health{HTTP: []string{"http://192.0.2.1/"}}},
		{"a unit", "unit down.service: failed", Health{Units: []string{"up.service", "down.service"}}},
		{"no file", "file " + beat + ".no: no such file or directory", Health{Files: []string{beat + ".no"}}},
		{"a folder", "file " + dir + ": it is no regular file", Health{Files: []string{dir}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := quick(c.health).Check(t.Context())
			if c.want == "" && err == nil {
				return
			}
			if c.want == "" || verify.CodeOf(err) != verify.CodeHealth || !strings.HasSuffix(err.Error(), c.want) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
		})
	}
	if asked.Load() != 0 {
		t.Error("a redirect was followed")
	}
	if err := probeFile(beat, time.Minute, time.Now().Add(time.Hour)); err == nil || !strings.HasPrefix(err.Error(), "not changed for 1h0m") {
		t.Errorf("a stale file: %v", err)
	}
	if err := probeFile(beat, time.Minute, time.Now().Add(-time.Hour)); err == nil {
		t.Error("a file from a time ahead of the clock counts as fresh")
	}
}

// The rounds: how many good ones in a row are wanted, how many bad ones are borne.
func TestHealthCountsRounds(t *testing.T) {
	for _, c := range []struct {
		name            string
		answers         string // one for each round; the last is repeated
		passes, retries int
		rounds          int
		want            string
	}{
		{"the first good one is enough", "g", 1, 0, 1, ""},
		{"three in a row", "ggbggg", 3, 0, 6, ""},
		{"given up after two", "bbbb", 1, 1, 2, "not healthy in 2 rounds"},
		{"a good one between does not forgive", "bgbg", 2, 1, 3, "not healthy in 2 rounds"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := 0
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if c.answers[min(n, len(c.answers)-1)] == 'b' {
					w.WriteHeader(http.StatusInternalServerError)
				}
				n++
			}))
			defer srv.Close()
			err := Health{HTTP: []string{srv.URL}, Deadline: time.Minute, Interval: time.Millisecond, Passes: c.passes, Retries: c.retries}.Check(t.Context())
			if (err == nil) != (c.want == "") || err != nil && !strings.HasPrefix(err.Error(), c.want) || n != c.rounds {
				t.Fatalf("got %v after %d rounds, want %q after %d", err, n, c.want, c.rounds)
			}
		})
	}
	synctest.Test(t, func(t *testing.T) { // a busy machine must not make a round the one that runs out of time
		err := Health{Files: []string{"/proc/self/exe"}, Deadline: time.Minute, Interval: time.Second, Passes: 1000}.Check(t.Context())
		if verify.CodeOf(err) != verify.CodeHealth || !strings.Contains(err.Error(), "of the 1000 good rounds") {
			t.Errorf("too few good rounds by the deadline: %v", err)
		}
	})
}

func TestGraceEndsWithTheDaemon(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (Health{Grace: time.Hour}).Check(ctx); !errors.Is(err, context.Canceled) || verify.CodeOf(err) != "" {
		t.Errorf("got %v", err)
	}
}
