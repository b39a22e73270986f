package install

import (
	"context"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// UBootScheme says by which variables U-Boot chooses and counts.
type UBootScheme string

// The schemes.
const (
	// UBootLeft is RAUC's: BOOT_ORDER="B A" and a counter of the starts left for each slot, BOOT_A_LEFT and BOOT_B_LEFT, in
	// hexadecimal as setexpr writes. The boot script takes the first slot of BOOT_ORDER that has starts left, and counts down.
	// Slots that are not in BOOT_ORDER are not booted. packaging/boot/uboot.cmd is such a script.
	UBootLeft UBootScheme = "left"
	// UBootCount is U-Boot's own boot counting (CONFIG_BOOTCOUNT_ENV): Slot names the slot to boot; while upgrade_available is
	// 1 U-Boot counts bootcount up, and runs altbootcmd instead of bootcmd when it is above bootlimit. altbootcmd boots the slot that
	// Slot does not name, or sets Slot to it and upgrade_available to 0.
	UBootCount UBootScheme = "count"
)

// UBoot is a bootloader that chooses by its environment. With two copies a change is written to the older one, which
// becomes the newer by its counter: a cut leaves the copy that was valid. With one copy a cut in the middle of the write can
// leave none, and U-Boot then uses the environment it was built with.
type UBoot struct {
	// Config is fw_env.config, which says where the environment is; /etc/fw_env.config when empty. The places are files and block
	// devices; flash that has to be erased (/dev/mtd*) is refused with E-CONFIG: use Custom with fw_setenv there.
	Config string
	// Scheme is UBootLeft when empty.
	Scheme UBootScheme
	// Names of the slots in the variables; "A" and "B" when empty.
	Names Names
	// Attempts are the starts that the default slot gets before U-Boot passes it over (UBootLeft); 3 when zero.
	Attempts int
	// Slot is the variable that names the slot (UBootCount); "boot_slot" when empty.
	Slot string
}

func (u UBoot) open(env loaderEnv) (medium, error) {
	u.Names = u.Names.or("A", "B")
	if u.Config == "" {
		u.Config = "/etc/fw_env.config"
	}
	if u.Scheme == "" {
		u.Scheme = UBootLeft
	}
	if u.Attempts == 0 {
		u.Attempts = 3
	}
	if u.Slot == "" {
		u.Slot = "boot_slot"
	}
	if err := u.Names.check(); err != nil {
		return nil, err
	}
	switch {
	case u.Scheme != UBootLeft && u.Scheme != UBootCount:
		return nil, verify.Refuse(verify.CodeConfig, "the U-Boot scheme is %.20q, not %q or %q", string(u.Scheme), UBootLeft, UBootCount)
	case u.Attempts < 1 || u.Attempts > maxStarts:
		return nil, verify.Refuse(verify.CodeConfig, "%d attempts of the default slot: not 1 to %d", u.Attempts, maxStarts)
	case strings.ContainsAny(u.Slot, "=\x00"):
		return nil, verify.Refuse(verify.CodeConfig, "the variable %.40q is no name", u.Slot)
	}
	data, err := readSmall(u.Config, maxFwEnvConfig)
	if err != nil {
		return nil, verify.Refuse(verify.CodeConfig, "read fw_env.config: %w", err)
	}
	places, err := parseFwEnvConfig(data)
	if err != nil {
		return nil, err
	}
	for _, p := range places {
		// An MTD character device has to be erased before it is written: that is another medium than this one.
		if info, err := os.Stat(p.path); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			return nil, verify.Refuse(verify.CodeConfig, "the U-Boot environment in %s: flash that has to be erased is written by fw_setenv only", p.path)
		}
	}
	return &uboot{u, places, env.step}, nil
}

type uboot struct {
	UBoot
	places []ubootPlace
	step   func(name string, do func() error) error
}

func (u *uboot) most() int { return maxStarts }

// ubootCopy is the copy that U-Boot would use.
type ubootCopy struct {
	vars  []ubootVar
	count byte
	at    int // of places
}

// load finds the valid copy that is the newest. Errors are E-BOOT.
func (u *uboot) load() (ubootCopy, error) {
	var best *ubootCopy
	var bad error
	for i, p := range u.places {
		vars, count, err := u.readCopy(p)
		if err != nil {
			bad = err
			continue
		}
		if best == nil || newer(best.count, count) {
			best = &ubootCopy{vars, count, i}
		}
	}
	if best == nil {
		return ubootCopy{}, bad
	}
	return *best, nil
}

func (u *uboot) readCopy(p ubootPlace) ([]ubootVar, byte, error) {
	f, err := os.OpenFile(p.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: %w", err)
	}
	defer f.Close()
	at, err := p.start(f)
	if err != nil {
		return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: %w", err)
	}
	data := make([]byte, p.size)
	if _, err := f.ReadAt(data, at); err != nil {
		return nil, 0, verify.Refuse(verify.CodeBoot, "read the U-Boot environment in %s: %w", p.path, err)
	}
	return parseUBootEnv(data, len(u.places) == 2)
}

func (p ubootPlace) start(f *os.File) (int64, error) {
	if p.offset >= 0 {
		return p.offset, nil
	}
	end, err := f.Seek(0, io.SeekEnd)
	return end + p.offset, err
}

func (u *uboot) read(context.Context) (choice, error) {
	c, err := u.load()
	if err != nil {
		return choice{}, err
	}
	return u.decode(c.vars)
}

// decode reads the variables. Errors are E-BOOT.
func (u *uboot) decode(vars []ubootVar) (choice, error) {
	if u.Scheme == UBootCount {
		return u.decodeCount(vars)
	}
	return ordered("the U-Boot environment", u.Names, ubootGet(vars, "BOOT_ORDER"), func(name string) (int, bool) {
		return ubootNumber(ubootGet(vars, "BOOT_"+name+"_LEFT"), 16), true
	})
}

func (u *uboot) decodeCount(vars []ubootVar) (choice, error) {
	slot := u.Names.slot(ubootGet(vars, u.Slot))
	if slot == "" {
		return choice{}, verify.Refuse(verify.CodeBoot, "read the U-Boot environment: %s names %.40q, which is no slot", u.Slot, ubootGet(vars, u.Slot))
	}
	if ubootGet(vars, "upgrade_available") != "1" {
		return choice{Default: slot}, nil
	}
	left := max(0, ubootNumber(ubootGet(vars, "bootlimit"), 10)-ubootNumber(ubootGet(vars, "bootcount"), 10))
	return choice{Default: slot.Other(), Trial: slot, Left: left}, nil
}

// ubootNumber reads a counter as U-Boot would: what is no number is 0. It is never above what a trial can have.
func ubootNumber(s string, base int) int {
	s = strings.TrimPrefix(strings.TrimPrefix(s, "0x"), "0X")
	n, err := strconv.ParseUint(s, base, 31)
	if err != nil {
		return 0
	}
	return int(min(n, maxStarts))
}

func (u *uboot) write(_ context.Context, c choice) error {
	now, err := u.load()
	if err != nil {
		return err
	}
	vars := u.encode(slices.Clone(now.vars), c)
	if slices.Equal(vars, now.vars) {
		return nil
	}
	next := (now.at + 1) % len(u.places)
	place := u.places[next]
	data, err := encodeUBootEnv(vars, place.size, len(u.places) == 2, now.count+1)
	if err != nil {
		return err
	}
	err = u.step("boot.write", func() error {
		f, err := os.Open(place.path)
		if err != nil {
			return err
		}
		at, err := place.start(f)
		f.Close()
		if err != nil {
			return err
		}
		return overwrite(place.path, at, data)
	})
	return coded(verify.CodeBoot, "write the U-Boot environment", err)
}

// setHex keeps a second variable in step that some boot scripts use, Mender's for one: the same number in hexadecimal.
func (u *uboot) setHex(vars []ubootVar, c choice) []ubootVar {
	slot := c.Default
	if c.Trial != "" {
		slot = c.Trial
	}
	n, err := strconv.ParseUint(u.Names.of(slot), 10, 31)
	if err != nil || ubootGet(vars, u.Slot+"_hex") == "" {
		return vars
	}
	return ubootSet(vars, u.Slot+"_hex", strconv.FormatUint(n, 16))
}

func (u *uboot) encode(vars []ubootVar, c choice) []ubootVar {
	if u.Scheme == UBootCount {
		vars = u.setHex(vars, c)
		if c.Trial == "" {
			vars = ubootSet(vars, u.Slot, u.Names.of(c.Default))
			vars = ubootSet(vars, "upgrade_available", "0")
			return ubootSet(vars, "bootcount", "0")
		}
		limit := max(1, c.Left) // 0 would be no limit at all
		vars = ubootSet(vars, u.Slot, u.Names.of(c.Trial))
		vars = ubootSet(vars, "upgrade_available", "1")
		vars = ubootSet(vars, "bootlimit", strconv.Itoa(limit))
		return ubootSet(vars, "bootcount", strconv.Itoa(limit-c.Left))
	}
	order := u.Names.of(c.Default)
	if c.Trial != "" {
		order = u.Names.of(c.Trial) + " " + order
	}
	vars = ubootSet(vars, "BOOT_ORDER", order)
	for _, slot := range []SlotName{SlotA, SlotB} {
		left := 0
		switch slot {
		case c.Default:
			left = u.Attempts
		case c.Trial:
			left = c.Left
		}
		vars = ubootSet(vars, "BOOT_"+u.Names.of(slot)+"_LEFT", strconv.FormatInt(int64(left), 16))
	}
	return vars
}
