package main

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"
)

func newConfigCmd(e *env) *cobra.Command {
	check := &cobra.Command{
		Use:     "check [FILE]",
		Short:   "Say whether a config can be used",
		Example: example("meshupd config check /etc/meshupd/config.toml", "meshupd config check      the layers of this system"),
		Args:    takes(0, 1, "one FILE or none"),
		RunE: func(_ *cobra.Command, args []string) error {
			path := ""
			if len(args) == 1 {
				path = args[0]
			}
			files, err := configFiles(path)
			if err != nil {
				return err
			}
			cfg, err := parseConfig(files)
			if err != nil {
				return err
			}
			if e.json != "" {
				return e.printObject("meshupd.config-check/1", map[string]any{"ok": true, "files": filePaths(files)})
			}
			fmt.Fprintf(e.Out, "ok  %s: product %s, channel %s, slots %s\n", strings.Join(filePaths(files), ", "), cfg.Product, cfg.Channel, cfg.Slots.place())
			return nil
		},
	}
	var path string
	var origin bool
	show := &cobra.Command{
		Use:     "show",
		Short:   "Print the config in force, with all defaults",
		Example: example("meshupd config show", "meshupd config show --origin --config my.toml"),
		Args:    takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error {
			files, err := configFiles(path)
			if err != nil {
				return err
			}
			cfg, err := parseConfig(files)
			if err != nil {
				return err
			}
			return showConfig(e, cfg, files, origin)
		},
	}
	show.Flags().StringVar(&path, "config", "", "this file alone instead of the layers of the system")
	show.Flags().BoolVar(&origin, "origin", false, "say which file each value is from")
	return group("config", "Check or show the daemon's config", check, show)
}

func filePaths(files []configFile) []string {
	var paths []string
	for _, f := range files {
		paths = append(paths, f.path)
	}
	return paths
}

// showConfig prints TOML that can be used as a config again, or the same values as JSON.
func showConfig(e *env, cfg Config, files []configFile, origin bool) error {
	raw, err := toml.Marshal(cfg)
	if err != nil {
		return fmt.Errorf("write the config: %w", err)
	}
	from := origins(files)
	if e.json != "" {
		var values map[string]any
		if err := toml.Unmarshal(raw, &values); err != nil {
			return fmt.Errorf("write the config: %w", err)
		}
		return e.printObject("meshupd.config/1", map[string]any{"config": values, "origin": from})
	}
	table := ""
	var out bytes.Buffer
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSuffix(line, "\n")
		if m := tablePattern.FindStringSubmatch(line); m != nil {
			table = m[1] + "."
		}
		if m := keyPattern.FindStringSubmatch(line); m != nil && origin {
			where := from[table+m[1]]
			if where == "" {
				where = "default"
			}
			line += "  # " + where
		}
		fmt.Fprintln(&out, line)
	}
	_, err = e.Out.Write(out.Bytes())
	return err
}

// origins says which file set each key last. Keys that no file sets are not in it.
func origins(files []configFile) map[string]string {
	from := map[string]string{}
	for _, f := range files {
		var values map[string]any
		if toml.Unmarshal(f.data, &values) != nil {
			continue // parseConfig has refused it before
		}
		var walk func(m map[string]any, prefix string)
		walk = func(m map[string]any, prefix string) {
			for k, v := range m {
				if sub, ok := v.(map[string]any); ok {
					walk(sub, prefix+k+".")
					continue
				}
				from[prefix+k] = f.path
			}
		}
		walk(values, "")
	}
	return from
}
