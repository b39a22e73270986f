package bootlab

import (
	"errors"
	"os"
	"path/filepath"
)

// Kernel is one that can start from the lab's disks.
type Kernel struct {
	Image   string   // bzImage
	Modules []string // in the order in which they have to be loaded
}

// fileSystemModules are what is needed to mount a "vfat".
var fileSystemModules = []string{"fs/fat/fat.ko", "fs/fat/vfat.ko", "fs/nls/nls_cp437.ko", "fs/nls/nls_ascii.ko"}

// FindKernel looks in the folder of MESHUPD_LAB_KERNEL, or else where install/bootlab/kernel.sh puts it.
func FindKernel() (Kernel, error) {
	dir := os.Getenv("MESHUPD_LAB_KERNEL")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return Kernel{}, err
		}
		dir = filepath.Join(cache, "meshupd-lab", "kernel")
	}
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) == 0 {
		return Kernel{}, errors.New("no kernel; install/bootlab/kernel.sh fetches one")
	}
	k := Kernel{Image: images[len(images)-1]}
	for _, name := range append(fileSystemModules, "fs/efivarfs/efivarfs.ko") {
		found, err := filepath.Glob(filepath.Join(dir, "lib", "modules", "*", "kernel", name))
		if err != nil || len(found) == 0 {
			return Kernel{}, errors.New("the kernel's package has no " + name)
		}
		k.Modules = append(k.Modules, found[len(found)-1])
	}
	return k, nil
}
