package swarm

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// SetReserve changes how many bytes of the file system must stay free, from the next check on.
func (s *Store) SetReserve(bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cfg.Reserve = bytes
}

// CheckSpace says whether the missing bytes of these images fit, as E-SPACE or
// nil. What a started image already occupies is not counted twice, and what other
// transfers still have to write is counted as gone: two transfers that each fit
// alone must not run into a full disk together.
func (s *Store) CheckSpace(imgs ...verify.Image) error {
	imgs = slices.DeleteFunc(slices.Clone(imgs), func(img verify.Image) bool { return s.choose(img) != "" })
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkSpaceLocked(imgs)
}

func (s *Store) checkSpaceLocked(imgs []verify.Image) error {
	asked := make(map[verify.Digest]bool, len(imgs))
	var missing int64
	for _, img := range imgs {
		if asked[img.SHA256] || s.hasLocked(img.SHA256) {
			continue
		}
		asked[img.SHA256] = true
		missing += max(0, img.Size-allocated(s.partPath(img.SHA256)))
	}
	if missing == 0 {
		return nil
	}
	for d, size := range s.promised {
		if !asked[d] {
			missing += max(0, size-allocated(s.partPath(d)))
		}
	}
	free, err := s.free()
	if err != nil {
		return verify.Refuse(verify.CodeIO, "ask for the free space of %s: %w", s.cfg.Dir, err)
	}
	if need := missing + s.cfg.Reserve - free; need > 0 {
		return spaceRefusal(need, fmt.Errorf("%d more bytes must be free in %s", need, s.cfg.Dir))
	}
	return nil
}

func spaceRefusal(need int64, cause error) error {
	err := verify.Refuse(verify.CodeSpace, "store an image: %w", cause)
	var r *verify.Refusal
	if errors.As(err, &r) {
		r.NeedBytes = need
	}
	return err
}

// freeBytes is what the file system of dir has left for this process.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// allocated is the number of bytes that a file occupies on disk; 0 if it is not there.
func allocated(path string) int64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0
	}
	return st.Blocks * 512
}

// preallocate takes the blocks of a file now, so that a full disk shows before
// the first byte is fetched. File systems that cannot do so get a sparse file of
// the right size; there a full disk shows as a write error later.
func preallocate(f *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	for {
		switch err := unix.Fallocate(int(f.Fd()), 0, 0, size); {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return f.Truncate(size)
		default:
			return err
		}
	}
}

// codeDisk gives an error of the disk its code: a full disk is the user's to
// solve, anything else is the disk's.
func codeDisk(err error, need int64) error {
	switch {
	case err == nil, verify.CodeOf(err) != "":
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, syscall.EFBIG):
		return spaceRefusal(max(1, need), err)
	}
	return verify.Refuse(verify.CodeIO, "store an image: %w", err)
}

// fdatasync makes the bytes of f durable, and its size if that changed.
func fdatasync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
