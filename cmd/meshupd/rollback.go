package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newRollbackCmd(e *env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rollback",
		Short: "Start the previous version of this device again",
		Long: "Start the previous version of this device again. The version that is left is not tried again here;\n" +
			"other devices of the site are not changed.",
		Example: example("sudo meshupd rollback"),
		Args:    takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := e.client()
			defer client.Close()
			if err := client.Rollback(cmd.Context()); err != nil {
				return nothingWas("changed", err)
			}
			if e.json != "" {
				return e.printObject("meshupd.rollback/1", map[string]any{"started": true})
			}
			fmt.Fprintln(e.Out, "The previous version is being started. Watch: meshupd status --watch")
			return nil
		},
	}
	return talksToDaemon(e, cmd)
}
