// Command podman answers like podman as far as meshupd asks it, and runs nothing: its images are lines in a file, its containers
// too. It is an engine for tests that start thousands of them. `podman --root DIR COMMAND ...`.
package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"meshupd/verify/durable"
)

// store is all that it keeps, in one file.
type store struct {
	Images     map[string]string // by reference, the digest of the config
	Containers map[string]container
	Seen       []string // configs of all images that were ever loaded
}

type container struct {
	Names  []string
	State  string
	Pid    int
	Labels map[string]string
	Ref    string
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(125)
	}
}

func run(args []string) error {
	if len(args) < 3 || args[0] != "--root" {
		return errors.New("usage: podman --root DIR COMMAND ARGUMENTS")
	}
	path := filepath.Join(args[1], "store.json")
	s := store{Images: map[string]string{}, Containers: map[string]container{}}
	raw, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(raw, &s)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	changed, err := s.do(args[2], args[3:])
	if err != nil || !changed {
		return err
	}
	if raw, err = json.Marshal(s); err != nil {
		return err
	}
	return durable.WriteFile(path, raw, 0o600)
}

func (s *store) do(command string, args []string) (changed bool, err error) {
	last := ""
	if len(args) > 0 {
		last = args[len(args)-1]
	}
	switch command {
	case "version":
		fmt.Println("4.9.9")
		return false, nil
	case "images":
		return false, s.list()
	case "ps":
		return false, json.NewEncoder(os.Stdout).Encode(slices.Collect(maps.Values(s.Containers)))
	case "load":
		ref, config, err := load(os.Stdin)
		s.Images[ref] = config
		s.Seen = append(s.Seen, config)
		return true, err
	case "tag":
		config, found := s.Images[args[0]]
		if !found {
			return false, fmt.Errorf("%s: image not known", args[0])
		}
		s.Images[last] = config
		return true, nil
	case "rmi":
		_, found := s.Images[last]
		delete(s.Images, last)
		return found, nil
	case "rm":
		_, found := s.Containers[last]
		delete(s.Containers, last)
		return found, nil
	case "logs":
		return false, nil
	case "run":
		return true, s.start(args)
	}
	return false, fmt.Errorf("unknown command %q", command)
}

func (s store) list() error {
	byID := map[string][]string{}
	for ref, config := range s.Images {
		byID[config] = append(byID[config], ref)
	}
	list := []any{}
	for id, names := range byID {
		list = append(list, map[string]any{"Id": id, "Names": names})
	}
	return json.NewEncoder(os.Stdout).Encode(list)
}

func (s store) start(args []string) error {
	c := container{State: "running", Pid: os.Getpid(), Labels: map[string]string{}}
	for i, arg := range args {
		switch {
		case arg == "--name":
			c.Names = []string{args[i+1]}
		case arg == "--label":
			key, value, _ := strings.Cut(args[i+1], "=")
			c.Labels[key] = value
		case strings.HasPrefix(arg, "localhost/meshupd/"):
			c.Ref = arg
		}
	}
	if _, found := s.Images[c.Ref]; !found {
		return fmt.Errorf("%s: image not known", c.Ref)
	}
	if _, found := s.Containers[c.Names[0]]; found {
		return fmt.Errorf("the container name %q is already in use", c.Names[0])
	}
	s.Containers[c.Names[0]] = c
	return nil
}

// load finds the reference and the config of the one image of an OCI archive.
func load(r io.Reader) (ref, config string, err error) {
	files := map[string][]byte{}
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", "", err
		}
		if files[h.Name], err = io.ReadAll(t); err != nil {
			return "", "", err
		}
	}
	var index struct {
		Manifests []struct {
			Digest      string
			Annotations map[string]string
		}
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
		return "", "", fmt.Errorf("an archive of %d images (%v)", len(index.Manifests), err)
	}
	var manifest struct{ Config struct{ Digest string } }
	one := index.Manifests[0]
	if err := json.Unmarshal(files["blobs/sha256/"+strings.TrimPrefix(one.Digest, "sha256:")], &manifest); err != nil {
		return "", "", err
	}
	return one.Annotations["org.opencontainers.image.ref.name"], strings.TrimPrefix(manifest.Config.Digest, "sha256:"), nil
}
