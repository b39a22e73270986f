package bootlab

import (
	"fmt"

	"meshupd/install"
)

// Kind is a bootloader as the lab knows it.
type Kind struct {
	Name string
	// FS is the file system of the boot partition: "ext4", "vfat", or "raw" when the bootloader reads the partition itself.
	// With "efivarfs" the firmware keeps the choice in its variables; the boot partition is then a "vfat".
	FS string
	// EFI says that the machine has UEFI firmware. Its boot partition is PartESP, else PartBoot.
	EFI bool
	// Loader is the back end. boot is the folder where the boot partition is mounted or unpacked, or the path of the partition
	// or of a copy when FS is "raw"; run is a folder for files that the back end has to be given.
	Loader func(boot, run string) (install.Loader, error)
	// Tree is what a new boot partition holds, by path; of a "raw" one the bytes at "".
	Tree func() (map[string][]byte, error)
	// Turn says what the bootloader would start from a boot partition as it lies on the medium, with no journal replayed. It
	// changes nothing. An error says that nothing would be started, or that it would be chance. With "efivarfs" it is given the
	// firmware's variables.
	Turn func(boot []byte, scratch string) (Turn, error)
	// Vars adds to the variables of new firmware what the machine's maker has set; nil: nothing.
	Vars func(blank []byte) ([]byte, error)
}

// Boot is the number of the boot partition.
func (k Kind) Boot() int {
	if k.EFI {
		return PartESP
	}
	return PartBoot
}

func (k Kind) bootFS() string {
	if k.EFI {
		return "vfat"
	}
	return k.FS
}

// Turn is what a bootloader would start.
type Turn struct {
	Next    install.SlotName // at the next start
	Default install.SlotName // at the starts after that, when nobody confirms
}

// Kinds are the bootloaders of the lab.
var Kinds = map[string]Kind{
	"efi": efiKind, "grub": grubKind, "systemd-boot": systemdBootKind, "tryboot": trybootKind, "uboot": ubootKind,
}

// KindOf finds a bootloader by its name.
func KindOf(name string) (Kind, error) {
	k, found := Kinds[name]
	if !found {
		return Kind{}, fmt.Errorf("the lab knows no bootloader %.40q", name)
	}
	return k, nil
}
