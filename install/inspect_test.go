package install_test

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

// snapshot is every file below a folder with its bytes.
func snapshot(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			out[path] = string(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestInspectionChangesNothing(t *testing.T) {
	for name, make := range loaders {
		t.Run(name, func(t *testing.T) {
			f, state := make(t), ramDir(t)
			f.at(1)
			cfg := f.config(state)
			if v := install.InspectBoot(t.Context(), cfg); v.Err != nil || !v.New {
				t.Errorf("on a new device: %+v", v)
			}
			if left := snapshot(t, state); len(left) > 0 {
				t.Errorf("an inspection of a new device left %v", left)
			}
			l, err := install.OpenLoader(t.Context(), install.BlockTest{Step: plainStep}.With(cfg))
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Try(t.Context(), install.SlotB, 1); err != nil {
				t.Fatal(err)
			}
			// The media are wherever the firmware put them: what they say shows whether they changed.
			before, want := snapshot(t, state), boot(t, l)
			v := install.InspectBoot(t.Context(), cfg)
			if v.Err != nil || v.New || v.State != want || want.Phase != install.PhaseArmed {
				t.Errorf("armed: got %+v, want state %+v", v, want)
			}
			if after := snapshot(t, state); len(after) != len(before) || boot(t, l) != want {
				t.Errorf("an inspection changed the boot state: %+v is %+v, %d files are %d", want, boot(t, l), len(before), len(after))
			}
			for _, p := range v.Places {
				if p.Err != nil || p.System.ReadOnly {
					t.Errorf("place %+v", p)
				}
			}
		})
	}
}

func plainStep(_ string, do func() error) error { return do() }

func boot(t *testing.T, l interface {
	Boot(context.Context) (install.BootState, error)
}) install.BootState {
	t.Helper()
	st, err := l.Boot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestInspectionOfWhatCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, path := range []string{a, b} {
		writeTest(path, make([]byte, 8192))
	}
	env := filepath.Join(dir, "grubenv")
	cfg := install.BlockConfig{A: a, B: b, State: filepath.Join(dir, "state", "deep"), Loader: install.GRUB{Env: env},
		Booted: func() (install.SlotName, error) { return install.SlotA, nil }}
	if v := install.InspectBoot(t.Context(), cfg); verify.CodeOf(v.Err) != verify.CodeBoot || v.Places[0].Err == nil {
		t.Errorf("no grubenv: %+v", v)
	}
	writeTest(env, make([]byte, 1024))
	if v := install.InspectBoot(t.Context(), cfg); verify.CodeOf(v.Err) != verify.CodeBoot {
		t.Errorf("a grubenv of zeros: %+v", v)
	}
	if v := install.InspectSlots(cfg); v.Apart != nil || v.IdleErr != nil || v.Size[install.SlotB] != 8192 || v.Booted != install.SlotA {
		t.Errorf("two good files: %+v", v)
	}
	cfg.B = a
	if v := install.InspectSlots(cfg); verify.CodeOf(v.Apart) != verify.CodeConfig {
		t.Errorf("one file for both slots: %+v", v)
	}
	cfg.B = filepath.Join(dir, "none")
	if v := install.InspectSlots(cfg); verify.CodeOf(v.Apart) != verify.CodeConfig || v.IdleErr == nil {
		t.Errorf("a slot that is not there: %+v", v)
	}
	if _, err := os.Stat(filepath.Join(dir, "state")); err == nil {
		t.Error("an inspection made the folder of the records")
	}
}

func TestFactorySettings(t *testing.T) {
	block := func(vars string) []byte {
		data := []byte("# GRUB Environment Block\n" + vars)
		for len(data) < 1024 {
			data = append(data, '#')
		}
		return data
	}
	g := install.GRUB{Env: "/boot/grub/grubenv"}
	if slot, err := g.Factory(block("ORDER=A B\nA_OK=1\nA_TRY=0\nB_OK=0\nB_TRY=0\n")); slot != install.SlotA || err != nil {
		t.Errorf("a settled block: %q, %v", slot, err)
	}
	for name, vars := range map[string]string{"empty": "", "trial": "ORDER=B A\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=0\n"} {
		if slot, err := g.Factory(block(vars)); verify.CodeOf(err) != verify.CodeBoot {
			t.Errorf("%s: %q, %v", name, slot, err)
		}
	}
	p := install.Tryboot{A: 2, B: 3}
	if slot, err := p.Factory([]byte("[all]\ntryboot_a_b=1\nboot_partition=2\n")); slot != install.SlotA || err != nil {
		t.Errorf("autoboot.txt: %q, %v", slot, err)
	}
	if _, err := p.Factory([]byte("[all]\nboot_partition=1\n")); verify.CodeOf(err) != verify.CodeBoot {
		t.Errorf("autoboot.txt of another partition: %v", err)
	}
}
