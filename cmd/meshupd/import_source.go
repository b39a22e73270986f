package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/verify"
)

// bundleSuffix of single-file releases.
const bundleSuffix = ".update"

// What is looked at on a stick: enough for any publisher, and an end for a stick with a million files.
const (
	maxEntries = 10000
	maxSources = 64
)

// source is a release on a stick: a NAME.update file or a folder with the same
// layout. Nothing of it is trusted, and the daemon never opens it: its bytes are streamed.
type source struct {
	path   string
	folder bool
}

// findSources looks at path: a file, a release folder, or a folder that holds some, itself or one level below.
func findSources(path string) ([]source, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, openError("look at", err)
	}
	if !info.IsDir() {
		return []source{{path: path}}, nil
	}
	if isReleaseFolder(path) {
		return []source{{path, true}}, nil
	}
	found, folders, err := scanFolder(path)
	if err != nil {
		return nil, err
	}
	for _, folder := range folders {
		if isReleaseFolder(folder) {
			found = append(found, source{folder, true})
			continue
		}
		// A folder that cannot be read (lost+found) does not hide the releases beside it.
		if inner, _, err := scanFolder(folder); err == nil {
			found = append(found, inner...)
		}
	}
	switch {
	case len(found) == 0:
		return nil, verify.Refuse(verify.CodeNotFound, "no release in %s: neither a %s file nor a folder with manifest.json", path, bundleSuffix)
	case len(found) > maxSources:
		return nil, verify.Refuse(verify.CodeSize, "%d releases in %s, more than %d: name one of them", len(found), path, maxSources)
	}
	return found, nil
}

func isReleaseFolder(dir string) bool {
	info, err := os.Lstat(filepath.Join(dir, "manifest.json"))
	return err == nil && info.Mode().IsRegular()
}

// scanFolder lists the .update files and the folders in dir, sorted. Links and hidden names are left out.
func scanFolder(dir string) (files []source, folders []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, openError("look at", err)
	}
	for _, e := range entries[:min(len(entries), maxEntries)] {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), "."):
		case e.IsDir():
			folders = append(folders, path)
		case e.Type().IsRegular() && strings.HasSuffix(e.Name(), bundleSuffix):
			files = append(files, source{path: path})
		}
	}
	return files, folders, nil
}

// openBundle reads the release's head; the caller closes what it returns.
func (s source) openBundle() (*verify.UnverifiedBundle, io.Closer, error) {
	if s.folder {
		b, err := verify.OpenFolder(s.path)
		return b, b, err
	}
	f, err := openRegular(os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0))
	if err != nil {
		return nil, nil, openError("open", err)
	}
	b, err := verify.OpenBundle(f)
	if err != nil {
		_ = f.Close()
		return nil, nil, err
	}
	return b, f, nil
}

// head reads the canonical bytes of the release's head.
func (s source) head() ([]byte, error) {
	b, stop, err := s.openBundle()
	if err != nil {
		return nil, err
	}
	defer stop.Close()
	return b.Head().Bytes(), nil
}

// openRegular accepts only a regular file: a named pipe would wait for ever.
func openRegular(f *os.File, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = verify.Refuse(verify.CodeBundle, "%s is not a file", f.Name())
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// images calls send with the bytes of each image that the daemon lacks. What
// they are is for the daemon to check; here only the layout has to be right, to the end of the file.
func (s source) images(want []control.ImportImage, send func(control.ImportImage, io.Reader) error) error {
	b, stop, err := s.openBundle()
	if err != nil {
		return err
	}
	defer stop.Close()
	list := make([]verify.Image, len(want))
	for i, img := range want {
		list[i] = verify.Image{Name: img.Name, SHA256: img.Digest, Size: img.Size}
	}
	for _, img := range want {
		_, r, err := b.NextUnverified(list)
		if err != nil {
			return readError(err)
		}
		if img.Have {
			continue
		}
		if err := send(img, &exactReader{r: r, left: img.Size, what: img.Name}); err != nil {
			return err
		}
	}
	if _, _, err := b.NextUnverified(list); !errors.Is(err, io.EOF) {
		return readError(err)
	}
	return nil
}

// exactReader words what happens when a file ends early or its stick is pulled out.
type exactReader struct {
	r    io.Reader
	left int64
	what string
}

func (x *exactReader) Read(p []byte) (int, error) {
	n, err := x.r.Read(p)
	x.left -= int64(n)
	switch {
	case err == nil:
	case errors.Is(err, io.EOF) && x.left <= 0:
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = verify.Refuse(verify.CodeTruncated, "image %s ends %d bytes early", x.what, x.left)
	default:
		err = readError(err)
	}
	return n, err
}

// readError is for a stick that fails or is gone.
func readError(err error) error {
	if verify.CodeOf(err) != "" {
		return err
	}
	return verify.Refuse(verify.CodeIO, "the source cannot be read: %w", fmt.Errorf("read: %w", err))
}
