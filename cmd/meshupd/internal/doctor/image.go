package doctor

import (
	"path"
	"slices"
	"strings"
)

// Mount is a line of /etc/fstab.
type Mount struct {
	Spec, File, Type string
	Options          []string
}

// lines yields the lines of a small text file without comments and empty ones.
func lines(data []byte, yield func(line string) bool) {
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if !yield(line) {
			return
		}
	}
}

// ParseFstab reads /etc/fstab (fstab(5)); lines that are none are passed over, as mount does.
func ParseFstab(data []byte) (out []Mount) {
	for line := range func(yield func(string) bool) { lines(data, yield) } {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		m := Mount{Spec: f[0], File: path.Clean(f[1]), Type: f[2]}
		if len(f) > 3 {
			m.Options = strings.Split(f[3], ",")
		}
		out = append(out, m)
	}
	return out
}

// Covering finds the mount that a path lies on: the deepest whose folder holds it. False when there is none.
func Covering(mounts []Mount, name string) (Mount, bool) {
	var best Mount
	for _, m := range mounts {
		if Below(name, m.File) && len(m.File) >= len(best.File) {
			best = m
		}
	}
	return best, best.File != ""
}

// Below says whether a path is the folder or in it, by name. Both are absolute.
func Below(name, folder string) bool {
	name, folder = path.Clean(name), path.Clean(folder)
	return name == folder || strings.HasPrefix(name, strings.TrimSuffix(folder, "/")+"/")
}

// HasUser looks for a user, or a group, in a file like /etc/passwd.
func HasUser(passwd []byte, name string) bool {
	for line := range func(yield func(string) bool) { lines(passwd, yield) } {
		if first, _, ok := strings.Cut(line, ":"); ok && first == name {
			return true
		}
	}
	return false
}

// MakesUser says whether a file of sysusers.d(5) makes the user; it then makes a group of that name too.
func MakesUser(conf []byte, name string) bool {
	for line := range func(yield func(string) bool) { lines(conf, yield) } {
		if f := strings.Fields(line); len(f) > 1 && (f[0] == "u" || f[0] == "u!") && f[1] == name {
			return true
		}
	}
	return false
}

// ParseOSRelease reads os-release(5).
func ParseOSRelease(data []byte) map[string]string {
	out := map[string]string{}
	for line := range func(yield func(string) bool) { lines(data, yield) } {
		if key, value, ok := strings.Cut(line, "="); ok {
			out[key] = strings.Trim(value, `"'`)
		}
	}
	return out
}

// Unit holds the settings of a unit file, "Service.ExecStart", each with all its values.
type Unit map[string][]string

// ParseUnit reads a unit file (systemd.syntax(7)). An empty value forgets those before, as in systemd.
func ParseUnit(data []byte) Unit {
	u := Unit{}
	u.Add(data)
	return u
}

// Add lays a drop-in over the unit.
func (u Unit) Add(data []byte) {
	text := strings.ReplaceAll(string(data), "\\\n", " ")
	section := ""
	for line := range func(yield func(string) bool) { lines([]byte(text), yield) } {
		if line[0] == '[' && line[len(line)-1] == ']' {
			section = line[1:len(line)-1] + "."
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			continue
		}
		key, value = section+strings.TrimSpace(key), strings.TrimSpace(value)
		if value == "" {
			delete(u, key)
			continue
		}
		u[key] = append(u[key], value)
	}
}

// Last is the value that counts of a setting that has one.
func (u Unit) Last(key string) string {
	if v := u[key]; len(v) > 0 {
		return v[len(v)-1]
	}
	return ""
}

// Presets says what a preset file (systemd.preset(5)) makes of a unit: enabled or disabled, and false if it says nothing of it.
func Presets(data []byte, unit string) (enabled, said bool) {
	for line := range func(yield func(string) bool) { lines(data, yield) } {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "enable" && f[0] != "disable" {
			continue
		}
		if ok, err := path.Match(f[1], unit); err == nil && ok {
			return f[0] == "enable", true
		}
	}
	return false, false
}

// unitFolders are where unit files lie, the one that wins first.
var unitFolders = []string{"/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

const maxUnit = 256 << 10

// UnitFile finds a unit with its drop-ins. The path is "" when there is none, and "/dev/null" when it is masked.
func (t *Tree) UnitFile(name string) (Unit, string, error) {
	for _, dir := range unitFolders {
		at := path.Join(dir, name)
		if target, err := t.Readlink(at); err == nil && path.Clean(target) == "/dev/null" {
			return nil, "/dev/null", nil
		}
		if !t.Exists(at) {
			continue
		}
		data, err := t.ReadFile(at, maxUnit)
		if err != nil {
			return nil, at, err
		}
		u := ParseUnit(data)
		return u, at, t.dropIns(u, name)
	}
	return nil, "", nil
}

// dropIns lays them over the unit, in the order of their names; of two with one name the first folder's counts.
func (t *Tree) dropIns(u Unit, name string) error {
	found := map[string]string{}
	for _, dir := range unitFolders {
		list, err := t.Glob(path.Join(dir, name+".d"), ".conf")
		if err != nil {
			return err
		}
		for _, at := range list {
			if _, ok := found[path.Base(at)]; !ok {
				found[path.Base(at)] = at
			}
		}
	}
	for _, base := range sortedKeys(found) {
		data, err := t.ReadFile(found[base], maxUnit)
		if err != nil {
			return err
		}
		u.Add(data)
	}
	return nil
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// Wanted says which unit starts this one: a link in a .wants or .requires folder, which is what enabling makes.
func (t *Tree) Wanted(name string) (by string, err error) {
	for _, dir := range unitFolders {
		list, err := t.ReadDir(dir)
		if err != nil {
			continue // not there, or no folder
		}
		for _, e := range list {
			for _, kind := range []string{".wants", ".requires"} {
				if unit, ok := strings.CutSuffix(e.Name(), kind); ok && t.Exists(path.Join(dir, e.Name(), name)) {
					return unit, nil
				}
			}
		}
	}
	return "", nil
}

// FirstBoot says whether the image has no machine id yet, so that systemd applies its presets at the first start.
func (t *Tree) FirstBoot() bool {
	data, err := t.ReadFile("/etc/machine-id", 4<<10)
	id := strings.TrimSpace(string(data))
	return err == nil && id == "uninitialized"
}

// Preset says what the presets of the image make of a unit.
func (t *Tree) Preset(name string) (bool, error) {
	found := map[string]string{}
	for _, dir := range []string{"/etc/systemd/system-preset", "/usr/lib/systemd/system-preset", "/lib/systemd/system-preset"} {
		list, err := t.Glob(dir, ".preset")
		if err != nil {
			return false, err
		}
		for _, at := range list {
			if _, ok := found[path.Base(at)]; !ok {
				found[path.Base(at)] = at
			}
		}
	}
	for _, base := range sortedKeys(found) {
		data, err := t.ReadFile(found[base], maxUnit)
		if err != nil {
			return false, err
		}
		if enabled, said := Presets(data, name); said {
			return enabled, nil
		}
	}
	return false, nil
}
