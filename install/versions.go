package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"meshupd/verify"
	"meshupd/verify/durable"
)

// MaxKept is the most that FilesConfig.Keep may be.
const MaxKept = 8

// versions keeps older versions beside the two slots of Files, by hard links, so that setting one aside costs no copy:
//
//	DIR/images.a.json                     what slot a was written with, for the digests; .b as well
//	DIR/versions/2.3.2-1a2b3c4d/          the images of a kept version, under their names
//	DIR/versions/2.3.2-1a2b3c4d.json      written last and removed first: with it the version is whole
//
// What is there and has no such file is what a cut left, and goes at the next start.
type versions struct {
	dir  string // DIR/versions
	keep int
	step func(name string, do func() error) error

	mu   sync.Mutex    // owns the folder, and:
	list []keptVersion // oldest first
}

// keptVersion is a release that was in a slot.
type keptVersion struct {
	Content Content     `json:"content"`
	Number  uint64      `json:"number"` // rises with each that is kept
	Images  []keptImage `json:"images"`
}

// keptImage is what was signed of one image.
type keptImage struct {
	Name    string        `json:"name"`
	Image   verify.Digest `json:"image"` // as it was distributed; recalls name it
	Size    int64         `json:"size"`  // of the content
	Content verify.Digest `json:"content"`
}

func (k keptImage) signed() verify.Image {
	return verify.Image{Name: k.Name, SHA256: k.Image, Content: verify.Content{Size: k.Size, SHA256: k.Content}}
}

const (
	versionSchema = "meshupd.version/1"
	maxKeptRecord = 128 << 10
)

// parseKept reads what keeps a version, or says with what a slot was written.
func parseKept(data []byte) (keptVersion, error) {
	var v keptVersion
	if err := unseal(data, versionSchema, maxKeptRecord, &v); err != nil {
		return keptVersion{}, err
	}
	if v.Content.Release.IsZero() || !v.Content.Whole || len(v.Content.Version) > maxVersion || len(v.Images) == 0 || len(v.Images) > maxImages {
		return keptVersion{}, verify.Refuse(verify.CodeFormat, "read a kept version: it is no whole release")
	}
	seen := make(map[string]bool)
	for _, img := range v.Images {
		if !plainName(img.Name) || seen[img.Name] || img.Size < 0 || img.Size > maxContent {
			return keptVersion{}, verify.Refuse(verify.CodeFormat, "read a kept version: an image has the name %.64q", img.Name)
		}
		seen[img.Name] = true
	}
	return v, nil
}

// name is what a person finds the version by. It is a file name, whatever the version is.
func (v keptVersion) name() string {
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(".+-_", r) {
			return r
		}
		return '_'
	}, printable(v.Content.Version, 64))
	return strings.TrimLeft(plain, ".") + "-" + v.Content.Release.String()[:8]
}

func (s *versions) record(v keptVersion) string { return filepath.Join(s.dir, v.name()+".json") }
func (s *versions) tree(v keptVersion) string   { return filepath.Join(s.dir, v.name()) }

// open reads what is kept, removes what is not whole, and what is beyond keep. Keeping needs hard links: E-CONFIG.
func (s *versions) open() error {
	if s.keep == 0 {
		return os.RemoveAll(s.dir)
	}
	if err := durable.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	whole := make(map[string]bool)
	for _, e := range entries {
		if v, ok := s.believe(e.Name()); ok {
			s.list = append(s.list, v)
			whole[v.name()], whole[v.name()+".json"] = true, true
		}
	}
	for _, e := range entries {
		if !whole[e.Name()] {
			if err := os.RemoveAll(filepath.Join(s.dir, e.Name())); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(s.list, func(a, b keptVersion) int { return compareUint(a.Number, b.Number) })
	for len(s.list) > s.keep {
		if err := s.drop(s.list[0]); err != nil {
			return err
		}
	}
	return s.probe()
}

func compareUint(a, b uint64) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// believe reads a record and looks whether its images are there.
func (s *versions) believe(file string) (keptVersion, bool) {
	data, err := readSmall(filepath.Join(s.dir, file), maxKeptRecord)
	if err != nil {
		return keptVersion{}, false
	}
	v, err := parseKept(data)
	if err != nil || v.name()+".json" != file {
		return keptVersion{}, false
	}
	for _, img := range v.Images {
		if info, err := os.Lstat(filepath.Join(s.tree(v), img.Name)); err != nil || !info.Mode().IsRegular() || info.Size() != img.Size {
			return keptVersion{}, false
		}
	}
	return v, true
}

// probe makes a hard link: FAT and exFAT have none.
func (s *versions) probe() error {
	one, two := filepath.Join(s.dir, ".probe"), filepath.Join(s.dir, ".probe.link")
	defer os.Remove(one)
	defer os.Remove(two)
	if err := os.WriteFile(one, nil, 0o600); err != nil {
		return err
	}
	if err := os.Link(one, two); err != nil {
		return verify.Refuse(verify.CodeConfig, "keep older versions: %w", err)
	}
	return nil
}

// drop forgets a version. The caller holds mu, or is the only one yet.
func (s *versions) drop(v keptVersion) error {
	err := s.step("version.drop", func() error {
		if err := durable.Remove(s.record(v)); err != nil {
			return err
		}
		if err := os.RemoveAll(s.tree(v)); err != nil {
			return err
		}
		return durable.SyncDir(s.dir)
	})
	if err != nil {
		return err
	}
	s.list = slices.DeleteFunc(s.list, func(other keptVersion) bool { return other.Content.Release == v.Content.Release })
	return nil
}

// frees is how many bytes come free without the version: a file with another name elsewhere frees nothing.
func (s *versions) frees(v keptVersion) (bytes int64) {
	for _, img := range v.Images {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(s.tree(v), img.Name), &st) == nil && st.Nlink == 1 {
			bytes += int64(st.Blocks) * 512
		}
	}
	return bytes
}

// link keeps what lies at the paths of the images: links, then their folder's name, then the record.
func (s *versions) link(v keptVersion, path func(verify.Image) string) error {
	for _, old := range s.list {
		v.Number = max(v.Number, old.Number+1)
	}
	tmp := filepath.Join(s.dir, ".new")
	err := s.step("version.link", func() error {
		for _, stale := range []string{tmp, s.tree(v)} {
			if err := os.RemoveAll(stale); err != nil {
				return err
			}
		}
		if err := os.Mkdir(tmp, 0o755); err != nil {
			return err
		}
		for _, img := range v.Images {
			if err := os.Link(path(img.signed()), filepath.Join(tmp, img.Name)); err != nil {
				return err
			}
		}
		if err := durable.SyncDir(tmp); err != nil {
			return err
		}
		return durable.Rename(tmp, s.tree(v))
	})
	if err != nil {
		return err
	}
	data, err := seal(versionSchema, v)
	if err != nil {
		return err
	}
	if err := s.step("version.save", func() error { return durable.WriteFile(s.record(v), data, 0o644) }); err != nil {
		return err
	}
	s.list = append(s.list, v)
	return nil
}

// kept lists what can be gone back to, the newest first.
func (f *folder) kept() []Content {
	f.versions.mu.Lock()
	defer f.versions.mu.Unlock()
	var out []Content
	for _, v := range slices.Backward(f.versions.list) {
		out = append(out, v.Content)
	}
	return out
}

func (f *folder) imagesPath(slot SlotName) string {
	return filepath.Join(f.cfg.Dir, "images."+string(slot)+".json")
}

// noteImages notes what a slot is being written with, before its record.
func (f *folder) noteImages(slot SlotName, c Content, images []verify.Image) error {
	if f.cfg.Keep == 0 {
		return nil
	}
	v := keptVersion{Content: c}
	for _, img := range images {
		v.Images = append(v.Images, keptImage{img.Name, img.SHA256, img.Content.Size, img.Content.SHA256})
	}
	data, err := seal(versionSchema, v)
	if err != nil {
		return err
	}
	err = f.cfg.step("version.note", func() error { return durable.WriteFile(f.imagesPath(slot), data, 0o644) })
	return mediumError(err, "note the images of slot "+string(slot), recordSpace)
}

// keepable is what a slot holds if that can be kept: a release whose digests are known, with its files as they were named.
// What the factory put there has no signed digest to be checked against when it comes back.
func (f *folder) keepable(slot SlotName, instead verify.Digest) (keptVersion, bool) {
	c, found, err := f.loadRecord(slot)
	if err != nil || !found || !c.Whole || c.Release == instead || f.cfg.Keep == 0 {
		return keptVersion{}, false
	}
	data, err := readSmall(f.imagesPath(slot), maxKeptRecord)
	if err != nil {
		return keptVersion{}, false
	}
	v, err := parseKept(data)
	if err != nil || v.Content != c {
		return keptVersion{}, false
	}
	for _, img := range v.Images {
		if info, err := os.Lstat(f.imagePath(slot, img.signed())); err != nil || !info.Mode().IsRegular() || info.Size() != img.Size {
			return keptVersion{}, false
		}
	}
	return v, !slices.ContainsFunc(f.versions.list, func(old keptVersion) bool { return old.Content.Release == c.Release })
}

// setAside keeps what a slot holds before it is overwritten with instead, which needs so many bytes, and drops the oldest
// beyond Keep. An update outranks the versions that are kept for a person: when space is short they go, the oldest first.
func (f *folder) setAside(slot SlotName, instead verify.Digest, need int64) error {
	s := &f.versions
	if s.keep == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, keep := f.keepable(slot, instead)
	free, held, err := f.slotRoom(slot)
	if err != nil {
		return err
	}
	old := slices.DeleteFunc(slices.Clone(s.list), func(v keptVersion) bool { return v.Content.Release == instead })
	count := len(old)
	if keep {
		count++
	} else {
		free += held
	}
	for len(old) > 0 && (count > f.cfg.Keep || need > free) {
		free += s.frees(old[0])
		if err := s.drop(old[0]); err != nil {
			return mediumError(err, "drop the oldest version", recordSpace)
		}
		old, count = old[1:], count-1
	}
	if !keep || need > free || count > f.cfg.Keep {
		return nil
	}
	err = s.link(v, func(img verify.Image) string { return f.imagePath(slot, img) })
	return mediumError(err, "keep version "+v.Content.Version, recordSpace)
}

// Kept lists the versions beside the slots that Restore can bring back, the newest first.
func (f *Files) Kept() []Content { return f.keep.kept() }

// Restore fills the idle slot with a kept version, in the place of Write. It is compared with what was signed first. What
// the slot held is kept in its turn. E-NOT-FOUND when the release is not kept; E-SLOT, and it is kept no longer, when it reads
// back other bytes.
func (f *Files) Restore(ctx context.Context, release verify.Digest) error {
	slot, err := f.beginWrite(ctx)
	if err != nil {
		return err
	}
	defer f.endWrite()
	v, err := f.keep.proven(ctx, slot, release)
	if err != nil {
		return err
	}
	if err := f.keep.setAside(slot, release, recordSpace); err != nil {
		return err
	}
	if err := f.keep.removeRecord(slot); err != nil {
		return err
	}
	if err := f.keep.clear(ctx, slot, nil); err != nil {
		return err
	}
	images := make([]verify.Image, 0, len(v.Images))
	for _, img := range v.Images {
		images = append(images, img.signed())
	}
	if err := f.keep.bringBack(slot, v, images); err != nil {
		return err
	}
	if err := f.keep.noteImages(slot, v.Content, images); err != nil {
		return err
	}
	if err := f.keep.saveRecord(slot, v.Content); err != nil {
		return err
	}
	f.keep.versions.mu.Lock()
	defer f.keep.versions.mu.Unlock()
	return mediumError(f.keep.versions.drop(v), "move version "+v.Content.Version, recordSpace)
}

// proven finds a kept version and reads it back.
func (f *folder) proven(ctx context.Context, slot SlotName, release verify.Digest) (keptVersion, error) {
	s := &f.versions
	s.mu.Lock()
	i := slices.IndexFunc(s.list, func(v keptVersion) bool { return v.Content.Release == release })
	if i < 0 {
		s.mu.Unlock()
		return keptVersion{}, verify.Refuse(verify.CodeNotFound, "release %s is not kept here", release)
	}
	v := s.list[i]
	s.mu.Unlock()
	for _, img := range v.Images {
		file, err := os.OpenFile(filepath.Join(s.tree(v), img.Name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err == nil {
			_ = unix.Fadvise(int(file.Fd()), 0, 0, unix.FADV_DONTNEED) // as check
			err = readBack(ctx, file, slot, img.signed(), func() {})   // a person waits, not the loop
		}
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return v, ctx.Err()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return v, errors.Join(verify.Refuse(verify.CodeSlot, "version %s is kept and is not what was signed any more: %w", v.Content.Version, err), s.drop(v))
	}
	return v, nil
}

func (f *folder) bringBack(slot SlotName, v keptVersion, images []verify.Image) error {
	err := f.cfg.step("version.restore", func() error {
		for _, img := range images {
			if err := os.Link(filepath.Join(f.versions.tree(v), img.Name), f.imagePath(slot, img)); err != nil {
				return err
			}
		}
		return durable.SyncDir(filepath.Dir(f.imagePath(slot, images[0])))
	})
	return mediumError(err, fmt.Sprintf("bring version %s back", v.Content.Version), recordSpace)
}

// Forsake drops the kept versions that a publisher withdrew: those that one of the digests names, as a manifest or an image.
func (f *Files) Forsake(recalls []verify.Digest) error {
	s := &f.keep.versions
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, v := range slices.Clone(s.list) {
		named := slices.Contains(recalls, v.Content.Release) ||
			slices.ContainsFunc(v.Images, func(img keptImage) bool { return slices.Contains(recalls, img.Image) })
		if named {
			errs = append(errs, mediumError(s.drop(v), "drop a withdrawn version", recordSpace))
		}
	}
	return errors.Join(errs...)
}

// removeStale is for a device that keeps no versions any more.
func (f *folder) removeStale() error {
	if f.cfg.Keep > 0 {
		return nil
	}
	for _, slot := range []SlotName{SlotA, SlotB} {
		if err := os.Remove(f.imagesPath(slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
