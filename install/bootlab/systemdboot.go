package bootlab

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"meshupd/install"
)

// systemdBootKind has one kernel on the ESP; the entries choose the file system it starts.
var systemdBootKind = Kind{
	Name: "systemd-boot",
	FS:   "vfat",
	EFI:  true,
	Loader: func(boot, run string) (install.Loader, error) {
		l := install.SystemdBoot{Dir: boot}
		for slot, template := range map[install.SlotName]*string{install.SlotA: &l.Templates.A, install.SlotB: &l.Templates.B} {
			*template = filepath.Join(run, string(slot)+".conf")
			if err := os.WriteFile(*template, entryOf(slot), 0o600); err != nil {
				return nil, err
			}
		}
		return l, nil
	},
	Tree: systemdBootTree,
	Turn: func(boot []byte, _ string) (Turn, error) {
		files, err := fatFolder(boot, "loader", "entries")
		if err != nil {
			return Turn{}, err
		}
		return turnOfEntries(files)
	},
}

const (
	systemdBootEFI = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi" // Debian's systemd-boot-efi
	espUUID        = "6d657368-7570-4c41-8b00-0000000000e5"
)

func entryOf(slot install.SlotName) []byte {
	return fmt.Appendf(nil, "title Slot %s\nlinux /vmlinuz\noptions %s\n", slot, kernelLine(slot, "systemd-boot"))
}

func systemdBootTree() (map[string][]byte, error) {
	kernel, err := FindKernel()
	if err != nil {
		return nil, err
	}
	tree := map[string][]byte{
		"loader/loader.conf":                   []byte("timeout 0\ndefault meshupd-*\n"),
		"loader/entries/meshupd-000001-a.conf": entryOf(install.SlotA),
	}
	for name, path := range map[string]string{"vmlinuz": kernel.Image, "EFI/BOOT/BOOTX64.EFI": systemdBootEFI} {
		if tree[name], err = os.ReadFile(path); err != nil {
			return nil, err
		}
	}
	return tree, nil
}

// Entries are the names of the files in loader/entries, sorted, also those that are no entry.
func (d Disk) Entries() ([]string, error) {
	esp, err := d.Part(PartESP)
	if err != nil {
		return nil, err
	}
	files, err := fatFolder(esp, "loader", "entries")
	return slices.Sorted(maps.Keys(files)), err
}

// bootEntry is an entry as systemd-boot sees it.
type bootEntry struct {
	id         string // the file's name without the counter
	counted    bool
	left, done int
	slot       install.SlotName
}

// turnOfEntries is what systemd-boot does with the files of loader/entries: the Boot Loader Specification, "Sorting", for
// entries without a sort key, and "Boot counting". An entry that names no kernel is none.
func turnOfEntries(files map[string][]byte) (Turn, error) {
	var all []bootEntry
	for name, text := range files {
		if e, ok := bootEntryOf(name, text); ok {
			all = append(all, e)
		}
	}
	var turn Turn
	for range 1000 {
		if len(all) == 0 {
			return Turn{}, errors.New("systemd-boot finds no entry")
		}
		slices.SortFunc(all, compareEntries)
		first := &all[0]
		if turn.Next == "" {
			turn.Next = first.slot
		}
		turn.Default = first.slot
		switch {
		case first.counted && first.left == 0:
			return Turn{}, fmt.Errorf("the best entry of systemd-boot is %s, and it is used up", first.id)
		case !first.counted:
			return turn, nil
		}
		first.left, first.done = first.left-1, first.done+1
	}
	return Turn{}, errors.New("systemd-boot would start a trial a thousand times")
}

func compareEntries(a, b bootEntry) int {
	spent := func(e bootEntry) int {
		if e.counted && e.left == 0 {
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(spent(a), spent(b)), -cmp.Compare(a.id, b.id), -cmp.Compare(a.left, b.left), cmp.Compare(a.done, b.done))
}

// bootEntryOf reads one file; false if systemd-boot takes it for no entry, or loader.conf prefers others.
func bootEntryOf(name string, text []byte) (bootEntry, bool) {
	base, conf := strings.CutSuffix(strings.ToLower(name), ".conf")
	if !conf || !strings.HasPrefix(base, "meshupd-") {
		return bootEntry{}, false
	}
	e := bootEntry{id: base}
	if at := strings.LastIndex(base, "+"); at >= 0 {
		left, done, _ := strings.Cut(base[at+1:], "-")
		n, err := strconv.Atoi(left)
		m, err2 := strconv.Atoi(cmp.Or(done, "0"))
		if err == nil && err2 == nil {
			e.id, e.counted, e.left, e.done = base[:at], true, n, m
		}
	}
	kernel := false
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) > 1 && words[0] == "linux" {
			kernel = words[1] == "/vmlinuz"
		}
		for _, word := range words {
			if slot, found := strings.CutPrefix(word, "meshupd.slot="); found {
				e.slot = install.SlotName(slot)
			}
		}
	}
	return e, kernel && (e.slot == install.SlotA || e.slot == install.SlotB)
}
