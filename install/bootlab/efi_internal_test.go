package bootlab

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"meshupd/install"
)

// TestTurnOfEntries holds the reading of the Boot Loader Specification against its own examples and the states of an update.
func TestTurnOfEntries(t *testing.T) {
	both := Turn{Next: install.SlotB, Default: install.SlotB}
	for names, want := range map[string]Turn{
		"1-a":                      {Next: install.SlotA, Default: install.SlotA},
		"1-a 2-b+3":                {Next: install.SlotB, Default: install.SlotA},
		"1-a 2-b+1-2":              {Next: install.SlotB, Default: install.SlotA},
		"1-a 2-b+0-3":              {Next: install.SlotA, Default: install.SlotA},
		"1-a 2-b+2-1 3-b":          both,
		"3-b":                      both,
		"2-b+2-1 3-b":              both,
		"1-a 2-b+2-1 empty-3-b":    {Next: install.SlotB, Default: install.SlotA},
		"1-a empty-2-b+3":          {Next: install.SlotA, Default: install.SlotA},
		"9-b 10-a":                 {Next: install.SlotA, Default: install.SlotA},
		"empty-1-a":                {},
		"2-b+0-3":                  {},
		"1-a 2-b+3 2-b+2-1":        {Next: install.SlotB, Default: install.SlotA},
		"1-a 2-b+18446744073709-1": {},
	} {
		files := make(map[string][]byte)
		for _, name := range strings.Fields(names) {
			name, empty := strings.CutPrefix(name, "empty-")
			n, rest, _ := strings.Cut(name, "-")
			text := entryOf(install.SlotName(rest[:1]))
			if empty {
				text = nil
			}
			files[fmt.Sprintf("meshupd-%06s-%s.conf", n, rest)] = text
		}
		turn, err := turnOfEntries(files)
		if err != nil {
			turn = Turn{}
		}
		if turn != want {
			t.Errorf("%s: %+v, %v; want %+v", names, turn, err, want)
		}
	}
}

// TestFAT lets mtools make file systems that the lab reads.
func TestFAT(t *testing.T) {
	for _, name := range []string{"mkfs.vfat", "mcopy"} {
		if _, err := exec.LookPath(name); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatalf("%s is not installed", name)
			}
			t.Skipf("%s is not installed", name)
		}
	}
	files := map[string][]byte{"x/loader/entries/meshupd-000001-a.conf": entryOf(install.SlotA), "x/loader/entries/SHORT.TXT": []byte("short"),
		"x/loader/entries/empty.conf": nil, "x/loader/entries/large-and-with-a-name-of-many-parts.conf": bytes.Repeat([]byte("0123456789"), 1000)}
	for _, size := range []int64{8 * mib, layout[PartESP].size} {
		image, err := fileSystem(context.Background(), "vfat", t.TempDir(), files, size)
		if err != nil {
			t.Fatal(err)
		}
		got, err := fatFolder(image, "x", "loader", "entries")
		if err != nil {
			t.Fatal(err)
		}
		for path, want := range files {
			if data, found := got[filepath.Base(path)]; !found || !bytes.Equal(data, want) {
				t.Errorf("%d bytes: %s has %d bytes, %v", size, path, len(data), found)
			}
		}
		if len(got) != len(files) {
			t.Errorf("%d bytes: the folder holds %q", size, slices.Sorted(maps.Keys(got)))
		}
	}
}

func FuzzFAT(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0}, 512), []byte("x"))
	f.Fuzz(func(_ *testing.T, head, rest []byte) {
		image := make([]byte, 8<<10)
		copy(image, head)
		image[510], image[511] = 0x55, 0xaa
		copy(image[512:], rest)
		_, _ = fatFolder(image)
		_, _ = fatFolder(image, "loader", "entries")
	})
}

func blankVars() []byte {
	flash := bytes.Repeat([]byte{0xff}, 4<<10)
	copy(flash[0x28:], "_FVH")
	flash[0x30], flash[0x31] = 0x48, 0
	copy(flash[0x48:], guid(varStoreGUID))
	copy(flash[0x58:], []byte{0xb8, 0x0f, 0, 0})
	return flash
}

func TestBootVars(t *testing.T) {
	flash, err := efiKind.Vars(blankVars())
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name string
		data []byte
		want Turn
	}{
		{"x", nil, Turn{install.SlotA, install.SlotA}},
		{"BootNext", []byte{2, 0x10}, Turn{install.SlotB, install.SlotA}},
		{"BootOrder", []byte{2, 0x10, 7, 0}, Turn{install.SlotB, install.SlotB}},
		{"BootOrder", []byte{9, 0}, Turn{}},
	} {
		if flash, err = addVar(flash, step.name, step.data); err != nil {
			t.Fatal(err)
		}
		if turn, err := turnOfVars(flash); turn != step.want || (err != nil) != (step.want == Turn{}) {
			t.Errorf("after %s=% x: %+v, %v", step.name, step.data, turn, err)
		}
	}
}

func FuzzBootVars(f *testing.F) {
	f.Add([]byte{0xaa, 0x55, 0x3f})
	f.Fuzz(func(t *testing.T, data []byte) {
		flash := blankVars()
		copy(flash[0x48+28:], data)
		if _, err := turnOfVars(flash); err == nil && len(data) < 2*varHeader {
			t.Fatal("variables were made of too few bytes")
		}
	})
}
