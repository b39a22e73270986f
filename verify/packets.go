package verify

// Caps on OpenPGP data.
const (
	MaxSignature   = 16 << 10 // bytes of a .sig file
	MaxSignatures  = 8        // signature packets in it
	MaxCertificate = 64 << 10 // bytes of one certificate

	maxPackets = 512 // of one certificate
)

// OpenPGP packet types (RFC 9580 section 5) that this project reads.
const (
	packetSignature     = 2
	packetPublicKey     = 6
	packetTrust         = 12
	packetUserID        = 13
	packetPublicSubkey  = 14
	packetUserAttribute = 17
)

// splitPackets cuts binary OpenPGP data into whole packets, header included. It
// runs before the OpenPGP library sees a byte, because the library skips what it
// does not know and has no view on what may follow: here partial and open-ended
// lengths, foreign packet types and trailing bytes refuse.
func splitPackets(raw []byte, what string, limit int, allowed ...int) ([][]byte, error) {
	var out [][]byte
	for rest := raw; len(rest) > 0; {
		tag, size, err := packetHeader(rest, what)
		if err != nil {
			return nil, err
		}
		ok := false
		for _, t := range allowed {
			ok = ok || t == tag
		}
		if !ok {
			return nil, Refuse(CodeFormat, "%s holds an OpenPGP packet of type %d, which does not belong there", what, tag)
		}
		if len(out) == limit {
			return nil, Refuse(CodeFormat, "%s has more than %d OpenPGP packets", what, limit)
		}
		out = append(out, rest[:size])
		rest = rest[size:]
	}
	return out, nil
}

// packetHeader reads a header (RFC 9580 section 4.2) and returns the packet type
// and the size of the whole packet in bytes.
func packetHeader(raw []byte, what string) (tag, size int, err error) {
	if raw[0]&0x80 == 0 {
		return 0, 0, Refuse(CodeFormat, "%s is not binary OpenPGP data", what)
	}
	var header, body int
	if raw[0]&0x40 != 0 { // present format
		tag = int(raw[0] & 0x3f)
		header, body, err = presentLength(raw[1:], what)
	} else {
		tag = int(raw[0]&0x3f) >> 2
		header, body, err = legacyLength(raw[1:], int(raw[0]&3), what)
	}
	if err != nil {
		return 0, 0, err
	}
	size = 1 + header + body
	if size > len(raw) {
		return 0, 0, Refuse(CodeFormat, "%s ends inside an OpenPGP packet", what)
	}
	return tag, size, nil
}

func presentLength(raw []byte, what string) (header, body int, err error) {
	switch {
	case len(raw) >= 1 && raw[0] < 192:
		return 1, int(raw[0]), nil
	case len(raw) >= 2 && raw[0] < 224:
		return 2, (int(raw[0])-192)<<8 + int(raw[1]) + 192, nil
	case len(raw) >= 5 && raw[0] == 255:
		body, err = bigEndian(raw[1:5], what)
		return 5, body, err
	}
	return 0, 0, Refuse(CodeFormat, "%s holds an OpenPGP packet without a definite length", what)
}

func legacyLength(raw []byte, kind int, what string) (header, body int, err error) {
	header = 1 << kind
	if kind == 3 || len(raw) < header {
		return 0, 0, Refuse(CodeFormat, "%s holds an OpenPGP packet without a definite length", what)
	}
	body, err = bigEndian(raw[:header], what)
	return header, body, err
}

func bigEndian(b []byte, what string) (int, error) {
	var n int64
	for _, c := range b {
		n = n<<8 | int64(c)
	}
	if n > MaxHead {
		return 0, Refuse(CodeFormat, "%s ends inside an OpenPGP packet", what)
	}
	return int(n), nil
}
