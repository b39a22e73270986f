package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
)

func newVersionCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Say which build this is, and which the daemon runs",
		Example: example("meshupd version", "meshupd version --json"),
		Args:    takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			own := buildVersion()
			ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
			defer cancel()
			client := e.client()
			defer client.Close()
			// A daemon that does not run is no failure of this command.
			daemon, err := client.Version(ctx)
			if e.json != "" {
				out := struct {
					control.VersionInfo
					Daemon *control.VersionInfo `json:"daemon,omitempty"`
				}{VersionInfo: own}
				if err == nil {
					out.Daemon = &daemon
				}
				return e.printJSON(out, false)
			}
			fmt.Fprintln(e.Out, versionLine("meshupd", own))
			if err == nil {
				c := e.canvas(e.Out)
				fmt.Fprintln(e.Out, c.Clean(versionLine("daemon ", daemon)))
			} else if e.verbose {
				e.sayf("daemon  %s", err)
			}
			return nil
		},
	}
	return talksToDaemon(e, cmd)
}

// buildVersion reads what the Go linker wrote: no build date, so that two builds are equal.
func buildVersion() control.VersionInfo {
	v := control.VersionInfo{Schema: control.VersionSchema, Version: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Commit = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

// buildTime is that of the last commit, which the Go linker wrote; zero if it is unknown.
func buildTime() time.Time {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return time.Time{}
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.time" {
			if t, err := time.Parse(time.RFC3339, s.Value); err == nil {
				return t.UTC()
			}
		}
	}
	return time.Time{}
}

func versionLine(what string, v control.VersionInfo) string {
	commit := "commit unknown"
	if v.Commit != "" {
		commit = "commit " + v.Commit[:min(12, len(v.Commit))]
	}
	if v.Modified {
		commit += " with changes"
	}
	return fmt.Sprintf("%s %s (%s, %s, %s)", what, v.Version, commit, v.Go, v.Platform)
}
