// Package durable is the one way meshupd makes a file outlast a power cut.
//
// Every write follows the same order: a temporary file in the target's own
// folder, the bytes, fsync of the file, rename over the target, fsync of the
// folder. After WriteFile or Commit returned nil, a cut leaves the new content;
// before, it leaves the old content or none, and at worst a stray temporary
// file, which Sweep removes at the next start. A rename alone is atomic but not
// durable: without the two syncs a cut can leave an empty file under the new name.
//
// It does not lock: two writers of one path need their own agreement.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tempMark is part of every temporary name, so that Sweep can tell a leftover from a file of ours.
const tempMark = ".tmp-"

// File is a file being written that has not yet taken its name.
type File struct {
	*os.File
	target string
	done   bool
}

// Create starts a file that will be called path once it is committed.
// The caller must end it with Commit or Abort.
func Create(path string, perm fs.FileMode) (*File, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+tempMark+"*")
	if err != nil {
		return nil, fmt.Errorf("create a temporary file for %s: %w", path, err)
	}
	if err := f.Chmod(perm); err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, fmt.Errorf("set the mode of %s: %w", path, err)
	}
	return &File{File: f, target: path}, nil
}

// Commit makes the content and the name durable. On any error the target is as
// it was, unless only the last sync of the folder failed: then the new name may
// or may not survive a cut, and the caller has to treat the write as not done.
func (f *File) Commit() error {
	if f.done {
		return errors.New("durable: file already ended")
	}
	if err := f.Sync(); err != nil {
		f.Abort()
		return fmt.Errorf("sync %s: %w", f.target, err)
	}
	if err := f.Close(); err != nil {
		f.Abort()
		return fmt.Errorf("close %s: %w", f.target, err)
	}
	if err := os.Rename(f.Name(), f.target); err != nil {
		f.Abort()
		return fmt.Errorf("rename to %s: %w", f.target, err)
	}
	f.done = true
	return SyncDir(filepath.Dir(f.target))
}

// Abort drops what was written. It does nothing after Commit, so it can be deferred.
func (f *File) Abort() {
	if f.done {
		return
	}
	f.done = true
	f.Close()
	os.Remove(f.Name())
}

// WriteFile replaces the file at path by data, durably.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	f, err := Create(path, perm)
	if err != nil {
		return err
	}
	defer f.Abort()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Commit()
}

// Rename moves a file whose bytes are already synced to its final name in the same folder.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("rename to %s: %w", to, err)
	}
	return SyncDir(filepath.Dir(to))
}

// Symlink points link at target, replacing an older link in one step.
func Symlink(target, link string) error {
	tmp := filepath.Join(filepath.Dir(link), "."+filepath.Base(link)+tempMark+"link")
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a stale link: %w", err)
	}
	if err := os.Symlink(target, tmp); err != nil {
		return fmt.Errorf("link to %s: %w", target, err)
	}
	return Rename(tmp, link)
}

// Remove deletes the file at path, durably. A file that is not there is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// MkdirAll makes dir and its missing parents, and syncs each folder that gained an entry.
func MkdirAll(dir string, perm fs.FileMode) error {
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return fmt.Errorf("make folder %s: a file is in its place", dir)
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make folder %s: %w", dir, err)
	}
	return SyncDir(parent)
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open folder %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}

// Sweep removes temporary files that a cut left in dir (not in its subfolders).
// Call it before anything writes there.
func Sweep(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep %s: %w", dir, err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && strings.Contains(e.Name(), tempMark) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("sweep %s: %w", dir, err)
			}
		}
	}
	return nil
}

// Append writes data at offset, the end of the file as the caller knows it, and
// syncs. Whatever a cut left behind that end is cut off first, so a torn append
// never becomes the middle of the file. The file is made if it does not exist.
func Append(path string, offset int64, data []byte, perm fs.FileMode) error {
	_, statErr := os.Lstat(path)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, perm)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer f.Close()
	if err := f.Truncate(offset); err != nil {
		return fmt.Errorf("cut %s at its known end: %w", path, err)
	}
	if _, err := f.WriteAt(data, offset); err != nil {
		return fmt.Errorf("append to %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	if errors.Is(statErr, fs.ErrNotExist) {
		return SyncDir(filepath.Dir(path))
	}
	return nil
}
