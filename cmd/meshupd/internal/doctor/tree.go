package doctor

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// Tree is a folder that is read as the root of a system: its symbolic links lead where they would lead there, and never out
// of it. os.Root keeps the second promise, also against whoever changes the tree meanwhile; it refuses links that begin with
// "/", which systems are full of, so these are followed here.
type Tree struct {
	root *os.Root
	dir  string
}

const (
	maxLinks   = 40   // as Linux follows
	maxEntries = 4096 // of one folder
)

// OpenTree opens the folder. Errors are E-NOT-FOUND.
func OpenTree(dir string) (*Tree, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, verify.Refuse(verify.CodeNotFound, "open the root folder: %w", err)
	}
	return &Tree{root, dir}, nil
}

// Close frees the descriptor.
func (t *Tree) Close() error { return t.root.Close() }

// Dir is the folder as it was named.
func (t *Tree) Dir() string { return t.dir }

// resolve follows the links of a path, and the last one too if last is true. What it returns has none, and is below the root.
func (t *Tree) resolve(name string, last bool) (string, error) {
	todo := strings.Split(name, "/")
	var done []string
	for links := 0; len(todo) > 0; {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			// The parent of the root is the root, as in chroot(2).
			done = done[:max(0, len(done)-1)]
			continue
		}
		at := strings.Join(append(slices.Clone(done), part), "/")
		if len(todo) == 0 && !last {
			return at, nil
		}
		info, err := t.root.Lstat(at)
		if err != nil {
			return "", named(name, err)
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			done = append(done, part)
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "open", Path: name, Err: unix.ELOOP}
		}
		target, err := t.root.Readlink(at)
		if err != nil {
			return "", named(name, err)
		}
		if path.IsAbs(target) {
			done = nil
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	if len(done) == 0 {
		return ".", nil
	}
	return strings.Join(done, "/"), nil
}

// named puts the path that was asked for in the place of the one that the error has.
func named(name string, err error) error {
	var at *fs.PathError
	if errors.As(err, &at) {
		return &fs.PathError{Op: at.Op, Path: name, Err: at.Err}
	}
	return err
}

// Stat follows links.
func (t *Tree) Stat(name string) (fs.FileInfo, error) {
	at, err := t.resolve(name, true)
	if err != nil {
		return nil, err
	}
	info, err := t.root.Lstat(at)
	return info, named(name, err)
}

// Lstat does not follow the last link.
func (t *Tree) Lstat(name string) (fs.FileInfo, error) {
	at, err := t.resolve(name, false)
	if err != nil {
		return nil, err
	}
	info, err := t.root.Lstat(at)
	return info, named(name, err)
}

// Exists says whether something is there, be it a link that leads nowhere.
func (t *Tree) Exists(name string) bool {
	_, err := t.Lstat(name)
	return err == nil
}

// Readlink returns the target of a link.
func (t *Tree) Readlink(name string) (string, error) {
	at, err := t.resolve(name, false)
	if err != nil {
		return "", err
	}
	target, err := t.root.Readlink(at)
	return target, named(name, err)
}

// Open opens a regular file. Nothing else is opened: a device that is opened may do something, a pipe would wait.
func (t *Tree) Open(name string) (*os.File, error) {
	at, err := t.resolve(name, true)
	if err != nil {
		return nil, err
	}
	regular := func(info fs.FileInfo, err error) error {
		if err == nil && !info.Mode().IsRegular() {
			err = &fs.PathError{Op: "open", Path: name, Err: errors.New("it is no regular file")}
		}
		return named(name, err)
	}
	if err := regular(t.root.Lstat(at)); err != nil {
		return nil, err
	}
	f, err := t.root.OpenFile(at, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, named(name, err)
	}
	if err := regular(f.Stat()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadFile reads a regular file of at most that many bytes; E-SIZE when it has more.
func (t *Tree) ReadFile(name string, most int64) ([]byte, error) {
	f, err := t.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, named(name, err)
	}
	if int64(len(data)) > most {
		return nil, verify.Refuse(verify.CodeSize, "%s has more than %d bytes", name, most)
	}
	return data, nil
}

// ReadDir lists a folder in ascending order; E-SIZE when it has more entries than any sensible one.
func (t *Tree) ReadDir(name string) ([]fs.DirEntry, error) {
	at, err := t.resolve(name, true)
	if err != nil {
		return nil, err
	}
	info, err := t.root.Lstat(at)
	if err == nil && !info.IsDir() {
		err = &fs.PathError{Op: "open", Path: name, Err: unix.ENOTDIR}
	}
	if err != nil {
		return nil, named(name, err)
	}
	f, err := t.root.OpenFile(at, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, named(name, err)
	}
	defer f.Close()
	list, err := f.ReadDir(maxEntries + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, named(name, err)
	}
	if len(list) > maxEntries {
		return nil, verify.Refuse(verify.CodeSize, "%s has more than %d entries", name, maxEntries)
	}
	slices.SortFunc(list, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return list, nil
}

// Glob lists the paths in a folder whose names end so. No folder is an empty one.
func (t *Tree) Glob(dir, suffix string) ([]string, error) {
	list, err := t.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range list {
		if strings.HasSuffix(e.Name(), suffix) {
			out = append(out, path.Join(dir, e.Name()))
		}
	}
	return out, err
}

// searchPath is where a system looks for programs that are named without a folder (systemd.exec(5)).
var searchPath = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// Program says where a command would be found, or why it cannot be run.
func (t *Tree) Program(name string) (string, error) {
	places := []string{name}
	if !strings.Contains(name, "/") {
		places = nil
		for _, dir := range searchPath {
			places = append(places, path.Join(dir, name))
		}
	}
	for _, at := range places {
		info, err := t.Stat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return "", err
		case !info.Mode().IsRegular():
			return "", fmt.Errorf("%s is no regular file", at)
		case info.Mode()&0o111 == 0:
			return "", fmt.Errorf("%s is not executable (mode %o)", at, info.Mode().Perm())
		}
		return at, nil
	}
	return "", fmt.Errorf("%s is not there", name)
}
