package install_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"meshupd/install/slotstest"
	"meshupd/verify"
)

// deviceDigest is of what is on a device up to the zeros at its end: nothing that a test writes ends in one.
func deviceDigest(t *testing.T, path string) map[string]verify.Digest {
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]verify.Digest{slotstest.FirstImage: sha256.Sum256(bytes.TrimRight(data, "\x00"))}
}

func plainDevice(t *testing.T, name string, size int64, data string) string {
	path := filepath.Join(ramDir(t), name)
	writeFile(t, path, data)
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// torture asks for the long form of tests: make torture.
var torture = os.Getenv("MESHUPD_TORTURE") != ""

// TestBlock cuts and fails every durable step of whole installations. The bootloaders that are left to the long form pass
// TestLoaders always, which meets every fault of theirs alone.
func TestBlock(t *testing.T) {
	for name, make := range loaders {
		if !torture && name != "grub" && name != "tryboot" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			slotstest.Run(t, func(t *testing.T) slotstest.Harness {
				return blockHarness(t, make(t), plainDevice(t, "a", 64<<10, "what the factory put there"), plainDevice(t, "b", 64<<10, ""))
			})
		})
	}
}
