package install

import (
	"bytes"
	"context"
	"os"
	"strconv"
	"strings"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// Tryboot is the bootloader of a Raspberry Pi: autoboot.txt names the boot partition of each slot, and a restart with
// the argument "0 tryboot" takes that of the section [tryboot], once. The firmware forgets the argument with the power, so an
// armed trial that is cut off before its restart stays armed.
//
//	[all]
//	tryboot_a_b=1
//	boot_partition=2
//	[tryboot]
//	boot_partition=3
//	#meshupd asked BOOT-ID      in which start of the machine the restart asked for the trial
//
// Without a trial there is no section [tryboot]. The restart command gets MESHUPD_REBOOT_ARG="0 tryboot".
type Tryboot struct {
	// File is autoboot.txt on the first partition, mounted; /boot/firmware/autoboot.txt when empty.
	File string
	// A and B are the numbers of the slots' boot partitions.
	A, B int
}

const (
	trybootArg = "0 tryboot"
	// autobootSize is what the firmware reads of the file (config.txt documentation, autoboot.txt): one sector. The file always has
	// this size, so that a change is one sector in place, which a medium writes whole or not at all. FAT has no journal.
	autobootSize = 512
	askedMark    = "#meshupd asked "
	maxPartition = 255
)

func (t Tryboot) open(env loaderEnv) (medium, error) {
	if t.File == "" {
		t.File = "/boot/firmware/autoboot.txt"
	}
	if t.A < 1 || t.B < 1 || t.A > maxPartition || t.B > maxPartition || t.A == t.B {
		return nil, verify.Refuse(verify.CodeConfig, "the boot partitions are %d and %d, not two numbers of 1 to %d", t.A, t.B, maxPartition)
	}
	return &tryboot{t, env}, nil
}

type tryboot struct {
	Tryboot
	env loaderEnv
}

// autoboot is what autoboot.txt says.
type autoboot struct {
	all, try int    // partitions, 0: not said
	asked    string // boot id of the start that asked for the trial
}

// parseAutoboot reads autoboot.txt; of other sections and settings nothing is kept. Errors are E-BOOT.
func parseAutoboot(data []byte) (autoboot, error) {
	var a autoboot
	if len(data) > autobootSize {
		return a, verify.Refuse(verify.CodeBoot, "read autoboot.txt: larger than %d bytes", autobootSize)
	}
	section := "all"
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if id, found := strings.CutPrefix(line, askedMark); found {
			a.asked = id
			continue
		}
		if len(line) > 1 && line[0] == '[' && line[len(line)-1] == ']' {
			section = line[1 : len(line)-1]
			continue
		}
		value, found := strings.CutPrefix(line, "boot_partition=")
		if !found {
			continue
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 || n > maxPartition {
			return autoboot{}, verify.Refuse(verify.CodeBoot, "read autoboot.txt: boot_partition is %.20q", value)
		}
		switch section {
		case "all":
			a.all = n
		case "tryboot":
			a.try = n
		}
	}
	return a, nil
}

func (a autoboot) encode() []byte {
	var out bytes.Buffer
	out.WriteString("[all]\ntryboot_a_b=1\nboot_partition=" + strconv.Itoa(a.all) + "\n")
	if a.try != 0 {
		out.WriteString("[tryboot]\nboot_partition=" + strconv.Itoa(a.try) + "\n")
		if a.asked != "" {
			out.WriteString(askedMark + a.asked + "\n")
		}
	}
	for out.Len() < autobootSize-1 {
		out.WriteByte('#')
	}
	out.WriteByte('\n')
	return out.Bytes()
}

func (t *tryboot) most() int { return 1 }

func (t *tryboot) load() ([]byte, autoboot, error) {
	data, err := readSmall(t.File, autobootSize)
	if err != nil {
		return nil, autoboot{}, verify.Refuse(verify.CodeBoot, "read autoboot.txt: %w", err)
	}
	a, err := parseAutoboot(data)
	return data, a, err
}

func (t *tryboot) slot(partition int) SlotName {
	switch partition {
	case t.A:
		return SlotA
	case t.B:
		return SlotB
	}
	return ""
}

func (t *tryboot) partition(slot SlotName) int {
	switch slot {
	case SlotA:
		return t.A
	case SlotB:
		return t.B
	}
	return 0
}

func (t *tryboot) read(context.Context) (choice, error) {
	_, a, err := t.load()
	if err != nil {
		return choice{}, err
	}
	id, err := t.env.bootID()
	if err != nil {
		return choice{}, err
	}
	c := choice{Default: t.slot(a.all), Trial: t.slot(a.try), Left: 1}
	if c.Default == "" {
		return choice{}, verify.Refuse(verify.CodeBoot, "read autoboot.txt: it boots partition %d, which is no slot", a.all)
	}
	if c.Trial == c.Default {
		c.Trial = ""
	}
	// Asked for in an earlier start of the machine: the trial has had its start.
	if c.Trial == "" || a.asked != "" && a.asked != id {
		c.Left = 0
	}
	return c, nil
}

func (t *tryboot) write(_ context.Context, c choice) error {
	a := autoboot{all: t.partition(c.Default), try: t.partition(c.Trial)}
	if c.Trial != "" && c.Left == 0 {
		a.asked = "-" // of no start that will ever be
	}
	return t.store(a)
}

// store writes the file in place; where it has another size, or is not there, once in the ordinary way.
func (t *tryboot) store(a autoboot) error {
	data := a.encode()
	old, err := readSmall(t.File, autobootSize)
	if err == nil && bytes.Equal(old, data) {
		return nil
	}
	info, serr := os.Stat(t.File)
	err = t.env.step("boot.write", func() error {
		if serr != nil || info.Size() != autobootSize {
			if err := durable.WriteFile(t.File, data, 0o644); err != nil {
				return err
			}
		}
		return overwrite(t.File, 0, data)
	})
	return coded(verify.CodeBoot, "write autoboot.txt", err)
}

func (t *tryboot) ask(context.Context) (string, error) {
	_, a, err := t.load()
	if err != nil {
		return "", err
	}
	if a.asked, err = t.env.bootID(); err != nil {
		return "", err
	}
	return trybootArg, t.store(a)
}
