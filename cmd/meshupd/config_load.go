package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"meshupd/verify"
)

// Where the layers are when no --config is given; later ones win, value by value.
const (
	vendorConfig = "/usr/lib/meshupd/config.toml"
	localConfig  = "/etc/meshupd/config.toml"
	configParts  = "/etc/meshupd/conf.d"
)

// maxConfig bounds a config file: a wrong path must not eat the memory.
const maxConfig = 1 << 20

// configFile is one layer.
type configFile struct {
	path string
	data []byte
}

// loadConfig reads and checks the config: the file at path alone, or with an
// empty path the layers of this system. Errors have the code E-CONFIG and, where there
// is one, the place in the file.
func loadConfig(path string) (Config, error) {
	files, err := configFiles(path)
	if err != nil {
		return Config{}, err
	}
	return parseConfig(files)
}

func configFiles(path string) ([]configFile, error) {
	return configFilesIn(hostFiles{}, path)
}

// fileSource is where config files are read: this system, or the tree of an image.
type fileSource interface {
	// ReadFile reads a file of at most that many bytes.
	ReadFile(name string, most int64) ([]byte, error)
	// Glob lists the paths in a folder whose names end so, in ascending order; no folder is an empty one.
	Glob(dir, suffix string) ([]string, error)
}

type hostFiles struct{}

func (hostFiles) ReadFile(name string, most int64) ([]byte, error) { return readFileMax(name, most) }

func (hostFiles) Glob(dir, suffix string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, "*"+suffix)) // sorted
}

func configFilesIn(src fileSource, path string) ([]configFile, error) {
	paths := []string{path}
	if path == "" {
		paths = []string{vendorConfig, localConfig}
		parts, err := src.Glob(configParts, ".toml")
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", configParts, err)
		}
		paths = append(paths, parts...)
	}
	var files []configFile
	for _, p := range paths {
		data, err := src.ReadFile(p, maxConfig)
		if path == "" && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, verify.Refuse(verify.CodeConfig, "%w", openError("read the config", err))
		}
		files = append(files, configFile{p, data})
	}
	if len(files) == 0 {
		return nil, verify.Refuse(verify.CodeConfig, "there is no config: neither --config nor %s nor %s", localConfig, vendorConfig)
	}
	return files, nil
}

// readFileMax reads a file that has at most that many bytes.
func readFileMax(path string, most int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > most {
		return nil, verify.Refuse(verify.CodeSize, "%s has %d bytes, more than %d", path, info.Size(), most)
	}
	return os.ReadFile(path)
}

// parseConfig lays the files over the defaults and checks the result.
func parseConfig(files []configFile) (Config, error) {
	cfg := defaultConfig()
	for _, f := range files {
		dec := toml.NewDecoder(bytes.NewReader(f.data)).DisallowUnknownFields()
		if err := dec.Decode(&cfg); err != nil {
			return Config{}, decodeError(f, err)
		}
	}
	if err := cfg.Validate(); err != nil {
		return Config{}, fieldPlace(files, err)
	}
	return cfg, nil
}

// decodeError places what the TOML reader found.
func decodeError(f configFile, err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		first := &strict.Errors[0]
		key := strings.Join(first.Key(), ".")
		text := fmt.Sprintf("unknown key %q", key)
		if near := nearestKey(key); near != "" {
			text += ": did you mean " + near + "?"
		}
		row, col := first.Position()
		return placed(f, row, col, len(first.Key()[len(first.Key())-1]), text)
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, col := at.Position()
		return placed(f, row, col, 1, plainTOML(at))
	}
	return verify.Refuse(verify.CodeConfig, "%s: %w", f.path, err)
}

var wrongType = regexp.MustCompile(` of type (\S+)$`)

// plainTOML words an error of the TOML reader for people who do not know Go.
func plainTOML(err *toml.DecodeError) string {
	text := strings.TrimPrefix(err.Error(), "toml: ")
	m := wrongType.FindStringSubmatch(text)
	if m == nil {
		return text
	}
	want := map[string]string{"string": "text in quotes", "bool": "true or false", "int": "a whole number", "[]string": "a list of texts in quotes",
		"main.Size": `a size in quotes like "64MiB"`, "main.Rate": `a rate in quotes like "4MiB/s"`, "main.Duration": `a duration in quotes like "90s"`}[m[1]]
	if want == "" {
		want = "something else"
	}
	text = "the value is of the wrong type: " + want + " is wanted"
	if key := strings.Join(err.Key(), "."); key != "" {
		text = key + " has a value of the wrong type: " + want + " is wanted"
	}
	return text
}

// fieldPlace finds the line of a value that Validate refused: in the last file that sets it, as that one won.
func fieldPlace(files []configFile, err error) error {
	var field *fieldError
	if errors.As(err, &field) {
		for _, f := range slices.Backward(files) {
			if row, col, n := findKey(f.data, field.key); row > 0 {
				return placed(f, row, col, n, field.Error())
			}
		}
	}
	return verify.Refuse(verify.CodeConfig, "%s: %w", files[len(files)-1].path, err)
}

var (
	tablePattern = regexp.MustCompile(`^\s*\[\s*([A-Za-z0-9_.-]+)\s*\]`)
	keyPattern   = regexp.MustCompile(`^\s*([A-Za-z0-9_.-]+)\s*=`)
)

// findKey looks for the line that sets a key. It only serves the picture in a message, so it may miss unusual spellings.
func findKey(data []byte, key string) (row, col, length int) {
	table := ""
	for i, line := range bytes.Split(data, []byte("\n")) {
		if m := tablePattern.FindSubmatch(line); m != nil {
			table = string(m[1]) + "."
		} else if m := keyPattern.FindSubmatchIndex(line); m != nil && table+string(line[m[2]:m[3]]) == key {
			return i + 1, m[2] + 1, m[3] - m[2]
		}
	}
	return 0, 0, 0
}

// placed makes the error with its picture: the line before, the line, and carets under the place.
func placed(f configFile, row, col, length int, text string) error {
	lines := strings.Split(strings.TrimSuffix(string(f.data), "\n"), "\n")
	var b strings.Builder
	for n := max(row-1, 1); n <= row && n <= len(lines); n++ {
		fmt.Fprintf(&b, "%5d | %s\n", n, strings.TrimRight(strings.ReplaceAll(lines[n-1], "\t", " "), "\r"))
	}
	fmt.Fprintf(&b, "      | %s%s\n", strings.Repeat(" ", max(col-1, 0)), strings.Repeat("^", max(length, 1)))
	err := &placedError{fmt.Errorf("%s:%d:%d: %s", f.path, row, col, text), b.String()}
	return verify.Refuse(verify.CodeConfig, "%w", err)
}

// configKeys lists all keys by their path.
func configKeys() []string {
	var keys []string
	var walk func(t reflect.Type, prefix string)
	walk = func(t reflect.Type, prefix string) {
		for f := range t.Fields() {
			key := prefix + f.Tag.Get("toml")
			if f.Type.Kind() == reflect.Struct {
				walk(f.Type, key+".")
				continue
			}
			keys = append(keys, key)
		}
	}
	walk(reflect.TypeFor[Config](), "")
	return keys
}

// nearestKey guesses which key was meant: one typed wrong, or put in the wrong table.
func nearestKey(key string) string {
	best, near := 3, ""
	last := key[strings.LastIndex(key, ".")+1:]
	for _, k := range configKeys() {
		if d := distance(key, k); d < best {
			best, near = d, k
		}
		if near == "" && k[strings.LastIndex(k, ".")+1:] == last {
			near = k
		}
	}
	return near
}
