package install

import (
	"encoding/json"
	"slices"
	"strings"

	"meshupd/verify"
)

// raucSlot is RAUC's status of one slot, as far as it is looked at.
type raucSlot struct {
	Name, Class, Parent, Bootname string
	State                         string // booted, active or inactive
	Status                        string // ok after a completed installation; else empty, or a step of one
	SHA256                        string // of the image, taken while it was written
	Version                       string // of the bundle
}

const (
	maxRaucSlots = 64
	maxRaucText  = 256
	maxRaucInfo  = 256 << 10
)

// raucText cuts what RAUC says to what can be shown.
func raucText(s string) string { return printable(s[:min(len(s), 4*maxRaucText)], maxRaucText) }

func raucFind(slots []raucSlot, name string) *raucSlot {
	i := slices.IndexFunc(slots, func(s raucSlot) bool { return s.Name == name })
	if i < 0 {
		return nil
	}
	return &slots[i]
}

// raucPair finds the two root slots by name or bootname, or chooses them. Errors are E-CONFIG.
func raucPair(slots []raucSlot, a, b string) (map[SlotName]string, error) {
	var roots []string
	for _, s := range slots {
		if s.Bootname != "" {
			roots = append(roots, s.Name)
		}
	}
	slices.Sort(roots)
	if a == "" && b == "" && len(roots) == 2 {
		return map[SlotName]string{SlotA: roots[0], SlotB: roots[1]}, nil
	}
	find := func(name string) string {
		for _, s := range slots {
			if s.Bootname != "" && name != "" && (s.Name == name || s.Bootname == name) {
				return s.Name
			}
		}
		return ""
	}
	names := map[SlotName]string{SlotA: find(a), SlotB: find(b)}
	if names[SlotA] == "" || names[SlotB] == "" || names[SlotA] == names[SlotB] {
		return nil, verify.Refuse(verify.CodeConfig, "%q and %q are not two slots of RAUC with a bootname; it has %.200q", a, b, roots)
	}
	return names, nil
}

// raucBundle says which images a bundle holds: hexadecimal SHA-256 by class of slot, several where there are variants.
type raucBundle struct {
	Images map[string][]string `json:"images"`
}

// parseRaucInfo reads what `rauc info --output-format=json` prints. Errors are E-FORMAT.
func parseRaucInfo(data []byte) (raucBundle, error) {
	var info struct {
		Images []map[string]struct {
			Checksum string `json:"checksum"`
		} `json:"images"`
	}
	if len(data) > maxRaucInfo {
		return raucBundle{}, verify.Refuse(verify.CodeFormat, "read rauc info: larger than %d bytes", maxRaucInfo)
	}
	if err := json.Unmarshal(data, &info); err != nil {
		return raucBundle{}, verify.Refuse(verify.CodeFormat, "read rauc info: %w", err)
	}
	b := raucBundle{Images: make(map[string][]string)}
	for _, image := range info.Images {
		for class, is := range image {
			if !raucDigest(is.Checksum) || class == "" || len(class) > maxRaucText || len(info.Images) > maxRaucSlots {
				return raucBundle{}, verify.Refuse(verify.CodeFormat, "read rauc info: an image has no name or checksum")
			}
			b.Images[class] = append(b.Images[class], strings.ToLower(is.Checksum))
		}
	}
	if len(b.Images) == 0 {
		return raucBundle{}, verify.Refuse(verify.CodeFormat, "read rauc info: the bundle has no images")
	}
	return b, nil
}

func raucDigest(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdefABCDEF") == ""
}

// raucHolds reports whether the group of a root slot, which is that slot and those whose parent it is, holds the bundle: every
// image for a class of the group, and at least one.
func raucHolds(slots []raucSlot, root string, b raucBundle) bool {
	held := 0
	for _, s := range slots {
		if s.Name != root && s.Parent != root {
			continue
		}
		sums, meant := b.Images[s.Class]
		if !meant {
			continue
		}
		if s.Status != "ok" || !slices.Contains(sums, strings.ToLower(s.SHA256)) {
			return false
		}
		held++
	}
	return held > 0
}
