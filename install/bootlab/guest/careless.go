package main

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"

	"meshupd/install/bootlab"
	"meshupd/verify/durable"
)

// shadowBoot is where the back end works when the scenario wants carelessness.
const shadowBoot = "/run/boot"

// shadow copies the boot folder into memory.
func shadow(boot string) (string, error) {
	err := filepath.WalkDir(boot, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		to := shadowBoot + path[len(boot):]
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, data, 0o644)
	})
	return shadowBoot, err
}

// careless brings what the back end has changed to the boot partition as most programs write a file: a new one, synced, renamed
// into place, and the folder synced. For Linux that is safe. A bootloader that does not replay the journal goes on seeing the
// old file, or none.
func careless(sc bootlab.Scenario) error {
	if !sc.Rename {
		return nil
	}
	return filepath.WalkDir(shadowBoot, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		to := "/boot" + path[len(shadowBoot):]
		if old, err := os.ReadFile(to); err == nil && bytes.Equal(old, data) {
			return nil
		}
		return durable.WriteFile(to, data, 0o644)
	})
}
