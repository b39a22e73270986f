package verify

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"unicode/utf8"
)

// Caps on the shape of a document. They bound the work before any field is looked
// at, so a signed but absurd document costs no more than an honest one.
const (
	maxJSONDepth  = 16
	maxJSONTokens = 1 << 16
)

// decodeStrict reads one JSON document so that every reader sees the same thing
// in it: valid UTF-8, one value and nothing after it, no key twice in an object,
// keys in lower case only (encoding/json would otherwise take "Product" for
// "product"), no null (absent has one spelling), bounded depth and length.
// Fields that into does not have are allowed; see Manifest.Critical.
func decodeStrict(raw []byte, what string, into any) error {
	if !utf8.Valid(raw) {
		return Refuse(CodeFormat, "read %s: it is not valid UTF-8", what)
	}
	if !json.Valid(raw) {
		return Refuse(CodeFormat, "read %s: it is not one JSON document", what)
	}
	if err := checkShape(raw, what); err != nil {
		return err
	}
	if err := json.Unmarshal(raw, into); err != nil {
		if CodeOf(err) != "" {
			return Refuse(CodeOf(err), "read %s: %w", what, err)
		}
		return Refuse(CodeFormat, "read %s: %w", what, err)
	}
	return nil
}

// checkShape walks the tokens of valid JSON; each open object keeps its keys.
func checkShape(raw []byte, what string) error {
	type level struct {
		keys    map[string]bool // nil in an array
		wantKey bool
	}
	var open []level
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	for n := 0; ; n++ {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return Refuse(CodeFormat, "read %s: %w", what, err)
		}
		if n >= maxJSONTokens {
			return Refuse(CodeFormat, "read %s: it has more than %d parts", what, maxJSONTokens)
		}
		top := len(open) - 1
		if top >= 0 && open[top].keys != nil && open[top].wantKey {
			if key, ok := tok.(string); ok {
				if !isLowerKey(key) {
					return Refuse(CodeFormat, "read %s: the key %q is not lower case", what, key)
				}
				if open[top].keys[key] {
					return Refuse(CodeFormat, "read %s: the key %q is there twice", what, key)
				}
				open[top].keys[key] = true
				open[top].wantKey = false
				continue
			}
		}
		switch tok {
		case json.Delim('{'), json.Delim('['):
			if len(open) == maxJSONDepth {
				return Refuse(CodeFormat, "read %s: it is nested more than %d deep", what, maxJSONDepth)
			}
			next := level{}
			if tok == json.Delim('{') {
				next = level{keys: map[string]bool{}, wantKey: true}
			}
			open = append(open, next)
			continue
		case json.Delim('}'), json.Delim(']'):
			open = open[:top]
		case nil:
			return Refuse(CodeFormat, "read %s: null is not a value here", what)
		}
		if len(open) > 0 {
			open[len(open)-1].wantKey = true
		}
	}
}

func isLowerKey(s string) bool {
	if s == "" || len(s) > 64 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return true
}

// encodeCanonical is how this project writes a document: indented for people,
// fields in the order of the type, no HTML escapes, one newline at the end.
func encodeCanonical(doc any) ([]byte, error) {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(doc); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}
