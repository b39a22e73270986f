package install

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// device makes a file of size zeros and opens it with flag.
func device(t *testing.T, size int64, flag int) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestBlockWriterTellsOfAnErrorOnce(t *testing.T) {
	for name, length := range map[string]int{"in the middle": 8 * blockChunk, "at the end": 10} {
		w := newBlockWriter(device(t, 16*blockChunk, os.O_RDONLY), 16*blockChunk)
		_, err := w.Write(bytes.Repeat([]byte("x"), length))
		if err == nil {
			err = w.finish()
		}
		w.stop()
		if err == nil {
			t.Errorf("%s: a device that cannot be written was written", name)
		}
	}
}

func TestBlockWriterAndTheEndOfTheDevice(t *testing.T) {
	for _, c := range []struct {
		size, length int64
		fits         bool
	}{
		{8704, 8704, true}, {8704, 8200, true}, {8704, 8705, false}, {8192, 8192, true}, {8192, 8193, false},
		{blockChunk + 512, blockChunk + 512, true}, {blockChunk + 512, blockChunk + 513, false}, {512, 1, true}, {512, 0, true},
	} {
		f := device(t, c.size, os.O_RDWR)
		w := newBlockWriter(f, c.size)
		data := bytes.Repeat([]byte("y"), int(c.length))
		_, err := w.Write(data)
		if err == nil {
			err = w.finish()
		}
		w.stop()
		if (err == nil) != c.fits {
			t.Errorf("%d bytes to a device of %d: %v", c.length, c.size, err)
		}
		got, rerr := os.ReadFile(f.Name())
		if rerr != nil || int64(len(got)) != c.size || c.fits && !bytes.Equal(bytes.TrimRight(got, "\x00"), data) {
			t.Errorf("%d bytes to a device of %d: it now has %d, %v", c.length, c.size, len(got), rerr)
		}
	}
}
