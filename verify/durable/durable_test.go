package durable_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"meshupd/verify/durable"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func wantFile(t *testing.T, path, content string, perm fs.FileMode) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil || string(raw) != content {
		t.Fatalf("%s holds %q, %v; want %q", path, raw, err, content)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != perm {
		t.Fatalf("%s has mode %v, %v; want %v", path, info.Mode(), err, perm)
	}
}

func TestWriteFileReplacesAndLeavesNothingElse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	for _, content := range []string{"one", "", "three"} {
		if err := durable.WriteFile(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		wantFile(t, path, content, 0o640)
		if got := names(t, dir); len(got) != 1 {
			t.Fatalf("the folder holds %v", got)
		}
	}
}

func TestUntilCommitTheOldContentStands(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if err := durable.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := durable.Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("new"); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, "old", 0o600)
	if err := f.Commit(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, path, "new", 0o600)
	f.Abort() // after Commit it does nothing
	wantFile(t, path, "new", 0o600)
	if err := f.Commit(); err == nil {
		t.Error("a second Commit is no error")
	}
}

func TestAbortLeavesTheOldContentAndNoTrace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if err := durable.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := durable.Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString("half")
	f.Abort()
	f.Abort()
	wantFile(t, path, "old", 0o600)
	if got := names(t, dir); len(got) != 1 {
		t.Fatalf("the folder holds %v", got)
	}
}

func TestFailedCommitLeavesNoTrace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "taken")
	if err := os.Mkdir(path, 0o755); err != nil { // a folder cannot be replaced by a file
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Fatal("a folder was replaced by a file")
	}
	f, err := durable.Create(filepath.Join(dir, "closed"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // the disk went away below it
	if err := f.Commit(); err == nil {
		t.Fatal("Commit of a closed file is no error")
	}
	if got := names(t, dir); len(got) != 1 || got[0] != "taken" {
		t.Fatalf("the folder holds %v", got)
	}
	if _, err := durable.Create(filepath.Join(dir, "none", "x"), 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a missing folder: %v", err)
	}
}

func TestSweepRemovesOnlyLeftovers(t *testing.T) {
	dir := t.TempDir()
	if err := durable.WriteFile(filepath.Join(dir, "kept"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".hidden"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := durable.Create(filepath.Join(dir, "cut"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // a power cut: neither Commit nor Abort
	if got := names(t, dir); len(got) != 3 {
		t.Fatalf("the folder holds %v", got)
	}
	if err := durable.Sweep(dir); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) != 2 || got[0] != ".hidden" || got[1] != "kept" {
		t.Fatalf("after Sweep the folder holds %v", got)
	}
	if err := durable.Sweep(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a missing folder: %v", err)
	}
}

func TestSymlinkIsReplacedInOneStep(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "current")
	for _, target := range []string{"a", "b", "b"} {
		if err := durable.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(link); err != nil || got != target {
			t.Fatalf("the link points to %q, %v", got, err)
		}
	}
	if got := names(t, dir); len(got) != 1 {
		t.Fatalf("the folder holds %v", got)
	}
	// What an earlier cut left does not stand in the way.
	if err := os.Symlink("stale", filepath.Join(dir, ".current.tmp-link")); err != nil {
		t.Fatal(err)
	}
	if err := durable.Symlink("c", link); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.Readlink(link); got != "c" {
		t.Fatalf("the link points to %q", got)
	}
}

func TestMkdirAllRenameRemove(t *testing.T) {
	dir := t.TempDir()
	deep := filepath.Join(dir, "a", "b", "c")
	for range 2 {
		if err := durable.MkdirAll(deep, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	from, to := filepath.Join(deep, "from"), filepath.Join(deep, "to")
	if err := durable.WriteFile(from, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(filepath.Join(from, "d"), 0o750); err == nil {
		t.Fatal("a folder was made below a file")
	}
	if err := durable.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	wantFile(t, to, "x", 0o600)
	if err := durable.Rename(from, to); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("rename of nothing: %v", err)
	}
	for range 2 { // the second finds nothing, which is what was asked for
		if err := durable.Remove(to); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(t, deep); len(got) != 0 {
		t.Fatalf("the folder holds %v", got)
	}
	if err := durable.Remove(dir); err == nil {
		t.Error("a folder with files in it was removed")
	}
}
