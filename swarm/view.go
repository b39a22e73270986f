package swarm

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// View reads the store of another process that may have been taken over: whatever stands under a name there was put
// there by an enemy. Names come from digests only, no link is followed below State, a pipe or device is not waited for
// or read, and sizes are looked at before bytes. What it returns is as unverified as anything else.
type View struct {
	// State is the other process's folder. The path to it is trusted, what is in it is not.
	State string
}

// storeName is the store's name in the folder of a device's state.
const storeName = "store"

// UnverifiedHead reads the head that is kept under the release's name, at most verify.MaxHead bytes.
func (v View) UnverifiedHead(release verify.Digest) ([]byte, error) {
	f, size, err := v.open("heads", release.String()+headSuffix)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > verify.MaxHead {
		return nil, verify.Refuse(verify.CodeSize, "the head of release %s has %d bytes", release, size)
	}
	raw, err := io.ReadAll(io.LimitReader(f, verify.MaxHead))
	if err != nil {
		return nil, verify.Refuse(verify.CodeIO, "read the head of release %s: %w", release, err)
	}
	return raw, nil
}

// OpenUnverified opens what is kept under the image's name, if it has the image's size now.
func (v View) OpenUnverified(img verify.Image) (io.ReadCloser, error) {
	f, size, err := v.open("images", img.SHA256.String())
	if err != nil {
		return nil, err
	}
	switch {
	case size < img.Size:
		err = verify.Refuse(verify.CodeTruncated, "image %s has %d of its %d bytes", img.SHA256, size, img.Size)
	case size > img.Size:
		err = verify.Refuse(verify.CodeSize, "image %s has more than its %d bytes", img.SHA256, img.Size)
	default:
		return f, nil
	}
	f.Close()
	return nil, err
}

// open walks down name by name. O_NONBLOCK: a pipe without a writer, or a lease on the file, must not hold us up.
func (v View) open(folder, name string) (*os.File, int64, error) {
	at, err := unix.Open(v.State, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, verify.Refuse(verify.CodeIO, "open %s: %w", v.State, err)
	}
	for _, step := range []string{storeName, folder} {
		next, err := unix.Openat(at, step, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(at)
		if err != nil {
			return nil, 0, verify.Refuse(verify.CodeIO, "open %s of the store: %w", step, err)
		}
		at = next
	}
	defer unix.Close(at)
	// Looked at before it is opened, because opening a device can do something. Swapped in between, it is looked at again.
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, 0, verify.Refuse(verify.CodeIO, "look at %s in the store: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, 0, notRegular(name)
	}
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, verify.Refuse(verify.CodeIO, "open %s in the store: %w", name, err)
	}
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return nil, 0, notRegular(name)
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("store/%s/%s", folder, name)), st.Size, nil
}

func notRegular(name string) error {
	return verify.Refuse(verify.CodeBundle, "%s in the store is no regular file", name)
}
