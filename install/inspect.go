package install

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"meshupd/verify"
)

// SlotsView is what InspectSlots saw of two partitions, or files of a fixed size. Each error stands alone, and nil is good.
type SlotsView struct {
	Apart     error              // E-CONFIG: a slot is not there, both are one, or the records lie on one
	Size      map[SlotName]int64 // of those that can be looked at
	Block     map[SlotName]bool  // a block device, not a file
	Booted    SlotName           // "" when BootedErr is set
	BootedErr error              // E-BOOT
	// IdleErr says why the slot that does not run must not be written now: it is mounted, held, or the system runs from it.
	IdleErr error
}

// InspectSlots looks at the slots of a Block and changes nothing; nothing is opened for writing.
func InspectSlots(cfg BlockConfig) SlotsView {
	sys := cfg.system.withDefaults()
	v := SlotsView{Size: map[SlotName]int64{}, Block: map[SlotName]bool{}}
	state := cfg.State
	for state != "/" && state != "." {
		if _, err := os.Lstat(state); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		state = filepath.Dir(state) // it is made when the daemon starts, and lies where its parent does
	}
	v.Apart = sys.checkApart(cfg.A, cfg.B, state)
	paths := map[SlotName]string{SlotA: cfg.A, SlotB: cfg.B}
	for slot, path := range paths {
		if id, err := identify(path); err == nil {
			v.Block[slot] = id.block
			if size, err := sizeOf(path); err == nil {
				v.Size[slot] = size
			}
		}
	}
	if cfg.Booted != nil {
		v.Booted, v.BootedErr = cfg.Booted()
	} else {
		v.Booted, v.BootedErr = sys.runningSlot(cfg.A, cfg.B)
	}
	if v.Booted != "" {
		v.IdleErr = sys.checkIdle(paths[v.Booted.Other()])
	}
	return v
}

func sizeOf(path string) (int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// BootView is what InspectBoot saw of a bootloader's settings.
type BootView struct {
	New    bool      // there are no records yet: the first start of the daemon makes the slot that runs the default
	State  BootState // what the settings say; zero when Err is set
	Err    error     // they cannot be used: E-CONFIG or E-BOOT
	Places []BootPlace
}

// BootPlace is a file, or a folder, that the bootloader reads and Block writes.
type BootPlace struct {
	Path   string
	System FileSystem
	Err    error // nothing is there
}

// errRehearsed ends a step before it changes anything.
var errRehearsed = errors.New("rehearsed")

// InspectBoot reads the bootloader's settings, and takes a change of them as far as the first step that would be durable. It
// changes nothing.
func InspectBoot(ctx context.Context, cfg BlockConfig) BootView {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return BootView{Err: err}
	}
	cfg.step = func(string, func() error) error { return errRehearsed }
	v := BootView{}
	for _, path := range cfg.Loader.places() {
		v.Places = append(v.Places, lookAt(path))
	}
	keep := &noteFile{cfg.State, cfg.step}
	m, err := cfg.Loader.open(loaderEnv{bootID: cfg.BootID, step: cfg.step})
	if err != nil {
		v.Err = err
		return v
	}
	_, found, err := keep.load()
	if err != nil {
		v.Err = err
		return v
	}
	l := &loader{medium: m, keep: keep, booted: cfg.Booted, bootID: cfg.BootID}
	if v.New = !found; v.New {
		v.Err = rehearsal(ctx, l)
		return v
	}
	if v.State, v.Err = l.Boot(ctx); v.Err != nil {
		return v
	}
	if err := m.write(ctx, choice{Default: v.State.Default.Other()}); err != nil && !errors.Is(err, errRehearsed) {
		v.Err = err
	}
	return v
}

// rehearsal is what begin does first on a new device.
func rehearsal(ctx context.Context, l *loader) error {
	booted, err := l.booted()
	if err != nil {
		c, rerr := l.medium.read(ctx)
		if rerr != nil || c.Booted == "" {
			return err
		}
		booted = c.Booted
	}
	if err := l.medium.write(ctx, choice{Default: booted}); err != nil && !errors.Is(err, errRehearsed) {
		return coded(verify.CodeBoot, "change the boot state", err)
	}
	return nil
}

// fileSystems are the magic numbers of statfs(2) that matter here.
var fileSystems = map[int64]string{
	0xef53: "ext4", 0x4d44: "vfat", 0x2011bab0: "exfat", 0x58465342: "xfs", 0x9123683e: "btrfs", 0x2fc12fc1: "zfs",
	0xf2f52010: "f2fs", 0x01021994: "tmpfs", 0x858458f6: "ramfs", 0x794c7630: "overlay", 0x73717368: "squashfs",
	0xe0f5e1e2: "erofs", 0xde5e81e4: "efivarfs", 0x24051905: "ubifs", 0xca451a4e: "bcachefs", 0x6969: "nfs",
}

// FileSystem is what statfs(2) tells of the file system that a path lies on.
type FileSystem struct {
	Type     string // "" when it is not known here
	ReadOnly bool
	Free     int64 // bytes that an unprivileged process may still write
}

// FileSystemOf looks at a path that is there.
func FileSystemOf(path string) (FileSystem, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return FileSystem{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return FileSystem{fileSystems[int64(st.Type)&0xffffffff], st.Flags&unix.ST_RDONLY != 0, int64(st.Bavail) * int64(st.Bsize)}, nil
}

func lookAt(path string) BootPlace {
	fs, err := FileSystemOf(path)
	return BootPlace{path, fs, err}
}

func (g GRUB) places() []string { return []string{g.Env} }

func (u UBoot) places() []string {
	if u.Config == "" {
		u.Config = "/etc/fw_env.config"
	}
	data, err := readSmall(u.Config, maxFwEnvConfig)
	if err != nil {
		return nil
	}
	paths, _ := u.Places(data)
	return paths
}

func (s SystemdBoot) places() []string {
	if s.Dir == "" {
		s.Dir = "/boot"
	}
	return []string{filepath.Join(s.Dir, "loader", "entries")}
}

func (t Tryboot) places() []string {
	if t.File == "" {
		t.File = "/boot/firmware/autoboot.txt"
	}
	return []string{t.File}
}

func (e EFI) places() []string {
	if e.Vars == "" {
		e.Vars = efivars
	}
	return []string{e.Vars}
}

func (c Custom) places() []string { return nil }

// What follows reads settings that are part of an image, before there is a device. Errors are E-BOOT or E-CONFIG.

// Factory says which slot GRUB starts by an environment block as it is in a factory image: settled on one.
func (g GRUB) Factory(block []byte) (SlotName, error) {
	m, err := g.open(loaderEnv{})
	if err != nil {
		return "", err
	}
	env, err := parseGRUBEnv(block)
	if err != nil {
		return "", err
	}
	return settledOn(m.(*grub).decode(env))
}

// Factory says which slot the firmware starts by an autoboot.txt as it is in a factory image.
func (t Tryboot) Factory(file []byte) (SlotName, error) {
	if _, err := t.open(loaderEnv{}); err != nil {
		return "", err
	}
	a, err := parseAutoboot(file)
	if err != nil {
		return "", err
	}
	m := &tryboot{Tryboot: t}
	return settledOn(choice{Default: m.slot(a.all), Trial: m.slot(a.try), Left: 1}, nil)
}

func settledOn(c choice, err error) (SlotName, error) {
	switch {
	case err != nil:
		return "", err
	case c.Default == "":
		return "", verify.Refuse(verify.CodeBoot, "the settings of the bootloader start no slot")
	case c.Trial != "":
		return "", verify.Refuse(verify.CodeBoot, "the settings of the bootloader have slot %s on trial, which a factory image never wrote", c.Trial)
	}
	return c.Default, nil
}

// Places lists the files or devices that a fw_env.config names.
func (u UBoot) Places(config []byte) ([]string, error) {
	places, err := parseFwEnvConfig(config)
	var paths []string
	for _, p := range places {
		if !slices.Contains(paths, p.path) {
			paths = append(paths, p.path)
		}
	}
	return paths, err
}

// CheckTemplate says whether a file can be the template of a loader entry.
func (s SystemdBoot) CheckTemplate(file []byte) error {
	_, err := entryText(file)
	return err
}

// FilesView is what InspectFiles saw of the folder of Files or Containers.
type FilesView struct {
	New   bool // it is not there yet, or empty: it is made when the daemon starts
	Err   error
	Slots map[SlotName]Content
	Free  int64 // bytes, of its file system
}

// InspectFiles looks at the folder and changes nothing.
func InspectFiles(cfg FilesConfig) FilesView {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return FilesView{Err: err}
	}
	f := &folder{cfg: cfg}
	v := FilesView{Slots: map[SlotName]Content{}}
	v.Free, _ = freeBytes(cfg.Dir)
	_, err = f.loadBoot()
	if errors.Is(err, fs.ErrNotExist) {
		v.New, err = true, nil
	}
	if err == nil {
		_, err = f.pointed()
	}
	for _, slot := range []SlotName{SlotA, SlotB} {
		c, found, rerr := f.loadRecord(slot)
		if rerr != nil && err == nil {
			err = rerr
		}
		if found {
			v.Slots[slot] = c
		}
	}
	v.Err = err
	return v
}

// FailedHere finds a release in the list of those that failed in this state folder. Unlike OpenFailures it changes nothing.
func FailedHere(dir string, release verify.Digest) (Failure, bool, error) {
	data, err := readSmall(filepath.Join(dir, "failed.json"), maxFailureFile)
	if errors.Is(err, fs.ErrNotExist) {
		return Failure{}, false, nil
	}
	if err != nil {
		return Failure{}, false, verify.Refuse(verify.CodeIO, "read the failed releases: %w", err)
	}
	list, err := parseFailures(data)
	if err != nil {
		return Failure{}, false, err
	}
	at := slices.IndexFunc(list, func(f Failure) bool { return f.Release == release })
	if at < 0 {
		return Failure{}, false, nil
	}
	return list[at], true, nil
}
