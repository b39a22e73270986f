package verify

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// OpenCopy is OpenDoor on a copy of cfg.Dir in scratch, an empty folder of the caller's: what a device would say can be asked
// without changing what it knows. A device that has no state yet is one that is new. Errors as OpenDoor.
func OpenCopy(cfg DoorConfig, scratch string) (*Door, error) {
	for _, name := range counterFiles {
		if err := copySmall(filepath.Join(cfg.Dir, name), filepath.Join(scratch, name)); err != nil {
			return nil, err
		}
	}
	for _, name := range trustFolders {
		from, to := filepath.Join(cfg.Dir, name), filepath.Join(scratch, name)
		if err := copyTrustFolder(from, to); err != nil {
			return nil, err
		}
	}
	cfg.Dir = scratch
	return OpenDoor(cfg)
}

// copyTrustFolder copies the documents and certificates of a learned chain. What is none of them stays.
func copyTrustFolder(from, to string) error {
	if err := os.MkdirAll(filepath.Join(to, dirCerts), 0o700); err != nil {
		return Refuse(CodeIO, "copy the trust state: %w", err)
	}
	for n := 1; n <= maxTrustDocuments; n++ {
		name := fmt.Sprintf("trust.%d.json", n)
		if _, err := os.Lstat(filepath.Join(from, name)); errors.Is(err, fs.ErrNotExist) {
			break
		}
		for _, file := range []string{name, fmt.Sprintf("trust.%d.sig", n)} {
			if err := copySmall(filepath.Join(from, file), filepath.Join(to, file)); err != nil {
				return err
			}
		}
	}
	certs, err := os.Open(filepath.Join(from, dirCerts))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return Refuse(CodeIO, "copy the trust state: %w", err)
	}
	defer certs.Close()
	names, err := certs.Readdirnames(maxDirEntries)
	if err != nil && !errors.Is(err, io.EOF) {
		return Refuse(CodeIO, "copy the trust state: %w", err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := copySmall(filepath.Join(from, dirCerts, name), filepath.Join(to, dirCerts, name)); err != nil {
			return err
		}
	}
	return nil
}

// copySmall copies a file of the state, at most as much of it as makes a reader see that it is too large.
func copySmall(from, to string) error {
	f, err := os.OpenFile(from, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return Refuse(CodeIO, "copy the trust state: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxCopied+1))
	if err == nil {
		err = os.WriteFile(to, raw, 0o600)
	}
	if err != nil {
		return Refuse(CodeIO, "copy the trust state: %w", err)
	}
	return nil
}

// maxCopied is above the limit of everything in the state: those that read it judge its size.
const maxCopied = 1 << 20
