package install

import (
	"bytes"
	"strings"

	"meshupd/verify"
)

// grubEnv is GRUB's environment block (grub-core/lib/envblk.c): a first line, lines "name=value" in which a backslash
// escapes itself and a line feed, comments, and '#' up to the end. What is not ours is kept as it is.
type grubEnv struct {
	size     int
	comments []string // lines, without the first
	names    []string // in their order
	values   map[string]string
}

const (
	grubHeader  = "# GRUB Environment Block\n"
	grubEnvSize = 1024
	maxGRUBEnv  = 64 << 10
)

// parseGRUBEnv reads a block. Errors are E-BOOT.
func parseGRUBEnv(data []byte) (*grubEnv, error) {
	if len(data) < grubEnvSize || len(data) > maxGRUBEnv || !bytes.HasPrefix(data, []byte(grubHeader)) {
		return nil, verify.Refuse(verify.CodeBoot, "read the GRUB environment: %d bytes are no environment block", len(data))
	}
	env := &grubEnv{size: len(data), values: make(map[string]string)}
	rest := data[len(grubHeader):]
	for len(rest) > 0 {
		line, after, ended := cutLine(rest)
		if !ended {
			// The padding has no line feed; anything else there was cut off by a tool that did not know the format.
			if len(bytes.Trim(rest, "#")) > 0 {
				return nil, verify.Refuse(verify.CodeBoot, "read the GRUB environment: its last line has no end")
			}
			break
		}
		rest = after
		if line == "" {
			continue
		}
		if line[0] == '#' {
			env.comments = append(env.comments, line)
			continue
		}
		name, value, found := strings.Cut(line, "=")
		if !found || name == "" || strings.ContainsRune(name, '\\') {
			return nil, verify.Refuse(verify.CodeBoot, "read the GRUB environment: a line is no assignment")
		}
		env.set(name, unescape(value))
	}
	return env, nil
}

// cutLine cuts at the first line feed that no backslash escapes.
func cutLine(data []byte) (line string, rest []byte, ended bool) {
	for i := 0; i < len(data); i++ {
		switch {
		case data[i] == '\\' && data[0] != '#':
			i++
		case data[i] == '\n':
			return string(data[:i]), data[i+1:], true
		}
	}
	return "", nil, false
}

func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

func (e *grubEnv) set(name, value string) {
	if _, found := e.values[name]; !found {
		e.names = append(e.names, name)
	}
	e.values[name] = value
}

// encode writes the block, the variables named first at its start: they then lie in its first sector, which a medium
// writes whole or not at all. Errors are E-BOOT.
func (e *grubEnv) encode(first []string) ([]byte, error) {
	var out bytes.Buffer
	out.WriteString(grubHeader)
	written := make(map[string]bool)
	escape := strings.NewReplacer("\\", "\\\\", "\n", "\\\n")
	for _, name := range append(append([]string(nil), first...), e.names...) {
		value, found := e.values[name]
		if !found || written[name] {
			continue
		}
		written[name] = true
		out.WriteString(name + "=" + escape.Replace(value) + "\n")
	}
	for _, c := range e.comments {
		out.WriteString(c + "\n")
	}
	if out.Len() > e.size {
		return nil, verify.Refuse(verify.CodeBoot, "write the GRUB environment: %d bytes do not fit into %d", out.Len(), e.size)
	}
	out.Write(bytes.Repeat([]byte("#"), e.size-out.Len()))
	return out.Bytes(), nil
}
