package install_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// Slots that keep older versions are slots: a fault at every link, record and removal included.
func TestFilesThatKeep(t *testing.T) {
	for layout, images := range map[install.Layout]int{install.LayoutFolder: 2, install.LayoutImage: 1} {
		t.Run(string(layout), func(t *testing.T) {
			if testing.Short() && layout == install.LayoutImage {
				t.Skip("one layout is enough for the short run")
			}
			slotstest.Run(t, func(t *testing.T) slotstest.Harness {
				return filesHarnessWith(t, layout, images, func(cfg install.FilesConfig) install.FilesConfig { cfg.Keep = 1; return cfg })
			})
		})
	}
}

// shop is a device that keeps versions, with the vendor of them.
type shop struct {
	dir    string
	cfg    install.FilesConfig
	vendor *verifytest.Vendor
	images map[verify.Digest][]byte // by release
	rels   map[string]*verify.Release
}

func newShop(t *testing.T, layout install.Layout, keep int) *shop {
	s := &shop{dir: t.TempDir(), vendor: verifytest.NewVendor(t, "shop"), images: map[verify.Digest][]byte{}, rels: map[string]*verify.Release{}}
	s.cfg = filesConfig(s.dir, layout, 1)
	s.cfg.Keep = keep
	return s
}

func (s *shop) open(t *testing.T) *install.Files {
	t.Helper()
	f, err := install.OpenFiles(s.cfg)
	must(t, "open", err)
	must(t, "start", f.Start(t.Context()))
	return f
}

func (s *shop) write(t *testing.T, f *install.Files, version string) error {
	t.Helper()
	rel := s.rels[version]
	if rel == nil {
		r, data := s.vendor.Verified(t, verifytest.Opts{Version: version, Seed: uint64(version[0]), Size: 60_000})
		rel, s.rels[version], s.images[r.ID()] = r, r, data
	}
	data := s.images[rel.ID()]
	return f.Write(t.Context(), rel, rel.Manifest().Images, func(verify.Image) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, nil)
}

// run makes the idle slot the one that runs.
func run(t *testing.T, f *install.Files) {
	t.Helper()
	st := stateOf(t, f)
	must(t, "try", f.Try(t.Context(), st.Default.Other()))
	must(t, "restart", f.Restart(t.Context()))
	must(t, "confirm", f.Confirm(t.Context()))
}

func (s *shop) update(t *testing.T, f *install.Files, version string) {
	t.Helper()
	must(t, "write "+version, s.write(t, f, version))
	run(t, f)
}

func kept(t *testing.T, f *install.Files) []string {
	t.Helper()
	var out []string
	for _, c := range stateOf(t, f).Kept {
		out = append(out, c.Version)
	}
	return out
}

// holds compares what is in the running slot with what was signed.
func (s *shop) wantRunning(t *testing.T, f *install.Files, version string) {
	t.Helper()
	path := filepath.Join(s.dir, "current")
	if s.cfg.Layout != install.LayoutImage {
		path = filepath.Join(path, s.rels[version].Manifest().Images[0].Name)
	}
	data, err := os.ReadFile(path)
	if st := stateOf(t, f); err != nil || !bytes.Equal(data, s.images[s.rels[version].ID()]) || st.Slots[st.Booted].Version != version {
		t.Fatalf("version %s does not run: %+v, %v", version, st, err)
	}
}

func TestOlderVersionsAreKept(t *testing.T) {
	for _, layout := range []install.Layout{install.LayoutFolder, install.LayoutImage} {
		t.Run(string(layout), func(t *testing.T) {
			s := newShop(t, layout, 2)
			f := s.open(t)
			// The factory's content is not kept: 2.0.0 goes to b, 3.0.0 in the factory's place.
			for _, c := range []struct {
				version string
				want    []string
			}{
				{"2.0.0", nil}, {"3.0.0", nil}, {"4.0.0", []string{"2.0.0"}}, {"5.0.0", []string{"3.0.0", "2.0.0"}}, {"6.0.0", []string{"4.0.0", "3.0.0"}},
			} {
				s.update(t, f, c.version)
				if got := kept(t, f); !slices.Equal(got, c.want) {
					t.Fatalf("with %s %q are kept, want %q", c.version, got, c.want)
				}
			}
			f = s.open(t)
			if got := kept(t, f); !slices.Equal(got, []string{"4.0.0", "3.0.0"}) {
				t.Fatalf("after a restart %q are kept", got)
			}

			// Back to the oldest: what it replaces is kept in its turn, and it is no longer beside the slots.
			must(t, "restore", f.Restore(t.Context(), s.rels["3.0.0"].ID()))
			run(t, f)
			s.wantRunning(t, f, "3.0.0")
			if got := kept(t, f); !slices.Equal(got, []string{"5.0.0", "4.0.0"}) {
				t.Fatalf("after going back %q are kept", got)
			}
			wantCode(t, "restore what is not kept", f.Restore(t.Context(), s.rels["2.0.0"].ID()), verify.CodeNotFound)

			// An application that changed its files spoils nobody's trust: the version is not brought back, and dropped.
			path := filepath.Join(s.dir, "versions", "5.0.0-"+s.rels["5.0.0"].ID().String()[:8], s.rels["5.0.0"].Manifest().Images[0].Name)
			must(t, "change", os.WriteFile(path, append(bytes.Clone(s.images[s.rels["5.0.0"].ID()][1:]), 'x'), 0o644))
			wantCode(t, "restore what was changed", f.Restore(t.Context(), s.rels["5.0.0"].ID()), verify.CodeSlot)
			if got := kept(t, f); !slices.Equal(got, []string{"4.0.0"}) || !stateOf(t, f).Slots[install.SlotA].Whole || !stateOf(t, f).Slots[install.SlotB].Whole {
				t.Fatalf("afterwards %q are kept, %+v", got, stateOf(t, f))
			}

			// What the publisher withdraws is not kept.
			must(t, "forsake another", f.Forsake([]verify.Digest{{1}}))
			must(t, "forsake", f.Forsake([]verify.Digest{s.rels["4.0.0"].Manifest().Images[0].SHA256}))
			if got := kept(t, f); got != nil {
				t.Fatalf("after the recall %q are kept", got)
			}
			entries, err := os.ReadDir(filepath.Join(s.dir, "versions"))
			if err != nil || len(entries) != 0 {
				t.Fatalf("left behind: %v, %v", entries, err)
			}
		})
	}
}

// What a cut left of a version is no version, and gone at the next start. Fewer, or none, can be wanted later.
func TestHalfKeptVersionsGo(t *testing.T) {
	s := newShop(t, install.LayoutFolder, 3)
	f := s.open(t)
	for _, version := range []string{"2.0.0", "3.0.0", "4.0.0", "5.0.0", "6.0.0"} {
		s.update(t, f, version)
	}
	dir := filepath.Join(s.dir, "versions")
	name := func(version string) string { return filepath.Join(dir, version+"-"+s.rels[version].ID().String()[:8]) }
	must(t, "cut before the record", os.Remove(name("2.0.0")+".json"))
	alter(t, name("3.0.0")+".json", func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	must(t, "cut in the links", os.Mkdir(filepath.Join(dir, ".new"), 0o755))
	writeFile(t, filepath.Join(dir, ".new", "rootfs"), "half")
	f = s.open(t)
	if got := kept(t, f); !slices.Equal(got, []string{"4.0.0"}) {
		t.Fatalf("%q are kept", got)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Fatalf("the folder holds %v, %v", entries, err)
	}
	s.update(t, f, "7.0.0")
	s.cfg.Keep = 1
	if got := kept(t, s.open(t)); !slices.Equal(got, []string{"5.0.0"}) {
		t.Fatalf("of one %q are kept", got)
	}
	s.cfg.Keep = 0
	f = s.open(t)
	if _, err := os.Stat(dir); !os.IsNotExist(err) || kept(t, f) != nil {
		t.Fatalf("of none: %v", err)
	}
	s.wantRunning(t, f, "7.0.0")
	s.cfg.Keep = install.MaxKept + 1
	_, err = install.OpenFiles(s.cfg)
	wantCode(t, "too many", err, verify.CodeConfig)
}

// An update outranks what is kept for a person: with no room beside it the oldest go, and then the version in the slot is
// not kept. Only what cannot fit at all is refused, and then nothing is dropped.
func TestKeptVersionsMakeRoom(t *testing.T) {
	const content, small = 61_440, 64 << 10 // 60 000 bytes in whole blocks
	for _, c := range []struct {
		name string
		free int64
		want []string
		code verify.Code
	}{
		{"room for all", content + small, []string{"4.0.0", "3.0.0", "2.0.0"}, ""},
		{"one goes", small, []string{"4.0.0", "3.0.0"}, ""},
		{"two cover it", small - content, []string{"4.0.0"}, ""},
		{"the slot too", small - 2*content, nil, ""},
		{"not at all", small - 3*content, []string{"3.0.0", "2.0.0"}, verify.CodeSpace},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newShop(t, install.LayoutFolder, 3)
			f := s.open(t)
			for _, version := range []string{"2.0.0", "3.0.0", "4.0.0", "5.0.0"} {
				s.update(t, f, version)
			}
			s.cfg = install.WithFree(s.cfg, c.free)
			f = s.open(t)
			if err := s.write(t, f, "6.0.0"); verify.CodeOf(err) != c.code {
				t.Fatalf("got %v, want %q", err, c.code)
			}
			if got := kept(t, f); !slices.Equal(got, c.want) {
				t.Fatalf("%q are kept, want %q", got, c.want)
			}
		})
	}
}
