// Licences prints which modules are linked into a binary, with the full texts of their licences, as those ask for. It is
// a tool of the package build.
//
//	go run ./packaging/licences BINARY
package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: licences BINARY")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "licences:", err)
		os.Exit(1)
	}
}

// run fails when one module has no licence file: nothing is linked in without one.
func run(binary string, out io.Writer) error {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return fmt.Errorf("read what is linked in: %w", err)
	}
	dirs, err := folders()
	if err != nil {
		return err
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("ask for Go's own folder: %w", err)
	}
	if err := texts(out, "Go standard library "+info.GoVersion, strings.TrimSpace(string(root))); err != nil {
		return err
	}
	for _, dep := range info.Deps {
		if dep.Replace != nil {
			dep = dep.Replace
		}
		if strings.HasPrefix(dep.Path, "./") {
			continue // a folder of this repository
		}
		dir := dirs[dep.Path+"@"+dep.Version]
		if dir == "" {
			return fmt.Errorf("%s %s is linked in, but not among the modules that are here", dep.Path, dep.Version)
		}
		if err := texts(out, dep.Path+" "+dep.Version, dir); err != nil {
			return err
		}
	}
	return nil
}

// folders says where each module's source is.
func folders() (map[string]string, error) {
	list := exec.Command("go", "list", "-m", "-json=Path,Version,Dir", "all")
	list.Stderr = os.Stderr
	raw, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("list the modules: %w", err)
	}
	dirs := map[string]string{}
	for dec := json.NewDecoder(bytes.NewReader(raw)); ; {
		var m struct{ Path, Version, Dir string }
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			return dirs, nil
		} else if err != nil {
			return nil, fmt.Errorf("list the modules: %w", err)
		}
		dirs[m.Path+"@"+m.Version] = m.Dir
	}
}

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents|authors|contributors)([-._].*)?$`)

// texts writes one module's licence files under a heading.
func texts(out io.Writer, name, dir string) error {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return fmt.Errorf("look for the licence of %s: %w", name, err)
	}
	found := false
	fmt.Fprintf(out, "%s\n%s\n", strings.Repeat("=", 80), name)
	for _, e := range entries {
		if !e.Type().IsRegular() || !licenceFile.MatchString(e.Name()) || strings.HasSuffix(e.Name(), ".go") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return fmt.Errorf("read the licence of %s: %w", name, err)
		}
		fmt.Fprintf(out, "%s\n\n%s\n", strings.Repeat("-", 80), bytes.TrimSpace(text))
		found = found || !strings.HasPrefix(strings.ToLower(e.Name()), "auth") && !strings.HasPrefix(strings.ToLower(e.Name()), "contrib")
	}
	if !found {
		return fmt.Errorf("%s has no licence file in its source", name)
	}
	return nil
}
