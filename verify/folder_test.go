package verify_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"meshupd/verify"
	"meshupd/verify/verifytest"
)

func newCancelled(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx, cancel
}

func takeFolder(t *testing.T, door *verify.Door, dir string) (*verify.Release, error) {
	t.Helper()
	b, err := verify.OpenFolder(dir)
	if err != nil {
		return nil, err
	}
	return takeOpen(t, door, b)
}

func TestFolderIsTakenLikeABundle(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	dir := v.Release(t, verifytest.Opts{Images: []verifytest.Image{{Name: "a"}, {Name: "b", Size: 9}}})
	// A stick has other things on it.
	for _, name := range []string{"README.txt", ".Trash", "trust.3.json"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("hello"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := takeFolder(t, v.Door(t), dir); err != nil {
		t.Fatal(err)
	}
}

func TestBadFoldersAreRefusedByName(t *testing.T) {
	v := verifytest.NewVendor(t, "kiosk-a")
	good := v.Release(t, verifytest.Opts{Size: 150_000})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	one := func(dir, pattern string) string {
		t.Helper()
		found, _ := filepath.Glob(filepath.Join(dir, pattern))
		if len(found) != 1 {
			t.Fatalf("%s: %v", pattern, found)
		}
		return found[0]
	}
	link := func(path string) {
		must(os.Rename(path, path+".moved"))
		target := filepath.Join(t.TempDir(), "away")
		must(os.Rename(path+".moved", target))
		must(os.Symlink(target, path))
	}
	inside := func(path string) { // a link that stays inside the folder is a link still
		target := filepath.Join(filepath.Dir(filepath.Dir(path)), "elsewhere")
		must(os.Rename(path, target))
		must(os.Symlink("../elsewhere", path))
	}
	rewrite := func(path string, change func([]byte) []byte) {
		raw := readFile(t, path)
		must(os.WriteFile(path, change(raw), 0o644))
	}
	for _, c := range []struct {
		name   string
		change func(dir string)
		want   verify.Code
	}{
		{"unsigned", func(d string) { must(os.Remove(filepath.Join(d, "manifest.sig"))) }, verify.CodeSigNone},
		{"no manifest", func(d string) { must(os.Remove(filepath.Join(d, "manifest.json"))) }, verify.CodeBundle},
		{"no trust document", func(d string) { must(os.Remove(filepath.Join(d, "trust.1.json"))) }, verify.CodeBundle},
		{"no trust signature", func(d string) { must(os.Remove(filepath.Join(d, "trust.1.sig"))) }, verify.CodeBundle},
		{"no certificate", func(d string) { must(os.Remove(one(d, "certs/*"))) }, verify.CodeBundle},
		{"no piece table", func(d string) { must(os.RemoveAll(filepath.Join(d, "pieces"))) }, verify.CodeBundle},
		{"no image", func(d string) { must(os.Remove(one(d, "images/*"))) }, verify.CodeBundle},
		{"extra image name", func(d string) { must(os.WriteFile(filepath.Join(d, "images", "x"), nil, 0o644)) }, verify.CodeBundle},
		{"extra image", func(d string) {
			must(os.WriteFile(filepath.Join(d, "images", strings.Repeat("a", 64)), nil, 0o644))
		}, verify.CodeBundle},
		{"extra piece table", func(d string) { must(os.WriteFile(filepath.Join(d, "pieces", "x"), nil, 0o644)) }, verify.CodeBundle},
		{"extra certificate", func(d string) { must(os.WriteFile(filepath.Join(d, "certs", ".hidden"), nil, 0o644)) }, verify.CodeBundle},
		{"manifest is a link", func(d string) { link(filepath.Join(d, "manifest.json")) }, verify.CodeBundle},
		{"certificate is a link", func(d string) { link(one(d, "certs/*")) }, verify.CodeBundle},
		{"image is a link out", func(d string) { link(one(d, "images/*")) }, verify.CodeBundle},
		{"image is a link inside", func(d string) { inside(one(d, "images/*")) }, verify.CodeBundle},
		{"images is a link", func(d string) {
			must(os.Rename(filepath.Join(d, "images"), filepath.Join(d, "other")))
			must(os.Symlink("other", filepath.Join(d, "images")))
		}, verify.CodeBundle},
		{"certs is a link", func(d string) { link(filepath.Join(d, "certs")) }, verify.CodeBundle},
		{"image is a pipe", func(d string) {
			p := one(d, "images/*")
			must(os.Remove(p))
			must(syscall.Mkfifo(p, 0o644))
		}, verify.CodeBundle},
		{"image is a folder", func(d string) {
			p := one(d, "images/*")
			must(os.Remove(p))
			must(os.Mkdir(p, 0o755))
		}, verify.CodeBundle},
		{"image cut", func(d string) {
			rewrite(one(d, "images/*"), func(b []byte) []byte { return b[:len(b)-1] })
		}, verify.CodeTruncated},
		{"image longer", func(d string) {
			rewrite(one(d, "images/*"), func(b []byte) []byte { return append(b, 0) })
		}, verify.CodeSize},
		{"image changed", func(d string) {
			rewrite(one(d, "images/*"), func(b []byte) []byte { b[7] ^= 1; return b })
		}, verify.CodeDigest},
		{"manifest changed", func(d string) {
			rewrite(filepath.Join(d, "manifest.json"), func(b []byte) []byte { return append(b, '\n') })
		}, verify.CodeSigBad},
		{"manifest too large", func(d string) {
			must(os.Truncate(filepath.Join(d, "manifest.json"), verify.MaxManifest+1))
		}, verify.CodeSize},
		{"empty folder", func(d string) { must(os.RemoveAll(d)); must(os.Mkdir(d, 0o755)) }, verify.CodeBundle},
		{"no folder", func(d string) { must(os.RemoveAll(d)) }, verify.CodeNotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "release")
			must(os.CopyFS(dir, os.DirFS(good)))
			state := t.TempDir()
			door := v.DoorAt(t, state)
			before := snapshot(t, state)
			c.change(dir)
			_, err := takeFolder(t, door, dir)
			if verify.CodeOf(err) != c.want {
				t.Fatalf("got %v (%s), want %s", err, verify.CodeOf(err), c.want)
			}
			if snapshot(t, state) != before {
				t.Fatal("a refused folder changed the state folder")
			}
		})
	}
}
