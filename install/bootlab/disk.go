package bootlab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// The partitions of a disk, by their numbers. packaging/boot/grub.cfg has the slots at the same places.
const (
	PartGRUB  = 1 // GRUB's core image
	PartBoot  = 2 // where the bootloader keeps its choice
	PartA     = 3
	PartB     = 4
	PartData  = 5 // state of the daemon
	PartMarks = 6 // markers for the write log; see MarkSize
	PartESP   = 7 // what firmware of the kind UEFI starts from
)

type extent struct{ at, size int64 }

const mib = 1 << 20

// layout places the partitions. The slots are small because a machine without hardware support hashes slowly.
var layout = map[int]extent{
	PartGRUB: {1 * mib, 1 * mib}, PartBoot: {2 * mib, 8 * mib}, PartData: {10 * mib, 8 * mib}, PartMarks: {18 * mib, 1 * mib},
	PartA: {20 * mib, SlotSize}, PartB: {20*mib + SlotSize, SlotSize}, PartESP: {20*mib + 2*SlotSize, 40 * mib},
}

const (
	// SlotSize holds the kernel, the guest and a few MiB that differ between two versions.
	SlotSize = 32 * mib
	diskSize = 60*mib + 2*SlotSize + 1*mib
	// fillSize is what no two versions have in common.
	fillSize = 2 * mib
)

// Disk is a disk image in a file.
type Disk struct {
	Path string
	// Vars is the file with the variables of UEFI firmware, "" for a kind that has none.
	Vars string
}

// Part reads one partition as it lies on the medium.
func (d Disk) Part(n int) ([]byte, error) {
	f, err := os.Open(d.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	e := layout[n]
	data := make([]byte, e.size)
	if _, err := f.ReadAt(data, e.at); err != nil {
		return nil, fmt.Errorf("read partition %d of %s: %w", n, d.Path, err)
	}
	return data, nil
}

// Put writes one partition.
func (d Disk) Put(n int, data []byte) error {
	if int64(len(data)) > layout[n].size {
		return fmt.Errorf("%d bytes do not fit into partition %d", len(data), n)
	}
	f, err := os.OpenFile(d.Path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(data, layout[n].at); err != nil {
		return err
	}
	return f.Close()
}

// Copy makes a second disk with the same bytes.
func (d Disk) Copy(path string) (Disk, error) {
	c := Disk{Path: path}
	if d.Vars != "" {
		c.Vars = path + ".vars"
		if _, err := tool(context.Background(), "", nil, "cp", d.Vars, c.Vars); err != nil {
			return c, err
		}
	}
	_, err := tool(context.Background(), "", nil, "cp", "--sparse=always", d.Path, path)
	return c, err
}

// Turn asks what the bootloader would start from this disk; see Kind.Turn.
func (d Disk) Turn(kind Kind, scratch string) (Turn, error) {
	boot, err := d.medium(kind)
	if err != nil {
		return Turn{}, err
	}
	return kind.Turn(boot, scratch)
}

// medium is where the bootloader looks.
func (d Disk) medium(kind Kind) ([]byte, error) {
	if kind.FS == "efivarfs" {
		return os.ReadFile(d.Vars)
	}
	return d.Part(kind.Boot())
}

// Build makes a disk whose slot a holds the image a and is the default, and whose slot b holds the image b.
func Build(ctx context.Context, kind Kind, shippedGRUBConfig []byte, a, b []byte, path string) (Disk, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), "build-")
	if err != nil {
		return Disk{}, err
	}
	defer os.RemoveAll(dir)
	d := Disk{Path: path}
	f, err := os.Create(path)
	if err != nil {
		return d, err
	}
	defer f.Close()
	if err := f.Truncate(diskSize); err != nil {
		return d, err
	}
	if _, err := tool(ctx, "", strings.NewReader(partitionTable()), "sfdisk", "--quiet", path); err != nil {
		return d, err
	}
	tree, err := kind.Tree()
	if err != nil {
		return d, err
	}
	if kind.Name == "grub" {
		if tree["grub/grub.cfg"], err = grubConfig(shippedGRUBConfig); err != nil {
			return d, err
		}
		if err := installGRUB(ctx, dir, f); err != nil {
			return d, err
		}
	}
	if kind.EFI {
		if d.Vars, err = newVars(kind, path); err != nil {
			return d, err
		}
	}
	parts := map[int][]byte{PartA: a, PartB: b}
	if parts[kind.Boot()], err = fileSystem(ctx, kind.bootFS(), dir, tree, layout[kind.Boot()].size); err != nil {
		return d, err
	}
	if parts[PartData], err = fileSystem(ctx, "ext4", dir, nil, layout[PartData].size); err != nil {
		return d, err
	}
	for n, data := range parts {
		if err := d.Put(n, data); err != nil {
			return d, err
		}
	}
	return d, f.Close()
}

func partitionTable() string {
	var out strings.Builder
	out.WriteString("label: gpt\n")
	for n := range len(layout) {
		kind := "linux"
		switch n + 1 {
		case PartGRUB:
			kind = "21686148-6449-6E6F-744E-656564454649"
		case PartESP:
			kind = "uefi, uuid=" + espUUID
		}
		e := layout[n+1]
		fmt.Fprintf(&out, "start=%d, size=%d, type=%s\n", e.at/512, e.size/512, kind)
	}
	return out.String()
}

// fileSystem makes one of size bytes that holds the files, by path.
func fileSystem(ctx context.Context, kind, dir string, files map[string][]byte, size int64) ([]byte, error) {
	if kind == "raw" {
		return files[""], nil
	}
	tree, err := os.MkdirTemp(dir, "tree-")
	if err != nil {
		return nil, err
	}
	for name, data := range files {
		if err := os.MkdirAll(filepath.Join(tree, filepath.Dir(name)), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(tree, name), data, 0o755); err != nil {
			return nil, err
		}
	}
	image := tree + ".img"
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, size); err != nil {
		return nil, err
	}
	switch kind {
	case "ext4":
		// Features that GRUB cannot read are off; Debian's default is the same.
		_, err = tool(ctx, "", nil, "mkfs.ext4", "-q", "-F", "-O", "^metadata_csum_seed,^orphan_file", "-E", "hash_seed="+fixedUUID+",lazy_itable_init=0",
			"-U", fixedUUID, "-d", tree, image)
	case "vfat":
		err = fatImage(ctx, tree, image)
	default:
		err = fmt.Errorf("the lab makes no file system %.20q", kind)
	}
	if err != nil {
		return nil, err
	}
	return os.ReadFile(image)
}

const fixedUUID = "6d657368-7570-4c41-8b00-000000000001"

func fatImage(ctx context.Context, tree, image string) error {
	info, err := os.Stat(image)
	if err != nil {
		return err
	}
	bits := "16"
	switch size := info.Size(); {
	case size == layout[PartESP].size:
		bits = "32" // as on most machines
	case size < 4*mib:
		bits = "12" // too few sectors for more
	}
	if _, err := tool(ctx, "", nil, "mkfs.vfat", "-F", bits, "-s", "1", "-i", "4d555044", image); err != nil {
		return err
	}
	entries, err := os.ReadDir(tree)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := tool(ctx, "", nil, "mcopy", "-s", "-i", image, filepath.Join(tree, e.Name()), "::/"); err != nil {
			return err
		}
	}
	return nil
}

// Image makes what a slot holds: the guest as its first process, the kernel, and bytes that no other seed has.
func Image(ctx context.Context, dir string, guest []byte, kernel Kernel, anchor, version string, seed byte) ([]byte, error) {
	files := map[string][]byte{"sbin/init": guest, "etc/version": []byte(version + "\n"), "fill": fill(seed)}
	for _, name := range []string{"dev", "proc", "sys", "run", "boot", "data"} {
		files[name+"/.keep"] = nil
	}
	var err error
	if files["boot/vmlinuz"], err = os.ReadFile(kernel.Image); err != nil {
		return nil, err
	}
	for i, path := range kernel.Modules {
		if files[fmt.Sprintf("lib/modules/%d-%s", i, filepath.Base(path))], err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	err = filepath.Walk(anchor, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		name, err := filepath.Rel(anchor, path)
		if err != nil {
			return err
		}
		files[filepath.Join("etc/trust", name)], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return fileSystem(ctx, "ext4", dir, files, SlotSize)
}

func fill(seed byte) []byte {
	out, state := make([]byte, fillSize), uint64(seed)+1
	for i := range out {
		state = state*6364136223846793005 + 1442695040888963407
		out[i] = byte(state >> 56)
	}
	return out
}

// tool runs a program and returns what it printed. An error has the end of what it said.
func tool(ctx context.Context, dir string, in io.Reader, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Stdin = dir, in
	cmd.Env = append(os.Environ(), "LC_ALL=C", "MTOOLS_SKIP_CHECK=1")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %.300s", name, strings.Join(args, " "), err, bytes.TrimSpace(said.Bytes()))
	}
	return out, nil
}
