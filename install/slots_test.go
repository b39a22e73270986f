package install_test

import (
	"crypto/sha256"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

func TestFilesFolder(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness { return filesHarness(t, install.LayoutFolder, 2) })
}

func TestFilesImage(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness { return filesHarness(t, install.LayoutImage, 1) })
}

func filesConfig(dir string, layout install.Layout, power int) install.FilesConfig {
	return install.FilesConfig{
		Dir: dir, Layout: layout, FactoryVersion: "1.0.0",
		BootID: func() (string, error) { return "power-" + strconv.Itoa(power), nil },
	}
}

func filesHarness(t *testing.T, layout install.Layout, images int) slotstest.Harness {
	return filesHarnessWith(t, layout, images, func(cfg install.FilesConfig) install.FilesConfig { return cfg })
}

func filesHarnessWith(t *testing.T, layout install.Layout, images int, change func(install.FilesConfig) install.FilesConfig) slotstest.Harness {
	dir := t.TempDir()
	factory := filepath.Join(dir, "a", "factory")
	if layout == install.LayoutImage {
		factory = filepath.Join(dir, "a.img")
	}
	writeFile(t, factory, "what the factory put there")
	return slotstest.Harness{
		Images: images,
		Open: func(power int, step slotstest.Step) (slotstest.Device, error) {
			return install.OpenFiles(install.WithStep(change(filesConfig(dir, layout, power)), step))
		},
		Pointed: func() install.SlotName {
			target, err := os.Readlink(filepath.Join(dir, "current"))
			if err != nil {
				t.Fatal(err)
			}
			return install.SlotName(target[:1])
		},
		Holds: func(slot install.SlotName) map[string]verify.Digest {
			if layout == install.LayoutImage {
				return imageDigest(t, filepath.Join(dir, string(slot)+".img"))
			}
			return folderDigests(t, filepath.Join(dir, string(slot)))
		},
	}
}

// imageDigest calls the one image what the suite calls the first, because an image file has no name of the release.
func imageDigest(t *testing.T, path string) map[string]verify.Digest {
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]verify.Digest{slotstest.FirstImage: sha256.Sum256(data)}
}

func folderDigests(t *testing.T, dir string) map[string]verify.Digest {
	sums := make(map[string]verify.Digest)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		data, err := os.ReadFile(path)
		sums[d.Name()] = sha256.Sum256(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

func writeFile(t testing.TB, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMemory(t *testing.T) {
	slotstest.Run(t, func(t *testing.T) slotstest.Harness {
		m := install.NewMemory(install.MemoryConfig{FactoryVersion: "1.0.0"})
		power := 1
		return slotstest.Harness{
			Images: 2, Deep: true,
			Open: func(now int, step slotstest.Step) (slotstest.Device, error) {
				m = m.Reopen(install.MemoryConfig{Step: step}, now != power)
				power = now
				return m, nil
			},
			Pointed: func() install.SlotName { return m.Pointed() },
			Holds:   func(slot install.SlotName) map[string]verify.Digest { return m.Digests(slot) },
		}
	})
}

func TestFilePointer(t *testing.T) {
	slotstest.RunBootloader(t, func(t *testing.T) slotstest.OpenBoot {
		dir := t.TempDir()
		return func(power int, step slotstest.Step) (slotstest.Boot, error) {
			return install.OpenPointer(install.WithStep(filesConfig(dir, "", power), step))
		}
	})
}
