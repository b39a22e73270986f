package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"

	"meshupd/verify"
)

// SystemdBoot is a bootloader that reads boot loader entries and counts starts in their names (the Boot Loader
// Specification and Automatic Boot Assessment of systemd; also GRUB with blscfg of distributions that count).
//
//	PREFIX-000007-a.conf       the default
//	PREFIX-000008-b+3.conf     on trial, three starts left; systemd-boot renames it to b+2-1 and so on, before it boots it
//	PREFIX-000008-b+0-3.conf   used up: sorted behind all that are not
//
// The number grows with each trial, and of entries that are not used up systemd-boot takes the highest version by itself. So
// nothing else has to be switched: not loader.conf, and no EFI variable. Confirm makes a newer entry without a counter, and
// then removes the others; systemd-bless-boot renames, and so can lose the entry on FAT (see createFresh). No entry is ever
// renamed or overwritten here. A trial that is given up has its entry removed: an entry that is only marked bad (+0) would
// still be taken when the other cannot be read. systemd-bless-boot.service must be masked: it would bless a trial before the
// health check did.
type SystemdBoot struct {
	// Dir is the partition with loader/entries: the ESP or XBOOTLDR, mounted; /boot when empty.
	Dir string
	// Templates are the entries for slot a and b, as files beside the configuration: title, linux or efi, options. Lines with
	// sort-key, version and machine-id are left out of the entries: they would change the order.
	Templates struct{ A, B string }
	// Prefix of the entries' names; "meshupd" when empty.
	Prefix string
	// EFIVars is where EFI variables are; /sys/firmware/efi/efivars when empty. Only LoaderEntryDefault is looked at.
	EFIVars string
}

const (
	maxEntry     = 64 << 10
	maxEntries   = 1000
	maxLoaderVar = 4 << 10
	loaderGUID   = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f" // of systemd's loader variables
)

func (s SystemdBoot) open(env loaderEnv) (medium, error) {
	if s.Dir == "" {
		s.Dir = "/boot"
	}
	if s.Prefix == "" {
		s.Prefix = "meshupd"
	}
	if s.EFIVars == "" {
		s.EFIVars = efivars
	}
	if !plainName(s.Prefix) || strings.ContainsAny(s.Prefix, "+-") {
		return nil, verify.Refuse(verify.CodeConfig, "the prefix of the loader entries is %.40q, not letters, digits, '_' and '.'", s.Prefix)
	}
	m := &systemdBoot{SystemdBoot: s, step: env.step, texts: make(map[SlotName][]byte)}
	for slot, file := range map[SlotName]string{SlotA: s.Templates.A, SlotB: s.Templates.B} {
		text, err := readSmall(file, maxEntry)
		if err != nil {
			return nil, verify.Refuse(verify.CodeConfig, "read the loader entry of slot %s: %w", slot, err)
		}
		if m.texts[slot], err = entryText(text); err != nil {
			return nil, err
		}
	}
	if err := m.checkDefaults(); err != nil {
		return nil, err
	}
	return m, nil
}

// entryText is the template without what changes the order. Errors are E-CONFIG.
func entryText(template []byte) ([]byte, error) {
	var out bytes.Buffer
	boots := false
	for line := range strings.Lines(string(template)) {
		key, _, _ := strings.Cut(strings.ReplaceAll(strings.TrimSpace(line), "\t", " "), " ")
		switch key {
		case "sort-key", "version", "machine-id":
			continue
		case "linux", "efi", "uki":
			boots = true
		}
		out.WriteString(strings.TrimRight(line, "\r\n") + "\n")
	}
	if len(template) > maxEntry || !boots {
		return nil, verify.Refuse(verify.CodeConfig, "read a loader entry: it has no line that names a kernel")
	}
	return out.Bytes(), nil
}

type systemdBoot struct {
	SystemdBoot
	texts map[SlotName][]byte
	step  func(name string, do func() error) error
}

// checkDefaults refuses with E-CONFIG a default that would be taken instead of the newest entry.
func (s *systemdBoot) checkDefaults() error {
	conf, err := readSmall(filepath.Join(s.Dir, "loader", "loader.conf"), maxEntry)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return verify.Refuse(verify.CodeConfig, "read loader.conf: %w", err)
	}
	for line := range strings.Lines(string(conf)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "default" && !s.takesNewest(f[1]) {
			return verify.Refuse(verify.CodeConfig, "loader.conf has the default %.80q, which is not %q: trials would not be started", f[1], s.Prefix+"-*")
		}
	}
	raw, err := readSmall(filepath.Join(s.EFIVars, "LoaderEntryDefault-"+loaderGUID), maxLoaderVar)
	if err != nil {
		return nil // no such variable, or no EFI here at all
	}
	if name := efiString(raw[min(4, len(raw)):]); name != "" && !s.takesNewest(name) {
		return verify.Refuse(verify.CodeConfig, "the EFI variable LoaderEntryDefault is %.80q, which is not %q: trials would not be started", name, s.Prefix+"-*")
	}
	return nil
}

// takesNewest reports whether a default's pattern leaves the choice among our entries open.
func (s *systemdBoot) takesNewest(pattern string) bool {
	for _, name := range []string{"-000001-a.conf", "-000002-b.conf", "-999999-a.conf"} {
		if ok, err := path.Match(pattern, s.Prefix+name); err != nil || !ok {
			return false
		}
	}
	return true
}

// efiString reads UTF-16 up to a NUL.
func efiString(data []byte) string {
	var text []uint16
	for i := 0; i+1 < len(data); i += 2 {
		c := uint16(data[i]) | uint16(data[i+1])<<8
		if c == 0 {
			break
		}
		text = append(text, c)
	}
	return string(utf16.Decode(text))
}

// entry is the name of one of our entries.
type entry struct {
	gen     int
	slot    SlotName
	counted bool
	left    int
	done    int
}

// found is an entry on the medium.
type found struct {
	entry
	sound bool // systemd-boot would boot its slot by it
}

const maxGeneration = 999999

// parseEntry reads a file name; false if it is none of ours.
func parseEntry(prefix, name string) (entry, bool) {
	rest, ok := strings.CutPrefix(name, prefix+"-")
	rest, conf := strings.CutSuffix(rest, ".conf")
	if !ok || !conf || len(rest) < 8 || rest[6] != '-' {
		return entry{}, false
	}
	gen, ok := counter(rest[:6])
	e := entry{gen: gen, slot: SlotName(rest[7:8])}
	if !ok || !e.slot.valid() {
		return entry{}, false
	}
	count := rest[8:]
	if count == "" {
		return e, true
	}
	left, done, twice := strings.Cut(strings.TrimPrefix(count, "+"), "-")
	e.counted = true
	if e.left, ok = counter(left); !ok || count[0] != '+' {
		return entry{}, false
	}
	if twice {
		if e.done, ok = counter(done); !ok {
			return entry{}, false
		}
	}
	return e, true
}

// counter reads up to six decimal digits.
func counter(s string) (int, bool) {
	if s == "" || len(s) > 6 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.Atoi(s)
	return n, err == nil
}

func (e entry) name(prefix string) string {
	count := ""
	switch {
	case e.counted && e.done > 0:
		count = fmt.Sprintf("+%d-%d", e.left, e.done)
	case e.counted:
		count = fmt.Sprintf("+%d", e.left)
	}
	return fmt.Sprintf("%s-%06d-%s%s.conf", prefix, e.gen, e.slot, count)
}

func (s *systemdBoot) most() int { return maxStarts }

func (s *systemdBoot) dir() string { return filepath.Join(s.Dir, "loader", "entries") }

// list returns our entries, the newest first.
func (s *systemdBoot) list() ([]found, error) {
	files, err := os.ReadDir(s.dir())
	if err != nil {
		return nil, verify.Refuse(verify.CodeBoot, "read the loader entries: %w", err)
	}
	if len(files) > maxEntries {
		return nil, verify.Refuse(verify.CodeBoot, "read the loader entries: more than %d files", maxEntries)
	}
	var all []found
	for _, f := range files {
		if e, ok := parseEntry(s.Prefix, f.Name()); ok && f.Type().IsRegular() {
			all = append(all, found{e, s.sound(e)})
		}
	}
	slices.SortFunc(all, func(a, b found) int { return b.gen - a.gen })
	return all, nil
}

// sound is false for what a cut has left of an entry: nothing, or what lay there before. An entry with another text than the
// template's is sound: templates change.
func (s *systemdBoot) sound(e entry) bool {
	text, err := readSmall(filepath.Join(s.dir(), e.name(s.Prefix)), maxEntry)
	if err != nil || bytes.Equal(text, s.texts[e.slot.Other()]) && !bytes.Equal(text, s.texts[e.slot]) {
		return false
	}
	_, err = entryText(text)
	return err == nil
}

func (s *systemdBoot) read(context.Context) (choice, error) {
	all, err := s.list()
	if err != nil {
		return choice{}, err
	}
	return entriesSay(all)
}

// entriesSay reads the choice from the sound entries, the newest first. Errors are E-BOOT.
func entriesSay(listed []found) (choice, error) {
	all := slices.DeleteFunc(slices.Clone(listed), func(e found) bool { return !e.sound })
	good := slices.IndexFunc(all, func(e found) bool { return !e.counted })
	if good < 0 {
		return choice{}, verify.Refuse(verify.CodeBoot, "read the loader entries: none is known to be good")
	}
	c := choice{Default: all[good].slot}
	if good > 0 && all[0].slot != c.Default {
		c.Trial, c.Left = all[0].slot, min(all[0].left, maxStarts)
	}
	return c, nil
}

// write makes the entry that is to win first, and removes the others after: at every moment an entry is left that boots.
func (s *systemdBoot) write(_ context.Context, c choice) error {
	all, err := s.list()
	if err != nil {
		return err
	}
	if now, err := entriesSay(all); err == nil && now.same(c) && s.tidy(all, c) {
		return nil
	}
	keep, err := s.defaultEntry(all, c)
	if err != nil {
		return err
	}
	wanted := []entry{keep}
	if c.Trial != "" {
		trial := entry{gen: max(newest(all), keep.gen) + 1, slot: c.Trial, counted: true, left: c.Left}
		if err := s.put(trial); err != nil {
			return err
		}
		wanted = append(wanted, trial)
	}
	for _, e := range all {
		if slices.Contains(wanted, e.entry) {
			continue
		}
		if err := s.remove(e.entry); err != nil {
			return err
		}
	}
	return s.readBack(c)
}

// tidy reports whether the entries are just those of the choice, each with its text.
func (s *systemdBoot) tidy(all []found, c choice) bool {
	n := 1
	if c.Trial != "" {
		n++
	}
	return len(all) == n && !slices.ContainsFunc(all, func(e found) bool { return !s.holds(e.entry) })
}

func (s *systemdBoot) holds(e entry) bool {
	text, err := readSmall(filepath.Join(s.dir(), e.name(s.Prefix)), maxEntry)
	return err == nil && bytes.Equal(text, s.texts[e.slot])
}

// newest is the highest number of the entries.
func newest(all []found) (gen int) {
	for _, e := range all {
		gen = max(gen, e.gen)
	}
	return gen
}

// defaultEntry returns the entry of the default slot, without a counter: one that is there, or a new one.
func (s *systemdBoot) defaultEntry(all []found, c choice) (entry, error) {
	for _, e := range all {
		if e.slot == c.Default && !e.counted && s.holds(e.entry) {
			return e.entry, nil
		}
	}
	e := entry{gen: newest(all) + 1, slot: c.Default}
	return e, s.put(e)
}

func (s *systemdBoot) put(e entry) error {
	if e.gen > maxGeneration {
		return verify.Refuse(verify.CodeBoot, "write a loader entry: %d trials are more than its name can count", e.gen)
	}
	err := s.step("entry.put", func() error {
		return createFresh(filepath.Join(s.dir(), e.name(s.Prefix)), s.texts[e.slot])
	})
	return coded(verify.CodeBoot, "write a loader entry", err)
}

func (s *systemdBoot) remove(e entry) error {
	err := s.step("entry.remove", func() error { return removeFresh(filepath.Join(s.dir(), e.name(s.Prefix))) })
	return coded(verify.CodeBoot, "remove a loader entry", err)
}

func (s *systemdBoot) readBack(c choice) error {
	all, err := s.list()
	if err != nil {
		return err
	}
	if now, err := entriesSay(all); err != nil || !now.same(c) || !s.tidy(all, c) {
		return verify.Refuse(verify.CodeBoot, "the loader entries read back otherwise than they were written")
	}
	return nil
}
