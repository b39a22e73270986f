package install

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// overwrite changes bytes inside an existing file or device, syncs, and reads them back.
//
// It is how everything is written that a bootloader reads. A new file renamed into place is safer for a reader that
// knows the journal, but GRUB and U-Boot read file systems without replaying it: until the journal is written back they
// see the old file, or none, whatever was synced. Bytes in blocks that the file already owns are where they are looked for.
func overwrite(path string, at int64, data []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data, at); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	// From the medium, not from the cache of what was written.
	_ = unix.Fadvise(int(f.Fd()), at, int64(len(data)), unix.FADV_DONTNEED)
	got := make([]byte, len(data))
	if _, err := f.ReadAt(got, at); err != nil && err != io.EOF {
		return fmt.Errorf("read %s back: %w", path, err)
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("%s reads back other bytes than were written", path)
	}
	return f.Close()
}
