package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

// head reads the canonical bytes of the release's head.
func (s source) head() ([]byte, error) {
	if s.folder {
		b, err := verify.OpenFolder(s.path)
		if err != nil {
			return nil, err
		}
		defer b.Close()
		return b.Head().Bytes(), nil
	}
	f, err := openRegular(os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0))
	if err != nil {
		return nil, openError("open", err)
	}
	defer f.Close()
	h, err := verify.ReadHead(f)
	if err != nil {
		return nil, err
	}
	return h.Bytes(), nil
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
// they are is for the daemon to check; here only their number has to be right.
func (s source) images(want []control.ImportImage, send func(control.ImportImage, io.Reader) error) error {
	if s.folder {
		return s.folderImages(want, send)
	}
	f, err := openRegular(os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0))
	if err != nil {
		return openError("open", err)
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for _, img := range want {
		if img.Have {
			continue
		}
		if err := seekEntry(tr, img); err != nil {
			return err
		}
		if err := send(img, &exactReader{r: tr, left: img.Size, what: img.Name}); err != nil {
			return err
		}
	}
	return nil
}

// seekEntry moves to an image; those the daemon has are passed over.
func seekEntry(tr *tar.Reader, img control.ImportImage) error {
	for {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return verify.Refuse(verify.CodeTruncated, "the file ends before image %s", img.Name)
		case err != nil:
			return readError(err)
		case h.Name != verify.ImageName(img.Digest):
			continue
		case h.Typeflag != tar.TypeReg || h.Size != img.Size:
			return verify.Refuse(verify.CodeSize, "image %s has %d bytes in the file, %d were signed", img.Name, h.Size, img.Size)
		}
		return nil
	}
}

func (s source) folderImages(want []control.ImportImage, send func(control.ImportImage, io.Reader) error) error {
	root, err := os.OpenRoot(s.path) // a link on the stick leads nowhere else
	if err != nil {
		return openError("open", err)
	}
	defer root.Close()
	for _, img := range want {
		if img.Have {
			continue
		}
		if err := sendFile(root, img, send); err != nil {
			return err
		}
	}
	return nil
}

func sendFile(root *os.Root, img control.ImportImage, send func(control.ImportImage, io.Reader) error) error {
	// A link is no image, wherever it leads.
	if info, err := root.Lstat(verify.ImageName(img.Digest)); err == nil && !info.Mode().IsRegular() {
		return verify.Refuse(verify.CodeBundle, "image %s is not a file", img.Name)
	}
	f, err := openRegular(root.OpenFile(verify.ImageName(img.Digest), os.O_RDONLY|syscall.O_NONBLOCK, 0))
	if errors.Is(err, fs.ErrNotExist) {
		return verify.Refuse(verify.CodeBundle, "image %s is missing: no %s", img.Name, verify.ImageName(img.Digest))
	}
	if err != nil {
		return openError("open image "+img.Name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return readError(err)
	}
	if info.Size() != img.Size {
		code := verify.CodeSize
		if info.Size() < img.Size {
			code = verify.CodeTruncated
		}
		return verify.Refuse(code, "image %s has %d bytes, %d were signed", img.Name, info.Size(), img.Size)
	}
	return send(img, &exactReader{r: f, left: img.Size, what: img.Name})
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
	if errors.Is(err, tar.ErrHeader) {
		return verify.Refuse(verify.CodeFormat, "the file is no release bundle: %w", err)
	}
	return verify.Refuse(verify.CodeIO, "the source cannot be read: %w", fmt.Errorf("read: %w", err))
}
