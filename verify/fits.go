package verify

import (
	"cmp"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"
)

// Device is what Fits needs to know of a device.
type Device struct {
	Product  string
	Hardware string
	Channel  string // "" follows every channel
	Running  string // version that runs now; "" when unknown
	Meshupd  string // version of meshupd itself; "" or no semantic version when unknown
	Takes    []Kind // kinds of images that its slots can hold; nil: any
}

// Fits says whether the release is for this device, as a Refusal (E-PRODUCT,
// E-HARDWARE, E-CHANNEL, E-KIND, E-MESHUPD, E-REQUIRES, E-DOWNGRADE) or nil. An unknown
// running version is never a downgrade, but it meets no requirement either.
func (r *Release) Fits(dev Device) error { return r.manifest.Fits(dev) }

// Fits is Release.Fits, for deciding over manifests alone.
func (m *Manifest) Fits(dev Device) error {
	switch {
	case m.Product != dev.Product:
		return Refuse(CodeProduct, "the release is for product %s, this device is %s", m.Product, dev.Product)
	case len(m.ImagesFor(dev.Hardware)) == 0:
		return Refuse(CodeHardware, "the release has no image for hardware %q", dev.Hardware)
	case dev.Channel != "" && m.Channel != dev.Channel:
		return Refuse(CodeChannel, "the release is of channel %s, this device follows %s", m.Channel, dev.Channel)
	case !m.takenBy(dev):
		return Refuse(CodeKind, "the release has images that are not of kind %s, which this device takes", kindList(dev.Takes))
	case m.MinMeshupd != "" && !atLeast(dev.Meshupd, m.MinMeshupd):
		return Refuse(CodeMeshupd, "the release needs meshupd %s, this device has %s", m.MinMeshupd, cmp.Or(dev.Meshupd, "an unknown version"))
	}
	running, err := semver.StrictNewVersion(dev.Running)
	known := err == nil
	if m.Requires != "" && !(known && satisfies(m.Requires, running)) {
		return m.requires(dev.Running)
	}
	if known && !m.Downgrade {
		// The manifest's version was read when the manifest was checked.
		if v, err := semver.StrictNewVersion(m.Version); err == nil && v.LessThan(running) {
			return Refuse(CodeDowngrade, "version %s is lower than %s, which runs here", m.Version, dev.Running)
		}
	}
	return nil
}

// takenBy says whether the slots of the device can hold every image that is for it.
func (m *Manifest) takenBy(dev Device) bool {
	return dev.Takes == nil || !slices.ContainsFunc(m.ImagesFor(dev.Hardware), func(img Image) bool { return !slices.Contains(dev.Takes, img.Kind) })
}

func kindList(kinds []Kind) string {
	words := make([]string, len(kinds))
	for i, k := range kinds {
		words[i] = string(k)
	}
	return strings.Join(words, " or ")
}

func (m *Manifest) requires(running string) error {
	if running == "" {
		running = "an unknown version"
	}
	if m.Via != nil {
		return Refuse(CodeRequires, "the release needs %s, %s runs here; go through %s first", m.Requires, running, m.Via.Version)
	}
	return Refuse(CodeRequires, "the release needs %s, %s runs here", m.Requires, running)
}

// satisfies takes a pre-release of a version in the range as in the range: a
// device on 2.4.0-rc.1 meets ">=2.2.0".
func satisfies(constraint string, v *semver.Version) bool {
	c, err := semver.NewConstraint(constraint)
	if err != nil {
		return false
	}
	c.IncludePrerelease = true
	return c.Check(v)
}

// atLeast takes a version with a leading v, as Go stamps it into a build.
func atLeast(have, want string) bool {
	h, err := semver.NewVersion(have)
	if err != nil {
		return false
	}
	w, err := semver.StrictNewVersion(want)
	return err == nil && !h.LessThan(w)
}

// ImagesFor lists the images of the release for this hardware, in the manifest's order.
func (r *Release) ImagesFor(hardware string) []Image { return r.manifest.ImagesFor(hardware) }

// ImagesFor is Release.ImagesFor, for deciding over manifests alone.
func (m *Manifest) ImagesFor(hardware string) []Image {
	var out []Image
	if !serves(m.Hardware, hardware) {
		return nil
	}
	for _, img := range m.Images {
		if serves(img.Hardware, hardware) {
			out = append(out, img)
		}
	}
	return out
}

// Compare orders releases by (line, seq): -1, 0 or 1.
func (r *Release) Compare(other *Release) int {
	return cmp.Or(
		cmp.Compare(r.manifest.Line, other.manifest.Line),
		cmp.Compare(r.manifest.Seq, other.manifest.Seq))
}
