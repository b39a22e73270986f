package bootlab

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func logOf(sector uint32, entries ...[]byte) []byte {
	out := make([]byte, sector)
	binary.LittleEndian.PutUint64(out, logMagic)
	binary.LittleEndian.PutUint64(out[8:], 1)
	binary.LittleEndian.PutUint64(out[16:], uint64(len(entries)))
	binary.LittleEndian.PutUint32(out[24:], sector)
	for _, e := range entries {
		out = append(out, e...)
	}
	return out
}

func logEntry(sector int, first, n, flags uint64, data []byte) []byte {
	out := make([]byte, sector)
	binary.LittleEndian.PutUint64(out, first)
	binary.LittleEndian.PutUint64(out[8:], n)
	binary.LittleEndian.PutUint64(out[16:], flags)
	return append(out, data...)
}

func TestParseLog(t *testing.T) {
	data := bytes.Repeat([]byte("x"), 1024)
	whole := logOf(512, logEntry(512, 4, 2, logFUA, data), logEntry(512, 0, 0, logFlush, nil), logEntry(512, 8, 100, logDiscard, nil))
	log, err := parseLog(whole, 1<<20)
	if err != nil || len(log) != 3 || log[0].At != 2048 || !log[0].FUA || !bytes.Equal(log[0].Data, data) || !log[1].Flush || log[2].Data != nil {
		t.Fatalf("%v, %v", log, err)
	}
	for what, bad := range map[string][]byte{
		"empty":                 nil,
		"another format":        bytes.Repeat([]byte("y"), 4096),
		"cut":                   whole[:len(whole)-600],
		"behind the disk":       logOf(512, logEntry(512, 2047, 2, 0, data)),
		"a number that wraps":   logOf(512, logEntry(512, 1<<63, 1<<63, 0, data)),
		"a length that wraps":   logOf(512, logEntry(512, 1, 1<<55, 0, data)),
		"sectors of no size":    logOf(512)[:24],
		"sectors beyond reason": logOf(1 << 16),
	} {
		if log, err := parseLog(bad, 1<<20); err == nil {
			t.Errorf("%s: %d entries", what, len(log))
		}
	}
}

// FuzzParseLog: whatever the file says, no entry is outside of the disk or longer than the file.
func FuzzParseLog(f *testing.F) {
	f.Add(logOf(512, logEntry(512, 4, 2, logFUA, make([]byte, 1024)), logEntry(512, 0, 0, logFlush, nil)))
	f.Add(logOf(4096, logEntry(4096, 0, 1, logDiscard, nil)))
	f.Fuzz(func(t *testing.T, data []byte) {
		log, err := parseLog(data, 1<<20)
		if err != nil {
			return
		}
		var sum int
		for _, e := range log {
			sum += len(e.Data)
			if e.At < 0 || e.At+int64(len(e.Data)) > 1<<20 {
				t.Fatalf("an entry of %d bytes at %d", len(e.Data), e.At)
			}
		}
		if sum > len(data) {
			t.Fatalf("%d bytes out of %d", sum, len(data))
		}
	})
}
