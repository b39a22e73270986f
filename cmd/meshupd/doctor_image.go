package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/install"
)

// imageChecks are for the tree of an image, before there is a device.
var imageChecks = []check{
	{ID: "image.root", Look: (*patient).checkRoot},
	{ID: "image.binary", Look: (*patient).checkBinary},
	{ID: "image.version", Needs: (*patient).needConfig, Look: (*patient).checkVersion},
	{ID: "image.identity", Look: (*patient).checkIdentity},
	{ID: "image.machine_id", Look: (*patient).checkMachineID},
	{ID: "image.mounts", Needs: (*patient).needConfig, Look: (*patient).checkMounts},
	{ID: "slots.config", Needs: (*patient).needConfig, Look: (*patient).checkSlotNames},
	{ID: "boot.settings", Needs: (*patient).needBootloader, Look: (*patient).checkBootFiles},
	{ID: "boot.script", Needs: (*patient).needBootloader, Look: (*patient).checkBootScript},
}

func (p *patient) needBootloader() string {
	if p.cfg == nil {
		return p.needConfig()
	}
	if !p.cfg.Slots.boots() {
		return "slots of kind " + p.cfg.Slots.Kind + " need no bootloader of ours"
	}
	return ""
}

// boots says whether one of our bootloaders chooses the slot.
func (s SlotsConfig) boots() bool {
	return s.Kind == "block" || s.Kind == "swupdate" || s.Kind == "mender"
}

func (p *patient) checkRoot(context.Context) doctor.Finding {
	for _, dir := range []string{"/usr", "/etc"} {
		if info, err := p.tree.Stat(dir); err != nil || !info.IsDir() {
			return doctor.Fail(p.tree.Dir()+" has no "+dir, "it is not the root of a system, or not all of it", "name the folder in which the image's /etc and /usr are")
		}
	}
	return doctor.OK("%s", p.tree.Dir())
}

const binaryPath = "/usr/bin/meshupd"

// checkBinary compares what meshupd was built for with the programs around it.
func (p *patient) checkBinary(context.Context) doctor.Finding {
	at := binaryPath
	if u, _, err := p.tree.UnitFile("meshupd.service"); err == nil {
		if argv := strings.Fields(u.Last("Service.ExecStart")); len(argv) > 0 {
			at = strings.TrimLeft(argv[0], "@-:+!")
		}
	}
	if _, err := p.tree.Program(at); err != nil {
		return doctor.Fail(err.Error(), "the device takes no part", "install meshupd in the image, mode 755")
	}
	mine, err := p.arch(at)
	if err != nil {
		return doctor.Fail(at+": "+err.Error(), "it cannot be run", "install meshupd as it was built for this device")
	}
	for _, other := range []string{"/usr/lib/systemd/systemd", "/bin/busybox", "/bin/sh", "/sbin/init", "/usr/bin/env"} {
		arch, err := p.arch(other)
		if err != nil {
			continue
		}
		if arch != mine {
			return doctor.Fail(fmt.Sprintf("%s is for %s, %s is for %s", at, mine, other, arch), "it cannot be run", "build it with GOARCH of the device")
		}
		return doctor.OK("%s, %s as %s", at, mine, other)
	}
	return doctor.OK("%s, %s (nothing beside it to compare with)", at, mine)
}

func (p *patient) arch(name string) (doctor.Arch, error) {
	f, err := p.tree.Open(name)
	if err != nil {
		return doctor.Arch{}, err
	}
	defer f.Close()
	return doctor.ReadArch(f)
}

// checkVersion looks whether a new device knows what it runs.
func (p *patient) checkVersion(context.Context) doctor.Finding {
	factory := p.cfg.Slots.Factory
	raw, err := p.tree.ReadFile("/etc/os-release", 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = p.tree.ReadFile("/usr/lib/os-release", 64<<10)
	}
	release := doctor.ParseOSRelease(raw)
	name := release["ID"] + " " + release["VERSION_ID"] + release["IMAGE_VERSION"]
	hardware := p.cfg.Hardware
	if hardware == "" {
		hardware = "any"
	}
	switch {
	case factory == "":
		return doctor.Warn("slots.factory is empty", "a new device does not know its version: it takes no release with `requires`, and cannot tell a downgrade",
			"set slots.factory to the version of this image")
	case err == nil && release["IMAGE_VERSION"] != "" && release["IMAGE_VERSION"] != factory && p.cfg.Slots.Kind != "files" && p.cfg.Slots.Kind != "container":
		return doctor.Warn(fmt.Sprintf("slots.factory is %s, IMAGE_VERSION in os-release is %s", factory, release["IMAGE_VERSION"]),
			"a new device says the wrong version of itself", "write both from one variable of the build")
	case err != nil:
		return doctor.Warn("there is no os-release: "+err.Error(), "people cannot tell what runs on the device", "install one")
	}
	return doctor.OK("%s %s for hardware %s, on %s", p.cfg.Product, factory, hardware, strings.TrimSpace(name))
}

// checkIdentity looks for what only one device may have.
func (p *patient) checkIdentity(context.Context) doctor.Finding {
	state, apply := defaultConfig().State, defaultConfig().Apply.State
	if p.cfg != nil {
		state, apply = p.cfg.State, p.cfg.Apply.State
	}
	if p.tree.Exists(path.Join(state, "identity.key")) {
		return doctor.Fail(path.Join(state, "identity.key")+" is in the image", "all devices would have one identity, and the site would see a single device",
			"empty "+state+" before the image is made: a new device makes its own")
	}
	var found []string
	for _, dir := range []string{state, apply} {
		list, err := p.tree.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return doctor.Fail(err.Error(), "the daemon cannot keep its state there", "remove it, or correct `state`")
		}
		for _, e := range list {
			if e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), ".") {
				found = append(found, path.Join(dir, e.Name()))
			}
		}
	}
	if len(found) > 0 {
		return doctor.Warn("there is state in the image: "+strings.Join(found[:min(4, len(found))], ", "),
			"every new device would remember what another one did", "empty "+state+" and "+apply+" before the image is made")
	}
	return doctor.OK("no identity and no state in the image")
}

func (p *patient) checkMachineID(context.Context) doctor.Finding {
	data, err := p.tree.ReadFile("/etc/machine-id", 4<<10)
	if id := strings.TrimSpace(string(data)); err == nil && id != "" && id != "uninitialized" {
		return doctor.Warn("/etc/machine-id is set", "all devices have one machine id, and often one address from DHCP",
			"make the file empty in the image: each device then gets its own")
	}
	return doctor.OK("/etc/machine-id is left to the device")
}

// checkMounts looks whether what has to outlast an update and a restart lies on a file system that does.
func (p *patient) checkMounts(context.Context) doctor.Finding {
	raw, err := p.tree.ReadFile("/etc/fstab", 256<<10)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return doctor.Fail(err.Error(), "nothing tells what is mounted where", "correct /etc/fstab")
	}
	mounts := doctor.ParseFstab(raw)
	rootRO := false
	for _, m := range mounts {
		rootRO = rootRO || m.File == "/" && strings.Contains(","+strings.Join(m.Options, ",")+",", ",ro,")
	}
	paths := map[string]string{"state": p.cfg.State}
	if p.cfg.Apply.Socket != "" {
		paths["apply.state"] = p.cfg.Apply.State
	}
	if p.cfg.Slots.Folder != "" {
		paths["slots.folder"] = p.cfg.Slots.Folder
	}
	whole := p.cfg.Slots.boots() || delegated(p.cfg.Slots.Kind) // the root file system is a slot
	said := []string{}
	for _, key := range sorted(paths) {
		name := paths[key]
		m, ok := doctor.Covering(mounts, name)
		switch unit := p.mountUnit(name); {
		case ok && (m.Type == "tmpfs" || m.Type == "ramfs"):
			return doctor.Fail(fmt.Sprintf("%s: %s lies on %s in memory (%s)", key, name, m.File, m.Type), "the device forgets at each restart what runs, what failed and who it is",
				"mount a partition of its own there")
		case ok && m.File != "/":
			said = append(said, key+" on "+m.File)
		case unit != "":
			said = append(said, key+" on "+unit)
		case rootRO:
			return doctor.Fail(fmt.Sprintf("%s: %s lies on the root file system, which fstab mounts read-only", key, name), "the daemon cannot start",
				"mount a partition of its own there, or put it on one that is there")
		case whole:
			return doctor.Warn(fmt.Sprintf("%s: neither fstab nor a mount unit mounts anything over %s", key, name),
				"if it lies on the root file system, the next update takes the device's memory away", "mount a partition of its own there; fine if an initramfs does")
		default:
			said = append(said, key+" on the root file system")
		}
	}
	return doctor.OK("%s", strings.Join(said, ", "))
}

// mountUnit finds a mount unit for a path or a folder above it.
func (p *patient) mountUnit(name string) string {
	for at := path.Clean(name); at != "/" && at != "."; at = path.Dir(at) {
		unit := strings.ReplaceAll(strings.ReplaceAll(strings.Trim(at, "/"), "-", `\x2d`), "/", "-") + ".mount"
		if _, file, err := p.tree.UnitFile(unit); err == nil && file != "" && file != "/dev/null" {
			return unit
		}
	}
	return ""
}

// checkSlotNames looks whether the slots can be two partitions that nothing mounts.
func (p *patient) checkSlotNames(context.Context) doctor.Finding {
	s := p.cfg.Slots
	if s.A == "" && s.B == "" {
		return doctor.OK("%s", s.place())
	}
	if path.Clean(s.A) == path.Clean(s.B) {
		return doctor.Fail("slots.a and slots.b are both "+s.A, "the running system would be overwritten", "name two partitions")
	}
	raw, _ := p.tree.ReadFile("/etc/fstab", 256<<10) // image.mounts tells when it cannot be read
	for _, m := range doctor.ParseFstab(raw) {
		for key, dev := range map[string]string{"slots.a": s.A, "slots.b": s.B} {
			if sameDevice(m.Spec, dev) && m.File != "/" {
				return doctor.Fail(fmt.Sprintf("fstab mounts %s, which is %s, on %s", m.Spec, key, m.File), "a mounted slot is not written", "remove the line")
			}
			if sameDevice(m.Spec, dev) {
				return doctor.Warn(fmt.Sprintf("fstab mounts %s, which is %s, as /", m.Spec, key), "the image in the other slot would mount this one, and no update could be written",
					"write /dev/root there, or leave the line out: the kernel's command line names the root")
			}
		}
	}
	for key, dev := range map[string]string{"slots.a": s.A, "slots.b": s.B} {
		if strings.HasPrefix(dev, "/dev/sd") {
			return doctor.Warn(key+" is "+dev, "with a stick plugged in at the start the disk may have another letter", "use /dev/disk/by-partlabel or by-partuuid")
		}
	}
	return doctor.OK("%s", s.place())
}

// sameDevice compares the spelling of fstab(5) with that of udev.
func sameDevice(spec, dev string) bool {
	for tag, dir := range map[string]string{"PARTLABEL=": "by-partlabel", "PARTUUID=": "by-partuuid", "LABEL=": "by-label", "UUID=": "by-uuid"} {
		if value, ok := strings.CutPrefix(spec, tag); ok {
			spec = "/dev/disk/" + dir + "/" + strings.Trim(value, `"`)
		}
	}
	return spec == dev
}

// checkBootFiles looks at what the bootloader keeps its choice in, as far as it is part of the image.
func (p *patient) checkBootFiles(context.Context) doctor.Finding {
	boot := p.cfg.Slots.Boot
	wrong := "the first slot that is written cannot be started"
	elsewhere := "it is not in this tree; if it is on a partition of its own, look there with --root and --config"
	switch loader := p.cfg.Slots.bootloader().(type) {
	case install.GRUB:
		data, err := p.tree.ReadFile(boot.Env, 64<<10)
		if errors.Is(err, fs.ErrNotExist) {
			return doctor.Warn(boot.Env+": "+elsewhere, "without it GRUB starts the factory's slot for ever",
				`grub-editenv FILE create; grub-editenv FILE set ORDER="A B" A_OK=1 A_TRY=0 B_OK=0 B_TRY=0`)
		}
		return factory(boot.Env, err, func() (install.SlotName, error) { return loader.Factory(data) }, wrong)
	case install.Tryboot:
		data, err := p.tree.ReadFile(boot.File, 64<<10)
		if errors.Is(err, fs.ErrNotExist) {
			return doctor.Warn(boot.File+": "+elsewhere, "the daemon writes it at its first start, if the partition is mounted", "put it in the image of the boot partition")
		}
		return factory(boot.File, err, func() (install.SlotName, error) { return loader.Factory(data) }, wrong)
	case install.UBoot:
		data, err := p.tree.ReadFile(boot.Config, 64<<10)
		var places []string
		if err == nil {
			places, err = loader.Places(data)
		}
		if err != nil {
			return doctor.Fail(err.Error(), "the daemon cannot find U-Boot's environment and does not start", "install fw_env.config for this board").With(err)
		}
		return doctor.OK("%s: environment in %s", boot.Config, strings.Join(places, " and "))
	case install.SystemdBoot:
		for _, file := range []string{boot.A, boot.B} {
			data, err := p.tree.ReadFile(file, 64<<10)
			if err == nil {
				err = loader.CheckTemplate(data)
			}
			if err != nil {
				return doctor.Fail(file+": "+err.Error(), "the daemon does not start", "install an entry with a line linux, efi or uki").With(err)
			}
		}
		return doctor.OK("entries %s and %s", boot.A, boot.B)
	}
	return doctor.OK("%s keeps nothing in an image", p.cfg.Slots.Bootloader)
}

func factory(name string, err error, slot func() (install.SlotName, error), why string) doctor.Finding {
	var starts install.SlotName
	if err == nil {
		starts, err = slot()
	}
	if err != nil {
		return doctor.Fail(name+": "+err.Error(), why, "make it as the documentation of the bootloader says (README, packaging/boot)").With(err)
	}
	return doctor.OK("%s starts slot %s", name, starts)
}

// bootScripts are where a boot script may lie in an image.
var bootScripts = map[string][]string{
	"grub":         {"/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/boot/efi/EFI/BOOT/grub.cfg", "/boot/EFI/BOOT/grub.cfg", "/EFI/BOOT/grub.cfg", "/grub/grub.cfg"},
	"uboot":        {"/boot/boot.cmd", "/boot/boot.scr", "/boot/boot.scr.uimg", "/boot/uboot.env", "/boot.cmd", "/boot.scr", "/uboot.env"},
	"systemd-boot": {},
}

const maxScript = 1 << 20

// checkBootScript looks whether the bootloader's script was made for two slots.
func (p *patient) checkBootScript(context.Context) doctor.Finding {
	s := p.cfg.Slots
	places := bootScripts[s.Bootloader]
	if s.Bootloader == "systemd-boot" {
		places = []string{s.Boot.A, s.Boot.B}
	}
	if places == nil {
		return doctor.OK("%s has no script", s.Bootloader)
	}
	for _, at := range places {
		data, err := p.tree.ReadFile(at, maxScript)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return doctor.Fail(err.Error(), "the bootloader cannot read it either", "install a script")
		}
		return p.judgeScript(at, data)
	}
	return doctor.Warn("no script of the bootloader is in this tree ("+strings.Join(places[:min(3, len(places))], ", ")+" ...)",
		"one that was not made for two slots starts the same one for ever", "if it is on a partition of its own, look there with --root and --config; packaging/boot has one for GRUB")
}

func (p *patient) judgeScript(at string, data []byte) doctor.Finding {
	s := p.cfg.Slots
	var lacks []string
	switch s.Bootloader {
	case "grub":
		a, b := s.Boot.A, s.Boot.B
		if a == "" && b == "" {
			a, b = "A", "B"
		}
		lacks = doctor.GRUBLacks(data, a, b)
	case "uboot":
		lacks = doctor.UBootLacks(data, s.Boot.Scheme, s.Boot.Variable)
	}
	if len(lacks) > 0 {
		return doctor.Fail(at+" lacks "+strings.Join(lacks, ", "), "it was not made for two slots: a trial is not started, or never falls back",
			"start from packaging/boot/grub.cfg, or from RAUC's script for this bootloader")
	}
	if !doctor.NamesSlot(data) {
		return doctor.Warn(at+" does not put meshupd.slot=a or b on the kernel's command line",
			"with an overlay, dm-verity or an initramfs the device cannot tell which slot runs", "add meshupd.slot=a (b) to the line that starts the kernel")
	}
	return doctor.OK("%s chooses between two slots and names the one it starts", at)
}
