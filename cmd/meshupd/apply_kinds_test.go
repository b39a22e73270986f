package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"meshupd/install"
	"meshupd/install/ocitest"
	"meshupd/verify"
	"meshupd/verify/verifytest"
)

// makeSlots puts into the config what the kind needs: two files for two partitions below a bootloader of the integrator's, an
// installer of the integrator's, or an engine. Folders need nothing.
func (h *half) makeSlots(t *testing.T) {
	t.Helper()
	if h.kind == "files" {
		return
	}
	h.cfg.Slots.Kind = h.kind
	script := []string{"sh", filepath.Join(h.dir, "installer.sh")}
	data, err := os.ReadFile("testdata/machine/lab/installer.sh")
	must(t, err)
	for name, data := range map[string][]byte{"installer.sh": data, "boot": []byte("a\n"), "booted": []byte("A\n"), "a": []byte("factory"), "b": make([]byte, 2<<20)} {
		put(t, filepath.Join(h.dir, name), data)
	}
	switch h.kind {
	case "block":
		h.cfg.Slots.A, h.cfg.Slots.B = filepath.Join(h.dir, "a"), filepath.Join(h.dir, "b")
		h.cfg.Slots.Bootloader, h.cfg.Slots.Boot.Command = "custom", script
	case "command":
		h.cfg.Slots.Delegate.Command = script
	case "container":
		h.cfg.Slots.Container.Engine, h.cfg.Slots.Container.Settle = "podman", Duration(10*time.Millisecond)
		h.cfg.Slots.Container.Command = []string{h.podman, "--root", h.dir}
		h.cfg.Slots.Container.Services = map[string]ServiceConfig{"web": {}}
	}
}

// fakePodman builds the engine that runs nothing.
func fakePodman(t *testing.T) string { return ocitest.Build(t, "meshupd/install/ocitest/podman") }

// archive is an image for the engine; all have the same size.
func (h *half) archive(version byte) []byte {
	return ocitest.Image{File: bytes.Repeat([]byte{'v', version}, 100_000)}.Archive()
}

// evil is another image of the same size, that a vendor could have made and did not sign.
func (h *half) evil(good []byte) []byte {
	if h.kind == "container" {
		return h.archive('!')
	}
	return bytes.Repeat([]byte("not signed "), len(good)/11+1)[:len(good)]
}

// holds looks whether slot b really holds an image.
func (h *half) holds(rel *verify.Release, data []byte) error {
	path := filepath.Join(h.dir, "b")
	switch h.kind {
	case "container":
		if got := h.engine().Images["localhost/meshupd/web:b"]; got != configOf(data) {
			return fmt.Errorf("the engine has image %s", got)
		}
		return nil
	case "files":
		path = filepath.Join(h.cfg.Slots.Folder, "b", rel.Manifest().Images[0].Name)
	}
	got, err := os.ReadFile(path)
	if err == nil && !bytes.HasPrefix(got, data) {
		err = fmt.Errorf("other bytes in slot b")
	}
	return err
}

// engineStore is what the engine has, and all images that it was ever given.
type engineStore struct {
	Images map[string]string
	Seen   []string
}

func (h *half) engine() (s engineStore) {
	raw, err := os.ReadFile(filepath.Join(h.dir, "store.json"))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err != nil {
		s.Seen = []string{err.Error()}
	}
	return s
}

// configOf is the digest of the config of an archive that h.archive made, or "".
func configOf(archive []byte) string {
	for v := range 256 {
		img := ocitest.Image{File: bytes.Repeat([]byte{'v', byte(v)}, 100_000)}
		if bytes.Contains(archive, img.File) {
			return fmt.Sprintf("%x", sha256.Sum256(img.Blobs()[1].Data))
		}
	}
	return ""
}

// sawOnly: what another program was given is only what was signed, not even for a moment anything else.
func (h *half) sawOnly(t *testing.T, good []byte) {
	t.Helper()
	switch h.kind {
	case "container":
		if evil := configOf(h.evil(good)); slices.Contains(h.engine().Seen, evil) || len(h.engine().Seen) == 0 {
			t.Fatalf("the engine was given %q", h.engine().Seen)
		}
	case "command":
		told, err := os.ReadFile(filepath.Join(h.dir, "told"))
		must(t, err)
		if evil := fmt.Sprintf("%x", sha256.Sum256(h.evil(good))); strings.Contains(string(told), evil) || len(told) == 0 {
			t.Fatalf("the installer was given\n%s", told)
		}
	}
}

// The lies that reach further than folders do: into partitions, into another installer, into an engine that parses what it is given as root.
func TestApplyIsLiedToAboutEveryKind(t *testing.T) {
	swap := func(change func(h *half, data []byte) []byte) func(t *testing.T, h *half) verify.Code {
		return func(t *testing.T, h *half) verify.Code {
			rel, data := h.release(t, verifytest.Opts{})
			put(t, h.imagePath(rel), change(h, data))
			return h.askWrite(t, rel.ID())
		}
	}
	lies := []struct {
		name string
		want verify.Code
		lie  func(t *testing.T, h *half) verify.Code
	}{
		{"another image of the same size", verify.CodeDigest, swap(func(h *half, data []byte) []byte { return h.evil(data) })},
		{"an image cut short", verify.CodeTruncated, swap(func(_ *half, data []byte) []byte { return data[:len(data)-1] })},
		{"an image with more behind it", verify.CodeSize, swap(func(_ *half, data []byte) []byte { return append(bytes.Clone(data), "more"...) })},
		{"the image of the release before", verify.CodeDigest, func(t *testing.T, h *half) verify.Code {
			_, old := h.release(t, verifytest.Opts{})
			rel, _ := h.release(t, verifytest.Opts{})
			put(t, h.imagePath(rel), old)
			return h.askWrite(t, rel.ID())
		}},
		{"an image that is a link to the right bytes", verify.CodeBundle, func(t *testing.T, h *half) verify.Code {
			rel, data := h.release(t, verifytest.Opts{})
			put(t, h.store("images", "x"), data)
			mk(t, h.imagePath(rel), func(path string) error { return os.Symlink(h.store("images", "x"), path) })
			return h.askWrite(t, rel.ID())
		}},
		{"an older release than accepted", verify.CodeOrder, func(t *testing.T, h *half) verify.Code {
			old, _ := h.release(t, verifytest.Opts{})
			rel, _ := h.release(t, verifytest.Opts{})
			must(t, h.client.Learn(t.Context(), rel.ID()))
			return h.askWrite(t, old.ID())
		}},
		{"a slot that nobody wrote", verify.CodeBoot, says(`{"do":"try","slot":"b"}`)},
		{"confirming what was never tried", verify.CodeBoot, says(`{"do":"confirm"}`)},
		{"giving up what was never tried", verify.CodeBoot, says(`{"do":"fallback"}`)},
		{"bytes of its own", verify.CodeFormat, says(`{"do":"write","release":"` + strings.Repeat("a", 64) + `","path":"/tmp/x"}`)},
		{"an image for slots of another kind", verify.CodeKind, func(t *testing.T, h *half) verify.Code {
			other := h.kind
			h.kind = "container"
			if other == "container" {
				h.kind = "files"
			}
			rel, _ := h.release(t, verifytest.Opts{})
			h.kind = other
			return h.askWrite(t, rel.ID())
		}},
	}
	podman := fakePodman(t)
	for _, kind := range []string{"block", "command", "container"} {
		for _, tt := range lies {
			t.Run(kind+", "+tt.name, func(t *testing.T) {
				h := newHalfOf(t, kind, func(h *half) { h.podman = podman })
				if got := tt.lie(t, h); got != tt.want {
					t.Errorf("the answer is %q, not %q", got, tt.want)
				}
				if now := h.slotB(t); now.Whole {
					t.Errorf("slot b now holds %+v", now)
				}
				if st, _ := h.client.State(t.Context()); st.Phase != install.PhaseSettled || st.Default != install.SlotA {
					t.Errorf("the slots are %+v", st)
				}
				h.honest(t)
				h.sawOnly(t, make([]byte, 1<<20))
			})
		}
	}
}

// Each sort of check can forbid a confirmation, whatever the other half says, and allows it when it passes.
func TestApplyAsksEverySortOfCheck(t *testing.T) {
	for _, sort := range []string{"command", "http", "units", "files"} {
		t.Run(sort, func(t *testing.T) {
			dir := t.TempDir()
			well := filepath.Join(dir, "well")
			var sick atomic.Bool
			sick.Store(true)
			web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if sick.Load() {
					w.WriteHeader(http.StatusInternalServerError)
				}
			}))
			defer web.Close()
			put(t, filepath.Join(dir, "systemctl"), fmt.Appendf(nil, "#!/bin/sh\ntest -e %s\n", well))
			must(t, os.Chmod(filepath.Join(dir, "systemctl"), 0o755))
			t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
			h := newHalfOf(t, "files", func(h *half) {
				c := &h.cfg.Health
				switch sort {
				case "command":
					c.Command = []string{"test", "-e", well}
				case "http":
					c.HTTP = []string{web.URL}
				case "units":
					c.Units = []string{"kiosk.service"}
				case "files":
					c.Files = []string{well}
				}
			})
			rel, _ := h.release(t, verifytest.Opts{})
			for _, step := range []struct {
				line string
				want verify.Code
			}{
				{`{"do":"write","release":"` + rel.ID().String() + `"}`, ""}, {`{"do":"try","slot":"b"}`, ""}, {`{"do":"restart"}`, ""},
				{`{"do":"confirm"}`, verify.CodeHealth}, {`{"do":"check","slot":"b"}`, verify.CodeHealth}, {`{"do":"confirm"}`, verify.CodeHealth},
			} {
				if code := h.ask(t, step.line); code != step.want {
					t.Fatalf("%s: %q, not %q", step.line, code, step.want)
				}
			}
			sick.Store(false)
			put(t, well, nil)
			if code := h.ask(t, `{"do":"confirm"}`); code != "" {
				t.Fatalf("healthy, and the confirmation is refused: %s", code)
			}
			if st, err := h.client.State(t.Context()); err != nil || st.Default != install.SlotB {
				t.Fatalf("the state is %+v, %v", st, err)
			}
		})
	}
}
