package verify

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
)

// OpenFolder reads the head of a release folder: the entries of a bundle as files
// under the same names. The folder may be a mount with other files in it; only
// names of the layout are opened there, but certs/, pieces/ and images/ hold
// nothing else. Links are refused wherever they point. Errors as for ReadHead;
// E-NOT-FOUND when there is no such folder.
func OpenFolder(dir string) (*UnverifiedBundle, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, Refuse(CodeNotFound, "open the release folder: %w", err)
	}
	f := &folder{root: root}
	h, err := f.readHead()
	if err != nil {
		root.Close()
		return nil, err
	}
	return &UnverifiedBundle{head: h, images: f}, nil
}

// folder is a release folder; as an imageSource it keeps one image open.
type folder struct {
	root *os.Root
	file *os.File
}

func (f *folder) readHead() (*UnverifiedHead, error) {
	var b headBuilder
	names, err := f.headNames()
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		file, size, err := f.openFile(name)
		if err != nil {
			return nil, err
		}
		data, p, err := readEntry(&b, name, file, size)
		file.Close()
		if err == nil {
			err = b.add(p, data)
		}
		if err != nil {
			return nil, err
		}
	}
	return b.finish()
}

func readEntry(b *headBuilder, name string, file *os.File, size int64) ([]byte, place, error) {
	p, err := b.accept(name, size)
	if err != nil {
		return nil, p, err
	}
	// One byte more than the size that was allowed shows a file that grows while it is read.
	data, err := io.ReadAll(io.LimitReader(file, size+1))
	if err != nil {
		return nil, p, Refuse(CodeIO, "read %s: %w", name, err)
	}
	if int64(len(data)) != size {
		return nil, p, Refuse(CodeSize, "%s changed while it was read", name)
	}
	return data, p, nil
}

// headNames lists the files of the head that are there, in the order of a bundle.
func (f *folder) headNames() ([]string, error) {
	var names []string
	for n := 1; n <= maxTrustDocuments; n++ {
		document, signature := fmt.Sprintf("trust.%d.json", n), fmt.Sprintf("trust.%d.sig", n)
		if !f.exists(document) {
			break
		}
		names = append(names, document, signature)
	}
	certs, err := f.list(dirCerts)
	if err != nil {
		return nil, err
	}
	names = append(names, certs...)
	if f.exists(nameManifest) {
		names = append(names, nameManifest)
	}
	if f.exists(nameSignature) {
		names = append(names, nameSignature)
	}
	tables, err := f.list(dirPieces)
	if err != nil {
		return nil, err
	}
	return append(names, tables...), nil
}

func (f *folder) exists(name string) bool {
	_, err := f.root.Lstat(name)
	return err == nil
}

// maxDirEntries bounds what is read of a folder's listing.
const maxDirEntries = 4096

// list names the entries of a subfolder in ascending order; no subfolder is an empty one.
func (f *folder) list(dir string) ([]string, error) {
	bare := strings.TrimSuffix(dir, "/")
	info, err := f.root.Lstat(bare)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, Refuse(CodeIO, "look at %s: %w", dir, err)
	}
	if !info.IsDir() {
		return nil, Refuse(CodeBundle, "%s is not a folder", dir)
	}
	d, err := f.root.Open(bare)
	if err != nil {
		return nil, Refuse(CodeIO, "open %s: %w", dir, err)
	}
	defer d.Close()
	found, err := d.Readdirnames(maxDirEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, Refuse(CodeIO, "list %s: %w", dir, err)
	}
	if len(found) > maxDirEntries {
		return nil, Refuse(CodeBundle, "%s has more than %d entries", dir, maxDirEntries)
	}
	names := make([]string, len(found))
	for i, name := range found {
		names[i] = dir + name
		if _, err := placeOf(names[i]); err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	return names, nil
}

// openFile opens a regular file, not a link to one, and returns its size.
func (f *folder) openFile(name string) (*os.File, int64, error) {
	before, err := f.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, Refuse(CodeBundle, "%s is missing", name)
	}
	if err != nil {
		return nil, 0, Refuse(CodeIO, "look at %s: %w", name, err)
	}
	if !before.Mode().IsRegular() {
		return nil, 0, Refuse(CodeBundle, "%s is not a regular file", name)
	}
	// Without O_NONBLOCK a pipe that was swapped in would hang the reader.
	file, err := f.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, Refuse(CodeIO, "open %s: %w", name, err)
	}
	after, err := file.Stat()
	if err != nil || !os.SameFile(before, after) {
		file.Close()
		return nil, 0, Refuse(CodeBundle, "%s was replaced while it was opened", name)
	}
	return file, after.Size(), nil
}

func (f *folder) open(img Image) (io.Reader, error) {
	if err := f.closeImage(); err != nil {
		return nil, err
	}
	if info, err := f.root.Lstat(strings.TrimSuffix(dirImages, "/")); err == nil && !info.IsDir() {
		return nil, Refuse(CodeBundle, "%s is not a folder", dirImages)
	}
	file, size, err := f.openFile(ImageName(img.SHA256))
	if err != nil {
		return nil, err
	}
	if size != img.Size {
		file.Close()
		code := CodeSize
		if size < img.Size {
			code = CodeTruncated
		}
		return nil, Refuse(code, "the image %s has %d bytes in the folder, %d were signed", img.Name, size, img.Size)
	}
	f.file = file
	return file, nil
}

func (f *folder) end(images []Image) error {
	names, err := f.list(dirImages)
	if err != nil {
		return err
	}
	for _, name := range names {
		p, err := placeOf(name)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(images, func(img Image) bool { return img.SHA256 == p.digest }) {
			return Refuse(CodeBundle, "%s does not belong in the folder", name)
		}
	}
	return nil
}

func (f *folder) closeImage() error {
	if f.file == nil {
		return nil
	}
	err := f.file.Close()
	f.file = nil
	if err != nil {
		return Refuse(CodeIO, "close an image: %w", err)
	}
	return nil
}

func (f *folder) close() error {
	return errors.Join(f.closeImage(), f.root.Close())
}
