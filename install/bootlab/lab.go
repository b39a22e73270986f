package bootlab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"meshupd/install"
	"meshupd/verify/publish"
)

// Lab is a vendor with releases, and devices of its kind.
type Lab struct {
	Dir     string
	Kind    Kind
	Kernel  Kernel
	Factory []byte // what slot a of a new disk holds
	Before  []byte // what slot b of a new disk holds: an older system, whole
	// Releases follow each other; each is newer than the one before.
	Releases []Release

	grubConfig []byte
}

// Release is one that the vendor signed.
type Release struct {
	Version string
	Bundle  string // the .update file
	Image   []byte // all of a slot
}

// NewLab builds the guest and signs the releases. root is the folder of the repository.
func NewLab(ctx context.Context, dir, root string, kind Kind, kernel Kernel, releases int) (*Lab, error) {
	l := &Lab{Dir: dir, Kind: kind, Kernel: kernel}
	var err error
	if l.grubConfig, err = os.ReadFile(filepath.Join(root, "packaging", "boot", "grub.cfg")); err != nil {
		return nil, err
	}
	guest, err := l.guest(ctx, root)
	if err != nil {
		return nil, err
	}
	vendor, err := publish.NewVendor(filepath.Join(dir, "vendor"), Product)
	if err != nil {
		return nil, err
	}
	image := func(version string, seed byte) ([]byte, error) {
		return Image(ctx, dir, guest, kernel, vendor.Anchor(), version, seed)
	}
	if l.Before, err = image("0.9.0", 0); err != nil {
		return nil, err
	}
	if l.Factory, err = image(FactoryVersion, 1); err != nil {
		return nil, err
	}
	for n := range releases {
		r := Release{Version: fmt.Sprintf("2.%d.0", n)}
		if r.Image, err = image(r.Version, byte(2+n)); err != nil {
			return nil, err
		}
		path := filepath.Join(dir, r.Version+".img")
		if err := os.WriteFile(path, r.Image, 0o600); err != nil {
			return nil, err
		}
		r.Bundle, err = vendor.Bundle(ctx, publish.VendorRelease{Version: r.Version, Images: []publish.VendorImage{{Name: "rootfs", Path: path}}})
		if err != nil {
			return nil, err
		}
		l.Releases = append(l.Releases, r)
	}
	return l, nil
}

func (l *Lab) guest(ctx context.Context, root string) ([]byte, error) {
	out := filepath.Join(l.Dir, "guest")
	if _, err := tool(ctx, root, nil, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64",
		"go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "./install/bootlab/guest"); err != nil {
		return nil, err
	}
	return os.ReadFile(out)
}

// NewDisk makes a disk as it comes from the factory.
func (l *Lab) NewDisk(ctx context.Context, path string) (Disk, error) {
	return Build(ctx, l.Kind, l.grubConfig, l.Factory, l.Before, path)
}

// DataDisk makes the third disk of a machine that runs the daemon: its program, and room for its state. In a product the program is
// in the slot; here that would make every slot, and what is hashed of it, three times as long.
func (l *Lab) DataDisk(ctx context.Context, root, path string) error {
	program := filepath.Join(l.Dir, "meshupd")
	if _, err := tool(ctx, root, nil, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64",
		"go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./cmd/meshupd"); err != nil {
		return err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	image, err := fileSystem(ctx, "ext4", l.Dir, map[string][]byte{"bin/meshupd": data}, 160*mib)
	if err != nil {
		return err
	}
	return os.WriteFile(path, image, 0o600)
}

// StickOf makes a stick with a file system on it and the release in that.
func (l *Lab) StickOf(ctx context.Context, r Release, path string) error {
	bundle, err := os.ReadFile(r.Bundle)
	if err != nil {
		return err
	}
	image, err := fileSystem(ctx, "ext4", l.Dir, map[string][]byte{filepath.Base(r.Bundle): bundle}, 64*mib)
	if err != nil {
		return err
	}
	return os.WriteFile(path, image, 0o600)
}

// Holds names the version that a slot holds whole, or returns "".
func (l *Lab) Holds(slot []byte) string {
	known := map[string][]byte{FactoryVersion: l.Factory, "0.9.0": l.Before}
	for _, r := range l.Releases {
		known[r.Version] = r.Image
	}
	for version, image := range known {
		if bytes.Equal(slot, image) {
			return version
		}
	}
	return ""
}

// Part is the partition of a slot.
func Part(slot install.SlotName) int {
	if slot == install.SlotA {
		return PartA
	}
	return PartB
}
