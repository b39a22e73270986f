package main

import (
	"context"
	"io"
	"time"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/peer"
	"meshupd/verify"
)

// backend shows a peer.Node through the control socket.
type backend struct{ node *peer.Node }

var _ control.Backend = backend{}

// Status implements control.Viewer.
func (b backend) Status(context.Context) (control.SiteStatus, error) {
	site := b.node.Site()
	out := control.SiteStatus{
		GeneratedAt: time.Now().UTC().Truncate(time.Second),
		Site:        control.Site{ID: siteID(site.Trust.RootID), Devices: len(site.Devices)},
	}
	for _, a := range site.Alarms {
		out.Alarms = append(out.Alarms, control.Alarm(a))
	}
	names := map[string]string{}
	for _, d := range site.Devices {
		names[d.ID] = d.Status.Name
	}
	var lan int64
	var rate float64
	for _, d := range site.Devices {
		if d.Self {
			out.Observer = label(d)
		}
		if d.Status.State != string(peer.StateSilent) {
			out.Site.Heard++
		}
		for _, sent := range d.Status.Sent {
			lan += sent
		}
		rate += d.Status.Rate
		out.Devices = append(out.Devices, deviceStatus(d, names))
	}
	out.Bytes.LAN, out.Bytes.Rate = &lan, &rate
	if site.Release != nil {
		rel := siteRelease(site.Release)
		rel.Since = site.Origin.At
		rel.Source = site.Origin.Kind
		if rel.Source == "mesh" {
			rel.Source = "lan"
		}
		if rel.Source == "usb" {
			var usb int64
			for _, img := range site.Release.Manifest().Images {
				usb += img.Size
			}
			out.Bytes.USB = &usb
		}
		out.Release = &rel
	}
	return out, nil
}

// siteID is short enough to say on the telephone.
func siteID(root verify.Digest) string {
	s := root.String()
	return s[:4] + "-" + s[4:8]
}

func label(d peer.DeviceView) string {
	if d.Status.Name != "" {
		return d.Status.Name
	}
	return d.ID
}

func siteRelease(rel *verify.Release) control.SiteRelease {
	m := rel.Manifest()
	out := control.SiteRelease{ID: rel.ID(), Product: m.Product, Version: m.Version, Channel: m.Channel,
		Line: m.Line, Seq: m.Seq, Notes: m.Notes}
	if s := rel.Signers(); len(s) > 0 {
		out.Signer, out.SignerFpr = s[0].Name, s[0].Fingerprint
	}
	return out
}

// selfMending are the reasons that go away without a person at this device.
var selfMending = map[verify.Code]bool{verify.CodeSpace: true, verify.CodeHeld: true, verify.CodeHook: true, verify.CodePeer: true, verify.CodeTimeout: true, verify.CodeApply: true}

func deviceStatus(d peer.DeviceView, names map[string]string) control.DeviceStatus {
	st := d.Status
	out := control.DeviceStatus{
		ID: d.ID, Name: st.Name, Hardware: st.Hardware, Version: st.Version, Target: st.Target,
		State: control.State(st.State), Since: st.Since, LastHeard: d.LastHeard.UTC(), Addrs: st.Addrs, Kept: st.Kept,
	}
	if r := st.Reason; r != nil {
		out.Reason = &control.Reason{Code: r.Code, Detail: r.Detail, NeedBytes: r.NeedBytes, Retry: "manual"}
		if selfMending[r.Code] {
			out.Reason.Retry = "auto"
		}
	}
	if st.Size > 0 {
		out.Done, out.Size = &st.Done, &st.Size
		if st.Rate > 0 {
			left := int64(float64(st.Size-st.Done) / st.Rate)
			out.Rate, out.Left = &st.Rate, &left
		}
	}
	var sent int64
	for _, n := range st.Sent {
		sent += n
	}
	out.Sent = &sent
	for _, id := range st.From {
		name := names[id]
		if name == "" {
			name = id
		}
		out.From = append(out.From, name)
	}
	return out
}

// History implements control.Viewer.
func (b backend) History(_ context.Context, device string, limit int) ([]control.Event, error) {
	var out []control.Event
	for _, e := range b.node.History(device, limit) {
		ev := control.Event{At: e.At, Device: e.Name, From: e.From, To: e.To, Result: string(e.Kind), By: e.By, Why: e.Detail, Code: e.Code}
		if ev.Device == "" {
			ev.Device = e.Device
		}
		if e.Took > 0 {
			took := e.Took.Seconds()
			ev.Took = &took
		}
		out = append(out, ev)
	}
	return out, nil
}

// Watch implements control.Viewer.
func (b backend) Watch(ctx context.Context) <-chan struct{} {
	out := make(chan struct{}, 1)
	go func() {
		defer close(out)
		changed := b.node.Changed()
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			// Taken before the pause below, so that a change during it is not missed.
			changed = b.node.Changed()
			select {
			case out <- struct{}{}:
			default:
			}
			// A busy site changes many times a second; people read more slowly.
			timer := time.NewTimer(200 * time.Millisecond)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
	}()
	return out
}

// OpenImport implements control.Actor.
func (b backend) OpenImport(ctx context.Context, head *verify.UnverifiedHead, by control.Who) (control.Import, error) {
	imp, err := b.node.OpenImport(ctx, head, by.String(), "usb")
	if err != nil {
		return nil, err
	}
	return &importing{Import: imp, running: b.node.Running()}, nil
}

// Rollback implements control.Actor.
func (b backend) Rollback(ctx context.Context, by control.Who, to string) error {
	if to != "" {
		return b.node.RollbackTo(ctx, by.String(), to)
	}
	return b.node.Rollback(ctx, by.String())
}

// importing shows a peer.Import through the control socket.
type importing struct {
	*peer.Import
	running string
}

// Info implements control.Import.
func (i *importing) Info() control.ImportInfo {
	m := i.Release().Manifest()
	info := control.ImportInfo{Release: siteRelease(i.Release()), Running: i.running, Hardware: m.Hardware}
	for _, img := range m.Images {
		info.Images = append(info.Images, control.ImportImage{Name: img.Name, Digest: img.SHA256, Size: img.Size, Have: i.Has(img.SHA256)})
	}
	return info
}

// Put implements control.Import.
func (i *importing) Put(ctx context.Context, d verify.Digest, r io.Reader) error {
	return i.Import.Put(ctx, d, r, nil)
}
