package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"io"

	"meshupd/verify"
)

// sealed is the outer form of every small file that this package keeps: the
// digest is over the exact bytes of the body, so that a bit that a flash chip
// lost is noticed instead of believed. It is no protection against a person.
type sealed struct {
	Schema string          `json:"schema"`
	SHA256 verify.Digest   `json:"sha256"`
	Body   json.RawMessage `json:"body"`
}

// seal encodes v for a durable write.
func seal(schema string, v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, verify.Refuse(verify.CodeFormat, "encode %s: %w", schema, err)
	}
	out, err := json.Marshal(sealed{Schema: schema, SHA256: sha256.Sum256(body), Body: body})
	if err != nil {
		return nil, verify.Refuse(verify.CodeFormat, "encode %s: %w", schema, err)
	}
	return append(out, '\n'), nil
}

// unseal reads into v what seal wrote, at most limit bytes of it. Errors are E-FORMAT.
func unseal(data []byte, schema string, limit int, v any) error {
	if len(data) > limit {
		return verify.Refuse(verify.CodeFormat, "read %s: larger than %d bytes", schema, limit)
	}
	var outer sealed
	if err := strictJSON(data, &outer); err != nil {
		return verify.Refuse(verify.CodeFormat, "read %s: %w", schema, err)
	}
	if outer.Schema != schema {
		return verify.Refuse(verify.CodeFormat, "read %s: it is a %.40q", schema, outer.Schema)
	}
	if sha256.Sum256(outer.Body) != outer.SHA256 {
		return verify.Refuse(verify.CodeFormat, "read %s: its checksum does not match", schema)
	}
	if err := strictJSON(outer.Body, v); err != nil {
		return verify.Refuse(verify.CodeFormat, "read %s: %w", schema, err)
	}
	return nil
}

// strictJSON reads one JSON value with known fields and nothing after it.
func strictJSON(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return verify.Refuse(verify.CodeFormat, "something follows the end")
	}
	return nil
}
