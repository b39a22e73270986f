package install

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strconv"
	"strings"

	"meshupd/verify"
)

// ubootPlace is one copy of the environment, a line of fw_env.config.
type ubootPlace struct {
	path   string
	offset int64 // negative: from the end
	size   int
}

const (
	maxFwEnvConfig = 16 << 10
	minUBootEnv    = 64
	maxUBootEnv    = 4 << 20
)

// parseFwEnvConfig reads fw_env.config: "device offset size" with more columns for flash that has to be erased, which
// are not looked at. Two lines are redundant copies. Errors are E-CONFIG.
func parseFwEnvConfig(data []byte) ([]ubootPlace, error) {
	if len(data) > maxFwEnvConfig {
		return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: larger than %d bytes", maxFwEnvConfig)
	}
	var places []ubootPlace
	for line := range strings.Lines(string(data)) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 3 || len(places) == 2 {
			return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: %.80q is not one of at most two lines of device, offset and size", strings.TrimSpace(line))
		}
		offset, err := strconv.ParseInt(f[1], 0, 64)
		size, serr := strconv.ParseInt(f[2], 0, 64)
		if err != nil || serr != nil || size < minUBootEnv || size > maxUBootEnv {
			return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: %.80q has an offset or size that cannot be", strings.TrimSpace(line))
		}
		places = append(places, ubootPlace{f[0], offset, int(size)})
	}
	switch {
	case len(places) == 0:
		return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: it names no environment")
	case len(places) == 2 && places[0].size != places[1].size:
		return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: the copies have different sizes")
	case len(places) == 2 && places[0].path == places[1].path && overlap(places[0], places[1]):
		return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: the copies overlap, or one is counted from the start and one from the end")
	}
	return places, nil
}

func overlap(a, b ubootPlace) bool {
	if (a.offset < 0) != (b.offset < 0) {
		return true // as far as anybody can tell without the size of the device
	}
	return a.offset < b.offset+int64(b.size) && b.offset < a.offset+int64(a.size)
}

// ubootVar is one variable, in the order of the environment.
type ubootVar struct{ name, value string }

// parseUBootEnv reads one copy: CRC-32 of the data, little endian; a counter if there are two copies; then "name=value"
// strings that end in NUL, the last followed by a NUL more (include/env_internal.h). Errors are E-BOOT.
func parseUBootEnv(data []byte, redundant bool) (vars []ubootVar, count byte, err error) {
	head := ubootHead(redundant)
	if len(data) <= head || len(data) > maxUBootEnv {
		return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: %d bytes are none", len(data))
	}
	body := data[head:]
	if crc32.ChecksumIEEE(body) != binary.LittleEndian.Uint32(data) {
		return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: its checksum does not match")
	}
	if redundant {
		count = data[4]
	}
	for len(body) > 0 && body[0] != 0 {
		text, rest, ended := bytes.Cut(body, []byte{0})
		name, value, found := strings.Cut(string(text), "=")
		if !ended || !found || name == "" {
			return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: a variable has no name or no end")
		}
		vars = append(vars, ubootVar{name, value})
		body = rest
	}
	return vars, count, nil
}

func ubootHead(redundant bool) int {
	if redundant {
		return 5
	}
	return 4
}

// encodeUBootEnv is the opposite of parseUBootEnv. Errors are E-BOOT.
func encodeUBootEnv(vars []ubootVar, size int, redundant bool, count byte) ([]byte, error) {
	head := ubootHead(redundant)
	out := make([]byte, head, size)
	for _, v := range vars {
		out = append(out, v.name+"="+v.value+"\x00"...)
	}
	if len(out)+1 > size {
		return nil, verify.Refuse(verify.CodeBoot, "write the U-Boot environment: %d bytes do not fit into %d", len(out)+1, size)
	}
	out = out[:size]
	if redundant {
		out[4] = count
	}
	binary.LittleEndian.PutUint32(out, crc32.ChecksumIEEE(out[head:]))
	return out, nil
}

// newer reports whether a copy with count b is the later one. The counter of a byte goes round (env_check_redund).
func newer(a, b byte) bool {
	switch {
	case a == 255 && b == 0:
		return true
	case a == 0 && b == 255:
		return false
	}
	return b > a
}

func ubootGet(vars []ubootVar, name string) string {
	for _, v := range vars {
		if v.name == name {
			return v.value
		}
	}
	return ""
}

// ubootSet returns vars with name set, in its place or at the end.
func ubootSet(vars []ubootVar, name, value string) []ubootVar {
	for i, v := range vars {
		if v.name == name {
			vars[i].value = value
			return vars
		}
	}
	return append(vars, ubootVar{name, value})
}
