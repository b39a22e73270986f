// Package controltest is a daemon without devices: it answers the control socket
// from a scenario, with the real door for imports. Tests of the commands and of
// the socket run against it.
package controltest

import (
	"context"
	"crypto/sha256"
	"io"
	"sync"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/verify"
)

// Scenario says what a Backend answers.
type Scenario struct {
	// Statuses are answered one after the other: each Step moves on, the last stays.
	Statuses []control.SiteStatus `json:"statuses"`
	History  []control.Event      `json:"history"`
	// Anchor is a trust folder; without one every import is refused.
	Anchor string        `json:"anchor"`
	Device verify.Device `json:"device"`
	// Free is how many bytes the store takes; 0 is no limit.
	Free int64 `json:"free"`
	// Refuse is the error of a rollback.
	Refuse *control.Reason `json:"refuse"`
}

// Backend implements control.Backend.
type Backend struct {
	scenario Scenario
	door     *verify.Door

	mu      sync.Mutex // guards the fields below
	step    int
	held    map[verify.Digest]bool
	calls   []string
	watcher chan struct{}
	newest  *verify.Release // that was committed
	// Aborted tells each import that was given up.
	Aborted chan string
}

// New makes a backend that keeps the door's state in dir.
func New(s Scenario, dir string) (*Backend, error) {
	b := &Backend{scenario: s, held: map[verify.Digest]bool{}, watcher: make(chan struct{}, 1), Aborted: make(chan string, 16)}
	if s.Anchor != "" {
		door, err := verify.OpenDoor(verify.DoorConfig{Dir: dir, Anchor: s.Anchor, Product: s.Device.Product})
		if err != nil {
			return nil, err
		}
		b.door = door
	}
	return b, nil
}

// Step moves to the next status and wakes the watchers.
func (b *Backend) Step() {
	b.mu.Lock()
	b.step = min(b.step+1, max(len(b.scenario.Statuses)-1, 0))
	b.mu.Unlock()
	select {
	case b.watcher <- struct{}{}:
	default:
	}
}

// Calls lists what was asked to be done.
func (b *Backend) Calls() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string{}, b.calls...)
}

func (b *Backend) note(call string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.calls = append(b.calls, call)
}

// Status implements control.Viewer.
func (b *Backend) Status(context.Context) (control.SiteStatus, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.scenario.Statuses) == 0 {
		return control.SiteStatus{}, nil
	}
	return b.scenario.Statuses[b.step], nil
}

// History implements control.Viewer.
func (b *Backend) History(_ context.Context, device string, limit int) ([]control.Event, error) {
	for _, st := range b.scenario.Statuses {
		for _, d := range st.Devices {
			if d.ID == device {
				device = d.Name
			}
		}
	}
	var out []control.Event
	for _, ev := range b.scenario.History {
		if (device == "" || ev.Device == device) && len(out) < limit {
			out = append(out, ev)
		}
	}
	return out, nil
}

// Watch implements control.Viewer.
func (b *Backend) Watch(context.Context) <-chan struct{} { return b.watcher }

// Rollback implements control.Actor.
func (b *Backend) Rollback(_ context.Context, by control.Who, to string) error {
	if r := b.scenario.Refuse; r != nil {
		return verify.Refuse(r.Code, "%s", r.Detail)
	}
	if to != "" {
		to = " to " + to
	}
	b.note("rollback by " + by.String() + to)
	return nil
}

// OpenImport implements control.Actor.
func (b *Backend) OpenImport(ctx context.Context, head *verify.UnverifiedHead, _ control.Who) (control.Import, error) {
	if b.door == nil {
		return nil, verify.Refuse(verify.CodeSigKey, "not signed by a key this device trusts")
	}
	rel, err := b.door.Check(ctx, head)
	if err != nil {
		return nil, err
	}
	if err := rel.Fits(b.scenario.Device); err != nil {
		return nil, err
	}
	if err := b.order(rel); err != nil {
		return nil, err
	}
	imp := &importing{b: b, rel: rel}
	var need int64
	for _, img := range imp.Info().Images {
		if !img.Have {
			need += img.Size
		}
	}
	if b.scenario.Free > 0 && need > b.scenario.Free {
		return nil, &verify.Refusal{Code: verify.CodeSpace, Detail: "the store is too small", NeedBytes: need - b.scenario.Free}
	}
	return imp, nil
}

// order refuses what is older than the newest, unless that leads through it.
func (b *Backend) order(rel *verify.Release) error {
	b.mu.Lock()
	newest := b.newest
	b.mu.Unlock()
	if newest == nil || rel.Compare(newest) >= 0 {
		return nil
	}
	return b.door.AllowVia(newest, rel, func(verify.Digest) (verify.Manifest, bool) { return verify.Manifest{}, false })
}

type importing struct {
	b   *Backend
	rel *verify.Release
}

// Info implements control.Import.
func (i *importing) Info() control.ImportInfo {
	m := i.rel.Manifest()
	info := control.ImportInfo{Release: control.SiteRelease{ID: i.rel.ID(), Product: m.Product, Version: m.Version,
		Channel: m.Channel, Line: m.Line, Seq: m.Seq, Signer: i.rel.Signers()[0].Name, SignerFpr: i.rel.Signers()[0].Fingerprint}}
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	for _, img := range m.Images {
		info.Images = append(info.Images, control.ImportImage{Name: img.Name, Digest: img.SHA256, Size: img.Size, Have: i.b.held[img.SHA256]})
	}
	return info
}

// Put implements control.Import.
func (i *importing) Put(_ context.Context, d verify.Digest, r io.Reader) error {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	if verify.Digest(h.Sum(nil)) != d {
		return verify.Refuse(verify.CodeDigest, "the bytes are not those that were signed")
	}
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	i.b.held[d] = true
	return nil
}

// Commit implements control.Import.
func (i *importing) Commit(context.Context) error {
	for _, img := range i.Info().Images {
		if !img.Have {
			return verify.Refuse(verify.CodeBundle, "image %s is missing", img.Name)
		}
	}
	if err := i.b.door.Accept(i.rel); err != nil {
		if older := i.b.order(i.rel); verify.CodeOf(err) != verify.CodeOrder || older != nil {
			return err
		}
	} else {
		i.b.mu.Lock()
		i.b.newest = i.rel
		i.b.mu.Unlock()
	}
	i.b.note("import " + i.rel.Manifest().Version)
	return nil
}

// Abort implements control.Import.
func (i *importing) Abort() {
	select {
	case i.b.Aborted <- i.rel.Manifest().Version:
	default: // nobody counts
	}
}
