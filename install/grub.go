package install

import (
	"bytes"
	"context"
	"slices"
	"strings"

	"meshupd/verify"
)

// GRUB is a bootloader that chooses by an environment block, in the layout of RAUC, so that a grub.cfg made for RAUC
// works; packaging/boot/grub.cfg is one with comments.
//
//	ORDER="B A"  slots in the order they are looked at
//	x_OK         1: may be booted
//	x_TRY        1: was started and has not been found good since; GRUB sets it, and passes the slot over
//
//	settled on A   ORDER="A B" A_OK=1 A_TRY=0 B_OK=0 B_TRY=0
//	B armed        ORDER="B A" A_OK=1 A_TRY=0 B_OK=1 B_TRY=0
//	B on trial     the same with B_TRY=1, by GRUB
//
// GRUB has one try; the starts of a longer trial are armed again one by one, from the slot on trial.
type GRUB struct {
	// Env is the environment block, /boot/grub/grubenv. It must exist (grub-editenv FILE create) and keep its blocks:
	// not on btrfs, ZFS or behind a log-structured file system, where GRUB itself cannot save it either.
	Env string
	// Names of the slots in the variables; "A" and "B" when empty.
	Names Names
}

// Names are what a bootloader calls the two slots.
type Names struct{ A, B string }

func (n Names) or(a, b string) Names {
	if n == (Names{}) {
		return Names{a, b}
	}
	return n
}

func (n Names) of(slot SlotName) string {
	if slot == SlotA {
		return n.A
	}
	return n.B
}

// slot returns "" for a name that is none.
func (n Names) slot(name string) SlotName {
	switch name {
	case n.A:
		return SlotA
	case n.B:
		return SlotB
	}
	return ""
}

// check refuses with E-CONFIG what cannot be part of a variable's name.
func (n Names) check() error {
	for _, name := range []string{n.A, n.B} {
		if name == "" || len(name) > 32 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") != "" {
			return verify.Refuse(verify.CodeConfig, "the bootloader's name of a slot is %.40q, not letters, digits, '_', '.' and '-'", name)
		}
	}
	if n.A == n.B {
		return verify.Refuse(verify.CodeConfig, "the bootloader calls both slots %s", n.A)
	}
	return nil
}

func (g GRUB) open(env loaderEnv) (medium, error) {
	g.Names = g.Names.or("A", "B")
	if g.Env == "" {
		return nil, verify.Refuse(verify.CodeConfig, "the path of the GRUB environment is missing")
	}
	if err := g.Names.check(); err != nil {
		return nil, err
	}
	return &grub{g, env.step}, nil
}

type grub struct {
	GRUB
	step func(name string, do func() error) error
}

func (g *grub) most() int { return 1 }

func (g *grub) load() ([]byte, *grubEnv, error) {
	data, err := readSmall(g.Env, maxGRUBEnv)
	if err != nil {
		return nil, nil, verify.Refuse(verify.CodeBoot, "read the GRUB environment: %w", err)
	}
	env, err := parseGRUBEnv(data)
	return data, env, err
}

func (g *grub) read(context.Context) (choice, error) {
	_, env, err := g.load()
	if err != nil {
		return choice{}, err
	}
	return g.decode(env)
}

// decode reads the variables. Errors are E-BOOT.
func (g *grub) decode(env *grubEnv) (choice, error) {
	return ordered("the GRUB environment", g.Names, env.values["ORDER"], func(name string) (int, bool) {
		// As a test in grub.cfg does: anything but these two values is "no".
		left := 0
		if env.values[name+"_TRY"] == "0" {
			left = 1
		}
		return left, env.values[name+"_OK"] == "1"
	})
}

// ordered reads what RAUC's layouts have in common: of the slots in order that may be booted the last is the default and the
// one before it is on trial.
func ordered(what string, names Names, order string, starts func(name string) (left int, ok bool)) (choice, error) {
	var may []SlotName
	for _, name := range strings.Fields(order) {
		slot := names.slot(name)
		if slot == "" || slices.Contains(may, slot) {
			continue
		}
		if _, ok := starts(name); ok {
			may = append(may, slot)
		}
	}
	switch len(may) {
	case 0:
		return choice{}, verify.Refuse(verify.CodeBoot, "read %s: no slot may be booted, the order is %.80q", what, order)
	case 1:
		return choice{Default: may[0]}, nil
	}
	left, _ := starts(names.of(may[0]))
	return choice{Default: may[1], Trial: may[0], Left: left}, nil
}

func (g *grub) write(_ context.Context, c choice) error {
	old, env, err := g.load()
	if err != nil {
		return err
	}
	g.encode(env, c)
	data, err := env.encode([]string{"ORDER", g.Names.A + "_OK", g.Names.A + "_TRY", g.Names.B + "_OK", g.Names.B + "_TRY"})
	if err != nil || bytes.Equal(old, data) {
		return err
	}
	err = g.step("boot.write", func() error { return overwrite(g.Env, 0, data) })
	return coded(verify.CodeBoot, "write the GRUB environment", err)
}

func (g *grub) encode(env *grubEnv, c choice) {
	first := c.Default
	if c.Trial != "" {
		first = c.Trial
	}
	env.set("ORDER", g.Names.of(first)+" "+g.Names.of(first.Other()))
	for _, slot := range []SlotName{SlotA, SlotB} {
		ok, try := "0", "0"
		if slot == c.Default || slot == c.Trial {
			ok = "1"
		}
		if slot == c.Trial && c.Left == 0 {
			try = "1"
		}
		env.set(g.Names.of(slot)+"_OK", ok)
		env.set(g.Names.of(slot)+"_TRY", try)
	}
}
