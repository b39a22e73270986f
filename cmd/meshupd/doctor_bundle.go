package main

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/install"
	"meshupd/verify"
	"meshupd/verify/publish"
)

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// bundleChecks say whether the device would take a release, and could install it.
var bundleChecks = []check{
	{ID: "bundle.accepted", Slow: true, Needs: (*patient).needDoor, Look: (*patient).checkAccepted},
	{ID: "bundle.failed", Needs: (*patient).needRelease, Look: (*patient).checkFailedHere},
	{ID: "bundle.images", Needs: (*patient).needRelease, Look: (*patient).checkImageCount},
	{ID: "bundle.slot", Needs: (*patient).needRelease, Look: (*patient).checkSlotRoom},
	{ID: "bundle.space", Needs: (*patient).needRelease, Look: (*patient).checkStoreRoom},
}

func isBundleCheck(id string) bool { return strings.HasPrefix(id, "bundle.") }

// observed is what earlier checks found out for later ones.
type observed struct {
	running string // version that runs; "" when unknown
	slots   map[install.SlotName]int64
	view    *install.SlotsView
	boot    *install.BootView
	release *verify.Release // of --bundle, once the door believed it
}

func (p *patient) needRelease() string {
	if p.seen.release == nil {
		return "the release was not accepted"
	}
	return ""
}

// runningVersion is the version that the device runs, or that one with this image would.
func (p *patient) runningVersion() string {
	if p.seen.running != "" {
		return p.seen.running
	}
	return p.cfg.Slots.Factory
}

func (p *patient) device() verify.Device {
	return verify.Device{Product: p.cfg.Product, Hardware: p.cfg.Hardware, Channel: p.cfg.Channel, Running: p.runningVersion(),
		Meshupd: buildVersion().Version, Takes: p.cfg.Slots.takes()}
}

// checkAccepted lets the device's own door judge, with every byte read.
func (p *patient) checkAccepted(ctx context.Context) doctor.Finding {
	tell, end := p.hashing("Checking  ")
	rel, rules, err := publish.ExplainAt(ctx, p.bundle, p.door, p.device(), tell)
	end(err == nil)
	if err != nil {
		f := failed(err, "this device would refuse it, and nothing would be changed")
		var good []string
		for _, r := range rules {
			if r.Verdict == verify.VerdictGood {
				good = append(good, r.Name)
			}
		}
		if len(good) > 0 {
			f.Why += "; fine so far: " + strings.Join(good, ", ")
		}
		return f
	}
	p.seen.release = rel
	m := rel.Manifest()
	return doctor.OK("%s %s, channel %s, seq %d, over %s; all %d rules hold, every byte is what was signed",
		m.Product, m.Version, m.Channel, m.Seq, orUnknown(p.runningVersion()), len(rules))
}

func orUnknown(version string) string {
	if version == "" {
		return "an unknown version"
	}
	return version
}

func (p *patient) checkFailedHere(context.Context) doctor.Finding {
	if !p.live {
		return doctor.OK("a new device tries it")
	}
	f, found, err := install.FailedHere(p.cfg.State, p.seen.release.ID())
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case found:
		out := doctor.Fail(f.Version+" failed here before: "+f.Detail, "it is not tried again", codeTexts[verify.CodeFailedHere].fix)
		out.Code = verify.CodeFailedHere
		return out
	}
	return doctor.OK("it never failed here")
}

// ours are the images of the release that this device would install.
func (p *patient) ours() []verify.Image { return p.seen.release.ImagesFor(p.cfg.Hardware) }

func (p *patient) checkImageCount(context.Context) doctor.Finding {
	s, n := p.cfg.Slots, len(p.ours())
	one := s.Kind == "block" || delegated(s.Kind) || s.Kind == "files" && s.Layout == "image"
	if one && n != 1 {
		f := doctor.Fail(count(n, "image")+" for this hardware, and a slot of kind "+s.Kind+" holds one", "it would be refused when it is written",
			"make the release with one image for each kind of hardware (--hardware)")
		f.Code = verify.CodeFormat
		return f
	}
	if s.Kind == "container" {
		for _, img := range p.ours() {
			if _, known := s.Container.Services[img.Name]; !known {
				return doctor.Fail("image "+img.Name+" is for no service in slots.container.services", "it would be refused when it is written", "name the image as the service")
			}
		}
	}
	return doctor.OK("%s for this hardware", count(n, "image"))
}

// checkSlotRoom compares content with slots.
func (p *patient) checkSlotRoom(context.Context) doctor.Finding {
	var content int64
	for _, img := range p.ours() {
		content += img.Content.Size
	}
	if p.cfg.Slots.Kind != "block" {
		return doctor.OK("%s; slots of kind %s have no fixed size", screen.Bytes(content), p.cfg.Slots.Kind)
	}
	if len(p.seen.slots) < 2 {
		return doctor.Skip("%s; how large the slots are is not known here", screen.Bytes(content))
	}
	for slot, size := range p.seen.slots {
		if content > size {
			f := doctor.Fail("the image has "+screen.Bytes(content)+", slot "+string(slot)+" has "+screen.Bytes(size), "it would be refused before a byte is written", "make the image smaller")
			f.Code = verify.CodeSpace
			return f
		}
	}
	return doctor.OK("%s fit into both slots", screen.Bytes(content))
}

// checkStoreRoom asks for what is not in the store yet.
func (p *patient) checkStoreRoom(context.Context) doctor.Finding {
	if !p.live {
		return doctor.Skip("how much is free on a device is not known here")
	}
	var need int64
	for _, img := range p.seen.release.Manifest().Images {
		if _, err := p.tree.Stat(filepath.Join(p.cfg.State, "store", "images", img.SHA256.String())); err != nil {
			need += img.Size
		}
	}
	if p.cfg.Slots.Kind == "files" || p.cfg.Slots.Kind == "container" {
		for _, img := range p.ours() {
			need += img.Content.Size // the slot too, where it may lie on the same disk
		}
	}
	need += int64(p.cfg.Store.Reserve)
	fs, at, err := nearestFileSystem(p.cfg.State)
	if err != nil {
		return doctor.Skip("%v", err)
	}
	if fs.Free < need {
		f := doctor.Fail(screen.Bytes(need)+" have to be free on the disk of "+at+", "+screen.Bytes(fs.Free)+" are", "it would be refused, or wait", codeTexts[verify.CodeSpace].fix)
		f.Code = verify.CodeSpace
		return f
	}
	return doctor.OK("%s wanted, %s free in %s", screen.Bytes(need), screen.Bytes(fs.Free), at)
}
