package verify

import (
	"errors"
	"io/fs"
	"os"
)

// BakedFile is the name of the file in an anchor folder that says below which
// place in the order a device must never fall, whatever becomes of its state:
//
//	{"format": "meshupd.baked/1", "line": 1, "accepted": 17, "floor": 17}
//
// Whoever builds an image puts in the place of the release that the image becomes,
// or of the one before it.
const BakedFile = "counters.json"

const bakedFormat = "meshupd.baked/1"

// ParseBaked reads the content of a BakedFile. Errors are Refusals (E-FORMAT, E-SIZE).
func ParseBaked(raw []byte) (Counters, error) {
	var doc struct {
		Format string `json:"format"`
		Counters
	}
	if len(raw) > maxBaked {
		return Counters{}, Refuse(CodeSize, "the built-in counters have %d bytes, more than %d", len(raw), maxBaked)
	}
	if err := decodeStrict(raw, "the built-in counters", &doc); err != nil {
		return Counters{}, err
	}
	switch c := doc.Counters; {
	case doc.Format != bakedFormat:
		return Counters{}, Refuse(CodeFormat, "the built-in counters have format %q, not %q", clip(doc.Format), bakedFormat)
	case c.Line > MaxSeq || c.Accepted > MaxSeq || c.Floor > c.Accepted:
		return Counters{}, Refuse(CodeFormat, "the built-in counters %d.%d with floor %d are out of range", c.Line, c.Accepted, c.Floor)
	}
	return doc.Counters, nil
}

const maxBaked = 4 << 10

// readBaked reads the counters in an anchor folder; no file is no minimum.
func readBaked(anchor string) (Counters, error) {
	root, err := os.OpenRoot(anchor)
	if err != nil {
		return Counters{}, Refuse(CodeTrust, "open the trust anchor: %w", err)
	}
	defer root.Close()
	raw, err := (&folder{root: root}).readSmall(BakedFile, maxBaked)
	if errors.Is(err, fs.ErrNotExist) {
		return Counters{}, nil
	}
	if err != nil {
		return Counters{}, err
	}
	return ParseBaked(raw)
}
