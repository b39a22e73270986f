package bootlab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"meshupd/install"
)

var grubKind = Kind{
	Name: "grub",
	FS:   "ext4",
	Loader: func(boot, _ string) (install.Loader, error) {
		return install.GRUB{Env: filepath.Join(boot, "grub", "grubenv")}, nil
	},
	Tree: func() (map[string][]byte, error) {
		env := []byte("# GRUB Environment Block\nORDER=A B\nA_OK=1\nA_TRY=0\nB_OK=0\nB_TRY=0\n")
		return map[string][]byte{"grub/grubenv": append(env, bytes.Repeat([]byte("#"), 1024-len(env))...)}, nil
	},
	Turn: grubTurn,
}

// grubTurn reads the environment with GRUB's own reader, which knows nothing of the journal, and does what grub.cfg does.
func grubTurn(boot []byte, scratch string) (Turn, error) {
	path := filepath.Join(scratch, "grub.part")
	if err := os.WriteFile(path, boot, 0o600); err != nil {
		return Turn{}, err
	}
	env, err := tool(context.Background(), "", nil, "grub-fstest", path, "cat", "(loop0)/grub/grubenv")
	if err != nil {
		return Turn{}, err
	}
	return turnOfGRUBEnv(env)
}

// turnOfGRUBEnv is packaging/boot/grub.cfg in Go. Where the block is none, grub.cfg boots the factory's slot, whatever
// that holds by now: an error here.
func turnOfGRUBEnv(env []byte) (Turn, error) {
	if len(env) < 1024 || !bytes.HasPrefix(env, []byte("# GRUB Environment Block\n")) {
		return Turn{}, fmt.Errorf("GRUB finds no environment in %d bytes", len(env))
	}
	vars := make(map[string]string)
	for _, line := range strings.Split(string(env), "\n") {
		if name, value, found := strings.Cut(line, "="); found {
			vars[name] = value
		}
	}
	if vars["ORDER"] == "" {
		return Turn{}, errors.New("GRUB's environment has no ORDER")
	}
	pick := func() (slot string) {
		last := "A"
		for _, s := range strings.Fields(vars["ORDER"]) {
			if vars[s+"_OK"] != "1" {
				continue
			}
			last = s
			if vars[s+"_TRY"] == "0" {
				return s
			}
		}
		return last
	}
	first := pick()
	vars[first+"_TRY"] = "1"
	second := pick()
	return Turn{Next: install.SlotName(strings.ToLower(first)), Default: install.SlotName(strings.ToLower(second))}, nil
}

const (
	grubModules = "/usr/lib/grub/i386-pc"
	// grubParts is where the core image finds its configuration.
	grubPrefix = "(hd0,gpt2)/grub"
	// What the lab's end of grub.cfg is in the place of the shipped one.
	grubAdapt = "# Adapt from here"
)

// grubConfig is the shipped configuration with the line that starts the kernel adapted, as its comment asks for.
func grubConfig(shipped []byte) ([]byte, error) {
	head, tail, found := strings.Cut(string(shipped), grubAdapt)
	if !found {
		return nil, errors.New("the shipped grub.cfg has no part to adapt")
	}
	var out strings.Builder
	out.WriteString("serial --unit=0 --speed=115200\nterminal_output serial\necho \"" + MarkerPrefix + string(MarkerLoader) + "\"\n" + head + grubAdapt)
	lines := 0
	for line := range strings.Lines(tail) {
		if strings.HasPrefix(line, "linux ") {
			lines++
			line = "echo \"GRUB slot=$slot ORDER=$ORDER A=$A_OK/$A_TRY B=$B_OK/$B_TRY\"\n" +
				strings.Replace(strings.TrimSuffix(line, "\n"), "panic=10", "", 1) + " " + kernelWords("grub") + "\n"
		}
		out.WriteString(line)
	}
	if lines != 1 {
		return nil, fmt.Errorf("the shipped grub.cfg starts the kernel in %d lines", lines)
	}
	return []byte(out.String()), nil
}

// installGRUB makes a disk bootable by BIOS: boot.img in the first sector around the partition table, core.img in a partition
// of its own. grub-install would want a device.
func installGRUB(ctx context.Context, dir string, disk *os.File) error {
	core := filepath.Join(dir, "core.img")
	if _, err := tool(ctx, "", nil, "grub-mkimage", "-O", "i386-pc", "-o", core, "-p", grubPrefix,
		"biosdisk", "part_gpt", "ext2", "normal", "test", "loadenv", "echo", "linux", "serial", "terminal", "boot", "reboot"); err != nil {
		return err
	}
	first, err := os.ReadFile(filepath.Join(grubModules, "boot.img"))
	if err != nil {
		return err
	}
	rest, err := os.ReadFile(core)
	if err != nil {
		return err
	}
	at := layout[PartGRUB].at
	if len(first) < 512 || len(rest) < 512 || int64(len(rest)) > layout[PartGRUB].size {
		return fmt.Errorf("GRUB's images have %d and %d bytes", len(first), len(rest))
	}
	// grub-core/boot/i386/pc/boot.S and diskboot.S: the sector of the core image, "the drive that the BIOS says", no jump
	// around that, and the sector where the core image goes on.
	binary.LittleEndian.PutUint64(first[0x5c:], uint64(at/512))
	first[0x64] = 0xff
	copy(first[0x66:], []byte{0x90, 0x90})
	binary.LittleEndian.PutUint64(rest[0x1f4:], uint64(at/512+1))
	if _, err := disk.WriteAt(first[:440], 0); err != nil { // behind them the partition table begins
		return err
	}
	_, err = disk.WriteAt(rest, at)
	return err
}
