package install

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

const panicDump = "Panic#1 Part1\n<4>[    1.201] Hardware name: QEMU\n<0>[    1.234567] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(8,3)\n<4>[    1.30] CPU: 0\n"

func dump(t *testing.T, folder, name, text string, at time.Time) {
	t.Helper()
	path := filepath.Join(folder, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

func TestLastWords(t *testing.T) {
	armed := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	later, before := armed.Add(time.Minute), armed.Add(-time.Minute)
	for _, c := range []struct {
		name  string
		files map[string]string
		at    time.Time
		want  string
	}{
		{"a panic", map[string]string{"dmesg-ramoops-0": panicDump}, later, "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(8,3)"},
		{"moved away by systemd", map[string]string{"1772366400/dmesg.txt": panicDump}, later, "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(8,3)"},
		{"of an earlier life", map[string]string{"dmesg-ramoops-0": panicDump}, before, ""},
		{"a panic says more than an oops", map[string]string{"dmesg-efi-2": "<1>[ 2.0] BUG: kernel NULL pointer dereference\n", "dmesg-efi-1": panicDump}, later,
			"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(8,3)"},
		{"a console that stops", map[string]string{"console-ramoops-0": "[    3.1] systemd[1]: Started\n[    9.5] mmc0: timeout waiting for interrupt\n\n"}, later, "mmc0: timeout waiting for interrupt"},
		{"a dump without a word of its end", map[string]string{"dmesg-ramoops-0": "Oops?\nrax: 0000\n"}, later, "Oops?"},
		{"only registers", map[string]string{"dmesg-ramoops-0": "rax: 0000\n"}, later, ""},
		{"what would redraw a terminal", map[string]string{"dmesg-ramoops-0": "\x1b[2JKernel panic - not syncing: \x1b]0;x\a" + strings.Repeat("y", 1000)}, later,
			"Kernel panic - not syncing: ]0;x" + strings.Repeat("y", 128)},
		{"another record of pstore", map[string]string{"ftrace-ramoops-0": "Kernel panic - not syncing: no"}, later, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range c.files {
				dump(t, dir, name, text, c.at)
			}
			if got := lastWords([]string{filepath.Join(dir, "none"), dir}, armed); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	dir := t.TempDir()
	if err := os.Symlink("/proc/kmsg", filepath.Join(dir, "console-ramoops-0")); err != nil {
		t.Fatal(err)
	}
	if got := lastWords([]string{dir}, time.Time{}); got != "" {
		t.Errorf("read through a link: %q", got)
	}
}

// Bootloader and kernel together say why a trial fell back.
func TestReasonOfASilentFallback(t *testing.T) {
	dir := t.TempDir()
	dump(t, dir, "dmesg-ramoops-0", panicDump, time.Now())
	v := view{choice: choice{Default: SlotA}, booted: SlotA, note: bootNote{Trial: SlotB, Starts: 3, More: 1}}
	st := v.state()
	if st.Failed != SlotB || st.Why != "the new system was started 2 times and did not confirm itself" {
		t.Fatalf("%+v", st)
	}
	note, _, _ := v.resume()
	note.Why = withLastWords(note.Why, []string{dir}, time.Now().Add(-time.Minute))
	v.note = note
	want := "the new system was started 2 times and did not confirm itself; its kernel said: Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(8,3)"
	if again, _, _ := v.resume(); again != note || v.state().Why != want {
		t.Errorf("kept as %q, and after a further start %+v", v.state().Why, again)
	}
	given := view{choice: choice{Default: SlotA}, booted: SlotA, note: bootNote{Failed: SlotB}}
	if st := given.state(); st.Failed != SlotB || st.Why != "" {
		t.Errorf("a trial that was given up has a reason of its own: %+v", st)
	}
}

func FuzzPanicLine(f *testing.F) {
	for _, seed := range []string{"", panicDump, "<0>[", "\n\n", "Oops\xff\n", "[ 1.0][ T1] watchdog: BUG: soft lockup"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		line, rank := panicLine(data)
		if !utf8.ValidString(line) || utf8.RuneCountInString(line) > maxWordsLine || line != printable(line, maxWordsLine) || (line == "") != (rank == rankNone) {
			t.Errorf("%q, %d", line, rank)
		}
	})
}
