package bootlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"meshupd/install"
)

// trybootKind is a Raspberry Pi: autoboot.txt on a FAT partition. Nobody can run its firmware here, so that Turn is what the
// documentation says of it (config.txt, "autoboot.txt").
var trybootKind = Kind{
	Name: "tryboot",
	FS:   "vfat",
	Loader: func(boot, _ string) (install.Loader, error) {
		return install.Tryboot{File: filepath.Join(boot, "autoboot.txt"), A: 2, B: 3}, nil
	},
	Tree: func() (map[string][]byte, error) {
		text := "[all]\ntryboot_a_b=1\nboot_partition=2\n"
		return map[string][]byte{"autoboot.txt": []byte(text + strings.Repeat("#", 511-len(text)) + "\n"), "config.txt": []byte("arm_64bit=1\n")}, nil
	},
	Turn: func(boot []byte, scratch string) (Turn, error) {
		path := filepath.Join(scratch, "tryboot.part")
		if err := os.WriteFile(path, boot, 0o600); err != nil {
			return Turn{}, err
		}
		text, err := tool(context.Background(), "", nil, "mtype", "-i", path, "::/autoboot.txt")
		if err != nil {
			return Turn{}, err
		}
		return turnOfAutoboot(text)
	},
}

// turnOfAutoboot takes the worst that a trial could do for the next start: a restart that asks for it. Default is any other.
func turnOfAutoboot(text []byte) (Turn, error) {
	if len(text) > 512 {
		return Turn{}, fmt.Errorf("autoboot.txt has %d bytes; the firmware reads one sector", len(text))
	}
	plain, ab, err := bootPartition(text, false)
	if err != nil {
		return Turn{}, err
	}
	asked, _, err := bootPartition(text, true)
	if err != nil {
		return Turn{}, err
	}
	if !ab {
		return Turn{}, errors.New("autoboot.txt has no tryboot_a_b=1")
	}
	slots := map[int]install.SlotName{2: install.SlotA, 3: install.SlotB}
	turn := Turn{slots[asked], slots[plain]}
	if turn.Next == "" || turn.Default == "" {
		return Turn{}, fmt.Errorf("autoboot.txt names the partitions %d and %d", asked, plain)
	}
	return turn, nil
}

// bootPartition reads autoboot.txt: a section holds for all starts, or for those that ask for a trial; a later line outdoes one
// before it; what is in other sections, or is no setting, does not count.
func bootPartition(text []byte, asked bool) (partition int, ab bool, err error) {
	holds := true
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		name, value, found := strings.Cut(line, "=")
		switch {
		case strings.HasPrefix(line, "["):
			holds = line == "[all]" || asked && line == "[tryboot]"
		case !holds || !found || strings.HasPrefix(line, "#"):
		case name == "tryboot_a_b":
			ab = value == "1"
		case name == "boot_partition":
			if partition, err = strconv.Atoi(value); err != nil {
				return 0, false, err
			}
		}
	}
	return partition, ab, nil
}
