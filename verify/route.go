package verify

import (
	"slices"

	"github.com/Masterminds/semver/v3"
)

// maxRoute is the largest number of releases on the way to one.
const maxRoute = 16

// Route plans how a device gets to the release with id goal: the releases to
// install one after the other, goal last. A manifest names with Via what to go
// through when its Requires is not met; find returns the manifests that are at
// hand. When there is no way the error is a Refusal: E-REQUIRES with the reason
// (the release in between is not here, does not help, or leads in a circle), or
// why the first release of the way does not fit (see Manifest.Fits).
func Route(goal Digest, find func(Digest) (Manifest, bool), dev Device) ([]Digest, error) {
	var way []Digest
	var next *Manifest // what comes after the one that is looked at
	for id := goal; ; id = next.Via.SHA256 {
		if slices.Contains(way, id) {
			return nil, Refuse(CodeRequires, "the way to the release leads in a circle at version %s", next.Via.Version)
		}
		if len(way) == maxRoute {
			return nil, Refuse(CodeRequires, "the way to the release has more than %d steps", maxRoute)
		}
		m, ok := find(id)
		switch {
		case !ok && next == nil:
			return nil, Refuse(CodeNotFound, "the release %s is not known here", id)
		case !ok:
			return nil, Refuse(CodeRequires, "version %s needs version %s to be installed first, which is not here yet", next.Version, next.Via.Version)
		case next != nil && m.Version != next.Via.Version:
			return nil, Refuse(CodeRequires, "version %s names %s as the version in between, but that release is %s", next.Version, next.Via.Version, m.Version)
		case next != nil && !meets(m.Version, next.Requires):
			return nil, Refuse(CodeRequires, "version %s is to be installed first, but with it %s cannot be installed either: that needs %s",
				m.Version, next.Version, next.Requires)
		}
		way = append(way, id)
		err := m.Fits(dev)
		if err == nil {
			slices.Reverse(way)
			return way, nil
		}
		if CodeOf(err) != CodeRequires || m.Via == nil {
			return nil, err
		}
		next = &m
	}
}

func meets(version, constraint string) bool {
	v, err := semver.StrictNewVersion(version)
	return err == nil && (constraint == "" || satisfies(constraint, v))
}

// Stones lists what the Via chain of a manifest names, as far as the manifests at
// hand tell: releases that stay welcome though newer ones were accepted, because
// a publisher's signature on the newer one says that they are needed.
func Stones(goal Manifest, find func(Digest) (Manifest, bool)) []Digest {
	var out []Digest
	for m, ok := goal, true; ok && m.Via != nil && len(out) < maxRoute; m, ok = find(m.Via.SHA256) {
		if slices.Contains(out, m.Via.SHA256) {
			break
		}
		out = append(out, m.Via.SHA256)
	}
	return out
}
