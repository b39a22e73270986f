package main

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"meshupd/install"
)

// BootConfig places the bootloader of block slots; only the keys of the one that is chosen are looked at.
type BootConfig struct {
	Env      string   `toml:"env" comment:"grub: the environment block"`
	Config   string   `toml:"config" comment:"uboot: fw_env.config"`
	Scheme   string   `toml:"scheme" comment:"uboot: \"left\" (BOOT_ORDER and BOOT_x_LEFT, as RAUC) or \"count\" (bootcount and upgrade_available)"`
	Variable string   `toml:"variable" comment:"uboot with scheme \"count\": the variable that names the slot"`
	Dir      string   `toml:"dir" comment:"systemd-boot: where the partition with loader/entries is mounted"`
	File     string   `toml:"file" comment:"tryboot: autoboot.txt"`
	A        string   `toml:"a" comment:"slot a's name (grub, uboot), entry file (systemd-boot), partition number (tryboot) or boot option (efi)"`
	B        string   `toml:"b" comment:"the same of slot b"`
	Command  []string `toml:"command" comment:"custom: the executable that is run with a verb"`
}

// bootloaders are those that slots.bootloader can name.
var bootloaders = []string{"grub", "uboot", "systemd-boot", "tryboot", "efi", "custom"}

// place says in a few words where the slots are.
func (s SlotsConfig) place() string {
	if delegated(s.Kind) {
		return "written by " + s.Kind
	}
	if s.Kind == "container" {
		return "in " + s.Container.Engine
	}
	if s.Kind == "block" {
		return fmt.Sprintf("%q and %q, %s", s.A, s.B, s.Bootloader)
	}
	return fmt.Sprintf("%q", s.Folder)
}

func (c *Config) checkSlots() error {
	switch {
	case !slices.Contains(slotKinds, c.Slots.Kind):
		return &fieldError{"slots.kind", fmt.Sprintf("is %q, not one of %q", c.Slots.Kind, slotKinds)}
	case c.Slots.Starts < 1 || c.Slots.Starts > 10:
		return &fieldError{"slots.starts", "is not 1 to 10"}
	case len(c.Slots.Restart) > 0 && c.Slots.Restart[0] == "":
		return &fieldError{"slots.restart", "names no command"}
	case c.Slots.RestartTimeout < leastDuration:
		return &fieldError{"slots.restart_timeout", tooShort}
	case c.Slots.Settle < leastDuration:
		return &fieldError{"slots.settle", tooShort}
	case c.Slots.Keep < 0 || c.Slots.Keep > install.MaxKept:
		return &fieldError{"slots.keep", fmt.Sprintf("is not 0 to %d", install.MaxKept)}
	case c.Slots.Keep > 0 && c.Slots.Kind != "files":
		return &fieldError{"slots.keep", `is only for slots.kind = "files"`}
	case c.Slots.Unit != "" && c.Slots.Kind != "files":
		return &fieldError{"slots.unit", `is only for slots.kind = "files"`}
	case c.Slots.Kind == "block":
		return c.checkBlock()
	case delegated(c.Slots.Kind):
		return c.checkDelegate()
	case c.Slots.Kind == "container":
		return c.checkContainers()
	case c.Slots.Folder == "":
		return &fieldError{"slots.folder", "is missing"}
	case c.Slots.Layout != "folder" && c.Slots.Layout != "image":
		return &fieldError{"slots.layout", `is neither "folder" nor "image"`}
	case c.Slots.Unit != "" && !unitPattern.MatchString(c.Slots.Unit):
		return &fieldError{"slots.unit", `is not a unit like "kiosk.service"`}
	case c.Slots.Unit != "" && (len(c.Slots.Restart) > 0 || c.Slots.Machine):
		return &fieldError{"slots.unit", "says how the application starts, so slots.restart and slots.machine cannot"}
	}
	return nil
}

func (c *Config) checkBlock() error {
	for _, dev := range [][2]string{{"slots.a", c.Slots.A}, {"slots.b", c.Slots.B}, {"slots.bootloader", c.Slots.Bootloader}} {
		if err := need(dev[0], dev[1]); err != nil {
			return err
		}
	}
	return c.checkBootloader()
}

func need(key, value string) error {
	if value == "" {
		return &fieldError{key, "is missing"}
	}
	return nil
}

func (c *Config) checkBootloader() error {
	boot := c.Slots.Boot
	switch c.Slots.Bootloader {
	case "systemd-boot", "tryboot", "efi":
		if err := need("slots.boot.a", boot.A); err != nil {
			return err
		}
		if err := need("slots.boot.b", boot.B); err != nil {
			return err
		}
	case "custom":
		if len(boot.Command) == 0 || boot.Command[0] == "" {
			return &fieldError{"slots.boot.command", "names no command"}
		}
	case "uboot":
		if boot.Scheme != "left" && boot.Scheme != "count" {
			return &fieldError{"slots.boot.scheme", `is neither "left" nor "count"`}
		}
	}
	if !slices.Contains(bootloaders, c.Slots.Bootloader) {
		return &fieldError{"slots.bootloader", fmt.Sprintf("is %q, not one of %q", c.Slots.Bootloader, bootloaders)}
	}
	if c.Slots.Bootloader == "tryboot" {
		for key, text := range map[string]string{"slots.boot.a": boot.A, "slots.boot.b": boot.B} {
			if partition(text) == 0 {
				return &fieldError{key, "is not the number of a partition, 1 to 255"}
			}
		}
	}
	return nil
}

// partition reads a number of 1 to 255; anything else is 0.
func partition(text string) int {
	n := 0
	for _, c := range text {
		if c < '0' || c > '9' || n > 255 {
			return 0
		}
		n = n*10 + int(c-'0')
	}
	if n > 255 {
		return 0
	}
	return n
}

// bootloader is what the config chooses. Validate has let it pass.
func (s SlotsConfig) bootloader() install.Loader {
	boot := s.Boot
	names := install.Names{A: boot.A, B: boot.B}
	switch s.Bootloader {
	case "grub":
		return install.GRUB{Env: boot.Env, Names: names}
	case "uboot":
		return install.UBoot{Config: boot.Config, Scheme: install.UBootScheme(boot.Scheme), Names: names, Slot: boot.Variable}
	case "systemd-boot":
		loader := install.SystemdBoot{Dir: boot.Dir}
		loader.Templates.A, loader.Templates.B = boot.A, boot.B
		return loader
	case "tryboot":
		return install.Tryboot{File: boot.File, A: partition(boot.A), B: partition(boot.B)}
	case "efi":
		return install.EFI{A: boot.A, B: boot.B}
	case "custom":
		return install.Custom{Command: boot.Command}
	}
	return nil
}

// startedSlots is a back end with what the daemon calls once before anything else.
type startedSlots = install.StartedSlots

// openSlots opens the slots with the hooks around them. cfg.State is the folder of the process that calls.
func openSlots(ctx context.Context, cfg Config, log *slog.Logger) (startedSlots, error) {
	slots, err := openBare(ctx, cfg, log)
	if err != nil {
		return nil, err
	}
	return cfg.hooked(slots, cfg.State, log)
}

// blockConfig is what the config says of two partitions, or of those that another installer writes.
func blockConfig(cfg Config) install.BlockConfig {
	restart := cfg.Slots.Restart
	if len(restart) == 0 {
		restart = nil
	}
	folder := cfg.Slots.Folder
	if folder == "" {
		folder = filepath.Join(cfg.State, "slots")
	}
	return install.BlockConfig{
		A: cfg.Slots.A, B: cfg.Slots.B, State: folder, FactoryVersion: cfg.Slots.Factory, Loader: cfg.Slots.bootloader(),
		Starts: cfg.Slots.Starts, Restart: restart, RestartTimeout: time.Duration(cfg.Slots.RestartTimeout), Discard: cfg.Slots.Discard,
	}
}

func openBare(ctx context.Context, cfg Config, log *slog.Logger) (startedSlots, error) {
	restart := cfg.Slots.Restart
	if len(restart) == 0 {
		restart = nil
	}
	if cfg.Slots.Kind == "block" {
		block := blockConfig(cfg)
		block.Wrote = func(slot install.SlotName, written, same int64) {
			log.Info("wrote a slot", "slot", slot, "written", written, "already_there", same)
		}
		return install.OpenBlock(ctx, block)
	}
	if delegated(cfg.Slots.Kind) {
		return openDelegate(ctx, cfg)
	}
	if cfg.Slots.Kind == "container" {
		return openContainers(ctx, cfg)
	}
	return install.OpenFiles(install.FilesConfig{
		Dir: cfg.Slots.Folder, Layout: install.Layout(cfg.Slots.Layout), FactoryVersion: cfg.Slots.Factory,
		Restart: restart, RestartTimeout: time.Duration(cfg.Slots.RestartTimeout),
		Machine: cfg.Slots.Machine, Keep: cfg.Slots.Keep, Unit: cfg.Slots.Unit, Settle: time.Duration(cfg.Slots.Settle), Starts: cfg.Slots.Starts,
	})
}
