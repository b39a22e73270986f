package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"meshupd/cmd/meshupd/internal/screen"
)

// meter shows how far a copy is: a bar that is redrawn on a terminal, else one
// line for each tenth or half minute. It counts what is written to it.
type meter struct {
	w     io.Writer
	label string
	total int64
	mode  string // "bar", "lines" or "none"
	width int
	now   func() time.Time

	mu    sync.Mutex // guards the fields below: writes come from the transport's goroutine
	began time.Time
	drawn time.Time
	done  int64
	tenth int64
}

func newMeter(e *env, progress, label string, total int64) *meter {
	m := &meter{w: e.Err, label: label, total: total, mode: "lines", width: e.canvas(e.Err).Width, now: e.now}
	switch {
	case progress == "none" || e.quiet:
		m.mode = "none"
	case progress == "auto" && e.live(e.Err):
		m.mode = "bar"
	}
	m.began = m.now()
	m.drawn = m.began
	return m
}

// Write counts the bytes of p.
func (m *meter) Write(p []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.move(m.done + int64(len(p)))
	return len(p), nil
}

// set says how many bytes are done.
func (m *meter) set(done int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.move(done)
}

func (m *meter) move(done int64) {
	m.done = done
	now := m.now()
	switch m.mode {
	case "bar":
		if now.Sub(m.drawn) >= 100*time.Millisecond {
			m.draw(now)
		}
	case "lines":
		tenth := m.done * 10 / max(m.total, 1)
		if m.done < m.total && (tenth > m.tenth || now.Sub(m.drawn) >= 30*time.Second) {
			m.tenth, m.drawn = tenth, now
			fmt.Fprintln(m.w, m.text(now))
		}
	}
}

func (m *meter) draw(now time.Time) {
	m.drawn = now
	text := m.text(now)
	barWidth := min(40, m.width-len(m.label)-len(text)-5)
	if barWidth >= 8 {
		text = m.label + screen.Bar(m.done, m.total, barWidth) + " " + strings.TrimPrefix(text, m.label)
	}
	if len(text) > m.width-1 {
		text = text[:max(m.width-1, 0)]
	}
	fmt.Fprintf(m.w, "\r%s\x1b[K", text)
}

// text is "Copy      320 of 642 MiB  50 %  31 MiB/s  10 s left".
func (m *meter) text(now time.Time) string {
	text := fmt.Sprintf("%s%s of %s  %s", m.label, screen.Bytes(m.done), screen.Bytes(m.total), screen.Percent(m.done, m.total))
	spent := now.Sub(m.began)
	if spent < 500*time.Millisecond || m.done == 0 {
		return text
	}
	rate := float64(m.done) / spent.Seconds()
	text += "  " + screen.Rate(rate)
	if m.done < m.total {
		text += "  " + screen.Span(time.Duration(float64(m.total-m.done)/rate*float64(time.Second))) + " left"
	}
	return text
}

// end draws the last state.
func (m *meter) end(ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ok && m.mode == "lines" {
		fmt.Fprintln(m.w, m.text(m.now()))
	}
	if m.mode == "bar" {
		m.draw(m.now())
		fmt.Fprintln(m.w)
	}
}
