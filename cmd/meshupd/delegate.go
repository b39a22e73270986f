package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"meshupd/install"
)

// slotKinds are those that slots.kind can name.
var slotKinds = append([]string{"files", "block", "container"}, delegates...)

// delegates are the kinds of slots that another installer writes.
var delegates = []string{"rauc", "swupdate", "mender", "command"}

func delegated(kind string) bool { return slices.Contains(delegates, kind) }

// DelegateConfig says how the installer that slots.kind names is run.
type DelegateConfig struct {
	Command []string `toml:"command" comment:"rauc: the program; swupdate, mender: the command with {file} and {slot}; command: the executable (required); empty: the usual one"`
	A       string   `toml:"a" comment:"slot a's name: rauc: a slot or bootname; swupdate, mender: what {slot} stands for, \"a\" when empty"`
	B       string   `toml:"b" comment:"the same of slot b"`
	Timeout Duration `toml:"timeout" comment:"how long one installation may take"`
}

func (c *Config) checkDelegate() error {
	del := c.Slots.Delegate
	switch {
	case len(del.Command) > 0 && del.Command[0] == "":
		return &fieldError{"slots.delegate.command", "names no command"}
	case len(del.Command) == 0 && c.Slots.Kind == "command":
		return &fieldError{"slots.delegate.command", "is missing"}
	case (del.A == "") != (del.B == ""):
		return &fieldError{"slots.delegate.a", "and slots.delegate.b belong together"}
	case del.A != "" && del.A == del.B:
		return &fieldError{"slots.delegate.b", "is the same as slots.delegate.a"}
	case del.Timeout < leastDuration:
		return &fieldError{"slots.delegate.timeout", tooShort}
	case c.Slots.Kind == "rauc" || c.Slots.Kind == "command":
		return nil
	case len(del.Command) > 0 && !strings.Contains(strings.Join(del.Command[1:], "\x00"), "{file}"):
		return &fieldError{"slots.delegate.command", "has no {file} in its arguments"}
	case c.Slots.Bootloader == "":
		return &fieldError{"slots.bootloader", "is missing: " + c.Slots.Kind + " leaves the choice of the slot to one"}
	}
	if c.Slots.Bootloader != "custom" {
		// Only a custom bootloader can say by itself which slot runs.
		if err := need("slots.a", c.Slots.A); err != nil {
			return err
		}
		if err := need("slots.b", c.Slots.B); err != nil {
			return err
		}
	}
	return c.checkBootloader()
}

// delegate is the installer that the config chooses. Validate has let it pass.
func (s SlotsConfig) delegate() install.Installer {
	del, timeout := s.Delegate, time.Duration(s.Delegate.Timeout)
	names := install.Names{A: del.A, B: del.B}
	program := func(p install.Program) install.Installer {
		if len(del.Command) > 0 {
			p.Command = del.Command
		}
		p.Names, p.Timeout = names, timeout
		return p
	}
	switch s.Kind {
	case "rauc":
		return install.RAUC{A: del.A, B: del.B, Command: del.Command, Timeout: timeout}
	case "swupdate":
		return program(install.SWUpdate("-e", "stable,{slot}"))
	case "mender":
		return program(install.Mender())
	default:
		return install.Executable{Custom: install.Custom{Command: del.Command}, WriteTimeout: timeout}
	}
}

func openDelegate(ctx context.Context, cfg Config) (startedSlots, error) {
	return install.OpenDelegate(ctx, install.DelegateConfig{Installer: cfg.Slots.delegate(), BlockConfig: blockConfig(cfg)})
}
