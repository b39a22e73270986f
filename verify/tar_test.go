package verify_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type file struct {
	tar.Header
	data []byte
}

func untar(t testing.TB, raw []byte) []file {
	t.Helper()
	var out []file
	tr := tar.NewReader(bytes.NewReader(raw))
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, file{*hdr, data})
	}
}

func retar(t testing.TB, files []file) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		hdr := f.Header
		if hdr.Typeflag == tar.TypeReg {
			hdr.Size = int64(len(f.data))
		}
		hdr.Format = tar.FormatUnknown
		if err := tw.WriteHeader(&hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func find(t testing.TB, files []file, prefix string) int {
	t.Helper()
	for i, f := range files {
		if strings.HasPrefix(f.Name, prefix) {
			return i
		}
	}
	t.Fatalf("no entry %s", prefix)
	return -1
}

func plain(name string, data []byte) file {
	return file{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, data}
}

func insert(files []file, at int, f file) []file {
	return append(append(append([]file{}, files[:at]...), f), files[at:]...)
}

func remove(files []file, at int) []file {
	return append(append([]file{}, files[:at]...), files[at+1:]...)
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// snapshot is the content of every file below dir.
func snapshot(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, path)
		if d.Type().IsRegular() {
			fmt.Fprintf(&b, "%x\n", sha256.Sum256(readFile(t, path)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
