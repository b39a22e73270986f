package install_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"strings"
	"sync"
	"testing"

	"meshupd/install"
	"meshupd/install/slotstest"
	"meshupd/verify"
)

// firmware is a machine as its bootloader sees it: what is on the media, and the bootloader's own steps at power-on, told
// a second time in the words of its documentation.
type firmware struct {
	loader install.Loader
	// turn is what the bootloader does at a power-on: it returns the slot that it boots, and with dry set changes nothing.
	turn func(dry bool) install.SlotName

	mu     sync.Mutex // owns:
	power  int
	booted install.SlotName
}

// at brings the machine to its power-th start.
func (f *firmware) at(power int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ; f.power < power; f.power++ {
		if f.power == 0 {
			f.booted = install.SlotA // as it came from the factory
			continue
		}
		f.booted = f.turn(false)
	}
}

func (f *firmware) runs() (install.SlotName, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.booted, nil
}

func (f *firmware) bootID() (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return "boot-" + strconv.Itoa(f.power), nil
}

func (f *firmware) config(state string) install.BlockConfig {
	return install.BlockConfig{A: "a", B: "b", State: state, Loader: f.loader, Booted: f.runs, BootID: f.bootID, FactoryVersion: "1.0.0"}
}

// loaders are all bootloaders there are, each on media of its own.
var loaders = map[string]func(t *testing.T) *firmware{
	"grub":         func(t *testing.T) *firmware { return grubFirmware(t) },
	"uboot left":   func(t *testing.T) *firmware { return ubootFirmware(t, install.UBootLeft) },
	"uboot count":  func(t *testing.T) *firmware { return ubootFirmware(t, install.UBootCount) },
	"systemd-boot": systemdBootFirmware,
	"tryboot":      trybootFirmware,
	"efi":          efiFirmware,
	"custom":       customFirmware,
}

func TestLoaders(t *testing.T) {
	for name, make := range loaders {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			slotstest.RunBootloader(t, func(t *testing.T) slotstest.OpenBoot {
				f, state := make(t), ramDir(t)
				return func(power int, step slotstest.Step) (slotstest.Boot, error) {
					f.at(power)
					return install.OpenLoader(t.Context(), install.BlockTest{Step: step}.With(f.config(state)))
				}
			})
		})
	}
}

// ramDir is a folder in memory where there is one: most of these tests wait for nothing but syncs.
func ramDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "meshupd-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func readTest(path string) []byte {
	data, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	return data
}

func writeTest(path string, data []byte) {
	if err := os.WriteFile(path, data, 0o644); err != nil {
		panic(err)
	}
}

// grubFirmware does what packaging/boot/grub.cfg does.
func grubFirmware(t testing.TB) *firmware {
	env := filepath.Join(ramDir(t), "grubenv")
	save := func(vars map[string]string) {
		block := []byte("# GRUB Environment Block\n")
		for _, name := range []string{"saved_entry", "ORDER", "A_OK", "A_TRY", "B_OK", "B_TRY"} {
			block = append(block, name+"="+vars[name]+"\n"...)
		}
		writeTest(env, append(block, bytes.Repeat([]byte("#"), 1024-len(block))...))
	}
	load := func() map[string]string {
		vars := make(map[string]string)
		for _, line := range strings.Split(string(readTest(env)), "\n") {
			if name, value, found := strings.Cut(line, "="); found {
				vars[name] = value
			}
		}
		return vars
	}
	save(map[string]string{"saved_entry": `gnulinux\\x`, "ORDER": "A B", "A_OK": "1", "A_TRY": "1", "B_OK": "0", "B_TRY": "1"})
	return &firmware{
		loader: install.GRUB{Env: env},
		turn: func(dry bool) install.SlotName {
			vars := load()
			if vars["saved_entry"] != `gnulinux\\x` {
				t.Errorf("a variable of somebody else became %q", vars["saved_entry"])
			}
			pick, last := "", "A"
			for _, slot := range strings.Fields(vars["ORDER"]) {
				if vars[slot+"_OK"] != "1" {
					continue
				}
				last = slot
				if vars[slot+"_TRY"] == "0" && pick == "" {
					pick = slot
				}
			}
			if pick == "" {
				pick = last
			}
			vars[pick+"_TRY"] = "1"
			if !dry {
				save(vars)
			}
			return install.SlotName(strings.ToLower(pick))
		},
	}
}

// ubootCopies is a second reader and writer of the environment, as simple as it can be.
type ubootCopies struct {
	path string
	size int
}

func (u ubootCopies) load() (map[string]string, int) {
	data := readTest(u.path)
	best := -1
	for i := range 2 {
		c := data[i*u.size : (i+1)*u.size]
		if crc32.ChecksumIEEE(c[5:]) != binary.LittleEndian.Uint32(c) {
			continue
		}
		if best < 0 || int8(c[4]-data[best*u.size+4]) > 0 {
			best = i
		}
	}
	if best < 0 {
		panic("no copy of the environment is valid")
	}
	vars := make(map[string]string)
	for _, s := range bytes.Split(data[best*u.size+5:(best+1)*u.size], []byte{0}) {
		if name, value, found := strings.Cut(string(s), "="); found {
			vars[name] = value
		}
	}
	return vars, best
}

func (u ubootCopies) save(vars map[string]string, at int, count byte) {
	c := make([]byte, u.size)
	n := 5
	for name, value := range vars {
		n += copy(c[n:], name+"="+value+"\x00")
	}
	c[4] = count
	binary.LittleEndian.PutUint32(c, crc32.ChecksumIEEE(c[5:]))
	f, err := os.OpenFile(u.path, os.O_WRONLY, 0)
	if err != nil {
		panic(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(c, int64(at*u.size)); err != nil {
		panic(err)
	}
}

func (u ubootCopies) change(vars map[string]string) {
	_, at := u.load()
	u.save(vars, 1-at, readTest(u.path)[at*u.size+4]+1)
}

func ubootFirmware(t *testing.T, scheme install.UBootScheme) *firmware {
	dir := ramDir(t)
	u := ubootCopies{filepath.Join(dir, "env"), 1024}
	writeTest(u.path, bytes.Repeat([]byte{0xff}, 2*u.size))
	conf := filepath.Join(dir, "fw_env.config")
	writeTest(conf, fmt.Appendf(nil, "# redundant\n%s 0 0x400\n%s 0x400 0x400\n", u.path, u.path))
	first := map[string]string{"BOOT_ORDER": "A B", "BOOT_A_LEFT": "3", "BOOT_B_LEFT": "3", "bootcmd": "run x; y=z"}
	turn := ubootLeftTurn
	if scheme == install.UBootCount {
		first = map[string]string{"boot_slot": "A", "upgrade_available": "0", "bootcmd": "run x; y=z"}
		turn = ubootCountTurn
	}
	u.save(first, 1, 254) // so that the counter goes round
	return &firmware{
		loader: install.UBoot{Config: conf, Scheme: scheme},
		turn: func(dry bool) install.SlotName {
			vars, _ := u.load()
			if vars["bootcmd"] != "run x; y=z" {
				t.Errorf("a variable of somebody else became %q", vars["bootcmd"])
			}
			slot := turn(vars)
			if !dry {
				u.change(vars)
			}
			return install.SlotName(strings.ToLower(slot))
		},
	}
}

// ubootLeftTurn is RAUC's boot script.
func ubootLeftTurn(vars map[string]string) string {
	for range 2 {
		for _, slot := range strings.Fields(vars["BOOT_ORDER"]) {
			if left, _ := strconv.ParseInt(vars["BOOT_"+slot+"_LEFT"], 16, 0); left > 0 {
				vars["BOOT_"+slot+"_LEFT"] = strconv.FormatInt(left-1, 16)
				return slot
			}
		}
		vars["BOOT_A_LEFT"], vars["BOOT_B_LEFT"] = "3", "3"
	}
	panic("no slot in BOOT_ORDER")
}

// ubootCountTurn is CONFIG_BOOTCOUNT_ENV with an altbootcmd that changes nothing.
func ubootCountTurn(vars map[string]string) string {
	slot := vars["boot_slot"]
	if vars["upgrade_available"] != "1" {
		return slot
	}
	count, _ := strconv.Atoi(vars["bootcount"])
	limit, _ := strconv.Atoi(vars["bootlimit"])
	vars["bootcount"] = strconv.Itoa(count + 1)
	if limit > 0 && count+1 > limit {
		return map[string]string{"A": "B", "B": "A"}[slot]
	}
	return slot
}

var countedName = regexp.MustCompile(`^(.*?)(?:\+(\d+)(?:-(\d+))?)?\.conf$`)

// systemdBootFirmware sorts as sd-boot does without sort keys: entries that are used up last, then the highest version.
func systemdBootFirmware(t *testing.T) *firmware {
	dir := ramDir(t)
	entries := filepath.Join(dir, "loader", "entries")
	if err := os.MkdirAll(entries, 0o755); err != nil {
		t.Fatal(err)
	}
	writeTest(filepath.Join(dir, "loader", "loader.conf"), []byte("timeout 0\ndefault meshupd-*\n"))
	loader := install.SystemdBoot{Dir: dir, EFIVars: filepath.Join(dir, "none")}
	loader.Templates.A, loader.Templates.B = filepath.Join(dir, "a.tmpl"), filepath.Join(dir, "b.tmpl")
	writeTest(loader.Templates.A, []byte("title A\nsort-key zz\nlinux /a/linux\n"))
	writeTest(loader.Templates.B, []byte("title B\nversion 1\nlinux /b/linux\n"))
	writeTest(filepath.Join(entries, "factory.conf"), []byte("title Factory\nlinux /a/linux\n"))
	return &firmware{loader: loader, turn: func(dry bool) install.SlotName {
		files, err := os.ReadDir(entries)
		if err != nil {
			panic(err)
		}
		type found struct {
			file, id   string
			left, done int
		}
		var all []found
		for _, file := range files {
			m := countedName.FindStringSubmatch(file.Name())
			if m == nil {
				continue
			}
			e := found{file: file.Name(), id: m[1], left: -1}
			if m[2] != "" {
				e.left, _ = strconv.Atoi(m[2])
				e.done, _ = strconv.Atoi(m[3])
			}
			all = append(all, e)
		}
		sort.Slice(all, func(i, j int) bool {
			if (all[i].left == 0) != (all[j].left == 0) {
				return all[j].left == 0
			}
			return all[i].id > all[j].id
		})
		first := all[0]
		if first.left > 0 && !dry {
			to := fmt.Sprintf("%s+%d-%d.conf", first.id, first.left-1, first.done+1)
			if err := os.Rename(filepath.Join(entries, first.file), filepath.Join(entries, to)); err != nil {
				panic(err)
			}
			first.file = to
		}
		text := string(readTest(filepath.Join(entries, first.file)))
		if strings.Contains(text, "sort-key") || strings.Contains(text, "version") {
			t.Errorf("the entry holds\n%s", text)
		}
		if strings.Contains(text, "linux /b/linux") {
			return install.SlotB
		}
		return install.SlotA
	}}
}

// trybootFirmware boots an armed trial always: as if each start were a restart that asked for it.
func trybootFirmware(t *testing.T) *firmware {
	file := filepath.Join(ramDir(t), "autoboot.txt")
	const factory = "[all]\nboot_partition=2\n"
	writeTest(file, []byte(factory))
	part := regexp.MustCompile(`(?s)^\[all\]\n(?:tryboot_a_b=1\n)?boot_partition=([23])\n(?:\[tryboot\]\nboot_partition=([23])\n)?(?:#meshupd asked ([^\n]*)\n)?(?:#*\n)?$`)
	slots := map[string]install.SlotName{"2": install.SlotA, "3": install.SlotB}
	f := &firmware{loader: install.Tryboot{File: file, A: 2, B: 3}}
	f.turn = func(dry bool) install.SlotName {
		data := readTest(file)
		m := part.FindStringSubmatch(string(data))
		if m == nil || len(data) != 512 && m[0] != factory {
			t.Errorf("autoboot.txt is\n%s", data)
			return install.SlotA
		}
		if m[2] == "" || m[3] != "" && m[3] != "boot-"+strconv.Itoa(f.power) {
			return slots[m[1]]
		}
		if m[3] == "" && !dry {
			asked := strings.Replace(string(data), "boot_partition="+m[2]+"\n#", "boot_partition="+m[2]+"\n#meshupd asked before\n#", 1)
			writeTest(file, append([]byte(asked[:511]), '\n'))
		}
		return slots[m[2]]
	}
	return f
}

func efiFirmware(t *testing.T) *firmware {
	dir := ramDir(t)
	file := func(name string) string {
		return filepath.Join(dir, name+"-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	}
	writeTest(file("BootOrder"), []byte("\x07\x00\x00\x00\x05\x00\x01\x00\x02\x00"))
	writeTest(file("Boot0001"), []byte("\x07\x00\x00\x00 slot a"))
	writeTest(file("Boot0002"), []byte("\x07\x00\x00\x00 slot b"))
	slots := map[byte]install.SlotName{1: install.SlotA, 2: install.SlotB}
	return &firmware{loader: install.EFI{Vars: dir, A: "0001", B: "Boot0002"}, turn: func(dry bool) install.SlotName {
		if next, err := os.ReadFile(file("BootNext")); err == nil {
			if !dry {
				if err := os.Remove(file("BootNext")); err != nil {
					panic(err)
				}
			}
			if len(next) != 6 || slots[next[4]] == "" {
				t.Errorf("BootNext is %x", next)
			}
			return slots[next[4]]
		}
		order := readTest(file("BootOrder"))
		if !bytes.Contains(order[4:], []byte{5, 0}) {
			t.Errorf("the option of somebody else is gone from BootOrder: %x", order)
		}
		for ; len(order) > 4; order = order[2:] {
			if slot := slots[order[4]]; slot != "" { // option 5 is a stick that is not there
				return slot
			}
		}
		t.Error("no slot is in BootOrder")
		return install.SlotA
	}}
}

// customScript keeps three words in a file: the default, the trial, the starts left.
const customScript = `#!/bin/sh
set -eu
f="$1"; shift
read -r default trial left < "$f"
put() { echo "$1 $2 $3" > "$f.new"; mv "$f.new" "$f"; }
case "$1" in
get-state)
	if [ "$trial" = - ]; then echo "{\"default\":\"$default\"}"
	else echo "{\"default\":\"$default\",\"trial\":\"$trial\",\"left\":$left}"; fi ;;
try) put "$default" "$2" "$3" ;;
confirm|fallback) put "$2" - 0 ;;
*) echo "no such verb: $1" >&2; exit 2 ;;
esac
`

func customFirmware(t *testing.T) *firmware {
	dir := ramDir(t)
	script, file := filepath.Join(dir, "boot"), filepath.Join(dir, "state")
	if err := os.WriteFile(script, []byte(customScript), 0o755); err != nil {
		t.Fatal(err)
	}
	writeTest(file, []byte("a - 0\n"))
	return &firmware{loader: install.Custom{Command: []string{"/bin/sh", script, file}, Most: 100}, turn: func(dry bool) install.SlotName {
		f := strings.Fields(string(readTest(file)))
		if f[1] == "-" || f[2] == "0" {
			return install.SlotName(f[0])
		}
		left, _ := strconv.Atoi(f[2])
		if !dry {
			writeTest(file, fmt.Appendf(nil, "%s %s %d\n", f[0], f[1], left-1))
		}
		return install.SlotName(f[1])
	}}
}

// blockHarness is a machine with two slots of 64 KiB and one of the bootloaders.
func blockHarness(t *testing.T, f *firmware, a, b string) slotstest.Harness {
	dir := ramDir(t)
	paths := map[install.SlotName]string{install.SlotA: a, install.SlotB: b}
	offset := 0 // starts of the machine that the daemon asked for
	return slotstest.Harness{
		Images: 1,
		Open: func(power int, step slotstest.Step) (slotstest.Device, error) {
			f.at(power + offset)
			cfg := f.config(filepath.Join(dir, "state"))
			cfg.A, cfg.B = a, b
			return install.OpenBlock(t.Context(), install.BlockTest{
				Step: step,
				Reboot: func(context.Context, install.SlotName, string) error {
					offset++
					f.at(power + offset)
					return nil
				},
			}.With(cfg))
		},
		Pointed: func() install.SlotName { return f.turn(true) },
		Holds: func(slot install.SlotName) map[string]verify.Digest {
			return deviceDigest(t, paths[slot])
		},
	}
}
