package main

import (
	"path/filepath"
	"strings"
	"time"
)

// ApplyConfig parts the device in two: a daemon without rights, and `meshupd apply`, which writes the slots. Both read the
// same files.
type ApplyConfig struct {
	Socket string   `toml:"socket" comment:"where \"meshupd apply\" answers; empty: the daemon writes the slots itself, as root"`
	State  string   `toml:"state" comment:"folder of \"meshupd apply\", which the daemon cannot write"`
	User   string   `toml:"user" comment:"the daemon's user; besides root only it may ask \"meshupd apply\" for anything"`
	Idle   Duration `toml:"idle" comment:"\"meshupd apply\" ends when nobody asked for so long, if systemd can start it again; \"0s\": never"`
}

func (c *Config) checkApply() error {
	a := c.Apply
	switch {
	case a.Idle != 0 && a.Idle < Duration(time.Second):
		return &fieldError{"apply.idle", `is less than 1s (write it like "30s"; "0s" for never)`}
	case a.Socket == "":
		return nil
	case !filepath.IsAbs(a.Socket):
		return &fieldError{"apply.socket", "is no absolute path"}
	case !filepath.IsAbs(a.State):
		return &fieldError{"apply.state", "is no absolute path"}
	case a.User == "":
		return &fieldError{"apply.user", "is empty"}
	}
	// Who owns a folder can rename what is in it: nothing that decides what boots may lie below the daemon's.
	for key, path := range map[string]string{"apply.state": a.State, "slots.folder": c.Slots.Folder, "trust": c.Trust} {
		for owner, folder := range map[string]string{"state": c.State, "run": c.Run} {
			if path != "" && below(path, folder) {
				return &fieldError{key, "lies in the folder of `" + owner + "`, which belongs to the daemon without rights"}
			}
		}
	}
	return nil
}

// below says whether path is folder or in it, by name.
func below(path, folder string) bool {
	rel, err := filepath.Rel(folder, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}
