package install

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// folder keeps records, pointer and slots of Files below one folder.
type folder struct {
	cfg      FilesConfig
	versions versions
}

var (
	_ bootStore   = (*folder)(nil)
	_ recordStore = (*folder)(nil)
	_ cells       = (*folder)(nil)
)

const (
	recordSchema = "meshupd.slot/1"
	maxRecord    = 4 << 10
	maxVersion   = 256
)

// parseRecord reads a slot record.
func parseRecord(data []byte) (Content, error) {
	var c Content
	if err := unseal(data, recordSchema, maxRecord, &c); err != nil {
		return Content{}, err
	}
	if len(c.Version) > maxVersion {
		return Content{}, verify.Refuse(verify.CodeFormat, "read a slot record: the version is too long")
	}
	return c, nil
}

// element is the name of a slot's folder or image file.
func (f *folder) element(slot SlotName) string {
	if f.cfg.Layout == LayoutImage {
		return string(slot) + ".img"
	}
	return string(slot)
}

func (f *folder) path(slot SlotName) string { return filepath.Join(f.cfg.Dir, f.element(slot)) }

func (f *folder) imagePath(slot SlotName, img verify.Image) string {
	if f.cfg.Layout == LayoutImage {
		return f.path(slot)
	}
	return filepath.Join(f.path(slot), img.Name)
}

func (f *folder) loadBoot() (bootRecord, error) {
	data, err := readSmall(filepath.Join(f.cfg.Dir, "boot.json"), maxBoot)
	if err != nil {
		return bootRecord{}, verify.Refuse(verify.CodeBoot, "read the boot state: %w", err)
	}
	return parseBoot(data)
}

func (f *folder) saveBoot(r bootRecord) error {
	data, err := seal(bootSchema, r)
	if err != nil {
		return err
	}
	err = f.cfg.step("boot.save", func() error {
		return durable.WriteFile(filepath.Join(f.cfg.Dir, "boot.json"), data, 0o644)
	})
	return coded(verify.CodeBoot, "save the boot state", err)
}

// pointed returns "" when there is no pointer.
func (f *folder) pointed() (SlotName, error) {
	target, err := os.Readlink(filepath.Join(f.cfg.Dir, "current"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", verify.Refuse(verify.CodeBoot, "read the boot pointer: %w", err)
	}
	for _, slot := range []SlotName{SlotA, SlotB} {
		if target == f.element(slot) {
			return slot, nil
		}
	}
	return "", verify.Refuse(verify.CodeBoot, "read the boot pointer: it names %.80q, which is no slot", target)
}

func (f *folder) point(slot SlotName) error {
	err := f.cfg.step("boot.point", func() error {
		return durable.Symlink(f.element(slot), filepath.Join(f.cfg.Dir, "current"))
	})
	return coded(verify.CodeBoot, "switch the boot pointer", err)
}

func (f *folder) recordPath(slot SlotName) string {
	return filepath.Join(f.cfg.Dir, "slot."+string(slot)+".json")
}

func (f *folder) loadRecord(slot SlotName) (Content, bool, error) {
	data, err := readSmall(f.recordPath(slot), maxRecord)
	if errors.Is(err, fs.ErrNotExist) {
		return Content{}, false, nil
	}
	if err != nil {
		return Content{}, false, verify.Refuse(verify.CodeSlot, "read the record of slot %s: %w", slot, err)
	}
	c, err := parseRecord(data)
	if err != nil {
		// A damaged record is no record; the next Write heals the slot, an error here would keep it from that.
		return Content{}, true, nil
	}
	return c, true, nil
}

func (f *folder) saveRecord(slot SlotName, c Content) error {
	data, err := seal(recordSchema, c)
	if err != nil {
		return err
	}
	err = f.cfg.step("record.save", func() error { return durable.WriteFile(f.recordPath(slot), data, 0o644) })
	return mediumError(err, "save the record of slot "+string(slot), recordSpace)
}

func (f *folder) removeRecord(slot SlotName) error {
	err := f.cfg.step("record.remove", func() error {
		if err := durable.Remove(f.recordPath(slot)); err != nil {
			return err
		}
		// Removed by a run that was cut before it synced: what is written next must not meet the old record again.
		return durable.SyncDir(f.cfg.Dir)
	})
	return mediumError(err, "remove the record of slot "+string(slot), recordSpace)
}

func (f *folder) fits(images []verify.Image) error {
	if f.cfg.Layout == LayoutImage && len(images) != 1 {
		return verify.Refuse(verify.CodeFormat, "write a slot: %d images for a slot that is one image file", len(images))
	}
	return noContainer(images)
}

// room counts the kept versions as free: an update outranks them.
func (f *folder) room(slot SlotName) (free, held int64, err error) {
	free, held, err = f.slotRoom(slot)
	f.versions.mu.Lock()
	defer f.versions.mu.Unlock()
	for _, v := range f.versions.list {
		held += f.versions.frees(v)
	}
	return free, held, err
}

func (f *folder) slotRoom(slot SlotName) (free, held int64, err error) {
	if free, err = f.cfg.free(f.cfg.Dir); err != nil {
		return 0, 0, verify.Refuse(verify.CodeSlot, "look for free space: %w", err)
	}
	err = filepath.WalkDir(f.path(slot), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		// A file with a second name elsewhere frees nothing.
		if st.Nlink == 1 {
			held += int64(st.Blocks) * 512
		}
		return nil
	})
	if err != nil {
		return 0, 0, verify.Refuse(verify.CodeSlot, "look at slot %s: %w", slot, err)
	}
	return free, held, nil
}

func (f *folder) clear(_ context.Context, slot SlotName, keep []verify.Image) error {
	err := f.cfg.step("slot.clear", func() error {
		if f.cfg.Layout == LayoutImage {
			if len(keep) > 0 {
				return nil
			}
			return durable.Remove(f.path(slot))
		}
		return clearFolder(f.path(slot), imageNames(keep))
	})
	return mediumError(err, "clear slot "+string(slot), recordSpace)
}

func clearFolder(dir string, keep map[string]bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep[e.Name()] && e.Type().IsRegular() {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return durable.SyncDir(dir)
}

func (f *folder) put(_ context.Context, slot SlotName, img verify.Image, fill func(io.Writer) error) error {
	what := "write image " + img.Name + " to slot " + string(slot)
	file, err := durable.Create(f.imagePath(slot, img), 0o644)
	if err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	defer file.Abort()
	if err := f.cfg.step("image.fill", func() error { return fill(file) }); err != nil {
		return mediumError(err, what, img.Content.Size)
	}
	return mediumError(f.cfg.step("image.commit", file.Commit), what, img.Content.Size)
}

func (f *folder) check(ctx context.Context, slot SlotName, img verify.Image, further func()) error {
	var file *os.File
	err := f.cfg.step("image.open", func() (err error) {
		file, err = os.OpenFile(f.imagePath(slot, img), os.O_RDONLY|unix.O_NOFOLLOW, 0)
		return err
	})
	if err != nil {
		if file != nil {
			file.Close()
		}
		return mediumError(err, "read image "+img.Name+" back", 0)
	}
	// The pages are clean since Commit, so this makes the kernel read them from the medium. A file system that
	// knows no page cache may refuse, and needs no asking.
	_ = unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED)
	return readBack(ctx, file, slot, img, further)
}

// coded gives err a code unless it has one.
func coded(code verify.Code, what string, err error) error {
	if err == nil || verify.CodeOf(err) != "" {
		return err
	}
	return verify.Refuse(code, "%s: %w", what, err)
}

// readSmall reads a file of at most limit bytes, and one more so that a parser sees that it is too large.
func readSmall(path string, limit int64) ([]byte, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, limit+1))
}

// freeBytes tells what an unprivileged process may still write (statfs(2), f_bavail).
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}
