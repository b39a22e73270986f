package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"meshupd/verify/durable"
)

// createFresh writes a file that is not there yet, in steps that are safe on FAT, which has no journal.
//
// A rename is not: Linux writes the new name with the size 0, and where the bytes are only when the file itself is written
// back, which no sync of the folder does; a cut leaves an empty file, or two names that own the same clusters, so that
// removing the one frees the other. Here a cut leaves no file, an empty one, or all of it.
func createFresh(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fillFresh(f, data); err != nil {
		os.Remove(path) // best effort: an empty file is no entry either
		return err
	}
	return f.Close()
}

func fillFresh(f *os.File, data []byte) error {
	if _, err := f.Write(data); err != nil {
		return err
	}
	// First the bytes, the allocation table and an empty file, then where its bytes are: never a name of what lay there before.
	// Where the range cannot be written alone, only this order is lost.
	_ = unix.SyncFileRange(int(f.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	if err := durable.SyncDir(filepath.Dir(f.Name())); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	_ = unix.Fadvise(int(f.Fd()), 0, int64(len(data)), unix.FADV_DONTNEED)
	got := make([]byte, len(data)+1)
	n, err := f.ReadAt(got, 0)
	if err != nil && err != io.EOF {
		return fmt.Errorf("read %s back: %w", f.Name(), err)
	}
	if !bytes.Equal(got[:n], data) {
		return fmt.Errorf("%s reads back other bytes than were written", f.Name())
	}
	return nil
}

// removeFresh removes a file, its name before its clusters: a name of free clusters would be one of whatever comes there next.
// A file that is not there is no error.
func removeFresh(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer f.Close()
	}
	if err := durable.Remove(path); err != nil || f == nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}
