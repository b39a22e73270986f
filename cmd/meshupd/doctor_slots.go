package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/install"
)

func (p *patient) needBlock() string {
	if p.cfg == nil {
		return p.needConfig()
	}
	if p.cfg.Slots.Kind != "block" {
		return "slots of kind " + p.cfg.Slots.Kind + " are no partitions of ours"
	}
	return ""
}

func (p *patient) needFolder() string {
	if p.cfg == nil {
		return p.needConfig()
	}
	if p.cfg.Slots.Kind != "files" && p.cfg.Slots.Kind != "container" {
		return "slots of kind " + p.cfg.Slots.Kind + " are in no folder"
	}
	return ""
}

// block is the config of slots as whoever opens them has it: root's half, or the daemon.
func (p *patient) block() install.BlockConfig {
	cfg := *p.cfg
	if cfg.Apply.Socket != "" {
		cfg.State = cfg.Apply.State
	}
	return blockConfig(cfg)
}

// slots looks once.
func (p *patient) slots() install.SlotsView {
	if p.seen.view == nil {
		v := install.InspectSlots(p.block())
		p.seen.view = &v
		p.seen.slots = v.Size
	}
	return *p.seen.view
}

func (p *patient) checkFolder(context.Context) doctor.Finding {
	name := p.cfg.slotFolder()
	if p.cfg.Apply.Socket != "" {
		if err := ownedHere("slots.folder", name); err != nil {
			return failed(err, "meshupd apply refuses to start")
		}
	}
	system, at, err := nearestFileSystem(name)
	switch {
	case err != nil:
		return doctor.Skip("%v", err)
	case system.ReadOnly:
		return doctor.Fail(at+" lies on a file system that is mounted read-only", "no version can be written", "mount it writable, or correct slots.folder")
	case system.Type == "tmpfs" || system.Type == "ramfs":
		return doctor.Fail(name+" lies in memory ("+system.Type+")", "what is installed is gone after a restart", "put slots.folder on a disk")
	}
	v := install.InspectFiles(install.FilesConfig{Dir: name, Layout: install.Layout(p.cfg.Slots.Layout), Starts: p.cfg.Slots.Starts})
	switch {
	case errors.Is(v.Err, fs.ErrPermission):
		return doctor.Skip("%v: ask again as root", v.Err)
	case v.Err != nil:
		return failed(v.Err, "the daemon does not start")
	case v.New:
		return doctor.OK("%s is new: the first start begins it with version %s", name, orUnknown(p.cfg.Slots.Factory))
	}
	var held []string
	for _, slot := range []install.SlotName{install.SlotA, install.SlotB} {
		if c, ok := v.Slots[slot]; ok && c.Whole {
			held = append(held, string(slot)+" holds "+orUnknown(c.Version))
		}
	}
	return doctor.OK("%s: %s; %s free", name, strings.Join(held, ", "), screen.Bytes(system.Free))
}

func (p *patient) checkSlotsKnown(context.Context) doctor.Finding {
	v := p.slots()
	a, b := v.Size[install.SlotA], v.Size[install.SlotB]
	switch {
	case v.Apart != nil:
		return failed(v.Apart, "the daemon does not start")
	case a == 0 || b == 0:
		return doctor.Skip("the slots cannot be opened: ask again as root")
	case a != b:
		return doctor.Warn(fmt.Sprintf("slot a has %s, slot b has %s", screen.Bytes(a), screen.Bytes(b)), "an image that fits into one may not fit into the other", "make both partitions of one size")
	case !v.Block[install.SlotA] || !v.Block[install.SlotB]:
		return doctor.Warn("the slots are files, not partitions", "a bootloader can hardly start from them", "name partitions, best by /dev/disk/by-partlabel")
	}
	return doctor.OK("%s and %s, %s each", p.cfg.Slots.A, p.cfg.Slots.B, screen.Bytes(a))
}

func (p *patient) checkSlotRuns(context.Context) doctor.Finding {
	v := p.slots()
	if v.BootedErr != nil && p.cfg.Slots.Bootloader == "custom" {
		return doctor.OK("left to the custom bootloader to say")
	}
	if v.BootedErr != nil {
		return failed(v.BootedErr, "the daemon does not start: it cannot tell which slot must not be written")
	}
	return doctor.OK("slot %s runs", v.Booted)
}

func (p *patient) checkSlotIdle(context.Context) doctor.Finding {
	v := p.slots()
	if v.Booted == "" {
		return doctor.Skip("which slot is idle is not known")
	}
	if v.IdleErr != nil {
		return doctor.Fail(v.IdleErr.Error(), "the idle slot is not written while it is in use", "unmount it, and take it out of /etc/fstab and of automounters")
	}
	if os.Geteuid() != 0 && p.cfg.Apply.Socket == "" {
		return doctor.OK("slot %s is neither mounted nor held; whether it can be written only root sees", v.Booted.Other())
	}
	return doctor.OK("slot %s is neither mounted nor held", v.Booted.Other())
}

// looks at the bootloader once.
func (p *patient) boot(ctx context.Context) install.BootView {
	if p.seen.boot == nil {
		cfg := p.block()
		if cfg.A == "" && p.cfg.Slots.Bootloader == "custom" {
			cfg.A, cfg.B = "a", "b" // a custom bootloader says by itself which one runs
		}
		v := install.InspectBoot(ctx, cfg)
		p.seen.boot = &v
	}
	return *p.seen.boot
}

func (p *patient) checkBootSettings(ctx context.Context) doctor.Finding {
	v := p.boot(ctx)
	switch {
	case errors.Is(v.Err, fs.ErrPermission):
		return doctor.Skip("%v: ask again as root", v.Err)
	case v.Err != nil:
		return failed(v.Err, "the slot of a new version cannot be started")
	case v.New:
		return doctor.OK("%s can be read; the first start of the daemon makes the slot that runs the default", p.cfg.Slots.Bootloader)
	}
	st := v.State
	said := fmt.Sprintf("%s: %s, slot %s runs, slot %s is the default", p.cfg.Slots.Bootloader, st.Phase, st.Booted, st.Default)
	switch {
	case st.Phase == install.PhaseArmed:
		said += fmt.Sprintf(", the next start tries slot %s", st.Trial)
	case st.Phase == install.PhaseTrial:
		return doctor.Warn(said, "nothing is installed while a trial runs", "wait until it is confirmed or falls back")
	}
	return doctor.OK("%s", said)
}

// grubSystems are those in which GRUB can save its environment: a file there keeps its blocks.
var grubSystems = []string{"ext4", "vfat", "xfs"}

func (p *patient) checkBootPlaces(ctx context.Context) doctor.Finding {
	var said []string
	for _, place := range p.boot(ctx).Places {
		system := place.System
		switch {
		case place.Err != nil:
			return doctor.Fail(place.Err.Error(), "the bootloader's settings cannot be changed", "mount the partition there, or correct [slots] boot")
		case system.ReadOnly:
			return doctor.Fail(place.Path+" lies on a file system that is mounted read-only", "the bootloader's settings cannot be changed", "mount it writable (mount -o remount,rw)")
		case p.cfg.Slots.Bootloader == "grub" && !slices.Contains(grubSystems, system.Type) && system.Type != "":
			return doctor.Fail(place.Path+" lies on "+system.Type, "GRUB cannot save its environment there, so a trial never falls back", "put it on ext4 or vfat")
		case slices.Contains([]string{"tryboot", "systemd-boot"}, p.cfg.Slots.Bootloader) && system.Type != "vfat":
			return doctor.Fail(place.Path+" lies on "+orUnknownType(system.Type)+", not on vfat", "the firmware does not read it: the boot partition is not mounted there", "mount the boot partition there")
		case p.cfg.Slots.Bootloader == "efi" && system.Type != "efivarfs":
			return doctor.Fail(place.Path+" is no efivarfs", "the firmware's boot order cannot be changed", "start the machine by UEFI, and mount efivarfs")
		}
		said = append(said, place.Path+" on "+orUnknownType(system.Type))
	}
	if len(said) == 0 {
		return doctor.OK("%s keeps its own place", p.cfg.Slots.Bootloader)
	}
	return doctor.OK("%s", strings.Join(said, ", "))
}

// slotFolder is where slots, or their records, are.
func (c *Config) slotFolder() string {
	if c.Slots.Folder != "" {
		return c.Slots.Folder
	}
	if c.Apply.Socket != "" {
		return filepath.Join(c.Apply.State, "slots")
	}
	return filepath.Join(c.State, "slots")
}
