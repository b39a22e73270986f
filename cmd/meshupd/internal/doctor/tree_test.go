package doctor

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"meshupd/verify"
)

// hostile is a tree with links of every kind beside a folder with a secret.
func hostile(t *testing.T) *Tree {
	t.Helper()
	top := t.TempDir()
	dir := filepath.Join(top, "root")
	write := func(name, text string) {
		path := filepath.Join(top, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write("secret", "host")
	write("root/secret", "tree")
	write("root/data/deep/file", "file")
	for name, target := range map[string]string{
		"abs": "/data/deep/file", "up": "../../../../../secret", "absup": "/../../secret", "dir": "/data", "loop": "loop", "ping": "pong", "pong": "ping",
		"none": "/nowhere", "host": filepath.Join(top, "secret"), "data/back": "../dir/deep", "null": "/dev/null",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tree.Close() })
	return tree
}

func TestLinksLeadWhereTheyWouldOnTheDevice(t *testing.T) {
	tree := hostile(t)
	for name, want := range map[string]string{
		"/abs": "file", "up": "tree", "absup": "tree", "/dir/deep/file": "file", "/data/back/file": "file", "../../secret": "tree", "//data//./deep/../deep/file": "file",
	} {
		if got, err := tree.ReadFile(name, 100); string(got) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]error{"loop": syscall.ELOOP, "ping": syscall.ELOOP, "none": fs.ErrNotExist, "host": fs.ErrNotExist, "null": fs.ErrNotExist, "abs/x": syscall.ENOTDIR} {
		if got, err := tree.ReadFile(name, 100); !errors.Is(err, want) {
			t.Errorf("%s: %q, %v; want %v", name, got, err, want)
		}
	}
	for _, name := range []string{"pipe", "dir", "/", ""} {
		if got, err := tree.ReadFile(name, 100); err == nil {
			t.Errorf("%q was read: %q", name, got)
		}
	}
	if _, err := tree.ReadFile("abs", 3); verify.CodeOf(err) != verify.CodeSize {
		t.Errorf("a file that is too large: %v", err)
	}
	if target, err := tree.Readlink("/dir/../abs"); target != "/data/deep/file" || err != nil {
		t.Errorf("Readlink: %q, %v", target, err)
	}
	if list, err := tree.Glob("/dir/deep", "le"); !slices.Equal(list, []string{"/dir/deep/file"}) || err != nil {
		t.Errorf("Glob: %q, %v", list, err)
	}
}

func TestFoldersAreBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range maxEntries + 1 {
		if err := os.Symlink("x", filepath.Join(dir, strings.Repeat("a", i%200)+string(rune('a'+i/200)))); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	if _, err := tree.ReadDir("/"); verify.CodeOf(err) != verify.CodeSize {
		t.Errorf("a folder of %d entries: %v", maxEntries+1, err)
	}
}

func TestUnitsInATree(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"usr/lib/systemd/system/a.service":                      "[Service]\nExecStart=/bin/a\nUser=x\n",
		"usr/lib/systemd/system/a.service.d/10.conf":            "[Service]\nUser=y\nExecStart=\nExecStart=/bin/b \\\n  --more\n",
		"etc/systemd/system/a.service.d/20.conf":                "[Service]\nUser=z # no comment here\n",
		"usr/lib/systemd/system/b.service":                      "[Service]\n",
		"etc/systemd/system/multi-user.target.wants/a.service":  "",
		"usr/lib/systemd/system-preset/10-a.preset":             "# x\ndisable b.service\n",
		"usr/lib/systemd/system-preset/90.preset":               "enable *\n",
		"usr/lib/systemd/system/sockets.target.requires/c.slot": "",
	} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "etc/systemd/system/b.service")); err != nil {
		t.Fatal(err)
	}
	tree, err := OpenTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	u, at, err := tree.UnitFile("a.service")
	if err != nil || at != "/usr/lib/systemd/system/a.service" || u.Last("Service.User") != "z # no comment here" || !slices.Equal(u["Service.ExecStart"], []string{"/bin/b    --more"}) {
		t.Errorf("a.service: %q %q %v", at, u, err)
	}
	if _, at, err := tree.UnitFile("b.service"); at != "/dev/null" || err != nil {
		t.Errorf("a masked unit: %q, %v", at, err)
	}
	if by, err := tree.Wanted("a.service"); by != "multi-user.target" || err != nil {
		t.Errorf("wanted by %q, %v", by, err)
	}
	for unit, want := range map[string]bool{"a.service": true, "b.service": false} {
		if got, err := tree.Preset(unit); got != want || err != nil {
			t.Errorf("preset of %s: %v, %v", unit, got, err)
		}
	}
}

func TestCovering(t *testing.T) {
	mounts := ParseFstab([]byte("# x\n/dev/a / ext4 ro\nbad\nLABEL=d /data ext4 rw,noatime 0 2\ntmpfs /data/run/ tmpfs\n"))
	for name, want := range map[string]string{"/data/x": "/data", "/database": "/", "/data/run": "/data/run", "/": "/"} {
		if m, ok := Covering(mounts, name); !ok || m.File != want {
			t.Errorf("%s lies on %q, want %q", name, m.File, want)
		}
	}
	if _, ok := Covering(nil, "/x"); ok {
		t.Error("a mount that is not there covers something")
	}
}

func TestBootScripts(t *testing.T) {
	ours, err := os.ReadFile("../../../../packaging/boot/grub.cfg")
	if err != nil {
		t.Fatal(err)
	}
	if lacks := GRUBLacks(ours, "A", "B"); len(lacks) > 0 || !NamesSlot(ours) {
		t.Errorf("our own grub.cfg lacks %q", lacks)
	}
	if lacks := GRUBLacks([]byte("# load_env $ORDER A_OK A_TRY=1 save_env\nlinux /vmlinuz\n"), "A", "B"); len(lacks) != 5 {
		t.Errorf("a comment counts: only %q are missed", lacks)
	}
	rauc := []byte("for BOOT_SLOT in \"${BOOT_ORDER}\"; do\n setexpr BOOT_A_LEFT ${BOOT_A_LEFT} - 1\ndone\nsaveenv\n")
	if lacks := UBootLacks(rauc, "left", ""); len(lacks) > 0 {
		t.Errorf("RAUC's boot script lacks %q", lacks)
	}
	if lacks := UBootLacks(rauc, "count", "mender_boot_part"); len(lacks) != 2 {
		t.Errorf("RAUC's boot script would do for boot counting: %q", lacks)
	}
}

func FuzzFilesOfAnImage(f *testing.F) {
	f.Add([]byte("u meshupd - \"x\" /var\n/dev/a / ext4 ro\nenable *\n[Service]\nExecStart=/bin/a \\\n b\nID=\"x\"\nroot:x:0\n"))
	f.Add([]byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x3e\x00"))
	f.Add([]byte("["))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, m := range ParseFstab(data) {
			if m.File == "" || !Below(m.File, m.File) {
				t.Errorf("a mount at %q", m.File)
			}
		}
		u := ParseUnit(data)
		for key, values := range u {
			if len(values) == 0 || u.Last(key) != values[len(values)-1] {
				t.Errorf("%q is %q", key, values)
			}
		}
		HasUser(data, "meshupd")
		MakesUser(data, "meshupd")
		ParseOSRelease(data)
		Presets(data, "meshupd.service")
		GRUBLacks(data, "A", "B")
		UBootLacks(data, "left", "")
		NamesSlot(data)
		if a, err := ReadArch(bytes.NewReader(data)); err == nil && (len(data) < 20 || a.String() == "") {
			t.Errorf("%d bytes are a program for %v", len(data), a)
		}
	})
}
