package install

import (
	"bytes"
	"context"
	"encoding/binary"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"meshupd/verify"
)

func plainStep(_ string, do func() error) error { return do() }

// CannotRun skips what this machine cannot do, and says so. CI can do all of it, so there it fails.
func CannotRun(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("CI must be able to: "+format, args...)
	}
	t.Skipf(format, args...)
}

// tool skips a test that compares with a program which is not installed, and says so.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		CannotRun(t, "%s is not installed; this comparison did not run", name)
	}
	return path
}

func runTool(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", argv, err, out)
	}
	return string(out)
}

func TestGRUBEnvAgainstGRUB(t *testing.T) {
	edit := tool(t, "grub-editenv")
	path := filepath.Join(t.TempDir(), "grubenv")
	runTool(t, edit, path, "create")
	runTool(t, edit, path, "set", "next_entry=a\\b=c", "ORDER=B A", "A_OK=1", "A_TRY=0", "B_OK=0", "B_TRY=1")
	m, err := GRUB{Env: path}.open(loaderEnv{step: plainStep})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := m.read(t.Context()); err != nil || c != (choice{Default: SlotA}) {
		t.Fatalf("read %+v, %v", c, err)
	}
	if err := m.write(t.Context(), choice{Default: SlotA, Trial: SlotB, Left: 1}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(runTool(t, edit, path, "list")), "\n")
	slices.Sort(lines)
	if want := []string{"A_OK=1", "A_TRY=0", "B_OK=1", "B_TRY=0", "ORDER=B A", "next_entry=a\\b=c"}; !slices.Equal(lines, want) {
		t.Fatalf("GRUB reads %q, want %q", lines, want)
	}
	data, err := os.ReadFile(path)
	if err != nil || len(data) != grubEnvSize || bytes.Index(data, []byte("B_TRY=")) > 400 {
		t.Fatalf("the block has %d bytes: %q, %v", len(data), data, err)
	}
}

func TestSampleOfGRUBIsAScript(t *testing.T) {
	runTool(t, tool(t, "grub-script-check"), "../packaging/boot/grub.cfg")
}

func TestUBootEnvAgainstUBoot(t *testing.T) {
	printenv, setenv := tool(t, "fw_printenv"), tool(t, "fw_setenv")
	dir := t.TempDir()
	env, conf, script := filepath.Join(dir, "env"), filepath.Join(dir, "fw_env.config"), filepath.Join(dir, "script")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	first, err := encodeUBootEnv([]ubootVar{{"BOOT_ORDER", "A B"}, {"BOOT_A_LEFT", "3"}, {"bootcmd", "run a; b=c"}}, 0x1000, true, 7)
	must(err)
	must(os.WriteFile(env, append(bytes.Repeat([]byte{0xff}, 0x1000), first...), 0o600))
	must(os.WriteFile(conf, []byte(env+" 0 0x1000\n"+env+" 0x1000 0x1000\n"), 0o600))
	m, err := UBoot{Config: conf}.open(loaderEnv{step: plainStep})
	must(err)
	for left := 5; left > 0; left-- { // the counter moves on, the copies take turns
		want := choice{Default: SlotA, Trial: SlotB, Left: left}
		must(m.write(t.Context(), want))
		got := strings.Split(strings.TrimSpace(runTool(t, printenv, "-c", conf)), "\n")
		slices.Sort(got)
		if want := []string{"BOOT_A_LEFT=3", "BOOT_B_LEFT=" + string(rune('0'+left)), "BOOT_ORDER=B A", "bootcmd=run a; b=c"}; !slices.Equal(got, want) {
			t.Fatalf("U-Boot's tool reads %q, want %q", got, want)
		}
	}
	must(os.WriteFile(script, []byte("BOOT_B_LEFT=a\n"), 0o600))
	runTool(t, setenv, "-c", conf, "-s", script)
	if c, err := m.read(t.Context()); err != nil || c != (choice{Default: SlotA, Trial: SlotB, Left: 10}) {
		t.Fatalf("what U-Boot's tool wrote is read as %+v, %v", c, err)
	}
}

func TestUBootUsesTheCopyThatIsLeft(t *testing.T) {
	dir := t.TempDir()
	env, conf := filepath.Join(dir, "env"), filepath.Join(dir, "fw_env.config")
	older, err := encodeUBootEnv([]ubootVar{{"BOOT_ORDER", "A"}}, 128, true, 255)
	if err != nil {
		t.Fatal(err)
	}
	later, err := encodeUBootEnv([]ubootVar{{"BOOT_ORDER", "B"}}, 128, true, 0)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data []byte
		want SlotName
	}{
		"both":          {append(bytes.Clone(older), later...), SlotB},
		"the other way": {append(bytes.Clone(later), older...), SlotB},
		"later damaged": {append(bytes.Clone(older), append(bytes.Clone(later[:60]), make([]byte, 68)...)...), SlotB},
		"later torn":    {append(bytes.Clone(older), append(bytes.Clone(later[:12]), older[12:]...)...), SlotA},
		"both gone":     {make([]byte, 256), ""},
	} {
		if err := os.WriteFile(env, c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		// Counted from the end, as eMMC layouts do.
		if err := os.WriteFile(conf, []byte(env+" -256 128\n"+env+" -128 128\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		m, err := UBoot{Config: conf}.open(loaderEnv{step: plainStep})
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.read(context.Background())
		if got.Default != c.want || (err == nil) != (c.want != "") || err != nil && verify.CodeOf(err) != verify.CodeBoot {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if c.want == "" {
			continue
		}
		if err := m.write(t.Context(), choice{Default: SlotA, Trial: SlotB, Left: 2}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := m.read(t.Context()); err != nil || got.Left != 2 || got.Trial != SlotB {
			t.Errorf("%s, written: %+v, %v", name, got, err)
		}
	}
}

func TestLoaderConfigsAreChecked(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	entries := func(dir, a string) SystemdBoot {
		s := SystemdBoot{Dir: dir, EFIVars: dir}
		s.Templates.A, s.Templates.B = a, a
		return s
	}
	linux := file("ok.conf", "linux /x\n")
	file("fixed/loader/loader.conf", "default meshupd-000001-a.conf\n")
	file("var/LoaderEntryDefault-"+loaderGUID, "\x07\x00\x00\x00d\x00e\x00b\x00.\x00c\x00o\x00n\x00f\x00\x00\x00")
	for name, l := range map[string]Loader{
		"grub without a path":       GRUB{},
		"grub with one name":        GRUB{Env: "x", Names: Names{"A", "A"}},
		"grub with a strange name":  GRUB{Env: "x", Names: Names{"A=", "B"}},
		"uboot without config":      UBoot{Config: filepath.Join(dir, "none")},
		"uboot with a scheme":       UBoot{Config: file("fw", "x 0 128\n"), Scheme: "x"},
		"uboot on flash":            UBoot{Config: file("mtd", "/dev/null 0 0x1000\n")},
		"uboot, three copies":       UBoot{Config: file("three", "x 0 128\nx 128 128\nx 256 128\n")},
		"uboot, copies overlap":     UBoot{Config: file("overlap", "x 0 128\nx 64 128\n")},
		"uboot, different sizes":    UBoot{Config: file("sizes", "x 0 128\nx 128 256\n")},
		"systemd-boot, no template": entries(dir, filepath.Join(dir, "none")),
		"systemd-boot, no kernel":   entries(dir, file("nokernel", "title x\n")),
		"systemd-boot, default":     entries(filepath.Join(dir, "fixed"), linux),
		"systemd-boot, variable":    entries(filepath.Join(dir, "var"), linux),
		"systemd-boot, prefix":      SystemdBoot{Dir: dir, Prefix: "a-b", EFIVars: dir},
		"tryboot without partition": Tryboot{},
		"tryboot, one partition":    Tryboot{A: 2, B: 2},
		"efi without options":       EFI{},
		"efi, one option":           EFI{A: "1", B: "Boot0001"},
		"custom without command":    Custom{},
	} {
		if _, err := l.open(loaderEnv{step: plainStep}); verify.CodeOf(err) != verify.CodeConfig {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := entries(dir, linux).open(loaderEnv{step: plainStep}); err != nil {
		t.Errorf("systemd-boot without loader.conf: %v", err)
	}
}

// TestEFIOptionOfTheFirmware arms no slot whose boot option is not the slot's.
func TestEFIOptionOfTheFirmware(t *testing.T) {
	dir := t.TempDir()
	m, err := EFI{Vars: dir, A: "1001", B: "1002"}.open(loaderEnv{step: plainStep})
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name+"-"+efiGUID), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("BootOrder", "\x07\x00\x00\x00\x01\x10")
	trial := choice{Default: SlotA, Trial: SlotB, Left: 1}
	for _, option := range []string{"", "\x07\x00\x00\x00USB stick" + string(autoOption)} {
		if option != "" {
			write("Boot1002", option)
		}
		if err := m.write(t.Context(), trial); verify.CodeOf(err) != verify.CodeBoot {
			t.Errorf("with the option %q: %v", option, err)
		}
		if c, err := m.read(t.Context()); err != nil || c.Trial != "" {
			t.Errorf("with the option %q slot %q is armed, %v", option, c.Trial, err)
		}
	}
	write("Boot1002", "\x07\x00\x00\x00slot b")
	if err := m.write(t.Context(), trial); err != nil {
		t.Error(err)
	}
}

func FuzzGRUBEnv(f *testing.F) {
	block := func(text string) []byte {
		return append([]byte(grubHeader+text), bytes.Repeat([]byte("#"), grubEnvSize-len(grubHeader)-len(text))...)
	}
	f.Add(block("ORDER=B A\nA_OK=1\nA_TRY=0\nB_OK=1\nB_TRY=0\nx=a\\\nb\\\\\n"))
	f.Add(block("# WARNING: Do not edit this file\nsaved_entry=0\n"))
	f.Add(block("no assignment\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		env, err := parseGRUBEnv(data)
		if err != nil {
			return
		}
		g := &grub{GRUB: GRUB{Names: Names{"A", "B"}}}
		if c, err := g.decode(env); err == nil && c.wrong() != "" {
			t.Fatalf("the environment says %+v: %s", c, c.wrong())
		}
		want := choice{Default: SlotB, Trial: SlotA, Left: 1}
		g.encode(env, want)
		out, err := env.encode([]string{"ORDER"})
		if err != nil {
			return // it was full
		}
		again, err := parseGRUBEnv(out)
		if err != nil {
			t.Fatalf("%q cannot be read again: %v", out, err)
		}
		if c, err := g.decode(again); err != nil || c != want {
			t.Fatalf("read back %+v, %v", c, err)
		}
		for name, value := range env.values {
			if again.values[name] != value {
				t.Fatalf("%q was %q and is %q", name, value, again.values[name])
			}
		}
	})
}

func FuzzUBootEnv(f *testing.F) {
	seed, err := encodeUBootEnv([]ubootVar{{"BOOT_ORDER", "A B"}, {"BOOT_B_LEFT", "0x3"}, {"boot_slot", "B"}, {"upgrade_available", "1"}}, 256, true, 1)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed[5:])
	f.Add([]byte("=x\x00"))
	f.Fuzz(func(t *testing.T, body []byte) {
		// With a checksum that holds, or a fuzzer would never get past it.
		data, err := encodeUBootEnv(nil, len(body)+6, true, 1)
		if err != nil {
			t.Fatal(err)
		}
		copy(data[5:], body)
		binary.LittleEndian.PutUint32(data, crc32.ChecksumIEEE(data[5:]))
		vars, _, err := parseUBootEnv(data, true)
		if err != nil {
			return
		}
		for _, scheme := range []UBootScheme{UBootLeft, UBootCount} {
			u := &uboot{UBoot: UBoot{Names: Names{"A", "B"}, Scheme: scheme, Slot: "boot_slot", Attempts: 3}}
			if c, err := u.decode(vars); err == nil && c.wrong() != "" {
				t.Fatalf("the environment says %+v: %s", c, c.wrong())
			}
			want := choice{Default: SlotA, Trial: SlotB, Left: 7}
			if c, err := u.decode(u.encode(slices.Clone(vars), want)); err != nil || c != want {
				t.Fatalf("read back %+v, %v", c, err)
			}
		}
	})
}

func FuzzFwEnvConfig(f *testing.F) {
	f.Add([]byte("# device offset size\n/dev/mmcblk0 0x1000 0x2000\n/dev/mmcblk0 -0x4000 0x2000 0x1000 4\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		places, err := parseFwEnvConfig(data)
		if err == nil && (len(places) < 1 || len(places) > 2) {
			t.Fatalf("%d places", len(places))
		}
	})
}

func FuzzEntryName(f *testing.F) {
	for _, name := range []string{"m-000001-a.conf", "m-000002-b+3.conf", "m-000002-b+2-1.conf", "m-000002-b+0-3.conf", "m-2-b.conf"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		e, ok := parseEntry("m", name)
		if !ok {
			return
		}
		if again, ok := parseEntry("m", e.name("m")); !ok || again != e {
			t.Fatalf("%q is %+v, and %q is %+v", name, e, e.name("m"), again)
		}
		c, err := entriesSay([]found{{e, true}, {entry{gen: 1, slot: SlotA}, true}})
		if err != nil || c.wrong() != "" {
			t.Fatalf("%+v, %v", c, err)
		}
	})
}

func FuzzAutoboot(f *testing.F) {
	f.Add([]byte("[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n#meshupd asked 1\n"))
	f.Add([]byte("boot_partition=300\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := parseAutoboot(data)
		if err != nil || a.all == 0 {
			return
		}
		a.asked = strings.TrimSpace(a.asked)[:min(len(strings.TrimSpace(a.asked)), maxBootID)]
		if a.try == 0 || strings.TrimSpace(a.asked) != a.asked {
			a.asked = ""
		}
		if again, err := parseAutoboot(a.encode()); err != nil || again != a {
			t.Fatalf("%+v comes back as %+v, %v", a, again, err)
		}
	})
}

func FuzzBootOptions(f *testing.F) {
	f.Add([]byte("\x07\x00\x00\x00\x01\x00\x02\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		attrs, options, err := parseBootOptions(data)
		if err == nil && !bytes.Equal(encodeBootOptions(attrs, options), data) {
			t.Fatalf("%x comes back as %x", data, encodeBootOptions(attrs, options))
		}
	})
}

func FuzzCustomState(f *testing.F) {
	f.Add([]byte(`{"default":"a","trial":"b","left":2,"booted":"a","more":"x"}`))
	f.Add([]byte(`{"default":"a","left":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := parseCustomState(data); err == nil && c.wrong() != "" {
			t.Fatalf("%+v: %s", c, c.wrong())
		}
	})
}

func FuzzBootNote(f *testing.F) {
	data, err := seal(noteSchema, bootNote{Trial: SlotB, More: 2, BootID: "1"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(bodyOf(f, data))
	f.Fuzz(func(t *testing.T, data []byte) {
		n, err := parseNote(resealed(noteSchema, data))
		if err != nil && n != (bootNote{}) {
			t.Fatalf("an error with a note: %+v", n)
		}
		for _, c := range []choice{{Default: SlotA}, {Default: SlotA, Trial: SlotB, Left: 1}, {Default: SlotB, Trial: SlotA}} {
			for _, booted := range []SlotName{SlotA, SlotB} {
				v := view{choice: c, note: n, booted: booted, id: "1"}
				if next, _, _ := v.resume(); next.More < 0 || next.More > maxStarts {
					t.Fatalf("%+v resumes with %+v", v, next)
				}
			}
		}
	})
}

func FuzzMountinfo(f *testing.F) {
	f.Add("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n", "meshupd.slot=b quiet")
	f.Fuzz(func(t *testing.T, mounts, cmdline string) {
		mountedAt(mounts, "98:0")
		if slot := slotOfCmdline(cmdline); slot != "" && !slot.valid() {
			t.Fatalf("slot %q", slot)
		}
	})
}
